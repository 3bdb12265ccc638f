"""FileDisk: files with holes, devices, what filesystems lack, and the locks of running guests."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import random
import re
import stat
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Callable

import pytest

from nbdtool.disk import DATA, HOLE, merge_extents, read_bytes
from nbdtool.disks import file
from nbdtool.disks.file import FileDisk

MIB = 1 << 20

Run = Callable[..., Any]


def extents(disk: FileDisk, offset: int = 0, length: int | None = None) -> list[tuple[int, int]]:
    length = disk.size - offset if length is None else length
    return [tuple(extent) for extent in merge_extents(disk.extents(offset, length))]


def blocks(path: Path) -> int:
    """The bytes that a file takes on its disk."""
    return path.stat().st_blocks * 512


@pytest.fixture(params=["ext4", "tmpfs", "plain"])
def folder(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Run
) -> Iterator[Path]:
    """A directory of a filesystem: one that can zero ranges, one that can't, one without either."""
    with contextlib.ExitStack() as stack:
        if request.param == "tmpfs":
            run("mount", "-t", "tmpfs", "-o", "size=64M", "none", tmp_path)
            stack.callback(run, "umount", tmp_path)
        if request.param == "plain":
            monkeypatch.setattr(file, "_fallocate", lambda *args: False)
        yield tmp_path


@pytest.fixture
def device(tmp_path: Path, random_file: Callable[..., Path], loop_device: Run) -> Iterator[Path]:
    """A block device of 8 MiB of random data."""
    with loop_device(random_file(tmp_path / "disk", 8 * MIB)) as device:
        yield device


# Reading


def test_extents_are_those_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "image"
    with path.open("wb") as sparse:
        for at in 0, 10 * MIB, 20 * MIB - 4096:
            os.pwrite(sparse.fileno(), b"x" * 4096, at)
        sparse.truncate(30 * MIB + 5)
    disk = FileDisk(str(path))
    hole = 10 * MIB - 4096
    expected = [(4096, DATA), (hole, HOLE), (4096, DATA), (hole - 4096, HOLE), (4096, DATA)]
    assert extents(disk) == [*expected, (10 * MIB + 5, HOLE)]
    assert extents(disk, 100, 50) == [(50, DATA)]
    assert extents(disk, MIB, MIB) == [(MIB, HOLE)]
    assert extents(disk, 4095, 3) == [(1, DATA), (2, HOLE)]
    assert extents(disk, disk.size - 1) == [(1, HOLE)]
    assert read_bytes(disk, 10 * MIB - 1, 3) == b"\0xx"


def test_a_filesystem_that_cannot_tell_has_data_everywhere(tmp_path: Path, run: Run) -> None:
    """/proc and /sys don't know SEEK_DATA; what can't be told is data."""
    disk = FileDisk("/sys/kernel/notes")
    assert extents(disk) == [(disk.size, DATA)]


