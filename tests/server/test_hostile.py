"""Clients that lie, stall, flood and vanish: the server lives on, and so do its other clients."""

from __future__ import annotations

import os
import random
import struct
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Callable

import pytest

from nbdtool.server import transmission
from tests.server import wire
from tests.server.harness import Harness, MemoryDisk, harness
from tests.server.wire import MIB, Client, context_request, counted, info_request, packed_option

HELLO = struct.pack(">I", 3)

pytestmark = pytest.mark.usefixtures("threads")


@pytest.fixture
def running() -> Iterator[Harness]:
    """A server with a disk in memory, which at the end still serves."""
    disk = MemoryDisk(4 * MIB)
    disk.content[:] = os.urandom(MIB) * 4
    with harness(disk, timeout=10) as running:
        yield running
        assert running.client().read(0, 10) == disk.content[:10]


# In the handshake


@pytest.mark.parametrize("number", [1, 2, 3, 5, 6, 7, 8, 9, 10, 11, 99])
@pytest.mark.parametrize("length", [0x80000000, 0xFFFFFFFF])
def test_options_that_claim_gigabytes_end_the_connection(
    running: Harness, number: int, length: int
) -> None:
    client = running.connect().hello()
    client.option(number, b"", length)
    assert client.ended()


@pytest.mark.parametrize("length", [0, 1, 255, 256, 257, 4096])
def test_export_names_up_to_4096_bytes(running: Harness, length: int) -> None:
    client = running.connect().hello()
    assert client.outcome(wire.INFO, info_request("n" * length)) == wire.ACK
    client.option(wire.EXPORT_NAME, b"n" * length)
    assert len(client.recv(10)) == 10


@pytest.mark.parametrize("length", [4097, 65536, 1_000_000])
def test_longer_export_names_are_refused(running: Harness, length: int) -> None:
    client = running.connect().hello()
    assert client.outcome(wire.INFO, info_request("n" * length)) in (wire.INVALID, wire.TOO_BIG)
    client.option(wire.EXPORT_NAME, b"n" * 4097)
    assert client.ended()


@pytest.mark.parametrize("length", [5, 6, 0x7FFFFFFF, 0xFFFFFFFF])
def test_names_that_claim_to_be_longer_than_their_option(running: Harness, length: int) -> None:
    client = running.connect().hello()
    for number in wire.INFO, wire.GO:
        data = struct.pack(">I", length) + b"name"
        assert client.outcome(number, data) == wire.INVALID
    assert client.outcome(wire.STRUCTURED_REPLY) == wire.ACK
    for number in wire.LIST_META_CONTEXT, wire.SET_META_CONTEXT:
        assert client.outcome(number, struct.pack(">I", length) + b"name") == wire.INVALID
        query = counted("") + struct.pack(">II", 1, length) + b"base"
        assert client.outcome(number, query) == wire.INVALID


def test_65535_information_requests(running: Harness) -> None:
    client = running.connect().hello()
    assert client.outcome(wire.INFO, info_request("", (0,) * 30_000)) == wire.ACK
    assert client.outcome(wire.INFO, info_request("", (0,) * 65535)) == wire.TOO_BIG
    assert client.outcome(wire.INFO, counted("") + b"\xff\xff" + bytes(10)) == wire.INVALID


def test_thousands_of_context_queries(running: Harness) -> None:
    client = running.connect().hello()
    assert client.outcome(wire.STRUCTURED_REPLY) == wire.ACK
    queries = ["base:allocation"] * 3000
    for number in wire.LIST_META_CONTEXT, wire.SET_META_CONTEXT:
        replies = client.ask(number, context_request("", *queries))
        assert [type_ for type_, _ in replies] == [wire.META_CONTEXT, wire.ACK]
        many = struct.pack(">I", 0xFFFFFFFF) + counted("") * 100
        assert client.outcome(number, counted("") + many) == wire.INVALID


