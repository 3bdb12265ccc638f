"""Files that the reader finds and maps, each compared with what the kernel reads."""

from __future__ import annotations

import os
import random
import stat
import struct
import subprocess
from pathlib import Path
from typing import Any, Callable

import pytest

from nbdtool.disk import HOLE, Disk, Extent, ZeroSpan
from nbdtool.disks.file import FileDisk
from nbdtool.errors import Error, Uncertain
from nbdtool.ext.reader import Filesystem
from nbdtool.layers.mapped import Mapped, Piece
from nbdtool.layers.path import open_path
from nbdtool.layers.window import Window
from tests.ext import oracle
from tests.ext.kernel import MIB, assert_same, debugfs, make, make_tree, open_in_root

LAYOUTS = {
    "ext2 1k": "-t ext2 -b 1024",
    "ext2 4k": "-t ext2 -b 4096",
    "ext2 revision 0": "-t ext2 -r 0 -b 1024 -I 128",
    "ext3 1k": "-t ext3 -b 1024 -J size=4",
    "ext3 4k": "-t ext3 -b 4096 -I 128",
    "ext4": "-t ext4",
    "ext4 1k": "-t ext4 -b 1024",
    "ext4 2k": "-t ext4 -b 2048 -O ^64bit",
    "no checksums": "-t ext4 -b 1024 -O ^metadata_csum,^64bit",
    "gdt_csum": "-t ext4 -b 1024 -O ^metadata_csum,uninit_bg -E lazy_itable_init=1",
    "seed": "-t ext4 -b 1024 -O metadata_csum_seed",
    "no flex_bg": "-t ext4 -b 1024 -O ^flex_bg",
    "meta_bg": "-t ext4 -b 1024 -O meta_bg,^resize_inode -g 1024",
    "no extents": "-t ext4 -b 1024 -O ^extents,^64bit",
    "no journal": "-t ext4 -O ^has_journal -I 512",
    "small inodes": "-t ext4 -I 128 -O ^extra_isize",
    "many features": "-t ext4 -O orphan_file,large_dir,ea_inode,sparse_super2"
    ",fast_commit,encrypt -G 4 -g 8192",
    "packed": "-t ext4 -b 1024 -g 1024 -E packed_meta_blocks=1",
}
UNMOUNTABLE = {  # by some kernels
    "64k": "-t ext4 -b 65536",
    "8k": "-t ext3 -b 8192",
    "casefold": "-t ext4 -O casefold -E encoding=utf8",
    "quota, verity": "-t ext4 -O quota,project,verity",
}
BIG = 1200  # names of the directory that the kernel makes an htree of


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tree(tmp_path_factory.mktemp("tree") / "tree")


def fill(root: Path) -> None:
    """What mke2fs can't make: large directories, fragments, unwritten extents, huge files."""
    generator = random.Random(2)
    big = root / "big"
    big.mkdir()
    for number in range(BIG):
        name = big / f"{number:050}"
        if number % 100 == 0:
            name.write_bytes(b"%d" % number)
        else:
            name.touch()
    for number in range(0, BIG, 7):
        (big / f"{number:050}").rename(big / f"renamed {number}")
    # Pieces of two files in turn, so that neither is in one piece.
    with (root / "one").open("wb") as one, (root / "two").open("wb") as two:
        for number in range(300):
            for file in one, two:
                file.seek(number * 12288)
                file.write(generator.randbytes(4096))
                file.flush()
                if number % 3 == 0:
                    os.fdatasync(file.fileno())
    with (root / "huge").open("wb") as file:
        for at in 0, 200 * MIB, 4096 * MIB - 1000, 4500 * MIB:
            file.seek(at)
            file.write(generator.randbytes(5000))
        file.truncate(5000 * MIB + 1)
    (root / "only a hole").touch()
    os.truncate(root / "only a hole", 9000 * MIB)
    done = subprocess.run(
        ["fallocate", "-l", "3M", root / "unwritten"], stderr=subprocess.PIPE, check=False
    )
    if done.returncode == 0:  # with extents alone
        with (root / "unwritten").open("r+b") as file:
            for at in 0, 100_000, 2 * MIB:
                file.seek(at)
                file.write(generator.randbytes(7000))
        subprocess.run(["fallocate", "-n", "-o", "3M", "-l", "1M", root / "unwritten"], check=True)
        subprocess.run(["fallocate", "-p", "-o", "5M", "-l", "9M", root / "huge"], check=True)
        os.truncate(root / "images/disk.img", 2 * MIB)
        subprocess.run(
            ["fallocate", "-p", "-o", "64k", "-l", "64k", root / "images/disk.img"], check=True
        )


