"""Which blocks an inode maps: extent trees (ext4) and indirect blocks (ext2, ext3).

Source: the Linux kernel, Documentation/filesystems/ext4/ (ifork, checksums).
"""

from __future__ import annotations

import struct
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from typing import NamedTuple, Optional

from nbdtool.errors import Uncertain
from nbdtool.ext import structures as s
from nbdtool.ext.checksum import crc32c
from nbdtool.ext.volume import Inode, Volume

_MAX_RUNS = 1 << 19
_MAX_DEPTH = 5
_MAX_BLOCKS = (1 << 32) - 1  # that an extent tree can number


class Run(NamedTuple):
    """`blocks` blocks of a file from its block `first`, at block `start` of the filesystem."""

    first: int
    blocks: int
    start: Optional[int]  # None: allocated, but unwritten


def read_runs(volume: Volume, inode: Inode, reserved: Sequence[tuple[int, int]] = ()) -> list[Run]:
    """The checked runs of an inode, in order; what lies between them are holes.

    No run may overlap metadata, nor the `reserved` blocks: sorted (first, last + 1). Raises
    Uncertain.
    """
    return _Reader(volume, inode, reserved).runs


class _Reader:
    def __init__(self, volume: Volume, inode: Inode, reserved: Sequence[tuple[int, int]]) -> None:
        self._volume, self._inode, self._reserved = volume, inode, reserved
        self._nodes = 0  # blocks that describe others
        self._gap = (0, 0)  # blocks that hold no metadata: (first, last + 1)
        self.runs: list[Run] = []
        extents = bool(inode.flags & s.EXTENTS_FL)
        if extents and not volume.incompat & s.EXTENTS:
            raise self._damage("has extents, and the filesystem doesn't")
        limit = _MAX_BLOCKS if extents else self._classic_blocks()
        if inode.size > limit * volume.block_size:
            raise self._damage(f"has {inode.size} bytes, more than it can map")
        for run in self._extents(inode.block, None, 0, limit) if extents else self._classic():
            self._add(run)
        used = self._nodes + sum(run.blocks for run in self.runs)
        if used * volume.block_size > inode.allocated:
            raise self._damage("maps more blocks than it has")

    def _damage(self, what: str) -> Uncertain:
        return self._volume.damage(f"inode {self._inode.number} {what}")

    def _add(self, run: Run) -> None:
        runs = self.runs
        if runs:
            first, count, start = runs[-1]
            if first + count == run.first and (
                start + count == run.start if start is not None else run.start is None
            ):
                runs[-1] = Run(first, count + run.blocks, start)
                return
        if len(runs) >= _MAX_RUNS:
            raise self._volume.doubt(f"inode {self._inode.number} is in more than {_MAX_RUNS} runs")
        runs.append(run)

    def _checked(self, run: Run) -> Run:
        """The run, if it is inside the filesystem and holds no metadata of the filesystem."""
        start = run.start or 0
        end = start + run.blocks
        if self._gap[0] <= start and end <= self._gap[1]:  # mostly
            return run
        if not self._volume.first < start < end <= self._volume.blocks:
            raise self._damage(f"maps {run.blocks} blocks at {start}, of {self._volume.blocks}")
        while start < end:
            self._gap = self._find_gap(start)
            start = self._gap[1]
        return run

    def _find_gap(self, block: int) -> tuple[int, int]:
        """A block that holds no metadata, and those around it that don't either."""
        low, high, metadata = self._volume.zone(block)
        for ranges in metadata, self._reserved:
            at = bisect_right(ranges, (block, self._volume.blocks))
            if at:
                if ranges[at - 1][1] > block:
                    raise self._damage(f"maps block {block}, which holds metadata")
                low = max(low, ranges[at - 1][1])
            if at < len(ranges):
                high = min(high, ranges[at][0])
        return low, high

    # Extents

    def _extents(self, node: bytes, depth: Optional[int], first: int, limit: int) -> Iterator[Run]:
        """The runs below a node that maps the file's blocks [first, limit); depth: None is any."""
        header, size = s.EXTENT_HEADER.size, s.EXTENT.size
        magic, entries, most, deep, _ = s.EXTENT_HEADER.unpack_from(node)
        if (
            magic != s.EXTENT_MAGIC
            or not 0 < most <= (len(node) - header) // size
            or entries > most
            or not (deep <= _MAX_DEPTH if depth is None else deep == depth)
            or (not entries and (deep or depth is not None))
        ):
            raise self._damage("has a wrong header in its extent tree")
        if depth is not None:
            self._verify(node, header + most * size)
        table = memoryview(node)[header : header + entries * size]
        if not deep:
            yield from self._leaf(table, depth is not None, first, limit)
            return
        rows = list(s.EXTENT_INDEX.iter_unpack(table))
        starts = [row[0] for row in rows]
        if depth is not None and starts[0] != first:
            raise self._damage("has a wrong index in its extent tree")
        for (start, low, high, _), end in zip(rows, [*starts[1:], limit]):
            if not first <= start < end <= limit:
                raise self._damage("has indexes out of order in its extent tree")
            self._nodes += 1
            block = self._checked(Run(start, 1, low | high << 32)).start or 0
            yield from self._extents(self._volume.read(block), deep - 1, start, end)

    def _leaf(self, table: memoryview, exact: bool, first: int, limit: int) -> Iterator[Run]:
        """exact: the first extent must begin at block `first`."""
        for start, length, high, low in s.EXTENT.iter_unpack(table):
            unwritten = length > s.EXTENT_MAX_BLOCKS
            count = length - s.EXTENT_MAX_BLOCKS if unwritten else length
            if start < first or (exact and start != first) or not 0 < count <= limit - start:
                raise self._damage("has extents that overlap or are out of order")
            run = self._checked(Run(start, count, low | high << 32))
            yield run._replace(start=None) if unwritten else run
            first, exact = start + count, False

    def _verify(self, node: bytes, end: int) -> None:
        if not self._volume.has_checksums:
            return
        stored = node[end : end + 4]
        if struct.pack("<I", crc32c(memoryview(node)[:end], self._inode.seed)) != stored:
            raise self._damage("has a wrong checksum in its extent tree")

    # Direct and indirect blocks

    def _classic_blocks(self) -> int:
        """How many blocks can be mapped without extents."""
        pointers = self._volume.block_size // 4
        return s.DIRECT_BLOCKS + pointers + pointers * pointers * (pointers + 1)

    def _classic(self) -> Iterator[Run]:
        pointers = struct.unpack("<15I", self._inode.block)
        first, span = s.DIRECT_BLOCKS, 1
        yield from self._pointers(pointers[:first], 0)
        for block in pointers[first:]:
            yield from self._indirect(block, span, first)
            span *= self._volume.block_size // 4
            first += span

    def _indirect(self, block: int, span: int, first: int) -> Iterator[Run]:
        """The runs below an indirect block, for the file's blocks from `first`; 0 is a hole.

        span: how many blocks each of its pointers stands for.
        """
        if not block:
            return
        self._nodes += 1
        self._checked(Run(first, 1, block))
        width = self._volume.block_size // 4
        pointers = struct.unpack(f"<{width}I", self._volume.read(block))
        if span == 1:
            yield from self._pointers(pointers, first)
            return
        for number, below in enumerate(pointers):
            yield from self._indirect(below, span // width, first + number * span)

    def _pointers(self, pointers: tuple[int, ...], first: int) -> Iterator[Run]:
        """The runs of blocks that data pointers name; 0 is a hole."""
        at, end = 0, len(pointers)
        while at < end:
            start, begin = pointers[at], at
            at += 1
            if not start:
                continue
            last = start + end - 1 - begin
            if pointers[-1] == last and pointers[begin:] == tuple(range(start, last + 1)):
                at = end  # at once
            while at < end and pointers[at] == start + at - begin:
                at += 1
            yield self._checked(Run(first + begin, at - begin, start))