def test_a_client_that_negotiates_for_ever_is_dropped(running: Harness) -> None:
    client = running.connect().hello()
    with pytest.raises((EOFError, BrokenPipeError, ConnectionResetError)):
        for _ in range(100_000):
            client.outcome(wire.LIST)


HANDSHAKE = (
    HELLO
    + packed_option(wire.STRUCTURED_REPLY)
    + packed_option(wire.SET_META_CONTEXT, context_request("", "base:allocation"))
    + packed_option(wire.INFO, info_request("name", (1, 2, 3)))
    + packed_option(wire.GO, info_request("name", (3,)))
    + struct.pack(">IHHQQI", 0x25609513, 0, wire.READ, 1, 0, 4096)
)


@pytest.mark.parametrize("greeted", [True, False])
def test_resets_at_each_byte(running: Harness, greeted: bool) -> None:
    for length in range(len(HANDSHAKE) + 1):
        client = running.connect(tcp=True)
        if greeted:
            client.recv(18)
        client.send(HANDSHAKE[:length])
        client.reset()
    for thread in running.threads:
        thread.join(10)
        assert not thread.is_alive()
    assert not running.warnings


def test_ends_at_each_byte(running: Harness) -> None:
    for length in range(len(HANDSHAKE) + 1):
        client = running.connect()
        client.send(HANDSHAKE[:length])
        client.close()
    assert not running.warnings


def test_garbage(running: Harness) -> None:
    generator = random.Random(1)
    for _ in range(100):
        client = running.connect()
        try:
            for start in [HELLO, HELLO + b"IHAVEOPT", HANDSHAKE[:-28], HANDSHAKE[:-24]]:
                if generator.random() < 0.5:
                    client.send(start)
            client.send(generator.randbytes(generator.randrange(1, 5000)))
        except (BrokenPipeError, ConnectionResetError):
            pass
        client.close()


def test_the_handshake_has_one_deadline_however_slowly_it_drips() -> None:
    with harness(MemoryDisk(), timeout=0.6) as running:
        silent, dripping, loitering = (running.connect() for _ in range(3))
        loitering.hello()
        drops = iter(HELLO + packed_option(77, bytes(4000)))
        for talk in (
            lambda: dripping.send(bytes([next(drops)])),
            lambda: loitering.option(wire.LIST),
        ):
            with pytest.raises((BrokenPipeError, ConnectionResetError)):
                for _ in range(300):
                    talk()
                    time.sleep(0.02)
        for client in silent, dripping, loitering:
            with pytest.raises((EOFError, ConnectionResetError)):
                client.recv(1 << 20)


def test_names_from_clients_are_quoted_in_the_log(
    serve: Callable[..., Any], random_file: Callable[..., Path], tmp_path: Path
) -> None:
    image = random_file(tmp_path / "image", MIB)
    with serve("-v", "file", image, "-r") as server:
        client = Client(server.connect()).hello()
        name = "\x1b[31mred\nnbdtool: error: fake\x07\u202e"
        assert client.outcome(wire.INFO, info_request(name)) == wire.ACK
        client.go(name)
        client.read(0, 1)
        client.send(client.packed(wire.DISC))
        assert client.ended()
        deadline = time.monotonic() + 10
        while "disconnected" not in server.log():
            assert time.monotonic() < deadline
        assert not set("\x1b\x07\u202e") & set(server.log())
        assert "\nnbdtool: error: fake" not in server.log()


# In transmission


@pytest.mark.slow
def test_10000_requests_from_a_client_that_reads_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transmission, "PATIENCE", 0.5)
    disk = MemoryDisk()
    disk.content[:] = os.urandom(MIB)
    with harness(disk) as running:
        client = running.client()
        with pytest.raises((BrokenPipeError, ConnectionResetError, TimeoutError)):
            client.sock.settimeout(10)
            client.send(b"".join(client.packed(wire.READ, 0, 65536) for _ in range(10_000)))
            for _ in range(100):  # it may all have fit into the kernel's buffers
                client.send(client.packed(wire.READ, 0, 1))
                time.sleep(0.1)
        running.threads[0].join(10)
        assert not running.threads[0].is_alive()
        assert running.client().read(0, MIB) == disk.content