def compare(filesystem: Filesystem, disk: Disk, root: Path) -> int:
    """Compare all regular files with those below root; return how many there are."""
    fd, mounted = os.open(root, os.O_RDONLY), os.path.ismount(root)
    count = 0
    for directory, _, names in os.walk(root):
        for name in names:
            path = os.path.join(directory, name)
            inside = "/" + os.path.relpath(path, root)
            try:
                theirs = open_in_root(fd, inside)
            except OSError:
                theirs = -1
            regular = theirs >= 0 and stat.S_ISREG(os.fstat(theirs).st_mode)
            if not regular:
                with pytest.raises(Error) as failed:
                    filesystem.find(inside)
                assert not isinstance(failed.value, Uncertain)
            elif len(names) < 100 or os.fstat(theirs).st_size or count % 50 == 0:
                number = filesystem.find(inside)
                assert number == os.fstat(theirs).st_ino or not mounted
                assert_same(mapped(filesystem, disk, number), theirs)
            count += 1
            if theirs >= 0:
                os.close(theirs)
    os.close(fd)
    return count


def mapped(filesystem: Filesystem, disk: Disk, number: int) -> Disk:
    size, pieces = filesystem.map(number)
    result = Mapped((Piece(n, None if at is None else disk, at or 0) for n, at in pieces), [])
    assert result.size == size
    return result


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_files_are_the_kernels(
    layout: str, tree: Path, tmp_path: Path, mount: Callable[..., Any]
) -> None:
    image = make(tmp_path / "image", 160 * MIB, *LAYOUTS[layout].split(), tree=tree)
    disk = FileDisk(str(image))
    with mount(image, options="rw") as root:
        fill(root)
    with mount(image) as root:
        assert compare(Filesystem(disk), disk, root) > BIG
    if "dir_index" in debugfs(image, "stats"):
        assert "Hash Version" in debugfs(image, "htree_dump /big")
    assert len(Filesystem(disk).map(Filesystem(disk).find("one"))[1]) > 20


@pytest.mark.parametrize("layout", UNMOUNTABLE)
def test_files_are_those_of_the_tree(layout: str, tree: Path, tmp_path: Path) -> None:
    image = make(tmp_path / "image", 512 * MIB, *UNMOUNTABLE[layout].split(), tree=tree)
    disk = FileDisk(str(image))
    assert compare(Filesystem(disk), disk, tree) > 20


@pytest.mark.parametrize("type", ["ext2", "ext3", "ext4"])
def test_filesystems_of_our_own(type: str, tree: Path) -> None:
    disk = oracle.open_disk(tree, f"type={type}", "--partition", "1")
    assert compare(Filesystem(disk), disk, tree) > 20
    disk.close()


def test_symbolic_links_are_followed_inside(tree: Path, tmp_path: Path) -> None:
    disk = FileDisk(str(make(tmp_path / "image", 64 * MIB, "-t", "ext4", tree=tree)))
    filesystem = Filesystem(disk)
    for path in "chain", "/../..//images/./disk.img", "directory/../../fast":
        assert filesystem.find(path) == filesystem.find(b"images/disk.img")
    for path, told in {
        "loop": "loop: too many symbolic links",
        "": "/: a directory, not a regular file",
        "/deep/": "/deep/: a directory, not a regular file",
        "fifo": "fifo: a fifo, not a regular file",
        "up/../images": "/size60: a regular file, not a directory",
        "size1/": "/size1: a regular file, not a directory",
        "dangling": "/nowhere: no such file; / has ",
        "deep/none/x": "/deep/none: no such file; /deep has deeper$",
        "x" * 256: "no name has 256 bytes",
        "x/" * 2048: "too long a path",
    }.items():
        with pytest.raises(Error, match=told) as failed:
            filesystem.find(path)
        assert not isinstance(failed.value, Uncertain)


