"""The GUID partition table, written and read (UEFI specification, chapter 5)."""

from __future__ import annotations

import struct
import uuid
import zlib
from collections.abc import Sequence
from typing import NamedTuple

from nbdtool.disk import Disk, read_bytes
from nbdtool.errors import Error, warn

SECTOR = 512
ALIGNMENT = 1 << 20  # bytes
_ENTRIES = 128
_ENTRY = struct.Struct("<16s16sQQQ72s")
# signature, revision, header size, header CRC, reserved, this LBA, other LBA, first usable, last
# usable, disk GUID, LBA of the entries, their number, their size, their CRC
_HEADER = struct.Struct("<8sIIIIQQQQ16sQIII")
_SIGNATURE = b"EFI PART"
_REVISION = 0x10000
_TABLE_SECTORS = _ENTRIES * _ENTRY.size // SECTOR  # 32
_MAX_ENTRIES, _MAX_ENTRY_SIZE = 4096, 4096  # what we are willing to read

# The Discoverable Partitions Specification's names, as systemd-repart spells them
TYPES = {
    "linux": "0fc63daf-8483-4772-8e79-3d69d8477de4",
    "linux-generic": "0fc63daf-8483-4772-8e79-3d69d8477de4",
    "esp": "c12a7328-f81f-11d2-ba4b-00a0c93ec93b",
    "xbootldr": "bc13c2ff-59e6-4262-a352-b275fd6f7172",
    "swap": "0657fd6d-a4ab-43c4-84e5-0933c84b4f4f",
    "home": "933ac7e1-2eb4-4f13-b844-0e14e2aef915",
    "srv": "3b8f8425-20e0-4f3b-907f-1a25a76f98e8",
    "var": "4d21b016-b534-45c2-a9fb-5c16e091fd2d",
    "tmp": "7ec6f557-3bc5-4aca-b293-16ef5df639d1",
    "root-x86": "44479540-f297-41b2-9af7-d131d5f0458a",
    "root-x86-64": "4f68bce3-e8cd-4db1-96e7-fbcaf984b709",
    "root-arm": "69dad710-2ce4-4e3c-b16c-21a1d49abed3",
    "root-arm64": "b921b045-1df0-41c3-af44-4c6f280d3fae",
    "root-riscv64": "72ec70a6-cf74-40e6-bd49-4bda08e8f224",
    "root-ppc64-le": "c31c45e6-3f39-412e-80fb-4809c4980599",
    "root-s390x": "5eead9a9-fe09-4a1e-a1d7-520d00531306",
    "root-loongarch64": "77055800-792c-4f94-b39a-98c91b762bb6",
    "usr-x86-64": "8484680c-9521-48c6-9c11-b0720656f69e",
    "usr-arm64": "b0e01050-ee5f-4390-949a-9101b17104e9",
}


class Partition(NamedTuple):
    """A partition: bytes from the start of the disk; GUIDs in lower case."""

    start: int
    length: int
    type: str = TYPES["linux"]
    guid: str = ""
    name: str = ""
    attributes: int = 0


