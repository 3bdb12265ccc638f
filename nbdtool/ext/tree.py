"""The tree that becomes a filesystem: packed inodes and the names that lead to them.

Everything is indexed by inode number, which is given when a node is added and never changes; a
node that a later source replaced keeps its number, and its inode is left free on disk.
"""

from __future__ import annotations

import stat
from array import array
from collections.abc import Iterable
from typing import Any, Optional, Protocol

from nbdtool.disk import SpanFile
from nbdtool.errors import Error
from nbdtool.ext.descriptors import Recent, raise_descriptor_limit
from nbdtool.ext.structures import (
    EMPTY_EXTENTS,
    EXTENTS_FL,
    EXTRA_ISIZE_BYTES,
    FIRST,
    INODE_SIZE,
    LINK_MAX,
    PACK_INODE,
    ROOT,
    TIME_MAX,
    TIME_MIN,
)

FAST_SYMLINK = 60  # a shorter target is kept in i_block
WHITEOUT, OPAQUE = b".wh.", b".wh..wh..opq"
LOST_AND_FOUND = b"lost+found"
_SECOND = 1_000_000_000
_FIRST_TIME, _LAST_TIME = TIME_MIN * _SECOND, TIME_MAX * _SECOND + _SECOND - 1


class Tree:
    """Nodes by inode number (2 is the root, 11 is lost+found), as sources add them.

    Children are added after their directory. A name that is there already is replaced; a directory
    over a directory is merged. `extents` says how files are mapped (ext4) or not (ext2, ext3).
    """

    def __init__(
        self,
        *,
        extents: bool = False,
        owner: tuple[Optional[int], Optional[int]] = (None, None),
        clamp: Optional[int] = None,
        mtime: Optional[int] = None,
    ) -> None:
        """owner: uid and gid for all nodes; clamp: no time is later, and atime and ctime aren't
        copied; mtime: the only time; both in nanoseconds."""
        self.extents = extents
        self.owner = owner
        self.clamp, self.mtime = clamp, mtime
        self._uniform = owner != (None, None) or clamp is not None or mtime is not None
        self._mapped = (EMPTY_EXTENTS, EXTENTS_FL) if extents else (b"", 0)
        self.inodes = bytearray(INODE_SIZE * FIRST)
        self.names = [b""] * FIRST
        self.parents = array("I", [0]) * FIRST
        self.sizes = array("Q", [0]) * FIRST
        self.places = array("Q", [0]) * FIRST  # where content starts in what its origin opens
        self.ends = array("Q", [0]) * FIRST  # where it ends there
        self.origin_of = bytearray(FIRST)  # which of the sources it comes from
        self.children: dict[int, dict[bytes, int]] = {}
        self.regular = array("I")  # regular files with content
        self.segments: dict[int, list[tuple[int, int, int]]] = {}  # of sparse files
        self.targets: dict[int, bytes] = {}  # symlinks that aren't fast
        self.xattrs: dict[int, tuple[Any, ...]] = {}  # of xattr.Attribute, sorted
        self._xattr_sets: dict[tuple[Any, ...], tuple[Any, ...]] = {}
        self.merged: set[int] = set()  # directories that the present source has, too
        self.linked: set[int] = set()  # what has or had more than one name
        self.replaced = False
        self.odd_times: dict[int, None] = {}  # whose times had to be moved into range, in order
        self.children[ROOT] = {}
        self.parents[ROOT] = ROOT
        time = mtime or 0
        self.put(ROOT, stat.S_IFDIR | 0o755, 0, 0, 0, time, time, time, b"")
        self.add(ROOT, LOST_AND_FOUND, stat.S_IFDIR | 0o700, 0, 0, 0, time, time, time)

    def add(
        self,
        parent: int,
        name: bytes,
        mode: int,
        uid: int,
        gid: int,
        size: int,
        atime: int,
        ctime: int,
        mtime: int,
        content: bytes = b"",
        origin: int = 0,
        place: int = 0,
    ) -> int:
        """Add a node and return its inode number. Times in nanoseconds.

        content: a symlink's target, or a device's i_block; place: where a regular file's
        `size` bytes start in the file that source number `origin` opens for it.
        """
        siblings = self.children[parent]
        kind = mode & 0o170000
        ino = siblings.get(name)
        if ino is not None and not (kind == stat.S_IFDIR and ino in self.children):
            if ino == FIRST:
                raise Error(
                    "lost+found is not a directory in the source: ext filesystems need that name;"
                    " rename it or leave it out with --exclude=lost+found"
                )
            self.remove(parent, name)
            ino = None
        if ino is None:
            ino = len(self.names)
            siblings[name] = ino
            self.names.append(name)
            self.parents.append(parent)
            self.sizes.append(size)
            self.places.append(place)
            self.ends.append(place + size)
            self.origin_of.append(origin)
            self.inodes += bytes(INODE_SIZE)
            if kind == stat.S_IFDIR:
                self.children[ino] = {}
            elif kind == stat.S_IFREG and size:
                self.regular.append(ino)
        else:  # a directory takes the attributes of the later source
            self.merged.add(ino)
            self.xattrs.pop(ino, None)
        self.put(ino, mode, uid, gid, size, atime, ctime, mtime, content)
        return ino

    def set_segments(self, ino: int, segments: list[tuple[int, int, int]]) -> None:
        """Say that a file is sparse: its data are (offset, length, place), in order."""
        self.segments[ino] = segments
        self.ends[ino] = max((place + length for _, length, place in segments), default=0)

    def set_xattrs(self, ino: int, attributes: Iterable[Any]) -> None:
        """Give a node extended attributes (xattr.Attribute); equal sets are kept once."""
        key = tuple(sorted(attributes))
        if key:
            self.xattrs[ino] = self._xattr_sets.setdefault(key, key)

    def set_root(self, mode: int, uid: int, gid: int, atime: int, ctime: int, mtime: int) -> None:
        """Give the root the attributes of a source's root; the last source wins."""
        self.xattrs.pop(ROOT, None)
        self.put(ROOT, mode, uid, gid, 0, atime, ctime, mtime, b"")
        if not any(self.inodes[FIRST * INODE_SIZE + 8 : FIRST * INODE_SIZE + 20]):
            # lost+found is ours: as old as the root
            self.put(FIRST, stat.S_IFDIR | 0o700, 0, 0, 0, mtime, mtime, mtime, b"")

    def link(self, parent: int, name: bytes, ino: int) -> None:
        """Add another name for a node that isn't a directory."""
        siblings = self.children[parent]
        if name in siblings:
            self.remove(parent, name)
        siblings[name] = ino
        self.linked.add(ino)

    def apply_whiteouts(self, parent: int, names: list[bytes], first: int) -> list[bytes]:
        """Take away what whiteouts among a directory's names hide; answer the other names.

        `.wh.NAME` hides NAME, and `.wh..wh..opq` all that is in the directory, but only what has
        a number below `first`: what came from sources before. OCI image specification, layer.md.
        """
        marks = [name for name in names if name.startswith(WHITEOUT)]
        for mark in marks:
            if mark == OPAQUE:
                self.clear(parent, first)
            else:
                self.hide(parent, mark[len(WHITEOUT) :], first)
        return [name for name in names if not name.startswith(WHITEOUT)] if marks else names

    def hide(self, parent: int, name: bytes, first: int) -> None:
        """Take a name away that is from a source before; of a merged directory only its part."""
        ino = self.children[parent].get(name, first)
        if ino < first and ino != FIRST:
            if ino in self.merged:
                self.clear(ino, first)
            else:
                self.remove(parent, name)

    def clear(self, directory: int, first: int) -> None:
        """Hide all that is in a directory."""
        for name in list(self.children[directory]):
            self.hide(directory, name, first)

    def remove(self, parent: int, name: bytes) -> None:
        """Take a name away, and what is below it."""
        ino = self.children[parent].pop(name)
        self.replaced = True
        if ino in self.children and ino != FIRST:
            del self.children[ino]

    def path(self, ino: int) -> bytes:
        """The path of a node, from the root of the tree, without a leading slash."""
        parts = []
        while ino != ROOT:
            parts.append(self.names[ino])
            ino = self.parents[ino]
        return b"/".join(reversed(parts))

    def reachable(self) -> Optional[set[int]]:
        """The inodes that a name leads to, the root included; None if that is all of them."""
        if not self.replaced:
            return None
        found = {ROOT}
        for ino, entries in self.children.items():  # a directory comes after its parent
            if ino in found:
                found.update(entries.values())
        return found

    def put(
        self,
        ino: int,
        mode: int,
        uid: int,
        gid: int,
        size: int,
        atime: int,
        ctime: int,
        mtime: int,
        content: bytes = b"",
    ) -> None:
        """Pack an inode; the parameters are those of `add`."""
        if self._uniform:
            uid = uid if self.owner[0] is None else self.owner[0]
            gid = gid if self.owner[1] is None else self.owner[1]
            if self.mtime is not None:
                atime = ctime = mtime = self.mtime
            elif self.clamp is not None:
                atime = ctime = mtime = min(mtime, self.clamp)
        kind = mode & 0o170000
        flags = 0
        if kind == stat.S_IFREG or kind == stat.S_IFDIR:
            content, flags = self._mapped
        elif kind == stat.S_IFLNK:
            size = len(content)
            if size >= FAST_SYMLINK:
                self.targets[ino] = content
                content, flags = self._mapped
        if not (
            _FIRST_TIME <= mtime <= _LAST_TIME
            and _FIRST_TIME <= ctime <= _LAST_TIME
            and _FIRST_TIME <= atime <= _LAST_TIME
        ):
            self.odd_times[ino] = None
            atime, ctime, mtime = (
                min(max(t, _FIRST_TIME), _LAST_TIME) for t in (atime, ctime, mtime)
            )
        # the low word and the extra word (nanoseconds, epoch bits) of each time: inlined, this
        # runs for every entry of the tree
        asec, ansec = divmod(atime, _SECOND)
        csec, cnsec = divmod(ctime, _SECOND)
        msec, mnsec = divmod(mtime, _SECOND)
        self.inodes[ino << 8 : ino + 1 << 8] = PACK_INODE(
            mode,
            uid & 0xFFFF,
            size & 0xFFFFFFFF,
            asec & 0xFFFFFFFF,
            csec & 0xFFFFFFFF,
            msec & 0xFFFFFFFF,
            gid & 0xFFFF,
            1,
            flags,
            content,
            size >> 32,
            uid >> 16,
            gid >> 16,
            EXTRA_ISIZE_BYTES,
            cnsec << 2 | csec - TIME_MIN >> 32,
            mnsec << 2 | msec - TIME_MIN >> 32,
            ansec << 2 | asec - TIME_MIN >> 32,
        )


