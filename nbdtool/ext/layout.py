"""The layout of a tree as an ext2, ext3 or ext4 filesystem.

Order: superblock and descriptors, bitmaps and inode tables (in each group, or with flex_bg at the
start of each 16) | directories, long symlinks, extended attributes | journal | contents of files |
extent or indirect blocks | free. What lies between the bars is given out in this order from the
runs of blocks that the groups leave free.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterable
from typing import Any

from nbdtool.ext import structures as s
from nbdtool.ext import xattr
from nbdtool.ext.demand import Demand
from nbdtool.ext.directory import build
from nbdtool.ext.geometry import Piece
from nbdtool.ext.groups import Groups, Usage, derive, superblock, superblock_groups
from nbdtool.ext.journal import journal_superblock
from nbdtool.ext.mapping import (
    IndirectBlocks,
    extent_tree,
    split_extents,
)
from nbdtool.ext.sizing import Options, choose
from nbdtool.ext.table import PADDING, Table
from nbdtool.ext.tree import Tree

# i_blocks, i_flags and i_block of a file that is one extent
_ONE_EXTENT = struct.Struct("<II4xHHHHIIHHI").pack_into
# i_blocks, i_flags (none) and i_block of a file of so many blocks in one run
_DIRECT = [struct.Struct(f"<I8x{n}I").pack_into for n in range(s.DIRECT_BLOCKS + 1)]
_WORD = struct.Struct("<I")


class Layout:
    """A filesystem as regions: starts, owners and places are those of `Regions` in disks/regions.

    starts are in bytes from the start of the filesystem and every gap is a region of its own;
    owners above 0 are indices (plus 1) of `memory`, those below 0 are ~inode.
    """

    def __init__(self, tree: Tree, options: Options) -> None:
        """Error: the tree can't be held, for a reason that the text gives."""
        self._tree = tree
        self._options = options
        self._shift = options.block_size.bit_length() - 1
        self.memory: list[Any] = [b""]
        self._table = Table()
        self._mapped: list[tuple[int, list[Piece]]] = []  # what isn't mapped at once
        self._index = 0  # how many of the free blocks are given out

        blob, directories, _ = build(tree, options.block_size)
        reachable = tree.reachable()
        self._regular: Iterable[int] = tree.regular
        targets = tree.targets
        dead: set[int] = set()
        if reachable is not None:
            self._regular = [ino for ino in tree.regular if ino in reachable]
            targets = {ino: target for ino, target in targets.items() if ino in reachable}
            dead = set(range(s.FIRST, len(tree.names))) - reachable
            for ino in dead:
                tree.inodes[ino << 8 : ino + 1 << 8] = bytes(s.INODE_SIZE)
        demand = Demand(tree, options, self._regular, targets)
        self._segments = demand.segments
        attributed = tree.xattrs.keys() if reachable is None else tree.xattrs.keys() & reachable
        xattrs = xattr.store(
            tree, options.block_size, sorted(attributed), in_inode=options.type != "ext2"
        )
        data = sum(directory.blocks for directory in directories) + len(targets) + len(xattrs)
        data += demand.file_blocks
        mapping = demand.mapping_blocks([directory.blocks for directory in directories])
        last = len(tree.names) - 1
        self.geometry, journal = choose(options, last, data + mapping)
        self.uuid = options.uuid or self._derive_uuid(blob)

        owner = self._remember(blob)
        for ino, blocks, start, end in directories:
            self._map(ino, self._put(owner, start, end, blocks))
        if targets:
            joined = b"".join(targets.values())
            owner = self._remember(joined)
            at = 0
            for ino, target in targets.items():
                self._map(ino, self._put(owner, at, at + len(target), 1))
                at += len(target)
        places = self._place_xattrs(xattrs)
        if journal:
            self._place_journal(journal)
        self._place_files()
        self._place_mapping()
        self._point_to_xattrs(xattrs, places)
        self._place_groups(Usage(0, last, dead, [directory.ino for directory in directories]))
        self.size = self.geometry.blocks << self._shift
        self.starts, self.owners, self.places = self._table.sorted(self.size)

    # ---- giving out blocks

    def _derive_uuid(self, blob: bytearray) -> bytes:
        digest = hashlib.sha256(self._tree.inodes)
        digest.update(blob)
        digest.update(repr(self._options).encode())
        return derive(digest.digest(), "filesystem")

    def _remember(self, data: Any) -> int:
        """The owner number of a piece of memory."""
        self.memory.append(data)
        return len(self.memory)

    def _add(self, block: int, blocks: int, owner: int, place: int = 0) -> None:
        self._table.add(block << self._shift, blocks << self._shift, owner, place)

    def _take(self, blocks: int, first: int = 0) -> list[Piece]:
        pieces = self.geometry.pieces(self._index, blocks, first)
        self._index += blocks
        return pieces

    def _put(self, owner: int, start: int, end: int, blocks: int) -> list[Piece]:
        """Give blocks to the bytes [start, end) of memory; what is past the end is zero."""
        pieces = self._take(blocks)
        for _, block, count in pieces:
            length = min(end - start, count << self._shift)
            at = block << self._shift
            self._table.add(at, length, owner, start)
            start += length
            if length < count << self._shift:
                self._table.add(at + length, (count << self._shift) - length, PADDING, 0)
        return pieces

    def _map(self, ino: int, pieces: list[Piece]) -> None:
        """Map an inode's blocks, at once if i_block holds the mapping."""
        at = (ino << 8) + s.I_BLOCKS_LO
        if len(pieces) == 1 and pieces[0].first == 0:
            _, start, blocks = pieces[0]
            sectors = blocks << self._shift - 9
            if self._options.extents:
                if blocks <= s.EXTENT_MAX_BLOCKS:
                    _ONE_EXTENT(
                        self._tree.inodes,
                        at,
                        sectors,
                        s.EXTENTS_FL,
                        *(s.EXTENT_MAGIC, 1, 4, 0, 0, 0, blocks, 0, start),
                    )
                    return
            elif blocks <= s.DIRECT_BLOCKS:
                _DIRECT[blocks](self._tree.inodes, at, sectors, *range(start, start + blocks))
                return
        self._mapped.append((ino, pieces))

    def _place_xattrs(self, xattrs: list[xattr.Block]) -> list[int]:
        """The blocks of extended attributes; the middle of each is zero."""
        size = self._options.block_size
        owner = self._remember(b"".join(xattr.block_head(one) + one.tail for one in xattrs))
        at = 0
        places = []
        for one in xattrs:
            block = self._take(1)[0].start
            places.append(block)
            start, gap = block << self._shift, size - len(one.head) - len(one.tail)
            for length, what, place in (
                (len(one.head), owner, at),
                (gap, PADDING, 0),
                (len(one.tail), owner, at + len(one.head)),
            ):
                if length:
                    self._table.add(start, length, what, place)
                    start += length
            at += len(one.head) + len(one.tail)
        return places

    def _point_to_xattrs(self, xattrs: list[xattr.Block], places: list[int]) -> None:
        inodes = self._tree.inodes
        for one, block in zip(xattrs, places):
            for ino in one.inodes:
                at = ino << 8
                _WORD.pack_into(inodes, at + s.I_FILE_ACL_LO, block)
                low, high = at + s.I_BLOCKS_LO, at + s.I_BLOCKS_HIGH
                sectors = _WORD.unpack_from(inodes, low)[0] + (1 << self._shift - 9)
                _WORD.pack_into(inodes, low, sectors & 0xFFFFFFFF)
                inodes[high] += sectors >> 32

    def _place_journal(self, blocks: int) -> None:
        head = journal_superblock(blocks, self._options.block_size, bytes(16))
        owner = self._remember(head)
        pieces = self._take(blocks)
        self._add(pieces[0].start, 1, owner)  # the rest is zero: a hole
        time = self._options.time * 1_000_000_000
        self._tree.put(s.JOURNAL, 0o100600, 0, 0, blocks << self._shift, time, time, time)
        self._map(s.JOURNAL, pieces)

    def _place_files(self) -> None:
        """Give blocks to the contents of regular files: the hot loop of the layout."""
        tree = self._tree
        inodes, sizes, places = tree.inodes, tree.sizes, tree.places
        segments = self._segments
        geometry = self.geometry
        shift, mask = self._shift, self._options.block_size - 1
        extents = self._options.extents
        simple = s.EXTENT_MAX_BLOCKS if extents else s.DIRECT_BLOCKS
        table = self._table
        add_start, add_length = table.starts.append, table.lengths.append
        add_owner, add_place = table.owners.append, table.places.append
        block, left = geometry.run(self._index)
        for ino in self._regular:
            place = places[ino]
            blocks = sizes[ino] + mask >> shift
            if blocks <= left and blocks <= simple and ino not in segments:
                add_start(block << shift)
                add_length(blocks << shift)
                add_owner(~ino)
                add_place(place)
                at = (ino << 8) + s.I_BLOCKS_LO
                if extents:
                    _ONE_EXTENT(
                        inodes,
                        at,
                        blocks << shift - 9,
                        s.EXTENTS_FL,
                        s.EXTENT_MAGIC,
                        1,
                        4,
                        0,
                        0,
                        0,
                        blocks,
                        0,
                        block,
                    )
                else:
                    _DIRECT[blocks](inodes, at, blocks << shift - 9, *range(block, block + blocks))
                block += blocks
                left -= blocks
                self._index += blocks
                continue
            pieces = []
            for first, count in segments.get(ino, ((0, blocks),)):
                pieces += self._take(count, first)
            if ino in segments:
                self._add_sparse(ino, pieces)
            else:
                for piece in pieces:
                    self._add(piece.start, piece.blocks, ~ino, place + (piece.first << shift))
            if pieces:
                self._map(ino, pieces)
            block, left = geometry.run(self._index)

    def _add_sparse(self, ino: int, pieces: list[Piece]) -> None:
        """The regions of a sparse file: its segments, and zeroes in the rest of their blocks."""
        shift = self._shift
        segments = iter(self._tree.segments[ino])
        offset = end = place = 0
        for first, start, blocks in pieces:
            at, stop = first << shift, first + blocks << shift
            shifted = (start << shift) - at  # from the file's offsets to the filesystem's
            while at < stop:
                while end <= at:
                    offset, length, place = next(segments, (1 << 63, 1, 0))
                    end = offset + length
                data = max(min(offset, stop), at)
                if at < data:
                    self._table.add(at + shifted, data - at, PADDING, 0)
                at = min(end, stop)
                if data < at:
                    self._table.add(data + shifted, at - data, ~ino, place + data - offset)

    def _place_mapping(self) -> None:
        """Map what i_block alone can't, in blocks after all data."""
        if self._options.extents:
            blob = bytearray()
            owner = self._remember(blob)

            def place(block: bytes) -> int:
                piece = self._put(owner, len(blob), len(blob) + len(block), 1)[0]
                blob.extend(block)
                return piece.start

            for ino, pieces in self._mapped:
                root, used = extent_tree(split_extents(pieces), self._options.block_size, place)
                self._set_mapping(ino, root, used, pieces)
            return
        base, run = self._index, self.geometry.run
        indirect = IndirectBlocks(self._options.block_size, lambda index: run(base + index)[0])
        for ino, pieces in self._mapped:
            root, used = indirect.add(pieces)
            self._set_mapping(ino, root, used, pieces)
        if indirect.count:
            self._put(self._remember(indirect), 0, len(indirect), indirect.count)

    def _set_mapping(self, ino: int, root: bytes, used: int, pieces: list[Piece]) -> None:
        inodes = self._tree.inodes
        at = ino << 8
        sectors = used + sum(piece.blocks for piece in pieces) << self._shift - 9
        inodes[at + s.I_BLOCKS_LO : at + s.I_BLOCKS_LO + 4] = _WORD.pack(sectors & 0xFFFFFFFF)
        inodes[at + s.I_BLOCKS_HIGH : at + s.I_BLOCKS_HIGH + 2] = _WORD.pack(sectors >> 32)[:2]
        inodes[at + s.I_BLOCK : at + s.I_BLOCK + len(root)] = root

    # ---- the groups

    def _place_groups(self, usage: Usage) -> None:
        geometry = self.geometry
        shift = self._shift
        groups = Groups(geometry, usage._replace(block=geometry.run(self._index)[0]))
        bitmaps = self._remember(groups.bitmaps)
        table = self._remember(memoryview(self._tree.inodes)[s.INODE_SIZE :])
        per_group = geometry.inodes_per_group
        for group in range(geometry.groups):
            self._add(geometry.block_bitmaps[group], 1, bitmaps, groups.block_bitmaps[group])
            self._add(geometry.inode_bitmaps[group], 1, bitmaps, groups.inode_bitmaps[group])
            count = min(usage.inodes - group * per_group, per_group)
            if count > 0:
                blocks = -(-(count << s.INODE_SHIFT) >> shift)
                place = group * per_group << s.INODE_SHIFT
                self._add(geometry.inode_tables[group], blocks, table, place)
        descriptors = self._remember(groups.descriptors)
        journal = None
        if self._options.has_journal:
            inode = s.INODE.unpack(self._tree.inodes, s.JOURNAL << s.INODE_SHIFT)
            journal = inode.i_block + struct.pack("<II", inode.i_size_high, inode.i_size_lo)
        for group in superblock_groups(geometry):
            data = superblock(geometry, groups, self._options, self.uuid, journal, group)
            if group == 0 and geometry.first_data_block == 0:
                data = bytes(s.SUPERBLOCK_OFFSET) + data
            start = geometry.group_start(group)
            self._add(start, 1, self._remember(data))
            self._add(start + 1, geometry.descriptor_blocks, descriptors)
