"""What a rescue writes to: a regular file or a block device, in place, and locked."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import threading
from collections.abc import Iterator, Sequence

from nbdtool.disks import locks
from nbdtool.errors import Error
from nbdtool.outputs import BlockDevice, RegularFile, Stream
from nbdtool.rescue.mapfile import lock


class Target:
    """The file or block device at `path`, made if there is none. Its failures are Error.

    known tells that its map file was there; without it a file that has something in it is refused.
    needed is how many bytes of it the map file speaks of. Nothing is changed before prepare().
    """

    def __init__(self, path: str, size: int, *, known: bool, needed: int) -> None:
        self.name, self._size = path, size
        self.written = True  # False while a thread that hangs may still write to it
        self._writing = threading.Lock()  # the kernel has one as well, and spins on it
        with self._naming():
            self.fd, device = self._open(needed)
        try:
            lock(self.fd, path)
            locks.take(self.fd, writing=True)
            if locks.in_use(self.fd, writing=True):
                raise Error(f"{path}: in use by a running guest, or by a server")
            self._output: Stream
            with self._naming():
                self._output = BlockDevice(self.fd, size) if device else RegularFile(self.fd)
            if not device:
                self._refuse_other(os.fstat(self.fd).st_size, known, needed)
        except BaseException:
            os.close(self.fd)
            raise

    def _open(self, needed: int) -> tuple[int, bool]:
        flags = os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY
        try:
            kind = stat.S_IFMT(os.stat(self.name).st_mode)
        except FileNotFoundError:
            if needed:
                raise Error(
                    f"{self.name}: isn't there, but by its map file there is data in it; remove"
                    " that to start anew"
                ) from None
            return os.open(self.name, flags | os.O_CREAT, 0o666), False
        if kind == stat.S_IFBLK:
            return os.open(self.name, flags | os.O_EXCL), True
        if kind != stat.S_IFREG:
            raise Error(f"{self.name}: a rescue needs a regular file or a block device to write to")
        return os.open(self.name, flags), False

    def _refuse_other(self, length: int, known: bool, needed: int) -> None:
        if length and not known:
            raise Error(f"{self.name}: exists without its map file; give that, or another target")
        if not needed <= length <= self._size:
            raise Error(
                f"{self.name}: isn't what its map file speaks of: it has {length} bytes,"
                f" {needed} to {self._size} are expected"
            )

    def prepare(self) -> None:
        """Give it its size."""
        if self.holes:
            with self._naming():
                os.ftruncate(self.fd, self._size)

    @property
    def holes(self) -> bool:
        """Whether what was never written reads as zeroes."""
        return not isinstance(self._output, BlockDevice)

    @contextlib.contextmanager
    def _naming(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            hint = "; make room and run again" if error.errno == errno.ENOSPC else ""
            raise Error(f"{self.name}: {error.strerror or error}{hint}") from error

    def write(self, offset: int, parts: Sequence[bytes | memoryview]) -> None:
        with self._naming(), self._writing:
            self._output.write(offset, parts)

    def zero(self, offset: int, length: int) -> None:
        """Have it read as zeroes, by a hole where there is one already."""
        with self._naming():
            if not self.holes:
                self._output.write_zeroes(offset, length)
                return
            end = offset + length
            while offset < end:
                try:
                    start = min(os.lseek(self.fd, offset, os.SEEK_DATA), end)
                    offset = min(os.lseek(self.fd, start, os.SEEK_HOLE), end)
                except OSError as error:
                    if error.errno != errno.ENXIO:
                        raise
                    return  # no data from there on
                if start < offset:
                    Stream.write_zeroes(self._output, start, offset - start)

    def sync(self) -> None:
        with self._naming():
            os.fdatasync(self.fd)

    def close(self) -> None:
        if self.written:
            os.close(self.fd)