def check_links(tree: Tree, ino: int, count: int) -> int:
    """The link count of a node, or Error if the format can't hold it."""
    if count > LINK_MAX:
        name = tree.path(ino).decode(errors="backslashreplace")
        raise Error(f"{name}: has {count} hard links, an ext filesystem holds {LINK_MAX}")
    return count


class Origin(Protocol):
    """Where the contents of regular files come from."""

    def open(self, ino: int) -> SpanFile:
        """The file that holds the content of inode `ino`; OSError names it."""

    def verify_access(self) -> list[str]:
        """The files that can't be opened any more, each with the reason."""


class Contents:
    """The contents of a tree's regular files: what ends at ends[ino] of what `open` answers."""

    def __init__(self, tree: Tree, origins: list[Origin]) -> None:
        self.ends = tree.ends
        self._origin_of = tree.origin_of
        self._origins = origins
        self._recent = Recent(max(4, min(raise_descriptor_limit() // 4, 1 << 15)))

    def open(self, ino: int) -> SpanFile:
        """The file that holds the content of inode `ino`; OSError names it."""
        return self._recent.young.get(ino) or self._open(ino)

    def _open(self, ino: int) -> SpanFile:
        file = self._recent.get(ino)
        if file is None:
            file = self._recent.put(ino, self._origins[self._origin_of[ino]].open(ino))
        return file

    def verify_access(self) -> list[str]:
        """The files that can't be opened any more, each with the reason."""
        return [failure for origin in self._origins for failure in origin.verify_access()]
