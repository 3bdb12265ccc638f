"""The NBD client against servers that lie: no hang, no wrong data, no memory beyond what was asked.

The server is written from the specification alone, and shares no code with nbdtool.
"""

from __future__ import annotations

import contextlib
import errno
import socket
import struct
import threading
import time
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbdtool.disk import read_bytes
from nbdtool.disks.nbd import NbdDisk, handshake
from nbdtool.errors import Error

MIB = 1 << 20
SIZE = 64 * MIB
SIMPLE, STRUCTURED = 0x67446698, 0x668E33EF
NONE, DATA, HOLE, STATUS, ERROR, ERROR_OFFSET = 0, 1, 2, 5, 0x8001, 0x8002
DONE = 1
READ, WRITE, DISC, BLOCK_STATUS = 0, 1, 2, 7

Request = tuple[int, int, int, int, int]  # flags, type, cookie, offset, length
Answer = Callable[[socket.socket, Request], None]


def exactly(sock: socket.socket, length: int) -> bytes:
    data = b""
    while len(data) < length:
        piece = sock.recv(length - len(data))
        if not piece:
            raise EOFError
        data += piece
    return data


def chunk(kind: int, cookie: int, body: bytes, flags: int = 0) -> bytes:
    return struct.pack(">IHHQI", STRUCTURED, flags, kind, cookie, len(body)) + body


def option_reply(option: int, kind: int, body: bytes = b"") -> bytes:
    return struct.pack(">QIII", 0x3E889045565A9, option, kind, len(body)) + body


def greet(sock: socket.socket, size: int = SIZE, minimum: int = 1) -> None:
    """A right handshake: structured replies, base:allocation as context 1, GO."""
    sock.sendall(struct.pack(">8s8sH", b"NBDMAGIC", b"IHAVEOPT", 3))
    exactly(sock, 4)
    while True:
        _, option, length = struct.unpack(">8sII", exactly(sock, 16))
        exactly(sock, length)
        if option == 10:
            sock.sendall(option_reply(option, 4, struct.pack(">I", 1) + b"base:allocation"))
        if option == 7:
            sock.sendall(option_reply(option, 3, struct.pack(">HQH", 0, size, 0x8D)))
            sock.sendall(option_reply(option, 3, struct.pack(">HIII", 3, minimum, 4096, 1 << 25)))
        sock.sendall(option_reply(option, 1))
        if option == 7:
            return


