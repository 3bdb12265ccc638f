"""The on-disk structures of ext2, ext3 and ext4, little-endian but for the journal.

Source: the Linux kernel, Documentation/filesystems/ext4/ (super, group_descr, inodes, directory,
ifork, attributes, journal); the fields bear the names that they have there.
"""

from __future__ import annotations

import struct
from collections import namedtuple
from typing import Any, Union

_namedtuple: Any = namedtuple  # whose fields a type checker can't know


class Record:
    """A C struct: `fields` is "name:format ..." in struct's letters, in order and without gaps."""

    def __init__(self, name: str, fields: str, order: str = "<") -> None:
        pairs = [field.split(":") for field in fields.split()]
        self._struct = struct.Struct(order + "".join(code for _, code in pairs))
        self._tuple = _namedtuple(name, [field for field, _ in pairs])
        self._empty: Any = self._tuple._make(b"" if code.endswith("s") else 0 for _, code in pairs)
        self.size = self._struct.size

    def pack(self, **values: Union[int, bytes]) -> bytes:
        """The bytes of the struct; fields that aren't named are zero."""
        return self._struct.pack(*self._empty._replace(**values))

    def unpack(self, data: Union[bytes, bytearray, memoryview], offset: int = 0) -> Any:
        """A named tuple of the fields; struct.error if the data is too short."""
        return self._tuple._make(self._struct.unpack_from(data, offset))


# ---- superblock: at byte 1024 of the filesystem; a copy at the start of each backup group
SUPERBLOCK = Record(
    "Superblock",
    """s_inodes_count:I s_blocks_count_lo:I s_r_blocks_count_lo:I s_free_blocks_count_lo:I
    s_free_inodes_count:I s_first_data_block:I s_log_block_size:I s_log_cluster_size:I
    s_blocks_per_group:I s_clusters_per_group:I s_inodes_per_group:I s_mtime:I s_wtime:I
    s_mnt_count:H s_max_mnt_count:H s_magic:H s_state:H s_errors:H s_minor_rev_level:H
    s_lastcheck:I s_checkinterval:I s_creator_os:I s_rev_level:I s_def_resuid:H s_def_resgid:H
    s_first_ino:I s_inode_size:H s_block_group_nr:H s_feature_compat:I s_feature_incompat:I
    s_feature_ro_compat:I s_uuid:16s s_volume_name:16s s_last_mounted:64s
    s_algorithm_usage_bitmap:I s_prealloc_blocks:B s_prealloc_dir_blocks:B
    s_reserved_gdt_blocks:H s_journal_uuid:16s s_journal_inum:I s_journal_dev:I s_last_orphan:I
    s_hash_seed:16s s_def_hash_version:B s_jnl_backup_type:B s_desc_size:H
    s_default_mount_opts:I s_first_meta_bg:I s_mkfs_time:I s_jnl_blocks:68s s_blocks_count_hi:I
    s_r_blocks_count_hi:I s_free_blocks_count_hi:I s_min_extra_isize:H s_want_extra_isize:H
    s_flags:I s_raid_stride:H s_mmp_interval:H s_mmp_block:Q s_raid_stripe_width:I
    s_log_groups_per_flex:B s_checksum_type:B s_encryption_level:B s_reserved_pad:B
    s_kbytes_written:Q s_snapshot:20s s_error_count:I s_errors_detail:104s s_mount_opts:64s
    s_usr_quota_inum:I s_grp_quota_inum:I s_overhead_clusters:I s_backup_bgs:8s
    s_encrypt_algos:4s s_encrypt_pw_salt:16s s_lpf_ino:I s_prj_quota_inum:I s_checksum_seed:I
    s_time_hi:7s s_pad:B s_encoding:H s_encoding_flags:H s_orphan_file_inum:I s_reserved:376s
    s_checksum:I""",
)
SUPERBLOCK_OFFSET = 1024
MAGIC = 0xEF53
STATE_VALID = 1
ERRORS_CONTINUE = 1
OS_HURD = 1
CHECKSUM_CRC32C = 1
GOOD_OLD_REVISION, DYNAMIC_REVISION = 0, 1
DEFAULT_MOUNT_OPTIONS = 0x4 | 0x8  # user_xattr, acl
HASH_HALF_MD4 = 1
FLAG_UNSIGNED_HASH = 2

