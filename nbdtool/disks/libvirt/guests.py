"""Guests and their disks, as libvirt's XML describes them (formatdomain.html of libvirt)."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from dataclasses import dataclass
from typing import Any, Optional

from nbdtool.disks.libvirt.link import Link, Lost
from nbdtool.errors import Error, UsageError

_STATES = ("no state", "running", "idle", "paused", "shutting down", "shut off", "crashed",
           "suspended")  # fmt: skip
_PLACES = {"file": "file", "block": "dev", "dir": "dir"}  # the attribute of <source> by its type


@dataclass(frozen=True)
class Image:
    """One member of a disk's chain: where it is, and its format."""

    type: str  # file, block, network, volume ...
    path: str  # "" if it has none on the host
    format: str  # raw, qcow2 ...
    plain: bool = True  # the bytes are as they are: neither encrypted nor a slice
    pool: str = ""  # of a volume, whose name is in path

    def __str__(self) -> str:
        return self.path or f"a {self.type} source"


@dataclass(frozen=True)
class GuestDisk:
    """A disk of a guest. chain[0] is what the guest writes to, then come its backing images."""

    target: str
    device: str  # disk, lun, cdrom, floppy
    chain: tuple[Image, ...]  # empty: no medium
    complete: bool  # the XML says where the chain ends
    read_only: bool = False  # for the guest
    sector: int = 512  # bytes of a logical sector, as the guest sees it

    @property
    def top(self) -> Image:
        return self.chain[0]


@dataclass(frozen=True)
class Guest:
    """A guest as it was when it was looked at; id is -1 unless it is active."""

    uuid: str
    name: str
    id: int
    state: str
    disks: tuple[GuestDisk, ...]
    owner: Optional[tuple[int, int]] = None  # user and group of an active guest's process

    @property
    def active(self) -> bool:
        return self.id != -1

    def disk(self, target: str) -> Optional[GuestDisk]:
        return next((disk for disk in self.disks if disk.target == target), None)


def describe(domain: Any) -> Guest:
    """The guest that a virDomain stands for."""
    root = ET.fromstring(domain.XMLDesc(0))
    state = domain.state(0)[0]
    return Guest(
        uuid=domain.UUIDString(),
        name=domain.name(),
        id=int(root.get("id", "-1")),
        state=_STATES[state] if state < len(_STATES) else str(state),
        disks=tuple(_disk(node) for node in root.iterfind("devices/disk")),
        owner=_owner(root),
    )


def find(link: Link, wanted: str) -> Guest:
    """The guest of that name, UUID or ID; Error if there is none."""

    def look(connection: Any) -> Guest:
        return describe(_domain(connection, wanted))

    return link.call(look)


def _domain(connection: Any, wanted: str) -> Any:
    from nbdtool.disks.libvirt.link import module

    libvirt = module()
    lookups = [connection.lookupByName, connection.lookupByUUIDString]
    if wanted.isdecimal():
        lookups.append(lambda text: connection.lookupByID(int(text)))
    for lookup in lookups:
        try:
            return lookup(wanted)
        except libvirt.libvirtError as exc:
            # 42: VIR_ERR_NO_DOMAIN; 8 and 27: what isn't a UUID
            if exc.get_error_code() not in (42, 8, 27, 1):
                raise
    names = sorted(domain.name() for domain in connection.listAllDomains())
    there = f"there are {', '.join(names[:20])}" if names else "there are none"
    raise Error(f"{wanted}: no such guest; {there}")


def _disk(node: ET.Element) -> GuestDisk:
    target = node.find("target")
    chain: list[Image] = []
    complete = False
    at: Optional[ET.Element] = node
    while at is not None and len(chain) < 200:
        image = _image(at)
        if image is None:  # <backingStore/>: the end
            complete = bool(chain)
            break
        chain.append(image)
        at = at.find("backingStore")
    return GuestDisk(
        target=target.get("dev", "") if target is not None else "",
        device=node.get("device", "disk"),
        chain=tuple(chain),
        complete=complete,
        read_only=node.find("readonly") is not None,
        sector=_sector(node),
    )


def _sector(node: ET.Element) -> int:
    blockio = node.find("blockio")
    text = blockio.get("logical_block_size", "") if blockio is not None else ""
    return int(text) if text.isdecimal() and int(text) else 512


def _image(node: ET.Element) -> Optional[Image]:
    source = node.find("source")
    if source is None or not source.attrib:
        return None
    kind = node.get("type", "file")
    driver = node.find("driver") if node.tag == "disk" else node.find("format")
    text = source.get(_PLACES.get(kind, ""), "")
    if kind == "volume":
        text = source.get("volume", "")
    encrypted = node.find("encryption") is not None or source.find("encryption") is not None
    return Image(
        type=kind,
        path=text,
        format=driver.get("type", "raw") if driver is not None else "raw",
        plain=not encrypted and source.find("slices") is None,
        pool=source.get("pool", ""),
    )


def _owner(root: ET.Element) -> Optional[tuple[int, int]]:
    label = root.findtext("seclabel[@model='dac']/label") or ""
    user, _, group = label.replace("+", "").partition(":")
    return (int(user), int(group)) if user.isdecimal() and group.isdecimal() else None


def choose(guest: Guest, wanted: Optional[str]) -> list[GuestDisk]:
    """The disk with that target or source, or all that aren't removable; raises Error."""
    if wanted is None:
        found = [disk for disk in guest.disks if disk.device in ("disk", "lun") and disk.chain]
        if not found:
            raise Error(f"{guest.name}: has no disk")
        return found
    for disk in guest.disks:
        if wanted == disk.target or (disk.chain and wanted == disk.top.path):
            if not disk.chain:
                kind = {"cdrom": "CD-ROM drive", "floppy": "floppy drive"}.get(disk.device, "disk")
                raise Error(f"{guest.name}: {disk.target} is a {kind} with nothing in it")
            return [disk]
    there = ", ".join(disk.target for disk in guest.disks) or "none"
    raise UsageError(f"{wanted}: no such disk of {guest.name}; there are {there}")


class Watch:
    """Looks whether a disk is still what it was: same guest, run and source.

    check() raises OSError from the first time on that it isn't.
    """

    def __init__(self, link: Link, guest: Guest, disk: GuestDisk) -> None:
        self._link, self._guest = link, guest
        self._disk = guest.disk(disk.target) or disk  # as the XML had it
        self._over = ""

    def check(self) -> None:
        if not self._over:
            self._over = self._link.call(self._look)
        if self._over:
            raise Lost(self._over, 0)

    def _look(self, connection: Any) -> str:
        from nbdtool.disks.libvirt.link import module

        name = self._guest.name
        try:
            now = describe(connection.lookupByUUIDString(self._guest.uuid))
        except module().libvirtError as exc:
            if exc.get_error_code() != 42:  # VIR_ERR_NO_DOMAIN
                raise
            return f"{name}: the guest is gone"
        if now.id != self._guest.id:
            what = "was started" if not self._guest.active else "was stopped"
            if now.active and self._guest.active:
                what = "was started again"
            return f"{name}: the guest {what} meanwhile; run nbdtool again"
        disk = now.disk(self._disk.target)
        if disk is None or not disk.chain or disk.top.path != self._disk.top.path:
            return f"{name}: {self._disk.target} has another source now; run nbdtool again"
        return ""
