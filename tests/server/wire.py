"""A raw NBD client, as rude as a test wants it.

It is written from the specification alone, and shares no code with nbdtool.
"""

from __future__ import annotations

import socket
import struct
import time
from dataclasses import dataclass, field
from typing import Any, Callable, Union

EXPORT_NAME, ABORT, LIST, STARTTLS, INFO, GO = 1, 2, 3, 5, 6, 7
STRUCTURED_REPLY, LIST_META_CONTEXT, SET_META_CONTEXT, EXTENDED_HEADERS = 8, 9, 10, 11
ACK, SERVER, REP_INFO, META_CONTEXT = 1, 2, 3, 4
UNSUP, POLICY, INVALID, PLATFORM, TLS_REQD, UNKNOWN, SHUTDOWN = (1 << 31 | n for n in range(1, 8))
TOO_BIG, EXT_HEADER_REQD = 1 << 31 | 9, 1 << 31 | 10
READ, WRITE, DISC, FLUSH, TRIM, CACHE, WRITE_ZEROES, BLOCK_STATUS = range(8)
FUA, NO_HOLE, DF, REQ_ONE, FAST_ZERO, PAYLOAD_LEN = (1 << n for n in range(6))
EPERM, EIO, ENOMEM, EINVAL, ENOSPC, EOVERFLOW, ENOTSUP = 1, 5, 12, 22, 28, 75, 95
MIB = 1 << 20


def counted(name: Union[str, bytes]) -> bytes:
    """A string with its length in front."""
    data = name.encode() if isinstance(name, str) else name
    return struct.pack(">I", len(data)) + data


def info_request(name: Union[str, bytes] = "", infos: tuple[int, ...] = ()) -> bytes:
    """The data of INFO and GO."""
    return counted(name) + struct.pack(f">H{len(infos)}H", len(infos), *infos)


def context_request(name: Union[str, bytes] = "", *queries: str) -> bytes:
    """The data of LIST_META_CONTEXT and SET_META_CONTEXT."""
    return counted(name) + struct.pack(">I", len(queries)) + b"".join(map(counted, queries))


def packed_option(option: int, data: bytes = b"", length: int | None = None) -> bytes:
    """An option, whose length may be a lie."""
    return struct.pack(">8sII", b"IHAVEOPT", option, len(data) if length is None else length) + data


@dataclass
class Chunk:
    """A chunk of a structured or extended reply."""

    type: int
    payload: bytes
    done: bool


@dataclass
class Answer:
    """The whole answer to one request."""

    cookie: int
    error: int = 0
    text: str = ""
    error_offset: int | None = None
    data: bytearray = field(default_factory=bytearray)  # of a read
    holes: list[tuple[int, int]] = field(default_factory=list)  # (offset, length)
    extents: list[tuple[int, int]] = field(default_factory=list)  # (length, state)
    chunks: list[Chunk] = field(default_factory=list)

    def place(self, at: int, data: bytes) -> None:
        self.data.extend(bytes(max(at - len(self.data), 0)))
        self.data[at : at + len(data)] = data


