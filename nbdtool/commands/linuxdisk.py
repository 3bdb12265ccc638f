"""nbdtool linuxdisk: a directory as a GPT disk with one ext2 partition."""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING, Any

from nbdtool.disk import Disk
from nbdtool.errors import Error, UsageError

if TYPE_CHECKING:
    from nbdtool.disks.regions import Regions
    from nbdtool.ext.layout import Layout
    from nbdtool.ext.tree import Tree

SUMMARY = "a directory as a disk with a Linux filesystem"
MAGIC = "dir"


def add_arguments(parser: Any) -> None:
    """Add the options of this subcommand."""
    parser.add_argument(
        "--dir",
        metavar="DIRECTORY",
        help="the directory whose content the filesystem has",
    )


def open(args: Any) -> dict[str, Disk]:
    """{"": the disk}. Error: the directory can't be read, or no filesystem holds it."""
    import gc

    if args.dir is None:
        raise UsageError("which directory? Give its path: nbdtool linuxdisk DIRECTORY")
    enabled = gc.isenabled()
    gc.disable()  # the scan makes many objects and no garbage
    try:
        return {"": _make(args)}
    finally:
        if enabled:
            gc.freeze()
            gc.enable()


def _make(args: Any) -> Disk:
    import uuid

    from nbdtool.ext.layout import Layout
    from nbdtool.ext.scan import HostTree
    from nbdtool.ext.sizing import Options
    from nbdtool.ext.tree import Tree

    tree = Tree()
    source = HostTree(args.dir, tree)
    if args.to_file not in (None, "-"):
        _refuse_inside(args.to_file, args.dir)
    source.scan()
    options = Options(uuid=uuid.uuid4().bytes, time=int(time.time()))
    return _disk(tree, Layout(tree, options), args.dir)


def _disk(tree: Tree, layout: Layout, name: str) -> Regions:
    """The disk: a partition table around the filesystem."""
    import uuid
    from array import array

    from nbdtool import gpt
    from nbdtool.disks.regions import Regions
    from nbdtool.ext.groups import derive

    start = gpt.ALIGNMENT
    size = gpt.disk_size(start + layout.size)
    guids = [str(uuid.UUID(bytes=derive(layout.uuid, what))) for what in ("disk", "partition")]
    partition = gpt.Partition(start, layout.size, guid=guids[1])
    primary, backup = gpt.tables(size, guids[0], [partition])
    memory = [*layout.memory, primary, backup]
    starts = array("Q", [0, len(primary)])
    starts.extend(offset + start for offset in layout.starts)
    starts.extend((start + layout.size, size - len(backup)))
    owners = array("i", [len(memory) - 1, 0]) + layout.owners + array("i", [0, len(memory)])
    places = array("Q", [0, 0]) + layout.places + array("Q", [0, 0])
    disk = Regions(size, starts, owners, places, memory, tree)
    disk.description = f"{name} as ext2 in a GPT partition"
    return disk


def _refuse_inside(target: str, directory: str) -> None:
    """Error: the disk would be written into the tree that it is made of."""
    root = os.stat(directory)
    path = os.path.dirname(os.path.realpath(target))
    while True:
        try:
            if os.path.samestat(os.stat(path), root):
                raise Error(
                    f"{target}: is inside {directory}, which it would be a copy of: choose a place"
                    " outside"
                )
        except OSError:
            pass  # no such directory: the writer says so
        parent = os.path.dirname(path)
        if parent == path:
            return
        path = parent
