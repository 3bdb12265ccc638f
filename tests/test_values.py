"""Sizes and booleans as users write them."""

from __future__ import annotations

import argparse
from typing import Any

import pytest

from nbdtool import values


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0", 0),
        ("512", 512),
        ("512b", 512),
        ("10K", 10240),
        ("10k", 10240),
        ("10KiB", 10240),
        ("10kb", 10240),
        ("1M", 1 << 20),
        ("1MiB", 1 << 20),
        ("1.5G", 3 << 29),
        ("0.5K", 512),
        ("1.0", 1),
        ("2048s", 1 << 20),
        ("1T", 1 << 40),
        ("2P", 1 << 51),
        ("7E", 7 << 60),
        ("9223372036854775807", (1 << 63) - 1),
        (" 4K ", 4096),
        ("1.000244140625M", (1 << 20) + 256),
    ],
)
def test_sizes(text: str, expected: int) -> None:
    assert values.size(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        *("", " ", "-1", "+1", "K", "1X", "1KK", "1 K", "0x10", "1e3", "1,5G", ".5K", "1.", "1.K"),
        *("8E", "9223372036854775808", "0.5", "1.0001K", "1" * 33, "1." + "0" * 40, "nan", "inf"),
        *("\u0661", "\uff11", "1K\n2"),
    ],
)
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError):
        values.size(text)


@pytest.mark.parametrize("text", ["on", "true", "yes", "1", "ON", "True"])
def test_on(text: str) -> None:
    assert values.boolean(text) is True


@pytest.mark.parametrize("text", ["off", "false", "no", "0", "OFF", "False"])
def test_off(text: str) -> None:
    assert values.boolean(text) is False


@pytest.mark.parametrize("text", ["", "2", "y", "n", "maybe", "on "])
def test_neither(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError):
        values.boolean(text)


@pytest.mark.parametrize(
    ("words", "expected"),
    [([], False), (["--flag"], True), (["--flag=off"], False), (["--flag=yes"], True)],
)
def test_flags(words: list[str], expected: Any) -> None:
    parser = argparse.ArgumentParser()
    values.add_flag(parser, "--flag")
    assert parser.parse_args(words).flag is expected


def test_counts() -> None:
    connections = values.count("connections", 1, 16)
    assert [connections("1"), connections("16"), connections("07")] == [1, 16, 7]
    for text in "0", "17", "-1", "+1", "", " 1", "1.0", "\u0661", "9" * 5000:
        with pytest.raises(argparse.ArgumentTypeError, match=r"connections: .* \(1 to 16\)"):
            connections(text)


def test_patterns() -> None:
    texts = ["BAD", "0xdeadBEEF", "0x00", "x", "0X00", "\udcff", "ä"]
    expected = [b"BAD", b"\xde\xad\xbe\xef", b"\0", b"x", b"0X00", b"\xff", "ä".encode()]
    assert [values.pattern(text) for text in texts] == expected
    for text in "", "0x", "0x0", "0xzz":
        with pytest.raises(argparse.ArgumentTypeError):
            values.pattern(text)
