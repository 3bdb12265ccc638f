"""The transmission phase, command by command: what is answered, and what is refused and how."""

from __future__ import annotations

import itertools
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Callable

import pytest

from nbdtool.disk import (
    DATA,
    HOLE,
    STATE_ZERO,
    Disk,
    Extent,
    Span,
    ZeroSpan,
)
from nbdtool.disks.file import FileDisk
from nbdtool.server import transmission
from tests.server import wire
from tests.server.harness import Harness, MemoryDisk, harness
from tests.server.wire import MIB

MODES = ["simple", "structured", "extended"]

pytestmark = pytest.mark.usefixtures("threads")


@pytest.fixture
def memory() -> Iterator[tuple[MemoryDisk, Harness]]:
    disk = MemoryDisk(MIB)
    disk.content[:] = os.urandom(4096) * 256
    with harness(disk) as running:
        yield disk, running


class Sparse(Disk):
    """Zeroes, of any size, with extents that a test gives."""

    description = "sparse"

    def __init__(self, size: int, extents: Callable[[int, int], Iterator[Extent]]) -> None:
        self.size = size
        self._extents = extents

    def read(self, offset: int, length: int) -> list[Span]:
        return [ZeroSpan(length)]

    def extents(self, offset: int, length: int) -> Iterator[Extent]:
        return self._extents(offset, length)


# Reads


@pytest.mark.parametrize("mode", MODES)
def test_reads_of_all_sizes(memory: tuple[MemoryDisk, Harness], mode: str) -> None:
    disk, running = memory
    client = running.client(mode=mode)
    for offset, length in [(0, 1), (1, 511), (0, 65536), (1, 65537), (MIB - 1, 1), (0, MIB)]:
        assert client.read(offset, length) == disk.content[offset : offset + length]


@pytest.mark.parametrize("mode", MODES)
def test_reads_of_a_file_with_holes(
    random_file: Callable[..., Path], tmp_path: Path, mode: str
) -> None:
    image = random_file(tmp_path / "image", 3 * MIB)
    os.truncate(image, 100 * MIB)
    content = image.read_bytes()
    with harness(FileDisk(str(image))) as running:
        client = running.client(mode=mode)
        for offset, length in [(0, 32 * MIB), (3 * MIB - 70_000, 140_000), (99 * MIB, MIB), (7, 9)]:
            assert client.read(offset, length) == content[offset : offset + length]


@pytest.mark.parametrize("mode", MODES)
def test_zeroes_between_data(mode: str) -> None:
    class Striped(Disk):
        size = 1 << 20

        def read(self, offset: int, length: int) -> list[Span]:
            spans: list[Span] = [b"data", ZeroSpan(5000), b"more", ZeroSpan(100), b"end."]
            return [*spans, ZeroSpan(length - 5112)]

    expected = b"data" + bytes(5000) + b"more" + bytes(100) + b"end." + bytes(20_000)
    with harness(Striped()) as running:
        client = running.client(mode=mode)
        answer = client.do(wire.READ, 4096, len(expected))
        assert answer.data == expected
        holes = [(4100, 5000), (9208, 20_000)]  # fewer zeroes than a block aren't worth a chunk
        assert answer.holes == ([] if mode == "simple" else holes)
        if mode != "simple":
            answer = client.do(wire.READ, 4096, len(expected), flags=wire.DF)
            assert answer.data == expected
            assert sorted(chunk.type for chunk in answer.chunks) in ([1], [0, 1])


def test_zeroes_cross_the_wire_as_one_hole() -> None:
    with harness(MemoryDisk(40 * MIB)) as running:
        answer = running.client().do(wire.READ, MIB, 32 * MIB)
        assert answer.holes == [(MIB, 32 * MIB)]
        assert [chunk.type for chunk in answer.chunks] == [2]


