"""The GUID partition table, written and read (UEFI specification, chapter 5)."""

from __future__ import annotations

import struct
import uuid
import zlib
from collections.abc import Callable, Sequence
from typing import NamedTuple

from nbdtool.errors import Error

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


def read(size: int, pread: Callable[[int, int], bytes]) -> list[tuple[int, Partition]]:
    """The partitions of a disk and their numbers, from 1. pread(offset, length) reads the disk.

    The backup table is read when the primary one is damaged. Error: there is no valid table.
    """
    last = size // SECTOR - 1
    failure = "no GUID partition table"
    for lba in (1, last):
        if 0 < lba <= last:
            try:
                return _read_table(lba, last, pread)
            except ValueError as error:
                if lba == 1 or failure == "no GUID partition table":
                    failure = str(error)
    raise Error(failure)


def _read_table(
    lba: int, last: int, pread: Callable[[int, int], bytes]
) -> list[tuple[int, Partition]]:
    sector = pread(lba * SECTOR, SECTOR)
    fields = _HEADER.unpack_from(sector)
    signature, _, length, checksum, _, this, _, _, _, _, table, count, size, table_crc = fields
    if signature != _SIGNATURE:
        raise ValueError("no GUID partition table")
    if not _HEADER.size <= length <= SECTOR or this != lba:
        raise ValueError("damaged GUID partition table: bad header")
    if zlib.crc32(sector[:16] + bytes(4) + sector[20:length]) != checksum:
        raise ValueError("damaged GUID partition table: wrong checksum of the header")
    if not _ENTRY.size <= size <= _MAX_ENTRY_SIZE or not 0 < count <= _MAX_ENTRIES:
        raise ValueError(f"unusual GUID partition table: {count} entries of {size} bytes")
    if table < 2 or table + -(-count * size // SECTOR) > last + 1:
        raise ValueError("damaged GUID partition table: entries outside the disk")
    data = pread(table * SECTOR, count * size)
    if zlib.crc32(data) != table_crc:
        raise ValueError("damaged GUID partition table: wrong checksum of the entries")
    found = []
    for index in range(count):
        kind, guid, first, end, attributes, name = _ENTRY.unpack_from(data, index * size)
        if not any(kind):
            continue
        if not 0 < first <= end <= last:
            raise ValueError(f"partition {index + 1} lies outside the disk")
        found.append(
            (
                index + 1,
                Partition(
                    first * SECTOR,
                    (end - first + 1) * SECTOR,
                    str(uuid.UUID(bytes_le=kind)),
                    str(uuid.UUID(bytes_le=guid)),
                    name.decode("utf-16-le", "replace").split("\0")[0],
                    attributes,
                ),
            )
        )
    return found
