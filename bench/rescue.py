"""Rescues: of a healthy file, and of one with bad sectors all over it."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from bench.programs import NBDTOOL, random_file, seconds, serving, uri
from bench.race import SECONDS, Race, faster, row

GIB = 1 << 30
SECTOR = 512
FIRST = 10  # seconds


def fresh(directory: Path) -> tuple[Path, Path]:
    """Where a target and its map go, without those of the last run."""
    target, mapfile = directory / "target", directory / "map"
    target.unlink(missing_ok=True)
    mapfile.unlink(missing_ok=True)
    return target, mapfile


def ours(image: Path, directory: Path) -> list[Any]:
    target, mapfile = fresh(directory)
    return [NBDTOOL, "file", image, "--to-file", target, "--rescue", mapfile]


def theirs(image: Path, directory: Path, *options: str) -> list[Any]:
    return ["ddrescue", *options, image, *fresh(directory)]


@row("rescue-healthy", "a healthy 1 GiB file with --rescue", {"ddrescue": faster(1.5)})
def healthy(directory: Path) -> Iterator[Race]:
    image = random_file(directory / "image", GIB)

    def run(words: Any) -> float:
        return seconds(*words(image, directory))

    yield Race(SECONDS, {"nbdtool": partial(run, ours), "ddrescue": partial(run, theirs)})


def write_faults(path: Path) -> None:
    """A map file by which 1 % of the sectors of 1 GiB are bad."""
    generator = random.Random(1)
    lines, end = ["0 ? 1"], 0
    for sector in sorted(generator.sample(range(GIB // SECTOR), GIB // SECTOR // 100)):
        start = sector * SECTOR
        if start > end:
            lines.append(f"{end} {start - end} +")
        lines.append(f"{start} {SECTOR} -")
        end = start + SECTOR
    lines.append(f"{end} {GIB - end} +")
    path.write_text("\n".join(lines))


def rescued(words: list[Any], mapfile: Path) -> float:
    """Seconds for each GiB that is rescued in the first of them."""
    process = subprocess.Popen(
        [os.fspath(word) for word in words], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    began = time.monotonic()
    try:
        process.wait(FIRST)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)
    elapsed = min(time.monotonic() - began, FIRST)
    process.wait()
    lines = [line.split() for line in mapfile.read_text().splitlines() if line[0] != "#"]
    done = sum(int(size, 0) for _, size, state in lines[1:] if state == "+")
    return elapsed / done * GIB


@row(
    "rescue-scattered",
    f"1 % bad sectors all over 1 GiB: for each GiB, by what the first {FIRST} s bring",
    {"ddrescue": faster(1), "ddrescue -d": faster(1)},
    rounds=3,
)
def scattered(directory: Path) -> Iterator[Race]:
    image, faults = random_file(directory / "image", GIB), directory / "faults"
    write_faults(faults)
    socket, file = directory / "nbd", directory / "fuse"
    file.touch()
    words = ["nbdkit", "-f", "-U", socket, "--filter=ddrescue", "file", image]
    with serving([*map(str, words), f"ddrescue-mapfile={faults}"], socket):
        mount = subprocess.Popen(
            ["nbdfuse", "-r", file, uri(directory, "nbd")], stderr=subprocess.DEVNULL
        )
        try:
            while file.stat().st_size < GIB:
                time.sleep(0.01)

            def run(words: Any, *options: str) -> float:
                return rescued(words(file, directory, *options), directory / "map")

            yield Race(
                SECONDS,
                {
                    "nbdtool": partial(run, ours),
                    "ddrescue": partial(run, theirs),
                    "ddrescue -d": partial(run, theirs, "-d"),
                },
            )
        finally:
            subprocess.run(["umount", "-l", file], check=False)
            mount.terminate()
            mount.wait()
