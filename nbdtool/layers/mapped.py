"""A disk put together from pieces of other disks: a logical volume, a file in a filesystem."""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple, Optional

from nbdtool.disk import HOLE, Disk, Extent, Span, ZeroSpan


class Piece(NamedTuple):
    """`length` bytes that start at `offset` of a disk; they are zeroes if that is None."""

    length: int
    disk: Optional[Disk]
    offset: int = 0


class Mapped(Disk):
    """Pieces of `disks` one behind the other, read-only; closing it closes all of them."""

    def __init__(
        self, pieces: Iterable[Piece], disks: Sequence[Disk], description: str = ""
    ) -> None:
        self.description = description
        self._starts = array("Q", [0])  # of each piece, and the size
        self._pieces: list[Piece] = []
        for piece in pieces:
            if not piece.length:
                continue
            last = self._pieces[-1] if self._pieces else Piece(0, None)
            if piece.disk is last.disk and piece.offset == last.offset + last.length and last.disk:
                piece = Piece(last.length + piece.length, last.disk, last.offset)
                self._pieces.pop()
                self._starts.pop()
            self._pieces.append(piece)
            self._starts.append(self._starts[-1] + piece.length)
        self.size = self._starts[-1]
        self._disks = disks

    def _parts(self, offset: int, length: int) -> Iterator[Piece]:
        """The pieces of a range, cut to it."""
        starts, pieces = self._starts, self._pieces
        index = bisect_right(starts, offset) - 1
        while length:
            piece = pieces[index]
            skip = offset - starts[index]
            count = min(length, piece.length - skip)
            yield Piece(count, piece.disk, piece.offset + skip)
            offset += count
            length -= count
            index += 1

    def prefetch(self, ranges: Sequence[tuple[int, int]]) -> None:
        wanted: dict[int, list[tuple[int, int]]] = {}
        for offset, length in ranges:
            for part in self._parts(offset, length):
                wanted.setdefault(id(part.disk), []).append((part.offset, part.length))
        for disk in self._disks:
            if id(disk) in wanted:
                disk.prefetch(wanted[id(disk)])

    def read(self, offset: int, length: int) -> list[Span]:
        starts = self._starts
        index = bisect_right(starts, offset) - 1
        if offset + length <= starts[index + 1]:  # one piece, mostly
            _, disk, start = self._pieces[index]
            if disk is None:
                return [ZeroSpan(length)]
            return disk.read(start + offset - starts[index], length)
        spans: list[Span] = []
        for count, disk, start in self._parts(offset, length):
            spans += [ZeroSpan(count)] if disk is None else disk.read(start, count)
        return spans

    def extents(self, offset: int, length: int) -> Iterator[Extent]:
        for count, disk, start in self._parts(offset, length):
            if disk is None:
                yield Extent(count, HOLE)
            else:
                yield from disk.extents(start, count)

    def verify_access(self) -> None:
        for disk in self._disks:
            disk.verify_access()

    def close(self) -> None:
        for disk in self._disks:
            disk.close()
