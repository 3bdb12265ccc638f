"""The NBD client against real servers."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import random
import subprocess
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Callable

import pytest

from nbdtool.disk import DATA, HOLE, Extent, read_bytes
from nbdtool.disks.nbd import NbdDisk
from nbdtool.disks.nbd.uri import Address
from nbdtool.errors import Error

MIB = 1 << 20
SIZE = 8 * MIB + 512


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory, random_file: Callable[..., Path]) -> Path:
    """Data, a hole, data to the end."""
    path = random_file(tmp_path_factory.mktemp("nbd") / "image", 3 * MIB)
    with path.open("r+b") as file:
        file.truncate(SIZE)
        file.seek(6 * MIB)
        file.write(b"tail" * ((SIZE - 6 * MIB) // 4))
    return path


@contextlib.contextmanager
def opened(uri: str, **options: Any) -> Iterator[NbdDisk]:
    disk = NbdDisk(uri, **options)
    try:
        yield disk
    finally:
        disk.close()


SERVERS = {
    "qemu": ("qemu-nbd", "-r", "-f", "raw"),
    "nbdkit": ("nbdkit", "-r", "file"),
    "simple replies": ("nbdkit", "-r", "--no-sr", "file"),
    "oldstyle": ("nbdkit", "-r", "--oldstyle", "file"),
    "newstyle that isn't fixed": ("nbdkit", "-r", "--mask-handshake=0", "file"),
    "blocks of 4 KiB": (
        *("nbdkit", "-r", "--filter=blocksize-policy", "file", "blocksize-minimum=512"),
        *("blocksize-preferred=4096", "blocksize-maximum=65536", "blocksize-error-policy=error"),
    ),
}


@pytest.mark.parametrize("server", SERVERS.values(), ids=SERVERS)
def test_reads_what_is_there(server: tuple[str, ...], nbd_server: Any, image: Path) -> None:
    expected = image.read_bytes()
    generator = random.Random(1)
    with nbd_server(*server, image) as uri, opened(uri) as disk:
        assert disk.size == SIZE and not disk.writable
        assert read_bytes(disk, 0, SIZE) == expected
        for _ in range(200):
            offset = generator.randrange(SIZE)
            length = generator.randint(1, min(SIZE - offset, 300_000))
            assert read_bytes(disk, offset, length) == expected[offset : offset + length]


def test_block_sizes_are_the_servers(nbd_server: Any, image: Path) -> None:
    with nbd_server(*SERVERS["blocks of 4 KiB"], image) as uri, opened(uri) as disk:
        assert disk.block_size == (512, 4096, 65536)


@pytest.mark.parametrize("server", ["qemu", "nbdkit", "simple replies"])
def test_extents(server: str, nbd_server: Any, image: Path) -> None:
    with nbd_server(*SERVERS[server], image) as uri, opened(uri) as disk:
        whole = [Extent(3 * MIB, DATA), Extent(3 * MIB, HOLE), Extent(2 * MIB + 512, DATA)]
        if server == "simple replies":
            whole = [Extent(SIZE, DATA)]
        assert list(disk.extents(0, SIZE)) == whole
        if server != "simple replies":
            inside = [Extent(4096, DATA), Extent(8192, HOLE)]
            assert list(disk.extents(3 * MIB - 4096, 12288)) == inside


@pytest.mark.parametrize("connections", [1, 4])
@pytest.mark.parametrize("server", ["qemu", "nbdkit"])
def test_threads_share_connections(
    server: str, connections: int, nbd_server: Any, image: Path
) -> None:
    expected = image.read_bytes()

    def work(seed: int) -> None:
        generator = random.Random(seed)
        for _ in range(30):
            batch = []
            for _ in range(generator.randint(1, 20)):
                offset = generator.randrange(SIZE - 1)
                batch.append((offset, generator.randint(1, min(SIZE - offset, 100_000))))
            disk.prefetch(batch)
            for offset, length in batch:
                assert read_bytes(disk, offset, length) == expected[offset : offset + length]

    with nbd_server(*SERVERS[server], image) as uri, opened(uri, connections=connections) as disk:
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(work, range(8)))
        assert 1 <= len(disk._open) <= connections


@pytest.mark.parametrize(
    "server", [("qemu-nbd", "--discard=unmap", "-f", "raw"), ("nbdkit", "file")]
)
def test_writes(server: tuple[str, ...], nbd_server: Any, tmp_path: Path) -> None:
    path = tmp_path / "image"
    model = bytearray(4 * MIB)
    path.write_bytes(model)
    generator = random.Random(2)
    with nbd_server(*server, path) as uri, opened(uri, writable=True) as disk:
        assert disk.writable and disk.can_trim
        for step in range(150):
            offset = generator.randrange(len(model))
            length = generator.randint(1, min(len(model) - offset, 300_000))
            if step % 3 == 0:
                disk.zero(offset, length, punch=step % 2 == 0, fast=False)
                model[offset : offset + length] = bytes(length)
            else:
                data = generator.randbytes(length)
                disk.write(offset, memoryview(data))
                model[offset : offset + length] = data
            assert read_bytes(disk, offset, length) == model[offset : offset + length]
        disk.trim(MIB, MIB)
        disk.flush()
        rest = read_bytes(disk, 0, MIB) + read_bytes(disk, 2 * MIB, 2 * MIB)
    assert rest == model[:MIB] + model[2 * MIB :]
    assert path.read_bytes()[:MIB] == model[:MIB]


def test_a_write_makes_what_was_announced_old(nbd_server: Any, tmp_path: Path) -> None:
    path = tmp_path / "image"
    path.write_bytes(bytes(MIB))
    with nbd_server("qemu-nbd", "-f", "raw", path) as uri, opened(uri, writable=True) as disk:
        disk.prefetch([(0, 4096), (8192, 4096)])
        disk.write(1000, memoryview(b"new"))
        assert read_bytes(disk, 0, 4096)[1000:1003] == b"new"
        assert read_bytes(disk, 8192, 4096) == bytes(4096)


def test_large_writes_and_reads_cross_without_a_deadlock(nbd_server: Any, tmp_path: Path) -> None:
    """The server stops reading while its replies aren't taken."""
    path = tmp_path / "image"
    path.write_bytes(bytes(16 * MIB))
    options = {"writable": True, "connections": 1, "patience": 10, "reconnect": 0}
    with nbd_server("qemu-nbd", "-f", "raw", path) as uri, opened(uri, **options) as disk:
        data = memoryview(os.urandom(4 * MIB))
        disk.prefetch([(at * 256 << 10, 256 << 10) for at in range(60)])
        disk.write(12 * MIB, data)
        assert read_bytes(disk, 12 * MIB, 4 * MIB) == data


