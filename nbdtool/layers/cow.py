"""--cow: a disk that can be written, with its changes in a temporary file.

The changes are kept in blocks, at their own place in one sparse, unlinked file (the overlay), which
dies with the process. A block is the source's until something in it is written; it is then copied
as a whole.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import itertools
import os
import re
import tempfile
import threading
from collections.abc import Iterator, Sequence
from typing import Any

from nbdtool.disk import DATA, HOLE, Disk, Extent, FileSpan, Span, ZeroSpan, span_bytes, span_length
from nbdtool.disks.file import FileDisk
from nbdtool.errors import Error, UsageError
from nbdtool.values import boolean, size

OPTION = "--cow"
FILTER = "cow"
READS_ONLY = True  # the source need not be writable
ARGUMENT: dict[str, Any] = {
    "nargs": "?",
    "const": True,
    "type": boolean,
    "metavar": "on|off",
    "help": "let clients write, into a temporary file in $TMPDIR (/var/tmp) instead of the source",
}

_SMALLEST, _LARGEST = 4 << 10, 2 << 20  # bytes of a block
_MAX_BLOCKS = 1 << 30  # each takes a byte of memory, once it is touched

# The state of a block. Where it isn't _CHANGED, the overlay has a hole.
_SOURCE, _CHANGED, _ZERO = range(3)
_RUN = re.compile(b"\0+|\1+|\2+")


def add_arguments(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--cow-block-size",
        type=size,
        default=64 << 10,
        metavar="SIZE",
        help="how much is copied at once (64K; a power of 2 from 4K to 2M)",
    )
    group.add_argument(
        "--cow-limit",
        type=size,
        metavar="SIZE",
        help="how big the temporary file may become; clients are told the disk is full then",
    )
    group.add_argument(
        "--cow-save",
        metavar="FILE",
        help="write the changed disk to FILE when the server ends",
    )


def open(disk: Disk, value: bool, args: argparse.Namespace) -> Disk:
    """The disk with an overlay; with -r, which wins, the disk itself. Raises Error."""
    block = args.cow_block_size
    if not _SMALLEST <= block <= _LARGEST or block & (block - 1):
        raise UsageError(f"--cow-block-size={block}: not a power of 2 from 4K to 2M")
    if args.cow_save is not None:
        if args.read_only or args.to_file is not None:
            raise UsageError("--cow-save saves what clients write; leave out -r and --to-file")
        if getattr(args, "cow_saved", False):
            raise UsageError("--cow-save saves one disk, here are several; choose one")
        args.cow_saved = True
    if args.read_only:
        return disk
    return CowDisk(disk, block, limit=args.cow_limit, save=args.cow_save)


class CowDisk(Disk):
    """A disk over `source` whose changes go to a temporary file in TMPDIR.

    block is a power of 2 in bytes. Changes may take up to `limit` bytes, in whole blocks; more is
    ENOSPC. With `save` the result is written to that path by close(), if it was ever served.
    """

    writable = can_trim = can_fast_zero = True

    def __init__(
        self, source: Disk, block: int, *, limit: int | None = None, save: str | None = None
    ) -> None:
        minimum, preferred, maximum = source.block_size
        self._block = block = max(block, minimum)
        self.size = source.size
        self.description = source.description
        self.block_size = (minimum, max(preferred, block), maximum)
        blocks = -(-source.size // block)
        if blocks > _MAX_BLOCKS:
            raise Error(f"--cow: {source.size} bytes are too many for blocks of {block}")
        self._source = source
        self._overlay = _temporary(source.size)
        self._file = self._overlay.file
        self._states = bytearray(blocks)
        self._claims = _Claims()
        self._limit = limit
        self._used = 0  # bytes of the blocks that are _CHANGED; guarded by the lock
        self._lock = threading.Lock()
        self._save = save
        if save is not None:
            import nbdtool.writer  # noqa: F401  # close() may be another user's, who can't read it
        self._served = False

    # Reading

    def prefetch(self, ranges: Sequence[tuple[int, int]]) -> None:
        block, states = self._block, self._states
        wanted = [
            (offset, length)
            for offset, length in ranges
            if states.find(_SOURCE, offset // block, -(-(offset + length) // block)) >= 0
        ]
        if wanted:
            self._source.prefetch(wanted)

    def read(self, offset: int, length: int) -> list[Span]:
        spans: list[Span] = []
        for state, start, count in self._runs(offset, length):
            if state == _SOURCE:
                spans += self._source.read(start, count)
            elif state == _CHANGED:
                spans.append(FileSpan(self._file, start, count))
            else:
                spans.append(ZeroSpan(count))
        return spans

    def extents(self, offset: int, length: int) -> Iterator[Extent]:
        for state, start, count in self._runs(offset, length):
            if state == _SOURCE:
                yield from self._source.extents(start, count)
            else:
                yield Extent(count, DATA if state == _CHANGED else HOLE)

    def _runs(self, offset: int, length: int) -> Iterator[tuple[int, int, int]]:
        """(state, offset, length) of the runs of blocks in a range, cut to it."""
        block, states, end = self._block, self._states, offset + length
        first, last = offset // block, (end - 1) // block
        if first == last:
            yield states[first], offset, length
            return
        # A snapshot, so that runs don't change while they are looked for.
        for run in _RUN.finditer(bytes(memoryview(states)[first : last + 1])):
            start = max(offset, (first + run.start()) * block)
            stop = min(end, (first + run.end()) * block)
            yield run[0][0], start, stop - start

    # Writing

    def write(self, offset: int, data: memoryview) -> None:
        block, states, end = self._block, self._states, offset + len(data)
        first, last = offset // block, -(-end // block)
        claim = self._claims.take(first, last)
        try:
            fresh = last - first - states.count(_CHANGED, first, last)
            if fresh:
                self._write_fresh(first, last, fresh, offset, data)
            else:
                self._overlay.write(offset, data)
        finally:
            self._claims.release(claim)

    def _write_fresh(
        self, first: int, last: int, fresh: int, offset: int, data: memoryview
    ) -> None:
        """Write to claimed blocks of which `fresh` aren't _CHANGED yet."""
        self._count(fresh * self._block)
        try:
            self._copy_up(first, last, offset, data)
        except BaseException:
            self._count(-fresh * self._block)
            self._restore(first, last)
            raise
        self._states[first:last] = bytes([_CHANGED]) * (last - first)

    def _copy_up(self, first: int, last: int, offset: int, data: memoryview) -> None:
        """Write data, and around it what the source has in the first and the last block."""
        end, start = offset + len(data), first * self._block
        stop = min(last * self._block, self.size)
        spans: list[Span] = [data]
        if self._states[first] == _SOURCE and start < offset:
            spans[:0] = self._source.read(start, offset - start)
            offset = start
        if self._states[last - 1] == _SOURCE and end < stop:
            spans += self._source.read(end, stop - end)
        for hole, group in itertools.groupby(spans, lambda span: isinstance(span, ZeroSpan)):
            parts = list(group)
            length = sum(map(span_length, parts))
            if not hole:
                whole = data if parts == [data] else b"".join(map(span_bytes, parts))
                self._overlay.write(offset, memoryview(whole))
            offset += length

    def _restore(self, first: int, last: int) -> None:
        """Make the overlay what the states say, after a failure."""
        for at in range(first, last):
            if self._states[at] != _CHANGED:
                with contextlib.suppress(OSError):
                    self._punch(at, at + 1)

    def _count(self, count: int) -> None:
        """Count bytes of changed blocks, negative if they are given back; ENOSPC at the limit."""
        with self._lock:
            if count > 0 and self._limit is not None and self._used + count > self._limit:
                text = f"the changes would exceed the limit of {self._limit} bytes (--cow-limit)"
                raise OSError(errno.ENOSPC, text)
            self._used += count

    def zero(self, offset: int, length: int, *, punch: bool, fast: bool) -> None:
        if not punch:
            super().zero(offset, length, punch=False, fast=fast)
            return
        start, stop = self._whole(offset, length)
        for at, end in (offset, start), (stop, offset + length):
            if at < end and any(state != _ZERO for state, *_ in self._runs(at, end - at)):
                super().zero(at, end - at, punch=False, fast=False)
        self._discard(start, stop)

    def trim(self, offset: int, length: int) -> None:
        self._discard(*self._whole(offset, length))

    def _whole(self, offset: int, length: int) -> tuple[int, int]:
        """The start and the end of the whole blocks in a range; twice its end if it has none."""
        block, end = self._block, offset + length
        start = -(-offset // block) * block
        stop = end if end == self.size else end // block * block
        return (start, stop) if start < stop else (end, end)

    def _discard(self, start: int, stop: int) -> None:
        """Make whole blocks zero."""
        first, last = start // self._block, -(-stop // self._block)
        if start == stop:
            return
        claim = self._claims.take(first, last)
        try:
            changed = self._states.count(_CHANGED, first, last)
            if changed:
                self._punch(first, last)
                self._count(-changed * self._block)
            self._states[first:last] = bytes([_ZERO]) * (last - first)
        finally:
            self._claims.release(claim)

    def _punch(self, first: int, last: int) -> None:
        start = first * self._block
        length = min(last * self._block, self.size) - start
        self._overlay.zero(start, length, punch=True, fast=True)

    def flush(self) -> None:
        """Nothing outlives the process, so that there is nothing to put on stable storage."""

    # The end

    def verify_access(self) -> None:
        self._source.verify_access()
        self._served = True
        if self._save is not None:
            folder = os.path.dirname(os.path.realpath(self._save))
            if not os.access(folder, os.W_OK | os.X_OK):
                raise Error(f"--cow-save={self._save}: {folder} isn't a folder we can write to")

    def close(self) -> None:
        try:
            if self._save is not None and self._served:
                from nbdtool.writer import write_disk

                write_disk(self, self._save)
        finally:
            self._overlay.close()
            self._source.close()


class _Claims:
    """Ranges of blocks of which each belongs to one thread at a time."""

    def __init__(self) -> None:
        self._held: list[tuple[int, int]] = []
        self._waiting = 0
        self._lock = threading.Lock()
        self._released = threading.Condition(self._lock)

    def take(self, first: int, last: int) -> tuple[int, int]:
        """Wait until nobody has any of [first, last), and have it."""
        claim = (first, last)
        with self._lock:
            while self._held and any(a < last and first < b for a, b in self._held):
                self._waiting += 1
                self._released.wait()
                self._waiting -= 1
            self._held.append(claim)
        return claim

    def release(self, claim: tuple[int, int]) -> None:
        with self._lock:
            self._held.remove(claim)
            if self._waiting:
                self._released.notify_all()


def _temporary(length: int) -> FileDisk:
    """An unlinked sparse file of that many bytes in TMPDIR."""
    directory = os.environ.get("TMPDIR") or "/var/tmp"
    try:
        with tempfile.TemporaryFile(dir=directory) as file:
            file.truncate(length)
            overlay = FileDisk(f"/proc/self/fd/{file.fileno()}", writable=True, allow_live=True)
    except OSError as error:
        raise Error(
            f"--cow: no temporary file of {length} bytes in {directory}: {error.strerror};"
            " name another folder in TMPDIR"
        ) from None
    overlay.file.name = f"the temporary file in {directory}"
    if not overlay.can_trim:
        raise Error(f"--cow: {directory} can't have holes; name another folder in TMPDIR")
    return overlay
