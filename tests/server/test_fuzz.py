"""Random clients: malformed ones leave nothing behind, lawful ones get what a model says."""

from __future__ import annotations

import contextlib
import errno
import socket
import struct
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st

from nbdtool.disk import Span
from tests.server import wire
from tests.server.harness import Harness, MemoryDisk, harness
from tests.server.wire import context_request, info_request

pytestmark = pytest.mark.fuzz

SIZE = 200_000
MORE = settings(max_examples=max(400, settings.default.max_examples))  # type: ignore[union-attr]
BAD = range(150_000, 150_512)  # bytes that can be neither read nor written


class Scratched(MemoryDisk):
    """A disk with a bad block."""

    def _check(self, offset: int, length: int) -> None:
        if offset < BAD.stop and offset + length > BAD.start:
            raise OSError(errno.EIO, "a scratch")

    def read(self, offset: int, length: int) -> list[Span]:
        self._check(offset, length)
        return super().read(offset, length)

    def write(self, offset: int, data: memoryview) -> None:
        self._check(offset, len(data))
        super().write(offset, data)


@pytest.fixture(scope="module")
def two() -> Iterator[Harness]:
    """A server of a writable and a read-only export."""
    locked = MemoryDisk(1000)
    locked.writable = False
    with harness({"a": Scratched(SIZE), "b": locked}) as running:
        yield running


# Malformed

numbers = st.one_of(
    st.integers(0, 16),
    st.sampled_from([255, 4095, 4096, 4097, 65535, 65536, SIZE - 1, SIZE, SIZE + 1]),
    st.sampled_from([(1 << n) + d for n in (15, 16, 20, 25, 31, 32, 63) for d in (-1, 0, 1)]),
)
names = st.one_of(
    st.sampled_from([b"a", b"b", b"", b"c", b"\xff", b"a\0"]), st.binary(max_size=300)
)


def u16(number: int) -> bytes:
    return struct.pack(">H", number & 0xFFFF)


def u32(number: int) -> bytes:
    return struct.pack(">I", number & 0xFFFFFFFF)


@st.composite
def options(draw: Any) -> bytes:
    """An option, more or less well-formed."""
    number = draw(st.one_of(st.integers(0, 12), numbers))
    if number in (wire.INFO, wire.GO):
        data = info_request(draw(names), tuple(draw(st.lists(st.integers(0, 4), max_size=5))))
    elif number in (wire.LIST_META_CONTEXT, wire.SET_META_CONTEXT):
        queries = st.sampled_from(["base:allocation", "base:", "x-y:z", "nonsense"])
        data = context_request(draw(names), *draw(st.lists(queries, max_size=3)))
    elif number == wire.EXPORT_NAME:
        data = draw(names)
    else:
        data = draw(st.sampled_from([b"", b"", b"data"]))
    if draw(st.integers(0, 9)) == 0:
        data = draw(st.one_of(st.binary(max_size=60), st.just(data[:-1]), st.just(data + b"\0")))
    length = len(data)
    if draw(st.integers(0, 19)) == 0:
        length = draw(numbers)
    return b"IHAVEOPT" + u32(number) + u32(length) + data


@st.composite
def requests(draw: Any, extended: bool) -> bytes:
    """A request, more or less well-formed."""
    command = draw(st.one_of(st.integers(0, 8), numbers)) & 0xFFFF
    flags = draw(st.one_of(st.just(0), st.just(0), st.integers(0, 63), numbers))
    offset, length = draw(numbers), draw(numbers)
    fields = u16(flags) + u16(command) + draw(st.binary(min_size=8, max_size=8))
    fields += struct.pack(">Q", offset & (1 << 64) - 1)
    payload = b""
    if command == wire.WRITE or (flags & wire.PAYLOAD_LEN and draw(st.booleans())):
        payload = bytes(min(length, 100_000))
    if extended:
        return u32(0x21E41C71) + fields + struct.pack(">Q", length) + payload
    return u32(0x25609513) + fields + u32(length) + payload


CONTEXT = wire.packed_option(wire.SET_META_CONTEXT, context_request("a", "base:allocation"))
STRUCTURED = wire.packed_option(wire.STRUCTURED_REPLY)
EXTENDED = wire.packed_option(wire.EXTENDED_HEADERS)