@pytest.mark.parametrize("mode", MODES)
def test_pipelined_requests_are_each_answered(
    memory: tuple[MemoryDisk, Harness], mode: str, threads: int
) -> None:
    disk, running = memory
    client = running.client(mode=mode)
    requests = [(n * 37 % MIB, n % 3000 + 1) for n in range(2000)]
    packed = [
        client.packed(wire.READ, min(offset, MIB - length), length, cookie=n)
        for n, (offset, length) in enumerate(requests)
    ]
    sender = threading.Thread(target=client.send, args=(b"".join(packed),))
    sender.start()
    cookies = []
    for _ in requests:
        answer = client.answer()
        cookies.append(answer.cookie)
        offset, length = requests[answer.cookie]
        offset = min(offset, MIB - length)
        assert answer.data == disk.content[offset : offset + length]
    sender.join()
    assert sorted(cookies) == list(range(2000))
    assert threads > 1 or cookies == list(range(2000))


def test_reads_that_came_together_are_announced_together(
    memory: tuple[MemoryDisk, Harness], threads: int
) -> None:
    disk, running = memory
    client = running.client()
    client.send(
        client.packed(wire.READ, 0, 100)
        + client.packed(wire.WRITE, 0, 28, client.packed(wire.READ, 5, 5))
        + client.packed(wire.READ, MIB, 100)
        + client.packed(wire.READ, MIB - 7, 7)
    )
    assert sorted(client.answer().error for _ in range(4)) == [0, 0, 0, wire.EINVAL]
    announced = ("prefetch", [(0, 100), (MIB - 7, 7)]) in disk.done
    assert announced == (threads == 1)


# What isn't allowed


@pytest.mark.parametrize("mode", MODES)
def test_requests_of_no_bytes_succeed(memory: tuple[MemoryDisk, Harness], mode: str) -> None:
    disk, running = memory
    client = running.client(mode=mode)
    for command in wire.READ, wire.WRITE, wire.TRIM, wire.CACHE, wire.WRITE_ZEROES:
        for offset in 0, 5, MIB:
            assert client.do(command, offset, 0).error == 0
    assert not disk.done
    if mode != "simple":
        assert client.do(wire.BLOCK_STATUS, 0, 0).error == wire.EINVAL
    assert client.read(0, 5) == disk.content[:5]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("offset", "length"), [(MIB, 1), (MIB - 1, 2), (0, MIB + 1), (1 << 63, 5), ((1 << 64) - 1, 1)]
)
def test_requests_beyond_the_end(
    memory: tuple[MemoryDisk, Harness], mode: str, offset: int, length: int
) -> None:
    disk, running = memory
    client = running.client(mode=mode)
    content = bytes(disk.content)
    for command in wire.READ, wire.WRITE, wire.TRIM, wire.CACHE, wire.WRITE_ZEROES:
        payload = bytes(length) if command == wire.WRITE else b""
        answer = client.do(command, offset, length, payload)
        full = command in (wire.WRITE, wire.WRITE_ZEROES)
        assert answer.error == (wire.ENOSPC if full else wire.EINVAL)
        if mode != "simple":
            assert "1048576" in answer.text
            assert answer.error_offset in (None, MIB)
            assert answer.error_offset is None or offset < MIB
    if mode != "simple":
        assert client.do(wire.BLOCK_STATUS, offset, length).error == wire.EINVAL
    assert disk.content == content
    assert client.read(0, 5) == content[:5]


@pytest.mark.parametrize("mode", MODES)
def test_unknown_commands_and_flags(memory: tuple[MemoryDisk, Harness], mode: str) -> None:
    disk, running = memory
    client = running.client(mode=mode)
    for command in 8, 9, 255, 65535:
        assert client.do(command, 0, 10).error == wire.EINVAL
    allowed = {
        wire.READ: wire.DF if mode != "simple" else 0,
        wire.WRITE: wire.PAYLOAD_LEN if mode == "extended" else 0,
        wire.FLUSH: 0,
        wire.TRIM: 0,
        wire.CACHE: 0,
        wire.WRITE_ZEROES: wire.NO_HOLE | wire.FAST_ZERO,
        wire.BLOCK_STATUS: wire.REQ_ONE,
    }
    if mode == "simple":
        del allowed[wire.BLOCK_STATUS]
    for command, bit in itertools.product(allowed, range(16)):
        length = 0 if command == wire.FLUSH else 10
        # What says that it brings a payload does bring one.
        payload = bytes(10) if command == wire.WRITE or (mode, bit) == ("extended", 5) else b""
        if payload:
            length = 10
        answer = client.do(command, 0, length, payload, 1 << bit)
        good = (allowed[command] | wire.FUA) >> bit & 1
        assert answer.error == (0 if good else wire.EINVAL), (command, bit)
    assert not [done for done in disk.done if done[0] == "trim"][1:]


