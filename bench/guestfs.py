"""What is inside a disk, through libguestfs' appliance and without it, beside nbdkit's plugin.

nbdkit starts an appliance for each client, so each server has one client that stays; what is timed
are the client's requests alone. The times are of as much as a GiB, or as one request, takes.
"""

from __future__ import annotations

import contextlib
import os
import random
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, Callable

from bench.programs import NBDTOOL, command, first_byte, random_file, run, seconds, serving, uri
from bench.race import SECONDS, Measure, Race, cost, faster, row

MIB, GIB = 1 << 20, 1 << 30
FILE = 256 * MIB
PEER = "nbdkit guestfs"
DEVICE = ("export=/dev/sda1",)
IN_EXT4 = ("mount=/dev/sda1", "export=/file")


def make_disk(directory: Path) -> Path:
    """A raw disk with a partition that has an ext4 filesystem with a file of data."""
    tree = directory / "tree"
    tree.mkdir()
    random_file(tree / "file", FILE)
    disk = directory / "disk"
    with disk.open("wb") as file:
        file.truncate(FILE + 64 * MIB)
    run("sfdisk", "--quiet", disk, input="label: gpt\n,\n")
    size = f"{(FILE + 62 * MIB) >> 10}k"
    run("mke2fs", "-q", "-t", "ext4", "-d", tree, "-E", f"offset={MIB}", disk, size)
    return disk


@contextlib.contextmanager
def clients(directory: Path, *what: str) -> Iterator[dict[str, Any]]:
    """A connection to ours through the appliance, and one to nbdkit's; they stay."""
    import nbd  # type: ignore[import-untyped]

    os.environ.setdefault("LIBGUESTFS_BACKEND", "direct")
    os.environ.setdefault("LIBGUESTFS_BACKEND_SETTINGS", "force_tcg")
    disk = make_disk(directory)
    words = {
        "nbdtool": [NBDTOOL, "guestfs", f"disk={disk}", *what, "-r", "--direct=never", "-U"],
        PEER: ["nbdkit", "-f", "-r", "guestfs", "format=raw", f"disk={disk}", *what, "-U"],
    }
    with contextlib.ExitStack() as stack:
        opened = {}
        for number, (name, line) in enumerate(words.items()):
            path = directory / f"socket{number}"
            stack.enter_context(serving([*line, str(path)], path))
            opened[name] = nbd.NBD()
            opened[name].connect_uri(uri(directory, path.name))
            stack.callback(opened[name].shutdown)  # nbdkit waits for it
        yield opened


class Reader:
    """Reads on where it stopped, so that nothing is read twice."""

    def __init__(self, handle: Any, length: int) -> None:
        self._handle, self._length = handle, length
        self._offset = 8 * MIB
        self._random = random.Random(0)

    def next(self) -> None:
        if self._offset + self._length > self._handle.get_size():
            self._offset = 0
        self._handle.pread(self._length, self._offset)
        self._offset += self._length

    def any(self) -> None:
        places = self._handle.get_size() // self._length
        self._handle.pread(self._length, self._random.randrange(places) * self._length)


def each(reads: Callable[[], None], limit: float = 1.0) -> float:
    """Seconds of one read, after one that isn't timed."""
    reads()
    count, began = 0, time.perf_counter()
    while time.perf_counter() - began < limit:
        reads()
        count += 1
    return (time.perf_counter() - began) / count


def copied(handle: Any) -> float:
    """Seconds to read all as nbdcopy does: 64 requests of 256 KiB at a time."""
    import nbd

    piece, size = 256 << 10, handle.get_size()
    began = time.perf_counter()
    offset = 0
    while offset < size or handle.aio_in_flight():
        while offset < size and handle.aio_in_flight() < 64:
            count = min(piece, size - offset)
            handle.aio_pread(nbd.Buffer(count), offset, completion=lambda error: 1)
            offset += count
        handle.poll(-1)
    return time.perf_counter() - began


