"""Disks that fail and files that change: what the client is told, and that it is never misled."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any, Callable

import pytest

from nbdtool.disk import (
    Disk,
    FileSpan,
    Span,
    SpanFile,
    Stamp,
)
from nbdtool.disks.file import FileDisk
from tests.server import wire
from tests.server.harness import harness
from tests.server.wire import MIB

MODES = ["simple", "structured", "extended"]


class Broken(Disk):
    """Everything raises what the test wants."""

    description = "broken"
    size = 64 * MIB
    writable = can_trim = can_fast_zero = True
    failure: Exception = OSError(errno.EIO, "the cable is out")

    def read(self, *args: Any, **kwargs: Any) -> Any:
        raise self.failure

    prefetch = write = zero = trim = flush = extents = read


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("number", "error"),
    [
        (errno.EPERM, wire.EPERM),
        (errno.EROFS, wire.EPERM),
        (errno.EIO, wire.EIO),
        (errno.ENOMEM, wire.ENOMEM),
        (errno.ENOSPC, wire.ENOSPC),
        (errno.EDQUOT, wire.ENOSPC),
        (errno.EFBIG, wire.ENOSPC),
        (errno.EBADF, wire.EINVAL),
        (errno.EOPNOTSUPP, wire.EINVAL),
        (errno.EOVERFLOW, wire.EINVAL),
        (errno.ESHUTDOWN, 108),
        (errno.ECONNRESET, wire.EINVAL),  # of the disk's connection, not the client's
        (errno.EPIPE, wire.EINVAL),
        (errno.EAGAIN, wire.EINVAL),
    ],
)
def test_failures_of_the_disk_reach_the_client(
    mode: str, number: int, error: int, threads: int
) -> None:
    disk = Broken()
    disk.failure = OSError(number, "what went wrong")
    with harness(disk) as running:
        client = running.client(mode=mode)
        for command in wire.READ, wire.WRITE, wire.TRIM, wire.WRITE_ZEROES, wire.CACHE, wire.FLUSH:
            if command == wire.CACHE and threads > 1:
                continue  # they don't ask the disk
            payload = bytes(100) if command == wire.WRITE else b""
            length = 0 if command == wire.FLUSH else 100
            answer = client.do(command, 0, length, payload)
            assert answer.error == error
            assert mode == "simple" or answer.text == "what went wrong"
        assert client.do(wire.READ, 0, 32 * MIB).error == error
        assert client.write(0, bytes(MIB)) == error
        answer = client.do(wire.WRITE_ZEROES, 0, 1, flags=wire.FAST_ZERO)
        assert answer.error == (wire.ENOTSUP if number == errno.EOPNOTSUPP else error)
        assert set(running.warnings) == {"what went wrong"}


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("mode", MODES)
def test_a_fault_of_ours_is_an_io_error_and_logged(mode: str) -> None:
    disk = Broken()
    disk.failure = ValueError("a secret of the program")
    with harness(disk) as running:
        client = running.client(mode=mode)
        answer = client.do(wire.READ, 0, 100)
        assert answer.error == wire.EIO
        assert "secret" not in answer.text
        assert client.write(0, bytes(MIB)) == wire.EIO
        assert [text for text in running.warnings if "a secret of the program" in text]
        running.warnings.clear()


@pytest.mark.usefixtures("threads")
def test_an_error_without_a_number() -> None:
    disk = Broken()
    disk.failure = OSError("only a text")
    with harness(disk) as running:
        answer = running.client().do(wire.READ, 0, 100)
        assert (answer.error, answer.text) == (wire.EIO, "only a text")


def test_long_and_strange_texts_are_cut_to_4096_bytes() -> None:
    disk = Broken()
    disk.failure = OSError(errno.EIO, "ü\udcff" * 5000)
    with harness(disk) as running:
        client = running.client()
        answer = client.do(wire.READ, 0, 100)
        assert answer.error == wire.EIO
        assert 4000 < len(answer.text.encode()) <= 4096
        assert client.do(wire.READ, 0, 100).error == wire.EIO


@pytest.mark.parametrize("length", [1000, 2 * MIB])
@pytest.mark.parametrize("mode", MODES)
def test_a_file_that_was_truncated(
    random_file: Callable[..., Path], tmp_path: Path, mode: str, length: int
) -> None:
    image = random_file(tmp_path / "image", 4 * MIB)
    start = image.read_bytes()[: MIB + 500]
    with harness(FileDisk(str(image))) as running:
        client = running.client(mode=mode)
        os.truncate(image, MIB + 500)
        if mode == "simple" and length > 65536:
            # The header was gone before: the connection has to end, and no byte is made up.
            client.request(wire.READ, MIB, length)
            with pytest.raises(EOFError) as end:
                client.answer()
            assert str(end.value).startswith("500 of")
        else:
            answer = client.do(wire.READ, MIB, length)
            assert answer.error == wire.EIO
            assert mode == "simple" or str(image) in answer.text
            assert client.read(0, MIB) == start[:MIB]
        assert running.client(mode=mode).read(0, MIB + 500) == start
        assert any(str(image) in text for text in running.warnings)


@pytest.mark.parametrize("mode", MODES)
def test_nothing_behind_a_failed_part_is_taken_for_good(
    random_file: Callable[..., Path], tmp_path: Path, mode: str
) -> None:
    first = FileDisk(str(random_file(tmp_path / "first", MIB)))
    second = FileDisk(str(random_file(tmp_path / "second", MIB)))

    class Both(Disk):
        size = 2 * MIB

        def read(self, offset: int, length: int) -> list[Span]:
            return first.read(0, MIB) + second.read(0, MIB)

    with harness(Both()) as running:
        client = running.client(mode=mode)
        os.truncate(tmp_path / "first", 1000)
        client.request(wire.READ, 0, 2 * MIB)
        if mode == "simple":
            with pytest.raises(EOFError) as end:
                client.answer()
            assert str(end.value).startswith("1000 of")
        else:
            answer = client.answer()
            assert answer.error == wire.EIO
            assert "first" in answer.text
        assert any("first" in text for text in running.warnings)


class Scanned(Disk):
    """A file which was looked at before, and has to be as it was."""

    def __init__(self, path: Path) -> None:
        fd = os.open(path, os.O_RDONLY)
        self._file = SpanFile(fd, str(path), Stamp.of(os.fstat(fd)))
        self.size = path.stat().st_size

    def read(self, offset: int, length: int) -> list[Span]:
        return [FileSpan(self._file, offset, length)]


@pytest.mark.parametrize("length", [1000, 2 * MIB])
@pytest.mark.parametrize("mode", MODES)
def test_a_file_that_has_changed_since_it_was_scanned(
    random_file: Callable[..., Path], tmp_path: Path, mode: str, length: int
) -> None:
    image = random_file(tmp_path / "image", 4 * MIB)
    with harness(Scanned(image)) as running:
        client = running.client(mode=mode)
        assert client.read(0, length) == image.read_bytes()[:length]
        with image.open("r+b") as file:
            file.write(b"other")
        for _ in range(2):
            answer = client.do(wire.READ, MIB, length)
            assert answer.error == wire.EIO
            assert mode == "simple" or "changed" in answer.text


@pytest.mark.parametrize("mode", MODES)
def test_a_file_that_changes_while_it_is_sent(
    random_file: Callable[..., Path], tmp_path: Path, mode: str
) -> None:
    image = random_file(tmp_path / "image", 32 * MIB)
    with harness(Scanned(image)) as running:
        client = running.client(mode=mode)
        client.request(wire.READ, 0, 32 * MIB)
        client.sock.recv(1, 2)  # MSG_PEEK: it has begun, and can't have sent all
        with image.open("r+b") as file:
            file.write(b"other")
        if mode == "simple":
            with pytest.raises(EOFError):
                client.answer()
                client.recv(1)
            return
        answer = client.answer()
        assert answer.error == wire.EIO
        assert "changed" in answer.text
        assert [chunk.type for chunk in answer.chunks[:1]] == [1]
        assert client.do(wire.READ, 0, 10).error == wire.EIO
