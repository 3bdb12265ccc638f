"""nbdtool guestfs: what is inside disk images: partitions, logical volumes, files."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING, Any

from nbdtool.disk import Disk
from nbdtool.errors import Error, Uncertain, UsageError
from nbdtool.values import add_flag

if TYPE_CHECKING:
    from nbdtool.commands.guestfs.indirect import Request
    from nbdtool.commands.guestfs.inputs import Drive
    from nbdtool.disks.guestfs.keys import Key

SUMMARY = "serve what is inside disk images: partitions, logical volumes, files"
MAGIC = "disk"


class _AddDisk(argparse._AppendAction):
    """A disk with the format that was given before it."""

    def __call__(
        self, parser: Any, namespace: argparse.Namespace, value: Any, option: Any = None
    ) -> None:
        super().__call__(parser, namespace, (value, namespace.format), option)


def add_arguments(parser: argparse._ActionsContainer) -> None:
    add = parser.add_argument
    add(
        "--disk",
        metavar="DISK",
        action=_AddDisk,
        default=[],
        help="a disk image; several are /dev/sda, /dev/sdb and so on",
    )
    add(
        "--format",
        metavar="FORMAT",
        default="",
        help="of the disks behind it (raw, qcow2, ...); empty to look at each, which takes"
        " everything for raw but qcow2 images that name no other file",
    )
    add("--domain", metavar="DOMAIN", default="", help="the disks of a libvirt guest")
    add("--connect", metavar="URI", default="", help="with domain, the hypervisor")
    add(
        "--mount",
        metavar="MOUNT",
        action="append",
        default=[],
        help="DEVICE[:MOUNTPOINT], a filesystem that the file is in, / by default; or inspect, to"
        " mount what the guest would",
    )
    add(
        "--export",
        metavar="DEVICE|FILE",
        default="",
        help="what is served: a device (/dev/sda1, /dev/VG/LV), or a file in the filesystems"
        " (/images/disk.img); without it every device, as an export of its name",
    )
    add(
        "--key",
        metavar="NAME:key:PASSPHRASE|NAME:file:FILE",
        action="append",
        default=[],
        help="open what is encrypted; NAME is a device, its UUID, or all",
    )
    add(
        "--direct",
        choices=("auto", "never", "only"),
        default="auto",
        help="read without libguestfs' appliance: where that is certain to give the same (auto),"
        " never, or not at all otherwise (only)",
    )
    add_flag(parser, "--allow-live", help="write although a running guest has the disk")
    add_flag(parser, "--list", help="print the devices and what is on them, and exit")
    add_flag(parser, "--trace", help="with -v, print libguestfs' calls")
    add_flag(parser, "--debug", help="with -v, print libguestfs' messages")


def open(args: argparse.Namespace) -> dict[str, Disk]:
    from nbdtool.disks.guestfs.keys import parse_key

    _check_usage(args)
    keys = [parse_key(text) for text in args.key]
    drives = _find_drives(args, writable=args.writable)
    opened, reason = _open_directly(args, drives)
    if not opened:
        opened = _open_indirectly(args, drives, keys)
        for disk in opened.values():
            disk.description += reason
    if len(opened) > 1 and not args.run:  # the server's line only counts them
        from nbdtool.table import printable

        name, disk = next(iter(opened.items()))
        what = f"{len(opened)} devices{disk.description[len(name) :]}"
        print(f"nbdtool: {printable(what)}", file=sys.stderr)
    return opened


def listing(args: argparse.Namespace) -> str:
    """What --list prints; raises Error or OSError."""
    from nbdtool.commands.guestfs.indirect import list_indirect
    from nbdtool.disks.guestfs.keys import parse_key

    keys = [parse_key(text) for text in args.key]
    drives = _find_drives(args, writable=False)
    return list_indirect(_request(args, drives, keys, writable=False), as_json=args.json)


def _find_drives(args: argparse.Namespace, *, writable: bool) -> list[Drive]:
    from nbdtool.commands.guestfs.inputs import find_drives

    return find_drives(
        args.disk, args.domain, args.connect, writable=writable, allow_live=args.allow_live
    )


def _request(
    args: argparse.Namespace, drives: list[Drive], keys: list[Key], *, writable: bool
) -> Request:
    from nbdtool.commands.guestfs.indirect import Request

    return Request(drives, keys, writable, args.debug, args.trace)


def _check_usage(args: argparse.Namespace) -> None:
    from nbdtool.disks.guestfs.mounts import INSPECT, parse_mount

    export = args.export
    for text in args.mount:
        if text != INSPECT:
            parse_mount(text)
    if args.mount and not export:
        raise UsageError("which file? Give export=/PATH, or leave mount= out to serve devices")
    if export and not export.startswith("/"):
        raise UsageError(f"export={export}: a device (/dev/sda1) or a file (/images/disk.img)")
    if export and not export.startswith("/dev/") and not args.mount:
        raise UsageError(
            f"export={export}: on which filesystem? Give mount=inspect or mount=DEVICE (--list"
            " shows what there is)"
        )
    if args.direct == "only" and args.writable:
        raise UsageError("--direct=only is for reading: add -r")


def _open_directly(args: argparse.Namespace, drives: list[Drive]) -> tuple[dict[str, Disk], str]:
    """What can be opened without the appliance; or nothing, and why that is so."""
    if args.writable or args.direct == "never":
        return {}, ""
    from nbdtool.commands.guestfs.direct import open_direct

    try:
        if args.key and not args.export:
            raise Uncertain("only libguestfs opens what is encrypted")
        return open_direct(drives, args.mount, args.export), ""
    except Uncertain as exc:
        if args.direct == "only":
            raise Error(f"--direct=only: {exc}") from None
        return {}, f" ({exc})"


def _open_indirectly(
    args: argparse.Namespace, drives: list[Drive], keys: list[Key]
) -> dict[str, Disk]:
    from nbdtool.commands.guestfs.indirect import open_indirect

    if args.user is not None or args.group is not None:
        raise Error(
            "libguestfs' appliance runs as the user who starts it: run nbdtool as that user, and"
            " leave -u and -g out"
        )
    request = _request(args, drives, keys, writable=args.writable)
    return open_indirect(request, args.mount, args.export)
