"""The layer qcow2: the disk in a qcow2 image."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from nbdtool.disk import Disk
from nbdtool.errors import Error, UsageError
from nbdtool.values import add_flag, boolean

if TYPE_CHECKING:
    from nbdtool.layers.qcow2.header import Header
    from nbdtool.layers.qcow2.image import Qcow2

OPTION = "--qcow2"
FILTER = "qcow2dec"
READS_ONLY = True  # the source need not be writable
ARGUMENT: dict[str, Any] = {
    "nargs": "?",
    "const": True,
    "type": boolean,
    "metavar": "on|off",
    "help": "the disk in a qcow2 image",
}


def add_arguments(group: argparse._ActionsContainer) -> None:
    group.add_argument(
        "--qcow2-snapshot",
        metavar="NAME",
        default="",
        help="the disk as it was at this internal snapshot (its name or ID) of a qcow2 image",
    )
    group.add_argument(
        "--backing",
        metavar="PATH",
        action="append",
        default=[],
        help="the backing file of a qcow2 image; repeat it for the backing file of that one. "
        "No file is ever opened because an image names it",
    )
    group.add_argument(
        "--backing-format",
        choices=("raw", "qcow2"),
        default="",
        help="the format of a backing file whose format the image doesn't tell",
    )
    add_flag(group, "--allow-corrupt", help="read a qcow2 image although it is marked corrupt")


def open(disk: Disk, value: Any, args: argparse.Namespace) -> Disk:
    """The disk in the qcow2 image on `disk`; raises Error."""
    paths = list(args.backing)
    image = _open_chain(disk, paths, args.backing_format, args.qcow2_snapshot, args.allow_corrupt)
    if paths:
        raise UsageError(f"--backing {paths[0]}: there is no image left that has a backing file")
    return image


def _open_chain(
    disk: Disk, paths: list[str], told: str, snapshot: str = "", allow_corrupt: bool = False
) -> Qcow2:
    """An image over those that its backing files, taken from the front of paths, are."""
    from nbdtool.disks.file import FileDisk
    from nbdtool.layers.qcow2.header import read_header
    from nbdtool.layers.qcow2.image import Qcow2

    header = read_header(disk)
    backing: Disk | None = None
    if header.backing_file and paths:
        backing = FileDisk(paths.pop(0))
        if _backing_format(header, backing, told) == "qcow2":
            backing = _open_chain(backing, paths, told, allow_corrupt=allow_corrupt)
    return Qcow2(disk, backing=backing, snapshot=snapshot, allow_corrupt=allow_corrupt)


def _backing_format(header: Header, backing: Disk, told: str) -> str:
    """raw or qcow2: as the image or else the user says.

    A raw disk may begin like a qcow2 image because a guest wrote that, so that it isn't a guess.
    """
    from nbdtool.layers.qcow2.header import is_qcow2

    name = header.backing_format or told
    if not name and is_qcow2(backing):
        raise Error(
            f"{backing.description}: looks like qcow2, but the image over it doesn't say what its "
            "backing file is; add --backing-format qcow2 (or raw)"
        )
    if name not in ("", "raw", "qcow2"):
        raise Error(f"{backing.description}: a backing file of the format {name!r} can't be read")
    return name or "raw"
