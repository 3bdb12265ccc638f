"""--lv: a logical volume of LVM2 as the disk, if it is linear or striped."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Optional

from nbdtool.disk import Disk, Extent, Span, merge_extents
from nbdtool.errors import Error, Uncertain, listed
from nbdtool.layers.mapped import Mapped, Piece
from nbdtool.layers.partition import read_table
from nbdtool.layers.window import Window
from nbdtool.lvm import Group, LogicalVolume, PhysicalVolume, read_group, read_physical_volume

OPTION = "--lv"
FILTER = "lv"
READS_ONLY = True
ARGUMENT: dict[str, Any] = {
    "metavar": "VG/LV",
    "help": "serve this logical volume of LVM, on the disk or its partitions, read-only",
}

_MAPPER = re.compile(r"/dev/mapper/((?:[^-/]|--)+)-((?:[^-/]|--)+)")  # a hyphen is doubled
_MAX_TEXT = 16 << 20  # bytes of metadata that we are willing to parse, in all


def add_arguments(group: argparse._ArgumentGroup) -> None:
    """It has no further options."""


def open(disk: Disk, value: str, args: argparse.Namespace) -> Disk:
    """The volume that value names: VG/LV, or its path below /dev. Raises Error."""
    try:
        volumes = find_volumes(_devices(disk))
        name = normal_name(value)
        if name not in volumes:
            there = listed(volumes) or "none at all"
            raise Error(f"{disk.description}: no logical volume {value!r}; there is {there}")
        opened = volumes[name].open([disk])
    except Uncertain as exc:
        raise Error(f"{exc}; nbdtool guestfs may be able to read it") from None
    opened.description = f"{disk.description}, logical volume {name}"
    return opened


def normal_name(value: str) -> str:
    """VG/LV, from that or /dev/VG/LV or /dev/mapper/VG-LV."""
    mapper = _MAPPER.fullmatch(value)
    if mapper:
        return "/".join(part.replace("--", "-") for part in mapper.groups())
    return value[5:] if value.startswith("/dev/") else value


def _devices(disk: Disk) -> list[Disk]:
    """The partitions of a disk, or the disk if it has none."""
    try:
        table = read_table(disk)
    except Error:
        return [disk]
    found: list[Disk] = [
        Window(disk, start, length, f"{disk.description}, partition {number}")
        for number, (start, length, *_) in table.items()
        if start + length <= disk.size
    ]
    return found if table else [disk]


class Volume:
    """A logical volume; size in bytes."""

    def __init__(
        self,
        name: str,
        group: Group,
        volume: LogicalVolume,
        devices: dict[str, PhysicalVolume],
        doubt: Optional[str],
    ) -> None:
        self.name, self.size = name, volume.size
        self._group, self._volume, self._devices = group, volume, devices
        self._doubt = doubt or volume.doubt

    def open(self, owned: Optional[Sequence[Disk]] = None) -> Disk:
        """The volume as a read-only disk. Raises Uncertain.

        It closes the disks in `owned`, or by default those it lies on.
        """
        if self._doubt:
            raise Uncertain(f"{self.name}: {self._doubt}")
        used: list[Disk] = []
        pieces = [*self._pieces(used)]
        return _Opened(pieces, used, owned)

    def _pieces(self, used: list[Disk]) -> Iterator[Piece]:
        """One for each segment; the disks that they are of are added to used."""
        extent = self._group.extent
        for segment in self._volume.segments:
            length = segment.extents * extent
            share = length // len(segment.areas)
            places = [self._place(name, first, share) for name, first in segment.areas]
            for disk, _ in places:
                if disk not in used:
                    used.append(disk)
            if len(places) == 1:
                yield Piece(length, *places[0])
            else:
                striped = Striped(places, segment.stripe, length)
                used.append(striped)
                yield Piece(length, striped)

    def _place(self, name: str, first: int, length: int) -> tuple[Disk, int]:
        """The disk of a physical volume, and where `length` bytes from its extent `first` are."""
        member = self._group.members[name]
        device = self._devices.get(member.id)
        if device is None or member.missing:
            raise Uncertain(f"{self.name}: {name} of {self._group.name} is missing")
        start = member.start + first * self._group.extent
        where = f"{self.name}: {device.disk.description}"
        if device.data != member.start:
            raise Uncertain(f"{where}: LVM's label and metadata differ in where its extents begin")
        if start + length > device.disk.size:
            raise Uncertain(f"{where}: smaller than what is used of it")
        return device.disk, start


class _Opened(Mapped):
    def __init__(
        self, pieces: Sequence[Piece], disks: Sequence[Disk], owned: Optional[Sequence[Disk]]
    ) -> None:
        super().__init__(pieces, disks)
        self._owned = disks if owned is None else owned

    def close(self) -> None:
        for disk in self._owned:
            disk.close()


class _Copy(NamedTuple):
    """The newest metadata of a group."""

    group: Group
    text: bytes
    differ: bool = False  # from others of the same version


def find_volumes(devices: Sequence[Disk]) -> dict[str, Volume]:
    """The logical volumes, by their names VG/LV, that are on devices: disks or partitions.

    Raises Uncertain if there may be others.
    """
    found = [volume for volume in map(_read_device, devices) if volume is not None]
    copies = _read_groups(found)
    members = [id_ for copy in copies for id_ in {m.id for m in copy.group.members.values()}]
    names = [copy.group.name for copy in copies]
    known = {volume.id: volume for volume in found}
    doubts: dict[str, str] = {}
    for volume in found:
        if known[volume.id] is not volume:
            doubts[volume.id] = f"{volume.disk.description}: is there twice"
        elif volume.damage:
            doubts[volume.id] = volume.damage
        elif members.count(volume.id) > 1:
            doubts[volume.id] = f"{volume.disk.description}: belongs to several volume groups"
    for identity in doubts.keys() - set(members):
        raise Uncertain(doubts[identity])
    volumes = {}
    for group, _, differ in copies:
        own = [doubts[m.id] for m in group.members.values() if m.id in doubts]
        doubt = group.doubt or (own[0] if own else None)
        if differ:
            doubt = "the copies of its metadata differ"
        elif names.count(group.name) > 1:
            doubt = f"several volume groups are {group.name}"
        for name, logical in sorted(group.volumes.items()):
            full = f"{group.name}/{name}"
            volumes[full] = Volume(full, group, logical, known, doubt)
    return volumes


def _read_device(disk: Disk) -> PhysicalVolume | None:
    try:
        return read_physical_volume(disk)
    except Error as exc:
        raise Uncertain(str(exc)) from None


def _read_groups(found: Sequence[PhysicalVolume]) -> list[_Copy]:
    """The groups in the metadata of all physical volumes, each as its newest version has it."""
    newest: dict[str, _Copy] = {}
    texts = {text: volume for volume in found for text in volume.metadata}
    if sum(map(len, texts)) > _MAX_TEXT:
        raise Uncertain(f"more than {_MAX_TEXT} bytes of LVM's metadata")
    for text, volume in texts.items():
        try:
            group = read_group(text)
        except Error as exc:
            raise Uncertain(f"{volume.disk.description}: LVM's metadata: {exc}") from None
        old = newest.get(group.id)
        if old is None or group.number > old.group.number:
            newest[group.id] = _Copy(group, text)
        elif group.number == old.group.number:
            newest[group.id] = old._replace(differ=True)
    return [*newest.values()]


class Striped(Disk):
    """`size` bytes dealt out to places (a disk, and where on it), `chunk` bytes to each in turn."""

    def __init__(self, places: Sequence[tuple[Disk, int]], chunk: int, size: int) -> None:
        self.size = size
        self._places, self._chunk = places, chunk

    def _parts(self, offset: int, length: int) -> Iterator[tuple[int, int, int]]:
        """(place, offset there, length) of each chunk in a range."""
        chunk, count = self._chunk, len(self._places)
        end = offset + length
        while offset < end:
            number, skip = divmod(offset, chunk)
            row, place = divmod(number, count)
            part = min(chunk - skip, end - offset)
            yield place, row * chunk + skip, part
            offset += part

    def prefetch(self, ranges: Sequence[tuple[int, int]]) -> None:
        wanted: list[list[tuple[int, int]]] = [[] for _ in self._places]
        for offset, length in ranges:
            for place, at, part in self._parts(offset, length):
                wanted[place].append((self._places[place][1] + at, part))
        for (disk, _), parts in zip(self._places, wanted):
            if parts:
                disk.prefetch(parts)

    def read(self, offset: int, length: int) -> list[Span]:
        spans: list[Span] = []
        for place, at, part in self._parts(offset, length):
            disk, start = self._places[place]
            spans += disk.read(start + at, part)
        return spans

    def extents(self, offset: int, length: int) -> Iterator[Extent]:
        return merge_extents(self._extents(offset, offset + length))

    def _extents(self, at: int, end: int) -> Iterator[Extent]:
        share = self.size // len(self._places)
        runs = [_Runs(disk, start, share) for disk, start in self._places]
        width = self._chunk * len(runs)
        while at < end:
            row, within = divmod(at, width)
            if not within:  # as many rows as are of one state everywhere
                found = [run.find(row * self._chunk) for run in runs]
                rows = min(until for until, _ in found) // self._chunk - row
                if rows and all(state == found[0][1] for _, state in found):
                    length = min(rows * width, end - at)
                    yield Extent(length, found[0][1])
                    at += length
                    continue
            number, skip = divmod(within, self._chunk)
            place = row * self._chunk + skip
            until, state = runs[number].find(place)
            length = min(self._chunk - skip, until - place, end - at)
            yield Extent(length, state)
            at += length


class _Runs:
    """The extents of a range of a disk, asked for in order."""

    def __init__(self, disk: Disk, start: int, length: int) -> None:
        self._disk, self._start, self._length = disk, start, length
        self._extents: Optional[Iterator[Extent]] = None
        self._until, self._state = 0, 0

    def find(self, at: int) -> tuple[int, int]:
        """Where the extent ends that `at` is in, and its state."""
        if self._extents is None:
            self._until = at
            self._extents = self._disk.extents(self._start + at, self._length - at)
        while self._until <= at:
            extent = next(self._extents)
            self._until, self._state = self._until + extent.length, extent.state
        return self._until, self._state
