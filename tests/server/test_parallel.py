"""Several threads for one client of a disk whose reads take long."""

from __future__ import annotations

import errno
import random
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from nbdtool.disk import Gone, Span
from tests.server import wire
from tests.server.harness import Harness, MemoryDisk, harness
from tests.server.wire import MIB, wait_for

THREADS = 4


class Slow(MemoryDisk):
    """A disk whose reads below `gated` wait for its gate; it counts those that are under way."""

    parallel = THREADS
    reads_on = True

    def __init__(self) -> None:
        super().__init__()
        self.content[:] = random.Random(1).randbytes(MIB)
        self.gate = threading.Event()
        self.gated = 0
        self.delay = 0.0
        self.reads: list[tuple[int, int]] = []
        self.failures: dict[int, Exception] = {}  # by the byte that can't be read
        self.now = self.most = 0
        self.readers: set[int] = set()
        self._lock = threading.Lock()

    def read(self, offset: int, length: int) -> list[Span]:
        with self._lock:
            self.reads.append((offset, length))
            self.readers.add(threading.get_ident())
            self.now += 1
            self.most = max(self.most, self.now)
        try:
            time.sleep(self.delay)
            if offset < self.gated:
                assert self.gate.wait(20)
            for place, failure in self.failures.items():
                if offset <= place < offset + length:
                    raise failure
            return super().read(offset, length)
        finally:
            with self._lock:
                self.now -= 1


@pytest.fixture
def slow() -> Slow:
    return Slow()


@pytest.fixture
def running(slow: Slow) -> Iterator[Harness]:
    before = threading.active_count()
    with harness(slow) as running:
        yield running
        slow.gate.set()
    wait_for(lambda: threading.active_count() == before, lambda: str(threading.enumerate()))


def asked(client: Any, *offsets: int, length: int = 512) -> bytes:
    return b"".join(client.packed(wire.READ, at, length, cookie=at) for at in offsets)


def test_what_is_quick_does_not_wait_for_what_is_slow(slow: Slow, running: Harness) -> None:
    client = running.client()
    slow.gated = 1
    client.send(asked(client, 0, 4096, 65536, 8192))
    assert {client.answer().cookie for _ in range(3)} == {4096, 65536, 8192}
    slow.gate.set()
    answer = client.answer()
    assert (answer.cookie, answer.data) == (0, slow.content[:512])


def test_as_many_at_once_as_the_disk_wants(slow: Slow, running: Harness) -> None:
    client = running.client()
    slow.gated = MIB
    client.send(asked(client, *range(0, MIB, 64 << 10)))
    wait_for(lambda: slow.now == THREADS, lambda: str(slow.reads))
    time.sleep(0.1)
    slow.gate.set()
    answers = [client.answer() for _ in range(16)]
    assert sorted(answer.cookie for answer in answers) == list(range(0, MIB, 64 << 10))
    assert slow.most == THREADS


def test_requests_that_come_while_others_are_read(slow: Slow, running: Harness) -> None:
    """They aren't left lying, even by a thread that used to be enough by itself."""
    client = running.client()
    slow.delay = 0.001
    for _ in range(40):
        assert client.read(700, 100) == slow.content[700:800]
    slow.gated = 10_000
    client.send(asked(client, 0))
    wait_for(lambda: slow.now == 1, str)
    client.send(asked(client, 20_000))
    time.sleep(0.2)
    slow.gate.set()
    assert {client.answer().cookie, client.answer().cookie} == {0, 20_000}
    slow.gate.clear()
    client.send(asked(client, 0))
    wait_for(lambda: slow.now == 1, str)
    client.send(asked(client, 20_000))
    assert client.answer().cookie == 20_000


def test_a_client_with_one_request_at_a_time_is_soon_served_by_one_thread(
    slow: Slow, running: Harness
) -> None:
    client = running.client()
    slow.delay = 0.001

    def read_on() -> bool:
        slow.readers.clear()
        for at in range(0, 100 * 4096, 4096):
            assert client.read(at, 512) == slow.content[at : at + 512]
        return len(slow.readers) == 1

    wait_for(read_on, lambda: str(slow.readers))


