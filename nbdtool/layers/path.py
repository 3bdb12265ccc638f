"""--path: a file in the ext2, ext3 or ext4 filesystem that is on the disk."""

from __future__ import annotations

import argparse
import os
from collections.abc import Collection
from typing import Any, Union

from nbdtool.disk import Disk
from nbdtool.errors import Error, Uncertain

OPTION = "--path"
FILTER = "ext2"
READS_ONLY = True
ARGUMENT: dict[str, Any] = {
    "metavar": "PATH",
    "help": "serve this file of the ext2, ext3 or ext4 filesystem on the disk, read-only",
}


def add_arguments(group: argparse._ActionsContainer) -> None:
    """It has no further options."""


def open(disk: Disk, value: str, args: argparse.Namespace) -> Disk:
    """The file that value names; raises Error if there is none, or it can't be read here."""
    try:
        return open_path(disk, value)
    except Uncertain as exc:
        raise Error(f"{exc}; nbdtool guestfs may be able to read it") from None


def open_path(
    disk: Disk,
    path: Union[bytes, str],
    description: str = "",
    covered: Collection[bytes] = (),
    *,
    mounted: bool = False,
) -> Disk:
    """The file at `path`, as ranges of the disk; Error if there is none, Uncertain if unsure.

    The filesystem starts where the disk does, and must not change while the file is open. covered
    and mounted are those of Filesystem.find().
    """
    from nbdtool.ext.reader import Filesystem
    from nbdtool.layers.mapped import Mapped, Piece

    filesystem = Filesystem(disk)
    _, pieces = filesystem.map(filesystem.find(path, covered, mounted=mounted))
    return Mapped(
        (Piece(n, None if at is None else disk, at or 0) for n, at in pieces),
        [disk],
        description or f"{disk.description}: {os.fsdecode(path)}",
    )
