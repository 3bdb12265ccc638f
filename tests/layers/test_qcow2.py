"""qcow2 images that qemu makes, read as qemu reads them."""

from __future__ import annotations

import json
import os
import random
import struct
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from nbdtool import deflate
from nbdtool.disk import (
    STATE_ZERO,
    Disk,
    Extent,
    FileSpan,
    Span,
    ZeroSpan,
    read_bytes,
    span_length,
)
from nbdtool.disks.file import FileDisk
from nbdtool.layers.qcow2.image import Qcow2

KIB, MIB = 1 << 10, 1 << 20


def random_commands(generator: random.Random, size: int, cluster: int) -> Iterator[str]:
    """Compressed writes, which qemu must do first, and then all others."""
    clusters = -(-size // cluster)
    for n in generator.sample(range(clusters), min(12, clusters)):
        offset = n * cluster
        length = min(cluster, size - offset)
        yield f"write -c -P {generator.randrange(256)} {offset} {length}"
    kinds = ["write -P {}", "write -P {}", "write -z", "write -zu", "discard"]
    for _ in range(30):
        offset = generator.randrange(size // 512) * 512
        length = generator.randrange(1, 40) * 512 * generator.choice([1, 1, cluster // 512])
        kind = generator.choice(kinds).format(generator.randrange(1, 256))
        yield f"{kind} {offset} {min(length, size - offset)}"


def ranges(generator: random.Random, size: int, count: int) -> Iterator[tuple[int, int]]:
    for _ in range(count):
        offset = generator.randrange(size)
        longest = generator.choice([9, 5000, 200000, size])
        yield offset, min(generator.randint(1, longest), size - offset)


def zero_map(extents: Iterable[tuple[int, bool]]) -> bytes:
    """A byte for each sector: whether it is known to read as zeroes."""
    return b"".join(bytes([zero]) * (length // 512) for length, zero in extents)


MATRIX = [
    ("0.10", 9, "zlib", "off", "off"),
    ("0.10", 16, "zlib", "off", "off"),
    ("0.10", 21, "zlib", "off", "off"),
    ("1.1", 9, "zlib", "on", "off"),
    ("1.1", 9, "zstd", "off", "off"),
    ("1.1", 12, "zlib", "off", "off"),
    ("1.1", 12, "zstd", "on", "off"),
    ("1.1", 14, "zlib", "off", "on"),
    ("1.1", 16, "zlib", "on", "off"),
    ("1.1", 16, "zlib", "off", "on"),
    ("1.1", 16, "zstd", "on", "off"),
    ("1.1", 16, "zstd", "off", "on"),
    ("1.1", 21, "zlib", "on", "off"),
    ("1.1", 21, "zstd", "off", "on"),
]


@pytest.mark.parametrize("compat, bits, compression, lazy, extended", MATRIX)
def test_matrix(
    tmp_path: Path,
    create: Any,
    write: Any,
    raw: Any,
    run: Any,
    compat: str,
    bits: int,
    compression: str,
    lazy: str,
    extended: str,
) -> None:
    """The bytes, at random places and in all, and the zeroes are those of qemu; snapshots too."""
    generator = random.Random(f"{compat} {bits} {compression} {lazy} {extended}")
    cluster = 1 << bits
    size = min(max(70 * cluster, 300000), 9 * MIB) // 512 * 512 + 512 * generator.randrange(1, 9)
    options = f"compat={compat},cluster_size={cluster}"
    if compat == "1.1":
        options += f",compression_type={compression},lazy_refcounts={lazy},extended_l2={extended}"
    path = create(tmp_path / "i", size, options, *random_commands(generator, size, cluster))
    run("qemu-img", "snapshot", "-c", "first", path)
    before = raw(path)
    write(path, *[c for c in random_commands(generator, size, cluster) if " -c" not in c])
    for data, disk in [
        (raw(path), Qcow2(FileDisk(str(path)))),
        (before, Qcow2(FileDisk(str(path)), snapshot="first")),
    ]:
        assert disk.size == size
        assert read_bytes(disk, 0, size) == data
        for offset, length in ranges(generator, size, 100):
            spans = disk.read(offset, length)
            assert sum(map(span_length, spans)) == length
            assert read_bytes(disk, offset, length) == data[offset : offset + length]
            assert sum(extent.length for extent in disk.extents(offset, length)) == length
    theirs = json.loads(run("qemu-img", "map", "--output=json", "-f", "qcow2", path))
    disk = Qcow2(FileDisk(str(path)))
    ours = zero_map((length, bool(state & STATE_ZERO)) for length, state in disk.extents(0, size))
    assert ours == zero_map((entry["length"], entry["zero"]) for entry in theirs)


@pytest.mark.parametrize("library", [True, False])
def test_a_converted_disk(
    tmp_path: Path, run: Any, random_file: Any, library: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compressed by qemu-img, in clusters of incompressible, compressible and no data."""
    if not library:
        monkeypatch.setattr(deflate, "_library", None)
    source = random_file(tmp_path / "source", 3 * MIB)
    data = source.read_bytes() + b"compressible " * 80000 + bytes(MIB + 77)
    source.write_bytes(data)
    for options in "compression_type=zlib", "compression_type=zstd", "cluster_size=2M":
        image = tmp_path / "image"
        run("qemu-img", "convert", "-q", "-O", "qcow2", "-c", "-o", options, source, image)
        disk = Qcow2(FileDisk(str(image)))
        assert read_bytes(disk, 0, disk.size)[: len(data)] == data


def test_spans_are_those_of_the_file(tmp_path: Path, create: Any) -> None:
    """Neighbouring clusters become one range of the file; what isn't there, zeroes."""
    path = create(tmp_path / "i", 8 * MIB, "", "write -P 5 1M 3M")
    spans = Qcow2(FileDisk(str(path))).read(MIB - 100, 4 * MIB)
    assert [type(span) for span in spans] == [ZeroSpan, FileSpan, ZeroSpan]
    assert [span_length(span) for span in spans] == [100, 3 * MIB, MIB - 100]


@pytest.mark.slow
def test_many_threads(tmp_path: Path, run: Any, random_file: Any) -> None:
    """Many readers of few kept clusters and tables get the right bytes."""
    source = random_file(tmp_path / "source", 4 * MIB)
    data = source.read_bytes() + b"abc" * MIB
    source.write_bytes(data)
    image = tmp_path / "image"
    run("qemu-img", "convert", "-O", "qcow2", "-c", "-o", "cluster_size=4k", source, image)
    disk = Qcow2(FileDisk(str(image)))
    disk._tables = 2
    disk._inflater._capacity = 8
    wrong = []

    def reader(seed: int) -> None:
        generator = random.Random(seed)
        for _ in range(60):
            wanted = list(ranges(generator, len(data), 4))
            disk.prefetch(wanted)
            for offset, length in wanted:
                if read_bytes(disk, offset, length) != data[offset : offset + length]:
                    wrong.append((offset, length))

    threads = [threading.Thread(target=reader, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert len(disk._inflater._done) <= 8 and len(disk._recent) + len(disk._older) <= 5
    disk.close()


class TestPrefetch:
    """A source that fetches ahead is told where the bytes are that will be read."""

    class Slow(Disk):
        def __init__(self, path: Path) -> None:
            self._file = FileDisk(str(path))
            self.size = self._file.size
            self.told: set[tuple[int, int]] = set()
            self.read_ranges: list[tuple[int, int]] = []

        def prefetch(self, ranges: Any) -> None:
            self.told.update(ranges)

        def read(self, offset: int, length: int) -> list[Span]:
            self.read_ranges.append((offset, length))
            return self._file.read(offset, length)

    @pytest.mark.parametrize("compressed", ["", "-c"])
    def test_is_passed_on(self, tmp_path: Path, create: Any, compressed: str) -> None:
        commands = [f"write {compressed} -P {n + 1} {n * 64}k 64k" for n in range(0, 20, 2)]
        slow = self.Slow(create(tmp_path / "i", 2 * MIB, "", *commands))
        disk = Qcow2(slow)
        read_bytes(disk, 0, 1)  # loads the table
        slow.read_ranges.clear()
        wanted = [(n * 64 * KIB, 64 * KIB) for n in range(20)]
        disk.prefetch(wanted)
        for offset, length in wanted:
            disk.read(offset, length)
        assert slow.read_ranges and set(slow.read_ranges) <= slow.told | {(0, 0)}


class TestEndOfTheImage:
    def test_in_the_last_cluster_reads_as_zeroes(
        self, tmp_path: Path, create: Any, raw: Any
    ) -> None:
        path = create(tmp_path / "i", 4 * MIB, "", "write -P 7 1M 256k")
        os.truncate(path, path.stat().st_size - 5000)
        disk = Qcow2(FileDisk(str(path)))
        data = read_bytes(disk, 0, disk.size)
        assert data == raw(path)
        assert data.count(7) == 256 * KIB - 5000
        sizes = [extent.length for extent in disk.extents(0, disk.size)]
        assert sum(sizes) == disk.size

    def test_before_a_cluster_is_an_error(self, tmp_path: Path, create: Any) -> None:
        """qemu reads zeroes there; a disk that lost its end must not be served as whole."""
        path = create(tmp_path / "i", 4 * MIB, "", "write -P 7 1M 200k")
        os.truncate(path, path.stat().st_size - 100000)
        disk = Qcow2(FileDisk(str(path)))
        assert read_bytes(disk, MIB, 100 * KIB) == b"\7" * (100 * KIB)
        for ask in (disk.read, lambda *where: list(disk.extents(*where))):
            with pytest.raises(OSError, match="which is cut"):
                ask(MIB, 200 * KIB)

    def test_of_compressed_data(self, tmp_path: Path, run: Any) -> None:
        """The last compressed cluster need not fill its sectors."""
        (tmp_path / "s").write_bytes(b"some text " * 100000)
        path = tmp_path / "i"
        run("qemu-img", "convert", "-c", "-O", "qcow2", tmp_path / "s", path)
        disk = Qcow2(FileDisk(str(path)))
        expected = read_bytes(disk, 0, disk.size)
        while path.read_bytes()[-1] == 0:
            os.truncate(path, path.stat().st_size - 1)
        disk = Qcow2(FileDisk(str(path)))
        assert read_bytes(disk, 0, disk.size) == expected


@pytest.mark.parametrize("size", [0, 512, 1, 999, 65536, 65537, 131072, 200 * KIB])
def test_small_disks(tmp_path: Path, create: Any, size: int) -> None:
    """Sizes that are no multiple of a sector are the image's own, whatever qemu rounds them to."""
    path = create(tmp_path / "i", max(size, 512), "", f"write -P 3 0 {max(size, 512) & ~511}")
    with path.open("r+b") as file:
        file.seek(24)
        file.write(struct.pack(">Q", size))
    disk = Qcow2(FileDisk(str(path)))
    assert disk.size == size
    if size:
        data = read_bytes(disk, 0, size)
        assert data == (b"\3" * (max(size, 512) & ~511)).ljust(size, b"\0")[:size]
        assert sum(extent.length for extent in disk.extents(0, size)) == size


def test_a_huge_empty_disk(tmp_path: Path, create: Any) -> None:
    path = create(tmp_path / "i", 1 << 50, "cluster_size=2M", "write -P 1 900T 1M")
    disk = Qcow2(FileDisk(str(path)))
    at, found = 0, []
    for extent in disk.extents(0, disk.size):
        if not extent.state:
            found.append((at, extent.length))
        at += extent.length
    assert at == 1 << 50
    assert found and found[0][0] == 900 << 40 and sum(n for _, n in found) <= 2 * MIB
    assert read_bytes(disk, (900 << 40) - 1, 3) == b"\0\1\1"


def test_preallocated_holes_come_through(tmp_path: Path, create: Any) -> None:
    """An allocated cluster that is a hole of the file is a hole of the disk."""
    path = create(tmp_path / "i", 8 * MIB, "preallocation=metadata", "write -P 4 1M 64k")
    disk = Qcow2(FileDisk(str(path)))
    data = sum(extent.length for extent in disk.extents(0, disk.size) if extent.state == 0)
    assert 64 * KIB <= data < MIB
    assert read_bytes(disk, MIB, 3) == b"\4\4\4"


def test_extents_without_a_gap(tmp_path: Path, create: Any) -> None:
    path = create(tmp_path / "i", MIB, "cluster_size=512", "write -P 1 1k 1k", "write -z 8k 1k")
    disk = Qcow2(FileDisk(str(path)))
    assert list(disk.extents(1024, 1024)) == [Extent(1024, 0)]
    assert sum(extent.length for extent in disk.extents(3, 99999)) == 99999
