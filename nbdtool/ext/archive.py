"""A tar archive as a source of a tree's nodes.

The members come from a walker of archives; the content of each is a range of the archive itself,
or of a spool file that it was unpacked into.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Mapping
from typing import Any, Optional, Protocol

from nbdtool.disk import SpanFile
from nbdtool.errors import Error, warn
from nbdtool.ext.scan import excluder
from nbdtool.ext.structures import ROOT, encode_device
from nbdtool.ext.tree import OPAQUE, WHITEOUT, Tree
from nbdtool.ext.xattr import attribute, text_acl

_KINDS = {
    b"0": stat.S_IFREG,
    b"2": stat.S_IFLNK,
    b"3": stat.S_IFCHR,
    b"4": stat.S_IFBLK,
    b"5": stat.S_IFDIR,
    b"6": stat.S_IFIFO,
}
_HARD_LINK = b"1"
_MAX_DEPTH = 2048
_MAX_NAME = 255
_XATTR = "SCHILY.xattr."
_ACLS = {
    "SCHILY.acl.access": b"system.posix_acl_access",
    "SCHILY.acl.default": b"system.posix_acl_default",
}

_MINIMAL_ACL = 4 + 3 * 8  # bytes: a header, and the entries of owner, group and others


class Sparse(Protocol):
    """Where the segments of a sparse member are, in it and in what is stored of it."""

    starts: Iterable[int]
    lengths: Iterable[int]
    stored: Iterable[int]


class Member(Protocol):
    """A member of an archive; names and links are as they are stored, times in nanoseconds."""

    @property
    def name(self) -> bytes: ...
    @property
    def type(self) -> bytes: ...
    @property
    def link(self) -> bytes: ...
    @property
    def offset(self) -> int: ...
    @property
    def size(self) -> int: ...
    @property
    def stored(self) -> int: ...
    @property
    def sparse(self) -> Optional[Any]: ...
    @property
    def mode(self) -> int: ...
    @property
    def uid(self) -> int: ...
    @property
    def gid(self) -> int: ...
    @property
    def mtime(self) -> int: ...
    @property
    def device(self) -> tuple[int, int]: ...
    @property
    def pax(self) -> Mapping[str, bytes]: ...


class Archive:
    """An archive as an origin of a tree's nodes: all contents are in one file."""

    def __init__(
        self,
        name: str,
        tree: Tree,
        number: int,
        file: SpanFile,
        *,
        exclude: Iterable[str] = (),
        whiteouts: bool = False,
    ) -> None:
        """number: which of the tree's sources this is; file: what members' offsets are in."""
        self._name = name
        self._tree = tree
        self._number = number
        self._file = file
        self._excluded = excluder(list(exclude))
        self._whiteouts = whiteouts
        self._first = len(tree.names)

    def open(self, ino: int) -> SpanFile:
        """The file that holds all contents."""
        return self._file

    def verify_access(self) -> list[str]:
        """Nothing is opened later."""
        return []

    def scan(self, members: Iterable[Member]) -> None:
        """Add all members. Error: one that can't be in a filesystem."""
        foreign = 0
        for member in members:
            path = _components(member.name)
            if path is None or len(path) > _MAX_DEPTH or any(len(p) > _MAX_NAME for p in path):
                raise Error(f"{self._name}: the name {member.name[:300]!r} is impossible")
            if self._excluded and any(
                self._excluded(b"/".join(path[:n])) for n in range(1, len(path) + 1)
            ):
                continue
            if member.type == _HARD_LINK:
                self._link(member, path)
            elif member.type in _KINDS:
                self._add(member, path)
            else:
                foreign += 1
        if foreign:
            warn(f"{self._name}: left out {foreign} members of unknown types")

    def _add(self, member: Member, path: list[bytes]) -> None:
        tree = self._tree
        kind = _KINDS[member.type]
        mode, uid, gid, mtime = kind | member.mode, member.uid, member.gid, member.mtime
        if not (0 <= uid < 1 << 32 and 0 <= gid < 1 << 32):
            raise Error(f"{self._name}: {member.name!r} has an impossible owner")
        content = b""
        size = 0
        if kind == stat.S_IFREG:
            size = member.size
        elif kind == stat.S_IFLNK:
            content = member.link
            if not content or b"\0" in content:
                raise Error(f"{self._name}: the symlink {member.name!r} has an impossible target")
        elif kind in (stat.S_IFCHR, stat.S_IFBLK):
            try:
                content = encode_device(*member.device)
            except ValueError as error:
                raise Error(f"{self._name}: {member.name!r}: {error}") from None
        if not path:
            if kind != stat.S_IFDIR:
                raise Error(f"{self._name}: its root is not a directory")
            tree.set_root(mode, uid, gid, mtime, mtime, mtime)
            ino = ROOT
        else:
            parent = self._directory(path[:-1])
            name = path[-1]
            if self._whiteouts and name.startswith(WHITEOUT):
                if name == OPAQUE:
                    tree.clear(parent, self._first)
                else:
                    tree.hide(parent, name[len(WHITEOUT) :], self._first)
                return
            place = 0 if member.sparse else member.offset
            ino = tree.add(
                parent,
                name,
                mode,
                uid,
                gid,
                size,
                mtime,
                mtime,
                mtime,
                content,
                self._number,
                place,
            )
        if member.sparse is not None and size:
            sparse = member.sparse
            segments = zip(sparse.starts, sparse.lengths, sparse.stored)
            tree.set_segments(
                ino, [(start, length, member.offset + place) for start, length, place in segments]
            )
        self._set_attributes(ino, member)

    def _set_attributes(self, ino: int, member: Member) -> None:
        found = []
        for key, value in member.pax.items():
            if key.startswith(_XATTR):
                name = key[len(_XATTR) :].encode()
                if name in _ACLS.values():
                    continue
            elif key in _ACLS:
                name = _ACLS[key]
            else:
                continue
            try:
                if key in _ACLS:
                    value = text_acl(value)
                    if key == "SCHILY.acl.access" and len(value) <= _MINIMAL_ACL:
                        continue  # it says no more than the mode
                one = attribute(name, value)
            except ValueError as error:
                raise Error(f"{self._name}: {os.fsdecode(member.name)}: {error}") from None
            if one is not None:
                found.append(one)
        self._tree.set_xattrs(ino, found)

    def _link(self, member: Member, path: list[bytes]) -> None:
        tree = self._tree
        target = self._find(_components(member.link))
        if target is None or target in tree.children or not path:
            shown = os.fsdecode(member.link)
            raise Error(
                f"{self._name}: {os.fsdecode(member.name)!r} is a hard link to {shown!r}, which is"
                " no file before it in the archive"
            )
        parent = self._directory(path[:-1])
        if tree.children[parent].get(path[-1]) != target:
            tree.linked.add(target)
            tree.link(parent, path[-1], target)

    def _find(self, path: Optional[list[bytes]]) -> Optional[int]:
        ino = ROOT
        for name in path or ():
            found = self._tree.children.get(ino, {}).get(name)
            if found is None:
                return None
            ino = found
        return None if path is None else ino

    def _directory(self, path: list[bytes]) -> int:
        """The directory of a member, made if the archive doesn't have it (before the member)."""
        tree = self._tree
        ino = ROOT
        for name in path:
            found = tree.children[ino].get(name)
            if found is None or found not in tree.children:
                found = tree.add(ino, name, stat.S_IFDIR | 0o755, 0, 0, 0, 0, 0, 0)
            ino = found
        return ino


def _components(name: bytes) -> Optional[list[bytes]]:
    """The parts of a name; None if it leads up or can't be stored."""
    parts = [part for part in name.split(b"/") if part not in (b"", b".")]
    return None if b".." in parts or b"\0" in name else parts
