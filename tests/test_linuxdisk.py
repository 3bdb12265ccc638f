"""linuxdisk: the filesystem is clean, and what the kernel mounts equals the source."""

from __future__ import annotations

import os
import random
import socket
import stat
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from nbdtool.disk import read_bytes
from nbdtool.errors import Error
from tests.ext import oracle


@pytest.fixture
def check(
    tmp_path: Path, partition: Callable[..., Any], mount: Callable[..., Any]
) -> Callable[..., Path]:
    """check(tree, option, ...): the disk is right in all respects; answers the partition."""

    def check(tree: Path, *options: str, repair: bool = True, links: bool = True) -> Path:
        image = tmp_path / "image"
        oracle.write_disk(oracle.open_disk(tree, *options), image)
        subprocess.run(["sgdisk", "-v", image], check=True, stdout=subprocess.DEVNULL)
        offset, size = partition(image)
        assert offset == 1 << 20
        found = oracle.extract_partition(image, offset, size)
        oracle.check_filesystem(found, repair=repair)
        with mount(found) as mounted:
            expected, actual = oracle.entries(tree), oracle.entries(mounted)
            assert actual == expected
            if links:
                for path, count in oracle.link_counts(mounted).items():
                    assert actual[path][-1] == count
            for name in ("st_mode", "st_uid", "st_gid", "st_mtime_ns"):
                assert getattr(tree.stat(), name) == getattr(mounted.stat(), name)
        image.unlink()
        return found

    return check


TYPES = ["ext2"]


@pytest.fixture(params=TYPES)
def kind(request: pytest.FixtureRequest) -> str:
    return f"type={request.param}"


@pytest.fixture
def tree(tmp_path: Path) -> Iterator[Path]:
    tree = tmp_path / "tree"
    tree.mkdir()
    yield tree


def test_empty_directory(tree: Path, check: Callable[..., Path]) -> None:
    found = oracle.dumpe2fs(check(tree))
    assert found["Filesystem state"] == "clean"
    assert found["Block size"] == "4096"
    assert int(found["Inode count"]) < 64


def test_every_type_of_inode(tree: Path, check: Callable[..., Path]) -> None:
    (tree / "file").write_bytes(b"content")
    (tree / "file").chmod(0o4751)
    os.chown(tree / "file", 70000, 3_000_000_000)
    (tree / "sticky").mkdir()
    (tree / "sticky").chmod(0o1777)
    (tree / "fast").symlink_to("x" * 59)
    (tree / "slow").symlink_to("y" * 60)
    (tree / "longest").symlink_to("z" * 4095)
    os.mkfifo(tree / "fifo", 0o640)
    os.mknod(tree / "null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
    os.mknod(tree / "large", stat.S_IFBLK | 0o660, os.makedev(259, 70000))
    os.mknod(tree / "largest", stat.S_IFBLK | 0o660, os.makedev(4095, (1 << 20) - 1))
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tree / "socket"))
    os.link(tree / "slow", tree / "hard link to a symlink")
    os.link(tree / "null", tree / "sticky" / "hard link to a device")
    for number, time in enumerate((0, -1, 2**31, 2**32, -(2**31))):
        path = tree / f"time{number}"
        path.touch()
        os.utime(path, ns=(time * 10**9 + 123456789, time * 10**9 + 987654321))
    check(tree)


def test_names(tree: Path, check: Callable[..., Path]) -> None:
    names = [b"a" * 255, b"new\nline", b"\xff\xfe not UTF-8", b"-rf", b" ", b"*", b"\\x", b"\x01"]
    names += [bytes([97 + n % 26]) * n for n in range(1, 255)]
    for name in names:
        Path(os.fsdecode(os.fsencode(tree) + b"/" + name)).write_bytes(name)
    check(tree)


def test_deep_tree(tree: Path, check: Callable[..., Path]) -> None:
    """100 levels of names of 255 bytes: paths are longer than a system call takes."""
    here = os.open(".", os.O_RDONLY)
    try:
        os.chdir(tree)
        for level in range(100):
            name = f"{level:0255}"
            os.mkdir(name)
            os.chdir(name)
        Path("file").write_bytes(b"deep")
    finally:
        os.fchdir(here)
        os.close(here)
    check(tree, links=False)
    subprocess.run(["rm", "-r", tree], check=True)


def test_hard_links_across_directories(tree: Path, check: Callable[..., Path]) -> None:
    for name in "abc":
        (tree / name).mkdir()
        (tree / name / "own").write_bytes(name.encode())
        os.link(tree / name / "own", tree / f"link to {name}")
        os.link(tree / name / "own", tree / "a" / f"another link to {name}")
    # a link outside the tree isn't counted
    os.link(tree / "a" / "own", tree.parent / "outside")
    check(tree)


def test_many_entries(tree: Path, check: Callable[..., Path]) -> None:
    """A directory of 20,000 entries, and 5,000 empty files, which need inodes and no blocks."""
    (tree / "many").mkdir()
    (tree / "empty").mkdir()
    for number in range(20_000):
        os.symlink("x", tree / "many" / f"entry {number}")
    for number in range(5_000):
        (tree / "empty" / str(number)).touch()
    check(tree)


def test_block_mapping_boundaries(tree: Path, check: Callable[..., Path]) -> None:
    """Files whose mapping just fits in the inode, an indirect block, or just not."""
    generator = random.Random(1)
    for blocks in (1, 12, 13, 12 + 1024, 12 + 1025, 12 + 1024 + 1024 + 1):
        for more in (-1, 0, 1):
            path = tree / f"{blocks}{more:+}"
            path.write_bytes(generator.randbytes(1 << 20))
            os.truncate(path, blocks * 4096 + more)
    check(tree)


