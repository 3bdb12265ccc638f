"""Disks with sectors that can't be read, what was asked of their server, and what maps say."""

from __future__ import annotations

import contextlib
import itertools
import random
import re
import socket
import subprocess
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

SECTOR = 512
MIB = 1 << 20


def read_map(path: Path) -> str:
    """The states of all sectors by a map file, a character for each; what is a comment isn't."""
    lines = [line.split() for line in path.read_text().splitlines() if not line.startswith("#")]
    states, end = [], 0
    for start, length, state in lines[1:]:
        assert int(start, 0) == end
        end += int(length, 0)
        states.append(state * (int(length, 0) // SECTOR))
        assert int(length, 0) % SECTOR == 0
    return "".join(states)


def write_map(path: Path, states: str) -> Path:
    """A map file with these states of sectors."""
    lines, at = ["0x0 ? 1"], 0
    for state, group in itertools.groupby(states):
        length = len(list(group)) * SECTOR
        lines.append(f"0x{at:X} 0x{length:X} {state}")
        at += length
    path.write_text("\n".join(lines) + "\n")
    return path


def faults(sectors: int, *, scattered: float = 0, areas: Iterable[tuple[int, int]] = ()) -> str:
    """A state for each sector: bad at random, and in areas (first sector, how many)."""
    generator = random.Random(sectors)
    states = ["-" if generator.random() < scattered else "+" for _ in range(sectors)]
    for first, count in areas:
        states[first : first + count] = "-" * count
    return "".join(states)


class Read(NamedTuple):
    start: int
    end: int
    good: bool


class Source(NamedTuple):
    """An NBD server; log is nbdkit's of its requests."""

    uri: str
    log: Path
    sectors: int

    def reads(self) -> list[Read]:
        """What was asked of it and answered."""
        asked, found = {}, []
        for line in self.log.read_text().splitlines():
            request = re.search(r"connection=(\d+) Read id=(\S+) offset=(\S+) count=(\S+)", line)
            if request:
                start = int(request[3], 0)
                asked[request[1], request[2]] = (start, start + int(request[4], 0))
            reply = re.search(r"connection=(\d+) \.\.\.Read id=(\S+) return=(\S+)", line)
            if reply:
                found.append(Read(*asked.pop((reply[1], reply[2])), reply[3] == "0"))
        return found

    def good(self) -> list[int]:
        """How many times each sector was read, and the read went well."""
        return self._count(good=True)

    def bad(self) -> list[int]:
        """How many times each sector was in a read that failed."""
        return self._count(good=False)

    def _count(self, *, good: bool) -> list[int]:
        reads = [read for read in self.reads() if read.good == good]
        counts = [0] * self.sectors
        for start, end, _ in reads:
            for sector in range(start // SECTOR, end // SECTOR):
                counts[sector] += 1
        return counts


@contextlib.contextmanager
def nbdkit(where: Path, *words: Any) -> Iterator[str]:
    """The URI of what nbdkit serves, until it is killed."""
    path = where / "socket"
    path.unlink(missing_ok=True)
    process = subprocess.Popen(
        ["nbdkit", "-f", "-U", path, *map(str, words)], stderr=subprocess.DEVNULL
    )
    try:
        for _ in range(1000):
            with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as probe:
                probe.connect(str(path))
                break
            assert process.poll() is None
            time.sleep(0.01)
        yield f"nbd+unix:///?socket={path}"
    finally:
        process.kill()
        process.wait()


@contextlib.contextmanager
def failing(image: Path, states: str, where: Path, *more: str) -> Iterator[Source]:
    """A server of an image whose sectors fail where states say so; more of nbdkit's arguments."""
    words = ["--filter=log", *(word for word in more if word.startswith("-")), "--filter=ddrescue"]
    words += ["file", str(image), f"ddrescue-mapfile={write_map(where / 'bad', states)}"]
    words += [f"logfile={where / 'log'}", "logappend=true"]
    words += [word for word in more if not word.startswith("-")]
    with nbdkit(where, *words) as uri:
        yield Source(uri, where / "log", len(states))


@contextlib.contextmanager
def mounted(uri: str, where: Path) -> Iterator[Path]:
    """An NBD export as a file, by FUSE."""
    where.mkdir(exist_ok=True)
    file, pid = where / "disk", where.with_suffix(".pid")
    file.touch()
    process = subprocess.Popen(["nbdfuse", "-r", "-P", pid, file, uri], stderr=subprocess.DEVNULL)
    try:
        while not (pid.exists() and pid.read_text()):
            assert process.poll() is None
            time.sleep(0.01)
        yield file
    finally:
        subprocess.run(["umount", "-l", file], check=False)
        process.kill()
        process.wait()


@contextlib.contextmanager
def scripted(image: Path, where: Path, fault: str) -> Iterator[Source]:
    """A server that runs shell commands for each read: $1 and $2 are its start and its end.

    They call `fail $1 $2` for a read that fails. TMP is a directory of their own.
    """
    log, script, store = where / "log", where / "script", where / "store"
    store.mkdir(exist_ok=True)
    script.write_text(f"""
set -- $4 $(($3 + $4))
TMP={store}
read="connection=1 Read id=$1.$2.$$ offset=$1 count=$(($2 - $1))"
fail() {{ echo "$read
connection=1 ...Read id=$1.$2.$$ return=-1" >> {log}; echo EIO >&2; exit 1; }}
{fault}
echo "$read
connection=1 ...Read id=$1.$2.$$ return=0" >> {log}
dd status=none if={image} iflag=skip_bytes,count_bytes skip=$1 count=$(($2 - $1)) bs=1M
""")
    log.touch()
    size = image.stat().st_size
    words = [f"get_size=echo {size}", f"pread=. {script}", "thread_model=echo parallel"]
    with nbdkit(where, "eval", *words) as uri:
        yield Source(uri, log, size // SECTOR)
