"""What --list prints: guests and their disks."""

from __future__ import annotations

import json
from typing import Any, Optional

from nbdtool.disks.libvirt.guests import Guest, describe, find
from nbdtool.disks.libvirt.link import Link, module
from nbdtool.progress import human
from nbdtool.table import table

_HEAD = ("GUEST", "STATE", "DISK", "FORMAT", "CAPACITY", "SOURCE")


def listing(link: Link, wanted: Optional[str], *, as_json: bool) -> str:
    """All guests, or the one wanted, as a table or as JSON; raises Error or OSError."""
    if wanted is not None:
        found = [find(link, wanted)]
    else:
        found = link.call(lambda connection: _all(connection))
    described = [_described(link, guest) for guest in found]
    if as_json:
        return json.dumps(described, indent=2) + "\n"
    rows = [_HEAD]
    for guest in described:
        name, state = guest["name"], guest["state"]
        for disk in guest["disks"] or [{}]:
            capacity = disk.get("capacity")
            size = human(capacity) if capacity is not None else "-"
            source = disk.get("source") or "-"
            rows.append(
                (name, state, disk.get("target", "-"), disk.get("format") or "-", size, source)
            )
            name = state = ""
    return table(rows)


def _all(connection: Any) -> list[Guest]:
    libvirt = module()
    guests = []
    for domain in connection.listAllDomains():
        try:
            guests.append(describe(domain))
        except libvirt.libvirtError as exc:
            if exc.get_error_code() != libvirt.VIR_ERR_NO_DOMAIN:  # gone meanwhile
                raise
    return sorted(guests, key=lambda guest: guest.name)


def _described(link: Link, guest: Guest) -> dict[str, Any]:
    return {
        "name": guest.name,
        "uuid": guest.uuid,
        "id": guest.id if guest.active else None,
        "state": guest.state,
        "disks": [
            {
                "target": disk.target,
                "device": disk.device,
                "source": str(disk.top) if disk.chain else None,
                "format": disk.top.format if disk.chain else None,
                "capacity": _capacity(link, guest, disk.target) if disk.chain else None,
            }
            for disk in guest.disks
        ],
    }


def _capacity(link: Link, guest: Guest, target: str) -> Optional[int]:
    """Bytes; None where libvirt can't tell, as for an image that is missing."""
    try:
        return link.call(
            lambda connection: int(connection.lookupByUUIDString(guest.uuid).blockInfo(target)[0])
        )
    except OSError:
        return None