def test_threads_that_look_whether_more_has_come_at_once(slow: Slow, running: Harness) -> None:
    client = running.client()
    slow.delay = 0.0002
    generator = random.Random(3)
    for depth in (1, 4) * 10:
        for _ in range(20):  # so that one thread is enough, and then isn't
            assert len(client.read(0, 512)) == 512
        wanted = [generator.randrange(1, 2000) * 512 for _ in range(40)]
        for start in range(0, 40, depth):
            client.send(asked(client, *wanted[start : start + depth]))
            for _ in range(depth):
                answer = client.answer()
                assert answer.error == 0
                assert answer.data == slow.content[answer.cookie : answer.cookie + 512]


def test_neighbours_are_read_as_one(slow: Slow, running: Harness) -> None:
    client = running.client()
    client.send(asked(client, *range(0, MIB, 4096), length=4096))
    for _ in range(256):
        answer = client.answer()
        assert answer.data == slow.content[answer.cookie : answer.cookie + 4096]
    assert len(slow.reads) < 32
    assert max(length for _, length in slow.reads) <= 512 << 10


@pytest.mark.parametrize("mode", ["simple", "structured", "extended"])
def test_what_is_bad_fails_alone(slow: Slow, running: Harness, mode: str) -> None:
    client = running.client(mode=mode)
    slow.failures[10_000] = OSError(errno.EIO, "a bad sector")
    client.send(asked(client, *range(0, 65536, 4096), length=4096))
    errors = {answer.cookie: answer.error for answer in (client.answer() for _ in range(16))}
    assert errors == {at: wire.EIO * (at == 8192) for at in range(0, 65536, 4096)}
    assert set(running.warnings) == {"a bad sector"}


def test_what_is_gone_is_not_asked_for_again(slow: Slow, running: Harness) -> None:
    client = running.client()
    slow.failures[0] = Gone(errno.EIO, "there is no link")
    client.send(asked(client, *range(0, 65536, 4096), length=4096))
    errors = {answer.cookie: answer.error for answer in (client.answer() for _ in range(16))}
    asked_for = [length for offset, length in slow.reads if offset == 0]
    assert errors == {at: wire.EIO * (at < asked_for[0]) for at in range(0, 65536, 4096)}
    assert len(asked_for) == 1


def test_other_commands_between_reads(slow: Slow, running: Harness) -> None:
    client = running.client()
    slow.gated = 1
    client.send(asked(client, 0))
    wait_for(lambda: slow.now == 1, str)
    assert client.do(wire.BLOCK_STATUS, 0, MIB).error == 0
    assert client.write(100_000, b"hello") == 0
    assert client.do(wire.FLUSH).error == 0
    assert client.read(100_000, 5) == b"hello"
    assert client.do(wire.READ, 5000, MIB - 5000, flags=wire.DF).data == slow.content[5000:]
    assert client.do(77, 0, 1).error == wire.EINVAL
    slow.gate.set()
    assert client.answer().data == slow.content[:512]


def test_reads_under_way_are_answered_before_the_server_ends(slow: Slow, running: Harness) -> None:
    client = running.client()
    slow.gated = MIB
    client.send(asked(client, *range(0, 8 * 4096, 8192)))
    wait_for(lambda: slow.now == 4, str)
    threading.Timer(0.3, slow.gate.set).start()
    running.service.finish()
    assert {client.answer().cookie for _ in range(4)} == {0, 8192, 16384, 24576}
    assert client.ended()
    assert not running.warnings


def test_a_client_that_vanishes(slow: Slow, running: Harness) -> None:
    client = running.client()
    slow.gated = MIB
    client.send(asked(client, *range(0, MIB, 8192)))
    wait_for(lambda: slow.now == THREADS, str)
    client.sock.close()
    slow.gate.set()
    running.leave()
    assert len(slow.reads) < 64, "what nobody waits for is still read"
    assert not running.warnings


def test_reads_before_a_disc_are_answered(slow: Slow, running: Harness) -> None:
    client = running.client()
    client.send(asked(client, *range(0, MIB, 8192)) + client.packed(wire.DISC))
    assert len({client.answer().cookie for _ in range(128)}) == 128
    assert client.ended()


def test_the_threads_of_all_clients_are_bounded(
    slow: Slow, running: Harness, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nbdtool.server.budget._THREADS", 6)
    slow.gated = MIB
    clients = [running.client() for _ in range(3)]
    for client in clients:
        client.send(asked(client, *range(0, MIB, 8192)))
    wait_for(lambda: slow.now >= 6, str)
    time.sleep(0.2)
    assert slow.now <= 4 + 3 + 2  # when there were one, two and three
    slow.gate.set()
    for client in clients:
        assert len({client.answer().cookie for _ in range(128)}) == 128
