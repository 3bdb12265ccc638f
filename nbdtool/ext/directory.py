"""Directory blocks: linear directories, names sorted, no index."""

from __future__ import annotations

import struct
from typing import NamedTuple

from nbdtool.errors import Error
from nbdtool.ext.structures import (
    DIRECTORY_ENTRY,
    FILE_TYPE,
    I_LINKS_COUNT,
    I_SIZE_LO,
    LINK_MAX,
)
from nbdtool.ext.tree import Tree, check_links

_TYPES = bytes(FILE_TYPE.get(top, 0) for top in range(16))
_DIRECTORY = 2
_LINKS = struct.Struct("<H").pack_into
_SIZE = struct.Struct("<I").pack_into
# an entry of a given rec_len is packed, and its name padded, at one go
_PACK = {n: struct.Struct(f"<IHBB{n - 8}s").pack for n in range(12, 268, 4)}


class Directory(NamedTuple):
    """The blocks of a directory: bytes [start, end) of the blob, then zeroes."""

    ino: int
    blocks: int
    start: int
    end: int


def build(tree: Tree, block_size: int) -> tuple[bytearray, list[Directory], int]:
    """The contents of all directories as one blob, where each one is, the largest link count.

    Sets the size and the link count of the directories, and the link count of what has several
    names. Error: more links than the format can hold.
    """
    inodes = tree.inodes
    parents = tree.parents
    linked = dict.fromkeys(tree.linked, 0)
    blob = bytearray()
    directories = []
    reachable = tree.reachable()
    most = 0
    for ino, entries in tree.children.items():
        if reachable is not None and ino not in reachable:
            continue
        start = len(blob)
        links = 2
        blocks = 1
        pieces = [
            DIRECTORY_ENTRY.pack(ino, 12, 1, _DIRECTORY) + b".\0\0\0",
            DIRECTORY_ENTRY.pack(parents[ino], 12, 2, _DIRECTORY) + b"..\0\0",
        ]
        room = block_size - 24
        for name, child in sorted(entries.items()):
            length = len(name)
            need = length + 11 & ~3
            if need > room:
                pieces[-1] = _stretch(pieces[-1], room) + bytes(room)
                room = block_size
                blocks += 1
            kind = _TYPES[inodes[(child << 8) + 1] >> 4]
            pieces.append(_PACK[need](child, need, length, kind, name))
            room -= need
            if kind == _DIRECTORY:
                links += 1
            elif child in linked:
                linked[child] += 1
        pieces[-1] = _stretch(pieces[-1], room)
        blob += b"".join(pieces)
        directories.append(Directory(ino, blocks, start, len(blob)))
        if links > LINK_MAX:
            if not tree.extents:
                shown = tree.path(ino).decode(errors="backslashreplace") or "the root"
                raise Error(
                    f"{shown}: has {links - 2} subdirectories, this filesystem holds"
                    f" {LINK_MAX - 2} in a directory: use type=ext4"
                )
            links = 1  # dir_nlink
        at = ino << 8
        _LINKS(inodes, at + I_LINKS_COUNT, links)
        _SIZE(inodes, at + I_SIZE_LO, blocks * block_size)
        most = max(most, links)
    for ino, count in linked.items():
        _LINKS(inodes, (ino << 8) + I_LINKS_COUNT, check_links(tree, ino, count))
    return blob, directories, most


def _stretch(entry: bytes, room: int) -> bytes:
    """The entry with `room` bytes more in its rec_len, up to the end of the block."""
    return entry[:4] + struct.pack("<H", len(entry) + room) + entry[6:]
