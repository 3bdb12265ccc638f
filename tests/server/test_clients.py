"""The clients that people use, against the server as people start it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable

import pytest

MIB = 1 << 20

Run = Callable[..., Any]


def same_time() -> dict[str, str]:
    """The environment in which two runs make the same disk."""
    return {**os.environ, "SOURCE_DATE_EPOCH": "1700000000"}


@dataclass
class Served:
    """What a client gets: the URI, and the image that it must see behind it."""

    uri: str
    image: Path
    port: int | None


@pytest.fixture(scope="module")
def sources(
    nbdtool: Run, random_file: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[list[Any], Path]]:
    """The words that serve a source, and the disk that it is."""
    folder = tmp_path_factory.mktemp("sources")
    image = random_file(folder / "image", 24 * MIB)
    os.truncate(image, 64 * MIB)
    with image.open("r+b") as file:
        file.seek(40 * MIB)
        file.write(os.urandom(70_000))
    tree = folder / "tree"
    shutil.copytree(Path(__file__).parent.parent, tree / "tests")
    os.truncate(random_file(tree / "sparse", MIB), 20 * MIB)
    (tree / "link").symlink_to("sparse")
    disk = folder / "disk"
    words = ["linuxdisk", tree, "--uuid=8e5b9f7e-1f0a-4f4b-9a53-6d0c7c1b2a3d"]
    nbdtool(*words, "--to-file", disk, status=0, env=same_time())
    return {"file": (["file", image, "-r"], image), "linuxdisk": (words, disk)}


@pytest.fixture(scope="module", params=["file-unix", "file-tcp", "linuxdisk-unix", "linuxdisk-tcp"])
def served(
    request: pytest.FixtureRequest, serve: Run, sources: dict[str, tuple[list[Any], Path]]
) -> Iterator[Served]:
    source, _, place = request.param.partition("-")
    words, image = sources[source]
    with serve(*words, tcp=place == "tcp", env=same_time()) as server:
        yield Served(server.uri, image, server.port)


@pytest.fixture
def writable(serve: Run, tmp_path: Path) -> Iterator[Served]:
    """An empty image of 64 MiB."""
    image = tmp_path / "image"
    image.touch()
    os.truncate(image, 64 * MIB)
    with serve("file", image) as server:
        yield Served(server.uri, image, None)


def data_of(extents: list[dict[str, Any]]) -> set[int]:
    """The 4 KiB blocks that a map calls data."""
    blocks: set[int] = set()
    for extent in extents:
        data = extent.get("type") == 0 if "type" in extent else extent["data"]
        start = extent.get("offset", extent.get("start"))
        if data:
            blocks.update(range(start // 4096, (start + extent["length"] - 1) // 4096 + 1))
    return blocks


# Reading


def test_nbdinfo(served: Served, run: Run) -> None:
    size = served.image.stat().st_size
    (export,) = json.loads(run("nbdinfo", "--json", served.uri))["exports"]
    assert export["export-size"] == size
    assert export["is_read_only"]
    assert export["can_multi_conn"]
    assert export["can_df"]
    assert export["contexts"] == ["base:allocation"]
    assert (export["block_size_minimum"], export["block_size_maximum"]) == (1, 32 * MIB)
    (listed,) = json.loads(run("nbdinfo", "--list", "--json", served.uri))["exports"]
    assert listed["export-size"] == size
    assert listed["export-name"] == ""
    assert listed["description"]
    extents = json.loads(run("nbdinfo", "--map", "--json", served.uri))
    assert sum(extent["length"] for extent in extents) == size
    assert {extent["type"] for extent in extents} == {0, 3}
    holes = sum(extent["length"] for extent in extents if extent["type"])
    assert holes > (15 * MIB if size == 64 * MIB else 0)
    with served.image.open("rb") as file:
        for extent in extents:
            if extent["type"]:
                file.seek(extent["offset"])
                assert not any(file.read(min(extent["length"], MIB)))


@pytest.mark.parametrize("connections", [1, 4])
def test_nbdcopy(served: Served, run: Run, tmp_path: Path, connections: int) -> None:
    copy = tmp_path / "copy"
    run("nbdcopy", f"--connections={connections}", served.uri, copy)
    run("cmp", served.image, copy)
    assert copy.stat().st_blocks <= served.image.stat().st_blocks + 2048
    pieces = ["--requests=64", "--request-size=65536", "--no-extents"]
    whole = run("nbdcopy", f"--connections={connections}", *pieces, served.uri, "-", binary=True)
    assert whole == served.image.read_bytes()


def test_nbdsh(served: Served, run: Run) -> None:
    script = """
import json
extents = []
h.block_status(65536, 0, lambda name, offset, entries, error: extents.append(entries))
print(json.dumps([h.get_size(), h.is_read_only(), h.can_multi_conn(), extents != [],
    h.get_structured_replies_negotiated(), h.pread(512, h.get_size() - 512).hex()]))
try:
    h.set_strict_mode(0)
    h.pwrite(b"x" * 512, 0)
