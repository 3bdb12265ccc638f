"""The internal journal (JBD2) of ext3 and ext4: empty, and as large as mke2fs would make it."""

from __future__ import annotations

from nbdtool.ext.structures import (
    JOURNAL_MAGIC,
    JOURNAL_MIN_BLOCKS,
    JOURNAL_SUPERBLOCK,
    JOURNAL_SUPERBLOCK_V2,
)

# (below so many blocks of filesystem, so many blocks of journal): ext2fs_default_journal_size
_SIZES = (
    (32768, JOURNAL_MIN_BLOCKS),
    (256 << 10, 4096),
    (512 << 10, 8192),
    (4096 << 10, 16384),
    (8192 << 10, 32768),
    (16384 << 10, 65536),
    (32768 << 10, 131072),
)
_LARGEST = 262144


def journal_blocks(blocks: int) -> int:
    """The size of the journal of a filesystem of so many blocks, in blocks."""
    return next((size for below, size in _SIZES if blocks < below), _LARGEST)


def journal_superblock(blocks: int, block_size: int, uuid: bytes) -> bytes:
    """The first block of an empty journal; the others are zero."""
    return JOURNAL_SUPERBLOCK.pack(
        h_magic=JOURNAL_MAGIC,
        h_blocktype=JOURNAL_SUPERBLOCK_V2,
        s_blocksize=block_size,
        s_maxlen=blocks,
        s_first=1,
        s_sequence=1,
        s_uuid=uuid,
        s_nr_users=1,
    )
