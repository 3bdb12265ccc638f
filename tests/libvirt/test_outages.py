"""libvirtd and the way to it come and go under nbdtool."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nbdtool.disks.libvirt.peek import CONNECTIONS
from tests.libvirt.rig import Proxy, Rig, disk

pytestmark = pytest.mark.slow

MIB = 1 << 20


@pytest.fixture(scope="module")
def big(rig: Rig, random_file: Any) -> Iterator[Path]:
    path = random_file(rig.images / "big", 32 * MIB)
    with rig.guest("big", disk(path)):
        yield path


@contextlib.contextmanager
def proxy(rig: Rig, delay: float = 0.0) -> Iterator[Proxy]:
    made = Proxy(rig.port, delay)
    try:
        yield made
    finally:
        made.close()


def test_libvirtd_is_killed_and_restarted_under_a_copy(
    big: Path, rig: Rig, command: list[str], tmp_path: Path
) -> None:
    with proxy(rig, 0.05) as way:
        out = tmp_path / "out"
        copy = subprocess.Popen(
            [*command, "libvirt", "big", f"connect={way.uri}", "--to-file", out],
            stderr=subprocess.PIPE,
        )
        deadline = time.monotonic() + 60
        while way.connections < 1 + CONNECTIONS:  # then it reads
            assert time.monotonic() < deadline and copy.poll() is None
            time.sleep(0.02)
        rig.stop(signal.SIGKILL)
        assert copy.poll() is None
        time.sleep(1)
        rig.start()
        _, errors = copy.communicate(timeout=60)
        assert copy.returncode == 0, errors
    assert out.read_bytes() == big.read_bytes()


def test_a_link_that_drops(big: Path, rig: Rig, serve: Any, run: Any, tmp_path: Path) -> None:
    with proxy(rig, 0.005) as way, serve("libvirt", "big", f"connect={way.uri}") as server:
        over = threading.Event()

        def drop() -> None:
            while not over.wait(0.6):
                way.drop()

        thread = threading.Thread(target=drop)
        thread.start()
        try:
            run("nbdcopy", server.uri, tmp_path / "out")
        finally:
            over.set()
            thread.join()
    assert (tmp_path / "out").read_bytes() == big.read_bytes()


def test_a_silent_link_is_given_up(big: Path, rig: Rig, serve: Any, run: Any) -> None:
    with proxy(rig) as way, serve("libvirt", "big", f"connect={way.uri}") as server:
        run("qemu-io", "-r", "-f", "raw", "-c", "read 0 4k", server.uri)
        way.freeze()
        run("qemu-io", "-r", "-f", "raw", "-c", "read 1M 4k", server.uri, timeout=60)


def test_libvirtd_stays_away(big: Path, rig: Rig, serve: Any, run: Any) -> None:
    words = ("libvirt", "big", f"connect={rig.uri}", "method=peek", "--reconnect=1")
    with serve(*words) as server:
        run("qemu-io", "-r", "-f", "raw", "-c", "read 0 4k", server.uri)
        rig.stop(signal.SIGKILL)
        try:
            began = time.monotonic()
            run("qemu-io", "-r", "-f", "raw", "-c", "read 1M 4k", server.uri, status=1)
            assert 0.9 < time.monotonic() - began < 25
            assert "libvirt-sock" in server.log() or "end of file" in server.log().lower()
        finally:
            rig.start()
        run("qemu-io", "-r", "-f", "raw", "-c", "read 2M 4k", server.uri)  # back again


def test_a_libvirtd_that_pauses_is_waited_for(big: Path, rig: Rig, serve: Any, run: Any) -> None:
    """It has the connection still, and nothing else would answer sooner."""
    with serve("libvirt", "big", f"connect={rig.uri}", "method=peek", "--reconnect=1") as server:
        run("qemu-io", "-r", "-f", "raw", "-c", "read 0 4k", server.uri)
        rig.signal(signal.SIGSTOP)
        timer = threading.Timer(3, rig.signal, [signal.SIGCONT])
        timer.start()
        try:
            began = time.monotonic()
            run("nbdcopy", server.uri, "null:")
            assert time.monotonic() - began > 2
        finally:
            timer.join()


def test_the_end_does_not_wait_for_a_libvirtd_that_pauses(big: Path, rig: Rig, serve: Any) -> None:
    with serve("libvirt", "big", f"connect={rig.uri}", "method=peek") as server:
        rig.signal(signal.SIGSTOP)
        try:
            client = subprocess.Popen(
                ["qemu-io", "-r", "-f", "raw", "-c", "read 1M 4k", server.uri],
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
            time.sleep(0.5)
            server.process.terminate()
            server.process.wait(15)
            client.wait(5)
        finally:
            rig.signal(signal.SIGCONT)


SIXTEEN = """
import errno, nbd, sys, time
handles = [nbd.NBD() for _ in range(4)]
failed = []
for handle in handles:
    handle.connect_uri(sys.argv[1])
began = time.monotonic()
for number in range(16):
    done = lambda error: failed.append(error.value) or 1
    handles[number % 4].aio_pread(nbd.Buffer(4096), number << 20, done)
while any(handle.aio_in_flight() for handle in handles):
    for handle in handles:
        handle.poll(50)
print(time.monotonic() - began)
assert failed == [errno.EIO] * 16, failed
"""


def test_requests_in_flight_wait_for_one_outage(big: Path, rig: Rig, serve: Any, run: Any) -> None:
    """Rather than each for one of its own, or one after the other."""
    words = ("libvirt", "big", f"connect={rig.uri}", "method=peek", "--reconnect=3")
    with serve(*words) as server:
        run("qemu-io", "-r", "-f", "raw", "-c", "read 0 4k", server.uri)
        rig.stop(signal.SIGKILL)
        try:
            assert 2 < float(run("/usr/bin/python3", "-c", SIXTEEN, server.uri)) < 4 * 3
        finally:
            rig.start()
        run("qemu-io", "-r", "-f", "raw", "-c", "read 2M 4k", server.uri)


def test_a_backup_outlives_libvirtd(
    rig: Rig, serve: Any, run: Any, random_file: Any, tmp_path: Path
) -> None:
    path = random_file(rig.images / "backed", 8 * MIB)
    path.chmod(0o666)
    expected = path.read_bytes()
    scratch = rig.directory / "scratch-outlives"
    scratch.mkdir()
    words = ("libvirt", "outlives", f"connect={rig.uri}", f"--scratch-dir={scratch}")
    with rig.guest("outlives", disk(path), start=True):
        with serve(*words) as server:
            rig.stop(signal.SIGKILL)
            run("nbdcopy", server.uri, tmp_path / "out")
            rig.start()
        assert (tmp_path / "out").read_bytes() == expected
        assert list(scratch.iterdir()) == []
        with serve(*words) as server:  # there is no job in the way
            run("nbdcopy", server.uri, "null:")


def test_a_delayed_link_gives_the_same_bytes(
    big: Path, rig: Rig, serve: Any, run: Any, tmp_path: Path
) -> None:
    with proxy(rig, 0.01) as way, serve("libvirt", "big", f"connect={way.uri}") as server:
        one = ("--connections=1", "--requests=1", "--request-size=65536")
        for options in one, ("--connections=4",):
            run("nbdcopy", *options, server.uri, tmp_path / "out")
            assert (tmp_path / "out").read_bytes() == big.read_bytes()
        target = ("-r", "-f", "raw", server.uri)
        run("qemu-io", *(w for n in range(100) for w in ("-c", f"read {n * 4}k 4k")), *target)
        run("qemu-io", *(w for n in range(5) for w in ("-c", f"read {n * 3}M 3M")), *target)
