"""The handshake: oldstyle, newstyle and fixed newstyle negotiation, to the chosen export.

Specification: doc/proto.md, sections "Handshake" and "Option types".
"""

from __future__ import annotations

import struct
import time
from typing import TYPE_CHECKING, Callable

from nbdtool import protocol as p
from nbdtool.server.exports import Export, Exports
from nbdtool.server.stream import Dropped, Inbox, SocketStream, Stalled, Stream

if TYPE_CHECKING:
    import ssl

_MAX_DATA = 64 << 10  # bytes of option data that are looked at
_MAX_DRAIN = 1 << 20  # more than that is taken for an attack
_MAX_OPTIONS = 1024


class Refused(Exception):
    """An option is answered with an error reply: (reply type, text)."""


class Policy:
    """How a server negotiates; timeout is for the whole handshake, in seconds."""

    def __init__(
        self,
        exports: Exports,
        *,
        oldstyle: bool = False,
        structured: bool = True,
        tls: ssl.SSLContext | None = None,
        tls_required: bool = False,
        timeout: float = 30.0,
    ) -> None:
        self.exports = exports
        self.oldstyle = oldstyle
        self.structured = structured
        self.tls = tls
        self.tls_required = tls_required
        self.timeout = timeout
        self.stopping: Callable[[], bool] = lambda: False


class Session:
    """What was negotiated."""

    def __init__(self, inbox: Inbox) -> None:
        self.inbox = inbox
        self.export: Export | None = None
        self.structured = False
        self.extended = False
        self.contexts: dict[str, bool] = {}  # export name -> base:allocation was chosen

    @property
    def block_status(self) -> bool:
        return self.export is not None and self.contexts.get(self.export.name, False)