def disk_size(end: int) -> int:
    """The size in bytes, whole MiB, of a disk whose last partition ends at byte `end`."""
    return -(-(end + (_TABLE_SECTORS + 1) * SECTOR) // ALIGNMENT) * ALIGNMENT


def tables(size: int, guid: str, partitions: Sequence[Partition]) -> tuple[bytes, bytes]:
    """The first 34 sectors (protective MBR, header, entries) and the last 33 (entries, header)."""
    last = size // SECTOR - 1
    entries = b"".join(
        _ENTRY.pack(
            uuid.UUID(partition.type).bytes_le,
            uuid.UUID(partition.guid).bytes_le,
            partition.start // SECTOR,
            (partition.start + partition.length) // SECTOR - 1,
            partition.attributes,
            partition.name.encode("utf-16-le")[:72],
        )
        for partition in partitions
    ).ljust(_ENTRIES * _ENTRY.size, b"\0")

    def header(this: int, other: int, table: int) -> bytes:
        first_usable, last_usable = 2 + _TABLE_SECTORS, last - 1 - _TABLE_SECTORS
        fields = [_SIGNATURE, _REVISION, _HEADER.size, 0, 0, this, other, first_usable]
        fields += [last_usable, uuid.UUID(guid).bytes_le, table, _ENTRIES, _ENTRY.size]
        fields += [zlib.crc32(entries)]
        fields[3] = zlib.crc32(_HEADER.pack(*fields))
        return _HEADER.pack(*fields).ljust(SECTOR, b"\0")

    primary = _protective_mbr(last) + header(1, last, 2) + entries
    backup = entries + header(last, 1, last - _TABLE_SECTORS)
    return primary, backup


def _protective_mbr(last: int) -> bytes:
    """One partition of type 0xEE over the whole disk (section 5.2.3)."""
    record = struct.pack(
        "<B3sB3sII", 0, b"\x00\x02\x00", 0xEE, b"\xff\xff\xff", 1, min(last, 0xFFFFFFFF)
    )
    return bytes(446) + record + bytes(48) + b"\x55\xaa"


def sector_size(disk: Disk) -> int | None:
    """The size of the sectors that a GUID partition table counts in; None if there is no table."""
    for sector in 512, 4096:
        for lba in 1, disk.size // sector - 1:
            start = lba * sector
            inside = lba > 0 and start + sector <= disk.size
            if inside and read_bytes(disk, start, len(_SIGNATURE)) == _SIGNATURE:
                return sector
    return None


def read(disk: Disk, sector: int = SECTOR, *, backup: bool = True) -> dict[int, Partition]:
    """The partitions by number, from 1; they may end past the end of the disk.

    The backup table is read, with a warning, when the primary one is damaged, unless backup is
    false. Raises Error if there is no valid table.
    """
    failures: list[str] = []
    for lba in (1, disk.size // sector - 1) if backup else (1,):
        try:
            partitions = _read_table(disk, sector, lba)
        except ValueError as error:
            failures.append(str(error))
            continue
        if failures:
            warn(f"{disk.description}: {failures[0]}; the backup at its end is used")
        return partitions
    if backup:
        failures[0] += f" (and in the backup: {failures[1]})"
    raise Error(f"{disk.description}: {failures[0]}")


def limits(disk: Disk, sector: int = SECTOR) -> tuple[int, int, int]:
    """What a valid primary header says: first and last usable sector, bytes of an entry."""
    fields = _HEADER.unpack(read_bytes(disk, sector, _HEADER.size))
    return fields[7], fields[8], fields[12]


def _read_table(disk: Disk, sector: int, lba: int) -> dict[int, Partition]:
    if not 1 <= lba < disk.size // sector:
        raise ValueError("the disk is too small for a GUID partition table")
    block = read_bytes(disk, lba * sector, sector)
    fields = _HEADER.unpack_from(block)
    signature, _, length, checksum, _, this, _, _, _, _, table, count, size, table_crc = fields
    if signature != _SIGNATURE:
        raise ValueError("no GUID partition table")
    if not _HEADER.size <= length <= sector or this != lba:
        raise ValueError("the GUID partition table is damaged: bad header")
    if zlib.crc32(block[:16] + bytes(4) + block[20:length]) != checksum:
        raise ValueError("the GUID partition table is damaged: wrong checksum of its header")
    # 128 * 2^n bytes (section 5.3.2)
    if not _ENTRY.size <= size <= _MAX_ENTRY_SIZE or size & (size - 1) or count > _MAX_ENTRIES:
        raise ValueError(f"an unusual GUID partition table: {count} entries of {size} bytes")
    if table < 2 or table * sector + count * size > disk.size:
        raise ValueError("the GUID partition table is damaged: its entries lie outside the disk")
    data = read_bytes(disk, table * sector, count * size)
    if zlib.crc32(data) != table_crc:
        raise ValueError("the GUID partition table is damaged: wrong checksum of its entries")
    found = {}
    for number in range(1, count + 1):
        entry = _ENTRY.unpack_from(data, (number - 1) * size)
        kind, guid, first, last, attributes, name = entry
        if not any(kind):
            continue
        if not 0 < first <= last:
            raise ValueError(f"partition {number} ends before it begins")
        found[number] = Partition(
            first * sector,
            (last - first + 1) * sector,
            str(uuid.UUID(bytes_le=kind)),
            str(uuid.UUID(bytes_le=guid)),
            name.decode("utf-16-le", "replace").split("\0")[0],
            attributes,
        )
    return found
