"""Damaged and hostile qcow2 images: an error, or what qemu reads; never anything else.

The images are read in a child whose memory is measured.
"""

from __future__ import annotations

import hashlib
import random
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Callable

import pytest

MIB = 1 << 20
PEAK = 160 * MIB  # of resident memory, the interpreter's included

# Reads a path a line, and answers with a line: a hash of the disk, or the error. The last line is
# the peak of the memory that it held, in KiB.
READER = """
import hashlib, sys
from nbdtool.disk import span_bytes
from nbdtool.disks.file import FileDisk
from nbdtool.errors import Error
from nbdtool.layers.qcow2.image import Qcow2

for path in sys.stdin:
    disk = None
    try:
        disk = Qcow2(FileDisk(path.rstrip()), allow_corrupt=True)
        if disk.size > 1 << 26:
            # Too much to compare, so that a part must do.
            list(zip(range(9999), disk.extents(0, disk.size)))
            disk.read(disk.size // 2, 1 << 20)
            print("huge", flush=True)
            continue
        digest = hashlib.sha256()
        disk.prefetch([(at, 1) for at in range(0, disk.size, 1 << 14)])
        for at in range(0, disk.size, 1 << 20):
            for span in disk.read(at, min(1 << 20, disk.size - at)):
                digest.update(span_bytes(span))
        total = sum(extent.length for extent in disk.extents(0, disk.size))
        assert total == disk.size, total
        print(digest.hexdigest(), flush=True)
    except (Error, OSError) as exc:
        print("error:", str(exc) or repr(exc), flush=True)
    finally:
        if disk:
            disk.close()
with open("/proc/self/status") as status:
    print(*[line.split()[1] for line in status if line.startswith("VmHWM")])
"""


