"""The export of another NBD server as a Disk."""

from __future__ import annotations

import errno
import threading
import time
from collections.abc import Iterator, Sequence
from typing import NamedTuple, Optional, Union

from nbdtool import protocol as p
from nbdtool.disk import Disk, Extent, Gone, Span, merge_extents, read_bytes
from nbdtool.disks.ahead import Ahead
from nbdtool.disks.buffers import keep_buffers
from nbdtool.disks.nbd.connection import Connection, Disconnected, Request
from nbdtool.disks.nbd.handshake import ProtocolError
from nbdtool.disks.nbd.uri import Address
from nbdtool.errors import Error, debug

PATIENCE = 60.0  # seconds that a server may take for a reply

_GROUP = 512 << 10  # bytes that one connection is asked for at once
_STATUS = 1 << 30  # bytes whose block status, zeroing or trimming is asked for at once
_PAUSES = (0.05, 0.1, 0.2, 0.5, 1.0, 2.0)  # seconds between attempts to connect


class _Sent(NamedTuple):
    """A request and the connection that it waits on."""

    connection: Connection
    request: Request


class NbdDisk(Disk):
    """The export at a URI or an Address; Error if it can't be opened.

    Up to `connections` are used where the server allows more than one. A connection that is lost is
    made anew, and its requests are repeated, for `reconnect` seconds from the start of an outage;
    then they fail (Gone, EIO), until the server is back. An export that has another size by then is
    another one: everything fails from then on. Acknowledged writes may be lost with a server: the
    next flush fails then.
    """

    def __init__(
        self,
        address: Union[str, Address],
        *,
        writable: bool = False,
        connections: int = 4,
        reconnect: float = 30.0,
        patience: float = PATIENCE,
    ) -> None:
        keep_buffers()
        self._address = Address.parse(address) if isinstance(address, str) else address
        self._patience, self._reconnect = patience, reconnect
        self.description = str(self._address)
        try:
            first = Connection(self._address, patience)
        except OSError as exc:
            raise Error(f"{self._address}: {exc.strerror or exc}") from None
        export = first.export
        self.size = export.size
        minimum, preferred, maximum = export.block_size
        self._minimum = minimum
        self._maximum = min(maximum, p.MAX_PAYLOAD) // minimum * minimum
        self.block_size = (minimum, preferred, self._maximum)
        self._flags = export.flags if export.flags & p.FLAG_HAS_FLAGS else 0
        self.writable = writable and not self._flags & p.FLAG_READ_ONLY
        if self.writable:
            self.can_trim = bool(self._flags & p.FLAG_SEND_TRIM)
            self.can_fast_zero = bool(self._flags & p.FLAG_SEND_FAST_ZERO)
        self._most = connections if self._flags & p.FLAG_CAN_MULTI_CONN else 1
        self._open = [first]
        self._lock = threading.Lock()  # guards what follows, and making connections
        self._spare = threading.Lock()  # held while one more connection is made
        self._closing = threading.Event()
        self._outage: Optional[float] = None  # since when there is no connection
        self._changed = ""  # why nothing can be read any more
        self._written = self._flushed = 0  # counts of writes
        self._doubtful = False  # a connection was lost with writes that weren't flushed
        self._ahead: Ahead[_Sent] = Ahead()

    # Connections

    def _connection(self) -> Connection:
        """A connection for the next request, the one with the least to do; Disconnected if none."""
        best = self._best()
        if best is None:
            with self._lock:
                return self._best() or self._connect()
        if best.load and len(self._open) < self._most and self._spare.acquire(blocking=False):
            try:
                return self._connect()
            except Disconnected as exc:
                debug(f"no further connection: {exc.strerror}")
                self._most = len(self._open)
            finally:
                self._spare.release()
        return best

    def _best(self) -> Optional[Connection]:
        if self._closing.is_set():
            raise Gone(errno.EIO, f"{self._address}: was closed")
        if self._changed:
            raise Gone(errno.EIO, self._changed)
        best = None
        for connection in self._open:
            if connection.lost:
                self._doubtful |= self._written > self._flushed
                self._open = [other for other in self._open if not other.lost]
            elif best is None or connection.load < best.load:
                best = connection
        return best

    def _connect(self) -> Connection:
        try:
            connection = Connection(self._address, self._patience)
        except (OSError, Error) as exc:
            text = getattr(exc, "strerror", None) or str(exc)
            name = "" if text.startswith(str(self._address)) else f"{self._address}: "
            raise Disconnected(errno.EIO, name + text) from None
        export = connection.export
        read_only = export.flags & p.FLAG_READ_ONLY
        if export.size != self.size or (self.writable and read_only):
            connection.close()
            self._changed = f"{self._address}: has another export now"
            raise Gone(errno.EIO, self._changed)
        self._open = [*self._open, connection]
        return connection

    def _lost(self, exc: Disconnected, since: float, attempt: int) -> None:
        """Wait before the next attempt; OSError if there is none."""
        now = time.monotonic()
        if self._outage is None:
            self._outage = now
        if now - min(since, self._outage) >= self._reconnect:
            raise Gone(errno.EIO, exc.strerror) from None
        debug(f"{exc.strerror}; connecting again")
        if attempt:
            self._closing.wait(_PAUSES[min(attempt, len(_PAUSES)) - 1])

    def _finish(self, sent: Optional[_Sent], *request: Union[int, memoryview]) -> Request:
        """The reply to a request (the arguments of Connection.send), which may be under way."""
        since, attempt = 0.0, 0
        while True:
            try:
                if sent is None:
                    connection = self._connection()
                    sent = _Sent(connection, connection.send(*request))  # type: ignore[arg-type]
                sent.connection.wait(sent.request)
                self._outage = None
                return sent.request
            except Disconnected as exc:
                since = since or time.monotonic()
                self._lost(exc, since, attempt)
                sent = None
                attempt += 1

    # Reading

    def prefetch(self, ranges: Sequence[tuple[int, int]]) -> None:
        group: list[tuple[int, int]] = []
        size = 0
        for offset, length in ranges:
            if length <= self._maximum and self._ahead.wants(offset, length):
                group.append((offset, length))
                size += length
                if size >= _GROUP:
                    self._start(group)
                    group, size = [], 0
        if group:
            self._start(group)

    def _start(self, ranges: list[tuple[int, int]]) -> None:
        """Ask for ranges in one go; where that fails, reading them tells."""
        if self._minimum > 1:
            ranges = [each for each in ranges if not (each[0] | each[1]) % self._minimum]
        try:
            connection = self._connection()
            for (offset, length), request in zip(ranges, connection.send_reads(ranges)):
                self._ahead.add(offset, length, _Sent(connection, request))
        except OSError as exc:
            debug(f"not read ahead: {exc.strerror}")

    def read(self, offset: int, length: int) -> list[Span]:
        sent = self._ahead.take(offset, length)
        if sent is not None:
            return self._finish(sent, p.CMD_READ, offset, length).spans()
        if (offset | length) % self._minimum:
            start, stop = self._around(offset, length)
            if (start, stop) != (offset, offset + length):  # not to the end of an odd size
                data = read_bytes(self, start, stop - start)
                return [memoryview(data)[offset - start : offset - start + length]]
        if length <= self._maximum:
            return self._finish(None, p.CMD_READ, offset, length).spans()
        spans: list[Span] = []
        for at, count in _pieces(offset, length, self._maximum):
            spans += self._finish(None, p.CMD_READ, at, count).spans()
        return spans

    def _around(self, offset: int, length: int) -> tuple[int, int]:
        """The start and the end of the server's blocks that a range touches."""
        unit = self._minimum
        end = -(-(offset + length) // unit) * unit
        return offset // unit * unit, min(end, self.size)

    def extents(self, offset: int, length: int) -> Iterator[Extent]:
        if not self._open or self._open[0].export.context is None:
            return super().extents(offset, length)
        return merge_extents(self._extents(offset, length))

    def _extents(self, offset: int, length: int) -> Iterator[Extent]:
        end = offset + length
        while offset < end:
            start, stop = self._around(offset, min(end - offset, _STATUS))
            skip, before = offset - start, offset
            for size, state in self._finish(None, p.CMD_BLOCK_STATUS, start, stop - start).extents:
                count = min(size - skip, end - offset)
                skip = max(skip - size, 0)
                if count > 0:
                    yield Extent(count, state)
                    offset += count
            if offset == before:
                raise ProtocolError(errno.EIO, f"{self._address}: extents smaller than its blocks")

    # Writing

    def write(self, offset: int, data: memoryview) -> None:
        if not self.writable:
            raise OSError(errno.EPERM, f"{self._address}: is read-only")
        for at, count in _pieces(offset, len(data), self._maximum):
            self._change(p.CMD_WRITE, at, count, 0, data[at - offset : at - offset + count])

    def zero(self, offset: int, length: int, *, punch: bool, fast: bool) -> None:
        if fast and not self.can_fast_zero:
            raise OSError(errno.EOPNOTSUPP, f"{self._address}: zeroes have to be written")
        if not self._flags & p.FLAG_SEND_WRITE_ZEROES:
            super().zero(offset, length, punch=punch, fast=False)
            return
        flags = (0 if punch else p.CMD_FLAG_NO_HOLE) | (p.CMD_FLAG_FAST_ZERO if fast else 0)
        for at, count in _pieces(offset, length, _STATUS):
            self._change(p.CMD_WRITE_ZEROES, at, count, flags)

    def trim(self, offset: int, length: int) -> None:
        for at, count in _pieces(offset, length, _STATUS):
            self._change(p.CMD_TRIM, at, count)

    def _change(
        self, command: int, offset: int, length: int, *more: Union[int, memoryview]
    ) -> None:
        self._ahead.forget(offset, length)
        self._finish(None, command, offset, length, *more)
        self._ahead.forget(offset, length)  # what was announced meanwhile
        with self._lock:
            self._written += 1

    def flush(self) -> None:
        if not self.writable:
            return
        written = self._written
        if self._flags & p.FLAG_SEND_FLUSH:
            self._finish(None, p.CMD_FLUSH)
        if self._doubtful:
            self._doubtful = False
            self._flushed = written
            raise OSError(
                errno.EIO,
                f"{self._address}: the connection was lost with writes that weren't flushed;"
                " they may be lost",
            )
        self._flushed = written

    def close(self) -> None:
        self._closing.set()
        for connection in self._open:
            connection.close()


def _pieces(offset: int, length: int, most: int) -> Iterator[tuple[int, int]]:
    """A range in pieces of up to `most` bytes, as (offset, length)."""
    for at in range(offset, offset + length, most):
        yield at, min(most, offset + length - at)
