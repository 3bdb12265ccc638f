"""Partition tables, whole and damaged: what Linux sees, or a doubt."""

from __future__ import annotations

import os
import random
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nbdtool.commands.guestfs.tables import read_parts
from nbdtool.disks.file import FileDisk
from nbdtool.errors import Uncertain

KIB, MIB = 1 << 10, 1 << 20
SIZE = MIB  # of each disk
MUTATIONS = 24  # of each table

SCRIPTS = {
    "gpt": "label: gpt\nfirst-lba: 34\n100,200\n400,\n",
    "gpt-gaps": "label: gpt\nfirst-lba: 34\n3: start=100,size=9\n7: start=600,size=1\n",
    "mbr": "label: dos\n40,100,L,*\n200,300,82\n,,L\n",
    "logical": "label: dos\n40,100,L\n200,1000,E\n300,100,L\n500,200,82\n800,20,L\n",
    "extended-first": "label: dos\n1: 40,600,5\n3: 800,100,L\n5: 50,100,L\n",
    "empty-mbr": "label: dos\n",
    "empty-gpt": "label: gpt\nfirst-lba: 34\n",
}
CERTAIN = {*SCRIPTS, "zeroes", "fat"}


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory, run: Any) -> dict[str, bytes]:
    """Disks of 1 MiB by name."""
    directory = tmp_path_factory.mktemp("tables")
    made = {"zeroes": bytes(SIZE), "random": random.Random(1).randbytes(SIZE)}
    for name, script in SCRIPTS.items():
        path = directory / name
        path.write_bytes(bytes(SIZE))
        run("sfdisk", "-q", path, input=script.encode(), binary=True)
        made[name] = path.read_bytes()
    path = directory / "fat"
    path.write_bytes(bytes(SIZE))
    run("mkfs.vfat", path)
    made["fat"] = path.read_bytes()
    made |= dict(_odd(made))
    generator = random.Random(8)
    for name in SCRIPTS:
        for number in range(MUTATIONS):
            made[f"{name} {number}"] = _mutated(made[name], generator)
    return made


def _odd(made: dict[str, bytes]) -> Iterator[tuple[str, bytes]]:
    def changed(name: str, *changes: tuple[int, bytes]) -> bytes:
        data = bytearray(made[name])
        for at, new in changes:
            data[at : at + len(new)] = new
        return bytes(data)

    yield "gpt without protection", changed("gpt", (510, b"\0\0"))
    yield "gpt protected from 2", changed("gpt", (454, b"\2"))
    yield "gpt and a hybrid", changed("gpt", (462, made["mbr"][446:462]))
    yield "gpt with a damaged header", changed("gpt", (512 + 60, b"x"))
    yield "gpt with damaged entries", changed("gpt", (1024 + 30, b"x"))
    yield "gpt larger than the disk", made["gpt"][: SIZE // 2].ljust(SIZE, b"\0")
    yield "mbr of type 0", changed("mbr", (450, b"\0"))
    yield "mbr beyond the end", changed("mbr", (458, struct.pack("<I", 4000)))
    yield "mbr starting beyond the end", changed("mbr", (454, struct.pack("<I", 4000)))
    yield "mbr with BSD", changed("mbr", (450, b"\xa5"))
    yield "two extended", changed("logical", (450, b"\5"))
    entry = made["mbr"][446:462]
    yield "garbage in the chain", changed("logical", (200 * 512 + 446 + 32, entry))
    yield "more in the chain", changed("logical", (200 * 512 + 446 + 48, _entry(0x83, 20, 30)))
    yield "chain without an end", changed("logical", (200 * 512 + 462, _entry(5, 0, 100)))
    yield "chain cut", changed("logical", (200 * 512 + 510, b"\0\0"))


def _entry(kind: int, start: int, count: int) -> bytes:
    return struct.pack("<B3xB3xII", 0, kind, start, count)


def _mutated(data: bytes, generator: random.Random) -> bytes:
    """Some bytes of its tables changed; the checksums of a GPT are right again, mostly."""
    mutated = bytearray(data)
    places = [*range(446, 512)]
    if data[512:520] == b"EFI PART":
        places += [*range(512, 604), *range(1024, 1024 + 4 * 128)] * 2
    for at in range(1024, len(data), 512):
        if data[at + 510 : at + 512] == b"\x55\xaa":
            places += range(at + 446, at + 512)
    for _ in range(generator.choice((1, 1, 2, 4))):
        mutated[generator.choice(places)] = generator.choice(
            (0, 1, 5, 0x0F, 0x80, 0x83, 0xFF, 0x40)
        )
    if data[512:520] == b"EFI PART" and generator.random() < 0.8:
        count, size = struct.unpack_from("<II", mutated, 512 + 80)
        length = min(count * size, 128 * 128)
        struct.pack_into("<I", mutated, 512 + 88, zlib.crc32(mutated[1024 : 1024 + length]))
        struct.pack_into("<I", mutated, 512 + 16, 0)
        struct.pack_into("<I", mutated, 512 + 16, zlib.crc32(mutated[512:604]))
    return bytes(mutated)


@pytest.fixture(scope="module")
def seen(tables: dict[str, bytes], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What Linux sees on each in the appliance: {number: (start, length)} in bytes."""
    import guestfs  # type: ignore[import-untyped]

    os.environ.setdefault("LIBGUESTFS_BACKEND", "direct")
    os.environ.setdefault("LIBGUESTFS_BACKEND_SETTINGS", "force_tcg")
    directory = tmp_path_factory.mktemp("seen")
    every, scratch = directory / "all", directory / "scratch"
    every.write_bytes(b"".join(tables.values()))
    scratch.write_bytes(bytes(SIZE))
    g = guestfs.GuestFS(python_return_dict=True)
    g.add_drive_opts(os.fspath(every), format="raw", cachemode="unsafe", label="every")
    g.add_drive_opts(os.fspath(scratch), format="raw", cachemode="unsafe", label="scratch")
    g.launch()
    script = f"""exec 2>/dev/null; udevadm control --stop-exec-queue
    every=$(readlink -f /dev/disk/guestfs/every) disk=$(readlink -f /dev/disk/guestfs/scratch)
    for i in {" ".join(map(str, range(len(tables))))}; do
        dd if=$every of=$disk bs=1M skip=$i count=1 conv=fsync
        blockdev --rereadpt $disk
        for part in /sys/block/${{disk#/dev/}}/sd*; do
            [ -e $part ] && echo "$i $(cat $part/partition $part/start $part/size | xargs)"
        done
    done; udevadm control --start-exec-queue; true"""
    lines = g.debug("sh", [script]).splitlines()
    g.shutdown()
    g.close()
    found: dict[str, Any] = {name: {} for name in tables}
    for line in lines:
        index, number, start, size = map(int, line.split())
        found[[*tables][index]][number] = (start * 512, size * 512)
    return found


@pytest.mark.slow
def test_the_same_as_linux(tables: dict[str, bytes], seen: dict[str, Any], tmp_path: Path) -> None:
    sure, wrong = set(), {}
    for name, data in tables.items():
        path = tmp_path / "disk"
        path.write_bytes(data)
        try:
            parts = read_parts(FileDisk(str(path)), 512)
        except Uncertain:
            continue
        found = {number: part[:2] for number, part in parts.items()}
        if found != seen[name]:
            wrong[name] = (found, seen[name])
        sure.add(name)
    assert not wrong
    assert sure >= CERTAIN
    assert len(sure) > len(tables) // 4
    assert sum(map(bool, seen.values())) > len(tables) // 2
