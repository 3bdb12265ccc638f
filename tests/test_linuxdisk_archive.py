"""linuxdisk: tar archives as the source, alone and beside directories; private copies."""

from __future__ import annotations

import io
import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nbdtool.disk import read_bytes
from nbdtool.errors import Error
from tests.ext import oracle


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A bit of all that an archive can hold."""
    tree = tmp_path / "tree"
    (tree / "sub" / "deep").mkdir(parents=True)
    (tree / "sub").chmod(0o2755)
    (tree / "file").write_bytes(os.urandom(100_001))
    (tree / "empty").touch()
    os.chown(tree / "file", 70000, 3_000_000)
    os.link(tree / "file", tree / "sub" / "hard link")
    (tree / "sub" / "symlink").symlink_to("../file")
    (tree / "long symlink").symlink_to("x" * 200)
    (tree / ("n" * 255)).write_bytes(b"long name")
    os.mknod(tree / "device", 0o020660, os.makedev(5, 1))
    os.mkfifo(tree / "fifo")
    with (tree / "sparse").open("wb") as file:
        for number in range(50):
            file.seek(number * 500_000 + number * 7)
            file.write(b"%d" % number * 999)
        file.truncate(40 << 20)
    os.setxattr(tree / "file", "user.attribute", bytes(range(200)))
    os.setxattr(tree / "sub", "trusted.attribute", b"x" * 1000)
    capability = bytes.fromhex("0100000200200000000000000000000000000000")
    os.setxattr(tree / "empty", "security.capability", capability)
    subprocess.run(["setfacl", "-m", "u:1234:rwx,g:0:r", tree / "file"], check=True)
    subprocess.run(["setfacl", "-d", "-m", "u:1234:rx", tree / "sub"], check=True)
    return tree


@pytest.fixture
def contents(
    tmp_path: Path, partition: Callable[..., Any], mount: Callable[..., Any], e2fsck: Any
) -> Callable[..., dict[bytes, Any]]:
    """contents(argument, ...) -> {path: entry} of the disk's filesystem."""

    def contents(*arguments: Any) -> dict[bytes, Any]:
        image = tmp_path / "image"
        oracle.write_disk(oracle.open_disk(*arguments), image)
        offset, size = partition(image)
        e2fsck(image, offset)
        with mount(image, offset, size) as mounted:
            return oracle.entries(mounted)

    return contents


def pack(tree: Path, target: Path, *options: str) -> Path:
    words = ["tar", "--create", "--file", target, "--xattrs", "--xattrs-include=*", "--acls"]
    subprocess.run([*words, *options, "--directory", tree, "."], check=True)
    return target


Contents = Callable[..., dict[bytes, Any]]


@pytest.mark.parametrize("sparse", ["0.0", "0.1", "1.0", ""])
@pytest.mark.parametrize("kind", ["ext2", "ext4"])
def test_archive_equals_the_tree(
    tree: Path, tmp_path: Path, contents: Contents, sparse: str, kind: str
) -> None:
    options = ["--sparse", f"--sparse-version={sparse}"] if sparse else []
    archive = pack(tree, tmp_path / "archive.tar", "--format=posix", *options)
    found, expected = contents(archive, f"type={kind}"), oracle.entries(tree)
    for entries in (found, expected):  # which of two links is the first is the archive's choice
        for path in (b"file", b"sub/hard link"):
            entries[path] = (*entries[path][:4], None, *entries[path][5:])
    assert found == expected
    image = oracle.open_disk(archive)
    assert sum(e.length for e in image.extents(0, image.size) if not e.state) < (
        (2 << 20) if sparse else (45 << 20)
    )


@pytest.mark.parametrize("style", ["gnu", "ustar"])
def test_older_formats(tree: Path, tmp_path: Path, contents: Contents, style: str) -> None:
    shutil.rmtree(tree / "sub")
    for path in tree.iterdir():
        if path.name not in ("empty", "file", "device", "sparse"):
            path.unlink()
    target = tmp_path / "archive.tar"
    words = ["tar", "--create", "--sparse", "--mtime=@1000", "--file", target, "--directory", tree]
    if style == "ustar":
        words.remove("--sparse")
        os.chown(tree / "file", 7, 8)
    subprocess.run([*words, f"--format={style}", "."], check=True)
    found, expected = contents(target), oracle.entries(tree)
    assert found.keys() == expected.keys()
    for path in found:
        assert found[path][1] == expected[path][1]
        assert found[path][6] == expected[path][6]
        assert found[path][2] == 1000 * 10**9


