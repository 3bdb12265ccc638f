"""linuxdisk: the filesystem is clean, and what the kernel mounts equals the source."""

from __future__ import annotations

import os
import random
import socket
import stat
import subprocess
import tempfile
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


@pytest.fixture(params=["ext2", "ext3", "ext4"])
def kind(request: pytest.FixtureRequest) -> str:
    return f"type={request.param}"


@pytest.fixture(params=[1024, 2048, 4096])
def block_size(request: pytest.FixtureRequest) -> int:
    return int(request.param)


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


def test_every_type_of_inode(tree: Path, check: Callable[..., Path], kind: str) -> None:
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
    check(tree, kind)


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


@pytest.mark.slow
def test_many_entries(tree: Path, check: Callable[..., Path], kind: str) -> None:
    """A directory of 50,000 entries, and 5,000 empty files, which need inodes and no blocks."""
    (tree / "many").mkdir()
    (tree / "empty").mkdir()
    for number in range(50_000):
        os.symlink("x", tree / "many" / f"entry {number}")
    for number in range(5_000):
        (tree / "empty" / str(number)).touch()
    check(tree, kind)


def test_block_mapping_boundaries(
    tree: Path, check: Callable[..., Path], kind: str, block_size: int
) -> None:
    """Files whose mapping just fits in the inode, an indirect block, or just not."""
    data = random.Random(1).randbytes(9 << 20)
    numbers = block_size // 4
    for blocks in (1, 12, 13, 12 + numbers, 12 + 2 * numbers, 12 + 2 * numbers + 1):
        for more in (-1, 0, 1):
            (tree / f"{blocks}{more:+}").write_bytes(data[: blocks * block_size + more])
    check(tree, kind, f"block-size={block_size}", repair=False)


def test_holes(tree: Path, check: Callable[..., Path], kind: str, block_size: int) -> None:
    numbers = block_size // 4
    twice = 12 + numbers + numbers**2
    places = [0, 1, 11, 12, 13, 12 + numbers - 1, 12 + numbers, 13 + numbers, 12 + 2 * numbers]
    places += [twice - 1, twice, twice + 1, twice + 7 * numbers]
    for count in range(1, len(places)):
        with (tree / f"file{count}").open("wb") as file:
            for place in places[count - 1 : count + 2]:
                file.seek(place * block_size + 7)
                file.write(b"data %d" % place)
            file.truncate(file.tell() + (count % 3) * 100_000)
    with (tree / "nothing").open("wb") as file:
        file.truncate(10 << 20)
    with (tree / "5 GiB").open("wb") as file:
        file.truncate(5 << 30)
        file.seek(3 << 30)
        file.write(b"x" * 4096)
    found = check(tree, kind, f"block-size={block_size}")
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
    with pytest.raises(Error, match=r"file: not a directory; not a tar archive"):
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


def test_many_extents(tree: Path, check: Callable[..., Path]) -> None:
    """Extent trees of one and two levels."""
    for name, count in (("four", 4), ("five", 5), ("leaf", 84), ("leaves", 85), ("deep", 8000)):
        with (tree / name).open("wb") as file:
            for number in range(count):
                file.seek(number * 8192)
                file.write(b"%8d" % number)
    found = check(tree, "type=ext4", "block-size=1024")
    extents = debugfs(found, "dump_extents /deep")
    assert " 2/ 2" in extents


def debugfs(image: Path, command: str) -> str:
    return subprocess.run(
        ["debugfs", "-R", command, image], capture_output=True, text=True, check=True
    ).stdout


def test_extended_attributes(tree: Path, check: Callable[..., Path], kind: str) -> None:
    (tree / "directory").mkdir()
    (tree / "symlink").symlink_to("target")
    for number in range(5):
        (tree / f"file{number}").touch()
        os.setxattr(tree / f"file{number}", "user.same", b"x" * 500)
    os.setxattr(tree / "file0", "user.small", b"")
    os.setxattr(tree / "file1", "trusted.binary", bytes(range(256)))
    os.setxattr(tree / "file2", "user.a", b"small")
    capability = bytes.fromhex("0100000200200000000000000000000000000000")
    os.setxattr(tree / "file3", "security.capability", capability)
    os.setxattr(tree / "symlink", "trusted.link", b"1", follow_symlinks=False)
    os.setxattr(tree, "user.root", b"root")
    for arguments in (
        ["-m", "u:1000:rwx,g:4000000000:r", tree / "file4"],
        ["-d", "-m", "u:1000:rx", tree / "directory"],
    ):
        subprocess.run(["setfacl", *arguments], check=True)
    image = check(tree, kind)
    assert "user.small (0)" in debugfs(image, "ea_list /file0")


def test_equal_attributes_share_blocks(tree: Path, check: Callable[..., Path]) -> None:
    for number in range(1030):
        (tree / str(number)).touch()
        os.setxattr(tree / str(number), "user.same", b"x" * 1000)
    found = oracle.dumpe2fs(check(tree))
    assert int(found["Block count"]) - int(found["Free blocks"]) < 100


def test_attributes_of_inode_and_block(tree: Path, check: Callable[..., Path]) -> None:
    """Together they need more than a block."""
    (tree / "file").touch()
    os.setxattr(tree / "file", "user.large", b"x" * 3900)
    os.setxattr(tree / "file", "user.small", b"y" * 50)
    os.setxattr(tree / "file", "user.another", b"z" * 50)
    check(tree, "type=ext4")
    with pytest.raises(Error, match=r"file: its extended attributes need"):
        oracle.open_disk(tree, "type=ext2")