def test_read_only_export_refuses_writes(nbd_server: Any, image: Path) -> None:
    with nbd_server("nbdkit", "-r", "file", image) as uri, opened(uri, writable=True) as disk:
        assert not disk.writable
        with pytest.raises(OSError) as raised:
            disk.write(0, memoryview(b"x"))
        assert raised.value.errno == errno.EPERM


@pytest.mark.parametrize("number", ["ENOSPC", "EIO", "ENOMEM"])
def test_errors_of_the_server(number: str, nbd_server: Any, image: Path) -> None:
    filters = (f"error-pread={number}", "error-pread-rate=100%")
    with (
        nbd_server("nbdkit", "--filter=error", "file", *filters, image) as uri,
        opened(uri) as disk,
    ):
        with pytest.raises(OSError, match="read at byte 512") as raised:
            disk.read(512, 10)
        assert raised.value.errno == getattr(errno, number)


# Servers that go


def test_a_server_that_comes_back_is_waited_for(
    nbd_server: Any, image: Path, tmp_path: Path
) -> None:
    path = tmp_path / "socket"
    expected = image.read_bytes()
    with contextlib.ExitStack() as stack:
        with nbd_server(*SERVERS["qemu"], image, path=path) as uri:
            disk = stack.enter_context(opened(uri, reconnect=30))
            assert read_bytes(disk, 0, 4096) == expected[:4096]
            disk.prefetch([(MIB, 4096), (2 * MIB, 4096)])
        read: list[bytes] = []
        thread = threading.Thread(target=lambda: read.append(read_bytes(disk, 0, SIZE)))
        thread.start()
        thread.join(0.5)
        assert thread.is_alive()
        with nbd_server(*SERVERS["qemu"], image, path=path):
            thread.join(30)
            assert read == [expected]
            assert read_bytes(disk, MIB, 4096) == expected[MIB : MIB + 4096]


