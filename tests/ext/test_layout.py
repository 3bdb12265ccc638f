"""Random trees as each filesystem: the checker has nothing to say, the kernel sees the tree."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nbdtool.disk import DATA
from tests.ext import oracle


@dataclass
class File:
    """Data segments as (block, bytes of it), and a size relative to the last one's end."""

    segments: list[tuple[int, int]]
    more: int
    attributes: dict[str, bytes] = field(default_factory=dict)
    time: int = 0


@dataclass
class Link:
    target: bytes


@dataclass
class Hard:
    number: int


Tree = dict[bytes, Any]  # bytes to Tree, File, Link, Hard

NAMES = st.binary(min_size=1, max_size=255).map(
    lambda name: name.replace(b"/", b"_").replace(b"\0", b"_")
).filter(lambda name: name not in (b".", b"..", b"lost+found"))  # fmt: skip
ATTRIBUTES = st.dictionaries(
    st.sampled_from(["user.a", "user.long name", "trusted.b", "security.c"]),
    st.one_of(st.binary(max_size=60), st.just(b"x" * 300)),
    max_size=2,
)
# seconds in 1901 to 2446, in nanoseconds
TIMES = st.integers(-(2**31) * 10**9, ((1 << 34) - (1 << 31)) * 10**9 - 1)
# the blocks around which the mapping changes, for each block size
EDGES = sorted(
    {
        edge + near
        for numbers in (256, 512, 1024)
        for edge in (0, 4, 12, 12 + numbers, 12 + 2 * numbers, 12 + numbers + numbers**2)
        for near in (-1, 0, 1)
        if edge + near >= 0
    }
)
FILES = st.builds(
    File,
    st.lists(
        st.tuples(st.sampled_from(EDGES), st.sampled_from([1, 1024, 4096, 10_000])), max_size=4
    ),
    st.sampled_from([0, 0, 1, 511, 5000, 100_000]),
    ATTRIBUTES,
    TIMES,
)
LINKS = st.builds(Link, st.binary(min_size=1, max_size=1000).map(lambda t: t.replace(b"\0", b"/")))
TREES = st.recursive(
    st.dictionaries(NAMES, FILES, max_size=3),
    lambda inner: st.dictionaries(
        NAMES,
        st.one_of(inner, FILES, LINKS, st.builds(Hard, st.integers(0, 50))),
        max_size=8,
    ),
    max_leaves=12,
)


def make(path: bytes, tree: Tree, block_size: int, files: list[bytes]) -> None:
    for name, node in tree.items():
        full = path + b"/" + name
        if isinstance(node, dict):
            os.mkdir(full)
            make(full, node, block_size, files)
        elif isinstance(node, Link):
            os.symlink(node.target, full)
        elif isinstance(node, Hard):
            if files:
                os.link(files[node.number % len(files)], full)
        else:
            with Path(os.fsdecode(full)).open("wb") as file:
                end = 0
                for block, length in sorted(node.segments):
                    file.seek(block * block_size)
                    file.write((b"%d " % block * length)[:length])
                    end = max(end, file.tell())
                file.truncate(end + node.more)
            for attribute, value in node.attributes.items():
                os.setxattr(full, attribute, value)
            os.utime(full, ns=(node.time, node.time))
            files.append(full)


@pytest.mark.slow
@pytest.mark.parametrize("block_size", [1024, 2048, 4096])
@pytest.mark.parametrize("kind", ["ext2", "ext3", "ext4"])
@settings(max_examples=20, suppress_health_check=list(HealthCheck))
@given(tree=TREES, label=st.text("ab", max_size=5), free=st.one_of(st.none(), st.just(1 << 22)))
def test_random_trees(
    kind: str,
    block_size: int,
    tree: Tree,
    label: str,
    free: Optional[int],
    mount: Callable[..., Any],
) -> None:
    with tempfile.TemporaryDirectory(prefix="nbdtool-test-") as name:
        source, image = Path(name) / "tree", Path(name) / "image"
        source.mkdir()
        make(os.fsencode(source), tree, block_size, [])
        options = [f"type={kind}", f"block-size={block_size}", f"label={label}"]
        disk = oracle.open_disk(source, *options, *([f"size=+{free}"] if free else []))
        oracle.write_disk(disk, image)
        check_block_status(disk, image)
        offset = 1 << 20
        size = disk.size - (2 << 20)
        found = oracle.extract_partition(image, offset, size)
        oracle.check_filesystem(found)
        expected = oracle.entries(source)
        with mount(found) as mounted:
            assert oracle.entries(mounted) == expected
        fields = oracle.dumpe2fs(found)
        used = int(fields["Inode count"]) - int(fields["Free inodes"])
        assert used == 11 + len({entry[4] for entry in expected.values()})
        assert fields["Block size"] == str(block_size)
        assert fields["Filesystem volume name"] == (label or "<none>")
        shutil.rmtree(source)