def test_an_empty_file(nbdtool: Run, tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    script = 'nbdinfo --size "$uri"; nbdinfo --map "$uri"; nbdcopy "$uri" - | wc -c'
    done = nbdtool("file", tmp_path / "empty", "--run", script, status=0)
    assert done.stdout.split() == ["0", "0"]


def test_a_file_with_a_qcow2_header_is_what_it_is(nbdtool: Run, run: Run, tmp_path: Path) -> None:
    path = tmp_path / "image"
    run("qemu-img", "create", "-f", "qcow2", path, "1G")
    script = 'nbdinfo --size "$uri"; nbdcopy "$uri" "$OUT"'
    environment = {**os.environ, "OUT": str(tmp_path / "copy")}
    done = nbdtool("file", path, "--run", script, status=0, env=environment)
    assert done.stdout == f"{path.stat().st_size}\n"
    run("cmp", path, tmp_path / "copy")


def test_what_is_neither_file_nor_device(nbdtool: Run, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "loop").symlink_to("loop")
    for path in tmp_path / "none", tmp_path, tmp_path / "fifo", "/dev/null", tmp_path / "loop", "":
        for options in [], ["-r"], ["--to-file", tmp_path / "target"]:
            done = nbdtool("file", path, *options, status=1, timeout=20)
            assert re.fullmatch(r"nbdtool: error: [^\n]+\n", done.stderr)
            assert str(path) in done.stderr
    assert "linuxdisk" in nbdtool("file", tmp_path, status=1).stderr
    assert not (tmp_path / "target").exists()


def test_a_file_is_not_written_to_itself(nbdtool: Run, tmp_path: Path) -> None:
    (tmp_path / "image").write_bytes(b"data")
    (tmp_path / "link").symlink_to("image")
    done = nbdtool("file", tmp_path / "image", "--to-file", tmp_path / "link", status=1)
    assert done.stderr.count("\n") == 1
    assert (tmp_path / "image").read_bytes() == b"data"


def test_a_file_that_may_only_be_read_is_served_read_only(
    serve: Run, run: Run, tmp_path: Path
) -> None:
    run("truncate", "-s", "16M", tmp_path / "filesystem")
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree" / "image").write_bytes(b"x" * 4096)
    run("mke2fs", "-q", "-t", "ext4", "-d", tmp_path / "tree", tmp_path / "filesystem")
    (tmp_path / "mounted").mkdir()
    run("mount", "-o", "loop,ro", tmp_path / "filesystem", tmp_path / "mounted")
    try:
        with serve("file", tmp_path / "mounted" / "image") as server:
            assert json.loads(run("nbdinfo", "--json", server.uri))["exports"][0]["is_read_only"]
            assert "read-only" in server.log()
    finally:
        run("umount", tmp_path / "mounted")


# Writing


def test_writes_zeroes_and_trims_against_a_model(folder: Path) -> None:
    size = 5 * MIB + 777
    path = folder / "image"
    generator = random.Random(1)
    model = bytearray(generator.randbytes(size))
    path.write_bytes(model)
    disk = FileDisk(str(path), writable=True)
    assert disk.writable
    for _ in range(300):
        offset = generator.randrange(size)
        length = min(generator.choice([1, 512, 4096, 70_000, 2 * MIB]), size - offset)
        if generator.random() < 0.5:
            data = generator.randbytes(length)
            disk.write(offset, memoryview(data))
        else:
            data = bytes(length)
            fast = generator.random() < 0.3
            try:
                disk.zero(offset, length, punch=generator.random() < 0.5, fast=fast)
            except OSError as exc:
                assert fast
                assert exc.errno == errno.EOPNOTSUPP
                continue
        model[offset : offset + length] = data
    disk.flush()
    assert path.read_bytes() == model
    assert read_bytes(disk, 0, size) == model


def test_holes_are_made_where_they_may(folder: Path, request: pytest.FixtureRequest) -> None:
    path = folder / "image"
    path.write_bytes(os.urandom(8 * MIB))
    disk = FileDisk(str(path), writable=True)
    capable = "plain" not in request.node.name
    assert disk.can_trim == disk.can_fast_zero == capable
    disk.zero(0, 2 * MIB, punch=True, fast=capable)
    disk.zero(2 * MIB, 2 * MIB, punch=False, fast=False)
    if capable:
        disk.trim(4 * MIB, 2 * MIB)
        assert extents(disk, 0, 2 * MIB) == [(2 * MIB, HOLE)]
        assert blocks(path) <= 4 * MIB + 65536
    assert read_bytes(disk, 0, 4 * MIB) == bytes(4 * MIB)
    # What may not become a hole keeps its place: writing there can't find the disk full.
    assert blocks(path) >= 4 * MIB
    assert path.stat().st_size == 8 * MIB


def test_the_size_stays(folder: Path) -> None:
    path = folder / "image"
    path.write_bytes(b"x" * 5000)
    disk = FileDisk(str(path), writable=True)
    disk.zero(4096, 904, punch=True, fast=False)
    disk.zero(4000, 1000, punch=False, fast=False)
    disk.write(0, memoryview(b"y" * 5000))
    assert path.read_bytes() == b"y" * 5000


def test_a_full_filesystem_is_told_to_the_client(serve: Run, run: Run, tmp_path: Path) -> None:
    mounted = tmp_path / "mounted"
    mounted.mkdir()
    run("mount", "-t", "tmpfs", "-o", "size=4M", "none", mounted)
    try:
        with (mounted / "image").open("wb") as sparse:
            sparse.truncate(16 * MIB)
        with serve("file", mounted / "image") as server:
            words = ["qemu-io", "-f", "raw", "-c", "write -P 1 0 8M", server.uri]
            done = subprocess.run(words, capture_output=True, text=True)
            assert "No space left on device" in done.stdout + done.stderr
            assert "No space left on device" in server.log()
            output = run(
                "qemu-io", "-f", "raw", "-c", "discard 0 16M", "-c", "write 0 1M", server.uri
            )
            assert "wrote 1048576" in output
    finally:
        run("umount", mounted)


# Devices


def test_a_device_is_written_zeroed_and_trimmed(device: Path, tmp_path: Path) -> None:
    disk = FileDisk(str(device), writable=True)
    model = bytearray((tmp_path / "disk").read_bytes())
    assert disk.size == 8 * MIB
    assert extents(disk) == [(8 * MIB, DATA)]
    generator = random.Random(2)
    for _ in range(60):
        offset = generator.randrange(disk.size)
        length = min(generator.choice([1, 511, 512, 4096, 100_001, MIB]), disk.size - offset)
        action = generator.randrange(4)
        data = bytes(length)
        if action == 0:
            data = generator.randbytes(length)
            disk.write(offset, memoryview(data))
        elif action == 1:
            disk.zero(offset, length, punch=generator.random() < 0.5, fast=False)
        elif action == 2:
            try:
                disk.zero(offset, length, punch=True, fast=True)
            except OSError as exc:
                assert exc.errno == errno.EOPNOTSUPP
                continue
        else:
            disk.trim(offset, length)
            disk.write(offset, memoryview(data))
        model[offset : offset + length] = data
    disk.flush()
    assert read_bytes(disk, 0, disk.size) == model
    disk.trim(0, 1000)
    disk.trim(1, disk.size - 1)
    disk.flush()


def test_a_device_over_nbd(serve: Run, run: Run, device: Path, tmp_path: Path) -> None:
    content = (tmp_path / "disk").read_bytes()
    with serve("file", device) as server:
        run("nbdcopy", server.uri, tmp_path / "copy")
        assert (tmp_path / "copy").read_bytes() == content
        words = ["-c", "write -P 7 1M 64k", "-c", "write -z 2M 64k", "-c", "discard 4M 1M"]
        assert "failed" not in run("qemu-io", "-f", "raw", *words, "-c", "flush", server.uri)
    written = device.read_bytes()
    assert written[MIB : MIB + 65536] == b"\7" * 65536
    assert written[2 * MIB : 2 * MIB + 65536] == bytes(65536)
    assert written[5 * MIB :] == content[5 * MIB :]


def test_a_read_only_device(
    serve: Run, run: Run, random_file: Callable[..., Path], loop_device: Run, tmp_path: Path
) -> None:
    image = random_file(tmp_path / "image", MIB)
    with loop_device(image, "--read-only") as device, serve("file", device) as server:
        assert json.loads(run("nbdinfo", "--json", server.uri))["exports"][0]["is_read_only"]


# Running guests


@contextlib.contextmanager
def guest(image: Path, *options: str) -> Iterator[None]:
    """A qemu that holds an image, as a running guest does."""
    words = ["qemu-io", "-f", "raw", *options, str(image)]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as qemu:
        assert qemu.stdin and qemu.stdout
        qemu.stdin.write("length\n")
        qemu.stdin.flush()
        assert "MiB" in qemu.stdout.readline()  # it has the image open
        yield
        qemu.stdin.close()


@pytest.fixture
def image(tmp_path: Path, random_file: Callable[..., Path]) -> Path:
    return random_file(tmp_path / "image", 2 * MIB)


def test_a_running_guests_disk_is_not_served_for_writing(
    nbdtool: Run, serve: Run, run: Run, image: Path
) -> None:
    with guest(image):
        done = nbdtool("file", image, "-U", "-", status=1)
        assert re.fullmatch(r"nbdtool: error: .*running guest.*--allow-live.*\n", done.stderr)
        done = nbdtool("file", image, "-r", "--run", 'nbdinfo --size "$uri"', status=0)
        assert done.stdout == f"{2 * MIB}\n"
        assert re.fullmatch(r"nbdtool: warning: .*inconsistent.*\n", done.stderr)
        for spelling in "--allow-live", "allow-live=on", "--allow-live=yes":
            nbdtool("file", image, spelling, "--run", 'nbdinfo "$uri"', status=0)
        nbdtool("file", image, "allow-live=off", "--run", "true", status=1)
    with guest(image, "-r"):
        done = nbdtool("file", image, "-r", "--run", "true", status=0)
        assert done.stderr == ""
    nbdtool("file", image, "--run", "true", status=0)


def test_what_we_write_qemu_leaves_alone(serve: Run, image: Path, run: Run) -> None:
    def qemu(*options: str) -> subprocess.CompletedProcess[str]:
        words = ["qemu-io", "-f", "raw", *options, "-c", "read 0 512", str(image)]
        return subprocess.run(words, capture_output=True, text=True)

    with serve("file", image):
        assert 'Failed to get "write" lock' in qemu().stderr
        words = ["qemu-img", "convert", "-f", "raw", "-O", "raw", image, "/dev/null"]
        done = subprocess.run(words, capture_output=True, text=True)
        assert 'Failed to get shared "write" lock' in done.stderr
    with serve("file", image, "-r"):
        assert qemu("-r").returncode == 0
        assert qemu().returncode == 0
    assert qemu().returncode == 0


def test_two_of_us(nbdtool: Run, serve: Run, image: Path) -> None:
    with serve("file", image):
        nbdtool("file", image, "--run", "true", status=1)
        assert "warning" in nbdtool("file", image, "-r", "--run", "true", status=0).stderr
    with serve("file", image, "-r"):
        assert nbdtool("file", image, "-r", "--run", "true", status=0).stderr == ""
        nbdtool("file", image, "--run", "true", status=0)


def test_locks_end_with_the_server(serve: Run, nbdtool: Run, image: Path) -> None:
    with serve("file", image, status=None) as server:
        server.process.kill()
        server.process.wait()
        time.sleep(0.05)
        nbdtool("file", image, "--run", "true", status=0)


def test_modes_and_times_of_the_source_are_left_alone(serve: Run, run: Run, image: Path) -> None:
    image.chmod(0o640)
    before = image.stat()
    with serve("file", image, "-r") as server:
        run("nbdcopy", server.uri, "null:")
    after = image.stat()
    assert stat.S_IMODE(after.st_mode) == 0o640
    assert (after.st_mtime_ns, after.st_ctime_ns) == (before.st_mtime_ns, before.st_ctime_ns)
