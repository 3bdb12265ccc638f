"""A part of a disk as a Disk: a partition, a member of an archive."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from nbdtool.disk import Disk, Extent, Span


class Window(Disk):
    """The bytes [start, start + size) of disk, which can do what the disk can."""

    def __init__(self, disk: Disk, start: int, size: int, description: str = "") -> None:
        self.size = size
        self.description = description or disk.description
        self.writable, self.multi_conn = disk.writable, disk.multi_conn
        self.can_trim, self.can_fast_zero = disk.can_trim, disk.can_fast_zero
        self.reads_on, self.parallel = disk.reads_on, disk.parallel
        minimum, preferred, maximum = disk.block_size
        # A window that starts inside a block has other blocks than the disk.
        self.block_size = (minimum if start % minimum == 0 else 1, preferred, maximum)
        self._disk, self._start = disk, start

    def prefetch(self, ranges: Sequence[tuple[int, int]]) -> None:
        start = self._start
        self._disk.prefetch([(start + offset, length) for offset, length in ranges])

    def read(self, offset: int, length: int) -> list[Span]:
        return self._disk.read(self._start + offset, length)

    def write(self, offset: int, data: memoryview) -> None:
        self._disk.write(self._start + offset, data)

    def zero(self, offset: int, length: int, *, punch: bool, fast: bool) -> None:
        self._disk.zero(self._start + offset, length, punch=punch, fast=fast)

    def trim(self, offset: int, length: int) -> None:
        self._disk.trim(self._start + offset, length)

    def flush(self) -> None:
        self._disk.flush()

    def extents(self, offset: int, length: int) -> Iterator[Extent]:
        return self._disk.extents(self._start + offset, length)

    def verify_access(self) -> None:
        self._disk.verify_access()

    def close(self) -> None:
        self._disk.close()
