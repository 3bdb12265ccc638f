"""Which layers a command line asks for and in which order, in both spellings."""

from __future__ import annotations

import io
import os
import tarfile
from pathlib import Path
from typing import Any, Callable

import pytest

from nbdtool import cli
from nbdtool.commands import file as file_command
from nbdtool.disk import Disk, read_bytes
from nbdtool.disks.file import FileDisk
from nbdtool.errors import Error, UsageError
from nbdtool.layers.cow import CowDisk

KIB = 1 << 10
CONTENT = os.urandom(200 * KIB)


@pytest.fixture
def layer(tmp_path: Path, run: Callable[..., Any]) -> Path:
    """A container's layer: an archive whose file disk/image is a qcow2 image of CONTENT."""
    raw, image, archive = tmp_path / "raw", tmp_path / "image", tmp_path / "layer"
    raw.write_bytes(CONTENT)
    run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", raw, image)
    with tarfile.open(archive, "w") as tar:
        tar.add(image, "./disk/image")
    return archive


def opened(*words: Any) -> dict[str, Disk]:
    command, args = cli.parse([*map(str, words)])
    assert command is not None
    return cli.open_disks(command, args)


def test_both_spellings(layer: Path) -> None:
    entry = "tar-entry=disk/image"
    for words in (
        ["file", layer, entry, "--qcow2"],
        ["--tar-entry", "disk/image", "file", "qcow2=on", layer],
        ["--filter=qcow2dec", "--filter=tar", "file", layer, entry],
        ["--filter", "qcow2dec", "file", layer, entry, "--filter", "tar"],
        ["file", layer, entry, "--qcow2", "--cow", "cow-block-size=4K"],
        ["--filter=cow", "--filter=qcow2dec", "--filter=tar", "file", layer, entry],
    ):
        disk = opened(*words)[""]
        assert read_bytes(disk, 0, len(CONTENT)) == CONTENT
        assert (
            disk.writable
            == isinstance(disk, CowDisk)
            == bool({"--cow", "--filter=cow"} & set(words))
        )
        disk.close()


def test_the_order_counts(layer: Path) -> None:
    with pytest.raises(Error, match="not a qcow2 image"):
        opened("file", layer, "--qcow2", "tar-entry=disk/image")
    with pytest.raises(Error, match="not a qcow2 image"):
        opened("--filter=tar", "--filter=qcow2dec", "file", layer, "tar-entry=disk/image")


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("--filter=xz", "no such filter; there are cow, "),
        ("--filter=qcow2", "no such filter; there are cow, "),
        ("--filter=", "no such filter; there are cow, "),
        ("--filter=qcow2dec,tar", "no such filter"),
        ("--filter=tar", "needs tar-entry="),
        ("--filter=partition", "needs partition="),
        ("--filter=qcow2dec tar-entry=disk/image", "tar-entry= needs --filter=tar"),
        ("--filter=cow partition=1", "partition= needs --filter=partition"),
        ("--filter=tar tar-entry=disk/image --qcow2", "add --filter=qcow2dec"),
        ("--filter=qcow2dec --qcow2", "--qcow2 doesn't go with --filter"),
        ("--filter=qcow2dec --cow", "add --filter=cow"),
        ("--filter=qcow2dec cow-block-size=4K", "--cow-block-size: needs --cow or --filter=cow"),
        # without its layer such an option would change the source, or serve another disk
        ("cow-save=saved", "--cow-save: needs --cow"),
        ("--cow-limit=1M --cow=off", "--cow-limit: needs --cow"),
        ("--qcow2-snapshot=one", "--qcow2-snapshot: needs --qcow2"),
        ("--backing=base tar-entry=disk/image", "--backing: needs --qcow2"),
        ("--sector-size=4K", "sector.*size: needs --partition"),
    ],
)
def test_what_is_refused(words: str, told: str) -> None:
    """And that before the source is looked at."""
    with pytest.raises(UsageError, match=told):
        opened("file", "no such file", *words.split())


def test_each_of_several_exports_is_wrapped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disks = {}
    for name in "one", "two":
        with tarfile.open(tmp_path / name, "w") as tar:
            member = tarfile.TarInfo("disk")
            member.size = 1000
            tar.addfile(member, io.BytesIO(name.encode().ljust(1000)))
        disks[name] = FileDisk(str(tmp_path / name))
    monkeypatch.setattr(file_command, "open", lambda args: dict(disks))
    found = opened("file", "x", "tar-entry=disk", "--cow")
    for name in "one", "two":
        assert read_bytes(found[name], 0, 1000) == name.encode().ljust(1000)
        assert isinstance(found[name], CowDisk)
    found["one"].write(0, memoryview(b"changed"))
    assert read_bytes(found["two"], 0, 7) == b"two    "
    for disk in found.values():
        disk.close()
