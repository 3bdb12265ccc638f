"""A regular file or a block device as a Disk."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import struct
from collections.abc import Iterator

from nbdtool.disk import DATA, HOLE, Disk, Extent, FileSpan, Span, SpanFile
from nbdtool.disks import locks
from nbdtool.errors import Error, warn

# linux/falloc.h and linux/fs.h
_KEEP_SIZE, _PUNCH_HOLE, _ZERO_RANGE = 0x01, 0x02, 0x10
_BLKROGET, _BLKDISCARD, _BLKZEROOUT = 0x125E, 0x1277, 0x127F
_new = tuple.__new__  # a third of what FileSpan() costs
_SECTOR = 4096  # bytes: no device has larger logical blocks


class FileDisk(Disk):
    """The file at path, whose size is fixed when it is opened; Error if it can't be served.

    writable asks for it: a file that may only be read is. An image that a running guest holds (by
    qemu's locks) is refused for writing and warned of for reading, but for allow_live.
    """

    def __init__(self, path: str, *, writable: bool = False, allow_live: bool = False) -> None:
        self.file = SpanFile(_open(path, writable), path)
        self._fd = fd = self.file.fd
        st = os.fstat(fd)
        self._device = stat.S_ISBLK(st.st_mode)
        if not self._device and not stat.S_ISREG(st.st_mode):
            hint = "; `nbdtool linuxdisk` makes a disk of one" if stat.S_ISDIR(st.st_mode) else ""
            raise Error(f"{path}: neither a regular file nor a block device{hint}")
        self.writable = fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDWR
        if self._device and any(fcntl.ioctl(fd, _BLKROGET, bytes(4))):
            self.writable = False  # though it could be opened for writing
        self.size = os.lseek(fd, 0, os.SEEK_END)
        self.description = path
        if not allow_live:
            self._lock(path)
        if self.writable:
            # Beyond the end there is nothing to punch: this only asks if it could be done.
            beyond = (self.size + _SECTOR) // _SECTOR * _SECTOR
            works = self._device or _fallocate(fd, _PUNCH_HOLE | _KEEP_SIZE, beyond, _SECTOR)
            self.can_trim = self.can_fast_zero = works

    def _lock(self, path: str) -> None:
        locks.take(self._fd, writing=self.writable)
        if not locks.in_use(self._fd, writing=self.writable):
            return
        if self.writable:
            raise Error(
                f"{path}: in use by a running guest or another server; serve it read-only (-r),"
                " or with --allow-live if you must"
            )
        warn(f"{path}: somebody writes to it: what is read may be inconsistent")

    def read(self, offset: int, length: int) -> list[Span]:
        return [_new(FileSpan, (self.file, offset, length))]

    def write(self, offset: int, data: memoryview) -> None:
        done = os.pwrite(self._fd, data, offset)
        while done < len(data):  # a signal, or a disk that is about to be full
            done += os.pwrite(self._fd, data[done:], offset + done)

    def zero(self, offset: int, length: int, *, punch: bool, fast: bool) -> None:
        if punch and self.can_trim and not self._device:
            modes = [_PUNCH_HOLE | _KEEP_SIZE, _ZERO_RANGE | _KEEP_SIZE]
        elif self._device:
            modes = [_PUNCH_HOLE | _KEEP_SIZE]  # fails where the device would have to be written
        else:
            modes = [_ZERO_RANGE | _KEEP_SIZE]
        if any(_fallocate(self._fd, mode, offset, length) for mode in modes):
            return
        if fast:
            raise OSError(errno.EOPNOTSUPP, f"{self.file.name}: zeroes have to be written")
        if self._device:
            self._zero_device(offset, length)
        else:
            super().zero(offset, length, punch=punch, fast=False)

    def _zero_device(self, offset: int, length: int) -> None:
        start, end = _inner(offset, length)
        try:
            fcntl.ioctl(self._fd, _BLKZEROOUT, struct.pack("=QQ", start, end - start))
        except OSError:
            start = end = offset
        for at, stop in ((offset, start), (end, offset + length)):
            if at < stop:
                super().zero(at, stop - at, punch=False, fast=False)

    def trim(self, offset: int, length: int) -> None:
        if not self._device:
            _fallocate(self._fd, _PUNCH_HOLE | _KEEP_SIZE, offset, length)
            return
        start, end = _inner(offset, length)
        try:
            fcntl.ioctl(self._fd, _BLKDISCARD, struct.pack("=QQ", start, end - start))
        except OSError as exc:
            if exc.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
                raise

    def flush(self) -> None:
        if self.writable:
            os.fdatasync(self._fd)

    def extents(self, offset: int, length: int) -> Iterator[Extent]:
        fd, end = self._fd, offset + length
        while offset < end:
            try:
                data = min(os.lseek(fd, offset, os.SEEK_DATA), end)
            except OSError as exc:
                if exc.errno != errno.ENXIO:  # a device or filesystem that can't tell
                    yield Extent(end - offset, DATA)
                    return
                if os.lseek(fd, 0, os.SEEK_END) < self.size:
                    text = f"{self.file.name}: has become shorter"
                    raise OSError(errno.EIO, text) from None
                data = end
            if data > offset:
                yield Extent(data - offset, HOLE)
            if data < end:
                offset = min(os.lseek(fd, data, os.SEEK_HOLE), end)
                yield Extent(offset - data, DATA)
            else:
                offset = end


def _open(path: str, writable: bool) -> int:
    # O_NONBLOCK: a fifo must not make us wait before it is refused.
    flags = os.O_CLOEXEC | os.O_NONBLOCK
    try:
        if writable:
            try:
                return os.open(path, flags | os.O_RDWR)
            except OSError as exc:
                if exc.errno not in (errno.EACCES, errno.EPERM, errno.EROFS, errno.EISDIR):
                    raise
        return os.open(path, flags | os.O_RDONLY)
    except (OSError, ValueError) as exc:
        raise Error(f"{path}: {getattr(exc, 'strerror', None) or exc}") from None


def _inner(offset: int, length: int) -> tuple[int, int]:
    """The part of a range that consists of whole sectors; empty at its start if there is none."""
    start = -(-offset // _SECTOR) * _SECTOR
    end = (offset + length) // _SECTOR * _SECTOR
    return (start, end) if start < end else (offset, offset)


def _fallocate(fd: int, mode: int, offset: int, length: int) -> bool:
    """fallocate(2), which the os module lacks; False where it isn't supported."""
    import ctypes  # slow to load, for those who only read

    libc = ctypes.CDLL(None, use_errno=True)
    call = getattr(libc, "fallocate64", None) or getattr(libc, "fallocate", None)
    if call is None:
        return False
    arguments = (ctypes.c_int64(offset), ctypes.c_int64(length))
    while call(fd, mode, *arguments):
        number = ctypes.get_errno()
        if number in (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.ENODEV, errno.EPERM):
            return False
        if number != errno.EINTR:
            raise OSError(number, os.strerror(number))
    return True
