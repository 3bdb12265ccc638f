"""Read-ahead over a disk whose reads are slow, and counted."""

from __future__ import annotations

import errno
import random
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from nbdtool.disk import Disk, Span, ZeroSpan, read_bytes
from nbdtool.layers.readahead import ReadAhead

KIB = 1 << 10
MIB = 1 << 20
SIZE = 40 * MIB + 300


class Slow(Disk):
    """Random bytes and zeroes; a read takes `delay` seconds."""

    writable = True

    def __init__(self, delay: float = 0.0) -> None:
        self.size = SIZE
        self.content = bytearray(random.Random(1).randbytes(MIB) * 20 + bytes(20 * MIB + 300))
        self.delay = delay
        self.reads: list[tuple[int, int]] = []
        self.bad = -1  # a byte that can't be read

    def read(self, offset: int, length: int) -> list[Span]:
        self.reads.append((offset, length))
        if offset <= self.bad < offset + length:
            raise OSError(errno.EIO, f"byte {self.bad} is bad")
        data = bytes(self.content[offset : offset + length])
        time.sleep(self.delay)
        return [data] if any(data[:64]) else [ZeroSpan(length)] if not any(data) else [data]

    def write(self, offset: int, data: memoryview) -> None:
        self.content[offset : offset + len(data)] = data


@pytest.fixture
def slow() -> Slow:
    return Slow()


@pytest.fixture
def disk(slow: Slow) -> Iterator[ReadAhead]:
    made = ReadAhead(slow, workers=4, piece=256 * KIB)
    yield made
    made.close()


@pytest.mark.parametrize("length", [512, 4096, 65536, 300_000, 3 * MIB])
def test_sequential_reads(length: int, disk: ReadAhead, slow: Slow) -> None:
    for offset in range(0, SIZE, length):
        count = min(length, SIZE - offset)
        if offset > 2 * MIB and length < 4096:
            break
        assert read_bytes(disk, offset, count) == slow.content[offset : offset + count]


def test_a_sequential_reader_is_not_kept_waiting(disk: ReadAhead, slow: Slow) -> None:
    slow.delay = 0.01
    began = time.monotonic()
    for offset in range(0, 16 * MIB, 64 * KIB):
        disk.read(offset, 64 * KIB)
    assert len(slow.reads) <= 2 + 16 * 4 + 8  # the start, pieces of 256 KiB, and what lies ahead
    assert len(disk._pieces) <= 8  # what was passed isn't kept
    assert time.monotonic() - began < 256 * 0.01


def small_reads(slow: Slow) -> int:
    return sum(length == 4096 for _, length in slow.reads)


def test_little_is_read_ahead_of_a_reader_that_stops_soon(disk: ReadAhead, slow: Slow) -> None:
    for offset in range(0, 5 * 4096, 4096):
        disk.read(offset, 4096)
    disk.close()  # when all is read
    assert sum(length for _, length in slow.reads) <= 2 * 4096 + 4 * 256 * KIB


