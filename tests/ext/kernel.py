"""What the kernel reads of an ext filesystem, to compare with, and images to read."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import random
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nbdtool.disk import DATA, Disk, read_bytes

MIB = 1 << 20
_OPENAT2, _RESOLVE_IN_ROOT = 437, 0x10
_BLKFLSBUF = 0x1261
_libc = ctypes.CDLL(None, use_errno=True)


def make(image: Path, size: int, *options: Any, tree: Path | None = None) -> Path:
    """A new filesystem of mke2fs in a sparse file."""
    with image.open("wb") as file:
        file.truncate(size)
    words = ["mke2fs", "-q", "-F", *(["-d", tree] if tree else []), *options, image]
    subprocess.run(list(map(str, words)), check=True)
    return image


def debugfs(image: Path, *requests: str) -> str:
    """The output of debugfs, which may write."""
    text = "\n".join(requests)
    done = subprocess.run(
        ["debugfs", "-w", "-f", "-", image], input=text, capture_output=True, text=True, check=True
    )
    return done.stdout


def open_in_root(root: int, path: bytes | str) -> int:
    """Open a file for reading as if the directory root were the root directory; OSError."""
    how = (ctypes.c_uint64 * 3)(os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC, 0, _RESOLVE_IN_ROOT)
    name = ctypes.create_string_buffer(os.fsencode(path))
    fd: int = _libc.syscall(_OPENAT2, root, name, ctypes.byref(how), ctypes.sizeof(how))
    if fd < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), path)
    return fd


def mount(device: Path, directory: Path) -> None:
    """Mount read-only; OSError if the kernel refuses. It never panics, whatever is damaged."""
    fd = os.open(device, os.O_RDONLY)
    fcntl.ioctl(fd, _BLKFLSBUF)  # the image may have changed, and another may have it open
    os.close(fd)
    words = (os.fsencode(device), os.fsencode(directory), b"ext4", 1, b"errors=continue")
    if _libc.mount(*words):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), device)


def umount(directory: Path) -> None:
    if _libc.umount2(os.fsencode(directory), 0):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), directory)


def data_ranges(fd: int, most: int = 4096) -> Iterator[tuple[int, int]]:
    """(start, end) of a file's data; all else are holes."""
    position = 0
    for _ in range(most):
        try:
            start = os.lseek(fd, position, os.SEEK_DATA)
        except OSError as exc:
            if exc.errno == errno.ENXIO:
                return
            raise
        position = os.lseek(fd, start, os.SEEK_HOLE)
        yield start, position


def assert_same(disk: Disk, fd: int) -> None:
    """Each byte of the disk is the file's: the data of either is compared, the rest is holes."""
    assert disk.size == os.fstat(fd).st_size
    ranges = list(data_ranges(fd))
    at = 0
    for extent in disk.extents(0, disk.size) if disk.size else ():
        if extent.state == DATA:
            ranges.append((at, at + extent.length))
        at += extent.length
    assert at == disk.size
    for start, end in ranges:
        for offset in range(start, end, MIB):
            length = min(MIB, end - offset)
            assert read_bytes(disk, offset, length) == os.pread(fd, length, offset), (start, end)


def make_tree(tree: Path) -> Path:
    """Files, holes, links and names of all kinds."""
    generator = random.Random(1)
    deep = tree / "deep" / "deeper" / ("long" * 60)
    deep.mkdir(parents=True)
    (tree / "images").mkdir()
    (tree / "images/disk.img").write_bytes(generator.randbytes(3 * MIB + 123))
    for size in 0, 1, 59, 60, 61, 1023, 1024, 1025, 4096, 12288, 12289, 300_000:
        (tree / f"size{size}").write_bytes(generator.randbytes(size))
    with (tree / "sparse").open("wb") as file:
        for at in 5000, 70_000, MIB, 20 * MIB:
            file.seek(at)
            file.write(generator.randbytes(3000))
        file.truncate(40 * MIB + 7)
    (deep / "file").write_bytes(b"deep")
    (deep / os.fsdecode(b"\xff\xfe\x80 name")).write_bytes(b"not UTF-8")
    (tree / ("n" * 255)).write_bytes(b"a long name")
    (tree / "hard link").hardlink_to(tree / "images/disk.img")
    os.mkfifo(tree / "fifo")
    for name, target in {
        "fast": "images/disk.img",
        "absolute": "/images/disk.img",
        "up": "../../../images/../deep/./deeper/../../size60",
        "directory": "/deep//deeper/",
        "slow": "deep/../" * 20 + "size1",
        "fast59": "./" * 27 + "size1",
        "slow60": "./" * 27 + "size59",
        "chain": "absolute",
        "loop": "loop2",
        "loop2": "/loop",
        "dangling": "nowhere",
    }.items():
        (tree / name).symlink_to(target)
    return tree
