"""Damaged and crafted ext filesystems: a doubt, or what the kernel reads; never anything else."""

from __future__ import annotations

import os
import random
import struct
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Callable

import pytest

from nbdtool.disk import Disk
from nbdtool.disks.file import FileDisk
from nbdtool.errors import Error, Uncertain
from nbdtool.layers.path import open_path
from nbdtool.layers.window import Window
from tests.ext.kernel import MIB, assert_same, debugfs, make, mount, open_in_root, umount

SIZE = 8 * MIB
PATH = "/link/file"
MUTATIONS = 150  # of each
BASES = {
    "ext2": "-t ext2 -b 1024",
    "ext3": "-t ext3 -b 1024 -J size=1",
    "no checksums": "-t ext4 -b 1024 -O ^metadata_csum,^64bit -J size=1",
    "64bit": "-t ext4 -b 1024 -g 2048 -O ^metadata_csum,^flex_bg,meta_bg,^resize_inode -J size=1",
    "checksums": "-t ext4 -b 1024 -J size=1",
}
INTERESTING = [0, 1, 2, 4, 7, 12, 255, 1024, 32768, 32769, 65535, 1 << 31, (1 << 32) - 1]


class Recorder(Window):
    """Remembers what was read."""

    def __init__(self, disk: Disk) -> None:
        super().__init__(disk, 0, disk.size)
        self.ranges: list[tuple[int, int]] = []

    def read(self, offset: int, length: int) -> Any:
        self.ranges.append((offset, length))
        return super().read(offset, length)


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """/link/file, in many pieces, behind a symbolic link."""
    tree = tmp_path_factory.mktemp("tree") / "tree"
    (tree / "one/two").mkdir(parents=True)
    (tree / "link").symlink_to("/one/two")
    generator = random.Random(3)
    with (tree / "one/two/file").open("wb") as file:
        for number in range(400):
            file.seek(number * 8192)
            file.write(generator.randbytes(1024))
    (tree / "one/two/other").write_bytes(generator.randbytes(30_000))
    for number in range(30):
        (tree / f"one/{number}").write_bytes(b"%d" % number)
    return tree


def write(image: Path, changes: dict[int, bytes]) -> None:
    with image.open("r+b", buffering=0) as file:
        for at, piece in changes.items():
            os.pwrite(file.fileno(), piece, at)


