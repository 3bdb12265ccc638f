"""Extended attributes: in the inode where they fit and old drivers look, else in a shared block.

Source: the Linux kernel, Documentation/filesystems/ext4/attributes.rst; ACLs as in
fs/ext4/acl.h (on disk) and include/uapi/linux/posix_acl_xattr.h (the system calls).
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterable
from typing import NamedTuple, Optional

from nbdtool.errors import Error
from nbdtool.ext.structures import (
    INODE_SIZE,
    XATTR_ENTRY,
    XATTR_HEADER,
    XATTR_MAGIC,
    XATTR_MAX_REFERENCES,
    XATTR_OFFSET,
    XATTR_PREFIXES,
)
from nbdtool.ext.tree import Tree

_ACLS = (2, 3)  # e_name_index of the access and the default ACL
_MAGIC = struct.Struct("<I")
_TERMINATOR = 4  # bytes
_NAMED_TAGS = (0x02, 0x08)  # ACL_USER, ACL_GROUP: whose entries have an id
_IN_INODE = INODE_SIZE - XATTR_OFFSET - 4


class Attribute(NamedTuple):
    """An attribute as it is on disk; sorted as a block wants it."""

    name_index: int
    name_length: int
    name: bytes
    value: bytes


class Block(NamedTuple):
    """A block of attributes: `head` at its start, `tail` at its end, zeroes between."""

    head: bytes
    tail: bytes
    inodes: list[int]


def attribute(name: bytes, value: bytes) -> Optional[Attribute]:
    """An attribute by its full name, or None if ext filesystems have no such namespace."""
    for prefix, index in XATTR_PREFIXES.items():
        if index in _ACLS:
            if name == prefix:
                return Attribute(index, 0, b"", _disk_acl(value))
        elif name.startswith(prefix) and len(name) > len(prefix):
            suffix = name[len(prefix) :]
            return Attribute(index, len(suffix), suffix, value)
    return None


def _disk_acl(value: bytes) -> bytes:
    """The system call's form of an ACL (version 2) as the one on disk (version 1)."""
    if len(value) % 8 != 4 or value[:4] != b"\2\0\0\0":
        raise ValueError("the access control list is malformed")
    parts = [struct.pack("<I", 1)]
    for tag, permissions, number in struct.iter_unpack("<HHI", value[4:]):
        parts.append(struct.pack("<HH", tag, permissions))
        if tag in _NAMED_TAGS:
            parts.append(struct.pack("<I", number))
    return b"".join(parts)


_ACL_TAGS = {  # (kind, whether it names someone): tag
    (b"user", False): 0x01,
    (b"user", True): 0x02,
    (b"group", False): 0x04,
    (b"group", True): 0x08,
    (b"mask", False): 0x10,
    (b"other", False): 0x20,
}
_ACL_NOBODY = 0xFFFFFFFF


def text_acl(text: bytes) -> bytes:
    """The system call's form of an ACL in text (acl(5)).

    Users and groups are given by number, or by a name with the number in a fourth field, or else
    by a name that this host knows. ValueError: it is malformed, or names somebody unknown.
    """
    entries = []
    for line in text.replace(b",", b"\n").splitlines():
        line = line.partition(b"#")[0].strip()
        if not line:
            continue
        kind, name, permissions, *more = [*line.split(b":"), b"", b""][
            : max(3, line.count(b":") + 1)
        ]
        number = more[0] if more else name
        tag = _ACL_TAGS.get((kind, bool(name)))
        number = _number(kind, number) if name else b"%d" % _ACL_NOBODY
        if tag is None or not number.isdigit() or int(number) > _ACL_NOBODY:
            raise ValueError(f"the access control list entry {line[:100]!r} isn't understood")
        bits = sum(
            bit for bit, letter in ((4, b"r"), (2, b"w"), (1, b"x")) if letter in permissions
        )
        entries.append((tag, int(number), bits))
    packed = (struct.pack("<HHI", tag, bits, number) for tag, number, bits in sorted(entries))
    return struct.pack("<I", 2) + b"".join(packed)


def _number(kind: bytes, name: bytes) -> bytes:
    """The id of a user or group as digits; the name itself if nobody has it."""
    if name.isdigit():
        return name
    import grp
    import pwd

    try:
        if kind == b"user":
            return b"%d" % pwd.getpwnam(os.fsdecode(name)).pw_uid
        return b"%d" % grp.getgrnam(os.fsdecode(name)).gr_gid
    except (KeyError, ValueError):
        return name


