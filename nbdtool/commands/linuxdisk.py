"""nbdtool linuxdisk: directories as a GPT disk with one ext2, ext3 or ext4 partition."""

from __future__ import annotations

import argparse
import io
import os
import stat
from typing import TYPE_CHECKING, Any, NamedTuple, Optional

from nbdtool import values
from nbdtool.disk import Disk
from nbdtool.errors import Error, UsageError, warn

if TYPE_CHECKING:
    from nbdtool.disks.regions import Regions
    from nbdtool.ext.archive import Archive
    from nbdtool.ext.layout import Layout
    from nbdtool.ext.scan import HostTree
    from nbdtool.ext.sizing import Options
    from nbdtool.ext.tree import Contents, Tree
    from nbdtool.zstd import Readable as _Readable

SUMMARY = "serve a directory as a disk with a Linux filesystem"
MAGIC = "dir"

_LABEL_BYTES = 16
_MAX_SOURCES = 255
_SECOND = 1_000_000_000  # in nanoseconds


class _Size(NamedTuple):
    bytes: int
    free: bool  # so much free space, not in all


def add_arguments(parser: argparse._ActionsContainer) -> None:
    add = parser.add_argument
    add("--dir", metavar="DIRECTORY", action="append", default=[],
        help="a directory whose content the filesystem has, or a tar archive (- is standard"
        " input); of several, later ones are laid over earlier ones")  # fmt: skip
    add("--type", choices=("ext2", "ext3", "ext4"), default="ext2", help="the filesystem (ext2)")
    add("--label", type=_label, default="", help="the filesystem's label, at most 16 bytes")
    add("--size", type=_size, metavar="[+]SIZE",
        help="the filesystem's size, or with + the space that is at least free in it"
        " (default: what the files need, and a little room)")  # fmt: skip
    add("--uuid", type=_uuid, help="the filesystem's UUID, from which the disk's GUIDs follow")
    add("--inodes", type=_count, metavar="N", help="the least number of inodes")
    add("--reserved", type=_percent, default=0.0, metavar="PERCENT",
        help="the blocks that only root may use (0)")  # fmt: skip
    add("--block-size", type=values.size, default=4096, help="1024, 2048 or 4096 bytes (4096)")
    values.add_flag(parser, "--no-journal", help="ext3 and ext4 without a journal")
    add("--exclude", metavar="GLOB", action="append", default=[],
        help="leave out files of this name, or with a slash of this path")  # fmt: skip
    values.add_flag(parser, "--one-file-system", default=None,
                    help="leave out what other filesystems hold (on for /)")  # fmt: skip
    values.add_flag(parser, "--skip-unreadable", help="leave out files that can't be read")
    values.add_flag(parser, "--copy", help="copy all data first, for files that may change")
    values.add_flag(parser, "--whiteouts", help="a file .wh.NAME hides NAME of the sources before")
    values.add_flag(parser, "--all-root", help="all files belong to root")
    add("--chown", type=_owner, metavar="UID:GID", help="all files belong to these numbers")
    add("--mtime", type=_time, metavar="TIME",
        help="the time of all files: seconds since 1970, or like 2026-12-31T23:59:59Z")  # fmt: skip
    add("--part-type", default="linux", metavar="NAME",
        help="the partition's type: linux, root-x86-64, home, esp, ... or a GUID")  # fmt: skip


def _size(text: str) -> _Size:
    free = text.startswith("+")
    return _Size(values.size(text[free:]), free)


def _label(text: str) -> str:
    if len(os.fsencode(text)) > _LABEL_BYTES:
        raise argparse.ArgumentTypeError(f"longer than {_LABEL_BYTES} bytes: {text!r}")
    return text


def _uuid(text: str) -> bytes:
    import uuid

    try:
        return uuid.UUID(text).bytes
    except ValueError:
        raise argparse.ArgumentTypeError(f"not a UUID: {text!r}") from None


def _count(text: str) -> int:
    if not text.isdecimal() or not 0 < int(text) < 1 << 32:
        raise argparse.ArgumentTypeError(f"not a number of inodes: {text!r}")
    return int(text)


