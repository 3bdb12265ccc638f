"""One connection of an NBD client: requests of many threads, and replies matched by their cookie.

No thread is there only to receive: of those that wait for a reply one leads, which receives for all
until its own is complete, and then hands on. Specification: doc/proto.md, "Transmission phase".
"""

from __future__ import annotations

import errno
import os
import select
import struct
import threading
import time
from collections.abc import Sequence
from typing import Optional, Union

from nbdtool import protocol as p
from nbdtool.disk import Extent, Span, ZeroSpan
from nbdtool.disks.nbd.handshake import Export, Handshake, ProtocolError
from nbdtool.disks.nbd.uri import Address
from nbdtool.disks.nbd.wire import Wire
from nbdtool.protocol import Buffer

_BUFFER = 128 << 10  # bytes received at once, if they are small replies
_LARGE = 32 << 10  # bytes: a payload from here on is received where it will stay
_MAX_TEXT = p.MAX_STRING + p.ERROR.size + p.OFFSET.size
_CHUNKS = 64  # of a reply, beside one for each 512 bytes: what they cost must be bounded

_ERRORS = {
    p.EPERM: errno.EPERM,
    p.EIO: errno.EIO,
    p.ENOMEM: errno.ENOMEM,
    p.EINVAL: errno.EINVAL,
    p.ENOSPC: errno.ENOSPC,
    p.EOVERFLOW: errno.EOVERFLOW,
    p.ENOTSUP: errno.EOPNOTSUPP,
    p.ESHUTDOWN: errno.ESHUTDOWN,
}
_NAMES = {
    p.CMD_READ: "read",
    p.CMD_WRITE: "write",
    p.CMD_FLUSH: "flush",
    p.CMD_TRIM: "trim",
    p.CMD_WRITE_ZEROES: "zeroing",
    p.CMD_BLOCK_STATUS: "block status",
}

Part = Union[bytes, memoryview, ZeroSpan]


class Disconnected(OSError):
    """The connection has ended before the reply came."""


class Request:
    """A request under way; after its reply, parts or extents, unless error says why not."""

    __slots__ = (
        "chunks",
        "command",
        "done",
        "error",
        "extents",
        "length",
        "lost",
        "offset",
        "parts",
        "received",
        "waiter",
    )

    def __init__(self, command: int, offset: int, length: int) -> None:
        self.command, self.offset, self.length = command, offset, length
        self.done = False
        self.lost = ""  # why the connection ended before the reply
        self.error: Optional[OSError] = None
        self.parts: list[tuple[int, Part]] = []  # where each starts, of a read
        self.extents: list[Extent] = []
        self.received = self.chunks = 0
        self.waiter: Optional[threading.Lock] = None

    def spans(self) -> list[Span]:
        """The data of a read, complete: a gap is a ProtocolError."""
        if len(self.parts) > 1:
            self.parts.sort(key=_start)
        at = self.offset
        for start, part in self.parts:
            if start != at:
                raise ProtocolError("a read reply with a gap")
            at += part.length if isinstance(part, ZeroSpan) else len(part)
        if at != self.offset + self.length:
            raise ProtocolError("a read reply that is too short")
        return [part for _, part in self.parts]


def _start(part: tuple[int, Part]) -> int:
    return part[0]