def store(tree: Tree, block_size: int, inodes: Iterable[int], *, in_inode: bool) -> list[Block]:
    """Put the attributes of these inodes into the inodes, and answer what needs blocks.

    Error: those of a file are larger than an inode and a block.
    """
    shared: dict[tuple[Attribute, ...], Block] = {}
    blocks = []
    for ino in inodes:
        attributes = tree.xattrs[ino]
        inside: tuple[Attribute, ...] = ()
        if in_inode:
            inside, attributes = _divide(attributes, block_size)
        if inside:
            at = (ino << 8) + XATTR_OFFSET
            tree.inodes[at : at + _IN_INODE + 4] = _inode_body(inside)
        if attributes:
            block = shared.get(attributes)
            if block is None or len(block.inodes) == XATTR_MAX_REFERENCES:
                if _size(attributes) > block_size - XATTR_HEADER.size:
                    name = tree.path(ino).decode(errors="backslashreplace") or "the root"
                    raise Error(
                        f"{name}: its extended attributes need {_size(attributes)} bytes, more"
                        f" than a block of {block_size} bytes holds: leave some out"
                    )
                block = shared[attributes] = Block(*_block_parts(attributes, block_size), [])
                blocks.append(block)
            block.inodes.append(ino)
    return blocks


def block_head(block: Block) -> bytes:
    """The start of a block, once all of its inodes are known."""
    return block.head[:4] + struct.pack("<I", len(block.inodes)) + block.head[8:]


def _divide(
    attributes: tuple[Attribute, ...], block_size: int
) -> tuple[tuple[Attribute, ...], tuple[Attribute, ...]]:
    """What goes into the inode, and what into a block: all into one of them if that can be."""
    if _size(attributes) <= _IN_INODE:
        return attributes, ()
    if _size(attributes) <= block_size - XATTR_HEADER.size:
        return (), attributes
    inside: tuple[Attribute, ...] = ()
    outside = attributes
    for one in sorted(attributes, key=lambda one: -_size((one,))):
        if _size((*inside, one)) <= _IN_INODE:
            inside = (*inside, one)
            outside = tuple(other for other in outside if other is not one)
    return tuple(sorted(inside)), outside


def _padded(length: int) -> int:
    return length + 3 & ~3


def _size(attributes: tuple[Attribute, ...]) -> int:
    return _TERMINATOR + sum(
        XATTR_ENTRY.size + _padded(one.name_length) + _padded(len(one.value)) for one in attributes
    )


def _inode_body(attributes: tuple[Attribute, ...]) -> bytes:
    """Magic, entries, values; value offsets count from the first entry, hashes may be 0."""
    entries, values = _entries(attributes, _IN_INODE, [0] * len(attributes))
    gap = _IN_INODE - len(entries) - len(values)
    return _MAGIC.pack(XATTR_MAGIC) + entries + bytes(gap) + values


def _block_parts(attributes: tuple[Attribute, ...], block_size: int) -> tuple[bytes, bytes]:
    hashes = [_entry_hash(one) for one in attributes]
    total = 0
    for one in hashes:
        total = (total << 16 ^ total >> 16 ^ one) & 0xFFFFFFFF
    if 0 in hashes:
        total = 0
    header = XATTR_HEADER.pack(XATTR_MAGIC, 1, 1, total, 0)
    entries, values = _entries(attributes, block_size, hashes)
    return header + entries, values


def _entries(attributes: tuple[Attribute, ...], end: int, hashes: list[int]) -> tuple[bytes, bytes]:
    """The entries, and the values that lie before offset `end`, the first one last."""
    entries, values = [], []
    for (index, length, name, value), number in zip(attributes, hashes):
        if value:
            end -= _padded(len(value))
            values.append(value.ljust(_padded(len(value)), b"\0"))
        offset = end if value else 0
        entries.append(XATTR_ENTRY.pack(length, index, offset, 0, len(value), number))
        entries.append(name.ljust(_padded(length), b"\0"))
    return b"".join(entries), b"".join(reversed(values))


def _entry_hash(one: Attribute) -> int:
    """e_hash; the bytes of the name are signed, as old tools on most machines take them."""
    number = 0
    for (char,) in struct.iter_unpack("b", one.name):
        number = (number << 5 ^ number >> 27 ^ char) & 0xFFFFFFFF
    for (word,) in struct.iter_unpack("<I", one.value.ljust(_padded(len(one.value)), b"\0")):
        number = (number << 16 ^ number >> 16 ^ word) & 0xFFFFFFFF
    return number