def _percent(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 50:
        raise argparse.ArgumentTypeError(f"not a percentage from 0 to 50: {text!r}")
    return value


def _owner(text: str) -> tuple[Optional[int], Optional[int]]:
    uid, _, gid = text.partition(":")
    for part in (uid, gid):
        if part and (not part.isdecimal() or int(part) >= 1 << 32):
            raise argparse.ArgumentTypeError(f"not UID:GID in numbers: {text!r}")
    return int(uid) if uid else None, int(gid) if gid else None


def _time(text: str) -> int:
    import datetime

    if text.lstrip("@").isdecimal():
        return int(text.lstrip("@"))
    try:
        time = datetime.datetime.fromisoformat(text.replace("Z", "+00:00"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"not a time: {text!r}") from None
    return int((time if time.tzinfo else time.astimezone()).timestamp())


def open(args: argparse.Namespace) -> dict[str, Disk]:
    """{"": the disk}. Error: the directory can't be read, or no filesystem holds it."""
    import gc

    if not args.dir:
        raise UsageError("which directory? Give its path: nbdtool linuxdisk DIRECTORY")
    if args.block_size not in (1024, 2048, 4096):
        raise UsageError(f"--block-size={args.block_size}: choose 1024, 2048 or 4096")
    if args.no_journal and args.type == "ext2":
        warn("--no-journal: ext2 has none anyway")
    if len(args.dir) > _MAX_SOURCES:
        raise UsageError(f"{len(args.dir)} sources are more than {_MAX_SOURCES}")
    if args.all_root and args.chown:
        raise UsageError("--all-root and --chown: choose one")
    _part_type(args.part_type)
    enabled = gc.isenabled()
    gc.disable()  # the scan makes many objects and no garbage
    try:
        return {"": _make(args)}
    finally:
        if enabled:
            gc.freeze()
            gc.enable()


def _make(args: argparse.Namespace) -> Disk:
    from nbdtool.ext.layout import Layout
    from nbdtool.ext.spool import copy_contents
    from nbdtool.ext.tree import Contents, Origin, Tree
    from nbdtool.progress import Progress

    epoch = _source_date_epoch()
    tree = Tree(
        extents=args.type == "ext4",
        owner=(0, 0) if args.all_root else args.chown or (None, None),
        clamp=None if epoch is None else epoch * _SECOND,
        mtime=None if args.mtime is None else args.mtime * _SECOND,
    )
    origins: list[Origin] = []
    for path in args.dir:
        tree.merged.clear()
        if path == "-" or os.path.isfile(path):
            origins.append(_add_archive(path, tree, len(origins), args))
        else:
            origins.append(_add_directory(path, tree, len(origins), args))
    if tree.odd_times:
        shown = ", ".join(os.fsdecode(tree.path(ino)) or "/" for ino in list(tree.odd_times)[:10])
        warn(f"{len(tree.odd_times)} files have dates outside 1901 to 2446, moved there: {shown}")
    if args.copy:
        with Progress("copying", sum(tree.sizes)) as progress:
            origins = [copy_contents(tree, origins, progress.update)]
    return _disk(Contents(tree, origins), Layout(tree, _options(args, epoch)), args)


def _add_directory(path: str, tree: Tree, number: int, args: argparse.Namespace) -> HostTree:
    from nbdtool.ext.scan import HostTree, Selection
    from nbdtool.progress import Progress

    if args.to_file not in (None, "-"):
        _refuse_inside(args.to_file, path)
    alone = args.one_file_system
    selection = Selection(
        exclude=args.exclude,
        one_file_system=os.path.realpath(path) == "/" if alone is None else alone,
        skip_unreadable=args.skip_unreadable,
        whiteouts=args.whiteouts,
    )
    source = HostTree(path, tree, number, selection)
    with Progress("reading the tree", unit="files") as progress:
        source.scan(progress.update)
    return source


def _add_archive(path: str, tree: Tree, number: int, args: argparse.Namespace) -> Archive:
    import lzma
    import zlib

    from nbdtool.disk import SpanFile, Stamp
    from nbdtool.ext.archive import Archive
    from nbdtool.ext.spool import Spool
    from nbdtool.layers.tar.walk import walk
    from nbdtool.progress import Progress

    name = "standard input" if path == "-" else path
    try:
        fd = os.dup(0) if path == "-" else os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        st = os.fstat(fd)
        file = SpanFile(fd, name, Stamp.of(st) if stat.S_ISREG(st.st_mode) else None)
        with io.FileIO(fd, closefd=False) as raw, io.BufferedReader(raw) as buffered:
            stream = _decompressed(buffered, name)
            if file.stamp is None or stream is not buffered:
                spool = Spool()
                with Progress(f"unpacking {name}") as progress:
                    spool.write(stream, progress.update)
                file = spool.file
    except OSError as error:
        raise Error(f"{name}: {error.strerror or error}") from None
    except (EOFError, zlib.error, lzma.LZMAError) as error:
        raise Error(f"{name}: the archive is damaged: {error}") from None
    archive = Archive(name, tree, number, file, exclude=args.exclude, whiteouts=args.whiteouts)
    before = len(tree.names)
    try:
        archive.scan(walk(_Forward(file.fd), name))
    except Error as error:
        if path == "-" or len(tree.names) > before:
            raise
        raise Error(f"{name}: not a directory; {str(error).removeprefix(f'{name}: ')}") from None
    return archive


def _decompressed(stream: Any, name: str) -> _Readable:
    """What a compressed stream unpacks to; the stream itself if it isn't compressed."""
    import bz2
    import gzip
    import lzma

    from nbdtool import zstd

    start = stream.peek(6)[:6]
    if start.startswith(b"\x1f\x8b"):
        return gzip.GzipFile(fileobj=stream)
    if start.startswith(b"\xfd7zXZ\0"):
        return lzma.LZMAFile(stream)
    if start.startswith(b"BZh"):
        return bz2.BZ2File(stream)
    if start.startswith(b"\x28\xb5\x2f\xfd"):
        zstd.require(name)
        return zstd.open_reader(stream)
    unpacked: _Readable = stream
    return unpacked


class _Forward:
    """A file that is read forward, as a walk over an archive wants it."""

    def __init__(self, fd: int) -> None:
        self._size = os.fstat(fd).st_size
        self._file = io.BufferedReader(io.FileIO(fd, closefd=False), 1 << 16)
        self._file.seek(0)

    def read(self, size: int, /) -> bytes:
        return self._file.read(size)

    def seek(self, offset: int, /) -> bool:
        return offset <= self._size and self._file.seek(offset) == offset


def _source_date_epoch() -> Optional[int]:
    """The time that SOURCE_DATE_EPOCH asks for, in seconds: with it the result is reproducible."""
    text = os.environ.get("SOURCE_DATE_EPOCH", "")
    if text and not text.isdecimal():
        raise Error(f"SOURCE_DATE_EPOCH={text}: is no number of seconds")
    return int(text) if text else None


def _options(args: argparse.Namespace, epoch: Optional[int]) -> Options:
    import time
    import uuid

    from nbdtool.ext.sizing import Options

    identity = args.uuid
    if identity is None and epoch is None:
        identity = uuid.uuid4().bytes
    size = args.size or _Size(0, True)
    return Options(
        type=args.type,
        block_size=args.block_size,
        size=None if size.free else size.bytes,
        free=size.bytes if size.free and args.size else None,
        inodes=args.inodes,
        reserved=args.reserved,
        journal=not args.no_journal,
        label=os.fsencode(args.label),
        uuid=identity,
        time=int(time.time()) if epoch is None else epoch,
    )


def _part_type(name: str) -> str:
    """The GUID of a partition type; UsageError if there is no such type."""
    import uuid

    from nbdtool import gpt

    if name in gpt.TYPES:
        return gpt.TYPES[name]
    try:
        return str(uuid.UUID(name))
    except ValueError:
        known = ", ".join(gpt.TYPES)
        raise UsageError(f"--part-type={name}: is neither a GUID nor one of {known}") from None


def _disk(contents: Contents, layout: Layout, args: argparse.Namespace) -> Regions:
    """The disk: a partition table around the filesystem."""
    import uuid
    from array import array

    from nbdtool import gpt
    from nbdtool.disks.regions import Regions
    from nbdtool.ext.groups import derive

    start = gpt.ALIGNMENT
    length = layout.size
    if args.size is not None and not args.size.free:
        length = max(length, args.size.bytes // gpt.SECTOR * gpt.SECTOR)
    size = gpt.disk_size(start + length)
    guids = [str(uuid.UUID(bytes=derive(layout.uuid, what))) for what in ("disk", "partition")]
    partition = gpt.Partition(start, length, _part_type(args.part_type), guids[1], args.label)
    primary, backup = gpt.tables(size, guids[0], [partition])
    memory = [*layout.memory, primary, backup]
    starts = array("Q", [0, len(primary)])
    starts.extend(offset + start for offset in layout.starts)
    starts.extend((start + layout.size, size - len(backup)))
    owners = array("i", [len(memory) - 1, 0]) + layout.owners + array("i", [0, len(memory)])
    places = array("Q", [0, 0]) + layout.places + array("Q", [0, 0])
    disk = Regions(size, starts, owners, places, memory, contents)
    disk.description = f"{', '.join(args.dir)} as {args.type} in a GPT partition"
    return disk


def _refuse_inside(target: str, directory: str) -> None:
    """Error: the disk would be written into the tree that it is made of."""
    try:
        root = os.stat(directory)
    except OSError:
        return  # whoever opens it says so
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
