"""The way without an appliance: devices and files as ranges of the drives, read-only.

What is answered is what the appliance would answer, byte for byte; where that isn't sure, there is
Uncertain and the reason.
"""

from __future__ import annotations

import os
import posixpath
from collections.abc import Sequence

from nbdtool.commands.guestfs.devices import Devices
from nbdtool.commands.guestfs.inputs import Drive
from nbdtool.disk import Disk
from nbdtool.disks.guestfs.mounts import INSPECT, parse_mount
from nbdtool.errors import Uncertain
from nbdtool.layers.path import open_path


def open_direct(drives: Sequence[Drive], mounts: Sequence[str], export: str) -> dict[str, Disk]:
    """What export names: a device, a file under the mounts, or "" for all devices by name.

    mounts are those of mount=, DEV[:MOUNTPOINT] or inspect. Raises Uncertain, Error for what is
    certainly wrong, OSError for reads that fail.
    """
    devices = Devices(drives)
    tree = _Tree(devices, mounts)
    if not export:
        opened = {name: devices.open(name) for name in devices.names()}
    elif export.startswith("/dev/"):
        opened = {"": devices.open(export)}
    else:
        opened = {"": tree.open(export)}
    where = ", ".join(map(str, drives))
    for name, disk in opened.items():
        disk.description = f"{name or export} of {where}, read directly"
    return opened


class _Tree:
    """The filesystems that mount= puts together. Raises as open_direct()."""

    def __init__(self, devices: Devices, mounts: Sequence[str]) -> None:
        self._mounted: dict[str, Disk] = {}
        for text in mounts:
            if text == INSPECT:
                raise Uncertain("mount=inspect: what is mounted is for libguestfs to find")
            device, point = parse_mount(text)
            if not device.startswith("/dev/"):
                raise Uncertain(f"mount={text}: a subvolume of btrfs")
            self._mount(devices.open(device), point, text)

    def _mount(self, disk: Disk, point: str, text: str) -> None:
        from nbdtool.ext.reader import Filesystem

        Filesystem(disk)  # or there is a doubt
        if not _is_plain(point):
            raise Uncertain(f"mount={text}: {point} isn't a plain path")
        if (point == "/") != (not self._mounted) or any(
            _is_below(other, point) for other in self._mounted
        ):
            raise Uncertain(f"mount={text}: not on /, or over another one")
        self._mounted[point] = disk

    def open(self, path: str) -> Disk:
        """The file at path."""
        if len(self._mounted) > 1 and not _is_plain(path):
            raise Uncertain(f"{path}: isn't a plain path")
        point = max((p for p in self._mounted if _is_below(path, p)), key=len)
        below = [p for p in self._mounted if p != point and _is_below(p, point)]
        return open_path(
            self._mounted[point],
            _inside(path, point),
            covered=[os.fsencode(_inside(p, point)) for p in below],
            mounted=point != "/",
        )


def _is_plain(path: str) -> bool:
    return posixpath.normpath(path) == path and not path.startswith("//")


def _is_below(path: str, place: str) -> bool:
    """Whether path is place, or below it."""
    return path == place or path.startswith(place.rstrip("/") + "/")


def _inside(path: str, point: str) -> str:
    """What path is in the filesystem that is mounted on point."""
    return "/" + path[len(point) :].lstrip("/")
