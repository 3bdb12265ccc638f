"""What mount= says."""

from __future__ import annotations

from typing import NamedTuple

from nbdtool.errors import UsageError

_SUBVOLUME = "btrfsvol:"
INSPECT = "inspect"  # instead of a device: what the guest itself would mount


class Mount(NamedTuple):
    """A device, or a subvolume as btrfsvol:DEVICE/NAME, and where it is mounted."""

    device: str
    point: str


def parse_mount(text: str) -> Mount:
    """DEVICE[:MOUNTPOINT]; raises UsageError.

    The name of a subvolume may have colons: it ends at the last one that a slash follows.
    """
    if text.startswith(_SUBVOLUME):
        device, colon, point = text[len(_SUBVOLUME) :].rpartition(":/")
        if not colon:
            device, point = point, ""
        mount = Mount(_SUBVOLUME + device, "/" + point)
    else:
        device, _, point = text.partition(":")
        mount = Mount(device, point or "/")
    if not device.startswith("/dev/"):
        raise UsageError(f"mount={text}: {device or 'nothing'} is no device, such as /dev/sda1")
    if not mount.point.startswith("/"):
        raise UsageError(f"mount={text}: {mount.point} is no place in a tree, such as /boot")
    return mount
