"""Bitmaps, group descriptors and superblocks of a filesystem whose blocks are given out."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Set
from typing import NamedTuple, Optional

from nbdtool.ext import structures as s
from nbdtool.ext.geometry import LOG_FLEX_GROUPS, Geometry, has_superblock
from nbdtool.ext.sizing import Options


class Usage(NamedTuple):
    """What is in use: all free blocks before `block`, the inodes up to `inodes` but for `dead`."""

    block: int
    inodes: int
    dead: Set[int]
    directories: Iterable[int]  # inode numbers


class Groups:
    """Where each bitmap is in `bitmaps` (equal ones once), the descriptors, the counts."""

    def __init__(self, geometry: Geometry, usage: Usage) -> None:
        self._geometry = geometry
        self._usage = usage
        self.bitmaps = bytearray()
        self._places: dict[bytes, int] = {}
        self._known: dict[tuple[tuple[int, int], ...], tuple[int, int]] = {}
        self.block_bitmaps: list[int] = []
        self.inode_bitmaps: list[int] = []
        self.free_blocks = 0
        self.free_inodes = 0
        per_group = geometry.inodes_per_group
        directories = Counter((ino - 1) // per_group for ino in usage.directories)
        self._dead: dict[int, list[int]] = {}
        for ino in usage.dead:
            self._dead.setdefault((ino - 1) // per_group, []).append((ino - 1) % per_group)
        descriptors = []
        for group, ranges in enumerate(self._used_ranges()):
            place, free_blocks = self._block_bitmap(ranges)
            self.block_bitmaps.append(place)
            self.free_blocks += free_blocks
            place, free_inodes = self._inode_bitmap(group)
            self.inode_bitmaps.append(place)
            self.free_inodes += free_inodes
            descriptors.append(
                s.PACK_DESCRIPTOR(
                    geometry.block_bitmaps[group],
                    geometry.inode_bitmaps[group],
                    geometry.inode_tables[group],
                    free_blocks,
                    free_inodes,
                    directories[group],
                    0,
                )
            )
        self.descriptors = b"".join(descriptors)

    def _used_ranges(self) -> Iterator[tuple[tuple[int, int], ...]]:
        """For each group the ranges of its blocks that are in use, from its start, in order.

        The range from the end of the last group's blocks to that of the bitmap is one of them.
        """
        geometry = self._geometry
        per_group = geometry.blocks_per_group
        reserved = geometry.reserved
        index = 0
        for group in range(geometry.groups):
            start, end = geometry.group_start(group), geometry.group_end(group)
            ranges = []
            at = min(max(self._usage.block, start), end)
            if at > start:
                ranges.append((0, at - start))
            while index < len(reserved) and reserved[index][0] < end:
                low, high = max(reserved[index][0], at), min(reserved[index][1], end)
                if low < high:
                    ranges.append((low - start, high - start))
                if reserved[index][1] > end:
                    break
                index += 1
            if end - start < per_group:
                ranges.append((end - start, per_group))
            yield tuple(ranges)

    def _block_bitmap(self, ranges: tuple[tuple[int, int], ...]) -> tuple[int, int]:
        """The place of the bitmap, and how many blocks are free in it."""
        known = self._known.get(ranges)
        if known is None:
            bits = 0
            used = 0
            for start, end in ranges:
                bits |= ((1 << end - start) - 1) << start
                used += end - start
            free = self._geometry.blocks_per_group - used
            known = self._known[ranges] = self._bitmap(bits), free
        return known

    def _inode_bitmap(self, group: int) -> tuple[int, int]:
        """The place of the bitmap, and how many inodes are free in it."""
        per_group = self._geometry.inodes_per_group
        used = min(max(self._usage.inodes - group * per_group, 0), per_group)
        dead = self._dead.get(group, ())
        bits = (1 << used) - 1
        for index in dead:
            bits &= ~(1 << index)
        past = 8 * self._geometry.block_size
        bits |= ((1 << past - per_group) - 1) << per_group
        return self._bitmap(bits), per_group - used + len(dead)

    def _bitmap(self, bits: int) -> int:
        size = self._geometry.block_size
        data = bits.to_bytes(size, "little")
        place = self._places.get(data)
        if place is None:
            place = self._places[data] = len(self.bitmaps)
            self.bitmaps += data
        return place


def superblock(
    geometry: Geometry,
    groups: Groups,
    options: Options,
    uuid: bytes,
    journal: Optional[bytes],
    group: int,
) -> bytes:
    """The superblock of a group. journal: i_block and the size words of inode 8, 68 bytes."""
    compat = s.EXT_ATTR
    incompat = s.FILETYPE
    ro_compat = s.SPARSE_SUPER | s.LARGE_FILE
    if journal is not None:
        compat |= s.HAS_JOURNAL
    if options.extents:
        incompat |= s.EXTENTS | s.FLEX_BG
        ro_compat |= s.HUGE_FILE | s.DIR_NLINK | s.EXTRA_ISIZE
    log_block_size = geometry.block_size.bit_length() - 11
    return s.SUPERBLOCK.pack(
        s_inodes_count=geometry.inodes,
        s_blocks_count_lo=geometry.blocks,
        s_r_blocks_count_lo=int(geometry.blocks * options.reserved / 100),
        s_free_blocks_count_lo=groups.free_blocks,
        s_free_inodes_count=groups.free_inodes,
        s_first_data_block=geometry.first_data_block,
        s_log_block_size=log_block_size,
        s_log_cluster_size=log_block_size,
        s_blocks_per_group=geometry.blocks_per_group,
        s_clusters_per_group=geometry.blocks_per_group,
        s_inodes_per_group=geometry.inodes_per_group,
        s_wtime=options.time & 0xFFFFFFFF,
        s_max_mnt_count=0xFFFF,
        s_magic=s.MAGIC,
        s_state=s.STATE_VALID,
        s_errors=s.ERRORS_CONTINUE,
        s_lastcheck=options.time & 0xFFFFFFFF,
        s_rev_level=s.DYNAMIC_REVISION,
        s_first_ino=s.FIRST,
        s_inode_size=s.INODE_SIZE,
        s_block_group_nr=group & 0xFFFF,
        s_feature_compat=compat,
        s_feature_incompat=incompat,
        s_feature_ro_compat=ro_compat,
        s_uuid=uuid,
        s_volume_name=options.label,
        s_journal_inum=s.JOURNAL if journal is not None else 0,
        s_hash_seed=derive(uuid, "hash seed"),
        s_def_hash_version=s.HASH_HALF_MD4,
        s_jnl_backup_type=1 if journal is not None else 0,
        s_jnl_blocks=journal or b"",
        s_default_mount_opts=s.DEFAULT_MOUNT_OPTIONS,
        s_mkfs_time=options.time & 0xFFFFFFFF,
        s_min_extra_isize=s.EXTRA_ISIZE_BYTES,
        s_want_extra_isize=s.EXTRA_ISIZE_BYTES,
        s_flags=s.FLAG_UNSIGNED_HASH,
        s_log_groups_per_flex=LOG_FLEX_GROUPS if options.extents else 0,
    )


def superblock_groups(geometry: Geometry) -> list[int]:
    """The groups that have a copy of the superblock."""
    return [group for group in range(geometry.groups) if has_superblock(group)]


def derive(uuid: bytes, what: str) -> bytes:
    """A version 4 UUID (RFC 4122, section 4.4) for `what`, derived from another."""
    data = bytearray(hashlib.sha256(uuid + what.encode()).digest()[:16])
    data[6] = data[6] & 0x0F | 0x40
    data[8] = data[8] & 0x3F | 0x80
    return bytes(data)
