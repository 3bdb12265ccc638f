"""How a guest's disk is read: the choice among the methods."""

from __future__ import annotations

import os
from dataclasses import dataclass

from nbdtool.disk import Disk
from nbdtool.disks.libvirt import pools
from nbdtool.disks.libvirt.backup import Job, Scratch
from nbdtool.disks.libvirt.guests import Guest, GuestDisk
from nbdtool.disks.libvirt.link import Failure, Link
from nbdtool.disks.libvirt.local import open_local
from nbdtool.disks.libvirt.peek import open_peek
from nbdtool.disks.libvirt.volume import open_volume
from nbdtool.errors import Error


@dataclass(frozen=True)
class Choice:
    """A method, and why it was chosen."""

    method: str
    why: str


def choose(guest: Guest, disk: GuestDisk, *, local: bool) -> Choice:
    """What auto means for a disk; Error if there is no way to read it right."""
    form = disk.top.format
    if guest.active:
        if local and disk.device in ("disk", "lun"):
            return Choice("backup", f"the guest is {guest.state}, on this host")
        if form == "raw":
            where = "on this host" if local else "on another host"
            return Choice("peek", f"the guest is {guest.state}, {where}, and its disk is raw")
        raise Error(
            f"{guest.name}: is {guest.state}, and {disk.target} is {form}: that can be read only on"
            " the guest's own host; copy nbdtool there and run it, or stop the guest"
        )
    if local and _readable(disk):
        return Choice("local", "the guest is stopped, and its image is on this host")
    where = "its image can't be opened here" if local else "it is on another host"
    method = "peek" if form == "raw" else "volume"
    return Choice(method, f"the guest is stopped, its disk is {form}, and {where}")


def _readable(disk: GuestDisk) -> bool:
    """Whether all images are there for us."""
    return all(
        image.type in ("file", "block") and os.access(image.path, os.R_OK) for image in disk.chain
    )


def open_disks(
    link: Link, guest: Guest, disks: list[GuestDisk], method: str, scratch: Scratch
) -> dict[str, Disk]:
    """Each disk by the method given or chosen; keyed by target, or by "" if it is the only one.

    Raises Error or OSError. The link is the disks' from then on.
    """
    local = link.is_local()
    disks = [pools.resolve(link, disk) for disk in disks]
    choices = {
        disk.target: choose(guest, disk, local=local) if method == "auto" else Choice(method, "")
        for disk in disks
    }
    if not local and any(choice.method in ("local", "backup") for choice in choices.values()):
        raise Error(
            f"{guest.name}: is on another host, and method {method} needs to be on its own: copy"
            " nbdtool there and run it"
        )
    opened: dict[str, Disk] = {}
    try:
        saved = [disk for disk in disks if choices[disk.target].method == "backup"]
        if saved:
            opened.update(Job(link.clone(), guest, saved, scratch).disks)
        for disk in disks:
            if disk.target not in opened:
                opener = {"local": open_local, "peek": open_peek, "volume": open_volume}
                try:
                    opened[disk.target] = opener[choices[disk.target].method](link, guest, disk)
                except Failure as exc:
                    raise Error(f"{guest.name}: {disk.target}: {exc.strerror}") from None
    except BaseException:
        for made in opened.values():
            made.close()
        raise
    for target, made in opened.items():
        if choices[target].why:
            made.description += f": {choices[target].why}"
    return {disk.target if len(disks) > 1 else "": opened[disk.target] for disk in disks}
