"""Disks of libvirt guests, beside nbdkit's plugin, from a libvirtd of the benchmark's own."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Callable

from bench.programs import NBDTOOL, command, fio, random_file, seconds, serving, uri
from bench.race import RATE, SECONDS, Measure, Race, faster, row
from tests.libvirt.rig import Proxy, Rig, disk

GIB = 1 << 30
PEER = "nbdkit libvirt"
DELAY = 0.01  # seconds, each way

ONE_AT_A_TIME = ("--connections=1", "--requests=1", "--request-size=65536")


@contextlib.contextmanager
def guest(directory: Path, size: int, *, running: bool = False) -> Iterator[Rig]:
    """A libvirtd with the guest `bench`, which has a raw disk full of data."""
    directory.chmod(0o755)  # the guest's qemu has another user
    rig = Rig(directory / "rig")
    image = random_file(rig.images / "image", size)
    image.chmod(0o666)
    rig.start()
    try:
        with rig.guest("bench", disk(image), start=running):
            yield rig
    finally:
        rig.close()


@contextlib.contextmanager
def served(
    directory: Path, connect: str, *options: str, image: Path | None = None
) -> Iterator[dict[str, str]]:
    """Ours, nbdkit's, and our file source if there is an image; their URIs by name."""
    sockets = [directory / f"socket{number}" for number in range(3)]
    guest_words = (f"connect={connect}", "domain=bench", "disk=vda")
    ours = [NBDTOOL, "libvirt", *guest_words, *options, "-f", "-U", str(sockets[0])]
    servers = {
        "nbdtool": ours,
        PEER: ["nbdkit", "-f", "-U", str(sockets[1]), "libvirt", *guest_words],
    }
    if image is not None:
        servers["nbdtool file"] = command("nbdtool", image, sockets[2], "-r")
    with contextlib.ExitStack() as stack:
        uris = {}
        for (name, words), path in zip(servers.items(), sockets):
            stack.enter_context(serving(words, path))
            uris[name] = uri(directory, path.name)
        yield uris


def racing(unit: str, uris: dict[str, str], measure: Callable[[str], float]) -> Race:
    contestants: dict[str, Measure] = {name: partial(measure, uri) for name, uri in uris.items()}
    return Race(unit, contestants)


def copied(*options: str) -> Callable[[str], float]:
    return lambda uri: seconds("nbdcopy", *options, uri, "null:")


def peek_row(name: str, what: str, goal: float, unit: str, measure: Callable[[str], float]) -> None:
    @row(name, f"libvirt, peek: {what}", {PEER: faster(goal)}, rounds=5)
    def peek(directory: Path) -> Iterator[Race]:
        with guest(directory, GIB) as rig, served(directory, rig.uri, "method=peek") as uris:
            yield racing(unit, uris, measure)


peek_row("libvirt-copy", "nbdcopy of 1 GiB to null:", 1.5, SECONDS, copied())
peek_row(
    "libvirt-fio-16",
    "fio, 4 KiB random reads, depth 16",
    2,
    RATE,
    lambda uri: fio(uri, "randread", 16),
)
peek_row(
    "libvirt-sequential",
    "1 GiB, 64 KiB at a time, depth 1",
    2.5,
    SECONDS,
    copied(*ONE_AT_A_TIME),
)


@row(
    "libvirt-delayed",
    "libvirt, peek: 32 MiB, 64 KiB at a time, link delayed by 10 ms each way",
    {PEER: faster(5)},
    rounds=3,
)
def delayed(directory: Path) -> Iterator[Race]:
    with guest(directory, 32 << 20) as rig:
        way = Proxy(rig.port, DELAY)
        with contextlib.closing(way), served(directory, way.uri) as uris:
            yield racing(SECONDS, uris, copied(*ONE_AT_A_TIME))


@row(
    "libvirt-local",
    "libvirt, local: nbdcopy of 1 GiB to null:",
    {PEER: faster(3), "nbdtool file": faster(0.9)},
    rounds=5,
)
def local(directory: Path) -> Iterator[Race]:
    with (
        guest(directory, GIB) as rig,
        served(directory, rig.uri, image=rig.images / "image") as uris,
    ):
        yield racing(SECONDS, uris, copied())


@row(
    "libvirt-backup",
    "libvirt, backup of a running guest: nbdcopy of 1 GiB to null:, 4 connections",
    {PEER: faster(2)},
    rounds=5,
)
def backup(directory: Path) -> Iterator[Race]:
    scratch = f"--scratch-dir={directory}"
    with (
        guest(directory, GIB, running=True) as rig,
        served(directory, rig.uri, "method=backup", scratch) as uris,
    ):
        yield racing(SECONDS, uris, copied("--connections=4"))