def test_a_server_that_stays_away(nbd_server: Any, image: Path) -> None:
    with nbd_server(*SERVERS["qemu"], image) as uri:
        disk = NbdDisk(uri, reconnect=0.3)
    with pytest.raises(OSError, match="No such file") as raised:
        disk.read(0, 512)
    assert raised.value.errno == errno.EIO
    disk.close()
    with pytest.raises(OSError, match="closed"):
        disk.read(0, 512)


def test_another_export_is_not_read(nbd_server: Any, image: Path, tmp_path: Path) -> None:
    path, other = tmp_path / "socket", tmp_path / "other"
    other.write_bytes(bytes(MIB))
    with nbd_server(*SERVERS["qemu"], image, path=path) as uri:
        disk = NbdDisk(uri)
    with nbd_server(*SERVERS["qemu"], other, path=path):
        for _ in range(2):
            with pytest.raises(OSError, match="another export"):
                disk.read(0, 512)
    disk.close()


def test_writes_that_a_server_took_with_it_fail_the_next_flush(
    nbd_server: Any, tmp_path: Path
) -> None:
    path, image = tmp_path / "socket", tmp_path / "image"
    image.write_bytes(bytes(MIB))
    with nbd_server("qemu-nbd", "-f", "raw", image, path=path) as uri:
        disk = NbdDisk(uri, writable=True)
        disk.write(0, memoryview(b"first"))
        disk.flush()
    with nbd_server("qemu-nbd", "-f", "raw", image, path=path):
        disk.write(0, memoryview(b"second"))
        disk.flush()  # nothing was lost with the first one
    with nbd_server("qemu-nbd", "-f", "raw", image, path=path):
        disk.write(0, memoryview(b"third"))
    with nbd_server("qemu-nbd", "-f", "raw", image, path=path):
        with pytest.raises(OSError, match="may be lost"):
            disk.flush()
        disk.flush()
        disk.close()


def test_no_such_export(nbd_server: Any, image: Path) -> None:
    with nbd_server("qemu-nbd", "-x", "disk", "-f", "raw", image) as uri:
        with pytest.raises(Error, match="no such export"):
            NbdDisk(uri.replace("?", "other?"))
        with opened(uri.replace("?", "disk?")) as disk:
            assert disk.description.startswith("disk of the NBD server on ")


def test_not_an_nbd_server(tmp_path: Path, run: Callable[..., Any]) -> None:
    import socket

    path = tmp_path / "socket"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()

        def greet() -> None:
            listener.accept()[0].sendall(b"SSH-2.0-OpenSSH_9.2p1 Debian-2\r\n")

        thread = threading.Thread(target=greet)
        thread.start()
        with pytest.raises(Error, match="no NBD server"):
            NbdDisk(f"nbd+unix:///?socket={path}")
        thread.join()


