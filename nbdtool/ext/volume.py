"""An ext2, ext3 or ext4 filesystem on a disk: superblock, group descriptors and inodes, checked.

What is read here is what the kernel would read, or there is a doubt (Uncertain): checksums are
verified where the filesystem has them, and a feature that isn't known is one that changes anything.
Source: the Linux kernel, Documentation/filesystems/ext4/ (super, group_descr, inodes, checksums).
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from nbdtool.disk import Disk, read_bytes
from nbdtool.errors import Uncertain
from nbdtool.ext import structures as s
from nbdtool.ext.checksum import crc16, crc32c
from nbdtool.ext.geometry import has_superblock

_INCOMPAT = {  # features that are read, or that show in the inodes that they concern
    s.FILETYPE, s.META_BG, s.EXTENTS, s.BIT64, s.FLEX_BG, s.EA_INODE, s.CSUM_SEED, s.LARGEDIR,
    s.INLINE_DATA, s.ENCRYPT, s.CASEFOLD,
}  # fmt: skip
_RO_COMPAT = {
    s.SPARSE_SUPER, s.LARGE_FILE, s.HUGE_FILE, s.GDT_CSUM, s.DIR_NLINK, s.EXTRA_ISIZE, s.QUOTA,
    s.METADATA_CSUM, s.READONLY, s.PROJECT, s.VERITY,
}  # fmt: skip
_NAMES = {
    ("incompat", s.COMPRESSION): "compression",
    ("incompat", s.JOURNAL_DEV): "journal_dev",
    ("incompat", s.MMP): "mmp",
    ("incompat", s.DIRDATA): "dirdata",
    ("ro_compat", s.BIGALLOC): "bigalloc",
    ("ro_compat", s.SHARED_BLOCKS): "shared_blocks",
}
_FLAGS = (  # of inodes whose data are just the blocks that they map
    s.SECRM_FL | s.UNRM_FL | s.SYNC_FL | s.IMMUTABLE_FL | s.APPEND_FL | s.NODUMP_FL | s.NOATIME_FL
    | s.INDEX_FL | s.JOURNAL_DATA_FL | s.NOTAIL_FL | s.DIRSYNC_FL | s.TOPDIR_FL | s.HUGE_FILE_FL
    | s.EXTENTS_FL | s.DAX_FL | s.PROJINHERIT_FL
)  # fmt: skip
_FLAG_NAMES = {
    s.ENCRYPT_FL: "encrypted",
    s.INLINE_DATA_FL: "stored in its inode (inline_data)",
    s.VERITY_FL: "under fs-verity",
    s.CASEFOLD_FL: "without regard to case (casefold)",
    s.COMPR_FL: "compressed",
    s.COMPRBLK_FL: "compressed",
}

_WORK = 128 << 20  # bytes of metadata read for one request
_DESCRIPTOR_WORK = 512  # what the pains with one descriptor count for
_MAX_ZONE = 1024  # groups

REGULAR, DIRECTORY, SYMLINK = 0o10, 0o04, 0o12  # the top four bits of a mode
KINDS = {
    0o01: "a fifo",
    0o02: "a character device",
    DIRECTORY: "a directory",
    0o06: "a block device",
    REGULAR: "a regular file",
    SYMLINK: "a symbolic link",
    0o14: "a socket",
}


def overlapping(ranges: Sequence[tuple[int, int]]) -> bool:
    """Whether any of these sorted (first, last + 1) have something in common."""
    return any(before[1] > after[0] for before, after in zip(ranges, ranges[1:]))


class Inode(NamedTuple):
    """A checked inode: kind is the top four bits of the mode, size and allocated are in bytes."""

    number: int
    kind: int
    size: int
    allocated: int
    flags: int
    block: bytes  # i_block
    has_xattr_block: bool
    seed: int  # of the checksums of its blocks


class _Group(NamedTuple):
    """Where a group's metadata are, in blocks of the filesystem."""

    block_bitmap: int
    inode_bitmap: int
    inode_table: int