def test_size(tree: Path, check: Callable[..., Path], kind: str) -> None:
    (tree / "file").write_bytes(b"x" * 1_000_000)
    found = check(tree, kind, "size=50M")
    assert found.stat().st_size == 50 << 20
    with pytest.raises(Error, match=r"at least size=\d+$") as raised:
        oracle.open_disk(tree, kind, "size=700000")
    least = int(str(raised.value).rpartition("=")[2])
    with pytest.raises(Error, match="too small"):
        oracle.open_disk(tree, kind, f"size={least - 4096}")
    found = check(tree, kind, f"size={least}")
    assert found.stat().st_size == least


@pytest.mark.parametrize("size", [10 << 20, 3 << 30])
def test_free_space_for_every_user(
    tree: Path,
    kind: str,
    size: int,
    tmp_path: Path,
    partition: Callable[..., Any],
    mount: Callable[..., Any],
) -> None:
    (tree / "file").write_bytes(b"x" * 1_000_000)
    tree.chmod(0o777)
    image = tmp_path / "image"
    oracle.write_disk(oracle.open_disk(tree, kind, f"size=+{size}"), image)
    with mount(image, *partition(image), options="rw") as mounted:
        st = os.statvfs(mounted)
        assert size <= st.f_bavail * st.f_bsize < size * 1.1 + (3 << 20)
        assert st.f_ffree > size / 20_000
        if size < 1 << 30:  # nobody can write a file of that size
            subprocess.run(
                ["setpriv", "--reuid=65534", "--clear-groups", "dd", "if=/dev/zero", "bs=1M",
                 f"of={mounted}/new", f"count={size >> 20}", "status=none"], check=True
            )  # fmt: skip


def test_large_filesystems(tree: Path) -> None:
    """What isn't used costs next to nothing."""
    (tree / "file").write_bytes(b"x" * 1000)
    for options in (("size=1T",), ("size=6T", "type=ext4")):
        disk = oracle.open_disk(tree, *options)
        used = sum(length for length, state in disk.extents(0, disk.size) if not state)
        assert used < 500 << 20


@pytest.mark.slow
def test_one_terabyte(
    tree: Path, kind: str, tmp_path: Path, partition: Callable[..., Any], mount: Callable[..., Any],
    e2fsck: Callable[..., None],
) -> None:  # fmt: skip
    (tree / "file").write_bytes(b"x" * 1000)
    image = tmp_path / "image"
    disk = oracle.open_disk(tree, kind, "size=1T", "inodes=100000")
    oracle.write_disk(disk, image, piece=1 << 36)
    offset, size = partition(image)
    assert size == 1 << 40
    e2fsck(image, offset)
    with mount(image, offset, size) as mounted:
        assert oracle.entries(mounted) == oracle.entries(tree)


def test_inodes_and_reserved_blocks(tree: Path, check: Callable[..., Path], kind: str) -> None:
    (tree / "file").write_bytes(b"x" * 1_000_000)
    found = oracle.dumpe2fs(check(tree, kind, "inodes=50000", "reserved=5"))
    assert 50_000 <= int(found["Inode count"]) < 51_000
    assert int(found["Reserved block count"]) == int(found["Block count"]) // 20
    with pytest.raises(Error, match="the tree needs 12"):
        oracle.open_disk(tree, "inodes=11")


def test_identity(tree: Path, check: Callable[..., Path], kind: str) -> None:
    identity = "12345678-9abc-4def-8123-456789abcdef"
    found = oracle.dumpe2fs(check(tree, kind, "label=sixteen letters!", f"uuid={identity}"))
    assert found["Filesystem volume name"] == "sixteen letters!"
    assert found["Filesystem UUID"] == identity
    with pytest.raises(Error, match="longer than 16 bytes"):
        oracle.open_disk(tree, "label=seventeen letters")


@pytest.mark.parametrize("kind", ["ext3", "ext4"])
def test_no_journal(tree: Path, check: Callable[..., Path], kind: str) -> None:
    with_journal = check(tree, f"type={kind}")
    assert "has_journal" in oracle.dumpe2fs(with_journal)["Filesystem features"]
    assert with_journal.stat().st_size < 10 << 20
    without = check(tree, f"type={kind}", "--no-journal")
    assert "has_journal" not in oracle.dumpe2fs(without)["Filesystem features"]
    assert without.stat().st_size == 1 << 20


def test_too_large_for_ext2(tree: Path, tmp_path: Path, check: Callable[..., Path]) -> None:
    with (tree / "large").open("wb") as file:
        file.truncate(6 << 40)
        file.seek(5 << 40)
        file.write(b"data")
    with pytest.raises(Error, match=r"large: too large for ext2.*use type=ext4"):
        oracle.open_disk(tree)
    check(tree, "type=ext4")


def test_more_links_than_the_format_holds() -> None:
    with tempfile.TemporaryDirectory(dir="/dev/shm") as name:  # a tmpfs holds more
        tree = Path(name)
        (tree / "first").touch()
        for number in range(65_000):
            os.link(tree / "first", tree / str(number))
        with pytest.raises(Error, match="65001 hard links"):
            oracle.open_disk(tree)


@pytest.mark.slow
def test_more_subdirectories_than_links(tree: Path, check: Callable[..., Path]) -> None:
    (tree / "many").mkdir()
    for number in range(64_999):
        (tree / "many" / str(number)).mkdir()
    with pytest.raises(Error, match=r"many: has 64999 subdirectories.*use type=ext4"):
        oracle.open_disk(tree)
    check(tree, "type=ext4", links=False, repair=False)
