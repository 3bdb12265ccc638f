"""A private copy of file contents: one unlinked temporary file."""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Callable, Sequence
from typing import Protocol

from nbdtool.disk import SpanFile
from nbdtool.errors import Error
from nbdtool.ext.tree import Origin, Tree

_ALIGNMENT = 4096  # so that filesystems can share blocks instead of copying
_CHUNK = 1 << 20
_CANNOT = (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP)


class _Readable(Protocol):
    def read(self, size: int, /) -> bytes: ...


class Spool:
    """A file in TMPDIR (/var/tmp by default) that vanishes with this process; an Origin."""

    def __init__(self) -> None:
        """Error: it can't be made."""
        self.directory = os.environ.get("TMPDIR") or "/var/tmp"
        try:
            with tempfile.TemporaryFile(dir=self.directory, buffering=0) as file:
                self.file = SpanFile(os.dup(file.fileno()), f"a copy in {self.directory}")
        except OSError as error:
            raise self._failure(error) from None
        self.size = 0

    def open(self, ino: int) -> SpanFile:
        """The file that holds all contents."""
        return self.file

    def verify_access(self) -> list[str]:
        """It is open already."""
        return []

    def write(self, stream: _Readable, report: Callable[[int], None]) -> None:
        """Append all of a stream; report is told the size. Error: no room; the stream's OSError."""
        while data := stream.read(_CHUNK):
            self._write(data)
            report(self.size)

    def copy(self, source: SpanFile, offset: int, length: int) -> int:
        """Append a range of a file, sharing its blocks if possible, and say where it is.

        Error: no room. OSError: it can't be read, or has changed.
        """
        self.size = place = -(-self.size // _ALIGNMENT) * _ALIGNMENT
        end = offset + length
        by_kernel = True
        while offset < end:
            if by_kernel:
                try:
                    count = os.copy_file_range(
                        source.fd, self.file.fd, end - offset, offset, self.size
                    )
                except OSError as error:
                    if error.errno not in _CANNOT:
                        raise self._failure(error) from None
                    count = 0
                self.size += count
                by_kernel = count > 0
            else:
                data = source.pread(offset, min(_CHUNK, end - offset))
                self._write(data)
                count = len(data)
            offset += count
        source.check()
        return place

    def _write(self, data: bytes) -> None:
        view = memoryview(data)
        try:
            while view:
                count = os.pwrite(self.file.fd, view, self.size)
                self.size += count
                view = view[count:]
        except OSError as error:
            raise self._failure(error) from None

    def _failure(self, error: OSError) -> Error:
        return Error(
            f"can't write a temporary file in {self.directory}: {error.strerror}; TMPDIR chooses"
            " another place"
        )


def copy_contents(tree: Tree, origins: Sequence[Origin], report: Callable[[int], None]) -> Spool:
    """Copy the contents of all regular files, and make the tree name the copy as its source 0.

    Error: no room, or a file can't be read or has changed since the scan; it is named.
    """
    spool = Spool()
    reachable = tree.reachable()
    for ino in tree.regular:
        if reachable is not None and ino not in reachable:
            continue
        try:
            file = origins[tree.origin_of[ino]].open(ino)
            if ino in tree.segments:
                copies = [
                    (offset, length, spool.copy(file, place, length))
                    for offset, length, place in tree.segments[ino]
                ]
                tree.set_segments(ino, copies)
            else:
                place = spool.copy(file, tree.places[ino], tree.sizes[ino])
                tree.places[ino], tree.ends[ino] = place, place + tree.sizes[ino]
        except OSError as error:
            raise Error(str(error.strerror)) from None
        tree.origin_of[ino] = 0
        report(spool.size)
    return spool
