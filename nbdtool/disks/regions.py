"""A disk made of regions: memory, ranges of files, and nothing."""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from typing import Protocol, Union

from nbdtool.disk import DATA, HOLE, Disk, Extent, FileSpan, Span, SpanFile, ZeroSpan
from nbdtool.errors import Error

_SMALL = 64 << 10  # bytes: what is read together with other regions rather than left in its file

_new = tuple.__new__  # a third of what FileSpan() costs


class Sliceable(Protocol):
    """Bytes that are there, or are made when they are asked for."""

    def __len__(self) -> int: ...

    def __getitem__(self, wanted: slice, /) -> Union[bytes, memoryview]: ...


class Files(Protocol):
    """Files by number; `ends` says where the content of each one ends."""

    @property
    def ends(self) -> array[int]: ...

    def open(self, number: int, /) -> SpanFile: ...

    def verify_access(self) -> list[str]: ...


class Regions(Disk):
    """A disk of regions that lie side by side, given as three parallel arrays.

    starts: where each region starts, in bytes, ascending, the first at 0. owners: what it holds:
    0 a hole, n > 0 memory[n - 1], n < 0 the file ~n. places: where the region starts in that. What
    is past the owner's end reads as zeroes, but is no hole.
    """

    def __init__(
        self,
        size: int,
        starts: array[int],
        owners: array[int],
        places: array[int],
        memory: Sequence[Sliceable],
        files: Files,
    ) -> None:
        self.size = size
        self._starts = array("Q", starts)
        self._starts.append(size)
        self._owners = owners
        self._places = places
        self._memory = memory
        self._files = files
        self._ends = files.ends
        # where hole and data alternate: data starts at the first edge, a hole at the next
        self._edges = array("Q")
        hole = True
        for start, owner in zip(starts, owners):
            if (owner == 0) is not hole:
                hole = not hole
                self._edges.append(start)

    def read(self, offset: int, length: int) -> list[Span]:
        starts = self._starts
        index = bisect_right(starts, offset) - 1
        left = starts[index + 1] - offset
        if length <= left and self._owners[index] < 0:  # one file, mostly
            owner = ~self._owners[index]
            place = self._places[index] + offset - starts[index]
            if place + length <= self._ends[owner]:
                return [_new(FileSpan, (self._files.open(owner), place, length))]
        spans: list[Span] = []
        while True:
            count = min(left, length)
            self._append(spans, index, offset - starts[index], count)
            length -= count
            if not length:
                return spans
            offset += count
            index += 1
            left = starts[index + 1] - offset

    def _append(self, spans: list[Span], index: int, skip: int, length: int) -> None:
        """Add the spans of `length` bytes of a region, after its first `skip` bytes."""
        owner = self._owners[index]
        place = self._places[index] + skip
        if owner:
            memory = self._memory[owner - 1] if owner > 0 else None
            end = self._ends[~owner] if memory is None else len(memory)
            count = min(length, end - place)
            if count > 0:
                if memory is not None:
                    spans.append(memory[place : place + count])
                elif count > _SMALL:
                    spans.append(_new(FileSpan, (self._files.open(~owner), place, count)))
                else:  # at once: as spans, thousands of files would be open at a time
                    spans.append(self._files.open(~owner).pread(place, count))
                length -= count
        if length:
            last = spans[-1] if spans else b""
            if isinstance(last, ZeroSpan):
                length += last.length
                spans.pop()
            spans.append(ZeroSpan(length))

    def extents(self, offset: int, length: int) -> Iterator[Extent]:
        edges = self._edges
        end = offset + length
        index = bisect_right(edges, offset)
        while offset < end:
            stop = min(edges[index], end) if index < len(edges) else end
            yield Extent(stop - offset, DATA if index & 1 else HOLE)
            offset = stop
            index += 1

    def verify_access(self) -> None:
        failures = self._files.verify_access()
        if failures:
            shown = "; ".join(failures[:10])
            rest = f", and {len(failures) - 10} more" if len(failures) > 10 else ""
            raise Error(
                f"the user of -u can't read {shown}{rest}; give -u or -g another, or --copy"
                " to read everything before"
            )