def test_holes(tree: Path, check: Callable[..., Path]) -> None:
    places = [
        0,
        1,
        11,
        12,
        13,
        1035,
        1036,
        1037,
        2060,
        12 + 1024 + 1024**2 - 1,
        12 + 1024 + 1024**2,
    ]
    for count in range(1, len(places)):
        with (tree / f"file{count}").open("wb") as file:
            for place in places[count - 1 : count + 2]:
                file.seek(place * 4096 + 7)
                file.write(b"data %d" % place)
            file.truncate(file.tell() + (count % 3) * 100_000)
    with (tree / "nothing").open("wb") as file:
        file.truncate(10 << 20)
    with (tree / "5 GiB").open("wb") as file:
        file.truncate(5 << 30)
        file.seek(3 << 30)
        file.write(b"x" * 4096)
    found = check(tree)
    assert found.stat().st_blocks * 512 < 4 << 20


def test_block_status(tree: Path) -> None:
    """Free space is a hole, what the filesystem uses is data, and it is the same that is read."""
    (tree / "file").write_bytes(os.urandom(3 << 20))
    disk = oracle.open_disk(tree)
    offset = 0
    for length, state in disk.extents(0, disk.size):
        if state:
            assert not read_bytes(disk, offset, length).strip(b"\0")
        offset += length
    assert offset == disk.size
    holes = sum(length for length, state in disk.extents(0, disk.size) if state)
    assert disk.size - holes < (3 << 20) + 100_000
    middle = list(disk.extents(12345, 6789))
    assert sum(extent.length for extent in middle) == 6789


def test_reads_of_any_size_agree(tree: Path, tmp_path: Path) -> None:
    generator = random.Random(2)
    for number in range(30):
        (tree / str(number)).write_bytes(generator.randbytes(generator.randrange(20_000)))
    disk = oracle.open_disk(tree)
    oracle.write_disk(disk, tmp_path / "image")
    whole = (tmp_path / "image").read_bytes()
    for _ in range(3000):
        offset = generator.randrange(disk.size)
        length = min(generator.choice((1, 511, 4096, 65536)), disk.size - offset)
        assert read_bytes(disk, offset, length) == whole[offset : offset + length]


@pytest.mark.parametrize("how", ["changed", "truncated", "removed", "replaced", "a fifo"])
def test_changed_file_is_an_error_that_names_it(tree: Path, how: str) -> None:
    (tree / "still").write_bytes(b"a" * 5000)
    (tree / "touched").write_bytes(b"b" * 5000)
    disk = oracle.open_disk(tree)
    content = b"".join(read_or_error(disk, at)[0] for at in range(0, disk.size, 4096))
    place = content.index(b"bbbb")
    assert content.index(b"aaaa")
    for disk in (disk, oracle.open_disk(tree)):  # noqa: B020 with the file open, and not
        path = tree / "touched"
        if how == "changed":
            path.write_bytes(b"c" * 5000)
        elif how == "truncated":
            os.truncate(path, 100)
        else:
            path.unlink()
            if how == "replaced":
                path.symlink_to("still")
            elif how == "a fifo":
                os.mkfifo(path)
        data, text = read_or_error(disk, place)
        if data:  # it was open, and removed: its content is still the one that was scanned
            assert how in ("removed", "replaced", "a fifo")
            assert data == b"b" * 4096
        else:
            assert "touched" in text
        assert read_or_error(disk, content.index(b"aaaa"))[0] == b"a" * 4096
        path.unlink(missing_ok=True)
        path.write_bytes(b"b" * 5000)


def read_or_error(disk: Any, offset: int) -> tuple[bytes, str]:
    try:
        return read_bytes(disk, offset, 4096), ""
    except OSError as error:
        return b"", error.strerror


def test_bad_sources(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(Error, match=r"none.*No such file"):
        oracle.open_disk(tmp_path / "none")
    with pytest.raises(Error, match=r"file.*Not a directory"):
        oracle.open_disk(tmp_path / "file")


def test_lost_and_found_of_the_source(tree: Path, check: Callable[..., Path]) -> None:
    (tree / "lost+found").mkdir()
    (tree / "lost+found" / "#12").write_bytes(b"found")
    (tree / "lost+found").chmod(0o750)
    found = check(tree, links=False)
    listing = subprocess.run(
        ["debugfs", "-R", "stat /lost+found", found], capture_output=True, text=True, check=True
    ).stdout
    assert "Inode: 11 " in listing and "0750" in listing
    content = subprocess.run(
        ["debugfs", "-R", "cat /lost+found/#12", found], capture_output=True, check=True
    ).stdout
    assert content == b"found"


def test_lost_and_found_that_is_a_file(tree: Path) -> None:
    (tree / "lost+found").touch()
    with pytest.raises(Error, match="lost\\+found"):
        oracle.open_disk(tree)


def test_symlink_to_the_directory(tree: Path, check: Callable[..., Path]) -> None:
    (tree / "file").write_bytes(b"x" * 100_000)
    link = tree.parent / "link"
    link.symlink_to(tree)
    check(link)


def test_target_inside_the_tree_is_refused(tree: Path) -> None:
    (tree / "sub").mkdir()
    for target in (tree / "image", tree / "sub" / "image"):
        with pytest.raises(Error, match="inside"):
            oracle.open_disk(tree, f"--to-file={target}")
    oracle.open_disk(tree, f"--to-file={tree.parent / 'image'}")
