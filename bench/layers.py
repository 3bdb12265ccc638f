"""Layers: qcow2 images, plain and compressed, partitions and overlays; served and written."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from bench.programs import NBDTOOL, fio, random_file, run, seconds, serving, uri
from bench.race import RATE, SECONDS, Race, faster, row

GIB = 1 << 30


@contextlib.contextmanager
def reading(directory: Path, image: Path) -> Iterator[dict[str, str]]:
    """nbdtool and qemu-nbd serve what is in the image; their URIs by name."""
    commands: dict[str, list[Any]] = {
        "nbdtool": [NBDTOOL, "file", image, "--qcow2", "-r", "-U"],
        "qemu-nbd": ["qemu-nbd", "-r", "-t", "-e", "16", "-f", "qcow2", image, "-k"],
    }
    with started(directory, commands) as uris:
        yield uris


@contextlib.contextmanager
def started(directory: Path, commands: dict[str, list[Any]]) -> Iterator[dict[str, str]]:
    """Servers whose command lines end where the path of their socket belongs; their URIs."""
    with contextlib.ExitStack() as stack:
        uris = {}
        for server, words in commands.items():
            path = directory / server
            stack.enter_context(serving([os.fspath(word) for word in (*words, path)], path))
            uris[server] = uri(directory, server)
        yield uris


def plain(directory: Path) -> Path:
    """A qcow2 image of 1 GiB of data."""
    return convert(random_file(directory / "raw", GIB))


def compressed(directory: Path) -> Path:
    """A compressed qcow2 image of 512 MiB of programs and texts."""
    raw = directory / "raw"
    archive = "tar -C /usr -cf - bin lib share 2>/dev/null"
    run("sh", "-c", f'{archive} | head -c {GIB // 2} > "$1"', "sh", raw)
    return convert(raw, "-c")


def convert(raw: Path, *options: str) -> Path:
    image = raw.with_name("image")
    run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", *options, raw, image)
    raw.unlink()
    return image


def copy_row(name: str, connections: int) -> None:
    make = {"plain": plain, "zlib": compressed}[name]

    @row(
        f"qcow2-{name}-{connections}",
        f"nbdcopy of a {name} qcow2 to null:, {connections} connection{'s'[: connections > 1]}",
        {"qemu-nbd": faster(1.2)},
    )
    def copy(directory: Path) -> Iterator[Race]:
        with reading(directory, make(directory)) as uris:
            yield Race(
                SECONDS,
                {
                    server: partial(
                        seconds, "nbdcopy", f"--connections={connections}", uri, "null:"
                    )
                    for server, uri in uris.items()
                },
            )


def to_file_row(name: str, goal: float) -> None:
    make = {"plain": plain, "zlib": compressed}[name]

    @row(
        f"qcow2-{name}-to-file",
        f"a {name} qcow2 to a raw file",
        {"qemu-img convert": faster(goal)},
    )
    def write(directory: Path) -> Iterator[Race]:
        image, target = make(directory), directory / "target"
        convert = ["qemu-img", "convert", "-f", "qcow2", "-O", "raw", image, target]
        yield Race(
            SECONDS,
            {
                "nbdtool": partial(seconds, NBDTOOL, "file", image, "--qcow2", "--to-file", target),
                "qemu-img convert": partial(seconds, *convert),
            },
        )


@row(
    "qcow2-fio-16",
    "fio, 4 KiB random reads of a plain qcow2, depth 16",
    {"qemu-nbd": faster(2)},
)
def requests(directory: Path) -> Iterator[Race]:
    with reading(directory, plain(directory)) as uris:
        yield Race(
            RATE, {server: partial(fio, uri, "randread", 16) for server, uri in uris.items()}
        )


@row(
    "partition-fio-16",
    "fio, 4 KiB random reads of a partition, depth 16",
    {"qemu-nbd": faster(3)},
)
def partition(directory: Path) -> Iterator[Race]:
    image = random_file(directory / "disk", GIB)
    run("sfdisk", "--quiet", "--label", "gpt", image, input="start=1MiB, size=1000MiB\n")
    window = f"driver=raw,offset={1 << 20},size={1000 << 20},file.driver=file,file.filename={image}"
    commands: dict[str, list[Any]] = {
        "nbdtool": [NBDTOOL, "file", image, "--partition", "1", "-r", "-U"],
        "qemu-nbd": ["qemu-nbd", "-r", "-t", "-e", "16", "--image-opts", window, "-k"],
    }
    with started(directory, commands) as uris:
        yield Race(
            RATE, {server: partial(fio, uri, "randread", 16) for server, uri in uris.items()}
        )


@row(
    "cow-fio-16",
    "fio, 4 KiB random writes to an overlay, depth 16",
    {"nbdkit-cow": faster(1)},
)
def overlay(directory: Path) -> Iterator[Race]:
    image = random_file(directory / "disk", GIB)
    commands: dict[str, list[Any]] = {
        "nbdtool": [NBDTOOL, "file", image, "--cow", "-U"],
        "nbdkit-cow": ["nbdkit", "-f", "--filter=cow", "file", image, "-U"],
    }
    with started(directory, commands) as uris:
        yield Race(
            RATE, {server: partial(fio, uri, "randwrite", 16) for server, uri in uris.items()}
        )


copy_row("plain", 1)
copy_row("plain", 4)
copy_row("zlib", 4)
to_file_row("plain", 1.0)
to_file_row("zlib", 1.2)
