"""The way through libguestfs' appliance."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from nbdtool.commands.guestfs.inputs import Drive
from nbdtool.disk import Disk
from nbdtool.disks.guestfs.appliance import Appliance
from nbdtool.disks.guestfs.devices import unlock
from nbdtool.disks.guestfs.disk import PIECE, ApplianceDisk
from nbdtool.disks.guestfs.keys import Key
from nbdtool.disks.guestfs.listing import as_text, describe
from nbdtool.disks.guestfs.nodes import make_nodes
from nbdtool.disks.guestfs.tree import file_size, mount_all
from nbdtool.errors import Error
from nbdtool.layers.readahead import ReadAhead

_WORKERS = 2  # the appliance does one thing at a time; the next waits at its door


@dataclass(frozen=True)
class Request:
    """What is asked of the appliance; debug and trace are libguestfs'."""

    drives: Sequence[Drive]
    keys: Sequence[Key]
    writable: bool
    debug: bool
    trace: bool

    def start(self) -> Appliance:
        """The appliance, with what is encrypted opened. Raises Error, OSError."""
        appliance = Appliance(
            self.drives, writable=self.writable, debug=self.debug, trace=self.trace
        )
        try:
            appliance.start()
            appliance.prepare(partial(unlock, keys=self.keys, read_only=not self.writable))
        except BaseException as exc:
            _end(appliance, exc)
            raise
        return appliance


def open_indirect(request: Request, mounts: Sequence[str], export: str) -> dict[str, Disk]:
    """What export names: a device, a file under the mounts, or "" for all devices by name.

    Raises Error that says what there is, OSError.
    """
    appliance = request.start()
    try:
        appliance.prepare(partial(mount_all, texts=mounts, writable=request.writable))
        if export and not export.startswith("/dev/"):
            return {"": _open_file(appliance, export, request)}
        return _open_devices(appliance, export, request)
    except BaseException as exc:
        _end(appliance, exc)
        raise


def list_indirect(request: Request, *, as_json: bool) -> str:
    """What --list prints. Raises Error, OSError."""
    appliance = request.start()
    try:
        rows = appliance.call(describe)
    except BaseException as exc:
        _end(appliance, exc)
        raise
    appliance.close()
    return as_text(rows, as_json=as_json)


def _end(appliance: Appliance, exc: BaseException) -> None:
    """The appliance isn't needed after all; it ends in good order if there is time for that."""
    if not isinstance(exc, (Error, OSError)):
        appliance.abandon()
        return
    with contextlib.suppress(OSError):  # nothing was written
        appliance.close()


def _open_file(appliance: Appliance, path: str, request: Request) -> Disk:
    size = appliance.prepare(partial(file_size, path=path))
    return _finish(ApplianceDisk(appliance, path, size, writable=request.writable), path, request)


def _open_devices(appliance: Appliance, export: str, request: Request) -> dict[str, Disk]:
    nodes = appliance.prepare(partial(make_nodes, names=[export] if export else []))
    opened = {}
    for node in nodes:
        disk = ApplianceDisk(
            appliance, node.path, node.size, writable=request.writable, device=node.device
        )
        opened["" if export else node.device] = _finish(disk, node.device, request)
    return opened


def _finish(disk: ApplianceDisk, name: str, request: Request) -> Disk:
    drives = ", ".join(map(str, request.drives))
    disk.description = f"{name} of {drives}, through libguestfs"
    return ReadAhead(disk, _WORKERS, PIECE)
