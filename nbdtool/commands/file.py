"""nbdtool file: a plain file or block device."""

from __future__ import annotations

import argparse
import os

from nbdtool import values
from nbdtool.disk import Disk
from nbdtool.disks.file import FileDisk
from nbdtool.errors import Error, UsageError

SUMMARY = "serve a plain file or block device"
MAGIC = "file"


def add_arguments(parser: argparse._ActionsContainer) -> None:
    parser.add_argument("--file", metavar="PATH", help="the file or block device to serve")
    values.add_flag(parser, "--allow-live", help="serve it though a running guest uses it")


def open(args: argparse.Namespace) -> dict[str, Disk]:
    if args.file is None:
        raise UsageError("which file? Give its path: nbdtool file PATH")
    if args.to_file not in (None, "-") and _same(args.file, args.to_file):
        raise Error(f"{args.to_file}: is the source itself; give another target")
    return {"": FileDisk(args.file, writable=args.writable, allow_live=args.allow_live)}


def _same(path: str, other: str) -> bool:
    try:
        return os.path.samefile(path, other)
    except OSError:
        return False
