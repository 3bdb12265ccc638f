"""What --list prints: the devices on the drives, and what is on them."""

from __future__ import annotations

import json
from typing import Any

from nbdtool.disks.guestfs.devices import devices, reason
from nbdtool.progress import human
from nbdtool.table import table

_HEAD = ("NAME", "SIZE", "CONTENT", "LABEL", "UUID")
_KEYS = ("name", "size", "content", "label", "uuid")


def describe(g: Any) -> list[dict[str, Any]]:
    """All devices, each disk before its partitions, and the subvolumes on them. RuntimeError."""
    disks = g.list_devices()
    names: dict[str, None] = {}
    for name in devices(g):
        disk = name.rstrip("0123456789")
        names.update(dict.fromkeys([disk, name] if disk in disks else [name]))
    rows: list[dict[str, Any]] = []
    for name in names:
        rows.append(_describe(g, name))
        if rows[-1]["content"] == "btrfs":
            rows += [
                {**dict.fromkeys(_KEYS), "name": subvolume, "content": "btrfs subvolume"}
                for subvolume in _subvolumes(g, name)
            ]
    return rows


def as_text(rows: list[dict[str, Any]], *, as_json: bool) -> str:
    """The rows as a table or as JSON."""
    if as_json:
        return json.dumps(rows, indent=2) + "\n"
    lines = [
        (row["name"], human(row["size"]) if row["size"] is not None else "-")
        + tuple(row[key] or "-" for key in _KEYS[2:])
        for row in rows
    ]
    return table([_HEAD, *lines])


def _describe(g: Any, name: str) -> dict[str, Any]:
    try:
        found = g.blkid(name)
    except RuntimeError as exc:
        reason(g, exc)
        found = {}
    return {
        "name": name,
        "size": g.blockdev_getsize64(name),
        "content": found.get("TYPE") or found.get("PTTYPE"),
        "label": found.get("LABEL"),
        "uuid": found.get("UUID"),
    }


def _subvolumes(g: Any, name: str) -> list[str]:
    try:
        found = g.btrfs_subvolume_list(name)
    except RuntimeError as exc:
        reason(g, exc)
        return []
    return [f"btrfsvol:{name}/{each['btrfssubvolume_path']}" for each in found]