def test_fast_zero_and_trim_only_where_the_export_has_them(tmp_path: Path) -> None:
    disk = MemoryDisk()
    disk.can_trim = disk.can_fast_zero = False
    with harness(disk) as running:
        client = running.client()
        assert client.do(wire.TRIM, 0, 512).error == wire.EINVAL
        assert client.do(wire.WRITE_ZEROES, 0, 512, flags=wire.FAST_ZERO).error == wire.EINVAL
        assert client.do(wire.WRITE_ZEROES, 0, 512).error == 0
        assert disk.done == [("zero", 0, 512, True, False)]


@pytest.mark.parametrize("mode", MODES)
def test_payloads_up_to_32_mib_and_no_more(mode: str) -> None:
    disk = MemoryDisk(100 * MIB)
    with harness(disk) as running:
        client = running.client(mode=mode)
        data = os.urandom(MIB) * 32
        assert client.write(MIB, data) == 0
        assert client.read(MIB, 32 * MIB) == data
        wrong = client.do(wire.READ, 0, 32 * MIB + 1)
        assert wrong.error == (wire.EINVAL if mode == "simple" else wire.EOVERFLOW)
        assert client.write(50 * MIB, data + b"x") == wire.EINVAL
        assert client.write(0, bytes(64 * MIB)) == wire.EINVAL
        assert not any(disk.content[50 * MIB :])
        assert client.read(MIB, MIB) == data[:MIB]


@pytest.mark.parametrize("mode", MODES)
def test_a_read_only_export(mode: str) -> None:
    disk = MemoryDisk()
    with harness(disk, read_only=True) as running:
        client = running.client(mode=mode)
        for command in wire.WRITE, wire.TRIM, wire.WRITE_ZEROES:
            payload = bytes(70_000) if command == wire.WRITE else b""
            answer = client.do(command, 0, 70_000, payload)
            assert answer.error == wire.EPERM
            assert mode == "simple" or "read-only" in answer.text
        assert client.do(wire.FLUSH).error == 0
        assert client.read(0, 10) == bytes(10)
    assert not [done for done in disk.done if done[0] in ("write", "zero", "trim")]


def test_a_minimum_block_size() -> None:
    disk = MemoryDisk(10 * 512 + 7)
    disk.block_size = (512, 4096, MIB)
    with harness(disk) as running:
        client = running.client()
        for offset, length in [(1, 512), (0, 511), (256, 256), (5120, 6)]:
            assert client.do(wire.READ, offset, length).error == wire.EINVAL
            assert client.write(offset, bytes(length)) == wire.EINVAL
            assert client.do(wire.WRITE_ZEROES, offset, length).error == wire.EINVAL
            assert client.do(wire.BLOCK_STATUS, offset, length).error == wire.EINVAL
        assert len(client.read(512, 1024)) == 1024
        assert len(client.read(0, disk.size)) == disk.size  # the tail can be had


def test_64_bit_lengths_under_extended_headers() -> None:
    size = (1 << 40) + 512

    class Huge(Sparse):
        writable = can_trim = can_fast_zero = True
        done: list[tuple[Any, ...]] = []  # noqa: RUF012

        def zero(self, offset: int, length: int, *, punch: bool, fast: bool) -> None:
            self.done.append((offset, length, punch, fast))

        def trim(self, offset: int, length: int) -> None:
            self.done.append((offset, length))

    disk = Huge(size, lambda offset, length: iter([Extent(length, HOLE)]))
    with harness(disk) as running:
        client = running.client(mode="extended")
        assert client.do(wire.BLOCK_STATUS, 0, size).extents == [(size, HOLE)]
        assert client.do(wire.WRITE_ZEROES, 512, size - 512).error == 0
        assert client.do(wire.TRIM, 0, size).error == 0
        assert client.do(wire.CACHE, 0, size).error == 0
        assert disk.done == [(512, size - 512, True, False), (0, size)]
        assert client.do(wire.READ, 0, size).error == wire.EOVERFLOW
        # Nobody sends 2^33 bytes to have them drained: the connection ends.
        client.send(client.packed(wire.WRITE, 0, 1 << 33))
        assert client.ended()