except nbd.Error as exc:
    print(exc.errno)
"""
    nbdsh = [sys.executable, "-m", "nbd", "--base-allocation"]  # the program finds another Python
    line, error = run(*nbdsh, "-u", served.uri, "-c", script).splitlines()
    size = served.image.stat().st_size
    with served.image.open("rb") as file:
        file.seek(size - 512)
        assert json.loads(line) == [size, True, True, True, True, file.read().hex()]
    assert error == "EPERM"


def test_qemu_img(served: Served, run: Run, tmp_path: Path) -> None:
    size = served.image.stat().st_size
    info = json.loads(run("qemu-img", "info", "--output=json", "-f", "raw", served.uri))
    assert info["virtual-size"] == size
    output = run("qemu-img", "compare", "-f", "raw", "-F", "raw", served.uri, served.image)
    assert "identical" in output
    by_qemu = json.loads(run("qemu-img", "map", "--output=json", "-f", "raw", served.uri))
    by_nbdinfo = json.loads(run("nbdinfo", "--map", "--json", served.uri))
    assert data_of(by_qemu) == data_of(by_nbdinfo)
    copy = tmp_path / "copy.qcow2"
    run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", served.uri, copy)
    run("qemu-img", "compare", "-f", "qcow2", "-F", "raw", copy, served.image)


def test_qemu_io(served: Served, run: Run) -> None:
    for command in "read -v 0 1k", "read 1M 3M", "map":
        output = run("qemu-io", "-r", "-f", "raw", "-c", command, served.uri)
        assert "failed" not in output
    refused = subprocess.run(
        ["qemu-io", "-f", "raw", "-c", "write 0 512", served.uri], capture_output=True, text=True
    )
    assert refused.returncode == 1
    assert "Permission denied" in refused.stderr


def test_qemu_nbd_list(served: Served, run: Run) -> None:
    where = ["-p", str(served.port), "-b", "localhost"]
    if served.port is None:
        where = ["-k", served.uri.partition("?socket=")[2]]
    output = run("qemu-nbd", "--list", *where)
    assert "exports available: 1" in output
    assert f"size:  {served.image.stat().st_size}" in output
    assert "base:allocation" in output


def test_nbd_client_list(served: Served, run: Run) -> None:
    if served.port is None:
        where = ["-unix", served.uri.partition("?socket=")[2]]
    else:
        where = ["localhost", str(served.port)]
    assert "Negotiation: .." in run("nbd-client", "-l", *where)


def test_fio_reads(served: Served, run: Run, tmp_path: Path) -> None:
    job = ["--name=job", "--ioengine=nbd", f"--uri={served.uri}", "--output-format=json"]
    mixed = ["--rw=randread", "--bsrange=512-1M", "--iodepth=16", "--io_size=32M", "--numjobs=3"]
    output = run("fio", *job, *mixed, "--group_reporting", cwd=tmp_path)
    (result,) = json.loads(output[output.index("{") :])["jobs"]
    assert result["error"] == 0
    assert result["read"]["io_bytes"] >= 90 * MIB


def test_nbdkit_as_a_client(served: Served, run: Run, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    command = f'nbdcopy "$uri" {copy}'
    run("nbdkit", "-r", "-U", "-", "nbd", f"uri={served.uri}", "--run", command)
    run("cmp", served.image, copy)


# Several exports, and names


def test_names(serve: Run, run: Run, random_file: Callable[..., Path], tmp_path: Path) -> None:
    image = random_file(tmp_path / "image", MIB)
    with serve("file", image, "-e", "my disk/ä") as server:
        named = server.uri.replace("nbd+unix:///", "nbd+unix:///my%20disk/%C3%A4")
        assert run("nbdinfo", "--size", named) == f"{MIB}\n"
        run("nbdinfo", server.uri, status=1)
        (export,) = json.loads(run("nbdinfo", "--list", "--json", server.uri))["exports"]
        assert export["export-name"] == "my disk/ä"
        assert export["description"] == str(image)
        run("nbdcopy", named, tmp_path / "copy")
    run("cmp", image, tmp_path / "copy")


@pytest.mark.parametrize("option", ["-o", "--oldstyle", "--no-sr"])
def test_older_protocols(
    serve: Run, run: Run, random_file: Callable[..., Path], tmp_path: Path, option: str
) -> None:
    image = random_file(tmp_path / "image", 3 * MIB)
    with serve("file", image, option) as server:
        (export,) = json.loads(run("nbdinfo", "--json", server.uri))["exports"]
        assert export["export-size"] == 3 * MIB
        assert not export.get("can_df")
        run("nbdcopy", server.uri, tmp_path / "copy")
        run("cmp", image, tmp_path / "copy")
        random_file(tmp_path / "other", 3 * MIB, seed=1)
        run("nbdcopy", tmp_path / "other", server.uri)
        run("qemu-img", "compare", "-f", "raw", "-F", "raw", server.uri, tmp_path / "other")
    run("cmp", image, tmp_path / "other")


# Writing


@pytest.mark.parametrize("options", [["--connections=1"], ["--connections=4", "--flush"]])
def test_nbdcopy_writes(
    writable: Served, run: Run, random_file: Callable[..., Path], tmp_path: Path, options: list[str]
) -> None:
    source = random_file(tmp_path / "source", 10 * MIB + 3000)
    os.truncate(source, 64 * MIB)
    run("nbdcopy", *options, source, writable.uri)
    run("cmp", source, writable.image)
    assert writable.image.stat().st_blocks * 512 < 12 * MIB
    run("nbdcopy", "--destination-is-zero", source, writable.uri)
    run("cmp", source, writable.image)


def test_qemu_img_converts_into_it(
    writable: Served, run: Run, random_file: Callable[..., Path], tmp_path: Path
) -> None:
    source = random_file(tmp_path / "source", 10 * MIB)
    os.truncate(source, 64 * MIB)
    run("qemu-img", "convert", "-n", "-f", "raw", "-O", "raw", source, writable.uri)
    run("cmp", source, writable.image)


def test_qemu_io_writes(writable: Served, run: Run) -> None:
    commands = [
        "write -P 1 0 3M",
        "write -P 2 -f 1M 512",  # FUA
        "write -z 2M 100k",
        "write -z -u 100k 100k",  # may unmap
        "discard 32M 1M",
        "flush",
        "read -P 2 1M 512",
        "read -P 0 2M 100k",
        "read -P 0 100k 100k",
    ]
    words = [word for command in commands for word in ("-c", command)]
    output = run("qemu-io", "-f", "raw", *words, writable.uri)
    assert "failed" not in output and "error" not in output
    content = writable.image.read_bytes()
    expected = bytearray(b"\1" * (3 * MIB))
    expected[MIB : MIB + 512] = b"\2" * 512
    expected[2 * MIB : 2 * MIB + 102400] = bytes(102400)
    expected[102400:204800] = bytes(102400)
    assert content[: 3 * MIB] == expected
    assert not any(content[3 * MIB :])


def test_fio_writes_and_verifies(writable: Served, run: Run, tmp_path: Path) -> None:
    job = ["--name=job", "--ioengine=nbd", f"--uri={writable.uri}", "--output-format=json"]
    mixed = ["--rw=randwrite", "--bs=4k", "--iodepth=16", "--size=16M", "--verify=crc32c"]
    output = run("fio", *job, *mixed, cwd=tmp_path)
    (result,) = json.loads(output[output.index("{") :])["jobs"]
    assert result["error"] == 0
    assert result["read"]["io_bytes"] == 16 * MIB


# By other roads


@pytest.fixture(scope="session")
def imageio(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ovirt-imageio's pure Python client from PyPI, where it can be imported."""
    folder = tmp_path_factory.mktemp("imageio")
    words = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-binary=:all:"]
    done = subprocess.run(
        [*words, "-d", folder, "ovirt-imageio==2.5.1"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    (archive,) = folder.glob("ovirt*.tar.gz")
    with tarfile.open(archive) as tar:
        tar.extractall(folder)
    return next(folder.glob("ovirt*/ovirt_imageio")).parent


def test_ovirt_imageio(writable: Served, run: Run, imageio: Path) -> None:
    script = f"""
from urllib.parse import urlparse
from ovirt_imageio._internal import nbd
with nbd.open(urlparse({("nbd:unix:" + writable.uri.partition("=")[2])!r})) as client:
    assert client.export_size == {64 * MIB}
    client.write(MIB := 1 << 20, b"data" * 1024)
    client.zero(2 * MIB, 3 * MIB)
    client.flush()
    assert client.read(MIB, 4096) == b"data" * 1024
    buffer = bytearray(8192)
    client.readinto(MIB - 4096, buffer)
    assert buffer == bytes(4096) + b"data" * 1024
    extents = client.extents(0, client.export_size)["base:allocation"]
    print([(extent.length, extent.zero) for extent in extents][:3])
"""
    output = run(sys.executable, "-c", script, env={**os.environ, "PYTHONPATH": str(imageio)})
    assert output == f"[({MIB}, True), (4096, False), ({63 * MIB - 4096}, True)]\n"


@pytest.mark.slow
def test_guestfish_looks_into_a_linuxdisk(
    serve: Run, run: Run, sources: dict[str, tuple[list[Any], Path]]
) -> None:
    words, _ = sources["linuxdisk"]
    environment = {
        **os.environ,
        "LIBGUESTFS_BACKEND": "direct",
        "LIBGUESTFS_BACKEND_SETTINGS": "force_tcg",
    }
    with serve(*words) as server:
        socket = server.uri.partition("?socket=")[2]
        script = "run\nmount-ro /dev/sda1 /\nchecksum sha256 /sparse\nreadlink /link\n"
        output = run(
            "guestfish", "--ro", "--format=raw", "-a", f"nbd://?socket={socket}",
            input=script, env=environment,
        )  # fmt: skip
    expected = run("sha256sum", Path(words[1]) / "sparse").split()[0]
    assert output.split() == [expected, "sparse"]