@pytest.fixture
def read() -> Iterator[Callable[[Path], str]]:
    """read(path) -> the line of the reader above."""
    child = subprocess.Popen(
        [sys.executable, "-c", READER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert child.stdin and child.stdout and child.stderr

    def read(path: Path) -> str:
        print(path, file=child.stdin, flush=True)
        answer = child.stdout.readline()
        if not answer:
            raise AssertionError(child.stderr.read())
        return answer.rstrip()

    yield read
    child.stdin.close()
    peak = child.stdout.read()
    assert child.wait(30) == 0, child.stderr.read()
    assert int(peak) * 1024 < PEAK
    child.stdout.close()
    child.stderr.close()


WRITES = ("write -c -P 7 0 64k", "write -P 9 100k 200k", "write -z 400k 64k", "write -P 3 900k 9k")
BASES = {
    "version 2": ("compat=0.10", WRITES),
    "zlib": ("compat=1.1", WRITES),
    "zstd": ("compat=1.1,compression_type=zstd", WRITES),
    "extended": ("compat=1.1,extended_l2=on", WRITES),
    "small": (
        "compat=1.1,cluster_size=512",
        ("write -c -P 7 0 512", "write -P 9 1k 20k", "write -z 30k 2k", "write -P 4 40k 512"),
    ),
}


@pytest.fixture(params=BASES)
def image(request: Any, tmp_path: Path, create: Any, run: Any) -> Path:
    options, commands = BASES[request.param]
    path: Path = create(tmp_path / "image", MIB, options, *commands)
    run("qemu-img", "snapshot", "-c", "snap", path)
    return path


def header_damage(data: bytes) -> Iterator[bytes]:
    """Each 32-bit word of the header, with each of some values."""
    for at in range(0, 112, 4):
        for value in 0, 1, 0x10000, 0x80000000, 0xFFFFFFFF:
            yield patched(data, at, struct.pack(">I", value))
    for at in range(24, 72, 8):
        for value in len(data) - 8, len(data), (1 << 63) - 512, (1 << 64) - 512:
            yield patched(data, at, struct.pack(">Q", value))


def table_damage(data: bytes) -> Iterator[bytes]:
    """Entries of L1, of the first L2 table, and of the snapshot table."""
    generator = random.Random(len(data))
    l1 = int.from_bytes(data[40:48], "big")
    l2 = int.from_bytes(data[l1 : l1 + 8], "big") & 0x00FFFFFFFFFFFE00
    snapshots = int.from_bytes(data[64:72], "big")
    for table, length in (l1, 16), (l2, 160), (l2, 512), (snapshots, 72):
        for _ in range(15):
            at = table + generator.randrange(min(length, len(data) - table))
            yield patched(data, at, bytes([data[at] ^ 1 << generator.randrange(8)]))
    hostile = [0, l1, l2, 512, len(data), len(data) - 512, 1 << 55, (1 << 56) - 512, 1]
    for table in l1, l2, l2 + 8:
        for place in hostile:
            for flags in 0, 1 << 63, 1 << 62:
                yield patched(data, table, struct.pack(">Q", place | flags))


def content_damage(data: bytes) -> Iterator[bytes]:
    """Where clusters are, compressed ones too."""
    generator = random.Random(1)
    for _ in range(20):
        at = generator.randrange(len(data) // 2, len(data))
        yield patched(data, at, generator.randbytes(9))
    for end in 0, 3, 71, 72, 100, 104, 511, 512, len(data) // 2, len(data) - 600, len(data) - 1:
        yield data[:end]
    for at in range(0, len(data), len(data) // 6):
        yield data[:at] + bytes(9000) + data[at:]


def patched(data: bytes, at: int, piece: bytes) -> bytes:
    return data[:at] + piece + data[at + len(piece) :]


@pytest.mark.slow
@pytest.mark.parametrize("damage", [header_damage, table_damage, content_damage])
def test_damage(image: Path, tmp_path: Path, read: Any, damage: Any) -> None:
    data = image.read_bytes()
    whole = read(image)
    assert whole == qemu(image)
    outcomes = {"an error": 0, "as qemu": 0}
    for damaged in damage(data):
        path = tmp_path / "damaged"
        path.write_bytes(damaged)
        answer = read(path)
        if answer.startswith("error: "):
            outcomes["an error"] += 1
            continue
        theirs = qemu(path)
        size = int.from_bytes(damaged[24:32], "big")
        # qemu rounds the size of the disk to sectors.
        same = answer == theirs or size % 512 or (answer == "huge" and theirs)
        assert same, (damaged[:112].hex(), answer, theirs)
        outcomes["as qemu"] += 1
    assert min(outcomes.values()) > 4, outcomes


def qemu(path: Path) -> str:
    """The hash of what qemu reads, or "" if it refuses."""
    target = path.with_suffix(".raw")
    size = int.from_bytes(path.read_bytes()[24:32], "big")
    if size > 1 << 26:  # too much to convert: whether it can be opened has to do
        command = ["qemu-io", "-r", "-f", "qcow2", "-c", f"read {size // 2 // 512 * 512} 1M", path]
        return "" if subprocess.run(command, capture_output=True).returncode else "huge"
    command = ["qemu-img", "convert", "-f", "qcow2", "-O", "raw", path, target]
    if subprocess.run(command, capture_output=True, timeout=60).returncode:
        return ""
    digest = hashlib.sha256(target.read_bytes()).hexdigest()
    target.unlink()
    return digest


def test_a_bomb_in_a_compressed_cluster(tmp_path: Path, create: Any, read: Any) -> None:
    """Data that inflates to more than a cluster is cut (zlib) or refused (zstd), as qemu does."""
    import zlib

    deflate = zlib.compressobj(9, zlib.DEFLATED, -12)
    bomb = deflate.compress(bytes(100 * MIB)) + deflate.flush()
    path = create(tmp_path / "i", 4 * MIB, "cluster_size=2M", "write -c -P 7 0 2M")
    data = path.read_bytes()
    l1 = int.from_bytes(data[40:48], "big")
    l2 = int.from_bytes(data[l1 : l1 + 8], "big") & 0x00FFFFFFFFFFFE00
    entry = int.from_bytes(data[l2 : l2 + 8], "big")
    place = entry & (1 << 49) - 1
    entry = 1 << 62 | 2000 << 49 | place
    path.write_bytes(patched(patched(data, place, bomb), l2, struct.pack(">Q", entry)))
    assert read(path) == hashlib.sha256(bytes(4 * MIB)).hexdigest() == qemu(path)


def test_tables_that_point_to_themselves(tmp_path: Path, create: Any, read: Any) -> None:
    """A huge disk whose L1 entries lead to one table is read as far as one wants."""
    path = create(tmp_path / "i", 1 << 40, "cluster_size=64k", "write -P 1 0 64k")
    data = path.read_bytes()
    l1 = int.from_bytes(data[40:48], "big")
    path.write_bytes(patched(data, l1, data[l1 : l1 + 8] * 2048))
    assert read(path) == "huge"
