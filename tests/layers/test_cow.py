"""The copy-on-write layer against a model, alone and with many threads."""

from __future__ import annotations

import argparse
import errno
import os
import random
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Callable

import pytest

from nbdtool.disk import HOLE, Disk, Span, ZeroSpan, read_bytes
from nbdtool.errors import Error, UsageError
from nbdtool.layers import cow
from nbdtool.layers.cow import CowDisk
from tests.span_disk import SpanDisk, mixed_disk

KIB, MIB = 1 << 10, 1 << 20


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """TMPDIR, in which nothing may ever be seen."""
    directory = tmp_path / "temporary"
    directory.mkdir()
    monkeypatch.setenv("TMPDIR", str(directory))
    yield directory
    if directory.exists():
        assert os.listdir(directory) == []


def content(disk: Disk) -> bytes:
    return read_bytes(disk, 0, disk.size)


def check_extents(disk: Disk, offset: int, length: int) -> None:
    """They cover the range, and what they call zero is zero."""
    at = offset
    for count, state in disk.extents(offset, length):
        assert count > 0
        if state == HOLE:
            assert not any(read_bytes(disk, at, count))
        at += count
    assert at == offset + length


class BrokenSource(SpanDisk):
    broken = True

    def read(self, offset: int, length: int) -> list[Span]:
        if self.broken:
            raise OSError(errno.EIO, "the source broke")
        return super().read(offset, length)


@pytest.mark.parametrize("block", [4 * KIB, 64 * KIB, 2 * MIB])
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_random_operations(tmp_path: Path, block: int, seed: int) -> None:
    source = mixed_disk(tmp_path, seed, scale=200_000)
    before = source.content()
    disk, model = CowDisk(source, block), bytearray(before)
    generator = random.Random(seed)
    for _ in range(600):
        offset = generator.randrange(disk.size)
        longest = generator.choice((300_000, 2 * block))
        length = min(1 + int(longest ** generator.random()), disk.size - offset)
        if generator.random() < 0.3:
            offset -= offset % 4096
        end = offset + length
        what = generator.randrange(5)
        if what == 0:
            data = generator.randbytes(length)
            disk.write(offset, memoryview(data))
            model[offset:end] = data
        elif what == 1:
            disk.zero(offset, length, punch=generator.random() < 0.8, fast=False)
            model[offset:end] = bytes(length)
        elif what == 2:
            disk.trim(offset, length)
            now = read_bytes(disk, offset, length)
            assert all(new in (old, 0) for new, old in zip(now, model[offset:end]))
            model[offset:end] = now
        elif what == 3:
            check_extents(disk, offset, length)
        assert read_bytes(disk, offset, length) == model[offset:end]
    assert content(disk) == model
    check_extents(disk, 0, disk.size)
    assert source.content() == before
    disk.close()


def test_what_is_not_written_is_the_source(tmp_path: Path) -> None:
    source = mixed_disk(tmp_path, 3)
    disk = CowDisk(source, 64 * KIB)
    assert disk.size == source.size
    assert content(disk) == source.content()
    assert list(disk.extents(0, disk.size)) == list(source.extents(0, disk.size))
    disk.write(100, memoryview(b"x"))
    assert type(disk.read(1 << 20, 100)[0]) is type(source.read(1 << 20, 100)[0])


def test_source_is_told_only_of_what_it_will_be_asked() -> None:
    source = SpanDisk([b"s" * (256 * KIB)])
    disk = CowDisk(source, 64 * KIB)
    disk.zero(64 * KIB, 64 * KIB, punch=True, fast=False)
    source.asked.clear()
    disk.prefetch([(65 * KIB, 10), (128 * KIB, 10), (127 * KIB, 2 * KIB)])
    assert source.asked == [("prefetch", 128 * KIB, 10), ("prefetch", 127 * KIB, 2 * KIB)]


def test_whole_blocks_need_no_source() -> None:
    source = BrokenSource([b"s" * (256 * KIB)])
    disk = CowDisk(source, 64 * KIB)
    disk.write(64 * KIB, memoryview(b"w" * (64 * KIB)))
    disk.zero(128 * KIB, 128 * KIB, punch=True, fast=True)
    disk.write(130 * KIB, memoryview(b"z"))
    assert read_bytes(disk, 64 * KIB, 192 * KIB) == (
        b"w" * (64 * KIB) + bytes(2 * KIB) + b"z" + bytes(126 * KIB - 1)
    )


