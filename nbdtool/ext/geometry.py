"""Block groups: how many, what is in each, and which runs of blocks are left for data.

ext2 and ext3 keep bitmaps and inode table inside their group; with flex_bg (ext4) those of 16
groups lie together at the start of the first. Groups 0, 1 and the powers of 3, 5 and 7 begin with
a copy of the superblock and the descriptors (sparse_super).
"""

from __future__ import annotations

from array import array
from bisect import bisect_right
from typing import NamedTuple, Optional

from nbdtool.ext.structures import FIRST, INODE_SIZE

LOG_FLEX_GROUPS = 4
_DESCRIPTOR_SIZE = 32
_SMALLEST_GROUP = 50  # a last group with fewer blocks for data is left out, as mke2fs does


class Piece(NamedTuple):
    """`blocks` blocks of a file: from its block `first`, at block `start` of the filesystem."""

    first: int
    start: int
    blocks: int


class Geometry:
    """How a filesystem of `blocks` blocks is divided; `place` finds where everything is."""

    def __init__(self, block_size: int, blocks: int, inodes: int, *, flex: bool) -> None:
        """inodes: at least so many. ValueError: they can't be had with so few blocks."""
        self.block_size = block_size
        self.flex = flex
        self.first_data_block = 1 if block_size == 1024 else 0
        self.blocks_per_group = 8 * block_size
        self.blocks = blocks
        self.groups = -(-(blocks - self.first_data_block) // self.blocks_per_group)
        self._set_inodes(inodes)
        if not self._last_fits():
            self.groups -= 1
            self.blocks = self.group_start(self.groups)
            self._set_inodes(inodes)
        self.inodes = self.inodes_per_group * self.groups
        if self.groups < 1 or not self._last_fits():
            raise ValueError("no room for the metadata")
        if self.inodes < inodes or self.inodes >= 1 << 32 or self.blocks >= 1 << 32:
            raise ValueError("no room for the inodes")
        most = self.blocks_per_group - 2 - self.table_blocks - _SMALLEST_GROUP
        if 1 + self.descriptor_blocks > most:
            raise ValueError("too many groups for the descriptors")
        self.free = self.blocks - self.first_data_block - self.groups * (2 + self.table_blocks)
        self.free -= count_superblocks(self.groups) * (1 + self.descriptor_blocks)
        self.block_bitmaps = array("Q")
        self.inode_bitmaps = array("Q")
        self.inode_tables = array("Q")
        self.reserved: list[tuple[int, int]] = []  # start, end of metadata, merged, in order

    def _last_fits(self) -> bool:
        """Whether the last group, or flexible group, holds its metadata and some data."""
        if self.groups < 1:
            return False
        size = 1 << LOG_FLEX_GROUPS if self.flex else 1
        first = (self.groups - 1) // size * size
        needed = (self.groups - first) * (2 + self.table_blocks)
        needed += sum(map(self.super_blocks, range(first, self.groups)))
        own = self.super_blocks(self.groups - 1)
        least = _SMALLEST_GROUP if self.groups > 1 else 1
        return self.blocks - self.group_start(self.groups - 1) >= own + least and (
            self.blocks - self.group_start(first) >= needed + least
        )

    def _set_inodes(self, inodes: int) -> None:
        step = max(8, self.block_size // INODE_SIZE)
        wanted = -(-max(inodes, FIRST) // max(self.groups, 1))
        self.inodes_per_group = min(-(-wanted // step) * step, 8 * self.block_size)
        self.table_blocks = self.inodes_per_group * INODE_SIZE // self.block_size
        self.descriptor_blocks = -(-self.groups * _DESCRIPTOR_SIZE // self.block_size)

    def group_start(self, group: int) -> int:
        return self.first_data_block + group * self.blocks_per_group

    def group_end(self, group: int) -> int:
        return min(self.group_start(group + 1), self.blocks)

    def super_blocks(self, group: int) -> int:
        """How many blocks superblock and descriptors take in a group."""
        return 1 + self.descriptor_blocks if has_superblock(group) else 0

    def place(self) -> None:
        """Find where each group's metadata are, and the free runs. ValueError: no room."""
        size = 1 << LOG_FLEX_GROUPS if self.flex else 1
        tables = self.table_blocks
        for first in range(0, self.groups, size):
            count = min(size, self.groups - first)
            supers = [
                (start, start + self.super_blocks(group))
                for group in range(first, first + count)
                if has_superblock(group)
                for start in [self.group_start(group)]
            ]
            at = self.group_start(first) + self.super_blocks(first)
            needed = count * (2 + tables)
            if any(at < stop and start < at + needed for start, stop in supers):
                at = self._place_around(supers, at, count)
            else:
                self.block_bitmaps.extend(range(at, at + count))
                self.inode_bitmaps.extend(range(at + count, at + 2 * count))
                self.inode_tables.extend(range(at + 2 * count, at + needed, tables))
                self._reserve(at, at + needed)
            for start, end in supers:
                self._reserve(start, end)
        merged: list[tuple[int, int]] = []
        for start, end in sorted(self.reserved):
            if merged and merged[-1][1] == start:
                merged[-1] = (merged[-1][0], end)
            else:
                merged.append((start, end))
        self.reserved = merged
        self._find_runs()
        if merged[-1][1] > self.blocks or self._bases[-1] != self.free:
            raise ValueError("no room for the metadata")

    def _place_around(self, supers: list[tuple[int, int]], at: int, count: int) -> int:
        """Place the metadata of `count` groups from block `at`, past the superblocks' copies."""
        for where, length in (
            (self.block_bitmaps, 1),
            (self.inode_bitmaps, 1),
            (self.inode_tables, self.table_blocks),
        ):
            for _ in range(count):
                for start, end in supers:
                    if at < end and at + length > start:
                        at = end
                where.append(at)
                self._reserve(at, at + length)
                at += length
        return at

    def _reserve(self, start: int, end: int) -> None:
        if start < end:
            self.reserved.append((start, end))

    def _find_runs(self) -> None:
        """The free runs in order: where each starts, and how many free blocks are before it."""
        self._starts = array("Q")
        self._bases = array("Q")  # one more than the runs: the last is the sum
        total = 0
        at = self.first_data_block
        for start, end in [*self.reserved, (self.blocks, self.blocks)]:
            if at < start:
                self._starts.append(at)
                self._bases.append(total)
                total += start - at
            at = end
        self._bases.append(total)

    def run(self, index: int) -> tuple[int, int]:
        """The run that holds the index-th free block: the block, and how many are left in it.

        The index just past the last free block gives the end of the filesystem and 0.
        """
        if index >= self._bases[-1]:
            return self.blocks, 0
        run = bisect_right(self._bases, index) - 1
        return self._starts[run] + index - self._bases[run], self._bases[run + 1] - index

    def pieces(self, index: int, blocks: int, first: int = 0) -> list[Piece]:
        """`blocks` free blocks from the index-th on, as blocks `first`... of a file."""
        found = []
        while blocks:
            start, left = self.run(index)
            count = min(left, blocks)
            if not count:
                raise ValueError("no room for the data")
            found.append(Piece(first, start, count))
            first, index, blocks = first + count, index + count, blocks - count
        return found


def has_superblock(group: int) -> bool:
    """Whether a group has a copy of the superblock (sparse_super)."""
    if group <= 1:
        return True
    for base in (3, 5, 7):
        power = base
        while power < group:
            power *= base
        if power == group:
            return True
    return False


def count_superblocks(groups: int) -> int:
    """How many of the groups have a copy of the superblock."""
    count = min(groups, 2)
    for base in (3, 5, 7):
        power = base
        while power < groups:
            count += 1
            power *= base
    return count


def fit(block_size: int, blocks: int, inodes: int, data: int, *, flex: bool) -> Optional[Geometry]:
    """The geometry that has so many inodes and room for `data` blocks, or None."""
    try:
        geometry = Geometry(block_size, blocks, inodes, flex=flex)
    except ValueError:
        return None
    return geometry if geometry.free >= data else None


def smallest(block_size: int, inodes: int, data: int, *, flex: bool) -> Geometry:
    """The smallest geometry that fits. ValueError: not even the largest does."""
    tables = inodes * INODE_SIZE // block_size
    low = data + tables  # too few
    high = low + 64
    limit = (1 << 32) - 1
    while fit(block_size, high, inodes, data, flex=flex) is None:
        if high >= limit:
            raise ValueError("no filesystem is large enough")
        low, high = high, min(high + max(64, (high - data) // 2, high >> 7), limit)
    while high - low > 1:
        middle = (low + high) // 2
        if fit(block_size, middle, inodes, data, flex=flex) is None:
            low = middle
        else:
            high = middle
    geometry = fit(block_size, high, inodes, data, flex=flex)
    assert geometry is not None
    return geometry
