"""The header and the snapshot table of a qcow2 image.

Specification: docs/interop/qcow2.txt of QEMU, sections "Header", "Header extensions" and
"Snapshots". Limits beyond it (tables, names, sizes) are those of QEMU.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

from nbdtool.disk import Disk, read_bytes
from nbdtool.errors import Error

MAGIC = b"QFI\xfb"

# incompatible_features
DIRTY = 1 << 0
CORRUPT = 1 << 1
DATA_FILE = 1 << 2
COMPRESSION = 1 << 3
EXTENDED_L2 = 1 << 4
_KNOWN = DIRTY | CORRUPT | DATA_FILE | COMPRESSION | EXTENDED_L2

_RAW_DATA_FILE = 1 << 1  # autoclear_features

ZLIB, ZSTD = 0, 1  # compression_type
_COMPRESSIONS = {ZLIB: "zlib", ZSTD: "zstd"}
_ENCRYPTIONS = {1: "AES", 2: "LUKS"}

# Header extensions
_END, _BACKING_FORMAT, _FEATURE_NAMES, _DATA_FILE_NAME = 0, 0xE2792ACA, 0x6803F857, 0x44415441

_V2 = struct.Struct(">4sIQIIQIIQQIIQ")
_V3 = struct.Struct(">QQQII")
_SNAPSHOT = struct.Struct(">QIHHIIQII")

_MAX_CLUSTER_BITS = 21
_MAX_L1 = 32 << 20  # bytes
_MAX_REFCOUNTS = 8 << 20  # bytes of their table
_MAX_SIZE = (1 << 63) - 1  # of an image, and of an offset in one
_MAX_SNAPSHOTS = 65536
_MAX_SNAPSHOT_TABLE = 64 << 20  # bytes
_MAX_SNAPSHOT_EXTRA = 1024  # bytes


class Snapshot(NamedTuple):
    """An internal snapshot; size is the virtual one in bytes."""

    id: str
    name: str
    size: int
    l1_offset: int
    l1_entries: int


class Header(NamedTuple):
    """What the header of a qcow2 image says; offsets and sizes in bytes."""

    version: int
    cluster_bits: int
    size: int  # of the virtual disk
    l1_offset: int
    l1_entries: int
    snapshots_offset: int
    snapshots_count: int
    dirty: bool
    corrupt: bool
    extended_l2: bool
    compression: int  # ZLIB or ZSTD
    encryption: str  # "" if there is none
    backing_file: str  # as the image spells it, "" if there is none
    backing_format: str  # "" if the image doesn't say
    external_data: bool
    data_file: str  # as the image spells it, "" if it doesn't say

    def l1_needed(self, size: int) -> int:
        """The number of L1 entries that map a virtual disk of `size` bytes."""
        l2_bits = self.cluster_bits - (4 if self.extended_l2 else 3)
        return -(-size >> (self.cluster_bits + l2_bits))


def is_qcow2(disk: Disk) -> bool:
    """Whether the disk begins as a qcow2 image does."""
    return disk.size >= len(MAGIC) and read_bytes(disk, 0, len(MAGIC)) == MAGIC


def read_header(disk: Disk) -> Header:
    """The checked header of the image on `disk`; raises Error if it can't be one, or not for us.

    What only a policy refuses (encryption, other files, the corrupt bit) is told, not refused.
    """
    name = disk.description or "the image"
    try:
        return _parse(disk)
    except _Bad as bad:
        raise Error(f"{name}: {bad}") from None


class _Bad(Exception):
    """Why it isn't a usable image."""