@pytest.mark.parametrize("length", [1, 100, 65536, 65537, 2 * MIB])
@pytest.mark.parametrize("mode", ["simple", "structured", "extended"])
def test_a_write_that_breaks_off_writes_nothing(mode: str, length: int) -> None:
    disk = MemoryDisk(4 * MIB)
    with harness(disk) as running:
        for sent in {0, 1, length // 2, length - 1} - {length}:
            client = running.client(mode=mode)
            client.request(wire.WRITE, 0, length, b"x" * sent)
            client.close()
        running.leave()
        assert not disk.done
        assert not any(disk.content)


@pytest.mark.slow
def test_a_payload_without_progress_ends_the_connection_and_frees_its_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(transmission, "PATIENCE", 2)
    disk = MemoryDisk(32 * MIB)
    with harness(disk) as running:
        stuck = [running.client() for _ in range(3)]
        for client in stuck:
            client.request(wire.WRITE, 0, 32 * MIB, bytes(1000))
        time.sleep(0.2)
        honest = running.client()
        assert honest.read(0, 65536) == bytes(65536)  # small ones don't wait for memory
        deadline = threading.Timer(30, honest.sock.shutdown, (2,))
        deadline.start()
        assert honest.write(0, b"x" * 32 * MIB) == 0
        deadline.cancel()
        for client in stuck:
            assert client.ended()
        assert disk.done == [("write", 0, 32 * MIB)]


@pytest.mark.slow
def test_many_small_chunks_of_a_payload_are_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transmission, "PATIENCE", 1)
    with harness(MemoryDisk()) as running:
        client = running.client()
        client.request(wire.WRITE, 0, 10, b"0")
        for _ in range(9):
            time.sleep(0.2)
            client.send(b"0")
        assert client.answer().error == 0


def test_clients_that_vanish_while_they_are_answered(running: Harness) -> None:
    for count in range(40):
        client = running.client()
        client.send(b"".join(client.packed(wire.READ, 0, 4 * MIB) for _ in range(3)))
        if count % 2:
            client.recv(100_000 * count)
        client.close()
    running.leave()
    assert not running.warnings


# A whole server


