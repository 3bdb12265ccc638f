"""Writable exports from the wire to the file: what was promised to be there is there."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any, Callable

import pytest

from nbdtool.disks.file import FileDisk
from tests.server import wire
from tests.server.harness import harness
from tests.server.wire import MIB, Client

GIB = 1 << 30


@pytest.fixture
def image(tmp_path: Path, random_file: Callable[..., Path]) -> Path:
    return random_file(tmp_path / "image", 2 * MIB)


@pytest.mark.parametrize("mode", ["simple", "structured", "extended"])
def test_flush_and_fua_reach_the_disk_before_they_are_answered(
    image: Path, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = FileDisk(str(image), writable=True)
    synced: list[bytes] = []
    monkeypatch.setattr(os, "fdatasync", lambda fd: synced.append(image.read_bytes()[:4]))
    with harness(disk) as running:
        client, other = running.client(mode=mode), running.client(mode=mode)
        assert client.write(0, b"1111") == 0
        assert synced == []
        assert other.do(wire.FLUSH).error == 0  # multi-conn: it holds for all connections
        assert synced == [b"1111"]
        assert client.write(0, b"2222", wire.FUA) == 0
        assert synced == [b"1111", b"2222"]
        assert client.write(0, b"3" * 100_000, wire.FUA) == 0
        assert synced[2:] == [b"3333"]
        assert client.do(wire.WRITE_ZEROES, 0, 4, flags=wire.FUA).error == 0
        assert synced[3:] == [bytes(4)]
        assert client.do(wire.TRIM, 4096, 4096, flags=wire.FUA).error == 0
        assert len(synced) == 5
        assert client.read(0, 4) == bytes(4)
        assert len(synced) == 5


def test_a_failure_of_the_sync_is_told_each_time(
    image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(fd: int) -> None:
        raise OSError(5, "Input/output error")

    disk = FileDisk(str(image), writable=True)
    monkeypatch.setattr(os, "fdatasync", broken)
    with harness(disk) as running:
        client = running.client()
        for _ in range(2):
            assert client.do(wire.FLUSH).error == wire.EIO
            assert client.write(0, b"data", wire.FUA) == wire.EIO
        assert client.write(0, b"data") == 0


@pytest.mark.parametrize("options", [[], ["--cow"]], ids=["file", "cow"])
@pytest.mark.parametrize("length", [128 * MIB, 2 * GIB, 2 * GIB + 12345])
@pytest.mark.parametrize("flags", [0, wire.NO_HOLE])
def test_zeroing_gibibytes_leaves_nothing_of_the_old(
    serve: Callable[..., Any], tmp_path: Path, options: list[str], length: int, flags: int
) -> None:
    if flags and length > GIB:
        length = 200 * MIB  # it may have to be written
    image, start, size = tmp_path / "image", 777, 2 * GIB + 64 * MIB
    marks = [*range(0, size - 4096, 61 * MIB), start + length - 100, start + length, size - 8]
    with image.open("wb") as file:
        file.truncate(size)
        for mark in marks:
            os.pwrite(file.fileno(), b"old data", mark)
    with serve("file", image, *options) as server:
        client = Client(server.connect()).hello()
        client.go()
        answer = client.do(wire.WRITE_ZEROES, start, length, flags=flags)
        assert answer.error == 0, answer.text
        for mark in marks:
            expected = bytes(8) if start <= mark < start + length else b"old data"
            if mark + 8 > start + length > mark:
                continue
            assert client.read(mark, 8) == expected, mark
        assert client.read(start - 10, 20)[10:] == bytes(10)
        extents: list[tuple[int, int]] = []
        at = 0
        while at < size:
            got = client.do(wire.BLOCK_STATUS, at, size - at).extents
            extents += got
            at += sum(extent for extent, _ in got)
        assert at == size
    with image.open("rb") as file:
        assert os.pread(file.fileno(), 8, 61 * MIB) == (b"old data" if options else bytes(8))


def test_what_was_written_is_there_after_a_kill(serve: Callable[..., Any], image: Path) -> None:
    """Nothing is kept back in the server."""
    before = image.read_bytes()
    with serve("file", image, status=None) as server:
        client = Client(server.connect()).hello()
        client.go()
        assert client.write(12345, b"x" * 100_000) == 0
        assert client.write(0, b"y") == 0
        server.process.send_signal(signal.SIGKILL)
        server.process.wait()
    assert image.read_bytes() == b"y" + before[1:12345] + b"x" * 100_000 + before[112345:]