# TLS


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory, run: Callable[..., Any]) -> Path:
    directory = tmp_path_factory.mktemp("pki")
    key = ("-newkey", "rsa:2048", "-nodes", "-days", "2")
    ca = ("-keyout", "ca-key.pem", "-out", "ca-cert.pem", "-subj", "/CN=test")
    run("openssl", "req", "-x509", *key, *ca, cwd=directory)
    own = ("-keyout", "server-key.pem", "-out", "server.csr", "-subj", "/CN=localhost")
    run("openssl", "req", *key[:3], *own, cwd=directory)
    (directory / "extensions").write_text("subjectAltName=DNS:localhost\n")
    signer = ("-CA", "ca-cert.pem", "-CAkey", "ca-key.pem", "-CAcreateserial", "-days", "2")
    signed = ("-in", "server.csr", "-out", "server-cert.pem", "-extfile", "extensions")
    run("openssl", "x509", "-req", *signer, *signed, cwd=directory)
    return directory


def test_tls(nbd_server: Any, image: Path, tmp_path: Path, certificates: Path) -> None:
    copy = tmp_path / "image"
    copy.write_bytes(image.read_bytes())
    expected = image.read_bytes()
    tls = ("--tls=require", f"--tls-certificates={certificates}")
    with nbd_server("nbdkit", *tls, "file", copy) as plain:
        uri = plain.replace("nbd+", "nbds+") + "&tls-certificates="
        with opened(f"{uri}{certificates}", writable=True) as disk:
            data = memoryview(os.urandom(2 * MIB))
            ranges = [(at * 100_000, 100_000) for at in range(60)]
            disk.prefetch(ranges)
            for offset, length in ranges:
                assert read_bytes(disk, offset, length) == expected[offset : offset + length]
            disk.write(MIB, data)
            assert read_bytes(disk, MIB, 2 * MIB) == data
        with pytest.raises(Error, match="insists on TLS"):
            NbdDisk(plain)
        with pytest.raises(Error, match="certificate"):
            NbdDisk(uri.partition("&")[0])
        with pytest.raises(Error, match=r"mismatch|isn't valid|not valid"):
            NbdDisk(f"{uri}{certificates}&tls-hostname=elsewhere")
        with opened(uri.partition("&")[0] + "&tls-verify-peer=false") as disk:
            assert disk.size == SIZE
    with nbd_server("nbdkit", "file", copy) as plain, pytest.raises(Error, match="has no TLS"):
        NbdDisk(plain.replace("nbd+", "nbds+"))


# URIs


@pytest.mark.parametrize(
    ("uri", "address"),
    [
        ("nbd://host", Address(host="host")),
        ("nbd://host:123/an%20export/x", Address("an export/x", host="host", port=123)),
        ("nbd://[::1]:5/", Address(host="::1", port=5)),
        ("nbd+unix:///?socket=/a%20b", Address(path="/a b")),
        ("nbd://?socket=/a", Address(path="/a")),
        ("nbds+unix:///x?socket=/a", Address("x", "/a", tls=True)),
    ],
)
def test_uri(uri: str, address: Address) -> None:
    assert Address.parse(uri) == address


@pytest.mark.parametrize(
    "uri", ["", "host", "http://host/", "nbd+unix:///", "nbd://host:port/", "nbd://h/?wrong=1"]
)
def test_not_a_uri(uri: str) -> None:
    with pytest.raises(Error):
        Address.parse(uri)


def test_over_tcp(image: Path, serve: Callable[..., Any]) -> None:
    with serve("file", image, "-r", tcp=True) as server, opened(server.uri) as disk:
        assert read_bytes(disk, 0, SIZE) == image.read_bytes()


def test_structured_zeroes_stay_holes(image: Path, serve: Callable[..., Any]) -> None:
    """What the server sends as a hole isn't made into bytes."""
    from nbdtool.disk import ZeroSpan

    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", f"{image}.q", "4M"], check=True)
    with serve("file", f"{image}.q", "--qcow2", "-r") as server, opened(server.uri) as disk:
        assert all(isinstance(span, ZeroSpan) for span in disk.read(0, MIB))
        assert json.dumps(list(disk.extents(0, MIB))) == json.dumps([[MIB, HOLE]])
