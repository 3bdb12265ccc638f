"""The layer tar: a file in a tar archive."""

from __future__ import annotations

import argparse
import os
from typing import TYPE_CHECKING, Any

from nbdtool.disk import Disk

if TYPE_CHECKING:
    from nbdtool.layers.tar.walk import Member

OPTION = "--tar-entry"
FILTER = "tar"
ARGUMENT: dict[str, Any] = {
    "metavar": "NAME",
    "help": "the file NAME in a tar archive; in a pattern, *, ? and [] match exactly one file",
}


def add_arguments(group: argparse._ActionsContainer) -> None:
    """It has no further options."""


def open(disk: Disk, value: Any, args: argparse.Namespace) -> Disk:
    """The file `value` of the archive on `disk`, without copying it; raises Error."""
    from nbdtool.layers.tar.find import find_file

    return open_member(disk, find_file(disk, value))


def open_member(disk: Disk, member: Member) -> Disk:
    """The content of a regular member of the archive on `disk`."""
    from nbdtool.layers.tar.sparse import SparseMember
    from nbdtool.layers.window import Window

    description = f"{disk.description}: {os.fsdecode(member.name)}"
    if member.sparse is not None:
        return SparseMember(disk, member.offset, member.size, member.sparse, description)
    return Window(disk, member.offset, member.size, description)