# Writes


@pytest.mark.parametrize("mode", MODES)
def test_writes_flushes_trims_and_zeroes(
    memory: tuple[MemoryDisk, Harness], mode: str, threads: int
) -> None:
    disk, running = memory
    client = running.client(mode=mode)
    assert client.write(5, b"hello") == 0
    assert client.write(MIB - 70_000, bytes(70_000), wire.FUA) == 0
    assert client.do(wire.WRITE_ZEROES, 100, 200).error == 0
    assert client.do(wire.WRITE_ZEROES, 301, 2, flags=wire.NO_HOLE | wire.FUA).error == 0
    assert client.do(wire.WRITE_ZEROES, 303, 4, flags=wire.FAST_ZERO).error == 0
    assert client.do(wire.TRIM, 512, 512, flags=wire.FUA).error == 0
    assert client.do(wire.FLUSH).error == 0
    assert client.do(wire.FLUSH, 0, 1).error == wire.EINVAL
    assert client.do(wire.FLUSH, 1, 0).error == wire.EINVAL
    assert client.do(wire.CACHE, 10, 20).error == 0
    assert [done for done in disk.done if done[0] != "prefetch"] == [
        ("write", 5, 5),
        ("write", MIB - 70_000, 70_000),
        ("flush",),
        ("zero", 100, 200, True, False),
        ("zero", 301, 2, False, False),
        ("flush",),
        ("zero", 303, 4, True, True),
        ("trim", 512, 512),
        ("flush",),
        ("flush",),
    ]
    assert (("prefetch", [(10, 20)]) in disk.done) == (threads == 1)
    assert client.read(5, 5) == b"hello"
    assert client.read(100, 200) == bytes(200)


def test_written_data_is_read_in_order_within_a_pipeline(
    memory: tuple[MemoryDisk, Harness],
) -> None:
    _, running = memory
    client = running.client()
    for size in 100, 65536, 65537, 300_000:
        data = os.urandom(size)
        client.send(client.packed(wire.WRITE, 0, size, data) + client.packed(wire.READ, 0, size))
        assert client.answer().error == 0
        assert client.answer().data == data


def test_zeroing_without_a_fast_way_writes_zeroes() -> None:
    class Plain(Disk):
        size = 5 * MIB
        writable = can_fast_zero = True

        def __init__(self) -> None:
            self.content = bytearray(b"x" * self.size)

        def write(self, offset: int, data: memoryview) -> None:
            self.content[offset : offset + len(data)] = data

    disk = Plain()
    with harness(disk) as running:
        client = running.client()
        answer = client.do(wire.WRITE_ZEROES, 100, 3 * MIB, flags=wire.FAST_ZERO)
        assert answer.error == wire.ENOTSUP
        assert disk.content[100:102] == b"xx"
        assert client.do(wire.WRITE_ZEROES, 100, 3 * MIB).error == 0
        assert disk.content == b"x" * 100 + bytes(3 * MIB) + b"x" * (2 * MIB - 100)


# Block status


