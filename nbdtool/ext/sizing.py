"""How large a filesystem to make: as large as the tree needs, as asked, or refused."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Optional

from nbdtool.errors import Error
from nbdtool.ext.geometry import Geometry, Piece, fit, smallest
from nbdtool.ext.journal import journal_blocks
from nbdtool.ext.mapping import indirect_blocks
from nbdtool.ext.structures import JOURNAL_MIN_BLOCKS

_MIB = 1 << 20
_BYTES_PER_INODE = 16384  # in free space, as mke2fs does
_RESERVED_BY_KERNEL = 4096  # blocks at most, and 2 %, that ext4 keeps from every user


@dataclass(frozen=True)
class Options:
    """What filesystem to make."""

    type: str = "ext2"
    block_size: int = 4096
    size: Optional[int] = None  # bytes, exactly
    free: Optional[int] = None  # bytes, at least so many free to every user
    inodes: Optional[int] = None
    reserved: float = 0.0  # percent of the blocks, kept for root
    journal: bool = True  # for ext3 and ext4
    label: bytes = b""  # at most 16 bytes
    uuid: Optional[bytes] = None  # 16 bytes; derived from the tree without
    time: int = 0  # seconds: when the filesystem was made

    @property
    def extents(self) -> bool:
        return self.type == "ext4"

    @property
    def has_journal(self) -> bool:
        return self.type != "ext2" and self.journal


def choose(options: Options, inodes: int, data: int) -> tuple[Geometry, int]:
    """The geometry, placed, for so many inodes and blocks of data, and the journal's blocks."""
    if options.inodes is not None and options.inodes < inodes:
        raise Error(f"--inodes={options.inodes}: the tree needs {inodes}")
    try:
        if options.size is not None:
            geometry, journal = _exact(options, inodes, data)
        else:
            geometry, journal = _roomy(options, inodes, data)
        geometry.place()
    except ValueError as error:
        asked = options.free is not None or options.inodes is not None
        advice = "ask for less" if asked else "leave things out"
        if options.block_size < 4096:
            advice += " or use a larger --block-size"
        raise Error(f"no {options.type} can hold the tree ({error}): {advice}") from None
    return geometry, journal


def _exact(options: Options, inodes: int, data: int) -> tuple[Geometry, int]:
    assert options.size is not None
    blocks = options.size // options.block_size
    if blocks >= 1 << 32:
        raise Error(f"size={options.size}: {options.type} holds less than 2^32 blocks")
    usual = journal_blocks(blocks) if options.has_journal else 0
    wanted = options.inodes or max(_with_room(inodes), options.size // _BYTES_PER_INODE)
    for journal in (usual, min(usual, JOURNAL_MIN_BLOCKS)):
        for count in (wanted, min(wanted, _with_room(inodes)), options.inodes or inodes):
            geometry = fit(
                options.block_size,
                blocks,
                count,
                data + _cost(options, journal),
                flex=options.extents,
            )
            if geometry is not None:
                return geometry, journal
    least = smallest(
        options.block_size,
        options.inodes or inodes,
        data + (_cost(options, JOURNAL_MIN_BLOCKS) if options.has_journal else 0),
        flex=options.extents,
    )
    if least.blocks <= blocks:
        raise Error(
            f"size={options.size} is too large for blocks of {options.block_size} bytes: use a"
            " larger --block-size"
        )
    raise Error(
        f"size={options.size} is too small for the tree: it needs at least"
        f" size={least.blocks * options.block_size}"
    )


def _roomy(options: Options, inodes: int, data: int) -> tuple[Geometry, int]:
    size = options.block_size
    wanted = _with_room(inodes)
    room = max(64, data >> 6)
    if options.free is not None:
        free = -(-options.free // size)
        wanted += options.free // _BYTES_PER_INODE
        # what maps the new files, and their directories
        room = free + (free >> 8) + 64
    wanted = options.inodes or wanted
    journal = JOURNAL_MIN_BLOCKS if options.has_journal else 0
    kept = 0
    while True:
        needed = data + _cost(options, journal) + room + kept
        least = smallest(size, wanted, needed, flex=options.extents)
        blocks = least.blocks
        usual = journal_blocks(blocks) if options.has_journal else 0
        reserved = int(blocks * options.reserved / 100) + 1 if options.reserved else 0
        if options.extents and options.free is not None:
            reserved += min(blocks // 50, _RESERVED_BY_KERNEL) + 1
        if usual <= journal and reserved <= kept:
            break
        journal, kept = max(journal, usual), max(kept, reserved)
    step = _MIB // size
    blocks = -(-blocks // step) * step
    geometry = fit(size, min(blocks, (1 << 32) - 1), wanted, needed, flex=options.extents)
    return geometry or least, journal


def _cost(options: Options, journal: int) -> int:
    """The blocks of a journal and of what maps it."""
    if options.extents or not journal:
        return journal
    return journal + indirect_blocks([Piece(0, 0, journal)], options.block_size)


def _with_room(inodes: int) -> int:
    return inodes + (inodes >> 6) + 16