def test_failing_source_fails_the_write_alone() -> None:
    source = BrokenSource([b"s" * (256 * KIB)])
    disk = CowDisk(source, 64 * KIB, limit=64 * KIB)
    with pytest.raises(OSError, match="the source broke"):
        disk.write(10, memoryview(b"lost"))
    source.broken = False
    assert content(disk) == source.content()
    disk.write(10, memoryview(b"kept"))  # what had failed doesn't count against the limit
    assert read_bytes(disk, 0, 20) == b"s" * 10 + b"kept" + b"s" * 6


def test_threads_share_blocks() -> None:
    """Eight writers whose ranges interleave in every block: no write is lost."""
    size, step, writers = 4 * MIB, 512, 8
    source = SpanDisk([random.Random(1).randbytes(size // 2), ZeroSpan(size // 2)])
    disk, model = CowDisk(source, 64 * KIB), bytearray(source.content())
    failures: list[BaseException] = []

    def work(number: int) -> None:
        generator = random.Random(number)
        try:
            for _ in range(1500):
                stripe = generator.randrange(size // (step * writers)) * writers + number
                offset = stripe * step + generator.randrange(256)
                length = generator.randrange(1, 256)
                if generator.random() < 0.7:
                    data = generator.randbytes(length)
                    disk.write(offset, memoryview(data))
                else:
                    data = bytes(length)
                    disk.zero(offset, length, punch=generator.random() < 0.5, fast=False)
                model[offset : offset + length] = data
                assert read_bytes(disk, offset, length) == data
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(writers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures, failures
    assert content(disk) == model


def test_zeroes_and_writes_race() -> None:
    """A block is zeroed whole while its middle is written: nothing of the source comes back."""
    block = 64 * KIB
    source = SpanDisk([b"s" * (64 * block)])
    disk = CowDisk(source, block)

    def write() -> None:
        for at in range(64):
            disk.write(at * block + 1000, memoryview(b"w" * 50))

    thread = threading.Thread(target=write)
    thread.start()
    for at in range(64):
        disk.zero(at * block, block, punch=True, fast=False)
    thread.join()
    for at in range(64):
        found = read_bytes(disk, at * block, block)
        assert found[1000:1050] in (bytes(50), b"w" * 50)
        assert not any(found[:1000] + found[1050:])


def test_punched_overlay_gives_space_back() -> None:
    disk = CowDisk(SpanDisk([b"s" * (8 * MIB)]), 64 * KIB)

    def used() -> int:
        return os.fstat(disk._file.fd).st_blocks * 512

    disk.write(0, memoryview(b"x" * (8 * MIB)))
    assert used() >= 8 * MIB
    disk.trim(100, 4 * MIB)
    assert used() <= 4 * MIB + 192 * KIB
    disk.zero(0, 8 * MIB, punch=True, fast=True)
    assert used() <= 64 * KIB
    assert content(disk) == bytes(8 * MIB)


def test_last_block_is_whole_though_it_is_short() -> None:
    disk = CowDisk(SpanDisk([b"s" * (100 * KIB)]), 64 * KIB)
    disk.write(99 * KIB, memoryview(b"x"))
    disk.trim(64 * KIB, 36 * KIB)
    assert os.fstat(disk._file.fd).st_blocks == 0
    assert content(disk) == b"s" * (64 * KIB) + bytes(36 * KIB)


def test_zeroes_of_the_source_take_no_space() -> None:
    disk = CowDisk(SpanDisk([ZeroSpan(8 * MIB)]), MIB)
    for at in range(8):
        disk.write(at * MIB + 300 * KIB, memoryview(b"x"))
    assert os.fstat(disk._file.fd).st_blocks * 512 <= 8 * 64 * KIB


def test_huge_disk() -> None:
    disk = CowDisk(SpanDisk([ZeroSpan(8 << 40), b"end"]), 64 * KIB)
    disk.write(disk.size - 2, memoryview(b"ND"))
    disk.zero(5, 1 << 40, punch=True, fast=False)
    assert read_bytes(disk, disk.size - 4, 4) == b"\0eND"
    check_extents(disk, (8 << 40) - 100, 103)
    with pytest.raises(Error, match="too many for blocks"):
        CowDisk(SpanDisk([ZeroSpan(1 << 60)]), 64 * KIB)


def test_limit() -> None:
    source = SpanDisk([random.Random(1).randbytes(MIB)])
    disk = CowDisk(source, 64 * KIB, limit=256 * KIB)
    disk.write(0, memoryview(b"a" * (192 * KIB)))
    with pytest.raises(OSError, match="cow-limit") as failure:
        disk.write(192 * KIB + 5, memoryview(b"b" * (64 * KIB)))
    assert failure.value.errno == errno.ENOSPC
    disk.write(192 * KIB + 5, memoryview(b"c"))
    disk.write(0, memoryview(b"d" * (256 * KIB)))  # all of it is there already
    with pytest.raises(OSError, match="cow-limit"):
        disk.write(MIB - 1, memoryview(b"e"))
    assert content(disk) == b"d" * (256 * KIB) + source.content()[256 * KIB :]
    disk.trim(0, 64 * KIB)
    disk.write(MIB - 1, memoryview(b"e"))
    assert read_bytes(disk, MIB - 2, 2) == source.content()[-2:-1] + b"e"


def test_full_temporary_folder(
    run: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = tmp_path / "full"
    directory.mkdir()
    run("mount", "-t", "tmpfs", "-o", "size=1m", "none", directory)
    try:
        monkeypatch.setenv("TMPDIR", str(directory))
        source = SpanDisk([random.Random(1).randbytes(4 * MIB)])
        disk = CowDisk(source, 64 * KIB)
        disk.write(10, memoryview(b"before"))
        with pytest.raises(OSError) as failure:
            disk.write(MIB, memoryview(b"x" * (2 * MIB)))
        assert failure.value.errno == errno.ENOSPC
        expected = bytearray(source.content())
        expected[10:16] = b"before"
        assert content(disk) == expected
        disk.write(3 * MIB, memoryview(b"after"))
        assert read_bytes(disk, 3 * MIB - 1, 6) == expected[3 * MIB - 1 : 3 * MIB] + b"after"
    finally:
        run("umount", "--lazy", directory)


def test_no_temporary_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", "/proc")
    with pytest.raises(Error, match=r"in /proc: .*; name another folder in TMPDIR"):
        CowDisk(SpanDisk([b"x" * 512]), 4096)


def arguments(**kwargs: Any) -> argparse.Namespace:
    defaults = {"cow_block_size": 65536, "cow_limit": None, "cow_save": None}
    return argparse.Namespace(**{**defaults, "read_only": False, "to_file": None, **kwargs})


def test_read_only_wins() -> None:
    source = SpanDisk([b"x" * 512])
    assert cow.open(source, True, arguments(read_only=True)) is source


@pytest.mark.parametrize("size", [0, 2048, 65537, 4 << 20])
def test_bad_block_size(size: int) -> None:
    with pytest.raises(UsageError, match="power of 2"):
        cow.open(SpanDisk([b"x" * 512]), True, arguments(cow_block_size=size))


class TestSave:
    def test_saved_when_it_was_served(self, tmp_path: Path) -> None:
        target = tmp_path / "saved"
        disk = CowDisk(SpanDisk([b"s" * MIB, ZeroSpan(64 * MIB)]), 64 * KIB, save=str(target))
        disk.verify_access()
        disk.write(MIB - 3, memoryview(b"change"))
        disk.close()
        assert target.read_bytes() == b"s" * (MIB - 3) + b"change" + bytes(64 * MIB - 3)
        assert target.stat().st_blocks * 512 <= MIB + 128 * KIB

    def test_not_saved_when_it_was_not(self, tmp_path: Path) -> None:
        CowDisk(SpanDisk([b"s" * MIB]), 64 * KIB, save=str(tmp_path / "saved")).close()
        assert not (tmp_path / "saved").exists()

    def test_refused_at_once_where_it_can_not_be(self, tmp_path: Path) -> None:
        disk = CowDisk(SpanDisk([b"s" * MIB]), 64 * KIB, save=str(tmp_path / "missing" / "saved"))
        with pytest.raises(Error, match="isn't a folder we can write to"):
            disk.verify_access()

    def test_one_disk(self, tmp_path: Path) -> None:
        args = arguments(cow_save=str(tmp_path / "saved"))
        cow.open(SpanDisk([b"s" * MIB]), True, args)
        with pytest.raises(UsageError, match="several"):
            cow.open(SpanDisk([b"s" * MIB]), True, args)

    @pytest.mark.parametrize("option", [{"read_only": True}, {"to_file": "x"}])
    def test_what_goes_not_with_it(self, option: dict[str, Any]) -> None:
        with pytest.raises(UsageError, match="leave out -r and --to-file"):
            cow.open(SpanDisk([b"s" * MIB]), True, arguments(cow_save="saved", **option))