def test_ways_into_other_filesystems(tree: Path, tmp_path: Path) -> None:
    disk = FileDisk(str(make(tmp_path / "image", 64 * MIB, "-t", "ext4", tree=tree)))
    filesystem = Filesystem(disk)
    number = filesystem.find("images/disk.img")
    for path in "images/disk.img", "fast", "deep/../images/disk.img":
        assert filesystem.find(path, [b"/deep/deeper", b"/ima"], mounted=True) == number
    assert filesystem.find("absolute", [b"/deep"]) == number
    for path in "fast", "absolute", "chain", "//images/./disk.img", "images/../images/disk.img":
        with pytest.raises(Uncertain, match="leads into another filesystem"):
            filesystem.find(path, [b"/images"])
    for path in "absolute", "../images/disk.img", "deep/../../images/disk.img":
        with pytest.raises(Uncertain, match="leads into another filesystem"):
            filesystem.find(path, mounted=True)


def test_what_is_missing_is_told_with_what_is_there(tmp_path: Path) -> None:
    (tmp_path / "tree").mkdir()
    for number in range(100):
        (tmp_path / f"tree/{number:03}").touch()
    disk = FileDisk(str(make(tmp_path / "image", 8 * MIB, tree=tmp_path / "tree")))
    with pytest.raises(Error) as failed:
        Filesystem(disk).find("/100")
    told = str(failed.value)
    assert told.startswith(f"{disk.description}: /100: no such file; / has ")
    assert told.endswith(" and more") and 19 <= told.count(",") <= 20


# What isn't certain


def mounted_copy(image: Path, mount: Callable[..., Any]) -> None:
    with mount(image, options="rw") as root:
        (root / "new").write_bytes(b"new")
        subprocess.run(["sync", "-f", root], check=True)
        copied = image.read_bytes()
    image.write_bytes(copied)


def patched(image: Path, offset: int, piece: bytes) -> None:
    with image.open("r+b") as file:
        file.seek(offset)
        file.write(piece)


def set_flag(path: str, flags: int) -> Callable[[Path], Any]:
    return lambda image: debugfs(image, f"sif {path} flags {flags:#x}")


def superblock(field: str, value: object) -> Callable[[Path], Any]:
    return lambda image: debugfs(image, f"ssv {field} {value}")


EXT3, EXT4 = "-t ext3 -b 4096", "-t ext4 -b 4096"
UNSURE: dict[str, tuple[str, Callable[[Path], Any] | None, str]] = {
    "errors": (EXT4, superblock("state", 3), "has errors"),
    "old errors": (EXT4, superblock("error_count", 1), "has errors"),
    "not unmounted": (EXT4, superblock("state", 0), "wasn't unmounted"),
    "orphans": (EXT4, superblock("last_orphan", 13), "orphaned inodes"),
    "orphan file": (EXT4, superblock("feature_ro_compat", 0x1046B), "orphaned inodes"),
    "foreign journal": (EXT4, superblock("journal_inum", 0), "journal on another device"),
    "unknown incompat": (EXT4, superblock("feature_incompat", 0x800002C2), "incompat 0x80000000"),
    "unknown ro_compat": (EXT4, superblock("feature_ro_compat", 0x8000046B), "ro_compat 0x8"),
    "mmp": (EXT4 + " -O mmp", None, "feature mmp"),
    "bigalloc": (EXT4 + " -O bigalloc", None, "feature bigalloc"),
    "shared blocks": (EXT4, superblock("feature_ro_compat", 0x446B), "feature shared_blocks"),
    "journal device": ("-O journal_dev -b 4096", None, "feature journal_dev"),
    "two checksums": (EXT4, superblock("feature_ro_compat", 0x47B), "checksums of two kinds"),
    "inline": (EXT4 + " -O inline_data", set_flag("/size59", 0x10000000), "inline_data"),
    "encrypted": (EXT4 + " -O encrypt", set_flag("/size59", 0x80800), "encrypted"),
    "encrypted directory": (EXT4 + " -O encrypt", set_flag("/", 0x80800), "encrypted"),
    "verity": (EXT4 + " -O verity", set_flag("/size59", 0x180000), "fs-verity"),
    "casefold": (EXT4 + " -O casefold", set_flag("/", 0x40080000), "casefold"),
    "compressed": (EXT4, set_flag("/size59", 0x80204), "compressed"),
    "unknown flag": (EXT4, set_flag("/size59", 0x80080000), "flagged 0x80000000"),
    "no links": (EXT4, lambda image: debugfs(image, "sif /size59 links_count 0"), "isn't in use"),
    "checksum type": (EXT4, superblock("checksum_type", 2), "checksums of type 2"),
}


