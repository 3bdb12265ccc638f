"""The progress line, on a pseudo-terminal and elsewhere."""

from __future__ import annotations

import io
import os
import select
from collections.abc import Iterator
from types import SimpleNamespace

import pytest

from nbdtool import progress
from nbdtool.progress import Progress, human


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """Standard error is a terminal of 60 columns; what it shows is read from the descriptor."""
    controller, name = os.openpty()
    monkeypatch.setenv("COLUMNS", "60")
    with os.fdopen(name, "w") as stream:
        monkeypatch.setattr(progress, "sys", SimpleNamespace(stderr=stream))
        yield controller
    os.close(controller)


class Clock:
    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr(progress.time, "monotonic", lambda: self.now)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def shown(terminal: int) -> str:
    """What the terminal got; the kernel takes a moment to hand it over."""
    text = b""
    while select.select([terminal], [], [], 0.2)[0]:
        text += os.read(terminal, 1 << 16)
    return text.decode()


def test_bytes_rate_and_time_left(terminal: int, clock: Clock) -> None:
    with Progress("writing", 4 << 30) as line:
        clock.now += 2
        line.update(1 << 30)
        assert shown(terminal) == "\rwriting: 1.0 GiB of 4.0 GiB, 25%, 512.0 MiB/s, 0:06 left\x1b[K"
    assert shown(terminal) == "\r\x1b[K"


def test_unknown_total(terminal: int, clock: Clock) -> None:
    with Progress("reading the tree", unit="files") as line:
        clock.now += 4
        line.update(80_000)
        assert shown(terminal) == "\rreading the tree: 80,000 files, 20,000 files/s\x1b[K"


def test_a_few_lines_a_second(terminal: int, clock: Clock) -> None:
    with Progress("writing", 1 << 30) as line:
        for done in range(10_000):
            clock.now += 0.001
            line.update(done << 10)
    assert 40 <= shown(terminal).count("writing:") <= 50


def test_quick_work_shows_nothing(terminal: int, clock: Clock) -> None:
    with Progress("writing", 1 << 30) as line:
        clock.now += 0.3
        line.update(1 << 30)
    assert shown(terminal) == ""


def test_line_fits(terminal: int, clock: Clock) -> None:
    with Progress("x" * 100, 1 << 30) as line:
        clock.now += 2
        line.update(1)
        assert shown(terminal) == "\r" + "x" * 59 + "\x1b[K"


def test_wiped_after_a_failure(terminal: int, clock: Clock) -> None:
    with pytest.raises(ValueError), Progress("writing", 100) as line:
        clock.now += 2
        line.update(50)
        raise ValueError
    assert shown(terminal).endswith("\r\x1b[K")


@pytest.mark.parametrize("closed", [False, True])
def test_nothing_without_a_terminal(
    monkeypatch: pytest.MonkeyPatch, clock: Clock, closed: bool
) -> None:
    stream = io.StringIO()
    stderr = None if closed else stream
    monkeypatch.setattr(progress, "sys", SimpleNamespace(stderr=stderr))
    with Progress("writing", 100) as line:
        clock.now += 5
        line.update(50)
    assert stream.getvalue() == ""


def test_human() -> None:
    sizes = [0, 1023, 1024, 1536, 1 << 20, 1 << 30, 1 << 40, 1 << 50, 1 << 60]
    expected = "0 B,1023 B,1.0 KiB,1.5 KiB,1.0 MiB,1.0 GiB,1.0 TiB,1.0 PiB,1024.0 PiB"
    assert ",".join(map(human, sizes)) == expected
