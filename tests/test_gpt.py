"""The partition table, as other programs read it, and other programs' tables as we do."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nbdtool import gpt
from nbdtool.disks.file import FileDisk
from nbdtool.errors import Error
from tests.ext import oracle


@pytest.fixture
def image(tmp_path: Path) -> Path:
    tree = tmp_path / "tree"
    tree.mkdir()
    (tree / "file").write_bytes(b"x" * 3_000_000)
    oracle.write_disk(oracle.open_disk(tree, "label=data"), tmp_path / "image")
    return tmp_path / "image"


def test_other_programs_find_nothing_wrong(image: Path, run: Callable[..., Any]) -> None:
    assert "No problems found" in run("sgdisk", "--verify", image)
    assert "No errors detected" in run("sfdisk", "--verify", image)
    run("parted", "--script", image, "align-check", "optimal", "1")
    run("parted", "--script", image, "align-check", "optimal", "1")
    printed = run("parted", "--script", image, "print", stderr=subprocess.STDOUT)
    assert "rror" not in printed and "arning" not in printed
    assert image.stat().st_size % (1 << 20) == 0


def test_identity(image: Path, run: Callable[..., Any]) -> None:
    table = json.loads(run("sfdisk", "--json", image))["partitiontable"]
    (entry,) = table["partitions"]
    assert table["label"] == "gpt"
    assert entry["type"] == "0FC63DAF-8483-4772-8E79-3D69D8477DE4"
    assert entry["name"] == "data"
    assert "attrs" not in entry
    for identity in (table["id"], entry["uuid"]):
        assert identity[14] == "4" and identity[19] in "89AB"
    assert entry["start"] == 2048


@pytest.mark.parametrize(
    ("name", "guid"),
    [
        ("root-x86-64", "4F68BCE3-E8CD-4DB1-96E7-FBCAF984B709"),
        ("home", "933AC7E1-2EB4-4F13-B844-0E14E2AEF915"),
        ("esp", "C12A7328-F81F-11D2-BA4B-00A0C93EC93B"),
        ("11111111-2222-4333-8444-555555555555",) * 2,
    ],
)
def test_partition_type(name: str, guid: str, tmp_path: Path, run: Callable[..., Any]) -> None:
    (tmp_path / "tree").mkdir()
    oracle.write_disk(oracle.open_disk(tmp_path / "tree", f"part-type={name}"), tmp_path / "disk")
    table = json.loads(run("sfdisk", "--json", tmp_path / "disk"))["partitiontable"]
    assert table["partitions"][0]["type"] == guid


def test_kernel_shows_the_partition(
    image: Path, run: Callable[..., Any], loop_device: Callable[..., Any]
) -> None:
    with loop_device(image, "--partscan") as device:
        # a kernel without support for GPT is told by partx, which reads the table, too
        subprocess.run(["partx", "--add", device], stderr=subprocess.DEVNULL, check=False)
        try:
            size = Path(f"/sys/class/block/{device.name}p1/size").read_text()
            assert int(size) * 512 == gpt.read(FileDisk(str(image), allow_live=True))[1].length
            shown = json.loads(run("lsblk", "--json", "--bytes", "--output=NAME,TYPE", device))
            assert shown["blockdevices"][0]["children"][0]["type"] == "part"
        finally:
            run("partx", "--delete", device)


def test_blkid_and_file(image: Path, run: Callable[..., Any]) -> None:
    assert 'PTTYPE="gpt"' in run("blkid", "--probe", image)
    found = run("blkid", "--probe", "--offset", str(1 << 20), image)
    assert 'LABEL="data"' in found and 'TYPE="ext2"' in found and 'UUID="' in found
    assert "partition 1 : ID=0xee" in run("file", image)


def test_we_read_what_we_write(image: Path) -> None:
    found = gpt.read(FileDisk(str(image)))
    assert found.keys() == {1}
    assert (found[1].start, found[1].name, found[1].type) == (1 << 20, "data", gpt.TYPES["linux"])


def test_we_read_what_sgdisk_writes(tmp_path: Path, run: Callable[..., Any]) -> None:
    disk = tmp_path / "disk"
    disk.touch()
    os.truncate(disk, 64 << 20)
    run("sgdisk", "-n", "1:2048:+8M", "-c", "1:first", "-n", "5:0:+4M", "-t", "5:ef00",
        "-c", "5:Ünïcode", disk)  # fmt: skip
    found = gpt.read(FileDisk(str(disk)))
    assert [(number, part.start, part.length, part.name) for number, part in found.items()] == [
        (1, 1 << 20, 8 << 20, "first"),
        (5, 9 << 20, 4 << 20, "Ünïcode"),
    ]
    assert found[5].type == gpt.TYPES["esp"]


def test_backup_is_used(image: Path) -> None:
    expected = gpt.read(FileDisk(str(image)))
    with image.open("r+b") as file:
        file.seek(512)
        file.write(bytes(512))
    assert gpt.read(FileDisk(str(image))) == expected
    with image.open("r+b") as file:
        file.seek(-512, os.SEEK_END)
        file.write(bytes(512))
    with pytest.raises(Error, match="no GUID partition table"):
        gpt.read(FileDisk(str(image)))


@pytest.mark.parametrize("offset", [12, 16, 24, 32, 72, 80, 84, 88])
def test_damaged_headers_are_refused(image: Path, offset: int) -> None:
    with image.open("r+b") as file:
        for header in (512, image.stat().st_size - 512):
            file.seek(header + offset)
            word = file.read(4)
            file.seek(header + offset)
            file.write(bytes(byte ^ 0xFF for byte in word))
    with pytest.raises(Error, match="partition table"):
        gpt.read(FileDisk(str(image)))
