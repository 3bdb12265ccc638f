"""nbdtool guestfs: what the command line says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from nbdtool import cli
from nbdtool.disks.guestfs import launch
from nbdtool.disks.guestfs.keys import parse_key
from nbdtool.disks.guestfs.mounts import parse_mount
from nbdtool.errors import Error, UsageError


@pytest.mark.parametrize(
    ("line", "values"),
    [
        ("guestfs disk=disk.img export=/dev/sda1", {"disk": [("disk.img", "")]}),
        ("guestfs disk.img -r", {"disk": [("disk.img", "")], "read_only": True}),
        (
            "-r guestfs domain=Guest mount=inspect export=/images/disk.img",
            {"domain": "Guest", "mount": ["inspect"], "export": "/images/disk.img"},
        ),
        (
            "guestfs format=raw disk=a disk=b format=qcow2 disk=c format= disk=d",
            {"disk": [("a", "raw"), ("b", "raw"), ("c", "qcow2"), ("d", "")]},
        ),
        ("-f -v guestfs debug=on trace=on d", {"debug": True, "trace": True, "verbose": True}),
        ("guestfs d -e name --export /dev/sda1", {"export": "/dev/sda1", "export_name": "name"}),
        ("--export /dev/sda1 guestfs d", {"export": "/dev/sda1", "export_name": None}),
        ("guestfs d connect=qemu:///x", {"connect": "qemu:///x"}),
    ],
)
def test_command_lines(line: str, values: dict[str, Any]) -> None:
    command, args = cli.parse(line.split())
    assert command == "guestfs"
    assert {name: getattr(args, name) for name in values} == values


@pytest.mark.parametrize(
    ("text", "device", "point"),
    [
        ("/dev/sda1", "/dev/sda1", "/"),
        ("/dev/sda1:/boot", "/dev/sda1", "/boot"),
        ("/dev/sda1:/a:/b", "/dev/sda1", "/a:/b"),
        ("btrfsvol:/dev/sda2/home", "btrfsvol:/dev/sda2/home", "/"),
        ("btrfsvol:/dev/sda2/with:colon:/home", "btrfsvol:/dev/sda2/with:colon", "/home"),
        ("btrfsvol:/dev/VG/LV/home:/", "btrfsvol:/dev/VG/LV/home", "/"),
    ],
)
def test_mounts(text: str, device: str, point: str) -> None:
    assert parse_mount(text) == (device, point)


@pytest.mark.parametrize("text", ["sda1", "", ":/", "/dev/sda1:boot", "btrfsvol:home"])
def test_wrong_mounts(text: str) -> None:
    with pytest.raises(UsageError):
        parse_mount(text)


def test_keys(tmp_path: Path) -> None:
    (tmp_path / "key").write_text("first line\nsecond\n")
    assert parse_key("/dev/sda1:key:a:key:b") == ("/dev/sda1", "a:key:b")
    assert parse_key(f"all:file:{tmp_path}/key") == ("all", "first line")
    assert parse_key("all:key:x").fits({"/dev/sda1"})
    assert not parse_key("/dev/sda2:key:x").fits({"/dev/sda1"})


@pytest.mark.parametrize("text", ["secret", ":key:secret", "all:secret"])
def test_a_wrong_key_is_not_repeated(text: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_key(text)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["export=/dev/sda1"], "which disk"),
        (["disk=x", "export=/file"], "on which filesystem"),
        (["disk=x", "mount=/dev/sda1"], "which file"),
        (["disk=x", "export=sda1"], "a device"),
        (["disk=x", "mount=sda1", "export=/x"], "no device"),
        (["disk=x", "--direct=only"], "add -r"),
        (["disk=x", "--json"], "--list"),
    ],
)
def test_wrong_usage(words: list[str], says: str, nbdtool: Any) -> None:
    done = nbdtool("guestfs", *words, status=2)
    assert says in done.stderr


def test_no_libguestfs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "guestfs", None)
    with pytest.raises(Error, match=r"python3-guestfs .*python3-libguestfs"):
        launch.module()
