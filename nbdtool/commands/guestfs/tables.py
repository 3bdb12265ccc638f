"""The partitions that Linux sees on a disk, or a doubt where it may see others than we do.

Source: block/partitions/ of Linux (core.c, efi.c, msdos.c and their neighbours).
"""

from __future__ import annotations

import struct
from typing import NamedTuple

from nbdtool import gpt, mbr
from nbdtool.disk import Disk, read_bytes
from nbdtool.errors import Error, Uncertain
from nbdtool.gpt import Partition

_MOST = 255  # partitions of a disk
# Where the tables that aren't read here have a magic number: Mac, SGI, OSF, Sun, Ultrix
_OTHERS = (
    (0, b"ER"),
    (0, b"\x0b\xe5\xa9\x41"),
    (64, b"\x57\x45\x56\x82"),
    (508, b"\xda\xbe"),
    (16312, b"\x57\x29\x03\x00"),
)
_AMIGA, _AMIGA_BLOCKS = b"RDSK", 16
_ENTRY = struct.Struct("<B3xB3xII")  # boot indicator, type, first sector, number of sectors
_EXTENDED = (0x05, 0x0F, 0x85)
# Types with tables of their own inside, or a database elsewhere: BSD, UnixWare, Minix, and the
# dynamic disks of Windows
_NESTED = (0xA5, 0xA6, 0xA9, 0x63, 0x81, 0x42)
_SOLARIS = 0x82  # or swap, unless there is this in the partition
_SOLARIS_PLACE, _SOLARIS_MAGIC = 512 + 12, b"\xee\xde\x0d\x60"
_DYNAMIC = ("5808c8aa-7e8f-42e0-85d2-e1e90434cfb3", "af9b60a0-1431-4f62-bc68-3311714a69ad")


class Part(NamedTuple):
    """Where a partition is, in bytes."""

    start: int
    length: int
    extended: bool = False  # it only holds logical ones; Linux shows its first sectors
    dynamic: bool = False  # of a dynamic disk of Windows, whose volumes are elsewhere


def read_parts(disk: Disk, sector: int) -> dict[int, Part]:
    """The partitions by number; none if there is no table. Raises Uncertain and OSError."""
    block = read_bytes(disk, 0, 512) if disk.size >= 512 else b""
    entries = list(_ENTRY.iter_unpack(block[446:510]))
    if block[510:] != b"\x55\xaa" or any(boot & 0x7F for boot, *_ in entries):
        if block[510:] != b"\x55\xaa" and any(block):
            raise _doubt(disk, "it begins with what may be a partition table")
        _check_no_other(disk)  # nothing, or the boot sector of a filesystem
        return {}
    try:
        if any(kind == int(mbr.PROTECTIVE, 16) for _, kind, *_ in entries):
            parts = _of_gpt(disk, sector, entries)
        else:
            parts = _of_mbr(disk, sector, entries)
    except Uncertain:
        raise
    except Error as exc:
        raise Uncertain(str(exc)) from None
    for number, part in parts.items():
        if part.start + part.length > disk.size or number > _MOST:
            raise _doubt(disk, f"partition {number} ends after the disk, or is one too many")
    return parts


def _doubt(disk: Disk, reason: str) -> Uncertain:
    return Uncertain(f"{disk.description}: {reason}")


def _check_no_other(disk: Disk) -> None:
    start = read_bytes(disk, 0, min(32 << 10, disk.size))
    blocks = range(0, _AMIGA_BLOCKS * 512, 512)
    places = (*_OTHERS, *((at, _AMIGA) for at in blocks))
    if any(start.startswith(magic, at) for at, magic in places):
        raise _doubt(disk, "it has a partition table that isn't read here")


def _of_gpt(disk: Disk, sector: int, entries: list[tuple[int, int, int, int]]) -> dict[int, Part]:
    if not any(kind == int(mbr.PROTECTIVE, 16) and start == 1 for _, kind, start, _ in entries):
        raise _doubt(disk, "its protective MBR is unusual")
    partitions = gpt.read(disk, sector, backup=False)
    first, last, entry = gpt.limits(disk, sector)
    if entry != 128 or not first <= last < disk.size // sector:
        raise _doubt(disk, "its GUID partition table is unusual")
    return {n: Part(p.start, p.length, dynamic=p.type in _DYNAMIC) for n, p in partitions.items()}


def _of_mbr(disk: Disk, sector: int, entries: list[tuple[int, int, int, int]]) -> dict[int, Part]:
    kinds = [kind for _, kind, _, count in entries if count]
    if any(kind == 0 or kind in _NESTED for kind in kinds):
        raise _doubt(disk, "it has partitions of a type that Linux looks into, or none")
    if len([kind for kind in kinds if kind in _EXTENDED]) > 1:
        raise _doubt(disk, "it has several extended partitions")
    partitions = mbr.read(disk, sector) or {}
    for partition in partitions.values():
        if int(partition.type, 16) in _NESTED or _is_solaris(disk, partition):
            raise _doubt(disk, "it has partitions that have partitions")
    parts = {number: Part(*partition[:2]) for number, partition in partitions.items()}
    for number, (_, kind, start, count) in enumerate(entries, 1):
        if kind in _EXTENDED and count:
            shown = min(count * sector, max(sector, 1024))
            parts[number] = Part(start * sector, shown, extended=True)
    return dict(sorted(parts.items()))


def _is_solaris(disk: Disk, partition: Partition) -> bool:
    at = partition.start + _SOLARIS_PLACE
    return (
        int(partition.type, 16) == _SOLARIS
        and at + 4 <= disk.size
        and read_bytes(disk, at, 4) == _SOLARIS_MAGIC
    )
