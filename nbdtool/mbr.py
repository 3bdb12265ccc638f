"""The MBR partition table, read: primary partitions, and logical ones in extended partitions.

There is no specification; this follows what Linux does (block/partitions/msdos.c).
"""

from __future__ import annotations

import struct

from nbdtool.disk import Disk, read_bytes
from nbdtool.errors import Error
from nbdtool.gpt import Partition

PROTECTIVE = "ee"  # the type of the partition that stands for a GUID partition table
TYPES = {
    "linux": "83",
    "linux-generic": "83",
    "swap": "82",
    "lvm": "8e",
    "raid": "fd",
    "esp": "ef",
    "ntfs": "07",
    "fat32": "0c",
}
_EXTENDED = (0x05, 0x0F, 0x85)
_ENTRY = struct.Struct("<B3xB3xII")  # boot indicator, type, first sector, number of sectors
_MAX_LOGICAL = 256  # partitions, and links of their chain


def read(disk: Disk, sector: int = 512) -> dict[int, Partition] | None:
    """The partitions by number: primary ones from 1, logical ones from 5; None if there's no table.

    They may end past the end of the disk. type is two hexadecimal digits. Raises Error if the chain
    of logical partitions is broken. Extended partitions themselves are left out.
    """
    table = _table(disk, 0)
    if table is None or any(boot & 0x7F for boot, *_ in table):
        return None  # nothing, or the boot sector of a filesystem
    (signature,) = struct.unpack("<I", read_bytes(disk, 440, 4))
    found: dict[int, Partition] = {}

    def add(number: int, kind: int, start: int, count: int) -> None:
        guid = f"{signature:08x}-{number:02x}"
        found[number] = Partition(start * sector, count * sector, f"{kind:02x}", guid)

    logical = 5
    for number, (_, kind, start, count) in enumerate(table, 1):
        if kind in _EXTENDED and count:
            for entry in _chain(disk, sector, start, count):
                add(logical, *entry)
                logical += 1
                if logical > _MAX_LOGICAL:
                    raise Error(f"{disk.description}: more than {_MAX_LOGICAL} partitions")
        elif kind and count:
            add(number, kind, start, count)
    return found


def _table(disk: Disk, start: int) -> list[tuple[int, int, int, int]] | None:
    """The four entries of the table in the sector at byte `start`, if there is one."""
    if start + 512 > disk.size:
        return None
    block = read_bytes(disk, start, 512)
    if block[510:] != b"\x55\xaa":
        return None
    return list(_ENTRY.iter_unpack(block[446:510]))


def _chain(disk: Disk, sector: int, extended: int, length: int) -> list[tuple[int, int, int]]:
    """(type, first sector, sectors) of the logical partitions of an extended one."""
    found = []
    seen: set[int] = set()
    link: int | None = extended
    room = length  # sectors of what the link leads to
    while link is not None:
        table = _table(disk, link * sector)
        if table is None:
            if link == extended and link * sector < disk.size:
                break  # never used
            raise Error(
                f"{disk.description}: the chain of logical partitions leads to sector {link},"
                " where none is described"
            )
        if link in seen or len(seen) > _MAX_LOGICAL:
            raise Error(f"{disk.description}: the chain of logical partitions has a loop")
        seen.add(link)
        following, this_room = None, room
        for index, (_, kind, start, count) in enumerate(table):
            if kind in _EXTENDED and count:
                if following is None:
                    following, room = extended + start, count
            elif count:  # of whatever type: Linux numbers those of none as well
                # The last two entries may have garbage in them.
                inside = start + count <= this_room
                inside &= extended <= link + start <= extended + length - count
                if index < 2 or inside:
                    found.append((kind, link + start, count))
        link = following
    return found