def mutations(image: Path, count: int, seed: int) -> Iterator[dict[int, bytes]]:
    """What to write where, into what leads to the file: fields, bytes and bits."""
    recorder = Recorder(FileDisk(str(image)))
    open_path(recorder, PATH)
    generator = random.Random(seed)
    data = image.read_bytes()
    for _ in range(count):
        changes = {}
        for _ in range(generator.choice((1, 1, 1, 2))):
            offset, length = generator.choice(recorder.ranges)
            width = generator.choice((1, 1, 2, 4))
            at = offset + generator.randrange(length // width) * width
            while not any(data[at : at + width]) and generator.random() < 0.9:
                at = offset + generator.randrange(length // width) * width
            value = int.from_bytes(data[at : at + width], "little")
            kind = generator.randrange(4)
            if kind == 0:
                value = generator.choice(INTERESTING)
            elif kind == 1:
                value += generator.choice((-8, -2, -1, 1, 2, 8))
            else:
                value ^= 1 << generator.randrange(8 * width)
            changes[at] = (value & (1 << 8 * width) - 1).to_bytes(width, "little")
        yield changes


def ours(image: Path, path: str) -> Disk | str:
    """The file, or why not."""
    try:
        return open_path(FileDisk(str(image)), path)
    except Uncertain as exc:
        return f"doubt: {exc}"
    except Error as exc:
        return f"none: {exc}"


def verdict(image: Path, device: Path, directory: Path, path: str = PATH) -> str:
    """What became of a damaged filesystem; AssertionError if it isn't what the kernel says."""
    disk = ours(image, path)
    if isinstance(disk, str) and disk.startswith("doubt"):
        return "doubt"
    try:
        mount(device, directory)
    except OSError:
        return "the kernel doesn't mount it"
    try:
        root = os.open(directory, os.O_RDONLY)
        try:
            fd = open_in_root(root, path)
        finally:
            os.close(root)
        try:
            assert isinstance(disk, Disk), disk
            assert_same(disk, fd)
        finally:
            os.close(fd)
        return "the same"
    except OSError as exc:
        return "no such file" if isinstance(disk, str) else f"the kernel doesn't read it: {exc}"
    finally:
        umount(directory)


@pytest.mark.slow
@pytest.mark.parametrize("base", BASES)
def test_damage(base: str, tree: Path, tmp_path: Path, loop_device: Callable[..., Any]) -> None:
    image = make(tmp_path / "image", SIZE, *BASES[base].split(), tree=tree)
    data = image.read_bytes()
    directory = tmp_path / "mounted"
    directory.mkdir()
    verdicts: Counter[str] = Counter()
    with loop_device(image, "--read-only") as device:
        assert verdict(image, device, directory) == "the same"
        for changes in mutations(image, MUTATIONS, seed=4):
            write(image, changes)
            try:
                found = verdict(image, device, directory)
                settled = "kernel" not in found
            except AssertionError:
                settled = False
            if not settled:
                # A device that is new: of this one, the kernel may have kept what was there before
                # if something else on this machine had it open.
                copy = tmp_path / "copy"
                copy.write_bytes(image.read_bytes())
                with loop_device(copy, "--read-only") as fresh:
                    found = verdict(copy, fresh, directory)
                assert "kernel" not in found, (changes, found)
            verdicts[found] += 1
            write(image, {at: data[at : at + len(piece)] for at, piece in changes.items()})
    assert verdicts["doubt"] > MUTATIONS // 5 < verdicts["the same"], verdicts


# Crafted


def inode_offset(image: Path, path: str) -> int:
    """Where the inode of a path is, in bytes, in a filesystem with blocks of 1 KiB."""
    block, place = debugfs(image, f"imap {path}").split("located at block ")[1].split(", offset ")
    return int(block) * 1024 + int(place.split()[0], 16)


def free_block(image: Path) -> int:
    return int(debugfs(image, "ffb 8 4000").split("found: ")[1].split()[0])


def node(depth: int, *entries: bytes, room: int = 84) -> bytes:
    return struct.pack("<HHHHI", 0xF30A, len(entries), room, depth, 0) + b"".join(entries)


def extent(first: int, count: int, start: int) -> bytes:
    return struct.pack("<IHHI", first, count, start >> 32, start & 0xFFFFFFFF)


def index(first: int, block: int) -> bytes:
    return struct.pack("<IIHH", first, block, 0, 0)


def pointers(*blocks: int) -> bytes:
    return struct.pack(f"<{len(blocks)}I", *blocks)


# i_block of /one/two/other and a block of the filesystem, B standing for its number and D for that
# of a block of data; whether it can be read
TREES: dict[str, tuple[str, Callable[[int, int], tuple[bytes, bytes]], str]] = {
    "a loop": (
        "no checksums",
        lambda b, d: (node(1, index(0, b), room=4), node(1, index(0, b))),
        "wrong header",
    ),
    "a deep loop": (
        "no checksums",
        lambda b, d: (node(5, index(0, b), room=4), node(4, index(0, b))),
        "wrong header",
    ),
    "too deep": (
        "no checksums",
        lambda b, d: (node(6, index(0, b), room=4), node(5, index(0, b))),
        "wrong header",
    ),
    "one node twice": (
        "no checksums",
        lambda b, d: (node(1, index(0, b), index(9, b), room=4), node(0, extent(0, 1, d))),
        "out of order",
    ),
    "overlapping": (
        "no checksums",
        lambda b, d: (node(0, extent(0, 3, d), extent(2, 1, d), room=4), b""),
        "overlap",
    ),
    "unsorted": (
        "no checksums",
        lambda b, d: (node(0, extent(3, 1, d), extent(2, 1, d), room=4), b""),
        "overlap",
    ),
    "past the parent": (
        "no checksums",
        lambda b, d: (
            node(1, index(0, b), index(5, d), room=4),
            node(0, extent(0, 9, d)),
        ),
        "overlap",
    ),
    "of no length": (
        "no checksums",
        lambda b, d: (node(0, extent(0, 0, d), room=4), b""),
        "overlap",
    ),
    "past the last number": (
        "no checksums",
        lambda b, d: (node(0, extent((1 << 32) - 2, 4, d), room=4), b""),
        "overlap",
    ),
    "outside": (
        "no checksums",
        lambda b, d: (node(0, extent(0, 1, 8190), extent(1, 3, 8190), room=4), b""),
        "of 8192",
    ),
    "far outside": (
        "no checksums",
        lambda b, d: (node(0, extent(0, 1, 1 << 47), room=4), b""),
        "of 8192",
    ),
    "block 0": ("no checksums", lambda b, d: (node(0, extent(0, 1, 1), room=4), b""), "of 8192"),
    "descriptors": ("ext2", lambda b, d: (pointers(2, *[0] * 14), b""), "holds metadata"),
    "the inode table": ("ext2", lambda b, d: (pointers(d, 300, *[0] * 13), b""), "metadata"),
    "blocks that aren't its own": (
        "ext2",
        lambda b, d: (pointers(*[0] * 12, b, 0, 0), pointers(*[d] * 256)),
        "more blocks than it has",
    ),
    "one block of data, shared": (
        "no checksums",
        lambda b, d: (node(0, extent(0, 1, d), extent(7, 1, d), extent(20, 1, d), room=4), b""),
        "",
    ),
    "unwritten": (
        "no checksums",
        lambda b, d: (node(0, extent(0, 32768 + 2, d), extent(7, 2, d), room=4), b""),
        "",
    ),
    "all a hole": ("ext2", lambda b, d: (bytes(60), b""), ""),
    "an empty tree": ("no checksums", lambda b, d: (node(0, room=4), b""), ""),
    "the last block of its size": (
        "ext2",
        lambda b, d: (pointers(*[0] * 12, b, 0, 0), pointers(*[0] * 17, d, *[0] * 238)),
        "",
    ),
}


@pytest.mark.parametrize("case", TREES)
def test_crafted_trees(
    case: str, tree: Path, tmp_path: Path, loop_device: Callable[..., Any]
) -> None:
    base, craft, told = TREES[case]
    image = make(tmp_path / "image", SIZE, *BASES[base].split(), tree=tree)
    path = "/one/two/other"
    block, data = free_block(image), int(debugfs(image, f"bmap {path} 0").split()[-1])
    root, content = craft(block, data)
    changes = {inode_offset(image, path) + 40: root.ljust(60, b"\0"), block * 1024: content}
    write(image, changes)
    (tmp_path / "mounted").mkdir()
    with loop_device(image, "--read-only") as device:
        found = verdict(image, device, tmp_path / "mounted", path)
    assert found == "doubt" if told else found == "the same"
    if told:
        with pytest.raises(Uncertain, match=told):
            open_path(FileDisk(str(image)), path)


@pytest.mark.parametrize("size", [0, 1, 1 << 40, (1 << 42) - 1024, 1 << 42, (1 << 63) - 1, 1 << 63])
@pytest.mark.parametrize("base", ["ext2", "no checksums"])
def test_sizes(
    base: str, size: int, tree: Path, tmp_path: Path, loop_device: Callable[..., Any]
) -> None:
    """Of a file whose last bytes nothing maps."""
    image = make(tmp_path / "image", SIZE, *BASES[base].split(), tree=tree)
    at = inode_offset(image, "/one/two/file")
    low, high = struct.pack("<Q", size)[:4], struct.pack("<Q", size)[4:]
    write(image, {at + 4: low, at + 108: high})
    (tmp_path / "mounted").mkdir()
    with loop_device(image, "--read-only") as device:
        found = verdict(image, device, tmp_path / "mounted")
    fits = size < 1 << (34 if base == "ext2" else 42)
    assert found == ("the same" if fits else "doubt")


def test_names(tree: Path, tmp_path: Path, loop_device: Callable[..., Any]) -> None:
    """Directory entries that lead astray."""
    image = make(tmp_path / "image", SIZE, *BASES["ext2"].split(), tree=tree)
    original = image.read_bytes()
    block = int(debugfs(image, "bmap /one/two 0").split()[-1]) * 1024
    at = original.index(b"file", block) - 8
    end = block + 1024
    inode, length, name_length, _ = struct.unpack_from("<IHBB", original, at)
    entry = original[at : at + 8 + name_length]
    (tmp_path / "mounted").mkdir()
    crafted = {
        "the journal": (struct.pack("<I", 8), "can't be"),
        "no inode": (struct.pack("<I", 1 << 31), "wrong entry"),
        "an unused inode": (struct.pack("<I", 1000), "isn't in use"),
        "an empty entry": (struct.pack("<IH", inode, 0), "wrong entry"),
        "an odd entry": (struct.pack("<IH", inode, length + 1), "wrong entry"),
        "a short entry": (struct.pack("<IH", inode, 8), "wrong entry"),
        "past the end": (struct.pack("<IH", inode, 1024), "wrong entry"),
        "up to near the end": (struct.pack("<IH", inode, end - at - 8), "wrong entry"),
        "twice": (
            entry[:4] + struct.pack("<H", 12) + entry[6:] + entry[:4]
            + struct.pack("<H", end - at - 12) + entry[6:],
            "several times",
        ),
    }  # fmt: skip
    with loop_device(image, "--read-only") as device:
        for piece, told in crafted.values():
            write(image, {0: original, at: piece})
            assert verdict(image, device, tmp_path / "mounted") == "doubt"
            with pytest.raises(Uncertain, match=told):
                open_path(FileDisk(str(image)), PATH)


# What would take for ever, or all memory, in a child that is measured
READER = """
import re, sys
from nbdtool.disks.file import FileDisk
from nbdtool.errors import Uncertain
from nbdtool.layers.path import open_path

try:
    disk = open_path(FileDisk(sys.argv[1]), "/file")
    print("size", disk.size)
except Uncertain as exc:
    print(exc)
# ru_maxrss would be that of the process that started this one, if it was larger
print(re.search(r"VmHWM:\\s*([0-9]+) kB", open("/proc/self/status").read())[1])
"""
PEAK = 250 << 10  # KiB


def measured(image: Path) -> str:
    done = subprocess.run(
        [sys.executable, "-c", READER, image], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    answer, peak = done.stdout.splitlines()
    assert int(peak) < PEAK
    return answer


@pytest.mark.slow
@pytest.mark.parametrize(
    ("low", "told"),
    [
        (lambda block, data: [data] * 1024, "more than 524288 runs"),
        (lambda block, data: [0] * 1024, "goes in circles"),
        (lambda block, data: [block] * 1024, "more than 524288 runs"),
        (lambda block, data: list(range(data, data + 1024)), "goes in circles"),
    ],
)
def test_indirect_blocks_that_repeat(low: Any, told: str, tmp_path: Path) -> None:
    """2^30 blocks, mapped by three indirect blocks that all pointers lead to."""
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree/file").write_bytes(bytes(range(256)) * 16)
    words = ["-t", "ext2", "-b", "4096"]
    image = make(tmp_path / "image", 64 * MIB, *words, tree=tmp_path / "tree")
    block = int(debugfs(image, "ffb 3 4000").split("found: ")[1].split()[0])
    data = 10000
    requests = [f"sif /file block[TIND] {block}", f"sif /file size {1 << 42}"]
    debugfs(image, *requests, "sif /file blocks 0xffffffff", "sif /file blocks_high 0xffff")
    blocks = [[block + 1] * 1024, [block + 2] * 1024, low(block, data)]
    write(image, {(block + n) * 4096: pointers(*words) for n, words in enumerate(blocks)})
    assert told in measured(image)


@pytest.mark.slow
def test_a_directory_without_end(tmp_path: Path) -> None:
    """A root directory whose blocks are all the same ones, which a long way reads again."""
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree/file").symlink_to("./missing/../" * 60 + "end")
    (tmp_path / "tree/missing").mkdir()
    image = make(tmp_path / "image", 64 * MIB, "-t", "ext2", "-b", "1024", tree=tmp_path / "tree")
    free = free_block(image)
    debugfs(image, f"sif / size {64 * MIB}", f"sif / block[DIND] {free}", "sif / blocks 0xfffffff")
    blocks = [
        pointers(*[free + 1] * 250).ljust(1024, b"\0"),
        pointers(*range(free + 2, free + 258)),
    ]
    empty = struct.pack("<IHBB", 0, 1024, 0, 0).ljust(1024, b"\0")
    write(image, {free * 1024: b"".join([*blocks, empty * 256])})
    assert "goes in circles" in measured(image)
