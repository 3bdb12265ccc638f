"""Comparing what was written with the source, and hashing it."""

from __future__ import annotations

import hashlib
import os
import random
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Callable

import pytest

from nbdtool import writer
from nbdtool.disk import FileSpan, Span, ZeroSpan, span_bytes
from nbdtool.errors import Error
from nbdtool.outputs import read_file
from tests.span_disk import SpanDisk, mixed_disk, span_file

MIB = 1 << 20
OLD = b"old content"


class Meddled(SpanDisk):
    """A disk that calls `between` when it is read a second time."""

    def __init__(self, spans: list[Span], between: Callable[[], None]) -> None:
        super().__init__(spans)
        self._between = between
        self._passes = 0

    def extents(self, offset: int, length: int) -> Iterator[Any]:
        self._passes += 1
        if self._passes == 2:
            self._between()
        return super().extents(offset, length)


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """Where a target goes, which is there already; nothing may be beside it afterwards."""
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "target").write_bytes(OLD)
    threads = set(threading.enumerate())
    yield folder
    assert [path.name for path in folder.iterdir()] == ["target"]
    assert set(threading.enumerate()) <= threads


@pytest.fixture
def device(tmp_path: Path, loop_device: Callable[..., Any]) -> Iterator[Path]:
    (tmp_path / "device").write_bytes(b"\xff" * (24 * MIB))
    with loop_device(tmp_path / "device") as device:
        yield device


def unnamed(folder: Path) -> str:
    """The way to the unnamed file that this process writes in a folder."""
    for fd in os.listdir("/proc/self/fd"):
        path = f"/proc/self/fd/{fd}"
        if os.path.exists(path) and os.readlink(path).startswith(f"{folder}/#"):
            return path
    raise AssertionError("there is none")


def spans(tmp_path: Path) -> list[Span]:
    """Memory in several pieces, a hole, 3 MiB of a file and 6 MiB more: 16 MiB."""
    generator = random.Random(5)
    file = span_file(tmp_path / "source", generator.randbytes(3 * MIB))
    memory: list[Span] = [generator.randbytes(65536) for _ in range(16)]
    end = generator.randbytes(6 * MIB)
    return [*memory, ZeroSpan(6 * MIB), FileSpan(file, 0, 3 * MIB), end]


# Hashing