@pytest.mark.slow
@pytest.mark.parametrize("program", ["gzip", "xz", "zstd", "bzip2"])
def test_compressed(tree: Path, tmp_path: Path, contents: Contents, program: str) -> None:
    archive = pack(tree, tmp_path / "archive.tar", "--format=posix")
    expected = contents(archive)
    subprocess.run([program, "--keep", archive], check=True)
    (compressed,) = tmp_path.glob("archive.tar.*")
    assert contents(compressed) == expected
    assert oracle.open_disk(compressed).read(1 << 21, 4096)


def test_standard_input(tree: Path, tmp_path: Path, command: list[str], run: Any) -> None:
    archive = pack(tree, tmp_path / "archive.tar")
    uuid = "uuid=12345678-9abc-4def-8123-456789abcdef"
    environment = {**os.environ, "SOURCE_DATE_EPOCH": "1700000000"}
    results = []
    for source in (archive, "-"):
        target = tmp_path / "image"
        words = [*command, "linuxdisk", str(source), uuid, "--to-file", str(target)]
        process = subprocess.Popen(words, stdin=subprocess.PIPE, env=environment)
        assert process.stdin
        try:
            process.stdin.write(archive.read_bytes() if source == "-" else b"")
            process.stdin.close()
        except BrokenPipeError:
            pass
        assert process.wait() == 0
        results.append(target.read_bytes())
    assert results[0] == results[1]


def test_owners_without_root(tree: Path, tmp_path: Path) -> None:
    """Whoever can read an archive can make a disk of it: devices and owners are as in it."""
    archive = pack(tree, tmp_path / "archive.tar")
    for path in (tmp_path, *tmp_path.parents):
        if path.stat().st_mode & 0o005 != 0o005:
            path.chmod(path.stat().st_mode | 0o055)
    target = tmp_path / "out"
    target.mkdir()
    target.chmod(0o777)
    words = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", sys.executable]
    words += ["-m", "nbdtool", "linuxdisk", archive, "--to-file", target / "image"]
    subprocess.run(list(map(str, words)), check=True)
    where = f"{target}/image?offset={1 << 20}"
    for path, text in (("/device", "Device major/minor number: 05:01"), ("/file", "User: 70000")):
        done = subprocess.run(
            ["debugfs", "-R", f"stat {path}", where], capture_output=True, text=True, check=True
        )
        assert text in done.stdout


def test_container_layers(tmp_path: Path, contents: Contents) -> None:
    """Layers with whiteouts: later ones hide what is in earlier ones, not what they bring."""
    first = {"etc/passwd": b"1", "etc/shadow": b"1", "opt/a/b": b"1", "usr/x": b"1"}
    second = {"etc/.wh.shadow": b"", "opt/.wh..wh..opq": b"", "opt/new": b"2", ".wh.usr": b"",
              "usr/y": b"2", "etc/passwd": b"2"}  # fmt: skip
    for name, members in (("1.tar", first), ("2.tar", second)):
        with tarfile.open(tmp_path / name, "w") as archive:
            for path, data in members.items():
                info = tarfile.TarInfo(path)
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
    (tmp_path / "directory").mkdir()
    (tmp_path / "directory" / "more").write_bytes(b"3")
    found = contents(tmp_path / "1.tar", tmp_path / "2.tar", tmp_path / "directory", "--whiteouts")
    names = [b"etc", b"etc/passwd", b"more", b"opt", b"opt/new", b"usr", b"usr/y"]
    assert sorted(found) == names
    assert found[b"etc/passwd"][6][0] == 1


