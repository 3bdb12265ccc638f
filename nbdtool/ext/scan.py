"""A directory of the host: scanned once, its files opened when their data is read."""

from __future__ import annotations

import contextlib
import errno
import fnmatch
import os
import re
import stat
from array import array
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Optional, Union

from nbdtool.disk import SpanFile, Stamp
from nbdtool.errors import Error, warn
from nbdtool.ext.descriptors import (
    OPEN_DIRECTORY,
    Recent,
    open_file,
    open_unnoticed,
    raise_descriptor_limit,
    working_directory,
)
from nbdtool.ext.structures import ROOT, encode_device
from nbdtool.ext.tree import Tree
from nbdtool.ext.xattr import attribute

_LOW = 0xFFFFFFFF
_MAX_NAME = 255  # bytes; filesystems that count letters have longer ones
# what the kernel makes up: none of it belongs on a disk
_PSEUDO_FILESYSTEMS = frozenset(
    [
        "autofs",
        "binfmt_misc",
        "bpf",
        "cgroup",
        "cgroup2",
        "configfs",
        "debugfs",
        "devpts",
        "devtmpfs",
        "efivarfs",
        "fusectl",
        "hugetlbfs",
        "mqueue",
        "nsfs",
        "proc",
        "pstore",
        "rpc_pipefs",
        "securityfs",
        "selinuxfs",
        "sysfs",
        "tracefs",
    ]
)


class Selection(NamedTuple):
    """What of a directory is taken."""

    exclude: Sequence[str] = ()  # globs; one with a slash is for the path from the root
    one_file_system: bool = False
    skip_unreadable: bool = False  # leave it out with a warning
    whiteouts: bool = False  # .wh.NAME hides NAME of the sources before, as in container layers


_ALL = Selection()


