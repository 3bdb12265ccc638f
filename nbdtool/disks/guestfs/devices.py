"""The devices that the appliance has, and how encrypted ones are opened.

Functions here and in the neighbours take libguestfs' handle. They raise Error with what there is
when something isn't; other failures are libguestfs' RuntimeError, as is a dead appliance.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from nbdtool import errors
from nbdtool.disks.guestfs.keys import Key
from nbdtool.disks.guestfs.launch import first_line
from nbdtool.errors import Error

LISTED = 32  # things that an error names at most
# What blkid says, cryptsetup's word for it, and how the name of what is inside begins
_ENCRYPTED = {
    "crypto_LUKS": ("luks", "/dev/mapper/luks-"),
    "BitLocker": ("bitlk", "/dev/mapper/bitlk-"),
}


def reason(g: Any, exc: RuntimeError) -> str:
    """What libguestfs' error says; raises it again if it is that the appliance died."""
    if not g.is_ready():
        raise exc
    return first_line(exc)


def listed(names: Iterable[str]) -> str:
    """Some of the names, for an error."""
    return errors.listed(names, LISTED) or "nothing"


def devices(g: Any) -> list[str]:
    """Partitions, disks without, RAID devices, what is in encrypted ones, logical volumes."""
    parts = g.list_partitions()
    found: list[str] = []
    for disk in g.list_devices():
        # /dev/sdaa1 isn't a partition of /dev/sda.
        its = [part for part in parts if part.startswith(disk) and part[len(disk) :].isdecimal()]
        found += its or [disk]
    arrays = g.list_md_devices()
    found += [name for array in arrays for name in _with_partitions(array, parts)]
    try:  # the dynamic disks of Windows
        found += g.list_ldm_volumes() + g.list_ldm_partitions()
    except RuntimeError as exc:
        reason(g, exc)  # there is no such thing in some builds
    beginnings = tuple(beginning for _, beginning in _ENCRYPTED.values())
    found += [name for name in g.list_dm_devices() if name.startswith(beginnings)]
    return found + list(g.lvs())


def _with_partitions(array: str, parts: Sequence[str]) -> list[str]:
    its = [part for part in parts if part.startswith(array + "p")]
    return [array, *its]


def content(g: Any, device: str) -> str:
    """What blkid takes it for (ext4, LVM2_member); "" if it doesn't know."""
    try:
        return str(g.vfs_type(device))
    except RuntimeError as exc:
        reason(g, exc)  # an extended partition, for one
        return ""


def unlock(g: Any, keys: Sequence[Key], *, read_only: bool) -> None:
    """Open all encrypted devices that there are keys for, as /dev/mapper/luks-UUID."""
    seen: set[str] = set()
    known: set[str] = set()  # the names that keys may be for
    while keys:
        fresh = [device for device in devices(g) if device not in seen]
        seen.update(fresh)
        opened = [_unlock(g, device, keys, known, read_only) for device in fresh]
        if not any(opened):
            break
        g.lvm_scan(True)  # volume groups may be inside, and devices in them
    for key in keys:
        if not key.fits(known):
            there = f"there is {listed(sorted(known))}" if known else "there is none"
            raise Error(f"--key {key.name}: no such encrypted device; {there}")


def _unlock(g: Any, device: str, keys: Sequence[Key], known: set[str], read_only: bool) -> bool:
    """Whether it was encrypted, and is open now."""
    kind = content(g, device)
    if kind not in _ENCRYPTED:
        return False
    how, beginning = _ENCRYPTED[kind]
    uuid = g.luks_uuid(device) if how == "luks" else ""
    names = {device, uuid} - {""}
    known |= names
    name = (beginning + (uuid or device.rpartition("/")[2])).rpartition("/")[2]
    last = ""
    for key in keys:
        if key.fits(names):
            try:
                g.cryptsetup_open(device, key.passphrase, name, readonly=read_only, crypttype=how)
                return True
            except RuntimeError as exc:
                last = reason(g, exc)
    if last:
        raise Error(f"--key: none of those for {device} opens it: {last}")
    return False