@contextlib.contextmanager
def server(path: Path, behave: Callable[[socket.socket], None]) -> Iterator[str]:
    """Every client meets `behave`, and then the end of the connection."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    listener.listen()

    def serve(sock: socket.socket) -> None:
        with sock, contextlib.suppress(OSError, EOFError, struct.error):
            behave(sock)

    def accept() -> None:
        with contextlib.suppress(OSError):
            while True:
                threading.Thread(target=serve, args=(listener.accept()[0],), daemon=True).start()

    thread = threading.Thread(target=accept)
    thread.start()
    try:
        yield f"nbd+unix:///?socket={path}"
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        thread.join()
        listener.close()
        path.unlink()


def answering(answer: Answer, minimum: int = 1) -> Callable[[socket.socket], None]:
    def behave(sock: socket.socket) -> None:
        greet(sock, minimum=minimum)
        while True:
            fields = struct.unpack(">IHHQQI", exactly(sock, 28))[1:]
            if fields[1] == DISC:
                return
            answer(sock, fields)

    return behave


@pytest.fixture
def answered(tmp_path: Path) -> Callable[..., contextlib.AbstractContextManager[NbdDisk]]:
    """with answered(answer) as disk: each request is given to answer(socket, request)."""

    @contextlib.contextmanager
    def answered(answer: Answer, minimum: int = 1, **options: Any) -> Iterator[NbdDisk]:
        options = {"reconnect": 0, "patience": 10, **options}
        with server(tmp_path / "socket", answering(answer, minimum)) as uri:
            disk = NbdDisk(uri, **options)
            try:
                yield disk
            finally:
                disk.close()

    return answered


def data(offset: int, body: bytes) -> bytes:
    return struct.pack(">Q", offset) + body


def hole(offset: int, length: int) -> bytes:
    return struct.pack(">QI", offset, length)


# A read of [4096, 4096 + 1024) that is answered with these chunks: (type, body) each
WRONG = {
    "nothing": [(NONE, b"")],
    "too short": [(DATA, data(4096, bytes(1000)))],
    "a gap": [(DATA, data(4096, bytes(100))), (DATA, data(4200, bytes(920)))],
    "twice the same": [(DATA, data(4096, bytes(600))), (DATA, data(4600, bytes(424)))],
    "more than asked for": [(DATA, data(4096, bytes(1024))), (DATA, data(4096, bytes(1)))],
    "before the range": [(DATA, data(4000, bytes(1024)))],
    "behind the range": [(DATA, data(5000, bytes(1024)))],
    "a hole behind the range": [(HOLE, hole(4096, 1025))],
    "a huge hole": [(HOLE, hole(4096, 0xFFFFFFFF))],
    "a hole of no bytes": [(HOLE, hole(4096, 0)), (DATA, data(4096, bytes(1024)))],
    "data of no bytes": [(DATA, data(4096, b"")), (DATA, data(4096, bytes(1024)))],
    "an offset beyond 64 bits": [(DATA, data((1 << 64) - 1, bytes(1024)))],
    "a chunk that can't be": [(77, b"")],
    "a body with nothing": [(NONE, b"surprise")],
    "extents": [(STATUS, struct.pack(">III", 1, 1024, 0))],
    "an error without room": [(ERROR, b"")],
}


@pytest.mark.parametrize("chunks", WRONG.values(), ids=WRONG)
def test_wrong_read_replies_are_no_data(chunks: list[tuple[int, bytes]], answered: Any) -> None:
    def answer(sock: socket.socket, request: Request) -> None:
        for number, (kind, body) in enumerate(chunks, 1):
            sock.sendall(chunk(kind, request[2], body, DONE * (number == len(chunks))))

    with answered(answer) as disk, pytest.raises(OSError) as raised:
        disk.read(4096, 1024)
    assert raised.value.errno == errno.EIO


def test_right_read_replies_in_any_order(answered: Any) -> None:
    def answer(sock: socket.socket, request: Request) -> None:
        cookie = request[2]
        sock.sendall(chunk(DATA, cookie, data(5000, b"b" * 120)))
        sock.sendall(chunk(NONE, cookie, b""))
        sock.sendall(chunk(HOLE, cookie, hole(4196, 804)))
        sock.sendall(chunk(DATA, cookie, data(4096, b"a" * 100), DONE))

    with answered(answer) as disk:
        assert read_bytes(disk, 4096, 1024) == b"a" * 100 + bytes(804) + b"b" * 120


def test_the_text_of_an_error_is_told(answered: Any) -> None:
    def answer(sock: socket.socket, request: Request) -> None:
        text = b"sector 7 is \xff bad"
        body = struct.pack(">IH", 5, len(text)) + text + struct.pack(">Q", 4100)
        sock.sendall(chunk(ERROR_OFFSET, request[2], body))
        sock.sendall(chunk(ERROR, request[2], struct.pack(">IH", 28, 0), DONE))

    with answered(answer) as disk:
        for _ in range(2):  # the connection is as good as before
            with pytest.raises(OSError, match=r"sector 7 is . bad") as raised:
                disk.read(4096, 1024)
            assert raised.value.errno == errno.EIO


@pytest.mark.parametrize(
    "reply",
    [
        struct.pack(">IIQ", SIMPLE, 0, 0xBAD),
        chunk(NONE, 0xBAD, b"", DONE),
        b"HTTP/1.1 400 Bad Request\r\n\r\n",
        struct.pack(">IHHQI", STRUCTURED, 0, DATA, 1, 0xFFFFFFFF),
        struct.pack(">IHHQI", STRUCTURED, 0, ERROR, 1, 0xFFFFFFFF),
        struct.pack(">IHHQI", STRUCTURED, 0, STATUS, 1, 0xFFFFFFFC),
    ],
)
@pytest.mark.parametrize("command", [READ, BLOCK_STATUS])
def test_replies_that_belong_nowhere(reply: bytes, command: int, answered: Any) -> None:
    with answered(lambda sock, request: sock.sendall(reply)) as disk, pytest.raises(OSError):
        disk.read(0, 512) if command == READ else list(disk.extents(0, 512))


@pytest.mark.parametrize(
    "body",
    [
        struct.pack(">I", 1),
        struct.pack(">III", 1, 0, 3),
        struct.pack(">III", 2, 512, 3),
        struct.pack(">II", 1, 512),
        struct.pack(">III", 1, 512, 3) * 2,
    ],
)
def test_wrong_block_status_replies(body: bytes, answered: Any) -> None:
    def answer(sock: socket.socket, request: Request) -> None:
        sock.sendall(chunk(STATUS, request[2], body, DONE))

    with answered(answer) as disk, pytest.raises(OSError):
        list(disk.extents(0, SIZE))


def test_block_status_that_says_little_or_too_much(answered: Any) -> None:
    def answer(sock: socket.socket, request: Request) -> None:
        extent = (4096, 0) if request[3] == 0 else (0xFFFFFFFF, 3 | 1 << 20)
        sock.sendall(chunk(STATUS, request[2], struct.pack(">III", 1, *extent), DONE))

    with answered(answer) as disk:
        assert list(disk.extents(0, SIZE)) == [(4096, 0), (SIZE - 4096, 3)]


def test_extents_that_lead_nowhere(answered: Any) -> None:
    def answer(sock: socket.socket, request: Request) -> None:
        sock.sendall(chunk(STATUS, request[2], struct.pack(">III", 1, 50, 0), DONE))

    with answered(answer, minimum=512) as disk, pytest.raises(OSError, match="extents smaller"):
        list(disk.extents(600, 1000))


def test_a_reply_in_countless_chunks_ends(answered: Any) -> None:
    def answer(sock: socket.socket, request: Request) -> None:
        while True:
            sock.sendall(chunk(NONE, request[2], b"") * 1000)

    with answered(answer) as disk, pytest.raises(OSError, match="too many chunks"):
        disk.read(0, 512)


def test_tiny_parts_cost_no_memory(answered: Any) -> None:
    def answer(sock: socket.socket, request: Request) -> None:
        for at in range(request[4]):
            sock.sendall(chunk(DATA, request[2], data(at, b"x"), DONE * (at + 1 == request[4])))

    with answered(answer) as disk:
        tracemalloc.start()
        try:
            with pytest.raises(OSError, match="too many chunks"):
                disk.read(0, MIB)
            assert tracemalloc.get_traced_memory()[1] < 8 * MIB
        finally:
            tracemalloc.stop()


def test_silence_ends(answered: Any) -> None:
    said = r"doesn't answer for 0\.3 seconds"
    with (
        answered(lambda sock, request: None, patience=0.3) as disk,
        pytest.raises(OSError, match=said),
    ):
        disk.read(0, 512)


def test_connections_that_are_always_dropped_are_not_tried_for_ever(answered: Any) -> None:
    def answer(sock: socket.socket, request: Request) -> None:
        raise EOFError

    with answered(answer, reconnect=0.5) as disk:
        began = time.monotonic()
        with pytest.raises(OSError, match="closed the connection"):
            disk.read(0, 512)
        assert 0.4 < time.monotonic() - began < 20


def test_close_ends_what_waits(answered: Any) -> None:
    failures: list[OSError] = []

    def read() -> None:
        try:
            disk.read(0, 512)
        except OSError as exc:
            failures.append(exc)

    with answered(lambda sock, request: None) as disk:
        threads = [threading.Thread(target=read) for _ in range(3)]
        for thread in threads:
            thread.start()
        time.sleep(0.2)
        disk.close()
        for thread in threads:
            thread.join(5)
            assert not thread.is_alive()
    assert len(failures) == 3


# Handshakes

GREETING = struct.pack(">8s8sH", b"NBDMAGIC", b"IHAVEOPT", 3)
GO = option_reply(8, 0x80000001)  # structured replies are refused, then GO is answered with
BLOCK_SIZES = struct.pack(">HIII", 3, 3, 4096, 1 << 25)
EXPORT = struct.pack(">HQH", 0, SIZE, 1)
HANDSHAKES = {
    "nothing": b"",
    "a cut greeting": GREETING[:9],
    "an answer to another option": GREETING + option_reply(99, 1),
    "a reply without its magic": GREETING + bytes(20),
    "a reply of 4 GiB": GREETING + struct.pack(">QIII", 0x3E889045565A9, 8, 1, 0xFFFFFFFF),
    "replies without end": GREETING + option_reply(8, 3, b"x") * 5000,
    "GO without an export": GREETING + GO + option_reply(7, 1),
    "GO with an empty info": GREETING + GO + option_reply(7, 3) + option_reply(7, 1),
    "a negative size": GREETING + GO
    + option_reply(7, 3, struct.pack(">HQH", 0, 1 << 63, 1)) + option_reply(7, 1),
    "blocks of 3 bytes": GREETING + GO
    + option_reply(7, 3, EXPORT) + option_reply(7, 3, BLOCK_SIZES) + option_reply(7, 1),
}  # fmt: skip


@pytest.mark.parametrize("said", HANDSHAKES.values(), ids=HANDSHAKES)
def test_wrong_handshakes(said: bytes, tmp_path: Path) -> None:
    def behave(sock: socket.socket) -> None:
        sock.sendall(said)
        sock.shutdown(socket.SHUT_WR)
        while sock.recv(4096):
            pass

    with server(tmp_path / "socket", behave) as uri, pytest.raises(Error):
        NbdDisk(uri)


def test_a_dripping_handshake_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handshake, "TIMEOUT", 0.5)

    def behave(sock: socket.socket) -> None:
        for byte in GREETING:
            sock.sendall(bytes([byte]))
            time.sleep(0.2)

    said = r"within 0\.5 seconds|doesn't answer"
    with server(tmp_path / "socket", behave) as uri, pytest.raises(Error, match=said):
        NbdDisk(uri)


@pytest.mark.fuzz
@given(st.lists(st.binary(max_size=40) | st.tuples(st.integers(0, 8), st.binary(max_size=30))))
def test_any_reply_ends_in_data_or_an_error(
    tmp_path_factory: pytest.TempPathFactory, replies: list[Any]
) -> None:
    """Raw bytes and chunks with the right cookie; data can only be what was in a chunk."""

    def answer(sock: socket.socket, request: Request) -> None:
        for reply in replies:
            whole = reply if isinstance(reply, bytes) else chunk(reply[0], request[2], reply[1])
            sock.sendall(whole)
        raise EOFError

    path = tmp_path_factory.mktemp("fuzz") / "socket"
    with server(path, answering(answer)) as uri:
        disk = NbdDisk(uri, reconnect=0, patience=5)
        with pytest.raises(OSError):
            disk.read(0, 512)
        disk.close()