# s_feature_compat
HAS_JOURNAL, EXT_ATTR, RESIZE_INODE, DIR_INDEX, SPARSE_SUPER2 = 0x4, 0x8, 0x10, 0x20, 0x200
# s_feature_incompat
COMPRESSION, FILETYPE, RECOVER, JOURNAL_DEV, META_BG = 0x1, 0x2, 0x4, 0x8, 0x10
EXTENTS, BIT64, MMP, FLEX_BG, EA_INODE = 0x40, 0x80, 0x100, 0x200, 0x400
DIRDATA, CSUM_SEED, LARGEDIR, INLINE_DATA = 0x1000, 0x2000, 0x4000, 0x8000
ENCRYPT, CASEFOLD = 0x10000, 0x20000
# s_feature_ro_compat
SPARSE_SUPER, LARGE_FILE, HUGE_FILE, GDT_CSUM = 0x1, 0x2, 0x8, 0x10
DIR_NLINK, EXTRA_ISIZE, QUOTA, BIGALLOC = 0x20, 0x40, 0x100, 0x200
METADATA_CSUM, READONLY, PROJECT, SHARED_BLOCKS = 0x400, 0x1000, 0x2000, 0x4000
VERITY, ORPHAN_PRESENT = 0x8000, 0x10000

# ---- block group descriptor: s_desc_size bytes with 64bit, else the first 32
GROUP_DESCRIPTOR = Record(
    "GroupDescriptor",
    """bg_block_bitmap_lo:I bg_inode_bitmap_lo:I bg_inode_table_lo:I bg_free_blocks_count_lo:H
    bg_free_inodes_count_lo:H bg_used_dirs_count_lo:H bg_flags:H bg_exclude_bitmap_lo:I
    bg_block_bitmap_csum_lo:H bg_inode_bitmap_csum_lo:H bg_itable_unused_lo:H bg_checksum:H
    bg_block_bitmap_hi:I bg_inode_bitmap_hi:I bg_inode_table_hi:I bg_free_blocks_count_hi:H
    bg_free_inodes_count_hi:H bg_used_dirs_count_hi:H bg_itable_unused_hi:H
    bg_exclude_bitmap_hi:I bg_block_bitmap_csum_hi:H bg_inode_bitmap_csum_hi:H bg_reserved:I""",
)
DESCRIPTOR_SIZE = 32
BG_CHECKSUM = 30
# The first 32 bytes: the blocks of block bitmap, inode bitmap and inode table, the numbers of free
# blocks, free inodes and directories, flags
PACK_DESCRIPTOR = struct.Struct("<IIIHHHH12x").pack

# ---- inode: s_inode_size bytes, what is past 128 + i_extra_isize holds extended attributes
INODE = Record(
    "Inode",
    """i_mode:H i_uid:H i_size_lo:I i_atime:I i_ctime:I i_mtime:I i_dtime:I i_gid:H
    i_links_count:H i_blocks_lo:I i_flags:I i_version:I i_block:60s i_generation:I
    i_file_acl_lo:I i_size_high:I i_obso_faddr:I i_blocks_high:H i_file_acl_high:H i_uid_high:H
    i_gid_high:H i_checksum_lo:H i_reserved:H i_extra_isize:H i_checksum_hi:H i_ctime_extra:I
    i_mtime_extra:I i_atime_extra:I i_crtime:I i_crtime_extra:I i_version_hi:I i_projid:I""",
)
# The fields that a writer fills, in this order: mode, uid, size, atime, ctime, mtime, gid, links,
# flags, block, size_high, uid_high, gid_high, extra_isize, ctime_extra, mtime_extra, atime_extra
PACK_INODE = struct.Struct("<HHIIII4xHH4xI4x60s8xI8xHH4xH2xIII112x").pack
INODE_SIZE = 256
INODE_SHIFT = 8
EXTRA_ISIZE_BYTES = 32
XATTR_OFFSET = 128 + EXTRA_ISIZE_BYTES
I_LINKS_COUNT, I_BLOCKS_LO, I_FLAGS, I_BLOCK, I_FILE_ACL_LO = 26, 28, 32, 40, 104
I_SIZE_LO, I_SIZE_HIGH, I_BLOCKS_HIGH = 4, 108, 116
I_CHECKSUM_LO, I_CHECKSUM_HI = 124, 130
GOOD_OLD_INODE_SIZE = 128

