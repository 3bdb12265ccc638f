"""Serving a raw file to nbdcopy and fio, over a Unix socket, from the page cache."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from bench.programs import (
    BLOCK,
    bare_sendfile,
    command,
    fio,
    random_file,
    run,
    seconds,
    serving,
    uri,
)
from bench.race import RATE, SECONDS, Measure, Race, faster, row

GIB = 1 << 30
SERVERS = ("nbdtool", "nbdkit file", "qemu-nbd")


@contextlib.contextmanager
def reading(
    directory: Path, image: Path, servers: tuple[str, ...] = SERVERS, *options: str
) -> Iterator[dict[str, str]]:
    """Each server serves the same image, read-only; their URIs by name."""
    with serve_all(directory, dict.fromkeys(servers, image), "-r", *options) as uris:
        yield uris


@contextlib.contextmanager
def writing(directory: Path, size: int) -> Iterator[dict[str, str]]:
    """Each server serves an image of its own, full of data; their URIs by name."""
    images = {server: random_file(directory / f"image of {server}", size) for server in SERVERS}
    with serve_all(directory, images) as uris:
        yield uris


@contextlib.contextmanager
def serve_all(directory: Path, images: dict[str, Path], *options: str) -> Iterator[dict[str, str]]:
    with contextlib.ExitStack() as stack:
        uris = {}
        for number, (server, image) in enumerate(images.items()):
            path = directory / f"socket{number}"
            stack.enter_context(serving(command(server, image, path, *options), path))
            uris[server] = uri(directory, path.name)
        yield uris


def copy_row(connections: int) -> None:
    @row(
        f"nbdcopy-{connections}",
        f"nbdcopy of 1 GiB to null:, {connections} connection{'s'[: connections > 1]}",
        {"nbdkit file": faster(1.4), "qemu-nbd": faster(1.8)},
    )
    def copy(directory: Path) -> Iterator[Race]:
        image = random_file(directory / "image", GIB)
        with reading(directory, image) as uris:
            contestants: dict[str, Measure] = {
                server: partial(seconds, "nbdcopy", f"--connections={connections}", uri, "null:")
                for server, uri in uris.items()
            }
            contestants["bare sendfile, 256 KiB pieces"] = partial(bare_sendfile, image)
            yield Race(SECONDS, contestants)


@row(
    "nbdcopy-write",
    "nbdcopy of 1 GiB of data into the file",
    {"nbdkit file": faster(1.0), "qemu-nbd": faster(1.2)},
)
def copy_into(directory: Path) -> Iterator[Race]:
    source = random_file(directory / "source", GIB)
    with writing(directory, GIB) as uris:
        yield Race(
            SECONDS,
            {server: partial(seconds, "nbdcopy", source, uri) for server, uri in uris.items()},
        )


@row(
    "nbdcopy-sparse",
    "nbdcopy of a 100 GiB image with 100 MiB of data",
    {"nbdkit file": faster(1.0)},
)
def copy_sparse(directory: Path) -> Iterator[Race]:
    image = directory / "image"
    with image.open("wb") as file:
        file.truncate(100 * GIB)
        for number in range(100):
            file.seek(number * GIB)
            file.write(BLOCK)
    with reading(directory, image) as uris:
        yield Race(
            SECONDS,
            {server: partial(seconds, "nbdcopy", uri, "null:") for server, uri in uris.items()},
        )


@row("nbdcopy-tls", "nbdcopy of 1 GiB to null: over TLS", {"nbdkit file": faster(0.8)})
def copy_tls(directory: Path) -> Iterator[Race]:
    image = random_file(directory / "image", GIB)
    certificates = make_certificates(directory / "pki")
    options = ("--tls=require", f"--tls-certificates={certificates}")
    with reading(directory, image, SERVERS[:2], *options) as uris:
        yield Race(
            SECONDS,
            {
                server: partial(
                    seconds,
                    "nbdcopy",
                    uri.replace("nbd+", "nbds+") + f"&tls-certificates={certificates}",
                    "null:",
                )
                for server, uri in uris.items()
            },
        )


def make_certificates(directory: Path) -> Path:
    """A CA and a server certificate for localhost, in the file names that NBD's servers share."""
    directory.mkdir()
    key = ("-newkey", "rsa:2048", "-nodes", "-sha256", "-days", "2")
    ca = ("-keyout", "ca-key.pem", "-out", "ca-cert.pem", "-subj", "/CN=bench")
    run("openssl", "req", "-x509", *key, *ca, cwd=directory)
    server = ("-keyout", "server-key.pem", "-out", "server.csr", "-subj", "/CN=localhost")
    run("openssl", "req", *key[:3], *server, cwd=directory)
    (directory / "extensions").write_text("subjectAltName=DNS:localhost\n")
    signer = ("-CA", "ca-cert.pem", "-CAkey", "ca-key.pem", "-CAcreateserial", "-days", "2")
    signed = ("-in", "server.csr", "-out", "server-cert.pem", "-extfile", "extensions")
    run("openssl", "x509", "-req", *signer, *signed, cwd=directory)
    return directory


def fio_row(mode: str, depth: int, goal: float) -> None:
    direction = mode.replace("rand", "")

    @row(
        f"fio-{direction}-{depth}",
        f"fio, 4 KiB random {direction}s, depth {depth}",
        {"nbdkit file": faster(goal)} if goal else None,
    )
    def requests(directory: Path) -> Iterator[Race]:
        if mode == "randread":
            servers = reading(directory, random_file(directory / "image", GIB))
        else:
            servers = writing(directory, GIB)
        with servers as uris:
            yield Race(
                RATE, {server: partial(fio, uri, mode, depth) for server, uri in uris.items()}
            )


@row("fio-read-4x16", "fio, 4 KiB random reads, 4 connections at depth 16")
def fio_connections(directory: Path) -> Iterator[Race]:
    image = random_file(directory / "image", GIB)
    with reading(directory, image) as uris:
        yield Race(
            RATE,
            {server: partial(fio, uri, "randread", 16, jobs=4) for server, uri in uris.items()},
        )


copy_row(1)
copy_row(4)
for depth, goal in (1, 0.9), (16, 1.3), (64, 1.3):
    fio_row("randread", depth, goal)
for depth, goal in (1, 0), (16, 1.2), (64, 0):
    fio_row("randwrite", depth, goal)
