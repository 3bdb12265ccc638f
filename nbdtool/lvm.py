"""LVM2's labels and metadata, read: from physical volumes to what is where on them.

Source: LVM2's lib/label/label.h, lib/format_text/layout.h and format-text.c for the binary
structures, lib/format_text/import_vsn1.c and vgcfgbackup(8) for the text, lvm.conf(5) for its
syntax. Sizes in the text are in sectors of 512 bytes, and extents.
"""

from __future__ import annotations

import struct
import zlib
from typing import Any, NamedTuple, Optional

from nbdtool.disk import Disk, read_bytes
from nbdtool.errors import Error
from nbdtool.lvm_text import parse
from nbdtool.mdraid import is_raid_member

SECTOR = 512
_LABEL = struct.Struct("<8sQII8s")  # signature, its sector, checksum, offset of what follows, type
_AREA = struct.Struct("<QQ")  # offset, size
_MDA = struct.Struct("<I16sIQQ")  # checksum, magic, version, start, size
_MDA_MAGIC = b" LVM2 x[5A%r0N*>"
_MDA_HEADER = 512
_LOCATION = struct.Struct("<QQII")  # offset, size, checksum, flags
_IGNORED = 1  # a metadata area that is kept in reserve
_MAX_TEXT = 4 << 20  # bytes of metadata that we are willing to parse


class PhysicalVolume(NamedTuple):
    """A device with LVM's label.

    `data` is where its extents begin, in bytes. `metadata` has the texts of its areas, none if the
    others of the group have it all; `damage` says what is wrong with them.
    """

    disk: Disk
    id: str
    data: Optional[int]
    metadata: list[bytes]
    damage: Optional[str]


def read_physical_volume(disk: Disk) -> PhysicalVolume | None:
    """What a device's label says; None if it has none. Raises Error for a damaged label."""
    if is_raid_member(disk):
        return None  # what LVM sees is the array
    start = read_bytes(disk, 0, min(4 * SECTOR, disk.size))
    for at in range(0, len(start) - SECTOR + 1, SECTOR):
        signature, sector, checksum, offset, kind = _LABEL.unpack_from(start, at)
        if signature == b"LABELONE" and sector == at // SECTOR:
            block = start[at : at + SECTOR]
            if _checksum(block[20:]) == checksum and kind == b"LVM2 001":
                return _physical_volume(disk, block, offset)
    return None


def _checksum(data: bytes) -> int:
    """CRC-32 with LVM's initial value, and not inverted."""
    return zlib.crc32(data, 0xF597A6CF ^ 0xFFFFFFFF) ^ 0xFFFFFFFF


def _physical_volume(disk: Disk, block: bytes, offset: int) -> PhysicalVolume:
    """From the sector of the label, and where its pv_header begins there."""
    at = offset + 40
    lists: list[list[tuple[int, int]]] = [[], []]  # data areas, metadata areas
    for areas in lists:
        while True:
            if offset < _LABEL.size or at + _AREA.size > SECTOR:
                raise Error(f"{disk.description}: LVM's label is damaged: areas outside of it")
            area = _AREA.unpack_from(block, at)
            at += _AREA.size
            if not area[0]:
                break
            areas.append(area)
    data, places = lists
    identity = block[offset : offset + 32].decode("ascii", "replace")
    metadata, damage = [], None
    for place in places:
        try:
            text = _read_area(disk, *place)
        except Error as exc:
            damage = str(exc)
        else:
            if text is not None:
                metadata.append(text)
    first = data[0][0] if len(data) == 1 else None
    return PhysicalVolume(disk, identity, first, metadata, damage)


def _read_area(disk: Disk, start: int, size: int) -> bytes | None:
    """The text in a metadata area; None if there is none."""

    def damaged(what: str) -> Error:
        return Error(f"{disk.description}: LVM's metadata area at byte {start}: {what}")

    if size < 2 * _MDA_HEADER or start + size > disk.size:
        raise damaged("outside the device")
    header = read_bytes(disk, start, _MDA_HEADER)
    checksum, magic, version, own_start, own_size = _MDA.unpack_from(header)
    if _checksum(header[4:]) != checksum:
        raise damaged("wrong checksum of its header")
    if (magic, version, own_start, own_size) != (_MDA_MAGIC, 1, start, size):
        raise damaged("not what its header says")
    offset, length, checksum, flags = _LOCATION.unpack_from(header, _MDA.size)
    if not offset or flags & _IGNORED:
        return None
    room = size - _MDA_HEADER
    if not _MDA_HEADER <= offset < size or not 0 < length <= min(room, _MAX_TEXT):
        raise damaged(f"{length} bytes of text at {offset}")
    ahead = min(length, size - offset)  # the text may go on at the start of the area
    text = read_bytes(disk, start + offset, ahead)
    text += read_bytes(disk, start + _MDA_HEADER, length - ahead)
    if _checksum(text) != checksum:
        raise damaged("wrong checksum of the text")
    return text