class Client:
    """One connection. What can't be is an AssertionError; the server's going away is EOFError."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        sock.settimeout(20)
        self.structured = self.extended = False
        self._asked: dict[int, tuple[int, int, int]] = {}  # cookie -> command, offset, length
        self._cookie = 0x1234_5678_0000_0000

    def close(self) -> None:
        self.sock.close()

    def reset(self) -> None:
        """Leave as a crashed host does."""
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.sock.close()

    def send(self, data: bytes) -> None:
        self.sock.sendall(data)

    def recv(self, length: int) -> bytes:
        data = bytearray()
        while len(data) < length:
            try:
                piece = self.sock.recv(min(length - len(data), MIB))
            except ConnectionResetError:
                piece = b""
            if not piece:
                raise EOFError(f"{len(data)} of {length} bytes")
            data += piece
        return bytes(data)

    def ended(self) -> bool:
        """Whether the server closes the connection, without a byte more."""
        try:
            return self.sock.recv(1) == b""
        except ConnectionResetError:
            return True

    # Handshake

    def hello(self, flags: int = 3) -> Client:
        """Take the greeting and answer with client flags."""
        passwd, magic, server_flags = struct.unpack(">8s8sH", self.recv(18))
        assert (passwd, magic) == (b"NBDMAGIC", b"IHAVEOPT")
        assert server_flags == 3
        self.send(struct.pack(">I", flags))
        return self

    def option(self, option: int, data: bytes = b"", length: int | None = None) -> None:
        """Send an option, whose length may be a lie."""
        self.send(packed_option(option, data, length))

    def reply(self, option: int) -> tuple[int, bytes]:
        """The next reply, to that option: (type, data)."""
        magic, answered, type_, length = struct.unpack(">QIII", self.recv(20))
        assert magic == 0x3E889045565A9
        assert answered == option
        data = self.recv(length)
        if type_ >> 31:
            assert length <= 4096
            assert data.decode().isprintable()
            assert data, "an error reply has a text for a human"
        return type_, data

    def ask(self, option: int, data: bytes = b"") -> list[tuple[int, bytes]]:
        """Send an option; all its replies, the last of which is ACK or an error."""
        self.option(option, data)
        replies = [self.reply(option)]
        while replies[-1][0] != ACK and not replies[-1][0] >> 31:
            replies.append(self.reply(option))
        return replies

    def outcome(self, option: int, data: bytes = b"") -> int:
        """The type of the last reply to an option."""
        return self.ask(option, data)[-1][0]

    def go(
        self,
        name: str = "",
        *,
        mode: str = "structured",  # or simple, extended
        context: bool = True,
    ) -> tuple[int, int]:
        """Negotiate up to transmission; (size, transmission flags)."""
        if mode == "structured":
            assert self.outcome(STRUCTURED_REPLY) == ACK
        if mode == "extended":
            assert self.outcome(EXTENDED_HEADERS) == ACK
        if mode != "simple" and context:
            replies = self.ask(SET_META_CONTEXT, context_request(name, "base:allocation"))
            assert [type_ for type_, _ in replies] == [META_CONTEXT, ACK]
            self.context = struct.unpack(">I", replies[0][1][:4])[0]
        self.structured, self.extended = mode != "simple", mode == "extended"
        replies = self.ask(GO, info_request(name))
        assert replies[-1][0] == ACK, replies
        infos = {struct.unpack(">H", data[:2])[0]: data[2:] for _, data in replies[:-1]}
        size, flags = struct.unpack(">QH", infos[0])
        return size, flags

    # Transmission

    def request(
        self,
        command: int,
        offset: int = 0,
        length: int = 0,
        payload: bytes = b"",
        flags: int = 0,
        cookie: int | None = None,
    ) -> int:
        """Send a request, whose payload needn't be as long as it says; its cookie."""
        data = self.packed(command, offset, length, payload, flags, cookie)
        self.send(data)
        return self._cookie if cookie is None else cookie

    def packed(
        self,
        command: int,
        offset: int = 0,
        length: int = 0,
        payload: bytes = b"",
        flags: int = 0,
        cookie: int | None = None,
    ) -> bytes:
        if cookie is None:
            self._cookie += 1
            cookie = self._cookie
        self._asked[cookie] = (command, offset, length)
        if self.extended:
            flags |= PAYLOAD_LEN * (command == WRITE)
            fields = (0x21E41C71, flags, command, cookie, offset, length)
            return struct.pack(">IHHQQQ", *fields) + payload
        fields = (0x25609513, flags, command, cookie, offset, length)
        return struct.pack(">IHHQQI", *fields) + payload

    def answer(self) -> Answer:
        """The next answer, whole, checked against the specification."""
        (magic,) = struct.unpack(">I", self.recv(4))
        if magic == 0x67446698:
            error, cookie = struct.unpack(">IQ", self.recv(12))
            command, offset, length = self._asked.pop(cookie)
            assert not self.extended
            answer = Answer(cookie, error)
            if command == READ and not error:
                assert not self.structured
                answer.data += self.recv(length)
            return answer
        chunk, cookie = self._chunk(magic)
        command, offset, length = self._asked.pop(cookie)
        answer = Answer(cookie)
        covered: list[tuple[int, int]] = []
        while True:
            answer.chunks.append(chunk)
            covered += self._take_in(answer, chunk, offset)
            if chunk.done:
                break
            (magic,) = struct.unpack(">I", self.recv(4))
            chunk, again = self._chunk(magic)
            assert again == cookie, "another answer inside this one"
        if command == READ and not answer.error and length:
            at = offset
            for start, end in sorted(covered):
                assert start == at, "a gap or an overlap between chunks"
                at = end
            assert at == offset + length
        if command == BLOCK_STATUS and not answer.error:
            assert [chunk.type for chunk in answer.chunks] == [6 if self.extended else 5]
        return answer

    def _chunk(self, magic: int) -> tuple[Chunk, int]:
        if self.extended:
            assert magic == 0x6E8A278C
            flags, type_, cookie, offset, length = struct.unpack(">HHQQQ", self.recv(28))
            assert offset == self._asked.get(cookie, (0, offset, 0))[1]
        else:
            assert magic == 0x668E33EF
            flags, type_, cookie, length = struct.unpack(">HHQI", self.recv(16))
        assert flags in (0, 1)
        return Chunk(type_, self.recv(length), flags == 1), cookie

    def _take_in(self, answer: Answer, chunk: Chunk, start: int) -> list[tuple[int, int]]:
        """Put a chunk into answer; the (offset, end) that a content chunk covers."""
        payload = chunk.payload
        if chunk.type == 0:
            assert chunk.done
            assert not payload
        elif chunk.type == 1:
            (at,) = struct.unpack_from(">Q", payload)
            data = payload[8:]
            assert data
            answer.place(at - start, data)
            return [(at, at + len(data))]
        elif chunk.type == 2:
            at, length = struct.unpack(">QI", payload)
            assert length
            answer.holes.append((at, length))
            answer.place(at - start, bytes(length))
            return [(at, at + length)]
        elif chunk.type == 5:
            context, *values = struct.unpack(f">{len(payload) // 4}I", payload)
            assert context == self.context
            answer.extents = list(zip(values[::2], values[1::2]))
        elif chunk.type == 6:
            context, count = struct.unpack_from(">II", payload)
            assert context == self.context
            values = struct.unpack(f">{2 * count}Q", payload[8:])
            answer.extents = list(zip(values[::2], values[1::2]))
        else:
            assert chunk.type in (1 << 15 | 1, 1 << 15 | 2)
            answer.error, length = struct.unpack_from(">IH", payload)
            assert answer.error
            answer.text = payload[6 : 6 + length].decode()
            assert answer.text
            if chunk.type & 2:
                (answer.error_offset,) = struct.unpack(">Q", payload[6 + length :])
        return []

    def do(
        self, command: int, offset: int = 0, length: int = 0, payload: bytes = b"", flags: int = 0
    ) -> Answer:
        """One request and its answer."""
        cookie = self.request(command, offset, length, payload, flags)
        answer = self.answer()
        assert answer.cookie == cookie
        return answer

    def read(self, offset: int, length: int) -> bytes:
        answer = self.do(READ, offset, length)
        assert answer.error == 0, answer.text
        return bytes(answer.data)

    def write(self, offset: int, data: bytes, flags: int = 0) -> int:
        """Write data; the error."""
        return self.do(WRITE, offset, len(data), data, flags).error


def wait_for(condition: Callable[[], Any], what: Callable[[], str] = lambda: "") -> Any:
    """What condition() returns as soon as that is true."""
    deadline = time.monotonic() + 20
    while not (result := condition()):
        assert time.monotonic() < deadline, what()
        time.sleep(0.01)
    return result