@pytest.mark.parametrize("verify", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_digest_is_that_of_all_bytes(
    tmp_path: Path, folder: Path, device: Path, seed: int, verify: bool
) -> None:
    disk = mixed_disk(tmp_path, seed)
    expected = hashlib.sha256(disk.content()).hexdigest()
    for target in folder / "target", device:
        assert writer.write_disk(disk, str(target), verify=verify, digest=True) == expected
        assert target.read_bytes()[: disk.size] == disk.content()
    if not verify:
        assert writer.write_disk(disk, "/dev/null", digest=True) == expected


def test_what_is_read_of_a_file_stays_until_it_is_hashed(tmp_path: Path) -> None:
    data = random.Random(1).randbytes(9 * MIB + 1000)
    kept: list[memoryview] = []
    for piece in read_file(FileSpan(span_file(tmp_path / "source", data), 500, 9 * MIB), buffers=6):
        kept.append(piece)
        assert b"".join(kept[-6:]) == data[500:][: len(kept) * MIB][-6 * MIB :]
    assert len({id(piece.obj) for piece in kept}) == 6, "the memory isn't used again"


def test_digest_of_nothing(folder: Path) -> None:
    digest = writer.write_disk(SpanDisk([]), str(folder / "target"), verify=True, digest=True)
    assert digest == hashlib.sha256().hexdigest()


def test_digest_of_a_large_hole(folder: Path) -> None:
    size = (300 << 20) + 5
    disk = SpanDisk([b"a" * 4096, ZeroSpan(size), b"b" * 4096])
    expected = hashlib.sha256(b"a" * 4096)
    for _ in range(300):
        expected.update(bytes(MIB))
    expected.update(bytes(5) + b"b" * 4096)
    target = str(folder / "target")
    assert writer.write_disk(disk, target, digest=True) == expected.hexdigest()
    assert os.stat(target).st_blocks * 512 < MIB, "the hole was written"
    assert writer.hash_disk(disk, "name") == expected.hexdigest()
    assert sum(length for what, _, length in disk.asked if what == "read") == 4 * 4096


@pytest.mark.slow
def test_memory_is_bounded(
    command: list[str],
    run: Callable[..., str],
    folder: Path,
    random_file: Callable[..., Path],
    tmp_path: Path,
) -> None:
    image = random_file(tmp_path / "image", 128 * MIB)
    words = ["file", str(image), "--to-file", str(folder / "target"), "--sha256", "--verify"]
    script = (
        "import resource, subprocess, sys; subprocess.run(sys.argv[1:], check=True);"
        "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
    )  # a child has its parent's memory for a moment, and that counts: let it be a small one
    output = run(sys.executable, "-c", script, *command, *words)
    assert int(output.split()[-1]) < 70 << 10


# Comparing


def test_what_is_right_takes_the_place_of_the_old_file(tmp_path: Path, folder: Path) -> None:
    for seed in range(4):
        disk = mixed_disk(tmp_path, seed)
        writer.write_disk(disk, str(folder / "target"), verify=True)
        assert (folder / "target").read_bytes() == disk.content()


def test_device_is_compared_as_far_as_the_disk_goes(tmp_path: Path, device: Path) -> None:
    disk = SpanDisk(spans(tmp_path))
    writer.write_disk(disk, str(device), verify=True)
    assert device.read_bytes() == disk.content() + b"\xff" * (8 * MIB)


PLACES = [0, 100_000, MIB - 1, MIB, 4 * MIB, 7 * MIB + 70_000, 10 * MIB - 1, 12 * MIB, 16 * MIB - 1]


@pytest.mark.parametrize("place", PLACES)
def test_one_changed_byte_of_a_file(tmp_path: Path, folder: Path, place: int) -> None:
    def change() -> None:
        with open(unnamed(folder), "r+b") as file:
            file.seek(place)
            byte = file.read(1)[0]
            file.seek(place)
            file.write(bytes([byte ^ 1]))

    target = folder / "target"
    disk = Meddled(spans(tmp_path), change)
    with pytest.raises(Error, match=rf"^{target}: differs from the source at byte {place}$"):
        writer.write_disk(disk, str(target), verify=True, digest=place % 2 == 0)
    assert target.read_bytes() == OLD


@pytest.mark.parametrize("place", PLACES)
def test_one_changed_byte_of_a_medium(tmp_path: Path, device: Path, place: int) -> None:
    """The kernel has what was written to the device in memory, and must not answer with that."""

    def change() -> None:
        with (tmp_path / "device").open("r+b") as file:
            file.seek(place)
            byte = file.read(1)[0]
            file.seek(place)
            file.write(bytes([byte ^ 0x80]))

    disk = Meddled(spans(tmp_path), change)
    with pytest.raises(Error, match=rf"^{device}: differs from the source at byte {place}$"):
        writer.write_disk(disk, str(device), verify=True)


def test_device_is_really_read(tmp_path: Path, device: Path) -> None:
    def fetched() -> int:
        """Bytes that this process had fetched from devices."""
        return int(Path("/proc/self/io").read_text().split("read_bytes: ")[1].split()[0])

    disk = SpanDisk(spans(tmp_path))
    writer.write_disk(disk, str(device))
    before = fetched()
    writer.write_disk(disk, str(device), verify=True)
    assert fetched() - before >= disk.size


def test_truncated_target(tmp_path: Path, folder: Path) -> None:
    disk = Meddled(spans(tmp_path), lambda: os.truncate(unnamed(folder), 11 * MIB))
    with pytest.raises(Error, match=rf"target: ends early, at byte {11 * MIB}$"):
        writer.write_disk(disk, str(folder / "target"), verify=True)
    assert (folder / "target").read_bytes() == OLD


def test_target_truncated_in_a_hole(tmp_path: Path, folder: Path) -> None:
    disk = Meddled([b"a" * MIB, ZeroSpan(MIB)], lambda: os.truncate(unnamed(folder), MIB + 5))
    with pytest.raises(Error, match=rf"target: ends early, at byte {MIB + 5}$"):
        writer.write_disk(disk, str(folder / "target"), verify=True)
    assert (folder / "target").read_bytes() == OLD


@pytest.mark.parametrize("moment", [1, 2])
def test_interrupted(tmp_path: Path, folder: Path, moment: int) -> None:
    """Both passes; the folder and the threads are looked at by the fixture."""

    class Interrupted(SpanDisk):
        passes = 0

        def read(self, offset: int, length: int) -> list[Span]:
            self.passes += offset == 0
            if self.passes == moment and offset > 10 * MIB:
                raise KeyboardInterrupt
            return super().read(offset, length)

    disk = Interrupted(spans(tmp_path))
    with pytest.raises(KeyboardInterrupt):
        writer.write_disk(disk, str(folder / "target"), verify=moment == 2, digest=True)
    assert disk.passes == moment
    assert (folder / "target").read_bytes() == OLD


def test_source_that_is_another_the_second_time(tmp_path: Path, folder: Path) -> None:
    """Such as the disk of a guest that runs."""

    def write() -> None:
        data = bytearray(bytes(span_bytes(disk.spans[3])))
        data[77] ^= 1
        disk.spans[3] = bytes(data)

    disk = Meddled(spans(tmp_path), write)
    place = 3 * 65536 + 77
    with pytest.raises(Error, match=rf"target: differs from the source at byte {place}$"):
        writer.write_disk(disk, str(folder / "target"), verify=True, digest=True)
    assert (folder / "target").read_bytes() == OLD


def test_source_that_fails_the_second_time(tmp_path: Path, folder: Path) -> None:
    def change() -> None:
        with (tmp_path / "source").open("r+b") as file:
            file.write(b"changed")

    disk = Meddled(spans(tmp_path), change)
    with pytest.raises(Error, match=rf"^{tmp_path}/source: changed"):
        writer.write_disk(disk, str(folder / "target"), verify=True, digest=True)
    assert (folder / "target").read_bytes() == OLD
