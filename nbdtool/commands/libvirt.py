"""nbdtool libvirt: the disk of a libvirt guest, stopped or running, whatever its format."""

from __future__ import annotations

import argparse
import sys

from nbdtool import values
from nbdtool.disk import Disk
from nbdtool.errors import UsageError
from nbdtool.values import add_flag

SUMMARY = "serve the disk of a libvirt guest"
MAGIC = "domain"

_METHODS = ("auto", "local", "peek", "volume", "backup")


def add_arguments(parser: argparse._ActionsContainer) -> None:
    add = parser.add_argument
    add("--domain", metavar="DOMAIN", help="the guest: its name, UUID or ID")
    add(
        "--disk",
        metavar="DISK",
        help="its disk: a target (vda) or a source path; without it the only one, or all that the"
        " guest has, each as an export of its target's name",
    )
    add("--connect", metavar="URI", default="", help="the hypervisor (libvirt's default)")
    add("--method", choices=_METHODS, default="auto", help="how the disk is read (auto)")
    add_flag(parser, "--list", help="print the guests and their disks, and exit")
    add(
        "--scratch-dir",
        metavar="DIR",
        default="",
        help="for method backup: where the guest's qemu keeps what the guest overwrites meanwhile"
        " ($TMPDIR or /var/tmp)",
    )
    add_flag(parser, "--force-scratch", help="although there is less room than the disk is large")
    add_flag(
        parser,
        "--quiesce",
        help="for method backup: freeze the guest's filesystems through its agent while it begins",
    )
    add(
        "--password-file",
        metavar="FILE",
        default="",
        help="answer libvirt's question for a password with the first line of FILE",
    )
    add(
        "--reconnect",
        type=values.seconds,
        default=30.0,
        metavar="SECONDS",
        help="how long a read waits for a libvirt that is gone, before it fails (30)",
    )


def open(args: argparse.Namespace) -> dict[str, Disk]:
    from nbdtool.disks.libvirt import guests, methods
    from nbdtool.disks.libvirt.backup import Scratch
    from nbdtool.disks.libvirt.link import Link
    from nbdtool.table import printable

    if args.domain is None:
        raise UsageError("which guest? Give its name: nbdtool libvirt DOMAIN (--list shows all)")
    link = Link(
        args.connect,
        read_only=args.method == "local",
        password_file=args.password_file,
        reconnect=args.reconnect,
    )
    scratch = Scratch(args.scratch_dir, args.force_scratch, args.quiesce)
    try:
        guest = guests.find(link, args.domain)
        disks = guests.choose(guest, args.disk)
        opened = methods.open_disks(link, guest, disks, args.method, scratch)
    except BaseException:
        link.close()
        raise
    if len(opened) > 1 and not args.run:  # the server's line only counts them
        for target, disk in opened.items():
            print(f"nbdtool: {target}: {printable(disk.description)}", file=sys.stderr)
    return opened


def listing(args: argparse.Namespace) -> str:
    """What --list prints; raises Error or OSError."""
    from nbdtool.disks.libvirt.link import Link
    from nbdtool.disks.libvirt.listing import listing

    link = Link(args.connect, read_only=True, password_file=args.password_file, reconnect=0)
    try:
        return listing(link, args.domain, as_json=args.json)
    finally:
        link.close()