def test_block_status_joins_neighbours_and_covers_the_range(
    memory: tuple[MemoryDisk, Harness],
) -> None:
    disk, running = memory
    disk.content[8192 : 8192 + 12288] = bytes(12288)
    client = running.client()
    assert client.do(wire.BLOCK_STATUS, 0, MIB).extents == [
        (8192, DATA),
        (12288, HOLE),
        (MIB - 20480, DATA),
    ]
    assert client.do(wire.BLOCK_STATUS, 9000, 100).extents == [(100, HOLE)]
    assert client.do(wire.BLOCK_STATUS, 8000, 1000).extents == [(192, DATA), (808, HOLE)]
    assert client.do(wire.BLOCK_STATUS, 8000, MIB // 2, flags=wire.REQ_ONE).extents == [(192, DATA)]


@pytest.mark.parametrize("length", [0xFFFFFFFF, 0xFFFFFFFF - 65536 + 7, 0xFFFFFE00, 1 << 31])
@pytest.mark.parametrize("offset", [0, 1, 1 << 30, (1 << 33) - 0xFFFFFFFF])
def test_block_status_of_almost_4_gib(tmp_path: Path, offset: int, length: int) -> None:
    image = tmp_path / "image"
    with image.open("wb") as file:
        file.truncate(1 << 33)
        os.pwrite(file.fileno(), b"x" * 4096, 3 << 30)
    with harness(FileDisk(str(image))) as running:
        extents = running.client().do(wire.BLOCK_STATUS, offset, length).extents
        assert sum(size for size, _ in extents) == length
        assert all(size for size, _ in extents)
        edges = sorted({offset, offset + length, 3 << 30, (3 << 30) + 4096})
        edges = [edge for edge in edges if offset <= edge <= offset + length]
        expected = [
            (end - start, DATA if start == 3 << 30 else HOLE)
            for start, end in zip(edges, edges[1:])
        ]
        assert extents == expected


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["structured", "extended"])
def test_block_status_is_cut_at_2_20_extents(mode: str) -> None:
    def extents(offset: int, length: int) -> Iterator[Extent]:
        for at in range(offset, offset + length, 512):
            yield Extent(512, [DATA, HOLE, STATE_ZERO][at // 512 % 3])

    with harness(Sparse(1 << 31, extents)) as running:
        client = running.client(mode=mode)
        got = client.do(wire.BLOCK_STATUS, 0, 1 << 31).extents
        assert len(got) == 1 << 20
        assert got[:3] == [(512, DATA), (512, HOLE), (512, STATE_ZERO)]
        assert client.read(0, 5) == bytes(5)


def test_block_status_reports_extents_of_bytes_without_much_memory() -> None:
    def extents(offset: int, length: int) -> Iterator[Extent]:
        return (Extent(1, n & 1) for n in range(length))

    with harness(Sparse(1 << 31, extents)) as running:
        assert len(running.client().do(wire.BLOCK_STATUS, 0, 1 << 31).extents) == 1 << 20


# The end


@pytest.mark.parametrize("mode", MODES)
def test_disc_after_requests_answers_them(memory: tuple[MemoryDisk, Harness], mode: str) -> None:
    disk, running = memory
    client = running.client(mode=mode)
    client.send(
        client.packed(wire.READ, 0, 100)
        + client.packed(wire.WRITE, 0, 5, b"12345", wire.FUA)
        + client.packed(wire.DISC)
    )
    assert client.answer().error == 0
    assert client.answer().error == 0
    assert client.ended()
    assert disk.content[:5] == b"12345"
    assert not running.warnings


@pytest.mark.parametrize("mode", MODES)
def test_a_wrong_magic_number_ends_the_connection(
    memory: tuple[MemoryDisk, Harness], mode: str
) -> None:
    _, running = memory
    client = running.client(mode=mode)
    wrong = bytearray(client.packed(wire.READ, 0, 10))
    wrong[0] ^= 1
    assert len(client.read(0, 10)) == 10
    client.send(bytes(wrong) + client.packed(wire.READ, 0, 10))
    assert client.ended()


def test_a_client_that_rests_is_kept(
    memory: tuple[MemoryDisk, Harness], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transmission, "PATIENCE", 0.1)
    disk, running = memory
    client = running.client()
    threading.Event().wait(0.5)
    assert client.read(0, 10) == disk.content[:10]


def test_requests_and_answers_of_a_slow_disk_do_not_wait_for_each_other() -> None:
    gate = threading.Event()

    class Slow(MemoryDisk):
        def read(self, offset: int, length: int) -> list[Span]:
            if offset == 0:
                assert gate.wait(20)
            return super().read(offset, length)

    with harness(Slow()) as running:
        waiting, other = running.client(), running.client()
        waiting.request(wire.READ, 0, 512)
        assert other.read(512, 512) == bytes(512)
        gate.set()
        assert waiting.answer().error == 0


def test_texts_of_the_errors_say_what_to_do_differently() -> None:
    with harness(MemoryDisk(1000), read_only=True) as running:
        client = running.client()
        assert client.do(wire.READ, 990, 11).text == "the export ends at byte 1000"
        assert client.do(77, 0, 1).text == "command 77 is unknown"
        assert "0x8000" in client.do(wire.READ, 0, 1, flags=0x8000).text
    with harness(MemoryDisk(64 * MIB)) as running:
        assert "33554432" in running.client().do(wire.READ, 0, 33 * MIB).text
