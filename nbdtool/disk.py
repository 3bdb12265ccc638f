"""Disk and its spans: the interface between the sources, the layers, the server and the writer.

A read answers with spans, which say where the bytes are, so that file data can go to sendfile or
copy_file_range without passing through Python.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple, Union

# NBD_CMD_BLOCK_STATUS, metadata context base:allocation
DATA = 0
STATE_HOLE = 1
STATE_ZERO = 2
HOLE = STATE_HOLE | STATE_ZERO

ZEROES = memoryview(bytes(1 << 20))


class SpanFile:
    """A descriptor that its spans share; it is closed when the last reference goes.

    stamp is None for a file that may change while it is read, else the `Stamp` that it had when it
    was scanned: its content is then only handed out while the stamp still holds.
    """

    __slots__ = ("__weakref__", "fd", "name", "stamp")

    def __init__(self, fd: int, name: str, stamp: Stamp | None = None) -> None:
        self.fd = fd
        self.name = name
        self.stamp = stamp

    def __del__(self) -> None:
        os.close(self.fd)

    def fileno(self) -> int:
        return self.fd

    def check(self) -> None:
        """Raise OSError (EIO) naming the file if it changed since it was stamped."""
        if self.stamp is not None:
            st = os.fstat(self.fd)
            # A plain tuple, since this runs for every small read: a Stamp costs five times as much.
            now = (st.st_dev, st.st_ino, st.st_size, st.st_mtime_ns, st.st_ctime_ns)
            if now != self.stamp:
                raise OSError(errno.EIO, f"{self.name}: changed while it was served")

    def pread(self, offset: int, length: int) -> bytes:
        """Exactly `length` bytes at `offset`, or OSError (EIO) naming the file."""
        data = os.pread(self.fd, length, offset)
        while len(data) < length:
            more = os.pread(self.fd, length - len(data), offset + len(data))
            if not more:
                where = offset + len(data)
                raise OSError(errno.EIO, f"{self.name}: ends early, at byte {where}")
            data += more
        if self.stamp is not None:
            self.check()
        return data


class Stamp(NamedTuple):
    """What must stay the same for a file's content to be the same; times in nanoseconds."""

    device: int
    inode: int
    size: int
    mtime: int
    ctime: int

    @classmethod
    def of(cls, st: os.stat_result) -> Stamp:
        return cls(st.st_dev, st.st_ino, st.st_size, st.st_mtime_ns, st.st_ctime_ns)


class FileSpan(NamedTuple):
    """`length` bytes at `offset` of a file, whose place is never reused for other content."""

    file: SpanFile
    offset: int
    length: int


class ZeroSpan(NamedTuple):
    """`length` zero bytes."""

    length: int


Span = Union[bytes, memoryview, FileSpan, ZeroSpan]


class Extent(NamedTuple):
    """`length` bytes of one state: DATA, or STATE_HOLE and STATE_ZERO together or alone."""

    length: int
    state: int


class Gone(OSError):
    """What the disk is read from isn't there, or is another one: nothing can be read for now."""


class Disk:
    """A disk of `size` bytes. Methods are safe to call from many threads; failures are OSError.

    Callers keep offset and length within the disk; length is at least 1. An OSError is raised with
    an errno and a text that a client may be shown; it is Gone where that is known to be the cause.
    """

    size: int
    description = ""  # what was opened and how, for the start-up line and NBD_OPT_LIST
    writable = can_trim = can_fast_zero = False
    multi_conn = True
    reads_on = False  # between requests, too: it needs the processors that a client leaves idle
    parallel = 1  # reads of one client that gain from being done at once, each by its own thread
    block_size = (1, 4096, 32 << 20)  # minimum, preferred, maximum, bytes

    def prefetch(self, ranges: Sequence[tuple[int, int]]) -> None:
        """(offset, length) ranges will be read next; slow sources start them in parallel."""

    def read(self, offset: int, length: int) -> list[Span]:
        """The spans of [offset, offset + length), complete: what can fail, fails here."""
        raise NotImplementedError

    def write(self, offset: int, data: memoryview) -> None:
        """Write data, which may be reused as soon as this returns."""
        raise OSError(errno.EPERM, "the disk is read-only")

    def zero(self, offset: int, length: int, *, punch: bool, fast: bool) -> None:
        """Make it read as zeroes; punch allows a hole, fast raises ENOTSUP rather than write."""
        if fast:
            raise OSError(errno.EOPNOTSUPP, "zeroes have to be written")
        for at in range(offset, offset + length, len(ZEROES)):
            self.write(at, ZEROES[: offset + length - at])

    def trim(self, offset: int, length: int) -> None:
        """The content is no longer needed; what is read afterwards is undefined."""
        raise OSError(errno.EPERM, "the disk is read-only")

    def flush(self) -> None:
        """What was written before is on stable storage when this returns."""

    def extents(self, offset: int, length: int) -> Iterator[Extent]:
        """The states of [offset, offset + length), in order and without a gap."""
        yield Extent(length, DATA)

    def verify_access(self) -> None:
        """After privileges were dropped: raise Error if what is still to be opened can't be."""

    def close(self) -> None:
        """Release what the disk holds; raise OSError if data may be lost."""


def span_length(span: Span) -> int:
    """The length of a span in bytes."""
    return span.length if isinstance(span, (FileSpan, ZeroSpan)) else len(span)


def span_bytes(span: Span) -> bytes | memoryview:
    """The bytes of a span, read if they are in a file."""
    if isinstance(span, FileSpan):
        return span.file.pread(span.offset, span.length)
    if isinstance(span, ZeroSpan):
        return bytes(span.length)
    return span


def cut_spans(spans: Iterable[Span], skip: int, length: int) -> Iterator[Span]:
    """The spans of `length` bytes after the first `skip` ones."""
    for span in spans:
        size = span_length(span)
        if skip >= size:
            skip -= size
            continue
        count = min(size - skip, length)
        if isinstance(span, ZeroSpan):
            yield ZeroSpan(count)
        elif isinstance(span, FileSpan):
            yield FileSpan(span.file, span.offset + skip, count)
        else:
            yield memoryview(span)[skip : skip + count]
        skip = 0
        length -= count
        if not length:
            return


def read_bytes(disk: Disk, offset: int, length: int) -> bytes:
    """The bytes [offset, offset + length) of a disk as one object: for headers and tables."""
    return b"".join(map(span_bytes, disk.read(offset, length))) if length else b""


def merge_extents(extents: Iterable[Extent]) -> Iterator[Extent]:
    """The same extents with neighbours of one state joined."""
    length = state = 0
    for extent in extents:
        if extent.state != state and length:
            yield Extent(length, state)
            length = 0
        length, state = length + extent.length, extent.state
    if length:
        yield Extent(length, state)
