"""Sparse members of a tar archive: their maps, and the Disk of one.

Specification: the GNU tar manual, "Storing Sparse Files".
"""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol

from nbdtool.disk import HOLE, Disk, Extent, Span, ZeroSpan

MAX_SEGMENTS = 1 << 20
_BLOCK = 512


class BadMap(Exception):
    """What is wrong with a map."""


class SparseMap:
    """Where the segments of a sparse file are: `starts` in it, `stored` in what is stored of it.

    segments are (offset, length) pairs, in order; they make up `stored` bytes of a file of `size`
    bytes. Raises BadMap if they don't.
    """

    def __init__(self, segments: Iterable[tuple[int, int]], size: int, stored: int) -> None:
        self.starts, self.lengths, self.stored = array("Q"), array("Q"), array("Q")
        end = place = 0
        for start, length in segments:
            if not end <= start <= start + length <= size:
                raise BadMap("its segments overlap, or lie outside it")
            if place % _BLOCK and length:
                # GNU tar pads it in the archive, others don't.
                raise BadMap("a segment before the last one is not a whole number of blocks")
            end = start + length
            if length:
                self.starts.append(start)
                self.lengths.append(length)
                self.stored.append(place)
            place += length
            if len(self.starts) > MAX_SEGMENTS:
                raise BadMap(f"it has more than {MAX_SEGMENTS} segments")
        if place != stored:
            raise BadMap(f"it has {stored} stored bytes, and segments of {place}")

    def runs(self, offset: int, length: int) -> Iterator[tuple[int, int]]:
        """[offset, offset + length) as (place in what is stored or -1 for a hole, length)."""
        end = offset + length
        n = max(0, bisect_right(self.starts, offset) - 1)
        while offset < end:
            start = self.starts[n] if n < len(self.starts) else end
            if offset < start:
                stop = min(end, start)
                yield -1, stop - offset
            else:
                stop = min(end, start + self.lengths[n])
                if offset < stop:
                    yield self.stored[n] + offset - start, stop - offset
                n += 1
            offset = max(offset, stop)


class SparseMember(Disk):
    """A sparse member with its holes; what is stored begins at `start` of disk."""

    def __init__(self, disk: Disk, start: int, size: int, sparse: SparseMap, name: str) -> None:
        self.size, self.description = size, name
        self._disk, self._start, self._map = disk, start, sparse

    def prefetch(self, ranges: Sequence[tuple[int, int]]) -> None:
        runs = [run for offset, length in ranges for run in self._map.runs(offset, length)]
        self._disk.prefetch([(self._start + place, size) for place, size in runs if place >= 0])

    def read(self, offset: int, length: int) -> list[Span]:
        spans: list[Span] = []
        for place, size in self._map.runs(offset, length):
            spans += self._disk.read(self._start + place, size) if place >= 0 else [ZeroSpan(size)]
        return spans

    def extents(self, offset: int, length: int) -> Iterator[Extent]:
        for place, size in self._map.runs(offset, length):
            if place < 0:
                yield Extent(size, HOLE)
            else:
                yield from self._disk.extents(self._start + place, size)

    def verify_access(self) -> None:
        self._disk.verify_access()

    def close(self) -> None:
        self._disk.close()


class _Source(Protocol):
    def read(self, size: int, /) -> bytes: ...


def pax_segments(
    source: _Source, records: list[tuple[str, bytes]], stored: int
) -> tuple[list[tuple[int, int]], int]:
    """The segments of a GNU.sparse member, and the length of the map before its content."""
    pax = dict(records)
    version = pax.get("GNU.sparse.major"), pax.get("GNU.sparse.minor")
    if version == (b"1", b"0"):
        return _stored_map(source, stored)
    if version not in ((None, None), (b"0", b"0"), (b"0", b"1")):
        raise BadMap("its version is unknown")
    if "GNU.sparse.map" in pax:
        numbers = pax["GNU.sparse.map"].split(b",") if pax["GNU.sparse.map"] else []
    else:
        keys = ("GNU.sparse.offset", "GNU.sparse.numbytes")
        pairs = [(key, value) for key, value in records if key in keys]
        if [key for key, _ in pairs] != [*keys] * (len(pairs) // 2):
            raise BadMap("its map is malformed")
        numbers = [value for _, value in pairs]
    if _number(pax.get("GNU.sparse.numblocks", b"")) * 2 != len(numbers):
        raise BadMap("its map is not as long as it says")
    return _pairs(numbers), 0


def _stored_map(source: _Source, stored: int) -> tuple[list[tuple[int, int]], int]:
    """Version 1.0: the map is text before the content, a number a line, padded to whole blocks."""
    lines: list[bytes] = []
    rest, length, needed = b"", 0, 1
    while len(lines) < needed:
        block = source.read(_BLOCK) if length + _BLOCK <= stored else b""
        if len(block) < _BLOCK:
            raise BadMap("its map is cut off")
        length += _BLOCK
        *more, rest = (rest + block).split(b"\n")
        if len(rest) > _BLOCK:
            raise BadMap("its map is malformed")
        lines += more
        if needed == 1 and lines:
            needed += 2 * _number(lines[0])
            if needed > 2 * MAX_SEGMENTS:
                raise BadMap(f"it has more than {MAX_SEGMENTS} segments")
    return _pairs(lines[1:needed]), length


def _pairs(numbers: list[bytes]) -> list[tuple[int, int]]:
    if len(numbers) % 2:
        raise BadMap("its map is malformed")
    values = map(_number, numbers)
    return list(zip(values, values))


def _number(text: bytes) -> int:
    if not text.isdigit() or len(text) > 19:
        raise BadMap(f"{text[:64]!r} isn't a number")
    return int(text)
