"""What other sources ask of the tar walker: streams, attributes, many members."""

from __future__ import annotations

import os
import tarfile
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from nbdtool.disk import read_bytes
from nbdtool.disks.file import FileDisk
from nbdtool.layers import tar
from nbdtool.layers.tar.walk import DIRECTORY, REGULAR, DiskSource, StreamSource, walk

MIB = 1 << 20

FORMATS = [
    ["--format=v7"],
    ["--format=oldgnu", "-S"],
    ["--format=gnu", "-S"],
    ["--format=posix"],
    ["--format=posix", "-S", "--sparse-version=0.0"],
    ["--format=posix", "-S", "--sparse-version=0.1"],
    ["--format=posix", "-S", "--sparse-version=1.0"],
]


@pytest.fixture(scope="module")
def archives(tmp_path_factory: pytest.TempPathFactory, run: Any) -> list[Path]:
    """Of a directory with a whole and a sparse file."""
    top = tmp_path_factory.mktemp("walk")
    (top / "disk").mkdir()
    (top / "disk" / "whole").write_bytes(b"x" * 99999)
    with (top / "disk" / "sparse").open("wb") as file:
        for n in range(30):
            file.seek(n * MIB // 4)
            file.write(b"x" * 4096)
    paths = []
    for number, options in enumerate(FORMATS):
        paths.append(top / str(number))
        run("tar", *options, "-cf", paths[-1], "disk", cwd=top)
    return paths


def test_a_stream_has_the_same_members(archives: list[Path]) -> None:
    """Whether the consumer reads nothing of the content, a part or all."""
    for path in archives:
        expected = list(walk(DiskSource(FileDisk(str(path))), "a"))
        for part in 0.0, 0.3, 1.0:
            with path.open("rb") as file:
                source = StreamSource(file)
                members = []
                for member in walk(source, "a"):
                    assert source.position == member.offset
                    source.read(int(member.stored * part))
                    members.append(member)
            assert [(m.name, m.offset, m.stored, m.size) for m in members] == [
                (m.name, m.offset, m.stored, m.size) for m in expected
            ]


def test_owners_modes_and_times(tmp_path: Path, run: Any) -> None:
    (tmp_path / "f").write_bytes(b"x")
    (tmp_path / "f").chmod(0o4751)
    os.utime(tmp_path / "f", ns=(0, -1_500_000_000))
    (tmp_path / "d").mkdir()
    run("mknod", tmp_path / "n", "b", "259", "70000")
    options = ["--owner=:3000000", "--group=:1234", "--sort=name"]
    for form in "gnu", "posix":
        path = tmp_path / f"{form}.tar"
        run("tar", f"--format={form}", *options, "-cf", path, "d", "f", "n", cwd=tmp_path)
        d, f, n = walk(DiskSource(FileDisk(str(path))), "a")
        assert (d.name.rstrip(b"/"), d.type, f.type) == (b"d", DIRECTORY, REGULAR)
        assert (f.uid, f.gid, f.mode) == (3000000, 1234, 0o4751)
        assert f.mtime == (-1_500_000_000 if form == "posix" else -2_000_000_000)
        assert (n.type, n.device) == (b"4", (259, 70000))


def test_extended_attributes(tmp_path: Path, run: Any) -> None:
    (tmp_path / "f").write_bytes(b"x")
    os.setxattr(tmp_path / "f", "user.test", b"a\nb\0c=d")
    run("tar", "--xattrs", "-cf", "a.tar", "f", cwd=tmp_path)
    (member,) = walk(DiskSource(FileDisk(str(tmp_path / "a.tar"))), "a")
    assert member.pax["SCHILY.xattr.user.test"] == b"a\nb\0c=d"


def test_many_members_in_little_memory(tmp_path: Path) -> None:
    header = tarfile.TarInfo("some/name")
    block = header.tobuf(tarfile.GNU_FORMAT) * 1000
    with (tmp_path / "a.tar").open("wb") as file:
        for _ in range(10):
            file.write(block)
        header.name, header.size = "last", 3
        file.write(header.tobuf(tarfile.GNU_FORMAT) + b"yes".ljust(1536, b"\0"))
    tracemalloc.start()
    disk = tar.open(FileDisk(str(tmp_path / "a.tar")), "last", None)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert read_bytes(disk, 0, 3) == b"yes"
    assert peak < MIB