@pytest.mark.parametrize(
    ("name", "kind", "link"),
    [
        ("../up", tarfile.REGTYPE, ""),
        ("a/../../up", tarfile.REGTYPE, ""),
        ("x" * 256, tarfile.REGTYPE, ""),
        ("link", tarfile.LNKTYPE, "/etc/passwd"),
        ("link", tarfile.LNKTYPE, "../../etc/passwd"),
        ("d/" * 3000, tarfile.DIRTYPE, ""),
        ("link", tarfile.SYMTYPE, ""),
        ("lost+found", tarfile.REGTYPE, ""),
        (".", tarfile.REGTYPE, ""),
    ],
)
def test_hostile_members(tmp_path: Path, name: str, kind: bytes, link: str) -> None:
    with tarfile.open(tmp_path / "bad.tar", "w") as archive:
        info = tarfile.TarInfo(name)
        info.type, info.linkname = kind, link
        archive.addfile(info)
    with pytest.raises(Error):
        oracle.open_disk(tmp_path / "bad.tar")


def test_symlink_of_an_archive_is_not_followed(tmp_path: Path, contents: Contents) -> None:
    with tarfile.open(tmp_path / "bad.tar", "w") as archive:
        info = tarfile.TarInfo("link")
        info.type, info.linkname = tarfile.SYMTYPE, str(tmp_path / "target")
        archive.addfile(info)
        archive.addfile(tarfile.TarInfo("link/file"))
    (tmp_path / "target").mkdir()
    found = contents(tmp_path / "bad.tar")
    assert found[b"link/file"]
    assert not list((tmp_path / "target").iterdir())


@pytest.mark.parametrize("damage", ["cut", "noise", "gzip"])
def test_damaged_archive(tree: Path, tmp_path: Path, damage: str) -> None:
    archive = pack(tree, tmp_path / "archive.tar")
    data = archive.read_bytes()
    if damage == "gzip":
        subprocess.run(["gzip", archive], check=True)
        archive = tmp_path / "archive.tar.gz"
        data = archive.read_bytes()
    archive.write_bytes(b"noise" * 1000 if damage == "noise" else data[: len(data) // 2])
    with pytest.raises(Error, match="archive"):
        oracle.open_disk(archive)


def test_changed_archive_is_an_error(tree: Path, tmp_path: Path) -> None:
    archive = pack(tree, tmp_path / "archive.tar")
    disk = oracle.open_disk(archive)
    with archive.open("r+b") as file:
        file.write(b"x")
    with pytest.raises(OSError, match="changed"):
        for offset in range(0, disk.size, 1 << 20):
            read_bytes(disk, offset, 1 << 20)


def test_private_copy(tree: Path, tmp_path: Path, contents: Contents) -> None:
    """The files may change and go once the disk is there."""
    expected = oracle.entries(tree)
    disk = oracle.open_disk(tree, "--copy", "type=ext4")
    shutil.rmtree(tree)
    tree.mkdir()
    image = tmp_path / "copy"
    oracle.write_disk(disk, image)
    oracle.extract_partition(image, 1 << 20, disk.size - (2 << 20))
    subprocess.run(["mount", "-o", f"ro,loop,offset={1 << 20}", image, tree], check=True)
    try:
        assert oracle.entries(tree) == expected
    finally:
        subprocess.run(["umount", tree], check=True)


def test_no_room_for_the_copy(tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = tmp_path / "small"
    small.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "none", small], check=True)
    try:
        monkeypatch.setenv("TMPDIR", str(small))
        with pytest.raises(Error, match="No space left on device; TMPDIR"):
            oracle.open_disk(tree, "--copy")
    finally:
        subprocess.run(["umount", small], check=True)


def test_copy_is_reflinked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On one btrfs a private copy takes no room."""
    with (tmp_path / "btrfs").open("wb") as file:
        file.truncate(512 << 20)
    subprocess.run(["mkfs.btrfs", "-q", tmp_path / "btrfs"], check=True)
    place = tmp_path / "mounted"
    place.mkdir()
    subprocess.run(["mount", "-o", "loop", tmp_path / "btrfs", place], check=True)
    try:
        (place / "tree").mkdir()
        for number in range(10):
            (place / "tree" / str(number)).write_bytes(os.urandom(5_000_000 + number))
        os.sync()
        before = os.statvfs(place).f_bfree * 4096
        monkeypatch.setenv("TMPDIR", str(place))
        disk = oracle.open_disk(place / "tree", "--copy")
        os.sync()
        assert before - os.statvfs(place).f_bfree * 4096 < 5_000_000
        assert read_bytes(disk, 1 << 21, 4096)
        del disk
    finally:
        subprocess.run(["umount", place], check=True)
