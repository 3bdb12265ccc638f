"""From a file's blocks to the filesystem's: extent trees (ext4), indirect blocks (ext2, ext3)."""

from __future__ import annotations

import struct
from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from typing import Union

from nbdtool.ext.geometry import Piece
from nbdtool.ext.structures import (
    DIRECT_BLOCKS,
    EXTENT,
    EXTENT_HEADER,
    EXTENT_INDEX,
    EXTENT_MAGIC,
    EXTENT_MAX_BLOCKS,
)

_INLINE = 4  # entries in i_block


def split_extents(pieces: Sequence[Piece]) -> list[Piece]:
    """The extents of a file: its pieces, joined and none longer than an extent may be."""
    extents: list[Piece] = []
    for first, start, blocks in pieces:
        if extents:
            last = extents[-1]
            if last.first + last.blocks == first and last.start + last.blocks == start:
                extents.pop()
                first, start, blocks = last.first, last.start, last.blocks + blocks
        while blocks > EXTENT_MAX_BLOCKS:
            extents.append(Piece(first, start, EXTENT_MAX_BLOCKS))
            first += EXTENT_MAX_BLOCKS
            start += EXTENT_MAX_BLOCKS
            blocks -= EXTENT_MAX_BLOCKS
        extents.append(Piece(first, start, blocks))
    return extents


