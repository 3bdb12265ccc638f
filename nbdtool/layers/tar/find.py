"""Find a file in a tar archive by its name, as extracting the archive would make it."""

from __future__ import annotations

import difflib
import fnmatch
import os
import re
from typing import Union

from nbdtool.disk import Disk
from nbdtool.errors import Error, listed
from nbdtool.layers.tar.walk import (
    DIRECTORY,
    HARD_LINK,
    REGULAR,
    SYMBOLIC_LINK,
    DiskSource,
    Member,
    walk,
)

_MAX_LINKS = 16
_MAX_MATCHES = 1000  # of a glob
_MAX_NAMES = 1000  # that are kept to suggest from

Path = tuple[bytes, ...]


def find_file(disk: Disk, wanted: str) -> Member:
    """The regular file that `wanted`, a name or a glob, stands for in the archive on disk.

    Of members of one name the last counts. Links are followed inside the archive. Raises Error.
    """
    name = disk.description or "the archive"
    path, end = _resolve((), os.fsencode(wanted)), disk.size
    seen: set[tuple[Path, int]] = set()
    while (path, end) not in seen and len(seen) <= _MAX_LINKS:
        search = _Search(path, wanted, glob=not seen)
        seen.add((path, end))
        for member in walk(DiskSource(disk), name):
            if member.header < end:
                search.see(member)
        try:
            found = search.result()
        except _NotFound as exc:
            raise Error(f"{name}: {exc}") from None
        if isinstance(found, Member):
            return found
        path, before = found
        end = disk.size if before is None else before
    raise Error(f"{name}: {wanted}: the links go round in circles, or are too many")


class _NotFound(Exception):
    """Why there is no such file."""


class _Search:
    """One pass over an archive; it keeps what is at a path and at the directories above it."""

    def __init__(self, path: Path, wanted: str, *, glob: bool) -> None:
        self._path = path
        self._wanted = wanted
        self._above = {path[:n] for n in range(1, len(path) + 1)}
        self._at: dict[Path, Member] = {}
        parts = [os.fsdecode(part) for part in path]
        glob = glob and any(re.search(r"[*?[]", part) for part in parts)
        self._glob = [re.compile(fnmatch.translate(part)) for part in parts] if glob else []
        self._matches: dict[Path, Member] = {}
        self._namesakes: dict[str, None] = {}  # files of the same last name, and some others
        self._others: dict[str, None] = {}

    def see(self, member: Member) -> None:
        path = _components(member.name)
        if path in self._above:
            self._at[path] = member
        if len(path) == len(self._glob):
            self._match(path, member)
        if member.type == REGULAR:
            names = self._namesakes if path[-1:] == self._path[-1:] else self._others
            if len(names) < _MAX_NAMES:
                names[_shown(member.name)] = None

    def _match(self, path: Path, member: Member) -> None:
        if not all(glob.match(os.fsdecode(part)) for glob, part in zip(self._glob, path)):
            return
        if member.type not in (REGULAR, HARD_LINK):
            self._matches.pop(path, None)
        elif path in self._matches or len(self._matches) < _MAX_MATCHES:
            self._matches[path] = member

    def result(self) -> Union[Member, tuple[Path, int | None]]:
        """The file; or where a link leads: a path, and the byte before which it is meant."""
        for n in range(1, len(self._path) + 1):
            above = self._at.get(self._path[:n])
            if above and above.type == SYMBOLIC_LINK:
                target = _resolve(self._path[: n - 1], above.link)
                return target + self._path[n:], None
        member = self._at.get(self._path)
        if member is None and self._matches:
            if len(self._matches) > 1:
                names = _some([_shown(match.name) for match in self._matches.values()])
                raise _NotFound(f"{self._wanted} matches {len(self._matches)} files: {names}")
            (member,) = self._matches.values()
        if member is None or member.type not in (REGULAR, HARD_LINK):
            raise _NotFound(self._reason(member))
        if member.type == HARD_LINK:
            # The file that was there then: a later one of that name is another file.
            return _resolve((), member.link), member.header
        return member

    def _reason(self, member: Member | None) -> str:
        path = _shown(b"/".join(self._path))
        name = self._wanted if _resolve((), os.fsencode(self._wanted)) == self._path else path
        if name != self._wanted:
            name = f"{self._wanted}, a link to {path},"
        if not self._path:
            name = "the archive itself"
        namesakes, others = list(self._namesakes), list(self._others)
        if member is not None and member.type != DIRECTORY:
            return f"{name} is not a regular file"
        inside = [
            other
            for other in namesakes + others
            if _components(os.fsencode(other))[:-1] == self._path
        ]
        if member is not None or inside or not self._path:
            return f"{name} is a directory; its files: {_some(inside) or 'none'}"
        near = namesakes[:5] + difflib.get_close_matches(path, others, 5, 0.5) or others
        return f"there is no {name}; " + (f"the nearest: {_some(near)}" if near else "nor any file")


def _components(name: bytes) -> Path:
    return tuple(part for part in name.split(b"/") if part not in (b"", b"."))


def _resolve(directory: Path, name: bytes) -> Path:
    """The path of a name as seen in a directory; it never leads out of the archive."""
    path = [] if name.startswith(b"/") else list(directory)
    for part in _components(name):
        if part != b"..":
            path.append(part)
        elif path:
            path.pop()
    return tuple(path)


def _shown(name: bytes) -> str:
    return os.fsdecode(name)


def _some(names: list[str]) -> str:
    return listed(names, 5)