def _parse(disk: Disk) -> Header:
    if not is_qcow2(disk):
        raise _Bad("not a qcow2 image (if it is a raw disk, leave the qcow2 layer out)")
    if disk.size < _V2.size:
        raise _Bad("the qcow2 header is cut off")
    fields = _V2.unpack(read_bytes(disk, 0, _V2.size))
    _, version, backing_at, backing_length, cluster_bits, size, encryption, *rest = fields
    l1_entries, l1_offset, refcounts_at, refcount_clusters, snapshots, snapshots_at = rest
    if version not in (2, 3):
        raise _Bad(f"qcow2 version {version} is unknown (2 and 3 are known)")
    if not 9 <= cluster_bits <= _MAX_CLUSTER_BITS:
        raise _Bad(f"clusters of 2^{cluster_bits} bytes (2^9 to 2^{_MAX_CLUSTER_BITS} are allowed)")
    cluster_size = 1 << cluster_bits
    features, header_length, compression = 0, _V2.size, ZLIB
    if version == 3:
        features, header_length, compression = _version_3(disk, cluster_size)
    first = read_bytes(disk, 0, min(cluster_size, disk.size))
    if backing_at > cluster_size:
        raise _Bad("the name of the backing file lies outside the first cluster")
    extensions = _extensions(first[header_length : backing_at or cluster_size])
    if features & ~_KNOWN:
        names = _feature_names(extensions.get(_FEATURE_NAMES, b""), features & ~_KNOWN)
        raise _Bad(f"the image needs what isn't known here: {names}")
    if encryption and encryption not in _ENCRYPTIONS:
        raise _Bad(f"encryption method {encryption} is unknown")
    if features & EXTENDED_L2 and cluster_bits < 14:
        raise _Bad("extended L2 entries need clusters of 16 KiB or more")
    if not 0 < refcount_clusters << cluster_bits <= _MAX_REFCOUNTS:
        raise _Bad(f"a table of reference counts of {refcount_clusters} clusters is impossible")
    if refcounts_at % cluster_size or refcounts_at >= disk.size:
        raise _Bad(f"a table of reference counts at byte {refcounts_at} is impossible")
    header = Header(
        version=version,
        cluster_bits=cluster_bits,
        size=size,
        l1_offset=l1_offset,
        l1_entries=l1_entries,
        snapshots_offset=snapshots_at,
        snapshots_count=snapshots,
        dirty=bool(features & DIRTY),
        corrupt=bool(features & CORRUPT),
        extended_l2=bool(features & EXTENDED_L2),
        compression=compression,
        encryption=_ENCRYPTIONS.get(encryption, ""),
        backing_file=_backing_file(first, backing_at, backing_length),
        backing_format=_text(extensions.get(_BACKING_FORMAT, b"")),
        external_data=bool(features & DATA_FILE),
        data_file=_text(extensions.get(_DATA_FILE_NAME, b"")),
    )
    _check_l1(disk, header, l1_offset, l1_entries, size)
    return header


def _version_3(disk: Disk, cluster_size: int) -> tuple[int, int, int]:
    """incompatible_features, header_length and compression_type."""
    if disk.size < _V2.size + _V3.size:
        raise _Bad("the qcow2 header is cut off")
    fields = _V3.unpack(read_bytes(disk, _V2.size, _V3.size))
    features, _, autoclear, refcount_order, header_length = fields
    if not _V2.size + _V3.size <= header_length <= min(cluster_size, disk.size):
        raise _Bad(f"a header of {header_length} bytes is impossible")
    if header_length % 8:
        raise _Bad(f"the header's length, {header_length} bytes, isn't a multiple of 8")
    if refcount_order > 6:
        raise _Bad(f"reference counts of 2^{refcount_order} bits (at most 2^6 are allowed)")
    compression = ZLIB
    if header_length > _V2.size + _V3.size:
        compression = read_bytes(disk, _V2.size + _V3.size, 1)[0]
    if compression not in _COMPRESSIONS:
        raise _Bad(f"compression type {compression} is unknown (zlib and zstd are known)")
    if (compression != ZLIB) != bool(features & COMPRESSION):
        raise _Bad("the compression type contradicts its feature bit")
    if autoclear & _RAW_DATA_FILE and not features & DATA_FILE:
        raise _Bad("it is said to have a raw data file, and no data file")
    return features, header_length, compression


