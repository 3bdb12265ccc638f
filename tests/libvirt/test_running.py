"""Running guests: method backup, against a real libvirtd and qemu."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Callable

import libvirt
import pytest

from tests.libvirt.rig import Rig, disk

pytestmark = pytest.mark.slow

MIB = 1 << 20

DISK = "/machine/peripheral/virtio-disk0/virtio-backend"


@pytest.fixture
def scratch(rig: Rig) -> Iterator[Path]:
    """A directory for scratch files, empty again at the end."""
    path = rig.directory / "scratch"
    path.mkdir(mode=0o755)
    path.chmod(0o755)
    yield path
    assert list(path.iterdir()) == []
    path.rmdir()


def copies(rig: Rig, *paths: Path) -> list[Path]:
    """Copies that a guest may change."""
    made = []
    for path in paths:
        copy = rig.images / f"live-{path.name}"
        shutil.copy(path, copy)
        copy.chmod(0o666)
        made.append(copy)
    return made


def has_job(rig: Rig, name: str) -> bool:
    with rig.connection() as connection:
        try:
            connection.lookupByName(name).backupGetXMLDesc(0)
            return True
        except libvirt.libvirtError:
            return False


@contextlib.contextmanager
def writing(rig: Rig, name: str, size: int) -> Iterator[None]:
    """The guest overwrites all of its disk, again and again."""
    over = threading.Event()

    def write() -> None:
        number = 0
        while not over.is_set():
            number += 1
            at = number * 512 * 1024 % size
            rig.hmp(name, f'qemu-io -d {DISK} "write -P {number % 250 + 1} {at} 512k"')

    thread = threading.Thread(target=write)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def test_raw_and_a_chain_at_once(
    rig: Rig,
    raw_image: Path,
    chain: list[Path],
    backing_chain: str,
    scratch: Path,
    serve: Callable[..., Any],
    compare: Any,
    run: Any,
) -> None:
    (live,) = copies(rig, raw_image)
    disks = (
        disk(live),
        disk(chain[0], "vdb", "qcow2", backing_chain),
        disk("", "sda", device="cdrom"),
    )
    words = ("libvirt", "two", f"connect={rig.uri}", f"--scratch-dir={scratch}")
    with rig.guest("two", *disks, start=True):
        before = raw_image.read_bytes()
        with serve(*words) as server:
            assert has_job(rig, "two")
            rig.hmp("two", f'qemu-io -d {DISK} "write -P 7 0 2M"')
            copy = rig.images / "copy"
            run("nbdcopy", server.uri.replace("?", "vda?"), copy)
            assert copy.read_bytes() == before
            listed = run("nbdinfo", "--list", server.uri)
            assert listed.count("export=") == 2
            assert "method backup" in listed and "the guest is running, on this host" in listed
            run("nbdcopy", server.uri.replace("?", "vdb?"), copy)
        assert not has_job(rig, "two")
        rig.end("two")
        compare(copy, chain[0], "qcow2")
        assert live.read_bytes()[:9] == b"\x07" * 9


def test_a_guest_that_writes_all_the_time(
    rig: Rig, scratch: Path, serve: Any, random_file: Any, tmp_path: Path, run: Any
) -> None:
    before = random_file(tmp_path / "before", 16 * MIB)
    live = rig.images / "busy"
    run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", before, live)
    live.chmod(0o666)
    words = ("libvirt", "busy", f"connect={rig.uri}", f"--scratch-dir={scratch}")
    with rig.guest("busy", disk(live, form="qcow2"), start=True):
        out = tmp_path / "out"
        with serve(*words) as server, writing(rig, "busy", 16 * MIB):
            time.sleep(1)
            run("nbdcopy", "--connections=1", "--requests=1", server.uri, out)
            time.sleep(0.5)
            run("nbdcopy", server.uri, tmp_path / "again")
        assert out.read_bytes() == (tmp_path / "again").read_bytes() == before.read_bytes()
        assert not has_job(rig, "busy")


@pytest.fixture
def live(rig: Rig, raw_image: Path) -> Iterator[str]:
    """A running guest with a raw disk."""
    (path,) = copies(rig, raw_image)
    with rig.guest("live", disk(path), start=True) as name:
        yield name


@pytest.fixture
def words(rig: Rig, scratch: Path) -> list[str]:
    return ["libvirt", "live", f"connect={rig.uri}", f"--scratch-dir={scratch}"]


def test_nothing_remains_of_an_interrupted_run(
    live: str, rig: Rig, words: list[str], command: list[str], tmp_path: Path, scratch: Path
) -> None:
    for sig in signal.SIGTERM, signal.SIGINT:
        run = [*command, *words, "--to-file", "-"]
        reading, writing = os.pipe()
        process = subprocess.Popen(run, stdout=writing, stderr=subprocess.PIPE)
        os.close(writing)
        os.read(reading, 1)  # in the middle of the copy
        assert has_job(rig, live) and list(scratch.iterdir())
        process.send_signal(sig)
        process.wait(20)
        os.close(reading)
        assert not has_job(rig, live) and not list(scratch.iterdir())


def test_nothing_remains_of_a_failure(
    live: str, rig: Rig, words: list[str], nbdtool: Any, scratch: Path
) -> None:
    nbdtool(*words, "--to-file", "/dev/full", status=1)
    assert not has_job(rig, live)
    nbdtool(*words, "--qcow2", "--run", "true", status=1)  # a layer that can't be
    assert not has_job(rig, live) and not list(scratch.iterdir())


def test_a_client_that_leaves_in_the_middle(
    live: str, rig: Rig, words: list[str], nbdtool: Any
) -> None:
    leave = "qemu-io -r -f raw -c 'read 0 64k' \"$uri\" && exit 3"
    nbdtool(*words, "--run", leave, status=3)
    assert not has_job(rig, live)


def test_nothing_remains_of_another_users_run(
    live: str, rig: Rig, words: list[str], nbdtool: Any, run: Any, tmp_path: Path
) -> None:
    shared = rig.directory / "shared"
    shared.mkdir()
    shared.chmod(0o1777)
    words = [*words[:-1], f"--scratch-dir={shared}", "-u", "nobody"]
    done = nbdtool(*words, "--run", 'nbdcopy --connections=4 "$uri" null:', status=0)
    assert done.stderr == "" and not has_job(rig, live) and list(shared.iterdir()) == []


def test_one_backup_at_a_time(
    live: str, rig: Rig, words: list[str], nbdtool: Any, serve: Any, run: Any
) -> None:
    with serve(*words) as server:
        done = nbdtool(*words, "--to-file", "-", status=1)
        assert "live: no backup" in done.stderr and done.stderr.count("\n") == 1
        run("nbdcopy", server.uri, "null:")  # the first one isn't hurt


def test_a_guest_that_stops(live: str, rig: Rig, words: list[str], serve: Any, run: Any) -> None:
    with serve(*words) as server:
        run("qemu-io", "-r", "-f", "raw", "-c", "read 0 4k", server.uri)
        rig.end(live)
        run("qemu-io", "-r", "-f", "raw", "-c", "read 1M 4k", server.uri, status=1)
        assert "the guest was stopped meanwhile" in server.log()


def test_a_scratch_that_is_too_small(
    live: str, rig: Rig, words: list[str], nbdtool: Any, serve: Any, run: Any
) -> None:
    small = [*words[:-1], f"--scratch-dir={rig.small}"]
    done = nbdtool(*small, "--to-file", "-", status=1)
    assert "has 4.0 MiB free" in done.stderr and "--force-scratch" in done.stderr
    assert list(rig.small.iterdir()) == [] and not has_job(rig, live)
    with serve(*small, "--force-scratch") as server:
        run("qemu-io", "-r", "-f", "raw", "-c", "read 0 4k", server.uri)
        rig.hmp(live, f'qemu-io -d {DISK} "write -P 1 0 2M"')
        filler = rig.small / "filler"
        with contextlib.suppress(OSError):
            filler.write_bytes(bytes(4 * MIB))
        deadline = time.monotonic() + 20
        while has_job(rig, live):
            assert time.monotonic() < deadline
            time.sleep(0.1)
        run("qemu-io", "-r", "-f", "raw", "-c", "read 1M 4k", server.uri, status=1)
        assert "the backup was ended" in server.log()
        filler.unlink()
    assert list(rig.small.iterdir()) == []
    rig.hmp(live, f'qemu-io -d {DISK} "write -P 1 2M 1M"')  # the guest is well


def test_no_scratch(live: str, rig: Rig, words: list[str], nbdtool: Any) -> None:
    done = nbdtool(*words[:-1], "--scratch-dir=/nonexistent", "--to-file", "-", status=1)
    assert "/nonexistent: No such file" in done.stderr and done.stderr.count("\n") == 1


def test_quiesce_needs_the_agent(live: str, rig: Rig, words: list[str], nbdtool: Any) -> None:
    done = nbdtool(*words, "--quiesce", "--to-file", "-", status=1)
    assert "agent" in done.stderr and not has_job(rig, live)


def test_elsewhere(
    live: str, rig: Rig, chain: list[Path], nbdtool: Any, tmp_path: Path, raw_image: Path
) -> None:
    words = [f"connect={rig.tcp_uri}", "--to-file", str(tmp_path / "out")]
    assert (
        "is on another host" in nbdtool("libvirt", live, "method=backup", *words, status=1).stderr
    )
    done = nbdtool("libvirt", live, *words, status=0)
    assert "not a point in time" in done.stderr
    assert (tmp_path / "out").read_bytes() == raw_image.read_bytes()
    with rig.guest("q", disk(chain[2], form="qcow2"), start=True):
        done = nbdtool("libvirt", "q", *words, status=1)
        assert "copy nbdtool there" in done.stderr and done.stderr.count("\n") == 1


def test_a_stopped_guest_has_no_backup(rig: Rig, raw_image: Path, nbdtool: Any) -> None:
    with rig.guest("off", disk(raw_image)):
        words = ("libvirt", "off", f"connect={rig.uri}", "method=backup", "--to-file", "-")
        assert "only a running guest has backups" in nbdtool(*words, status=1).stderr