def reads_row(
    name: str,
    what: str,
    goal: float,
    words: tuple[str, ...],
    length: int,
    read: Callable[[Reader], Any],
) -> None:
    """A row of reads of `length` bytes; read does one."""

    @row(name, f"guestfs, {what}", {PEER: faster(goal)}, rounds=3)
    def reads(directory: Path) -> Iterator[Race]:
        with clients(directory, *words) as opened:
            readers = {name: Reader(handle, length) for name, handle in opened.items()}
            yield Race(
                SECONDS, {name: partial(each, partial(read, r)) for name, r in readers.items()}
            )


reads_row(
    "guestfs-sequential",
    "a device through the appliance: 256 KiB, sequential",
    10,
    DEVICE,
    256 << 10,
    Reader.next,
)
reads_row(
    "guestfs-random", "a device through the appliance: 4 KiB, random", 20, DEVICE, 4096, Reader.any
)
reads_row(
    "guestfs-file-ahead",
    "a file through the appliance: 4 KiB, sequential, depth 1",
    5,
    IN_EXT4,
    4096,
    Reader.next,
)


@row(
    "guestfs-file-copy",
    "guestfs, a file of 256 MiB through the appliance: as nbdcopy reads it",
    {PEER: faster(1.3)},
    rounds=3,
)
def file_copy(directory: Path) -> Iterator[Race]:
    with clients(directory, *IN_EXT4) as opened:
        yield Race(SECONDS, {name: partial(copied, handle) for name, handle in opened.items()})


@row(
    "guestfs-second",
    "guestfs, through the appliance: a second client's first read while one copies",
    {"a limit": cost(1)},
    rounds=3,
)
def second(directory: Path) -> Iterator[Race]:
    import nbd

    with clients(directory, *DEVICE) as opened:

        def measure() -> float:
            thread = threading.Thread(target=copied, args=(opened["nbdtool"],))
            thread.start()
            time.sleep(0.5)
            began = time.perf_counter()
            other = nbd.NBD()
            other.connect_uri(uri(directory, "socket0"))
            other.pread(4096, 0)
            took = time.perf_counter() - began
            thread.join()
            return took

        yield Race(SECONDS, {"nbdtool": measure, "a limit": lambda: 1.0})


def ready_row(name: str, what: str, *words: str) -> None:
    @row(
        name,
        f"guestfs, {what}, read directly: from start to the first byte served",
        {"a limit": cost(1)},
        rounds=5,
    )
    def ready(directory: Path) -> Iterator[Race]:
        disk, path = make_disk(directory), directory / "socket"
        line = [NBDTOOL, "guestfs", f"disk={disk}", *words, "-r", "--direct=only", "-U", str(path)]
        contestants: dict[str, Measure] = {
            "nbdtool": partial(first_byte, line, path),
            "a limit": lambda: 0.3,
        }
        yield Race(SECONDS, contestants)


ready_row("guestfs-ready-partition", "a partition", *DEVICE)
ready_row("guestfs-ready-file", "a file in ext4", *IN_EXT4)


@row(
    "guestfs-direct-copy",
    "guestfs, a partition read directly: nbdcopy, for each GiB",
    {PEER: faster(100), "nbdtool file": faster(0.8)},
    rounds=3,
)
def direct_copy(directory: Path) -> Iterator[Race]:
    with clients(directory, *DEVICE) as opened:
        disk = directory / "disk"
        words = [NBDTOOL, "guestfs", f"disk={disk}", *DEVICE, "-r", "--direct=only", "-U"]
        sockets = [directory / "direct", directory / "file"]
        with (
            serving([*words, str(sockets[0])], sockets[0]),
            serving(command("nbdtool", disk, sockets[1], "-r"), sockets[1]),
        ):
            part, reader = opened["nbdtool"].get_size(), Reader(opened[PEER], 256 << 10)

            def copy(path: Path, size: int) -> float:
                return seconds("nbdcopy", uri(directory, path.name), "null:") * GIB / size

            contestants: dict[str, Measure] = {
                "nbdtool": partial(copy, sockets[0], part),
                PEER: lambda: each(reader.next) * GIB / (256 << 10),
                "nbdtool file": partial(copy, sockets[1], disk.stat().st_size),
            }
            yield Race(SECONDS, contestants)