def check_block_status(disk: Any, image: Path) -> None:
    """What is said to be a hole is zero; what is data was written."""
    at = 0
    with image.open("rb") as file:
        for length, state in disk.extents(0, disk.size):
            if state != DATA:
                start = at
                while start < at + length:
                    try:
                        start = os.lseek(file.fileno(), start, os.SEEK_DATA)
                    except OSError:
                        break
                    if start >= at + length:
                        break
                    part = os.pread(file.fileno(), min(4096, at + length - start), start)
                    assert not part.strip(b"\0")
                    start += len(part)
            at += length
    assert at == disk.size


@pytest.fixture
def filesystem(tmp_path: Path) -> Callable[..., Path]:
    """filesystem(option, ...): the partition of a disk of a small tree, as a file."""

    def filesystem(*options: str) -> Path:
        tree = tmp_path / "tree"
        (tree / "sub").mkdir(parents=True)
        for number in range(100):
            (tree / "sub" / f"file{number}").write_bytes(os.urandom(number * 1000))
        disk = oracle.open_disk(tree, *options)
        oracle.write_disk(disk, tmp_path / "image")
        return oracle.extract_partition(tmp_path / "image", 1 << 20, disk.size - (2 << 20))

    return filesystem


KINDS = ["ext2", "ext3", "ext4"]


@pytest.mark.parametrize("kind", KINDS)
def test_written_by_the_kernel(
    kind: str, filesystem: Callable[..., Path], mount: Callable[..., Any]
) -> None:
    """Create, rename, delete, fill until there is no room: it is a filesystem like any other."""
    image = filesystem(f"type={kind}", "size=40M", "inodes=5000")
    with mount(image, options="rw") as mounted:
        for number in range(3000):
            (mounted / "sub" / f"new{number}").write_bytes(b"x" * (number % 300))
        for number in range(0, 100, 2):
            (mounted / "sub" / f"file{number}").unlink()
        os.rename(mounted / "sub" / "file1", mounted / "renamed")
        with (mounted / "sub" / "file99").open("ab") as file:
            file.write(b"y" * 3_000_000)
        (mounted / "sub" / "another").mkdir()
        with pytest.raises(OSError, match="No space"), (mounted / "fill").open("wb") as file:
            while True:
                file.write(bytes(1 << 20))
    oracle.check_filesystem(image, repair=False)
    with mount(image) as mounted:
        assert (mounted / "renamed").stat().st_size == 1000
        assert len(list((mounted / "sub").iterdir())) == 3000 + 49 + 1
        assert (mounted / "sub" / "new299").read_bytes() == b"x" * 299


@pytest.mark.parametrize("kind", KINDS)
def test_resize2fs_grows_it(
    kind: str, filesystem: Callable[..., Path], mount: Callable[..., Any]
) -> None:
    image = filesystem(f"type={kind}")
    os.truncate(image, 1 << 30)
    subprocess.run(["e2fsck", "-fp", image], check=True, stdout=subprocess.DEVNULL)
    subprocess.run(["resize2fs", image], check=True, capture_output=True)
    oracle.check_filesystem(image, repair=False)
    assert int(oracle.dumpe2fs(image)["Block count"]) == (1 << 30) // 4096
    with mount(image) as mounted:
        assert (mounted / "sub" / "file7").stat().st_size == 7000


@pytest.mark.parametrize("kind", ["ext3", "ext4"])
def test_journal_replays(
    kind: str, filesystem: Callable[..., Path], mount: Callable[..., Any], tmp_path: Path
) -> None:
    """A copy of the mounted filesystem is one after a hard stop."""
    image = filesystem(f"type={kind}", "size=40M")
    stopped = tmp_path / "stopped"
    with mount(image, options="rw") as mounted:
        for number in range(500):
            (mounted / f"new{number}").write_bytes(b"x" * number)
        directory = os.open(mounted, os.O_RDONLY)
        os.fsync(directory)
        os.close(directory)
        shutil.copy(image, stopped)
    assert "needs_recovery" in oracle.dumpe2fs(stopped)["Filesystem features"]
    with mount(stopped, options="rw") as mounted:
        assert (mounted / "new499").exists()
    oracle.check_filesystem(stopped, repair=False)
