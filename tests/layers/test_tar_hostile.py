"""Damaged and hostile tar archives: refused at the start, or what GNU tar extracts."""

from __future__ import annotations

import os
import random
import re
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Callable

import pytest

MIB = 1 << 20
PEAK = 120 * MIB  # of resident memory, the interpreter's included

# Reads "path<TAB>name" a line, and answers with a line: the content in hex, or the error. The last
# line is the peak of the memory that it held, in KiB.
READER = """
import sys
from nbdtool.disk import read_bytes
from nbdtool.disks.file import FileDisk
from nbdtool.errors import Error
from nbdtool.layers import tar

for line in sys.stdin:
    path, name = line.rstrip("\\n").split("\\t")
    try:
        disk = tar.open(FileDisk(path), name, None)
        shown = min(disk.size, 3 << 20)
        total = sum(extent.length for extent in disk.extents(0, shown)) if shown else 0
        assert total == shown, total
        print("content:", read_bytes(disk, 0, shown).hex(), flush=True)
    except Error as exc:
        print("error:", exc, flush=True)
with open("/proc/self/status") as status:
    print(*[line.split()[1] for line in status if line.startswith("VmHWM")])
"""


@pytest.fixture
def read() -> Iterator[Callable[..., Any]]:
    """read(path, name) -> the content as bytes, or the text of the error."""
    child = subprocess.Popen(
        [sys.executable, "-c", READER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert child.stdin and child.stdout and child.stderr

    def read(path: Path, name: str = "x") -> bytes | str:
        print(path, name, sep="\t", file=child.stdin, flush=True)
        kind, _, answer = child.stdout.readline().rstrip("\n").partition(" ")
        assert kind in ("content:", "error:"), child.stderr.read()
        return bytes.fromhex(answer) if kind == "content:" else answer

    yield read
    child.stdin.close()
    peak = child.stdout.read()
    assert child.wait(30) == 0, child.stderr.read()
    assert int(peak) * 1024 < PEAK
    child.stdout.close()
    child.stderr.close()


def header(
    name: bytes, size: int | bytes, kind: bytes = b"0", *, posix: bool = False, **at: bytes
) -> bytes:
    """A header, GNU's or POSIX's, with a right checksum; at_N=... puts bytes at N."""
    block = bytearray(512)
    block[: len(name)] = name
    block[100:124] = b"0000644\0" * 3
    block[124:136] = size if isinstance(size, bytes) else b"%011o\0" % size
    block[136:148] = b"00000000000\0"
    block[156:157] = kind
    block[257:265] = b"ustar\x0000" if posix else b"ustar  \0"
    for key, value in at.items():
        place = int(key[3:])
        block[place : place + len(value)] = value
    block[148:156] = b"%06o\0 " % (sum(block) + 8 * 32)
    return bytes(block)


def padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 512)


def pax(*records: tuple[bytes, bytes] | bytes, kind: bytes = b"x") -> bytes:
    data = b""
    for record in records:
        if isinstance(record, bytes):
            data += record
            continue
        body = b" %s=%s\n" % record
        length = len(body) + len(str(len(body) + len(str(len(body)))))
        data += str(length).encode() + body
    return header(b"pax", len(data), kind) + padded(data)


END = bytes(1024)
FILE = header(b"x", 3) + padded(b"yes")


def sparse_1_0(map_: bytes, content: bytes, size: int, stored: int | None = None) -> bytes:
    records = pax(
        (b"GNU.sparse.major", b"1"),
        (b"GNU.sparse.minor", b"0"),
        (b"GNU.sparse.name", b"x"),
        (b"GNU.sparse.realsize", b"%d" % size),
    )
    data = padded(map_) + content
    return (
        records
        + header(b"y", len(data) if stored is None else stored, posix=True)
        + padded(data)
        + END
    )


def sparse_0(*records: tuple[bytes, bytes], content: bytes = b"c" * 512) -> bytes:
    return pax(*records) + header(b"x", len(content), posix=True) + padded(content) + END


def old_sparse(entries: list[tuple[bytes, bytes]], more: int = 0, real: bytes = b"2000\0") -> bytes:
    table = b"".join(b"%b%b" % (a.ljust(12, b"\0"), b.ljust(12, b"\0")) for a, b in entries)
    return header(b"x", 512, b"S", at_386=table, at_482=bytes([more]), at_483=real.ljust(12, b"\0"))


HUGE = b"\x80" + (1 << 60).to_bytes(11, "big")
HOSTILE: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "it is empty"),
    "not tar": (b"some text " * 200, "checksum is wrong|isn't a number"),
    "zeroes": (bytes(10240), "there is no x"),
    "a short header": (FILE + b"x" * 100, "cut off in a header"),
    "cut in the content": (header(b"x", 5000) + bytes(1000), "cut off in"),
    "2^60 bytes": (header(b"x", HUGE) + END, "cut off in"),
    "2^63 bytes": (header(b"x", b"\x80" + b"\0" * 3 + b"\x80" + b"\0" * 7) + END, "is impossible"),
    "2^95 bytes": (header(b"x", b"\xbf" + b"\xff" * 11) + END, "is impossible"),
    "back to itself": (header(b"x", b"\xff" * 10 + b"\xfe\x00") + END, "is impossible"),
    "-1 bytes": (header(b"x", b"-0000000001\0") + END, "isn't a number"),
    "a size with letters": (header(b"x", b"0000000x123\0") + END, "isn't a number"),
    "a size with digits 8 and 9": (header(b"x", b"00000000089\0") + END, "isn't a number"),
    "a second header cut off": (FILE + header(b"z", 9999) + END, "cut off in"),
    "a wrong second header": (FILE + b"\1" + header(b"z", 0)[1:] + END, "checksum is wrong"),
    "a link with content": (
        header(b"l", 512, b"2") + bytes(512) + FILE + END,
        "can't have content",
    ),
    "a long name of 2^60": (
        header(b"L", b"\x80" + (1 << 40).to_bytes(11, "big"), b"L"),
        "more than",
    ),
    "a long name cut off": (header(b"L", 9999, b"L") + bytes(600), "cut off in an extended"),
    "a long name and no more": (header(b"L", 9, b"L") + padded(b"x" * 9) + END, "cut off after"),
    "endless extended headers": (
        pax((b"comment", b"c" * (1 << 20))) * 8 + FILE + END,
        "more than is allowed",
    ),
    "endless global headers": (
        b"".join(pax((b"c%d" % n, b"c" * (1 << 20)), kind=b"g") for n in range(8)) + FILE + END,
        "more than is allowed",
    ),
    "a pax record that stays where it is": (pax(b"0 a=b\n") + FILE + END, "malformed"),
    "a pax record without a length": (pax(b"a=b\n" * 9) + FILE + END, "malformed"),
    "a pax record that is too long": (pax(b"99 a=b\n") + FILE + END, "malformed"),
    "a pax record with a huge length": (pax(b"9" * 400 + b" a=b\n") + FILE + END, "malformed"),
    "a pax record of a negative length": (pax(b"-7 a=b\n") + FILE + END, "malformed"),
    "a pax record without a value": (pax(b"5 ab\n") + FILE + END, "malformed"),
    "a pax size of 2^64": (pax((b"size", b"18446744073709551616")) + FILE + END, "isn't a number"),
    "a pax size of 2^63 - 1": (pax((b"size", b"9223372036854775807")) + FILE, "impossible size"),
    "a negative pax size": (pax((b"size", b"-512")) + FILE + END, "isn't a number"),
    "a pax size beyond the end": (pax((b"size", b"99999")) + FILE + END, "cut off in"),
    "a pax name with a NUL": (pax((b"path", b"x\0y")) + FILE + END, "has a NUL"),
    "a sparse map that goes back": (
        sparse_1_0(b"2\n512\n512\n0\n512\n", b"c" * 1024, 4096),
        "overlap",
    ),
    "a sparse map beyond its file": (
        sparse_1_0(b"1\n512\n512\n", b"c" * 512, 700),
        "or lie",
    ),
    "a sparse map of 2^64": (
        sparse_1_0(b"1\n18446744073709551615\n1\n", b"c", 9),
        "isn't a number",
    ),
    "a sparse map with too little": (
        sparse_1_0(b"1\n0\n512\n", b"c" * 1024, 999),
        "segments of",
    ),
    "a sparse map with too much": (sparse_1_0(b"1\n0\n999\n", b"c" * 512, 999), "segments of"),
    "a sparse map without an end": (sparse_1_0(b"9\n0\n1\n", b"", 9), "cut off|isn't a number"),
    "a sparse map of one line": (sparse_1_0(b"1" * 4096, b"", 9), "map is malformed"),
    "a sparse map of words": (sparse_1_0(b"1\na\nb\n", b"", 9), "isn't a number"),
    "a sparse map with 10^9 segments": (sparse_1_0(b"1000000000\n", b"", 9), "more than"),
    "a sparse map longer than its member": (sparse_1_0(b"1\n0\n1\n", b"c", 9, 100), "cut off"),
    "odd segments": (sparse_1_0(b"2\n0\n5\n600\n5\n", b"c" * 10, 700), "whole number of blocks"),
    "a sparse file of 2^63": (sparse_1_0(b"0\n", b"", 1 << 63), "impossible size|isn't a number"),
    "an unknown sparse version": (
        sparse_0((b"GNU.sparse.major", b"7"), (b"GNU.sparse.minor", b"0")),
        "isn't a number|version is unknown",
    ),
    "a sparse 0.1 map that lies": (
        sparse_0(
            (b"GNU.sparse.size", b"9999"),
            (b"GNU.sparse.numblocks", b"4"),
            (b"GNU.sparse.map", b"0,512"),
        ),
        "as long as it says",
    ),
    "a sparse 0.0 map in disorder": (
        sparse_0(
            (b"GNU.sparse.size", b"9999"),
            (b"GNU.sparse.numblocks", b"1"),
            (b"GNU.sparse.numbytes", b"512"),
            (b"GNU.sparse.offset", b"0"),
        ),
        "map is malformed",
    ),
    "an old sparse map without an end": (old_sparse([(b"0", b"1000")], 1), "cut off"),
    "an endless old sparse map": (
        old_sparse([(b"0", b"0")] * 4, 1) + (b"0\0".ljust(12, b"\0") * 42 + b"\1" * 8) * 60000,
        "too long|cut off",
    ),
    "an old sparse map that overlaps": (
        old_sparse([(b"0", b"1000"), (b"400", b"1000")]) + bytes(512) + END,
        "overlap",
    ),
    "a negative old sparse map": (
        old_sparse([(b"\xff" * 12, b"1000")]) + bytes(512) + END,
        "or lie",
    ),
    "star's sparse format": (
        pax((b"SCHILY.realsize", b"9999")) + FILE + END,
        "star stores it is not supported",
    ),
    "a later member of that kind": (FILE + header(b"x", 0, b"M") + END, "not a regular file"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_refused(case: str, tmp_path: Path, read: Any) -> None:
    data, told = HOSTILE[case]
    path = tmp_path / "a.tar"
    path.write_bytes(data)
    answer = read(path)
    assert isinstance(answer, str) and str(path) in answer
    assert re.search(told, answer), answer


def test_the_pieces_are_sound(tmp_path: Path, read: Any, run: Any) -> None:
    """What the cases above are made of is read where it isn't damaged, as by GNU tar."""
    path = tmp_path / "a.tar"
    whole = sparse_1_0(b"2\n512\n512\n1536\n5\n", b"c" * 517, 1541)
    old = old_sparse([(b"0", b"1000")]) + b"c" * 512 + END
    zero = sparse_0(
        (b"GNU.sparse.size", b"9999"),
        (b"GNU.sparse.numblocks", b"1"),
        (b"GNU.sparse.offset", b"1024"),
        (b"GNU.sparse.numbytes", b"512"),
    )
    signed = bytearray(header("grün".encode(), 3))
    total = sum(byte - 256 * (byte > 127) for byte in signed[:148] + b" " * 8 + signed[156:])
    signed[148:156] = b"%06o\0 " % total
    for data, name in [
        (FILE + END, "x"),
        (whole, "x"),
        (old, "x"),
        (zero, "x"),
        (pax((b"path", b"x")) + header(b"other", 3) + padded(b"yes") + END, "x"),
        (pax((b"comment", b"c" * 99999)) + FILE + END, "x"),
        (bytes(signed) + padded(b"yes") + END, "grün"),
    ]:
        path.write_bytes(data)
        answer, theirs = read(path, name), run("tar", "-xOf", path, name, binary=True)
        # To a pipe GNU tar doesn't write a hole at the end.
        assert isinstance(answer, bytes) and answer.rstrip(b"\0") == theirs.rstrip(b"\0"), answer


FORMATS = [
    ["--format=v7"],
    ["--format=gnu", "-S"],
    ["--format=posix"],
    ["--format=posix", "-S", "--sparse-version=0.0"],
    ["--format=posix", "-S", "--sparse-version=0.1"],
    ["--format=posix", "-S", "--sparse-version=1.0"],
]


@pytest.mark.slow
@pytest.mark.parametrize("options", FORMATS, ids=[" ".join(options) for options in FORMATS])
def test_damage(options: list[str], tmp_path: Path, read: Any, run: Any) -> None:
    """Bytes altered, headers given a right checksum again, the end lost."""
    generator = random.Random(str(options))
    (tmp_path / "disk").mkdir()
    (tmp_path / "disk/b").write_bytes(generator.randbytes(3000))
    with (tmp_path / "disk/s").open("wb") as file:
        for n in range(30):
            file.seek(n * 65536)
            file.write(generator.randbytes(4096))
        file.truncate(2 * MIB)
    run("tar", *options, "-cf", "a.tar", "disk", cwd=tmp_path)
    data = (tmp_path / "a.tar").read_bytes()
    with tarfile.open(tmp_path / "a.tar") as archive:
        starts = [member.offset for member in archive] + [
            member.offset_data - 512 for member in archive
        ]
    path = tmp_path / "damaged.tar"
    outcomes = {"refused": 0, "as tar": 0}
    for _ in range(60):
        damaged = bytearray(data)
        start = generator.choice(starts)
        for _ in range(generator.choice([1, 1, 3])):
            places = [(0, 100), (124, 12), (156, 1), (386, 114), (512, 300)]
            place, length = generator.choice(places)
            at = start + place + generator.randrange(length)
            damaged[at] = generator.choice([0, 32, 48, 49, 55, 128, 255, damaged[at] ^ 1])
        if generator.random() < 0.9:
            damaged[start + 148 : start + 156] = b" " * 8
            damaged[start + 148 : start + 155] = b"%06o\0" % sum(damaged[start : start + 512])
        if generator.random() < 0.1:
            del damaged[generator.randrange(len(damaged)) :]
        path.write_bytes(damaged)
        for name in "disk/b", "disk/s":
            answer = read(path, name)
            if isinstance(answer, str):
                outcomes["refused"] += 1
                continue
            command = f'LC_ALL=C tar -xOf "{path}" {name} | head -c {3 * MIB}'
            theirs = subprocess.run(["sh", "-c", command], capture_output=True)
            if "out of range" in theirs.stderr.decode():  # a time, which doesn't matter here
                continue
            assert answer.rstrip(b"\0") == theirs.stdout.rstrip(b"\0"), theirs.stderr
            outcomes["as tar"] += 1
    assert min(outcomes.values()) > 5, outcomes


def test_no_file_of_the_host_is_opened(tmp_path: Path, read: Any) -> None:
    secret = tmp_path / "secret"
    secret.write_bytes(b"secret")
    path = tmp_path / "a.tar"
    for target in os.fsencode(secret), b"../" * 30 + os.fsencode(secret)[1:]:
        path.write_bytes(header(b"x", 0, b"2", at_157=target[:99]) + END)
        assert "there is no x, a link to" in read(path)