def _extensions(area: bytes) -> dict[int, bytes]:
    found: dict[int, bytes] = {}
    at = 0
    while len(area) - at >= 8:
        kind, length = struct.unpack_from(">II", area, at)
        at += 8
        if length > len(area) - at:
            raise _Bad(f"header extension {kind:#010x} is longer than its cluster")
        if kind == _END:
            break
        found[kind] = area[at : at + length]
        at += -(-length // 8) * 8
    return found


def _feature_names(table: bytes, features: int) -> str:
    """What the image itself calls the incompatible features whose bits are set."""
    names = {bit: f"feature bit {bit}" for bit in range(64) if features >> bit & 1}
    for at in range(0, len(table) - 47, 48):
        kind, bit = table[at], table[at + 1]
        if kind == 0 and bit in names:
            names[bit] = _text(table[at + 2 : at + 48].rstrip(b"\0")) or names[bit]
    return ", ".join(names.values())


def _backing_file(first: bytes, at: int, length: int) -> str:
    if not at:
        return ""
    if length > 1023 or at + length > len(first):
        raise _Bad("the name of the backing file is longer than can be")
    return _text(first[at : at + length]) or '""'


def _text(name: bytes) -> str:
    return name.decode(errors="backslashreplace")


def _check_l1(disk: Disk, header: Header, offset: int, entries: int, size: int) -> None:
    """Whether an L1 table can map `size` bytes and lies inside the image; _Bad if not."""
    needed = header.l1_needed(size)
    if size > _MAX_SIZE or needed * 8 > _MAX_L1 or entries * 8 > _MAX_L1:
        raise _Bad(f"the disk is too big for its clusters of {1 << header.cluster_bits} bytes")
    if entries < needed:
        raise _Bad(f"the L1 table has {entries} entries, a disk of {size} bytes needs {needed}")
    if offset % (1 << header.cluster_bits):
        raise _Bad(f"the L1 table is not where a cluster begins (byte {offset})")
    if offset + needed * 8 > disk.size:
        raise _Bad(f"the L1 table lies outside the image, which ends at byte {disk.size}")


def read_snapshots(disk: Disk, header: Header) -> list[Snapshot]:
    """The checked internal snapshots of the image, in their order; raises Error."""
    name = disk.description or "the image"
    try:
        return _snapshots(disk, header)
    except _Bad as bad:
        raise Error(f"{name}: in the snapshot table: {bad}") from None


def _snapshots(disk: Disk, header: Header) -> list[Snapshot]:
    if header.snapshots_count > _MAX_SNAPSHOTS:
        raise _Bad(f"{header.snapshots_count} snapshots (at most {_MAX_SNAPSHOTS} are allowed)")
    start = at = header.snapshots_offset
    if at % (1 << header.cluster_bits) or at >= disk.size:
        raise _Bad(f"it can't be at byte {at}")

    def take(length: int) -> bytes:
        nonlocal at
        if at + length > min(disk.size, start + _MAX_SNAPSHOT_TABLE):
            raise _Bad(f"it lies outside the image or is too long, at byte {at}")
        data = read_bytes(disk, at, length)
        at += length
        return data

    result = []
    for _ in range(header.snapshots_count):
        fields = _SNAPSHOT.unpack(take(_SNAPSHOT.size))
        l1_offset, l1_entries, id_length, name_length, *_, extra_length = fields
        if extra_length > _MAX_SNAPSHOT_EXTRA:
            raise _Bad(f"extra data of {extra_length} bytes")
        extra = take(extra_length)
        # Bytes 8 to 15 of the extra data; before version 3 they may be missing.
        size = int.from_bytes(extra[8:16], "big") if extra_length >= 16 else header.size
        identity, title = _text(take(id_length)), _text(take(name_length))
        result.append(Snapshot(identity, title, size, l1_offset, l1_entries))
        at = -(-at // 8) * 8
    return result


def check_snapshot(disk: Disk, header: Header, snapshot: Snapshot) -> None:
    """Raise Error if the disk of a snapshot can't be mapped."""
    try:
        _check_l1(disk, header, snapshot.l1_offset, snapshot.l1_entries, snapshot.size)
    except _Bad as bad:
        name = disk.description or "the image"
        raise Error(f"{name}: snapshot {snapshot.name!r}: {bad}") from None