class HostTree:
    """A directory of the host as an origin of a tree's nodes.

    Files are opened one path component at a time, relative to the directory that was scanned and
    without following a symlink, so that no change of the tree can lead outside it.
    """

    def __init__(self, path: str, tree: Tree, number: int = 0, selection: Selection = _ALL) -> None:
        """number: which of the tree's sources this is. Error: no such directory, or not one."""
        self.path = path
        self._tree = tree
        self._selection = selection
        self._number = number
        try:
            # the directory that the user names may be a symlink
            root = os.open(path, OPEN_DIRECTORY & ~os.O_NOFOLLOW)
        except OSError as error:
            raise Error(f"{path}: {_reason(error)}") from None
        self._root = SpanFile(root, path)
        self._directories = Recent(max(4, min(raise_descriptor_limit() // 16, 1024)))
        self._stamps: dict[int, int] = {}  # by inode number: where in the next two
        self._identities = array("Q")  # device, inode
        self._changes = array("q")  # mtime, ctime, each in two words: the last days have 65 bits
        self._device = 0
        self._excluded = excluder(selection.exclude)
        self._first = len(tree.names)  # what has a lower number is from other sources
        self.unreadable: list[str] = []
        self._foreign_xattrs: set[str] = set()
        self._reader = _identity()

    def scan(self, report: Callable[[int], None] = lambda count: None) -> None:
        """Add the directory to the tree; report is told how many files there are so far.

        Error names what can't be read.
        """
        tree = self._tree
        with working_directory():
            st = os.fstat(self._root.fd)
            self._device = st.st_dev
            tree.set_root(
                st.st_mode, st.st_uid, st.st_gid, st.st_atime_ns, st.st_ctime_ns, st.st_mtime_ns
            )
            try:
                self._read_attributes(ROOT, self._root.fd, _attributes(self._root.fd))
            except OSError as error:
                self.unreadable.append(f"{self.path}: {_reason(error)}")
            pending = [ROOT]
            links: dict[tuple[int, int], int] = {}
            while pending:
                found = self._scan_directory(pending.pop(), links)
                found.reverse()
                pending += found
                report(len(tree.names) - self._first)
        if self.unreadable:
            text = f"{_summary(self.unreadable)}"
            if not self._selection.skip_unreadable:
                raise Error(f"can't read {text} (--skip-unreadable leaves such files out)")
            warn(f"left out, can't read {text}")
        if self._foreign_xattrs:
            shown = ", ".join(sorted(self._foreign_xattrs)[:10])
            warn(f"{self.path}: left out extended attributes that ext filesystems lack: {shown}")

    def _scan_directory(self, parent: int, links: dict[tuple[int, int], int]) -> list[int]:
        """Add what is in a directory; return its directories, in order."""
        tree = self._tree
        add = tree.add
        number = self._number
        lstat = os.lstat
        changes = self._changes
        # who isn't root finds out now, not when a client reads
        check = os.geteuid() != 0
        directories: list[int] = []
        try:
            os.fchdir(self._directory(parent).fd)
            names = os.listdir(b".")
        except OSError as error:
            self.unreadable.append(f"{self._shown(parent)}: {_reason(error)}")
            return directories
        names.sort()
        for name in [name for name in names if len(name) > _MAX_NAME]:
            self.unreadable.append(f"{self._shown(parent, name)}: the name is too long for ext")
            names.remove(name)
        if self._excluded:
            prefix = tree.path(parent)
            prefix = prefix + b"/" if prefix else b""
            names = [name for name in names if not self._excluded(prefix + name)]
        if self._selection.whiteouts:
            names = tree.apply_whiteouts(parent, names, self._first)
        for name in names:
            try:
                st = lstat(name)
                mode, inode, device, nlink, uid, gid, size = st[:7]
                kind = mode & 0o170000
                content = b""
                if nlink > 1 and kind != stat.S_IFDIR:
                    known = links.get((device, inode))
                    if known is not None:
                        tree.link(parent, name, known)
                        continue
                if kind == stat.S_IFREG:
                    if check and not os.access(name, os.R_OK, effective_ids=True):
                        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
                elif kind == stat.S_IFLNK:
                    content = os.readlink(name)
                elif kind == stat.S_IFBLK or kind == stat.S_IFCHR:
                    content = encode_device(os.major(st.st_rdev), os.minor(st.st_rdev))
                    size = 0
                else:
                    size = 0
                mtime, ctime = st.st_mtime_ns, st.st_ctime_ns
                attributes = _attributes(name, follow_symlinks=False)
                ino = add(
                    parent,
                    name,
                    mode,
                    uid,
                    gid,
                    size,
                    st.st_atime_ns,
                    ctime,
                    mtime,
                    content,
                    number,
                )
                if kind == stat.S_IFDIR:
                    if device == self._device or self._enters(ino, device):
                        directories.append(ino)
                elif nlink > 1:
                    links[device, inode] = ino
                    tree.linked.add(ino)
                if kind == stat.S_IFREG and size:
                    self._stamps[ino] = len(self._identities)
                    self._identities.extend((device, inode))
                    changes.extend((mtime >> 32, mtime & _LOW, ctime >> 32, ctime & _LOW))
                    if st.st_blocks << 9 < size:
                        self._find_holes(ino, name, size)
                if attributes:
                    self._read_attributes(ino, name, attributes)
            except FileNotFoundError:
                continue  # it was removed since it was listed
            except (OSError, ValueError) as error:
                self.unreadable.append(f"{self._shown(parent, name)}: {_reason(error)}")
                if name in tree.children[parent]:
                    tree.remove(parent, name)
        return directories

    def _enters(self, ino: int, device: int) -> bool:
        """Whether to scan a directory that is on another filesystem than the root."""
        if self._selection.one_file_system:
            return False
        kind = _filesystem_types().get(device, "")
        if kind in _PSEUDO_FILESYSTEMS:
            warn(f"{self._shown(ino)}: left out what is in it, a {kind} filesystem")
            return False
        return True

    def _find_holes(self, ino: int, name: bytes, size: int) -> None:
        """Note which ranges of a sparse file hold data."""
        file = SpanFile(open_file(name, None), "")
        segments = []
        end = 0
        while end < size:
            try:
                start = os.lseek(file.fd, end, os.SEEK_DATA)
                end = min(os.lseek(file.fd, start, os.SEEK_HOLE), size)
            except OSError as error:
                if error.errno == errno.ENXIO:  # no data up to the end
                    break
                raise
            if start >= size:
                break
            segments.append((start, end - start, start))
        if segments != [(0, size, 0)]:
            self._tree.set_segments(ino, segments)

    def _read_attributes(self, ino: int, file: Union[bytes, int], names: list[str]) -> None:
        """Read the extended attributes of a file; note the kinds that no ext filesystem has."""
        follow = isinstance(file, int)
        found = []
        for name in names:
            try:
                value = os.getxattr(file, name, follow_symlinks=follow)
            except OSError as error:
                if error.errno == errno.ENODATA:  # removed meanwhile
                    continue
                raise
            one = attribute(os.fsencode(name), value)
            if one is not None:
                found.append(one)
            else:
                self._foreign_xattrs.add(name)
        self._tree.set_xattrs(ino, found)

    def verify_access(self) -> list[str]:
        """The files that can't be opened any more, each with the reason."""
        if _identity() == self._reader:
            return []  # who scanned them can
        failures = []
        for ino in self._stamps:
            try:
                self.open(ino)
            except OSError as error:
                failures.append(str(error.strerror))
        return failures

    def open(self, ino: int) -> SpanFile:
        """Open a file of the tree, if it is still what was scanned; OSError (EIO) names it."""
        tree = self._tree
        at = self._stamps[ino]
        device, inode = self._identities[at : at + 2]
        high, low, *changed = self._changes[2 * at : 2 * at + 4]
        mtime, ctime = high << 32 | low, changed[0] << 32 | changed[1]
        stamp = Stamp(device, inode, tree.sizes[ino], mtime, ctime)
        try:
            fd = open_file(tree.names[ino], self._directory(tree.parents[ino]).fd)
        except OSError as error:
            raise OSError(errno.EIO, f"{self._shown(ino)}: {_reason(error)}") from None
        file = _TreeFile(fd, self.path, tree, ino, stamp)
        file.check()  # it is what was scanned, and so a regular file
        return file

    def _directory(self, ino: int) -> SpanFile:
        """An open directory of the tree, found from the nearest ancestor that is open."""
        missing = []
        directory: Optional[SpanFile] = None
        while directory is None:
            directory = self._root if ino == ROOT else self._directories.get(ino)
            if directory is None:
                missing.append(ino)
                ino = self._tree.parents[ino]
        for ino in reversed(missing):
            name = self._tree.names[ino]
            fd = open_unnoticed(name, OPEN_DIRECTORY, directory.fd)
            directory = self._directories.put(ino, SpanFile(fd, ""))
        return directory

    def _shown(self, ino: int, name: Optional[bytes] = None) -> str:
        """The path of a node in the host, for messages."""
        path = self._tree.path(ino)
        if name is not None:
            path = path + b"/" + name if path else name
        return _shown_path(self.path, path)


def _identity() -> tuple[int, int, list[int]]:
    """Who the process is, as far as permissions go."""
    return os.geteuid(), os.getegid(), os.getgroups()


class _TreeFile(SpanFile):
    """A file of the tree, whose path is only put together when a message needs it."""

    __slots__ = ("_ino", "_root", "_tree")

    def __init__(self, fd: int, root: str, tree: Tree, ino: int, stamp: Stamp) -> None:
        self.fd = fd
        self.stamp = stamp
        self._root, self._tree, self._ino = root, tree, ino

    @property
    def name(self) -> str:  # type: ignore[override]
        return _shown_path(self._root, self._tree.path(self._ino))


def _shown_path(root: str, path: bytes) -> str:
    text = os.fsdecode(os.path.join(os.fsencode(root), path) if path else root)
    return text if text.isprintable() else ascii(text)


def _attributes(file: Union[int, bytes], *, follow_symlinks: bool = True) -> list[str]:
    """The names of a file's extended attributes; none where the filesystem has no such thing."""
    try:
        return os.listxattr(file, follow_symlinks=follow_symlinks)
    except OSError as error:
        if error.errno != errno.EOPNOTSUPP:
            raise
        return []


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error)


def _summary(items: list[str]) -> str:
    """One line for a list of failures: the first ten and how many there are."""
    if len(items) == 1:
        return items[0]
    rest = f"; and {len(items) - 10} more" if len(items) > 10 else ""
    return f"{len(items)} files: " + "; ".join(items[:10]) + rest


def excluder(globs: Sequence[str]) -> Optional[Callable[[bytes], Any]]:
    """What tells whether a path is excluded; None if nothing is."""
    patterns = []
    for glob in globs:
        pattern = fnmatch.translate(glob.strip("/"))
        patterns.append(pattern if "/" in glob.rstrip("/") else rf"(?:.*/)?(?:{pattern})")
    joined = "|".join(f"(?:{pattern})" for pattern in patterns)
    return re.compile(os.fsencode(joined), re.DOTALL).fullmatch if patterns else None


def _filesystem_types() -> dict[int, str]:
    """The type of each mounted filesystem by device number."""
    types = {}
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/mountinfo").read_bytes().splitlines():
            mount, _, rest = line.partition(b" - ")
            major, minor = mount.split()[2].split(b":")
            types[os.makedev(int(major), int(minor))] = rest.split()[0].decode(errors="replace")
    return types