def status_of(pid: int, name: str) -> int:
    """A number of /proc/PID/status."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1])
    raise KeyError(name)


@pytest.mark.slow
def test_silent_clients_are_capped_and_time_out(
    serve: Callable[..., Any],
    run: Callable[..., str],
    random_file: Callable[..., Path],
    tmp_path: Path,
) -> None:
    image = random_file(tmp_path / "image", MIB)
    options = ("--timeout", "1", "--max-connections", "100")
    with serve("file", image, "-r", *options, tcp=True) as server:
        descriptors = sorted(os.listdir(f"/proc/{server.process.pid}/fd"))
        served = Client(server.connect()).hello()
        served.go()
        silent = [server.connect() for _ in range(500)]
        while status_of(server.process.pid, "Threads") < 101:
            time.sleep(0.01)
        time.sleep(0.3)
        assert status_of(server.process.pid, "Threads") <= 101
        assert run("nbdinfo", "--size", server.uri, timeout=60) == f"{MIB}\n"
        assert served.read(0, MIB) == image.read_bytes()
        for client in silent:
            client.close()
        served.close()
        deadline = time.monotonic() + 20
        while status_of(server.process.pid, "Threads") > 1:
            assert time.monotonic() < deadline, "threads stay"
            time.sleep(0.1)
        assert sorted(os.listdir(f"/proc/{server.process.pid}/fd")) == descriptors


@pytest.mark.slow
def test_memory_stays_bounded(
    serve: Callable[..., Any], random_file: Callable[..., Path], tmp_path: Path
) -> None:
    image = random_file(tmp_path / "image", 64 * MIB)
    with serve("file", image) as server:
        before = status_of(server.process.pid, "VmRSS")
        stuck = []

        def stick(count: int, then: Callable[[Client], None]) -> None:
            clients = [Client(server.connect()).hello() for _ in range(count)]
            for client in clients:
                client.go()
            threads = [threading.Thread(target=then, args=(client,)) for client in clients]
            for thread in threads:
                thread.start()
            stuck.extend(clients)
            for thread in threads:
                thread.join()

        def send(client: Client, data: bytes) -> None:
            client.sock.settimeout(1.5)
            try:
                client.sock.sendall(data)
            except TimeoutError:
                pass  # the server waits: for memory, or for us to read

        def keep(client: Client) -> None:
            assert client.write(0, bytes(MIB)) == 0

        def half(client: Client) -> None:
            send(client, client.packed(wire.WRITE, 0, 32 * MIB) + bytes(20 * MIB))

        def flood(client: Client) -> None:
            send(client, b"".join(client.packed(wire.READ, 0, 65536) for _ in range(2000)))

        def status(client: Client) -> None:
            send(client, b"".join(client.packed(wire.BLOCK_STATUS, 0, 64 * MIB) for _ in range(99)))

        stick(50, keep)
        stick(10, half)
        stick(100, flood)
        stick(20, status)
        grown = (status_of(server.process.pid, "VmHWM") - before) // 1024
        assert grown < 256 + 24, f"{grown} MiB"  # threads and their bookkeeping are in it
        honest = Client(server.connect()).hello()
        honest.go()
        assert len(honest.read(0, 65536)) == 65536
        for client in [*stuck, honest]:
            client.close()


@pytest.mark.slow
def test_200_connections_with_mixed_requests_against_a_model(
    serve: Callable[..., Any], tmp_path: Path
) -> None:
    clients, block, rounds = 200, 4096, 25
    image, stripe = tmp_path / "image", 200 * 4096
    size = stripe * 20
    with image.open("wb") as file:
        file.truncate(size)
    model = bytearray(size)
    failures: list[BaseException] = []

    def work(number: int, client: Client) -> None:
        generator = random.Random(number)
        try:
            for turn in range(rounds):
                start = generator.randrange(20) * stripe + number * block
                at = start + generator.randrange(block)
                length = generator.randrange(1, start + block - at + 1)
                if turn % 5 == 4:
                    at, length = generator.randrange(size - MIB), generator.randrange(1, MIB)
                    client.read(at, length)  # others' blocks: no more than that it works
                    continue
                data = generator.randbytes(length)
                action = generator.randrange(4)
                if action == 0:
                    data = bytes(length)
                    flags = generator.choice([0, wire.NO_HOLE, wire.FUA])
                    assert client.do(wire.WRITE_ZEROES, at, length, flags=flags).error == 0
                elif action == 1:
                    reading = client.packed(wire.READ, start, block)
                    client.send(client.packed(wire.WRITE, at, length, data) + reading)
                    assert client.answer().error == 0
                    model[at : at + length] = data
                    assert client.answer().data == model[start : start + block]
                else:
                    assert client.write(at, data) == 0
                model[at : at + length] = data
                assert client.read(start, block) == model[start : start + block]
            client.send(client.packed(wire.FLUSH) + client.packed(wire.DISC))
            assert client.answer().error == 0
            assert client.ended()
        except BaseException as exc:
            failures.append(exc)
        client.close()

    with serve("file", image) as server:
        threads = []
        for number in range(clients):
            client = Client(server.connect()).hello()
            client.go(mode=["simple", "structured", "extended"][number % 3])
            threads.append(threading.Thread(target=work, args=(number, client)))
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not failures
    assert image.read_bytes() == model
