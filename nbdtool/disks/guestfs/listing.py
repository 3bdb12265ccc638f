"""What --list prints: the devices on the drives, and what is on them."""

from __future__ import annotations

import json
from typing import Any

from nbdtool.disks.guestfs.devices import content, devices, reason
from nbdtool.progress import human
from nbdtool.table import table

_HEAD = ("NAME", "SIZE", "CONTENT", "LABEL", "UUID")
_KEYS = ("name", "size", "content", "label", "uuid")


def listing(g: Any, *, as_json: bool) -> str:
    """All devices and the subvolumes on them, as a table or as JSON. Raises RuntimeError."""
    rows: list[dict[str, Any]] = []
    for name in _names(g):
        rows.append(_describe(g, name))
        if rows[-1]["content"] == "btrfs":
            rows += [
                {**dict.fromkeys(_KEYS), "name": subvolume, "content": "btrfs subvolume"}
                for subvolume in _subvolumes(g, name)
            ]
    if as_json:
        return json.dumps(rows, indent=2) + "\n"
    lines = [
        (row["name"], human(row["size"]) if row["size"] is not None else "-")
        + tuple(row[key] or "-" for key in _KEYS[2:])
        for row in rows
    ]
    return table([_HEAD, *lines])


def _names(g: Any) -> list[str]:
    """All devices, each disk before its partitions."""
    names: list[str] = []
    disks = g.list_devices()
    for name in devices(g):
        disk = name.rstrip("0123456789")
        names += [other for other in (disk, name) if other in (*disks, name) and other not in names]
    return names


def _describe(g: Any, name: str) -> dict[str, Any]:
    kind = content(g, name)
    return {
        "name": name,
        "size": g.blockdev_getsize64(name),
        "content": kind or _text(g, "part_get_parttype", name),
        "label": _text(g, "vfs_label", name) if kind else None,
        "uuid": _text(g, "vfs_uuid", name) if kind else None,
    }


def _subvolumes(g: Any, name: str) -> list[str]:
    try:
        found = g.btrfs_subvolume_list(name)
    except RuntimeError as exc:
        reason(g, exc)
        return []
    return [f"btrfsvol:{name}/{each['btrfssubvolume_path']}" for each in found]


def _text(g: Any, call: str, name: str) -> Any:
    """What libguestfs says; None if that is nothing, or a failure."""
    try:
        return getattr(g, call)(name) or None
    except RuntimeError as exc:
        reason(g, exc)
        return None
