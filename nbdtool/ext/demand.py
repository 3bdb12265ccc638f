"""What a tree needs of a filesystem: blocks for contents and for their mapping."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from nbdtool.errors import Error
from nbdtool.ext import structures as s
from nbdtool.ext.geometry import Piece
from nbdtool.ext.mapping import extent_tree_blocks, indirect_blocks
from nbdtool.ext.sizing import Options
from nbdtool.ext.tree import Tree

_SPLIT = 8192  # blocks: files are split by groups' metadata less often than this, on the whole


class Demand:
    """What the regular files and long symlinks of a tree need, and where files have data."""

    def __init__(
        self, tree: Tree, options: Options, regular: Iterable[int], targets: dict[int, bytes]
    ) -> None:
        """Error: what is in the tree can't be held by this filesystem; it is named."""
        self._tree = tree
        self._options = options
        self._regular = regular
        self._shift = options.block_size.bit_length() - 1
        self._check_targets(targets)
        self.segments = self._block_segments()  # by inode: (first block, blocks) with data
        self.file_blocks = self._count_files()

    def _check_targets(self, targets: dict[int, bytes]) -> None:
        for ino, target in targets.items():
            if len(target) >= self._options.block_size:
                raise Error(
                    f"{self._shown(ino)}: the symlink is too long for a filesystem with blocks of"
                    f" {self._options.block_size} bytes: use a larger --block-size"
                )

    def _block_segments(self) -> dict[int, list[tuple[int, int]]]:
        """The blocks with data of sparse files, as (first, blocks)."""
        shift = self._shift
        found = {}
        for ino, segments in self._tree.segments.items():
            joined: list[tuple[int, int]] = []
            for offset, length, _ in segments:
                first = offset >> shift
                end = -(-(offset + length) >> shift)
                if joined and joined[-1][0] + joined[-1][1] >= first:
                    first = joined.pop()[0]
                joined.append((first, end - first))
            found[ino] = joined
        return found

    def _count_files(self) -> int:
        """The blocks of all regular files; Error if one is too large for the format."""
        sizes, segments = self._tree.sizes, self.segments
        shift, mask = self._shift, self._options.block_size - 1
        self._large: list[tuple[int, int]] = []  # inode, blocks: what needs more than i_block
        simple = s.EXTENT_MAX_BLOCKS if self._options.extents else s.DIRECT_BLOCKS
        total = 0
        for ino in self._regular:
            blocks = sizes[ino] + mask >> shift
            if blocks > simple:
                self._large.append((ino, blocks))
                self._check_size(ino, blocks)
            if ino in segments:
                blocks = sum(count for _, count in segments[ino])
            total += blocks
        return total

    def _check_size(self, ino: int, blocks: int) -> None:
        size = self._options.block_size
        if self._options.extents:
            if blocks >= 1 << 32:
                raise Error(f"{self._shown(ino)}: too large for ext4 with blocks of {size} bytes")
            return
        per_block = size // 4
        longest = s.DIRECT_BLOCKS + per_block + per_block**2 + per_block**3
        allocated = blocks
        if ino in self.segments:
            allocated = sum(count for _, count in self.segments[ino])
        allocated += allocated // per_block + 4
        if blocks > longest or allocated << self._shift >= 1 << 41:
            raise Error(
                f"{self._shown(ino)}: too large for {self._options.type} with blocks of {size}"
                " bytes: use type=ext4"
            )

    def mapping_blocks(self, directories: Sequence[int]) -> int:
        """The blocks of extent trees (at most) or of indirect blocks."""
        size = self._options.block_size
        segments = self.segments
        if self._options.extents:
            # a file is split by what is longer than an extent and where groups' metadata lie
            total = 8
            for ino, blocks in self._large:
                if ino not in segments:
                    total += extent_tree_blocks(blocks // _SPLIT + 4, size)
            for pieces in segments.values():
                if len(pieces) > 1 or (pieces and pieces[0][1] > s.EXTENT_MAX_BLOCKS):
                    count = sum(blocks // _SPLIT for _, blocks in pieces)
                    total += extent_tree_blocks(len(pieces) + count + 4, size)
            return total
        total = 0
        for ino, blocks in self._large:
            pieces = segments.get(ino, [(0, blocks)])
            total += indirect_blocks([Piece(first, 0, n) for first, n in pieces], size)
        for blocks in directories:
            if blocks > s.DIRECT_BLOCKS:
                total += indirect_blocks([Piece(0, 0, blocks)], size)
        return total

    def _shown(self, ino: int) -> str:
        return self._tree.path(ino).decode(errors="backslashreplace")
