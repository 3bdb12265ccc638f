"""nbdtool guestfs through the appliance: what clients see, and what the host's files have after."""

from __future__ import annotations

import contextlib
import hashlib
import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbd
import pytest

from tests.conftest import Server
from tests.guestfs.images import PASSPHRASE, Images

pytestmark = pytest.mark.slow

MIB = 1 << 20
READY = 300.0  # seconds for an appliance without KVM, on a busy machine
SETS = ("plain", "vg", "md", "crypt", "mbr")  # in the order of their drives
# Of those sets, what is compared as a whole
COPIED = (
    "/dev/sda2",
    "/dev/vg0/lin",
    "/dev/vg0/small",
    "/dev/vg0/str",
    "/dev/vg0/two-h--",
    "/dev/vgcrypt/secret",
    "/dev/vgmbr/logical",
)


@pytest.fixture(scope="module")
def served(images: dict[str, Images], serve: Any) -> Iterator[Server]:
    disks = [disk for name in SETS for disk in images[name].disks]
    words = [f"disk={disk}" for disk in disks]
    key = f"--key=all:key:{PASSPHRASE}"
    with serve("guestfs", *words, key, "-r", "--direct=never", ready=READY) as server:
        yield server


@pytest.fixture(scope="module")
def expected(images: dict[str, Images]) -> dict[str, str]:
    """The digest of each device that only one set has."""
    known = {}
    for name in SETS:
        for device, content in images[name].devices.items():
            if name == "plain" or not device.startswith("/dev/sd"):
                known[device] = content.sha256
    return known


def address(server: Server, name: str = "") -> str:
    return server.uri.replace(":///", f":///{name}")


def digest(server: Server, name: str) -> str:
    copy = subprocess.Popen(["nbdcopy", address(server, name), "-"], stdout=subprocess.PIPE)
    assert copy.stdout is not None
    found = hashlib.sha256()
    while piece := copy.stdout.read(MIB):
        found.update(piece)
    assert copy.wait() == 0, name
    return found.hexdigest()


@contextlib.contextmanager
def connected(server: Server, name: str = "") -> Iterator[Any]:
    handle = nbd.NBD()
    handle.connect_uri(address(server, name))
    try:
        yield handle
    finally:
        with contextlib.suppress(nbd.Error):
            handle.shutdown()


def hypervisor(server: Server) -> int:
    """The process ID of the appliance's qemu."""
    children = subprocess.run(
        ["pgrep", "-P", str(server.process.pid), "qemu"], stdout=subprocess.PIPE, check=True
    )
    return int(children.stdout.split()[0])


def test_every_device_is_an_export(served: Server, run: Any) -> None:
    listed = run("nbdinfo", "--list", "--no-content", served.uri)
    names = [line.split('"')[1] for line in listed.splitlines() if line.startswith("export=")]
    wanted = {"/dev/sda1", "/dev/sdb", "/dev/sdc1", "/dev/sdg6", *COPIED}
    assert wanted <= set(names)
    assert len([name for name in names if name.startswith("/dev/md")]) == 4
    assert len([name for name in names if name.startswith("/dev/mapper/luks-")]) == 2
    assert "through libguestfs" in served.log()


def test_four_clients_read_at_once(served: Server, expected: dict[str, str]) -> None:
    results: dict[str, str] = {}

    def copy(names: tuple[str, ...]) -> None:
        for name in names:
            results[name] = digest(served, name)

    threads = [threading.Thread(target=copy, args=(COPIED[n::4],)) for n in range(4)]
    for thread in threads:
        thread.start()
    # Whoever comes while they are busy is served at once.
    with connected(served, "/dev/sda1") as client:
        began = time.monotonic()
        assert client.pread(2, 1080) == b"\x53\xef"
        assert any(thread.is_alive() for thread in threads)
        assert time.monotonic() - began < 30
    for thread in threads:
        thread.join()
    assert results == {name: expected[name] for name in COPIED}


def test_raid_and_luks(served: Server, expected: dict[str, str], run: Any) -> None:
    listed = run("nbdinfo", "--list", "--no-content", served.uri)
    names = [line.split('"')[1] for line in listed.splitlines() if line.startswith("export=")]
    for start in "/dev/md", "/dev/mapper/luks-":
        chosen = [name for name in names if name.startswith(start)]
        known = [value for name, value in expected.items() if name.startswith(start)]
        assert sorted(digest(served, name) for name in chosen) == sorted(known)


def test_requests_of_any_size_and_place(served: Server, images: dict[str, Images]) -> None:
    with connected(served, "/dev/sda1") as client, images["plain"].disk.open("rb") as disk:
        for length, offset in (32 * MIB, 1000), (4 * MIB, 0), (1, 48 * MIB - 1), (513, MIB - 1):
            disk.seek(MIB + offset)
            assert client.pread(length, offset) == disk.read(length)
        for at in range(0, MIB, 4096):  # one behind the other
            disk.seek(MIB + at)
            assert client.pread(4096, at) == disk.read(4096)