ROOT, RESIZE, JOURNAL, FIRST = 2, 7, 8, 11  # inode numbers
# i_flags
SECRM_FL, UNRM_FL, COMPR_FL, SYNC_FL, IMMUTABLE_FL, APPEND_FL = 0x1, 0x2, 0x4, 0x8, 0x10, 0x20
NODUMP_FL, NOATIME_FL, COMPRBLK_FL, ENCRYPT_FL, INDEX_FL = 0x40, 0x80, 0x200, 0x800, 0x1000
JOURNAL_DATA_FL, NOTAIL_FL, DIRSYNC_FL, TOPDIR_FL = 0x4000, 0x8000, 0x10000, 0x20000
HUGE_FILE_FL, EXTENTS_FL, VERITY_FL, EA_INODE_FL = 0x40000, 0x80000, 0x100000, 0x200000
DAX_FL, INLINE_DATA_FL, PROJINHERIT_FL, CASEFOLD_FL = 0x2000000, 0x10000000, 0x20000000, 0x40000000
LINK_MAX = 65000
DIRECT_BLOCKS = 12
TIME_MIN, TIME_MAX = -(1 << 31), (1 << 34) - (1 << 31) - 1  # seconds: 1901 to 2446

# ---- directory entry: inode, rec_len, name_len, file_type, then the name
DIRECTORY_ENTRY = struct.Struct("<IHBB")
# the last 12 bytes of a directory block that has a checksum (metadata_csum)
DIRECTORY_TAIL = Record(
    "DirectoryTail",
    "det_reserved_zero1:I det_rec_len:H det_reserved_zero2:B det_reserved_ft:B det_checksum:I",
)
DIRECTORY_TAIL_TYPE = 0xDE
# file_type of a directory entry, by the top four bits of the mode
FILE_TYPE = {0o10: 1, 0o04: 2, 0o02: 3, 0o06: 4, 0o01: 5, 0o14: 6, 0o12: 7}

# ---- extent tree: a header, then entries of 12 bytes; the root is in i_block
EXTENT_HEADER = struct.Struct("<HHHHI")  # magic, entries, max, depth, generation
EXTENT = struct.Struct("<IHHI")  # first file block, length, start_hi, start_lo
EXTENT_INDEX = struct.Struct("<IIHH")  # first file block, leaf_lo, leaf_hi, unused
EXTENT_MAGIC = 0xF30A
EXTENT_MAX_BLOCKS = 32768  # a greater ee_len means an unwritten extent of ee_len - 32768
EMPTY_EXTENTS = EXTENT_HEADER.pack(EXTENT_MAGIC, 0, 4, 0, 0)

# ---- extended attributes: a header, then entries, each followed by its name padded to 4 bytes
XATTR_MAGIC = 0xEA020000
XATTR_HEADER = struct.Struct("<IIIII12x")  # magic, refcount, blocks, hash, checksum
# name_len, name_index, value_offs, value_inum, value_size, hash
XATTR_ENTRY = struct.Struct("<BBHIII")
XATTR_MAX_REFERENCES = 1024
XATTR_PREFIXES = {  # e_name_index
    b"user.": 1,
    b"system.posix_acl_access": 2,
    b"system.posix_acl_default": 3,
    b"trusted.": 4,
    b"security.": 6,
}

# ---- journal (JBD2), big-endian
JOURNAL_SUPERBLOCK = Record(
    "JournalSuperblock",
    """h_magic:I h_blocktype:I h_sequence:I s_blocksize:I s_maxlen:I s_first:I s_sequence:I
    s_start:I s_errno:I s_feature_compat:I s_feature_incompat:I s_feature_ro_compat:I s_uuid:16s
    s_nr_users:I s_dynsuper:I s_max_transaction:I s_max_trans_data:I s_checksum_type:B
    s_padding2:3s s_num_fc_blks:I s_head:I s_padding:160s s_checksum:I s_users:768s""",
    order=">",
)
JOURNAL_MAGIC = 0xC03B3998
JOURNAL_SUPERBLOCK_V1, JOURNAL_SUPERBLOCK_V2 = 3, 4
JOURNAL_MIN_BLOCKS = 1024

_DEVICE_MAX = (1 << 12) - 1, (1 << 20) - 1


def encode_device(major: int, minor: int) -> bytes:
    """i_block of a device node: the old form in its first word, or the new one in its second."""
    if major < 256 and minor < 256:
        return struct.pack("<I", major << 8 | minor)
    if major > _DEVICE_MAX[0] or minor > _DEVICE_MAX[1]:
        raise ValueError(f"device number {major}:{minor} is out of range")
    return struct.pack("<II", 0, minor & 0xFF | major << 8 | (minor & ~0xFF) << 12)