class Volume:
    """The checked superblock, and what it leads to. Raises Uncertain and OSError (reads)."""

    def __init__(self, disk: Disk) -> None:
        self.disk = disk
        self.begin()
        raw = b""
        if disk.size >= s.SUPERBLOCK_OFFSET + s.SUPERBLOCK.size:
            raw = read_bytes(disk, s.SUPERBLOCK_OFFSET, s.SUPERBLOCK.size)
        if len(raw) < s.SUPERBLOCK.size or s.SUPERBLOCK.unpack(raw).s_magic != s.MAGIC:
            raise self.doubt("no ext2, ext3 or ext4 filesystem")
        sb = self.superblock = s.SUPERBLOCK.unpack(raw)
        for reason in self._set_features(sb, raw):
            raise self.doubt(reason)
        for what in self._set_geometry(sb):
            raise self.damage(f"the superblock has {what}")
        self._groups: dict[int, _Group] = {}
        self._zones: dict[int, list[tuple[int, int]]] = {}

    def doubt(self, reason: str) -> Uncertain:
        return Uncertain(f"{self.disk.description or 'the disk'}: {reason}")

    def damage(self, what: str) -> Uncertain:
        return self.doubt(f"the filesystem is damaged: {what}")

    def _set_features(self, sb: Any, raw: bytes) -> Iterator[str]:
        """What stands against reading it without the kernel."""
        dynamic = sb.s_rev_level == s.DYNAMIC_REVISION
        if not dynamic and (
            sb.s_rev_level != s.GOOD_OLD_REVISION or sb.s_feature_incompat | sb.s_feature_ro_compat
        ):
            yield f"an ext filesystem of revision {sb.s_rev_level} with features"
        incompat, ro_compat = sb.s_feature_incompat, sb.s_feature_ro_compat
        self.incompat: int = incompat
        if ro_compat & s.METADATA_CSUM:
            if sb.s_checksum_type != s.CHECKSUM_CRC32C:
                yield f"checksums of type {sb.s_checksum_type}, which aren't known here"
            if crc32c(raw[:-4]) != sb.s_checksum:
                yield "the filesystem is damaged: the superblock has a wrong checksum"
        if incompat & s.RECOVER:
            yield "the filesystem is in use, or wasn't unmounted: its journal is to be replayed"
        known = {"incompat": sum(_INCOMPAT), "ro_compat": sum(_RO_COMPAT) | s.ORPHAN_PRESENT}
        for kind, features in ("incompat", incompat), ("ro_compat", ro_compat):
            for bit in range(32):
                if features & ~known[kind] & 1 << bit:
                    name = _NAMES.get((kind, 1 << bit), f"{kind} {1 << bit:#x}")
                    yield f"the filesystem has the feature {name}, which isn't read here"
        if sb.s_state != s.STATE_VALID or sb.s_error_count:
            yield "the filesystem is in use, wasn't unmounted, or has errors"
        if sb.s_last_orphan or ro_compat & s.ORPHAN_PRESENT:
            yield "the filesystem has orphaned inodes to be cleaned up"
        if ro_compat & s.METADATA_CSUM and ro_compat & s.GDT_CSUM:
            yield "the filesystem has checksums of two kinds"
        if sb.s_creator_os == s.OS_HURD:
            yield "a filesystem of the Hurd"
        self.has_checksums = bool(ro_compat & s.METADATA_CSUM)
        seed = sb.s_checksum_seed if incompat & s.CSUM_SEED else crc32c(sb.s_uuid)
        self._seed = seed if self.has_checksums else 0
        self.inode_size: int = sb.s_inode_size if dynamic else s.GOOD_OLD_INODE_SIZE
        self._first_inode = sb.s_first_ino if dynamic else s.FIRST

    def _set_geometry(self, sb: Any) -> Iterator[str]:
        """What is impossible."""
        if sb.s_log_block_size > 6 or sb.s_log_cluster_size != sb.s_log_block_size:
            yield f"blocks of 2^{10 + sb.s_log_block_size} bytes"
        size: int = 1024 << sb.s_log_block_size
        self.block_size = size
        self.blocks: int = sb.s_blocks_count_lo | sb.s_blocks_count_hi << 32
        if self.blocks * size > self.disk.size:
            yield f"{self.blocks * size} bytes, and the disk {self.disk.size}"
        if sb.s_blocks_count_hi and not self.incompat & s.BIT64:
            yield f"{self.blocks} blocks without the feature 64bit"
        self.first: int = sb.s_first_data_block
        if self.first != (size == 1024) or self.blocks <= self.first + 1:
            yield f"{self.blocks} blocks of {size} bytes, the first one being {self.first}"
        inode_size = self.inode_size
        if not s.GOOD_OLD_INODE_SIZE <= inode_size <= size or inode_size & (inode_size - 1):
            yield f"inodes of {inode_size} bytes"
        self._descriptor_size = s.DESCRIPTOR_SIZE
        if self.incompat & s.BIT64:
            self._descriptor_size = sb.s_desc_size
        if self._descriptor_size not in (
            (64, 128, 256, 512, 1024) if self.incompat & s.BIT64 else (32,)
        ):
            yield f"group descriptors of {sb.s_desc_size} bytes"
        self._per_group: int = sb.s_blocks_per_group
        self._inodes_per_group: int = sb.s_inodes_per_group
        if not 0 < self._per_group <= 8 * size or self._per_group % 8:
            yield f"groups of {self._per_group} blocks"
        if not size // inode_size <= self._inodes_per_group <= 8 * size:
            yield f"groups of {self._inodes_per_group} inodes"
        self.groups = -(-(self.blocks - self.first) // self._per_group)
        if sb.s_inodes_count != self.groups * self._inodes_per_group:
            yield f"{sb.s_inodes_count} inodes for {self.groups} groups"
        if self._first_inode < s.FIRST:
            yield f"inode {self._first_inode} as the first one"
        self._per_block = size // self._descriptor_size  # descriptors
        self._descriptor_blocks = -(-self.groups // self._per_block)
        if sb.s_first_meta_bg > self._descriptor_blocks and self.incompat & s.META_BG:
            yield f"descriptor block {sb.s_first_meta_bg} as the first of meta_bg"

    # Blocks

    def begin(self) -> None:
        """A new request begins, which may read so much."""
        self._left = _WORK

    def charge(self, work: int) -> None:
        """Count work in bytes; too much is a doubt, so that a crafted filesystem ends."""
        self._left -= work
        if self._left < 0:
            raise self.doubt("what describes the file is too long, or goes in circles")

    def read(self, block: int, count: int = 1) -> bytes:
        """The content of `count` blocks of metadata."""
        if not self.first <= block <= self.blocks - count:
            raise self.damage(f"it leads to block {block}, and has {self.blocks}")
        self.charge(count * self.block_size)
        return read_bytes(self.disk, block * self.block_size, count * self.block_size)

    # Groups

    def _has_superblock(self, group: int) -> bool:
        sb = self.superblock
        if group and sb.s_feature_compat & s.SPARSE_SUPER2:
            return group in struct.unpack("<II", sb.s_backup_bgs)
        return not sb.s_feature_ro_compat & s.SPARSE_SUPER or has_superblock(group)

    def _descriptor_block(self, index: int) -> int:
        """Where the block `index` of the descriptors is."""
        if not self.incompat & s.META_BG or index < self.superblock.s_first_meta_bg:
            return self.first + 1 + index
        group = index * self._per_block
        return self.first + group * self._per_group + self._has_superblock(group)

    def _group(self, group: int) -> _Group:
        if group not in self._groups:
            index = group // self._per_block
            table = self.read(self._descriptor_block(index))
            start = index * self._per_block
            for number in range(start, min(start + self._per_block, self.groups)):
                at = (number - start) * self._descriptor_size
                raw = table[at : at + self._descriptor_size]
                self._groups[number] = self._parse_group(number, raw)
        return self._groups[group]

    def _parse_group(self, number: int, raw: bytes) -> _Group:
        self.charge(_DESCRIPTOR_WORK)
        descriptor = s.GROUP_DESCRIPTOR.unpack(raw.ljust(s.GROUP_DESCRIPTOR.size, b"\0"))
        at = s.BG_CHECKSUM
        label = struct.pack("<I", number)
        checksum = descriptor.bg_checksum
        if self.has_checksums:
            checksum = crc32c(label + raw[:at] + bytes(2) + raw[at + 2 :], self._seed) & 0xFFFF
        elif self.superblock.s_feature_ro_compat & s.GDT_CSUM:
            checksum = crc16(self.superblock.s_uuid + label + raw[:at] + raw[at + 2 :])
        if checksum != descriptor.bg_checksum:
            raise self.damage(f"group {number} has a wrong checksum")
        group = _Group(
            descriptor.bg_block_bitmap_lo | descriptor.bg_block_bitmap_hi << 32,
            descriptor.bg_inode_bitmap_lo | descriptor.bg_inode_bitmap_hi << 32,
            descriptor.bg_inode_table_lo | descriptor.bg_inode_table_hi << 32,
        )
        # Without flex_bg a group's metadata are in the group.
        low, high = self.first, self.blocks
        if not self.incompat & s.FLEX_BG:
            low += number * self._per_group
            high = min(high, low + self._per_group)
        if min(group) < low or max(*group[:2], group[2] + self._table_blocks - 1) >= high:
            raise self.damage(f"group {number} has its metadata where none can be")
        return group

    @property
    def _table_blocks(self) -> int:
        return self._inodes_per_group // (self.block_size // self.inode_size)

    def zone(self, block: int) -> tuple[int, int, list[tuple[int, int]]]:
        """The blocks [low, high) of the groups whose metadata lie together around a block.

        And where these are: sorted ranges (first, last + 1).
        """
        groups = 1
        if self.incompat & s.FLEX_BG:
            groups = min(1 << min(self.superblock.s_log_groups_per_flex, 31), _MAX_ZONE)
        zone = (block - self.first) // self._per_group // groups
        if zone not in self._zones:
            members = range(zone * groups, min((zone + 1) * groups, self.groups))
            parts = sorted(part for n in members for part in self._parts(n))
            if overlapping(parts):
                raise self.damage("the metadata of its groups overlap")
            self._zones[zone] = parts
        low = self.first + zone * groups * self._per_group
        return low, min(low + groups * self._per_group, self.blocks), self._zones[zone]

    def _parts(self, number: int) -> Iterator[tuple[int, int]]:
        group = self._group(number)
        yield group.block_bitmap, group.block_bitmap + 1
        yield group.inode_bitmap, group.inode_bitmap + 1
        yield group.inode_table, group.inode_table + self._table_blocks
        start = self.first + number * self._per_group
        blocks = int(self._has_superblock(number))
        if self.incompat & s.META_BG:
            old = self.superblock.s_first_meta_bg
            if number // self._per_block < old:
                blocks += old if blocks else 0
            elif number % self._per_block in (0, 1, self._per_block - 1):
                blocks += 1
        elif blocks:
            blocks += self._descriptor_blocks + self.superblock.s_reserved_gdt_blocks
        if blocks:
            yield start, start + blocks

    # Inodes

    def inode(self, number: int, own: int = s.ROOT) -> Inode:
        """The inode of that number, whose data are the blocks that it maps.

        own: the reserved one that it may be.
        """
        sb = self.superblock
        reserved = number < self._first_inode or number in (
            sb.s_usr_quota_inum,
            sb.s_grp_quota_inum,
            sb.s_prj_quota_inum,
            sb.s_orphan_file_inum,
        )
        if (reserved and number != own) or not 0 < number <= self.superblock.s_inodes_count:
            raise self.damage(f"a name leads to inode {number}, which can't be")
        group, index = divmod(number - 1, self._inodes_per_group)
        block, place = divmod(index, self.block_size // self.inode_size)
        if block >= self._table_blocks:
            raise self.damage(f"inode {number} lies outside the table")
        table = self.read(self._group(group).inode_table + block)
        raw = table[place * self.inode_size : (place + 1) * self.inode_size]
        fields = s.INODE.unpack(raw.ljust(s.INODE.size, b"\0"))
        extra = fields.i_extra_isize if self.inode_size > s.GOOD_OLD_INODE_SIZE else 0
        if extra % 4 or s.GOOD_OLD_INODE_SIZE + extra > self.inode_size:
            raise self.damage(f"inode {number} has {extra} extra bytes")
        seed = 0
        if self.has_checksums:
            label = struct.pack("<II", number, fields.i_generation)
            seed = crc32c(label, self._seed)
            self._verify_inode(number, raw, fields, extra, seed)
        kind = fields.i_mode >> 12
        if not fields.i_links_count or kind not in KINDS:
            raise self.damage(f"inode {number} isn't in use")
        self._check_flags(number, fields.i_flags)
        size = fields.i_size_lo
        if kind == REGULAR or self.incompat & s.LARGEDIR:
            size |= fields.i_size_high << 32
        xattrs = fields.i_file_acl_lo
        if self.incompat & s.BIT64:
            xattrs |= fields.i_file_acl_high << 32
        if xattrs and not self.first < xattrs < self.blocks:
            raise self.damage(f"inode {number} has its extended attributes in block {xattrs}")
        allocated, unit = fields.i_blocks_lo, 512
        if self.superblock.s_feature_ro_compat & s.HUGE_FILE:
            allocated |= fields.i_blocks_high << 32
            unit = self.block_size if fields.i_flags & s.HUGE_FILE_FL else 512
        return Inode(
            number,
            kind,
            size,
            allocated * unit,
            fields.i_flags,
            fields.i_block,
            bool(xattrs),
            seed,
        )

    def _verify_inode(self, number: int, raw: bytes, fields: Any, extra: int, seed: int) -> None:
        low, high = s.I_CHECKSUM_LO, s.I_CHECKSUM_HI
        covered, stored, mask = bytearray(raw), fields.i_checksum_lo, 0xFFFF
        covered[low : low + 2] = bytes(2)
        if s.GOOD_OLD_INODE_SIZE + extra >= high + 2:
            covered[high : high + 2] = bytes(2)
            stored |= fields.i_checksum_hi << 16
            mask = 0xFFFFFFFF
        if crc32c(bytes(covered), seed) & mask != stored:
            raise self.damage(f"inode {number} has a wrong checksum")

    def _check_flags(self, number: int, flags: int) -> None:
        for bit in range(32):
            if flags & ~_FLAGS & 1 << bit:
                what = _FLAG_NAMES.get(1 << bit, f"flagged {1 << bit:#x}")
                raise self.doubt(f"inode {number} is {what}, which isn't read here")