def test_a_reader_that_was_away_reads_pieces_again(
    disk: ReadAhead, slow: Slow, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nbdtool.layers.readahead._FRESH", 0.1)
    for offset in range(0, 20 * 4096, 4096):
        if offset == 10 * 4096:
            slow.content[: 20 * MIB] = slow.content[: 20 * MIB][::-1]
            time.sleep(0.2)
        assert read_bytes(disk, offset, 4096) == slow.content[offset : offset + 4096]
    assert small_reads(slow) == 2


def test_a_reader_behind_another_one(disk: ReadAhead, slow: Slow) -> None:
    readers = [0, 0]
    for _ in range(50):
        for number, steps in enumerate((8, 3)):
            for _ in range(steps):
                at = readers[number]
                assert read_bytes(disk, at, 4096) == slow.content[at : at + 4096]
                readers[number] += 4096
    assert small_reads(slow) <= 4


def test_random_reads_read_nothing_else(disk: ReadAhead, slow: Slow) -> None:
    generator = random.Random(2)
    wanted = [(generator.randrange(SIZE - 4096), 4096) for _ in range(200)]
    for offset, length in wanted:
        assert read_bytes(disk, offset, length) == slow.content[offset : offset + length]
    assert slow.reads == wanted


@pytest.mark.parametrize("length", [64 * KIB, 256 * KIB, 400 * KIB])
def test_nothing_is_read_twice_for_threads_that_follow_one_another(
    length: int, disk: ReadAhead, slow: Slow
) -> None:
    """Who has several reads under way needs no other to be ahead of him."""
    slow.delay = 0.002
    wanted = iter(range(0, 20 * MIB - length, length))
    turn = threading.Lock()

    def read_on() -> None:
        while True:
            with turn:
                offset = next(wanted, -1)
            if offset < 0:
                return
            assert read_bytes(disk, offset, length) == slow.content[offset : offset + length]

    with ThreadPoolExecutor(6) as pool:
        for done in [pool.submit(read_on) for _ in range(6)]:
            done.result()
    disk.close()
    assert sum(count for _, count in slow.reads) < 20 * MIB * 1.1


def test_what_is_announced_is_read_side_by_side(disk: ReadAhead, slow: Slow) -> None:
    slow.delay = 0.05
    batch = [(n * MIB, 4096) for n in range(4)] + [(9 * MIB + n * 4096, 4096) for n in range(40)]
    batch.append((20 * MIB - 3 * KIB, 2 * MIB))
    disk.prefetch(batch)
    for offset, length in batch:
        assert read_bytes(disk, offset, length) == slow.content[offset : offset + length]
    assert len(slow.reads) == 4 + 1 + 8  # neighbours as one, what is large in pieces


def test_what_is_announced_is_read_a_little_ahead(disk: ReadAhead, slow: Slow) -> None:
    batch = [(n * 100 * KIB, 4096) for n in range(100)]
    disk.prefetch(batch)
    for number, (offset, length) in enumerate(batch):
        time.sleep(0.002)
        assert read_bytes(disk, offset, length) == slow.content[offset : offset + length]
        assert len(slow.reads) <= number + 1 + 8  # two for each worker
    assert sorted(slow.reads) == batch


def test_threads(disk: ReadAhead, slow: Slow) -> None:
    def work(seed: int) -> None:
        generator = random.Random(seed)
        at = generator.randrange(SIZE // 2)
        for step in range(150):
            if step % 50 == 0:
                batch = [(generator.randrange(SIZE - 9000), 9000) for _ in range(10)]
                disk.prefetch(batch)
                for offset, length in batch:
                    assert (
                        read_bytes(disk, offset, length) == slow.content[offset : offset + length]
                    )
            assert read_bytes(disk, at, 30_000) == slow.content[at : at + 30_000]
            at += 30_000

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(work, range(6)))


def test_what_is_bad_fails_alone(disk: ReadAhead, slow: Slow) -> None:
    slow.bad = 3 * MIB
    failures = []
    for offset in range(0, 5 * MIB, 64 * KIB):
        try:
            assert read_bytes(disk, offset, 64 * KIB) == slow.content[offset : offset + 64 * KIB]
        except OSError as exc:
            assert str(exc.strerror) == f"byte {3 * MIB} is bad"
            failures.append(offset)
    assert failures == [3 * MIB]
    disk.prefetch([(3 * MIB - 4096, 4096), (3 * MIB, 4096)])
    with pytest.raises(OSError, match="is bad"):
        disk.read(3 * MIB, 4096)


def test_writes_are_read_back(disk: ReadAhead, slow: Slow) -> None:
    for offset in range(0, MIB, 64 * KIB):
        disk.read(offset, 64 * KIB)
    disk.prefetch([(2 * MIB, 4096), (8 * MIB, 4096)])
    for offset in MIB + 5, 2 * MIB + 5:
        disk.write(offset, memoryview(b"new"))
        assert read_bytes(disk, offset - 5, 4096)[5:8] == b"new"
    assert read_bytes(disk, 2 * MIB, 4096)[5:8] == b"new"


def test_what_is_kept_is_bounded(disk: ReadAhead) -> None:
    for start in range(12):
        for step in range(6):
            disk.read(start * 3 * MIB + step * 64 * KIB, 64 * KIB)
    disk.prefetch([(n * 64 * KIB, 64 * KIB) for n in range(600)])
    assert len(disk._pieces) <= 128
    assert disk._announced._bytes <= 32 * MIB + 256 * KIB  # and the neighbours of a range


def test_a_range_that_is_announced_twice(disk: ReadAhead, slow: Slow) -> None:
    disk.prefetch([(0, 4096), (0, 4096), (4096, 4096)])
    for _ in range(2):
        assert read_bytes(disk, 0, 4096) == slow.content[:4096]
    assert read_bytes(disk, 4096, 4096) == slow.content[4096:8192]
    assert disk._announced._bytes == 0


def test_close_ends_the_workers(slow: Slow) -> None:
    before = threading.active_count()
    made = ReadAhead(slow, 3)
    assert threading.active_count() == before + 3
    made.close()
    assert threading.active_count() == before