def test_a_reader_outlives_the_appliance(served: Server, images: dict[str, Images]) -> None:
    with connected(served, "/dev/vg0/lin") as client, connected(served, "/dev/sda1") as other:
        first = threading.Timer(0.3, os.kill, (hypervisor(served), signal.SIGKILL))
        first.start()
        found = hashlib.sha256()
        for at in range(0, client.get_size(), 4 * MIB):
            found.update(client.pread(4 * MIB, at))
        first.join()
        with images["plain"].disk.open("rb") as disk:
            disk.seek(MIB + 8192)
            assert other.pread(4096, 8192) == disk.read(4096)
        assert found.hexdigest() == images["vg"].devices["/dev/vg0/lin"].sha256
        assert "starting another" in served.log()
        os.kill(hypervisor(served), signal.SIGKILL)
        with pytest.raises(nbd.Error, match="Input/output error"):
            other.pread(4096, 20 * MIB)
        assert "for the second time" in served.log()


def test_writes_reach_the_host_and_end_with_the_appliance(
    images: dict[str, Images], serve: Any, tmp_path: Path, partition: Any
) -> None:
    (disk,) = images["plain"].copy(tmp_path)
    start, size = partition(disk, 2)
    before = disk.read_bytes()
    content = bytearray(before[start : start + size])
    with serve("guestfs", f"disk={disk}", "export=/dev/sda2", status=1, ready=READY) as server:
        with connected(server) as client:
            assert client.get_size() == size
            for offset, data in (
                (1001, b"unaligned" * 300),
                (5 * MIB - 7, os.urandom(3 * MIB)),
                (size - 5, b"tail!"),
            ):
                client.pwrite(data, offset)
                content[offset : offset + len(data)] = data
            client.zero(2 * MIB + 9, 6 * MIB + 100)
            content[6 * MIB + 100 : 8 * MIB + 109] = bytes(2 * MIB + 9)
            assert client.pread(4 * MIB, 4 * MIB) == content[4 * MIB : 8 * MIB]
            client.flush()
            after = disk.read_bytes()
            assert after[start : start + size] == content
            assert (
                after[:start] == before[:start] and after[start + size :] == before[start + size :]
            )
            client.pwrite(b"with FUA", 77, nbd.CMD_FLAG_FUA)
            content[77:85] = b"with FUA"
            assert disk.read_bytes()[start : start + size] == content
            killer = threading.Timer(0.5, os.kill, (hypervisor(server), signal.SIGKILL))
            killer.start()
            with pytest.raises(nbd.Error, match="Input/output error"):
                while True:
                    client.pwrite(bytes(4 * MIB), 8 * MIB)
            with pytest.raises(nbd.Error, match="Input/output error"):
                client.pread(512, 0)
            killer.join()
        assert server.process.wait(30) == 1  # by itself
        assert "appliance died" in server.log()


def test_a_file_of_a_qcow2_is_written(
    images: dict[str, Images], serve: Any, run: Any, mount: Any, tmp_path: Path, partition: Any
) -> None:
    disk = tmp_path / "disk.qcow2"
    run("qemu-img", "convert", "-O", "qcow2", images["plain"].disk, disk)
    file = images["plain"].files["/dev/sda1", "/images/disk.img"]
    words = (f"disk={disk}", "mount=/dev/sda1", "export=/images/disk.img")
    with serve("guestfs", *words, ready=READY) as server:
        assert "/images/disk.img of" in server.log() and "qcow2" in server.log()
        with connected(server) as client:
            assert client.get_size() == file.size
            content = bytearray(client.pread(file.size, 0))
            assert hashlib.sha256(content).hexdigest() == file.sha256
            client.pwrite(b"new" * 1000, 12345)
            content[12345 : 12345 + 3000] = b"new" * 1000
            client.zero(MIB, MIB)
            content[MIB : 2 * MIB] = bytes(MIB)
    run("qemu-img", "convert", "-O", "raw", disk, tmp_path / "raw")
    start, size = partition(tmp_path / "raw", 1)
    with mount(tmp_path / "raw", start, size) as tree:
        assert (tree / "images/disk.img").read_bytes() == content
        assert hashlib.sha256((tree / "images/sparse.img").read_bytes()).hexdigest() == (
            images["plain"].files["/dev/sda1", "/images/sparse.img"].sha256
        )
    run("qemu-img", "check", disk)


def test_inspected_guest_to_a_file(images: dict[str, Images], nbdtool: Any, tmp_path: Path) -> None:
    file = images["guest"].files["/dev/vgguest/root", "/bin/ls"]
    words = (images["guest"].disk, "mount=inspect", "export=/bin/ls", "--direct=never")
    done = nbdtool("guestfs", *words, "--to-file", tmp_path / "out", status=0)
    assert hashlib.sha256((tmp_path / "out").read_bytes()).hexdigest() == file.sha256, done.stderr


def test_wrong_export_ends_before_anybody_can_connect(
    images: dict[str, Images], nbdtool: Any
) -> None:
    words = (f"disk={images['plain'].disk}", "export=/dev/sda9", "-s")
    done = nbdtool("guestfs", *words, status=1)
    (line,) = done.stderr.splitlines()
    assert line.startswith("nbdtool: error: /dev/sda9: no such device; there are /dev/sda1")


def test_interrupted_while_it_starts(images: dict[str, Images], command: list[str]) -> None:
    words = [*command, "guestfs", images["plain"].disk, "--direct=never", "-r", "-s"]
    process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    time.sleep(4)
    began = time.monotonic()
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 143
    assert time.monotonic() - began < 15
    left = subprocess.run(["pgrep", "-P", str(process.pid)], stdout=subprocess.PIPE, check=False)
    assert left.stdout == b""
