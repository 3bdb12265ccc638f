"""The filesystems that mount= asks for, and the files in them."""

from __future__ import annotations

import posixpath
from collections.abc import Sequence
from typing import Any

from nbdtool.disks.guestfs.devices import LISTED, content, devices, listed, reason
from nbdtool.disks.guestfs.mounts import INSPECT, Mount, parse_mount
from nbdtool.errors import Error, warn


def mount_all(g: Any, texts: Sequence[str], *, writable: bool) -> None:
    """Mount what mount= says, in this order."""
    for text in texts:
        if text == INSPECT:
            _mount_guest(g, writable)
            continue
        mount = parse_mount(text)
        try:
            _mount(g, mount, writable)
        except RuntimeError as exc:
            why = reason(g, exc)
            raise Error(f"mount={text}: {why}; there is {_filesystems(g)}") from None


def _mount(g: Any, mount: Mount, writable: bool) -> None:
    (g.mount if writable else g.mount_ro)(mount.device, mount.point)


def _filesystems(g: Any) -> str:
    return listed(f"{name} ({content(g, name) or 'unknown'})" for name in devices(g)[:LISTED])


def _mount_guest(g: Any, writable: bool) -> None:
    """What the one operating system on the drives would mount."""
    roots = g.inspect_os()
    if len(roots) != 1:
        found = f"several operating systems ({listed(roots)})" if roots else "no operating system"
        raise Error(
            f"mount=inspect: {found} found; choose with mount=DEVICE: there is {_filesystems(g)}"
        )
    points = g.inspect_get_mountpoints(roots[0])
    for point in sorted(points, key=len):
        try:
            _mount(g, Mount(points[point], point), writable)
        except RuntimeError as exc:
            why = f"mount=inspect: {points[point]} on {point}: {reason(g, exc)}"
            if point == "/":
                raise Error(why) from None
            warn(why)


def file_size(g: Any, path: str) -> int:
    """Bytes in a regular file."""
    if not g.is_file(path, followsymlinks=True):
        raise Error(f"export={path}: {_why_not(g, path)}")
    return int(g.filesize(path))


def _why_not(g: Any, path: str) -> str:
    if g.is_dir(path, followsymlinks=True):
        return f"is a directory, with {_entries(g, path)}"
    if g.exists(path):
        return "is neither a file nor a directory"
    while not g.is_dir(path, followsymlinks=True) and path != "/":
        path = posixpath.dirname(path)
    return f"no such file; in {path} there is {_entries(g, path)}"


def _entries(g: Any, path: str) -> str:
    try:
        return listed(g.ls(path))
    except RuntimeError as exc:
        return reason(g, exc)