class Segment(NamedTuple):
    """`extents` of a logical volume in stripes of `stripe` bytes.

    `areas` has the name of a physical volume in the metadata and its first extent, for each
    stripe; there is one for a linear segment.
    """

    extents: int
    stripe: int
    areas: list[tuple[str, int]]


class Member(NamedTuple):
    """A physical volume as its group knows it; bytes, and the number of extents."""

    id: str
    start: int
    extents: int
    missing: bool


class LogicalVolume(NamedTuple):
    """`size` in bytes; `doubt` says why it isn't only its segments, which are then empty."""

    size: int
    segments: list[Segment]
    doubt: Optional[str]


class Group(NamedTuple):
    """A volume group: `extent` is the size of its extents in bytes, `doubt` as a volume's."""

    name: str
    id: str
    number: int  # of the version of the metadata
    extent: int
    members: dict[str, Member]
    volumes: dict[str, LogicalVolume]  # those that users see
    doubt: Optional[str]


_NAME = frozenset(b"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789+_.-".decode())
_KNOWN_VOLUME = {"READ", "WRITE", "VISIBLE", "FIXED_MINOR", "ACTIVATION_SKIP", "NOAUTOACTIVATE"}
_KNOWN_GROUP = {"RESIZEABLE", "READ", "WRITE", "NOAUTOACTIVATE"}
_KNOWN_MEMBER = {"ALLOCATABLE"}


def read_group(text: bytes) -> Group:
    """The volume group that metadata describe. Raises Error if they are damaged."""
    tree = parse(text)
    if tree.get("contents") != "Text Format Volume Group" or tree.get("version") != 1:
        raise Error("it is no description of a volume group")
    names = [name for name, value in tree.items() if isinstance(value, dict)]
    if len(names) != 1:
        raise Error(f"it describes {len(names)} volume groups")
    (name,) = names
    group = _Section(tree[name], name)
    flags = group.flags()
    extent = group.number("extent_size", 1, 1 << 32) * SECTOR
    members = {}
    for key, value in group.section("physical_volumes").items():
        volume = _Section(value, key)
        start, count = volume.number("pe_start"), volume.number("pe_count")
        unknown = volume.flags() - _KNOWN_MEMBER
        members[key] = Member(volume.identity(), start * SECTOR, count, bool(unknown))
    doubt = None
    unknown = flags - _KNOWN_GROUP
    if unknown:
        doubt = f"the volume group is {', '.join(sorted(unknown))}"
    if group.tree.get("lock_type", "none") != "none":
        doubt = "the volume group is shared with other hosts"
    sections = group.section("logical_volumes", {})
    volumes, snapshots = {}, _snapshots(sections)
    used: list[tuple[str, int, int]] = []
    for key, value in sections.items():
        volume = _Section(value, key)
        found = _read_volume(volume, extent, members, used)
        if key in snapshots:
            found = found._replace(doubt="it has to do with a snapshot")
        if snapshots.get(key, "VISIBLE" in volume.flags()):
            _check_name(key)
            volumes[key] = found
    used.sort()
    for one, other in zip(used, used[1:]):
        if one[0] == other[0] and one[1] + one[2] > other[1]:
            raise Error(f"extent {other[1]} of {one[0]} is used twice")
    _check_name(name)
    return Group(name, group.identity(), group.number("seqno"), extent, members, volumes, doubt)