class Handshake:
    """One negotiation. After run(), session.inbox.stream is the one to go on with (TLS or not)."""

    def __init__(self, stream: Stream, policy: Policy) -> None:
        self.stream = stream
        self.policy = policy
        self.session = Session(Inbox(stream))
        self._deadline = time.monotonic() + policy.timeout
        self._no_zeroes = False

    def run(self) -> Session | None:
        """The session to serve, or None if the client left in good order.

        Dropped ends the connection.
        """
        if self.policy.oldstyle:
            export = self.policy.exports.all[0]
            self._send(
                p.OLDSTYLE.pack(
                    p.INIT_PASSWD, p.OLDSTYLE_MAGIC, export.disk.size, 0, export.flags(False)
                )
            )
            self.session.export = export
            return self.session
        server_flags = p.FLAG_FIXED_NEWSTYLE | p.FLAG_NO_ZEROES
        self._send(p.NEWSTYLE.pack(p.INIT_PASSWD, p.IHAVEOPT, server_flags))
        (flags,) = p.CLIENT_FLAGS.unpack(self._take(p.CLIENT_FLAGS.size))
        if flags & ~server_flags:
            raise Dropped(f"unknown client flags {flags:#x}")
        self._no_zeroes = bool(flags & p.FLAG_NO_ZEROES)
        fixed = bool(flags & p.FLAG_FIXED_NEWSTYLE)
        for _ in range(_MAX_OPTIONS):
            magic, option, length = p.OPTION.unpack(self._take(p.OPTION.size))
            if magic != p.IHAVEOPT:
                raise Dropped("no option where one was expected")
            if not fixed and option != p.OPT_EXPORT_NAME:
                raise Dropped("an option other than EXPORT_NAME without fixed newstyle")
            if self._option(option, length):
                return self.session if self.session.export else None
        raise Dropped("too many options")

    # One option: True ends the negotiation

    def _option(self, option: int, length: int) -> bool:
        if length > _MAX_DRAIN:
            raise Dropped(f"option {option} of {length} bytes")
        if option == p.OPT_EXPORT_NAME:
            return self._export_name(length)
        try:
            if length > _MAX_DATA:
                self._drain(length)
                raise Refused(p.REP_ERR_TOO_BIG, f"{length} bytes are too much for an option")
            data = bytes(self._take(length))
            if option == p.OPT_ABORT:
                self._reply(option, p.REP_ACK)
                return True
            if self.policy.stopping():
                raise Refused(p.REP_ERR_SHUTDOWN, "the server is shutting down")
            if self.policy.tls_required and not self.stream.encrypted and option != p.OPT_STARTTLS:
                raise Refused(p.REP_ERR_TLS_REQD, "this server wants STARTTLS first")
            handler = self._HANDLERS.get(option)
            if handler is None:
                raise Refused(p.REP_ERR_UNSUP, f"option {option} is not supported")
            handler(self, option, data)
        except Refused as refusal:
            self._reply(option, refusal.args[0], p.text(refusal.args[1]))
            return False
        return option == p.OPT_GO

    def _export_name(self, length: int) -> bool:
        if self.policy.tls_required and not self.stream.encrypted:
            raise Dropped("EXPORT_NAME without TLS, which is required")
        if length > p.MAX_STRING:
            raise Dropped(f"an export name of {length} bytes")
        try:
            export = self._find(bytes(self._take(length)))
        except Refused as refusal:
            raise Dropped(refusal.args[1]) from None
        self.session.export = export
        reply = p.EXPORT.pack(export.disk.size, export.flags(self.session.structured))
        self._send(reply if self._no_zeroes else reply + bytes(124))
        return True

    def _list(self, option: int, data: bytes) -> None:
        _want_empty(data)
        for export in self.policy.exports.all:
            name = export.name.encode()
            self._reply(option, p.REP_SERVER, _counted(name) + _description(export))
        self._reply(option, p.REP_ACK)

    def _starttls(self, option: int, data: bytes) -> None:
        _want_empty(data)
        if self.stream.encrypted:
            raise Refused(p.REP_ERR_INVALID, "TLS is in use already")
        if self.policy.tls is None:
            raise Refused(p.REP_ERR_POLICY, "this server has no TLS")
        if not isinstance(self.stream, SocketStream):
            raise Refused(p.REP_ERR_PLATFORM, "TLS needs a socket, not a pipe")
        inbox = self.session.inbox
        if inbox.start != inbox.end:
            raise Dropped("data behind STARTTLS, in clear")
        self._reply(option, p.REP_ACK)
        from nbdtool.server.tls import TLSStream  # ssl is slow to load

        self.stream = stream = TLSStream(self.stream, self.policy.tls)
        stream.handshake(self._remaining())
        self.session = Session(Inbox(self.stream))

    def _info(self, option: int, data: bytes) -> None:
        name, rest = _string(data)
        if len(rest) < 2 or len(rest) != 2 + 2 * p.U16.unpack_from(rest)[0]:
            raise Refused(p.REP_ERR_INVALID, "the information requests don't fill the option")
        wanted = set(struct.unpack(f">{len(rest) // 2 - 1}H", rest[2:]))
        export = self._find(name)
        infos = [
            p.INFO_EXPORT_REPLY.pack(
                p.INFO_EXPORT, export.disk.size, export.flags(self.session.structured)
            ),
            p.INFO_BLOCK_SIZE_REPLY.pack(p.INFO_BLOCK_SIZE, *export.block_size),
        ]
        if p.INFO_NAME in wanted:
            infos.append(p.U16.pack(p.INFO_NAME) + export.name.encode())
        if p.INFO_DESCRIPTION in wanted:
            infos.append(p.U16.pack(p.INFO_DESCRIPTION) + _description(export))
        for info in infos:
            self._reply(option, p.REP_INFO, info)
        self._reply(option, p.REP_ACK)
        if option == p.OPT_GO:
            self.session.export = export

    def _structured_reply(self, option: int, data: bytes) -> None:
        _want_empty(data)
        if self.session.extended:
            raise Refused(p.REP_ERR_EXT_HEADER_REQD, "extended headers are in use already")
        self._negotiate_structured()
        self._reply(option, p.REP_ACK)

    def _extended_headers(self, option: int, data: bytes) -> None:
        _want_empty(data)
        if self.session.extended:
            raise Refused(p.REP_ERR_INVALID, "extended headers are in use already")
        self._negotiate_structured()
        self.session.extended = True
        self._reply(option, p.REP_ACK)

    def _negotiate_structured(self) -> None:
        if not self.policy.structured:
            raise Refused(p.REP_ERR_UNSUP, "structured replies are turned off")
        self.session.structured = True

    def _meta_context(self, option: int, data: bytes) -> None:
        setting = option == p.OPT_SET_META_CONTEXT
        if setting:
            self.session.contexts = {}
            if not self.session.structured:
                raise Refused(p.REP_ERR_INVALID, "structured replies come first")
        name, rest = _string(data)
        if len(rest) < 4:
            raise Refused(p.REP_ERR_INVALID, "the option is too short")
        (count,), rest = p.U32.unpack_from(rest), rest[4:]
        if count > _MAX_DATA // 4:
            raise Refused(p.REP_ERR_INVALID, "more queries than the option holds")
        queries = []
        for _ in range(count):
            query, rest = _string(rest)
            queries.append(query)
        if rest:
            raise Refused(p.REP_ERR_INVALID, "data behind the last query")
        export = self._find(name)
        base = p.BASE_ALLOCATION.encode()
        chosen = base in queries or (not setting and (not queries or b"base:" in queries))
        if chosen:
            self._reply(option, p.REP_META_CONTEXT, p.U32.pack(setting) + base)
        if setting:
            self.session.contexts = {export.name: chosen}
        self._reply(option, p.REP_ACK)

    _HANDLERS = {  # noqa: RUF012
        p.OPT_LIST: _list,
        p.OPT_STARTTLS: _starttls,
        p.OPT_INFO: _info,
        p.OPT_GO: _info,
        p.OPT_STRUCTURED_REPLY: _structured_reply,
        p.OPT_LIST_META_CONTEXT: _meta_context,
        p.OPT_SET_META_CONTEXT: _meta_context,
        p.OPT_EXTENDED_HEADERS: _extended_headers,
    }

    # Helpers

    def _find(self, raw: bytes) -> Export:
        name = _export_name(raw)
        export = self.policy.exports.find(name)
        if export is None:
            raise Refused(
                p.REP_ERR_UNKNOWN, f"no export named {name!r}; `nbdinfo --list` shows all"
            )
        return export

    def _remaining(self) -> float:
        remaining = self._deadline - time.monotonic()
        if remaining <= 0:
            raise Stalled("the handshake takes too long")
        return remaining

    def _take(self, length: int) -> memoryview:
        inbox = self.session.inbox
        while inbox.end - inbox.start < length:
            self.stream.set_patience(self._remaining())  # one deadline, however slowly it drips
            inbox.fill(inbox.end - inbox.start + 1)
        return inbox.take(length)

    def _drain(self, length: int) -> None:
        while length:
            length -= len(self._take(min(length, _MAX_DATA // 2)))

    def _send(self, data: bytes) -> None:
        self.stream.set_patience(self._remaining())
        self.stream.send((data,), len(data))

    def _reply(self, option: int, reply: int, data: bytes = b"") -> None:
        self._send(p.OPTION_REPLY.pack(p.REPLY_MAGIC, option, reply, len(data)) + data)


def _want_empty(data: bytes) -> None:
    if data:
        raise Refused(p.REP_ERR_INVALID, "the option takes no data")


def _counted(name: bytes) -> bytes:
    return p.U32.pack(len(name)) + name


def _description(export: Export) -> bytes:
    return p.text(export.disk.description)


def _string(data: bytes) -> tuple[bytes, bytes]:
    """The counted string at the front of data, and what follows it; Refused if it doesn't fit."""
    if len(data) < 4:
        raise Refused(p.REP_ERR_INVALID, "the option is too short")
    (length,) = p.U32.unpack_from(data)
    if length > len(data) - 4:
        raise Refused(p.REP_ERR_INVALID, "a string that passes the end of the option")
    return data[4 : 4 + length], data[4 + length :]


def _export_name(raw: bytes) -> str:
    """The name that a client sent, checked as section "Conventions" has it; Refused otherwise."""
    if len(raw) > p.MAX_STRING:
        raise Refused(p.REP_ERR_INVALID, f"an export name of {len(raw)} bytes")
    if b"\0" in raw:
        raise Refused(p.REP_ERR_INVALID, "an export name with a NUL byte")
    try:
        return raw.decode()
    except UnicodeDecodeError:
        raise Refused(p.REP_ERR_INVALID, "an export name that isn't UTF-8") from None
