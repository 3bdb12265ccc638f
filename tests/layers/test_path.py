"""--path: a file in a partition's filesystem, from the command line on."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, Callable

import pytest

MIB = 1 << 20
IMAGES = r"/images has disk.img, link, raw.img, \xff fifo"
NOT_EXT = "no ext2, ext3 or ext4 filesystem; nbdtool guestfs may be able to read it"


@pytest.fixture(scope="module")
def disk(
    tmp_path_factory: pytest.TempPathFactory, run: Callable[..., Any], random_file: Any
) -> Path:
    """A GPT disk; its first partition is an ext4 whose /images has disk.img, and that as qcow2."""
    directory = tmp_path_factory.mktemp("path")
    images = directory / "tree/images"
    images.mkdir(parents=True)
    random_file(directory / "content", 5 * MIB + 512)
    (images / "raw.img").write_bytes((directory / "content").read_bytes())
    os.truncate(images / "raw.img", 20 * MIB)
    run("qemu-img", "convert", "-O", "qcow2", directory / "content", images / "disk.img")
    (images / "link").symlink_to("/images/raw.img")
    os.mkfifo(images / os.fsdecode(b"\xff fifo"))
    image = directory / "disk.img"
    with image.open("wb") as file:
        file.truncate(80 * MIB)
    table = "label: gpt\nsize=64MiB\nsize=8MiB, type=S\n"
    run("sfdisk", "--quiet", image, input=table)
    offset = ["-E", f"offset={MIB}"]
    run("mke2fs", "-q", "-t", "ext4", "-d", directory / "tree", *offset, image, "64M")
    return image


def test_to_file(nbdtool: Callable[..., Any], disk: Path, tmp_path: Path) -> None:
    words = ["file", disk, "--partition", "1", "--path", "/images/disk.img", "--qcow2"]
    nbdtool(*words, "--to-file", tmp_path / "x", status=0)
    assert (tmp_path / "x").read_bytes() == (disk.parent / "content").read_bytes()
    filters = ["--filter=qcow2dec", "--filter=ext2", "--filter=partition"]
    words = ["file", disk, "path=images/disk.img", "partition=1"]
    nbdtool(*filters, *words, "--to-file", tmp_path / "y", status=0)
    assert (tmp_path / "y").read_bytes() == (tmp_path / "x").read_bytes()


def test_served(
    serve: Callable[..., Any], run: Callable[..., Any], disk: Path, tmp_path: Path
) -> None:
    with serve("file", disk, "--partition=1", "path=/images/link") as server:
        told = json.loads(run("nbdinfo", "--json", server.uri))["exports"][0]
        assert told["is_read_only"] and told["export-size"] == 20 * MIB
        assert told["description"] == f"{disk}, partition 1: /images/link"
        states = json.loads(run("nbdinfo", "--map", "--json", server.uri))
        assert states[-1]["type"] == 3 and states[-1]["length"] > 14 * MIB
        run("nbdcopy", server.uri, tmp_path / "copy")
    content = (disk.parent / "content").read_bytes()
    assert (tmp_path / "copy").read_bytes() == content.ljust(20 * MIB, b"\0")


def test_an_overlay_can_be_written(
    serve: Callable[..., Any], run: Callable[..., Any], disk: Path
) -> None:
    before = disk.read_bytes()
    with serve("file", disk, "--partition=1", "--path=/images/raw.img", "--cow") as server:
        run("qemu-io", "-f", "raw", "-c", "write -P 7 1M 2M", server.uri)
        assert "7" in run("qemu-io", "-f", "raw", "-c", "read -v -P 7 1M 512", server.uri)
    assert disk.read_bytes() == before


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (
            ["--partition=1", "--path=/images/none"],
            f", partition 1: /images/none: no such file; {IMAGES}",
        ),
        (
            ["--partition=1", "--path=images"],
            ", partition 1: images: a directory, not a regular file",
        ),
        (
            ["--partition=1", os.fsencode("--path=/images/") + b"\xff fifo"],
            ", partition 1: /images/\\xff fifo: a fifo, not a regular file",
        ),
        (["--partition=2", "--path=/x"], f", partition 2: {NOT_EXT}"),
        (["--path=/x"], f": {NOT_EXT}"),
    ],
)
def test_one_line_says_what_is_wrong(
    nbdtool: Callable[..., Any], disk: Path, words: list[Any], told: str
) -> None:
    done = nbdtool("file", disk, *map(os.fsdecode, words), "--to-file", "-", status=1)
    assert done.stderr == f"nbdtool: error: {disk}{told}\n"
