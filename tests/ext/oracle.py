"""What the tests of linuxdisk share: disks without a server, and what a tree holds."""

from __future__ import annotations

import hashlib
import os
import stat
import subprocess
from pathlib import Path
from typing import Any

from nbdtool import cli
from nbdtool.disk import Disk, FileSpan, ZeroSpan, span_bytes, span_length

Entry = tuple[Any, ...]


def open_disk(*arguments: Any) -> Disk:
    """The disk of `nbdtool linuxdisk ARGUMENTS`."""
    command, args = cli.parse(["linuxdisk", *map(str, arguments)])
    assert command == "linuxdisk"
    return cli.open_disks(command, args)[""]


def write_disk(disk: Disk, path: Path, piece: int = 1 << 25) -> None:
    """Write what the disk answers, zero spans as holes."""
    with path.open("wb") as file:
        file.truncate(disk.size)
        offset = 0
        while offset < disk.size:
            spans = disk.read(offset, min(piece, disk.size - offset))
            for span in spans:
                if isinstance(span, FileSpan):
                    assert span.offset + span.length <= os.fstat(span.file.fd).st_size
                if not isinstance(span, ZeroSpan):
                    os.pwrite(file.fileno(), span_bytes(span), offset)
                offset += span_length(span)


def extract_partition(image: Path, offset: int, size: int) -> Path:
    """The filesystem of a disk as a file of its own, sparse."""
    target = image.with_suffix(".partition")
    with image.open("rb") as source, target.open("wb") as file:
        file.truncate(size)
        position = offset
        while position < offset + size:
            try:
                start = os.lseek(source.fileno(), position, os.SEEK_DATA)
            except OSError:
                break
            end = min(os.lseek(source.fileno(), start, os.SEEK_HOLE), offset + size)
            if start >= end:
                break
            while start < end:
                count = min(end - start, 1 << 24)
                os.pwrite(file.fileno(), os.pread(source.fileno(), count, start), start - offset)
                start += count
            position = end
    return target


def entries(root: Path) -> dict[bytes, Entry]:
    """All of a tree by path: mode, owner, mtime, device, first path of the inode, links, xattrs,
    content (a target, or size and digest).

    lost+found is left out. links counts those in the tree, which may be fewer than the file has.
    """
    found: dict[bytes, Entry] = {}
    first: dict[tuple[int, int], bytes] = {}
    counts: dict[bytes, int] = {}
    here = os.open(".", os.O_RDONLY)

    def visit(path: bytes) -> None:
        directory = os.open(".", os.O_RDONLY)
        for name in sorted(os.listdir(b".")):
            if path == b"" and name == b"lost+found":
                continue
            st = os.lstat(name)
            full = path + name
            one = first.setdefault((st.st_dev, st.st_ino), full)
            counts[one] = counts.get(one, 0) + 1
            found[full] = (
                oct(st.st_mode),
                (st.st_uid, st.st_gid),
                st.st_mtime_ns,
                st.st_rdev if stat.S_ISCHR(st.st_mode) or stat.S_ISBLK(st.st_mode) else 0,
                one,
                _attributes(name),
                _content(name, st),
            )
            if stat.S_ISDIR(st.st_mode):
                os.chdir(name)
                visit(full + b"/")
                os.fchdir(directory)
        os.close(directory)

    os.chdir(root)
    visit(b"")
    os.fchdir(here)
    os.close(here)
    return {path: (*entry, counts[entry[4]]) for path, entry in found.items()}


def link_counts(root: Path) -> dict[bytes, int]:
    """st_nlink of all that isn't a directory, by path."""
    paths = (Path(folder) / name for folder, _, names in os.walk(root) for name in names)
    return {os.fsencode(path.relative_to(root)): path.lstat().st_nlink for path in paths}


def _attributes(name: bytes) -> dict[str, bytes]:
    return {
        attribute: os.getxattr(name, attribute, follow_symlinks=False)
        for attribute in os.listxattr(name, follow_symlinks=False)
    }


def _content(name: bytes, st: os.stat_result) -> Any:
    if stat.S_ISLNK(st.st_mode):
        return os.readlink(name)
    if not stat.S_ISREG(st.st_mode):
        return None
    digest = hashlib.sha256()
    with Path(os.fsdecode(name)).open("rb", buffering=0) as file:
        position = 0
        while position < st.st_size:
            try:
                start = os.lseek(file.fileno(), position, os.SEEK_DATA)
                end = os.lseek(file.fileno(), start, os.SEEK_HOLE)
            except OSError:
                break
            while start < end:  # only what isn't zero, so that holes don't matter
                data = os.pread(file.fileno(), 1 << 20, start & ~0xFFFFF)
                if data.strip(b"\0"):
                    digest.update(b"%d:" % (start >> 20) + data.rstrip(b"\0"))
                start = (start & ~0xFFFFF) + (1 << 20)
            position = start
    return st.st_size, digest.hexdigest()


def check_filesystem(image: Path, *, repair: bool = True) -> None:
    """e2fsck finds nothing to do, neither with -n nor with -y, which changes times only."""
    done = subprocess.run(["e2fsck", "-fn", image], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "ix?" not in done.stdout and "WARNING" not in done.stdout, done.stdout
    if not repair:
        return
    before = _digest(image)
    done = subprocess.run(["e2fsck", "-fy", image], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    assert "ptimizing" not in done.stdout, done.stdout
    assert _digest(image) == before


def _digest(image: Path) -> str:
    """Of an ext filesystem, without the times and the mount count of its superblock."""
    digest = hashlib.sha256()
    with image.open("rb") as file:
        head = bytearray(file.read(4096))
        for start, end in ((1024 + 0x2C, 1024 + 0x36), (1024 + 0x40, 1024 + 0x44)):
            head[start:end] = bytes(end - start)
        head[1024 + 0x178 : 1024 + 0x180] = bytes(8)  # s_kbytes_written
        digest.update(head)
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def dumpe2fs(image: Path) -> dict[str, str]:
    """The fields of the superblock, as dumpe2fs -h names them."""
    done = subprocess.run(
        ["dumpe2fs", "-h", image], capture_output=True, text=True, check=True, timeout=60
    )
    return {
        name.strip(): value.strip()
        for name, found, value in (line.partition(":") for line in done.stdout.splitlines())
        if found
    }