@st.composite
def conversations(draw: Any) -> bytes:
    """All that a client sends."""
    hello = u32(draw(st.one_of(st.just(3), st.just(3), st.just(1), numbers)))
    mode = draw(st.sampled_from([b"", STRUCTURED, EXTENDED]))
    parts = [hello, mode, CONTEXT, *draw(st.lists(options(), max_size=5))]
    if draw(st.booleans()):
        parts.append(wire.packed_option(wire.GO, info_request("a")))
        parts += draw(st.lists(requests(mode == EXTENDED), max_size=8))
    data = bytearray(b"".join(parts))
    for _ in range(draw(st.sampled_from([0, 0, 1, 3]))):
        at = draw(st.integers(0, len(data) - 1))
        data[at] = draw(st.integers(0, 255))
    return bytes(data)


def drain(sock: socket.socket, got: list[int]) -> None:
    with contextlib.suppress(ConnectionResetError):
        while data := sock.recv(1 << 16):
            got[0] += len(data)


@MORE
@given(conversation=conversations(), pieces=st.integers(1, 4), wait=st.booleans())
def test_whatever_a_client_sends_the_server_ends_with_it(
    two: Harness, conversation: bytes, pieces: int, wait: bool
) -> None:
    client = two.connect()
    got = [0]
    reader = threading.Thread(target=drain, args=(client.sock, got))
    reader.start()
    step = -(-len(conversation) // pieces) or 1
    try:
        for at in range(0, len(conversation), step):
            client.send(conversation[at : at + step])
        client.sock.shutdown(socket.SHUT_WR)
    except (BrokenPipeError, ConnectionResetError):
        event("dropped")
    if wait:
        reader.join(20)
        assert not reader.is_alive(), "the server doesn't end the connection"
    client.sock.shutdown(socket.SHUT_RDWR)
    reader.join(20)
    two.leave()
    assert got[0] >= 18 or not wait
    assert not [text for text in two.warnings if "fault" in text]
    disk = two.service._policy.exports.all[0].disk
    assert isinstance(disk, MemoryDisk)
    disk.done.clear()


# Lawful

offsets = st.integers(0, SIZE - 1)
lengths = st.one_of(st.integers(1, 600), st.integers(60_000, 70_000), st.integers(1, SIZE))
lawful = st.lists(
    st.tuples(
        st.sampled_from([wire.READ, wire.READ, wire.WRITE, wire.WRITE_ZEROES, wire.BLOCK_STATUS]),
        offsets,
        lengths,
        st.sampled_from([0, wire.FUA]),
    ),
    max_size=30,
)


@MORE
@given(
    mode=st.sampled_from(["simple", "structured", "extended"]),
    asked=lawful,
    batch=st.integers(1, 30),
)
def test_lawful_requests_agree_with_a_model(
    two: Harness, mode: str, asked: list[tuple[int, int, int, int]], batch: int
) -> None:
    client = two.client("a", mode=mode)
    disk = two.service._policy.exports.all[0].disk
    assert isinstance(disk, MemoryDisk)
    model = bytearray(disk.content)
    todo = []
    for number, (command, offset, length, flags) in enumerate(asked):
        if command == wire.BLOCK_STATUS and mode == "simple":
            continue
        length = min(length, SIZE - offset)
        payload = bytes([number % 7]) * length if command == wire.WRITE else b""
        todo.append((command, offset, length, payload, flags))
    for at in range(0, len(todo), batch):
        pipelined = todo[at : at + batch]
        data = b"".join(client.packed(*request) for request in pipelined)
        sender = threading.Thread(target=client.send, args=(data,))
        sender.start()
        for command, offset, length, payload, _ in pipelined:
            answer = client.answer()
            end = offset + length
            scratched = offset < BAD.stop and end > BAD.start
            if scratched and command in (wire.READ, wire.WRITE):
                assert answer.error == wire.EIO
                continue
            assert answer.error == 0
            if command == wire.READ:
                assert answer.data == model[offset:end]
            elif command == wire.BLOCK_STATUS:
                assert sum(size for size, _ in answer.extents) == length
                for size, state in answer.extents:
                    assert state in (0, 3)
                    assert not state or not any(model[offset : offset + size])
                    offset += size
            else:
                model[offset:end] = payload or bytes(length)
        sender.join()
    assert disk.content == model
    disk.done.clear()
    two.leave()
