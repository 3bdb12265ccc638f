"""nbdtool nbd: the export of another NBD server."""

from __future__ import annotations

import argparse

from nbdtool import values
from nbdtool.disk import Disk
from nbdtool.errors import UsageError

SUMMARY = "serve the export of another NBD server"
MAGIC = "uri"


def add_arguments(parser: argparse._ActionsContainer) -> None:
    add = parser.add_argument
    add(
        "--uri",
        metavar="URI",
        help="the export: nbd://HOST[:PORT]/EXPORT or nbd+unix:///EXPORT?socket=PATH; over TLS"
        " nbds:// or nbds+unix://, with tls-certificates=DIR, tls-hostname=NAME and"
        " tls-verify-peer=false in the query",
    )
    add(
        "--connections",
        type=values.count("connections", 1, 16),
        default=4,
        metavar="N",
        help="at most, to a server that allows several (4)",
    )
    add(
        "--reconnect",
        type=values.seconds,
        default=30.0,
        metavar="SECONDS",
        help="how long a request waits for a server that is gone, before it fails (30)",
    )


def open(args: argparse.Namespace) -> dict[str, Disk]:
    from nbdtool.disks.nbd import NbdDisk

    if args.uri is None:
        raise UsageError("which export? Give its URI: nbdtool nbd nbd://HOST/EXPORT")
    disk = NbdDisk(
        args.uri, writable=args.writable, connections=args.connections, reconnect=args.reconnect
    )
    return {"": disk}
