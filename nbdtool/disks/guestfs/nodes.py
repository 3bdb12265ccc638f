"""Nodes of the appliance's devices, by which they are read like files.

libguestfs' own call to read a device waits for udev each time, for a tenth of a second with each
read; its call to read a file doesn't. So there are nodes of the devices in a tmpfs of the
appliance, where it finds them as files. A device that is written by its node in a tmpfs isn't
probed by udev afterwards either.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Sequence
from typing import Any, NamedTuple, Optional

from nbdtool.disks.guestfs.devices import devices, listed, reason
from nbdtool.errors import Error, debug

ZERO = "/dev/zero"  # in that tree
_COMPARED = 4096  # bytes
_TRIES = 3


class Node(NamedTuple):
    """A device, its size in bytes, and the path of its node; "" if that doesn't do."""

    device: str
    size: int
    path: str


def make_nodes(g: Any, names: Sequence[str]) -> list[Node]:
    """Nodes of the devices that are named, or of all; whatever is mounted is unmounted."""
    there = devices(g)
    g.umount_all()
    g.mount_vfs("", "tmpfs", there[0], "/")
    g.mkdir("/dev")
    g.mount_vfs("", "devtmpfs", there[0], "/dev")
    g.mkdir("/sys")
    g.mount_vfs("", "sysfs", there[0], "/sys")
    # The appliance has disks and devices of its own, which aren't for us.
    ours = {_number(g, device) for device in (*there, *g.list_devices())}
    made = []
    for index, name in enumerate(names or there):
        device = g.canonical_device_name(name)
        number = _number(g, device)
        if number is None or number not in ours:
            raise Error(f"{name}: no such device; there are {listed(there)}")
        made.append(_make_node(g, f"/{index}", device, number))
    return made


def _number(g: Any, device: str) -> Optional[int]:
    """Its device number; None if there is no such block device."""
    # The kernel finds disks in any order, and libguestfs gives them its own names. A drive's label
    # leads to the drive and its partitions.
    found = re.fullmatch("/dev/sd([a-z]+[0-9]*)", device)
    path = f"/dev/disk/guestfs/{found[1]}" if found else device
    for _ in range(_TRIES):
        try:
            st = g.statns(path)
            return int(st["st_rdev"]) if stat.S_ISBLK(st["st_mode"]) else None
        except RuntimeError as exc:
            reason(g, exc)
            _settle(g)
    return None


def _settle(g: Any) -> None:
    """Let udev end: it makes the links to drives, and may look at partitions anew."""
    g.pread_device(g.list_devices()[0], 1, 0)


def _make_node(g: Any, path: str, device: str, number: int) -> Node:
    major, minor = os.major(number), os.minor(number)
    # As blockdev_getsize64() has it, which starts a program.
    size = 512 * int(g.pread(f"/sys/dev/block/{major}:{minor}/size", 64, 0))
    g.mknod_b(0o600, major, minor, path)
    same = not size or any(_is_same(g, path, device, size) for _ in range(_TRIES))
    return Node(device, size, path if same else "")


def _is_same(g: Any, path: str, device: str, size: int) -> bool:
    """Whether the node leads to the device: it ends where that does, and starts like it."""
    length = min(_COMPARED, size)
    start = g.pread_device(device, length, 0)
    try:
        ends = len(g.pread(path, 1, size - 1)) == 1 and not g.pread(path, 1, size)
        return ends and bool(g.pread(path, length, 0) == start)
    except RuntimeError as exc:
        debug(f"{path}: {reason(g, exc)}")
        return False
