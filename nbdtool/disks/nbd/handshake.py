"""The handshake of an NBD client. Specification: doc/proto.md, section "Handshake"."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from struct import Struct
from typing import TYPE_CHECKING

from nbdtool import protocol as p
from nbdtool.disks.nbd.wire import TLSWire, Wire
from nbdtool.errors import Error

if TYPE_CHECKING:
    import socket

    from nbdtool.disks.nbd.uri import Address

TIMEOUT = 30.0  # seconds for all of it

_GREETING = Struct(">QQ")  # passwd, magic
_OLDSTYLE = Struct(">QHH124x")  # what follows them: size, handshake flags, transmission flags

_MAX_DATA = 64 << 10  # bytes of one reply to an option
_MAX_REPLIES = 1000  # to one option
_MAX_SIZE = (1 << 63) - 1  # bytes of an export

_REASONS = {
    p.REP_ERR_UNSUP: "it doesn't know the option",
    p.REP_ERR_POLICY: "its policy forbids it",
    p.REP_ERR_INVALID: "it takes the option for invalid",
    p.REP_ERR_PLATFORM: "its platform can't do it",
    p.REP_ERR_TLS_REQD: "it insists on TLS; use nbds:// or nbds+unix://",
    p.REP_ERR_UNKNOWN: "it has no such export; `nbdinfo --list` shows all",
    p.REP_ERR_SHUTDOWN: "it is shutting down",
    p.REP_ERR_TOO_BIG: "the option is too big for it",
}


class ProtocolError(OSError):
    """The server says what no server may say."""


@dataclass(frozen=True)
class Export:
    """What the server said of the export; sizes in bytes."""

    size: int
    flags: int
    block_size: tuple[int, int, int] = (1, 4096, p.MAX_PAYLOAD)
    structured: bool = False
    context: int | None = None  # the ID of base:allocation, if block status may be asked for


@dataclass
class _Replies:
    """All replies to an option; error is the type of the last one if that refuses."""

    error: int = 0
    text: str = ""
    parts: list[tuple[int, bytes]] = field(default_factory=list)


class Handshake:
    """One handshake over a fresh socket; wire and export are there after run().

    Error: the server refuses, or isn't one; OSError: it is gone or too slow.
    """

    def __init__(self, sock: socket.socket, address: Address) -> None:
        self.wire = Wire(sock)
        self._address = address
        self._deadline = time.monotonic() + TIMEOUT

    def run(self) -> Export:
        passwd, magic = _GREETING.unpack(self._recv(_GREETING.size))
        if passwd != p.INIT_PASSWD or magic not in (p.IHAVEOPT, p.OLDSTYLE_MAGIC):
            raise Error(f"{self._address}: is no NBD server")
        export = self._oldstyle() if magic == p.OLDSTYLE_MAGIC else self._newstyle()
        if export.size > _MAX_SIZE:
            raise Error(f"{self._address}: a size of {export.size} bytes can't be")
        minimum, preferred, maximum = export.block_size
        if not (0 < minimum <= preferred and minimum <= 65536 and not minimum & (minimum - 1)
                and minimum <= maximum):  # fmt: skip
            raise Error(f"{self._address}: block sizes of {export.block_size} bytes can't be")
        return export

    def _oldstyle(self) -> Export:
        if self._address.tls:
            raise Error(f"{self._address}: speaks the oldstyle protocol, which has no TLS")
        if self._address.export:
            raise Error(f"{self._address}: speaks the oldstyle protocol, which has no export names")
        size, _, flags = _OLDSTYLE.unpack(self._recv(_OLDSTYLE.size))
        return Export(size, flags)

    def _newstyle(self) -> Export:
        (flags,) = p.U16.unpack(self._recv(2))
        zeroes = not flags & p.FLAG_NO_ZEROES
        self._send(p.CLIENT_FLAGS.pack(flags & (p.FLAG_FIXED_NEWSTYLE | p.FLAG_NO_ZEROES)))
        if not flags & p.FLAG_FIXED_NEWSTYLE:
            if self._address.tls:
                raise Error(f"{self._address}: has no TLS")
            return self._export_name(zeroes)
        if self._address.tls:
            self._start_tls()
        structured = not self._option(p.OPT_STRUCTURED_REPLY).error
        context = self._meta_context() if structured else None
        name = self._address.export.encode(errors="surrogateescape")
        wanted = p.U32.pack(len(name)) + name + p.U16.pack(1) + p.U16.pack(p.INFO_BLOCK_SIZE)
        replies = self._option(p.OPT_GO, wanted)
        if replies.error == p.REP_ERR_UNSUP:
            return self._export_name(zeroes, structured, context)
        if replies.error:
            raise self._refused(replies)
        return self._export(replies, structured, context)

    def _export(self, replies: _Replies, structured: bool, context: int | None) -> Export:
        export, block_size = None, (1, 4096, p.MAX_PAYLOAD)
        for kind, data in replies.parts:
            if kind != p.REP_INFO or len(data) < 2:
                raise ProtocolError(f"an answer of type {kind} to GO")
            (info,) = p.U16.unpack_from(data)
            if info == p.INFO_EXPORT and len(data) == p.INFO_EXPORT_REPLY.size:
                export = p.INFO_EXPORT_REPLY.unpack(data)
            elif info == p.INFO_BLOCK_SIZE and len(data) == p.INFO_BLOCK_SIZE_REPLY.size:
                block_size = p.INFO_BLOCK_SIZE_REPLY.unpack(data)[1:]
        if export is None:
            raise ProtocolError("GO without the size of the export")
        return Export(export[1], export[2], block_size, structured, context)

    def _export_name(
        self, zeroes: bool, structured: bool = False, context: int | None = None
    ) -> Export:
        name = self._address.export.encode(errors="surrogateescape")
        self._send(p.OPTION.pack(p.IHAVEOPT, p.OPT_EXPORT_NAME, len(name)) + name)
        try:
            size, flags = p.EXPORT.unpack(self._recv(p.EXPORT.size))
        except ConnectionResetError:  # the one way to refuse
            raise Error(f"{self._address}: {_REASONS[p.REP_ERR_UNKNOWN]}") from None
        if zeroes:
            self._recv(124)
        return Export(size, flags, structured=structured, context=context)

    def _start_tls(self) -> None:
        replies = self._option(p.OPT_STARTTLS)
        if replies.error:
            raise Error(f"{self._address}: has no TLS{f' ({replies.text})' * bool(replies.text)}")
        self.wire.sock.settimeout(max(self._deadline - time.monotonic(), 0.001))
        try:
            self.wire = TLSWire(self.wire.sock, self._address)
        except OSError as exc:
            reason = getattr(exc, "verify_message", "") or getattr(exc, "reason", "") or exc
            raise Error(f"{self._address}: TLS: {reason}") from None

    def _meta_context(self) -> int | None:
        name = self._address.export.encode(errors="surrogateescape")
        query = p.BASE_ALLOCATION.encode()
        parts = (p.U32.pack(len(name)), name, p.U32.pack(1), p.U32.pack(len(query)), query)
        replies = self._option(p.OPT_SET_META_CONTEXT, b"".join(parts))
        if replies.error:
            return None
        for kind, data in replies.parts:
            if kind == p.REP_META_CONTEXT and data[4:] == query:
                return int.from_bytes(data[:4], "big")
        return None

    # One option

    def _option(self, option: int, data: bytes = b"") -> _Replies:
        self._send(p.OPTION.pack(p.IHAVEOPT, option, len(data)) + data)
        replies = _Replies()
        while True:
            fields = p.OPTION_REPLY.unpack(self._recv(p.OPTION_REPLY.size))
            magic, answered, kind, length = fields
            if magic != p.REPLY_MAGIC or answered != option or length > _MAX_DATA:
                raise ProtocolError(f"a malformed answer to option {option}")
            body = self._recv(length)
            if kind >> 31:
                replies.error, replies.text = kind, body.decode(errors="replace")[: p.MAX_STRING]
                return replies
            if kind == p.REP_ACK:
                return replies
            replies.parts.append((kind, body))
            if len(replies.parts) > _MAX_REPLIES:
                raise ProtocolError(f"more than {_MAX_REPLIES} answers to option {option}")

    def _refused(self, replies: _Replies) -> Error:
        text = _REASONS.get(replies.error, f"error {replies.error:#x}")
        detail = f" ({replies.text})" if replies.text else ""
        return Error(f"{self._address}: {text}{detail}")

    def _recv(self, length: int) -> bytes:
        data = bytearray(length)
        with memoryview(data) as view:
            done = 0
            while done < length:
                self._patient()
                done += self.wire.recv_into(view[done:])
        return bytes(data)

    def _send(self, data: bytes) -> None:
        self._patient()
        self.wire.sock.sendall(data)

    def _patient(self) -> None:
        remaining = self._deadline - time.monotonic()
        if remaining <= 0:
            raise TimeoutError(f"no handshake within {TIMEOUT:g} seconds")
        self.wire.start(remaining)
