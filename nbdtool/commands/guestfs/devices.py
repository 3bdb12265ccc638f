"""The devices that the appliance would find on drives, by our own readers.

These are the disks, their partitions and logical volumes, under its names. Where there may be
others, or others than those read here (RAID, other volume managers), there is a doubt: Uncertain.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Sequence
from typing import TYPE_CHECKING

from nbdtool.commands.guestfs.inputs import Drive, Image
from nbdtool.commands.guestfs.tables import Part, read_parts
from nbdtool.disk import Disk, Stamp, read_bytes
from nbdtool.disks.file import FileDisk
from nbdtool.disks.guestfs import letters
from nbdtool.errors import Error, Uncertain
from nbdtool.layers.mapped import Mapped, Piece
from nbdtool.layers.window import Window
from nbdtool.mdraid import is_raid_member

if TYPE_CHECKING:
    from nbdtool.layers.lv import Volume

_DISK = re.compile(r"/dev/[hsv]d([a-z]+)([0-9]*)")  # libguestfs takes each of them for sd
_ELSEWHERE = re.compile(r"/dev/(block|disk|md|mapper)/.*|/dev/(dm-|md)[0-9].*")
_ENCRYPTED = ((0, b"LUKS\xba\xbe"), (3, b"-FVE-FS-"))  # LUKS, BitLocker
_SECTOR = 512  # bytes that qemu counts disks in
_LISTED = 32  # devices that an error names at most


class Devices:
    """The devices on drives. Raises Uncertain, Error for what isn't there, OSError (reads).

    What is opened here shares the drives, which are closed with the first of them.
    """

    def __init__(self, drives: Sequence[Drive]) -> None:
        for drive in drives:
            _check(drive)
        self._drives = {f"/dev/sd{letters(n)}": drive for n, drive in enumerate(drives)}
        self._opened: dict[str, Disk] = {}
        self._tables: dict[str, dict[int, Part]] = {}
        self._places: list[Disk] = []  # what isn't divided into others
        self._volumes: dict[str, Volume] | None = None

    def open(self, name: str) -> Disk:
        """The device of that name, a Disk of its own."""
        match = _DISK.fullmatch(name)
        if not match:
            return self._open_volume(name)
        disk, number = f"/dev/sd{match[1]}", match[2]
        if disk not in self._drives:
            raise self._missing(name)
        whole = self._disk(disk)
        _check_member(whole)
        if not number:
            return Window(whole, 0, whole.size)
        if number.startswith("0") or int(number) not in self._parts(disk):
            raise self._missing(name)
        window = self._window(disk, int(number))
        _check_member(window)
        return window

    def names(self) -> list[str]:
        """All partitions and logical volumes, and the disks that have no table."""
        names: list[str] = []
        for disk in self._drives:
            parts = self._parts(disk)
            if any(part.dynamic for part in parts.values()):
                raise Uncertain(f"{self._disk(disk).description}: a dynamic disk of Windows")
            names += [f"{disk}{number}" for number in parts] or [disk]
        for name, volume in self._find_volumes().items():
            volume.open()  # or there is a doubt
            names.append(f"/dev/{name}")
        return names

    def _disk(self, name: str) -> Disk:
        if name not in self._opened:
            self._opened[name] = _open(self._drives[name], name)
        return self._opened[name]

    def _parts(self, name: str) -> dict[int, Part]:
        if name not in self._tables:
            self._tables[name] = read_parts(self._disk(name), self._drives[name].sector)
        return self._tables[name]

    def _window(self, name: str, number: int) -> Disk:
        part = self._parts(name)[number]
        description = f"{name}{number} of {self._drives[name].path}"
        return Window(self._disk(name), part.start, part.length, description)

    def _find_volumes(self) -> dict[str, Volume]:
        if self._volumes is None:
            from nbdtool.layers.lv import find_volumes

            places: list[Disk] = []
            for name in self._drives:
                disk, parts = self._disk(name), self._parts(name)
                _check_member(disk)
                windows = [self._window(name, n) for n, p in parts.items() if not p.extended]
                for window in windows:
                    _check_member(window)
                places += windows or [disk]
            self._places = places
            self._volumes = find_volumes(places)
        return self._volumes

    def _open_volume(self, name: str) -> Disk:
        from nbdtool.layers.lv import normal_name

        volume = self._find_volumes().get(normal_name(name))
        if volume is not None:
            return volume.open()
        if _ELSEWHERE.fullmatch(name):
            raise Uncertain(f"{name}: a name that only libguestfs knows")
        raise self._missing(name)

    def _missing(self, name: str) -> Error:
        try:
            names = self.names()
        except Uncertain:
            if not _DISK.fullmatch(name):
                raise
            names = [f"{disk}{number}" for disk in self._drives for number in self._parts(disk)]
        if not _DISK.fullmatch(name) and any(map(_is_encrypted, self._places)):
            raise Uncertain(f"{name}: may be in what is encrypted")
        more = " and more" if len(names) > _LISTED else ""
        return Error(f"{name}: no such device; there are {', '.join(names[:_LISTED])}{more}")


def _check(drive: Drive) -> None:
    """Raise Uncertain if a drive isn't for our own readers."""
    if drive.live:
        raise Uncertain(f"{drive.path}: is in use, and changes while it is read")
    if drive.data_file:
        raise Uncertain(f"{drive.path}: has its data in another file")
    for form in (drive.format, *(image.format for image in drive.backing)):
        if form not in ("raw", "qcow2"):
            raise Uncertain(f"{drive.path}: the format {form} isn't read here")


def _open(drive: Drive, name: str) -> Disk:
    """The disk in a drive's images; it stays as it is, or its reads fail."""
    disk: Disk | None = None
    for image in reversed((Image(drive.path, drive.format), *drive.backing)):
        file = FileDisk(image.path)
        st = os.fstat(file.file.fd)
        if stat.S_ISREG(st.st_mode):
            # What was found on it holds only as long as nobody writes to it.
            file.file.stamp = Stamp.of(st)
        if image.format == "raw":
            disk = file
            continue
        from nbdtool.layers.qcow2.image import Qcow2

        try:
            disk = Qcow2(file, backing=disk)
        except Error as exc:
            raise Uncertain(str(exc)) from None
    assert disk is not None
    missing = -disk.size % _SECTOR
    if missing:  # qemu has whole sectors
        disk = Mapped([Piece(disk.size, disk), Piece(missing, None)], [disk])
    disk.description = f"{name} of {drive.path}"
    return disk


def _is_encrypted(disk: Disk) -> bool:
    return any(
        at + len(magic) <= disk.size and read_bytes(disk, at, len(magic)) == magic
        for at, magic in _ENCRYPTED
    )


def _check_member(disk: Disk) -> None:
    if is_raid_member(disk):
        raise Uncertain(f"{disk.description}: is part of a RAID array")