def extent_tree_blocks(extents: int, block_size: int) -> int:
    """How many blocks the tree of so many extents takes beside i_block."""
    total = 0
    while extents > _INLINE:
        extents = -(-extents // ((block_size - 12) // 12))
        total += extents
    return total


def extent_tree(
    extents: Sequence[Piece], block_size: int, place: Callable[[bytes], int]
) -> tuple[bytes, int]:
    """i_block of a file, and how many blocks were given to `place`, which says where they are."""
    capacity = (block_size - 12) // 12
    entries = [
        EXTENT.pack(first, blocks, start >> 32, start & 0xFFFFFFFF)
        for first, start, blocks in extents
    ]
    keys = [extent.first for extent in extents]
    depth = used = 0
    while len(entries) > _INLINE:
        parents = []
        for at in range(0, len(entries), capacity):
            part = entries[at : at + capacity]
            header = EXTENT_HEADER.pack(EXTENT_MAGIC, len(part), capacity, depth, 0)
            block = place(header + b"".join(part))
            parents.append(EXTENT_INDEX.pack(keys[at], block & 0xFFFFFFFF, block >> 32, 0))
            used += 1
        keys = keys[::capacity]
        entries = parents
        depth += 1
    header = EXTENT_HEADER.pack(EXTENT_MAGIC, len(entries), _INLINE, depth, 0)
    return header + b"".join(entries), used


_Numbers = Union[range, list[int]]


class _Indirect:
    """The indirect blocks of one file: leaves (of data blocks), seconds (of leaves), a third."""

    __slots__ = ("at", "leaves", "pieces", "seconds", "third")

    def __init__(self, pieces: Sequence[Piece], per_block: int, at: int) -> None:
        self.pieces = pieces
        self.at = at  # the index of its first block among all indirect blocks
        last = pieces[-1].first + pieces[-1].blocks
        if len(pieces) == 1 or _dense(pieces):
            start = max(pieces[0].first - DIRECT_BLOCKS, 0) // per_block
            self.leaves: _Numbers = range(start, -(-(last - DIRECT_BLOCKS) // per_block))
            seconds = [leaf for leaf in (max(start, 1), self.leaves[-1]) if leaf >= 1]
            self.seconds: _Numbers = (
                range((seconds[0] - 1) // per_block, (seconds[-1] - 1) // per_block + 1)
                if len(seconds) == 2
                else range(0)
            )
        else:
            leaves: dict[int, None] = {}
            for piece in pieces:
                end = piece.first + piece.blocks - DIRECT_BLOCKS
                if end > 0:
                    low = max(piece.first - DIRECT_BLOCKS, 0) // per_block
                    leaves.update(dict.fromkeys(range(low, (end - 1) // per_block + 1)))
            self.leaves = list(leaves)
            self.seconds = list(
                dict.fromkeys((leaf - 1) // per_block for leaf in self.leaves if leaf)
            )
        self.third = bool(self.seconds) and self.seconds[-1] > 0

    def count(self) -> int:
        return len(self.leaves) + len(self.seconds) + self.third


def _dense(pieces: Sequence[Piece]) -> bool:
    return all(a.first + a.blocks == b.first for a, b in zip(pieces, pieces[1:]))


def indirect_blocks(pieces: Sequence[Piece], block_size: int) -> int:
    """How many indirect blocks a file takes."""
    if not pieces or pieces[-1].first + pieces[-1].blocks <= DIRECT_BLOCKS:
        return 0
    return _Indirect(pieces, block_size // 4, 0).count()


class IndirectBlocks:
    """All indirect blocks of a filesystem, as bytes that are made when they are read.

    A file's blocks are its leaves, then the blocks that point to leaves, then the one that points
    to those. `locate` gives the filesystem's block for the index of an indirect block.
    """

    def __init__(self, block_size: int, locate: Callable[[int], int]) -> None:
        self._block_size = block_size
        self._per_block = block_size // 4
        self._locate = locate
        self._files: list[_Indirect] = []
        self._starts = array("Q")
        self.count = 0

    def add(self, pieces: Sequence[Piece]) -> tuple[bytes, int]:
        """Map a file; its i_block, and how many indirect blocks it takes."""
        numbers = [0] * 15
        for piece in pieces:
            if piece.first >= DIRECT_BLOCKS:
                break
            end = min(piece.first + piece.blocks, DIRECT_BLOCKS)
            numbers[piece.first : end] = range(piece.start, piece.start + end - piece.first)
        count = 0
        if pieces and pieces[-1].first + pieces[-1].blocks > DIRECT_BLOCKS:
            file = _Indirect(pieces, self._per_block, self.count)
            count = file.count()
            if file.leaves[0] == 0:
                numbers[12] = self._locate(file.at)
            if file.seconds and file.seconds[0] == 0:
                numbers[13] = self._locate(file.at + len(file.leaves))
            if file.third:
                numbers[14] = self._locate(file.at + count - 1)
            self._files.append(file)
            self._starts.append(self.count)
            self.count += count
        return struct.pack("<15I", *numbers), count

    def __len__(self) -> int:
        return self.count * self._block_size

    def __getitem__(self, wanted: slice) -> memoryview:
        """The bytes [start, stop)."""
        size = self._block_size
        start, stop, _ = wanted.indices(len(self))
        first, last = start // size, -(-stop // size)
        data = b"".join(map(self._block, range(first, last)))
        return memoryview(data)[start - first * size : stop - first * size]

    def _block(self, index: int) -> bytes:
        at = bisect_right(self._starts, index) - 1
        file = self._files[at]
        index -= file.at
        per_block = self._per_block
        if index < len(file.leaves):
            first = DIRECT_BLOCKS + file.leaves[index] * per_block
            return self._data_numbers(file, first)
        index -= len(file.leaves)
        if index < len(file.seconds):
            first = 1 + file.seconds[index] * per_block
            return self._block_numbers(file.leaves, first, file.at)
        return self._block_numbers(file.seconds, 1, file.at + len(file.leaves))

    def _data_numbers(self, file: _Indirect, first: int) -> bytes:
        """The numbers of the blocks first...first + per_block of the file."""
        numbers = array("I", bytes(self._block_size))
        end = first + self._per_block
        pieces = file.pieces
        at = max(bisect_right(pieces, (first, 1 << 63)) - 1, 0)
        while at < len(pieces) and pieces[at].first < end:
            piece = pieces[at]
            low, high = max(first, piece.first), min(end, piece.first + piece.blocks)
            if low < high:
                start = piece.start + low - piece.first
                numbers[low - first : high - first] = array("I", range(start, start + high - low))
            at += 1
        return _little(numbers)

    def _block_numbers(self, present: _Numbers, first: int, base: int) -> bytes:
        """Where the blocks first...first + per_block of `present` are, which starts at `base`."""
        numbers = array("I", bytes(self._block_size))
        low = bisect_left(present, first)
        high = bisect_left(present, first + self._per_block)
        for index in range(low, high):
            numbers[present[index] - first] = self._locate(base + index)
        return _little(numbers)


def _little(numbers: array[int]) -> bytes:
    if struct.pack("=I", 1) != struct.pack("<I", 1):
        numbers.byteswap()
    return numbers.tobytes()
