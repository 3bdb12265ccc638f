"""Members of RAID arrays: Linux' own (md), and those of firmware that md drives as well."""

from __future__ import annotations

import struct

from nbdtool.disk import Disk, read_bytes

_MAGIC = 0xA92B4EFC
_VERSION_1 = struct.Struct("<II")  # magic, major version
_ENDS = (  # of the last bytes of a disk: how far from its end, and what is there
    (1024, b"Intel Raid ISM Cfg Sig. "),
    (512, b"\xde\x11\xde\x11"),  # DDF, which is big-endian
    (512, b"\x11\xde\x11\xde"),
)


def is_raid_member(disk: Disk) -> bool:
    """Whether there is a superblock of an md array, of version 0.90, 1.0, 1.1 or 1.2, or its like.

    Source: include/uapi/linux/raid/md_p.h of Linux, and md(4), for where each version has it.
    """
    sectors = disk.size // 512
    places = [0, 4096]  # 1.1 and 1.2
    if sectors >= 24:
        places.append(((sectors - 16) & ~7) * 512)  # 1.0
    for at in places:
        if at + _VERSION_1.size <= disk.size:
            magic, version = _VERSION_1.unpack(read_bytes(disk, at, _VERSION_1.size))
            if magic == _MAGIC and version == 1:
                return True
    at = (disk.size & ~0xFFFF) - 0x10000  # 0.90: in the last 64 KiB that begin at a multiple
    if at >= 0:
        magic = read_bytes(disk, at, 4)
        if magic in (struct.pack("<I", _MAGIC), struct.pack(">I", _MAGIC)):
            return True
    return any(
        disk.size >= back and read_bytes(disk, disk.size - back, len(sign)) == sign
        for back, sign in _ENDS
    )
