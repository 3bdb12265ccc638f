"""How long it takes to start."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

from bench.programs import MIB, NBDTOOL, command, first_byte, random_file, seconds
from bench.race import SECONDS, Race, cost, extra_ms, row


@row("version", "`nbdtool --version`", {"Python importing argparse": cost(1.6)}, rounds=25)
def version(directory: Path) -> Iterator[Race]:
    bare = partial(seconds, "/usr/bin/python3", "-I", "-c", "import argparse")
    yield Race(
        SECONDS,
        {"nbdtool": partial(seconds, NBDTOOL, "--version"), "Python importing argparse": bare},
    )


@row("first-byte", "from start to the first byte served", {"nbdkit file": extra_ms(100)}, rounds=15)
def first(directory: Path) -> Iterator[Race]:
    image = random_file(directory / "image", MIB)
    path = directory / "socket"
    yield Race(
        SECONDS,
        {
            server: partial(first_byte, command(server, image, path), path)
            for server in ("nbdtool", "nbdkit file")
        },
    )