@pytest.mark.parametrize("case", UNSURE)
def test_what_isnt_sure(case: str, tree: Path, tmp_path: Path) -> None:
    options, change, told = UNSURE[case]
    with_tree = None if "journal_dev" in options else tree
    image = make(tmp_path / "image", 64 * MIB, *options.split(), tree=with_tree)
    if change:
        change(image)
    disk = FileDisk(str(image))
    with pytest.raises(Uncertain, match=told):
        open_path(disk, "/size59")


@pytest.mark.parametrize("type", ["ext2", "ext3", "ext4"])
def test_a_filesystem_in_use(
    type: str, tree: Path, tmp_path: Path, mount: Callable[..., Any]
) -> None:
    image = make(tmp_path / "image", 64 * MIB, "-t", type, tree=tree)
    mounted_copy(image, mount)
    with pytest.raises(Uncertain, match="in use"):
        Filesystem(FileDisk(str(image)))
    if type == "ext3":  # the flag alone gone, and the journal isn't empty
        at = 1024 + 96
        features = struct.unpack("<I", image.read_bytes()[at : at + 4])[0]
        patched(image, at, struct.pack("<I", features & ~4))
        with pytest.raises(Uncertain, match="journal isn't empty"):
            Filesystem(FileDisk(str(image)))


def test_other_disks(tmp_path: Path, random_file: Callable[..., Path]) -> None:
    for size in 0, 100, 2047, 2048, MIB:
        with pytest.raises(Uncertain, match="no ext2, ext3 or ext4 filesystem"):
            Filesystem(FileDisk(str(random_file(tmp_path / "disk", size))))


def test_a_disk_that_is_cut_off(tree: Path, tmp_path: Path) -> None:
    image = make(tmp_path / "image", 64 * MIB, "-t", "ext4", tree=tree)
    os.truncate(image, 60 * MIB)
    with pytest.raises(Uncertain, match="has 67108864 bytes, and the disk 62914560"):
        Filesystem(FileDisk(str(image)))


def test_holes_are_known(tree: Path, tmp_path: Path) -> None:
    disk = FileDisk(str(make(tmp_path / "image", 160 * MIB, "-t", "ext4", tree=tree)))
    found = open_path(disk, "sparse")
    assert found.read(30 * MIB, MIB) == [ZeroSpan(MIB)]
    assert Extent(16 * MIB, HOLE) in found.extents(2 * MIB, 16 * MIB)


def test_few_reads_find_a_file(tree: Path, tmp_path: Path) -> None:
    """A handful of blocks, whatever the size of the filesystem."""

    class Counting(Window):
        count = 0

        def read(self, offset: int, length: int) -> Any:
            self.count += 1
            return super().read(offset, length)

    image = make(tmp_path / "image", 1 << 40, "-t", "ext4", "-E", "nodiscard", tree=tree)
    disk = Counting(FileDisk(str(image)), 0, 1 << 40)
    open_path(disk, "/images/disk.img")
    assert disk.count < 16
