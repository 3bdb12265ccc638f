"""How a guest's disk is read: the choice among the methods."""

from __future__ import annotations

import os
from dataclasses import dataclass

from nbdtool.disk import Disk
from nbdtool.disks.libvirt import pools
from nbdtool.disks.libvirt.guests import Guest, GuestDisk
from nbdtool.disks.libvirt.link import Link
from nbdtool.errors import Error

METHODS = ("auto", "local", "peek", "volume")


@dataclass(frozen=True)
class Choice:
    """A method, and why it was chosen."""

    method: str
    why: str


def choose(guest: Guest, disk: GuestDisk, *, local: bool) -> Choice:
    """What auto means for a disk; Error if there is no way to read it right."""
    top = disk.top
    if guest.active:
        if top.format == "raw":
            return Choice("peek", f"the guest is {guest.state}, and its disk is raw")
        raise Error(
            f"{guest.name}: is {guest.state}, and {disk.target} is {top.format}: that can be read"
            " on the guest's host alone; copy nbdtool there and run it"
        )
    if local and readable(disk):
        return Choice("local", "the guest is stopped, and its image is on this host")
    where = "its image can't be opened here" if local else "it is on another host"
    if top.format == "raw":
        return Choice("peek", f"the guest is stopped, its disk is raw, and {where}")
    return Choice("volume", f"the guest is stopped, its disk is {top.format}, and {where}")


def readable(disk: GuestDisk) -> bool:
    """Whether all images are there for us."""
    return all(
        image.type in ("file", "block") and os.access(image.path, os.R_OK) for image in disk.chain
    )


def open_disks(link: Link, guest: Guest, disks: list[GuestDisk], method: str) -> dict[str, Disk]:
    """Each disk by the method given or chosen; keyed by target, or by "" if it is the only one."""
    from nbdtool.disks.libvirt.local import open_local
    from nbdtool.disks.libvirt.peek import open_peek
    from nbdtool.disks.libvirt.volume import open_volume

    local = link.is_local()
    opened: dict[str, Disk] = {}
    try:
        for disk in disks:
            disk = pools.resolve(link, disk)
            choice = Choice(method, "")
            if method == "auto":
                choice = choose(guest, disk, local=local)
            if choice.method == "local":
                if not local:
                    raise Error(f"{guest.name}: is on another host; method local reads files here")
                made = open_local(link, guest, disk)
            elif choice.method == "volume":
                made = open_volume(link, guest, disk)
            else:
                made = open_peek(link.clone(), guest, disk)
            if choice.why:
                made.description += f": {choice.why}"
            opened[disk.target if len(disks) > 1 else ""] = made
    except BaseException:
        for made in opened.values():
            made.close()
        raise
    return opened