def _snapshots(sections: dict[str, Any]) -> dict[str, bool]:
    """Volumes that aren't what they seem, and whether users see them.

    These are the stores of snapshots, which users see as the snapshots, what joins a snapshot and
    its origin, which they don't, and an origin that a snapshot is merged into. Another origin is
    what it seems: what changes in it was copied to the snapshot before.
    """
    found: dict[str, bool] = {}
    for key, value in sections.items():
        for segment in _segments(value):
            if segment.get("type") == "snapshot":
                found[key] = False
                merged = segment.get("merging_store")
                names = [segment.get("cow_store"), merged, merged and segment.get("origin")]
                found.update((name, True) for name in names if isinstance(name, str))
    return found


def _segments(volume: Any) -> list[dict[str, Any]]:
    values = volume.values() if isinstance(volume, dict) else []
    return [value for value in values if isinstance(value, dict)]


def _read_volume(
    volume: _Section, extent: int, members: dict[str, Member], used: list[tuple[str, int, int]]
) -> LogicalVolume:
    """One volume; the (physical volume, extent, count) that it takes up are added to used."""
    doubt = None
    unknown = volume.flags() - _KNOWN_VOLUME
    if unknown:
        doubt = f"it is {', '.join(sorted(unknown))}"
    elif "READ" not in volume.flags():
        doubt = "it may not be read"
    segments, at = [], 0
    for number in range(1, volume.number("segment_count", 0, 1 << 20) + 1):
        part = _Section(volume.section(f"segment{number}"), volume.name)
        count = part.number("extent_count", 1)
        if part.number("start_extent") != at:
            raise Error(f"the segments of {volume.name} don't follow one another")
        at += count
        kind = part.tree.get("type")
        if not isinstance(kind, str):
            raise Error(f"type of {volume.name} is damaged")
        if kind != "striped":
            doubt = f"its type is {kind}"
            continue
        stripes = part.number("stripe_count", 1, 1 << 16)
        size = part.number("stripe_size", 1, 1 << 32) * SECTOR if stripes > 1 else extent
        areas = part.tree.get("stripes")
        if not isinstance(areas, list) or len(areas) != 2 * stripes or count % stripes:
            raise Error(f"the stripes of {volume.name} are damaged")
        if (count // stripes * extent) % size:
            raise Error(f"the stripes of {volume.name} don't fill its extents")
        pairs = list(zip(areas[::2], areas[1::2]))
        for name, first in pairs:
            if not isinstance(name, str) or type(first) is not int or first < 0:
                raise Error(f"the stripes of {volume.name} are damaged")
            if name not in members:
                doubt = "it is made up of other volumes"
            elif first + count // stripes > members[name].extents:
                raise Error(f"{volume.name} has extents after the last of {name}")
            else:
                used.append((name, first, count // stripes))
        segments.append(Segment(count, size, pairs))
    if len(_segments(volume.tree)) != len(segments) and doubt is None:
        raise Error(f"{volume.name} has more segments than it says")
    return LogicalVolume(at * extent, [] if doubt else segments, doubt)


def _check_name(name: str) -> None:
    if not name or len(name) > 127 or name in (".", "..") or name[0] == "-" or set(name) - _NAME:
        raise Error(f"{name[:200]!r} can't be a name")


class _Section:
    """A section of the text, whose values are what they must be, or Error."""

    def __init__(self, tree: Any, name: str) -> None:
        if not isinstance(tree, dict):
            raise Error(f"{name} is damaged")
        self.tree, self.name = tree, name

    def number(self, key: str, least: int = 0, most: int = 1 << 48) -> int:
        value = self.tree.get(key)
        if type(value) is not int or not least <= value <= most:
            raise Error(f"{key} of {self.name} is damaged")
        return value

    def section(self, key: str, default: Any = None) -> dict[str, Any]:
        value = self.tree.get(key, default)
        if not isinstance(value, dict):
            raise Error(f"{key} of {self.name} is damaged")
        return value

    def flags(self) -> set[str]:
        found: set[str] = set()
        for key in "status", "flags":
            value = self.tree.get(key, [])
            if not isinstance(value, list) or not all(isinstance(flag, str) for flag in value):
                raise Error(f"{key} of {self.name} is damaged")
            found.update(value)
        return found

    def identity(self) -> str:
        """An identity as labels have it, without hyphens."""
        value = self.tree.get("id")
        if not isinstance(value, str) or len(value.replace("-", "")) != 32:
            raise Error(f"id of {self.name} is damaged")
        return value.replace("-", "")