class Connection:
    """A connection to the export at `address`; raises Error or OSError if there can't be one."""

    def __init__(self, address: Address, patience: float) -> None:
        sock = address.connect(min(patience, 30.0))
        handshake = Handshake(sock, address)
        try:
            self.export: Export = handshake.run()
        except BaseException:
            handshake.wire.sock.close()
            raise
        self._wire: Wire = handshake.wire
        self._wire.start(patience)
        self._patience = patience
        self._name = str(address)
        self.lost = ""  # why it ended
        self.load = 0  # bytes of the replies under way
        self._cookie = 0
        self._pending: dict[int, Request] = {}
        self._leading = False
        self._state = threading.Lock()  # guards the above; the two below are taken before it
        self._sending = threading.Lock()
        self._buffer = memoryview(bytearray(_BUFFER))
        self._at = self._end = 0  # what of the buffer is received and not yet used
        self._large = 0  # pending replies that have a large payload

    # Sending

    def send(
        self, command: int, offset: int = 0, length: int = 0, flags: int = 0, data: Buffer = b""
    ) -> Request:
        """Start a request; raises Disconnected."""
        with self._state:
            request, header = self._register(command, offset, length, flags)
        with self._sending:
            self._transmit([header, data] if data else [header])
        return request

    def send_reads(self, ranges: Sequence[tuple[int, int]]) -> list[Request]:
        """Start reads of (offset, length) in one go; raises Disconnected."""
        with self._state:
            made = [self._register(p.CMD_READ, *each, 0) for each in ranges]
        with self._sending:
            self._transmit([b"".join([header for _, header in made])])
        return [request for request, _ in made]

    def _register(
        self, command: int, offset: int, length: int, flags: int
    ) -> tuple[Request, bytes]:
        """A request that waits from now on, and its header."""
        if self.lost:
            raise Disconnected(errno.EIO, self.lost)
        self._cookie += 1
        request = self._pending[self._cookie] = Request(command, offset, length)
        self._count(request, 1)
        fields = (flags, command, self._cookie, offset, length)
        return request, p.REQUEST.pack(p.REQUEST_MAGIC, *fields)

    def _count(self, request: Request, change: int) -> None:
        if request.command == p.CMD_READ:
            self.load += change * request.length
            self._large += change * (request.length >= _LARGE)
        else:
            self.load += change

    def _transmit(self, buffers: list[Buffer]) -> None:
        deadline = time.monotonic() + self._patience
        try:
            while buffers and not self.lost:
                sent = self._wire.try_send(buffers)
                if sent:
                    buffers = p.unsent(buffers, sent)
                    deadline = time.monotonic() + self._patience
                elif self._make_room():
                    deadline = time.monotonic() + self._patience
                elif time.monotonic() > deadline:
                    raise TimeoutError(f"it takes no data for {self._patience:g} seconds")
        except (OSError, ValueError) as exc:
            self._fail(exc)
        if self.lost:
            raise Disconnected(errno.EIO, self.lost)

    def _make_room(self) -> bool:
        """Wait until something can be sent; a reply may have to be received before, if so True."""
        with self._state:
            leads = not self._leading
            self._leading = True
        if not leads:  # whoever does may stop at any time
            self._wire.wait(select.POLLOUT, 0.05)
            return False
        try:
            if not self._wire.wait(select.POLLIN | select.POLLOUT, self._patience) & select.POLLIN:
                return False
            self._receive()
            return True
        finally:
            self._hand_on()

    # Receiving

    def wait(self, request: Request) -> Request:
        """The request with its reply; raises the OSError that it is, or Disconnected."""
        if not request.done:
            self._await(request)
        if request.lost:
            raise Disconnected(errno.EIO, request.lost)
        if request.error:
            raise request.error
        return request

    def _await(self, request: Request) -> None:
        with self._state:
            if request.done:
                return
            waiter = None
            if self._leading:
                waiter = request.waiter = threading.Lock()
                waiter.acquire()
            self._leading = True
        if waiter is not None:
            waiter.acquire()  # until the reply is there, or it is our turn to lead
            if request.done:
                return
        try:
            while not request.done:
                self._receive()
        except (OSError, ValueError) as exc:
            self._fail(exc)
        finally:
            self._hand_on()

    def _hand_on(self) -> None:
        """Let another one lead, if one waits."""
        with self._state:
            for request in self._pending.values():
                if request.waiter is not None:
                    waiter, request.waiter = request.waiter, None
                    waiter.release()
                    return
            self._leading = False

    def _complete(self, cookie: int) -> None:
        with self._state:
            request = self._pending.pop(cookie, None)
            if request is not None:
                self._count(request, -1)
                self._wake(request)

    def _wake(self, request: Request) -> None:
        request.done = True
        if request.waiter is not None:
            waiter, request.waiter = request.waiter, None
            waiter.release()

    def _fail(self, exc: Exception) -> None:
        """End the connection: every request that waits is lost."""
        with self._state:
            if not self.lost:
                self.lost = f"{self._name}: {getattr(exc, 'strerror', None) or exc}"
            for request in self._pending.values():
                request.lost = self.lost
                self._wake(request)
            self._pending.clear()
        self._wire.shut()

    def _receive(self) -> None:
        """Receive one reply, or one chunk of one; only the leader calls this."""
        self._need(4)
        (magic,) = p.U32.unpack_from(self._buffer, self._at)
        if magic == p.SIMPLE_REPLY_MAGIC:
            _, error, cookie = p.SIMPLE_REPLY.unpack_from(*self._header(p.SIMPLE_REPLY))
            request = self._request(cookie)
            if error:
                request.error = _failure(request, error, "", self._name)
            elif request.command == p.CMD_READ:
                self._payload(request, request.offset, request.length)
            elif request.command == p.CMD_BLOCK_STATUS:
                raise ProtocolError("a simple reply to BLOCK_STATUS")
            self._complete(cookie)
        elif magic == p.STRUCTURED_REPLY_MAGIC and self.export.structured:
            _, flags, kind, cookie, length = p.STRUCTURED_REPLY.unpack_from(
                *self._header(p.STRUCTURED_REPLY)
            )
            request = self._request(cookie)
            request.chunks += 1
            if request.chunks > _CHUNKS + request.length // 512:
                raise ProtocolError("a reply in too many chunks")
            self._chunk(request, kind, length)
            if flags & p.REPLY_FLAG_DONE:
                if request.command == p.CMD_BLOCK_STATUS and not (request.extents or request.error):
                    raise ProtocolError("a block status reply without extents")
                if request.command == p.CMD_READ and not request.error:
                    request.spans()
                self._complete(cookie)
        else:
            raise ProtocolError("a reply without its magic number")

    def _header(self, header: struct.Struct) -> tuple[memoryview, int]:
        self._need(header.size)
        self._at += header.size
        return self._buffer, self._at - header.size

    def _request(self, cookie: int) -> Request:
        request = self._pending.get(cookie)
        if request is None:
            raise ProtocolError("a reply to no request")
        return request

    def _chunk(self, request: Request, kind: int, length: int) -> None:
        reads = request.command == p.CMD_READ
        if kind == p.REPLY_TYPE_OFFSET_DATA and reads and 8 < length <= 8 + request.length:
            (offset,) = p.OFFSET.unpack_from(*self._header(p.OFFSET))
            self._payload(request, offset, length - 8)
        elif kind == p.REPLY_TYPE_OFFSET_HOLE and reads and length == 12:
            offset, size = p.OFFSET_HOLE.unpack_from(*self._header(p.OFFSET_HOLE))
            _check_part(request, offset, size)
            request.parts.append((offset, ZeroSpan(size)))
        elif kind == p.REPLY_TYPE_BLOCK_STATUS and request.command == p.CMD_BLOCK_STATUS:
            self._status(request, length)
        elif kind == p.REPLY_TYPE_NONE and not length:
            pass
        elif kind >> 15 and p.ERROR.size <= length <= _MAX_TEXT:
            body = bytes(self._take(length))
            error, size = p.ERROR.unpack_from(body)
            text = body[p.ERROR.size :][: min(size, p.MAX_STRING)].decode(errors="replace")
            if request.error is None:
                request.error = _failure(request, error or p.EIO, text, self._name)
        else:
            raise ProtocolError(f"a chunk of type {kind} and {length} bytes")

    def _payload(self, request: Request, offset: int, length: int) -> None:
        _check_part(request, offset, length)
        here = min(length, self._end - self._at)
        if here:
            request.parts.append((offset, bytes(self._take(here))))
        if here < length:
            request.parts.append((offset + here, self._wire.recv(length - here)))

    def _status(self, request: Request, length: int) -> None:
        if length % 8 != 4 or length < 12 or length > 4 + 8 * p.MAX_EXTENTS or request.extents:
            raise ProtocolError(f"a block status of {length} bytes")
        here = min(length, self._end - self._at)
        data = bytes(self._take(here))
        if here < length:
            data += self._wire.recv(length - here)
        if int.from_bytes(data[:4], "big") != self.export.context:
            raise ProtocolError("a block status of a context that wasn't asked for")
        values = struct.unpack(f">{(length - 4) // 4}I", data[4:])
        left = request.length
        for size, state in zip(values[::2], values[1::2]):
            if not size:
                raise ProtocolError("an extent of no bytes")
            if left:  # the last one may reach beyond what was asked for
                request.extents.append(Extent(min(size, left), state & 3))
                left -= min(size, left)

    # The bytes received

    def _need(self, length: int) -> None:
        """Have `length` bytes in the buffer."""
        while self._end - self._at < length:
            if self._at == self._end:
                self._at = self._end = 0
            elif self._at + length > _BUFFER:
                rest = bytes(self._buffer[self._at : self._end])
                self._at, self._end = 0, len(rest)
                self._buffer[: len(rest)] = rest
            # The header alone, if a large payload may follow it: that is then received in place.
            stop = self._at + length if self._large else _BUFFER
            self._end += self._wire.recv_into(self._buffer[self._end : stop])

    def _take(self, length: int) -> memoryview:
        if self._end - self._at < length:
            self._need(length)
        self._at += length
        return self._buffer[self._at - length : self._at]

    # The end

    def close(self) -> None:
        """Say goodbye, and end what still waits."""
        if not self.lost:
            try:
                header = p.REQUEST.pack(p.REQUEST_MAGIC, 0, p.CMD_DISC, 0, 0, 0)
                self._wire.try_send([header])
            except (OSError, ValueError):
                pass
        self._fail(OSError("the connection was closed"))
        with self._state:
            if not self._leading:
                self._wire.sock.close()


def _check_part(request: Request, offset: int, length: int) -> None:
    """Whether a part of a read reply lies in what was asked for, and isn't more than that."""
    request.received += length
    end = request.offset + request.length
    if not length or request.received > request.length:
        raise ProtocolError("a read reply with more, or less, than was asked for")
    if offset < request.offset or offset + length > end:
        raise ProtocolError("a read reply for another place")


def _failure(request: Request, error: int, text: str, name: str) -> OSError:
    number = _ERRORS.get(error, errno.EINVAL)
    what = f"{_NAMES.get(request.command, 'request')} at byte {request.offset}"
    return OSError(number, f"{name}: {text or f'{what}: {os.strerror(number)}'}")
