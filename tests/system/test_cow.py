"""--cow with real clients: concurrent writers, fio's verification, a filesystem, a full disk."""

from __future__ import annotations

import errno
import json
import os
import random
import signal
import threading
from pathlib import Path
from typing import Any, Callable

import nbd
import pytest

from nbdtool.disks.file import FileDisk

KIB, MIB = 1 << 10, 1 << 20


@pytest.fixture
def image(tmp_path: Path, random_file: Callable[..., Path]) -> Path:
    image = random_file(tmp_path / "image", 8 * MIB)
    os.truncate(image, 16 * MIB)
    return image


def connect(uri: str) -> Any:
    handle = nbd.NBD()
    handle.connect_uri(uri)
    return handle


def test_what_is_offered_over_a_read_only_source(
    serve: Callable[..., Any], run: Callable[..., Any], tmp_path: Path
) -> None:
    (tmp_path / "tree").mkdir()
    with serve("linuxdisk", tmp_path / "tree", "--cow") as server:
        (export,) = json.loads(run("nbdinfo", "--json", server.uri))["exports"]
        offered = {name for name, value in export.items() if value is True}
        assert offered >= {"can_zero", "can_fast_zero", "can_trim", "can_flush", "can_fua"}
        assert offered >= {"can_multi_conn"}
        assert not export["is_read_only"]
    with serve("linuxdisk", tmp_path / "tree", "--cow", "-r") as server:
        assert json.loads(run("nbdinfo", "--json", server.uri))["exports"][0]["is_read_only"]


@pytest.mark.slow
def test_eight_connections_against_a_model(serve: Callable[..., Any], image: Path) -> None:
    """Each has bytes of its own in every block, and a region of its own to trim."""
    before = image.read_bytes()
    model = bytearray(before)
    step, clients, region = 1 * KIB, 8, MIB  # the regions are the second half
    failures: list[BaseException] = []

    def work(uri: str, number: int) -> None:
        generator = random.Random(number)
        try:
            handle = connect(uri)
            for _ in range(400):
                what = generator.random()
                if what < 0.8:
                    stripe = generator.randrange(8 * MIB // (step * clients)) * clients + number
                    offset = stripe * step + generator.randrange(step // 2)
                    length = generator.randrange(1, step // 2)
                else:
                    offset = 8 * MIB + number * region + generator.randrange(region // 2)
                    length = generator.randrange(1, region // 2)
                data = generator.randbytes(length) if what < 0.5 or what > 0.9 else bytes(length)
                if any(data):
                    handle.pwrite(data, offset)
                elif what < 0.8:
                    handle.zero(length, offset, nbd.CMD_FLAG_NO_HOLE * generator.randrange(2))
                elif what < 0.85:
                    handle.zero(length, offset)
                else:
                    handle.trim(length, offset)
                    data = bytes(handle.pread(length, offset))
                    assert all(
                        new in (old, 0) for new, old in zip(data, model[offset : offset + length])
                    )
                model[offset : offset + length] = data
                assert handle.pread(length, offset) == data
            handle.shutdown()
        except BaseException as error:
            failures.append(error)

    with serve("file", image, "--cow") as server:
        threads = [threading.Thread(target=work, args=(server.uri, n)) for n in range(clients)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failures, failures
        handle = connect(server.uri)
        assert handle.pread(16 * MIB, 0) == model
    assert image.read_bytes() == before


@pytest.mark.slow
def test_fio_verifies(serve: Callable[..., Any], run: Callable[..., Any], image: Path) -> None:
    with serve("file", image, "--cow") as server:
        run(
            *("fio", "--name=verify", "--ioengine=nbd", f"--uri={server.uri}", "--rw=randwrite"),
            *("--bsrange=512-128k", "--iodepth=16", "--size=16m", "--verify=crc32c"),
            *("--verify_state_save=0", "--output-format=terse"),
        )


@pytest.mark.slow
def test_filesystem_is_changed_through_it(
    serve: Callable[..., Any],
    run: Callable[..., Any],
    partition: Callable[..., tuple[int, int]],
    e2fsck: Callable[..., None],
    mount: Callable[..., Any],
    tmp_path: Path,
) -> None:
    tree = tmp_path / "tree"
    tree.mkdir()
    (tree / "kept").write_text("kept")
    (tree / "doomed").write_bytes(b"d" * 100_000)
    saved = tmp_path / "saved"
    words = ["linuxdisk", tree, "--cow", "--cow-save", saved]
    with serve(*words) as server:
        # debugfs changes a copy, and what differs goes through the server.
        before, after = tmp_path / "before", tmp_path / "after"
        run("nbdcopy", server.uri, before)
        run("cp", before, after)
        start, _ = partition(after)
        (tmp_path / "new").write_bytes(b"n" * 70_000)
        filesystem = f"{after}?offset={start}"
        for request in "rm doomed", f"write {tmp_path / 'new'} new", "mkdir directory":
            run("debugfs", "-w", "-R", request, filesystem)
        old, new = before.read_bytes(), after.read_bytes()
        handle = connect(server.uri)
        for at in range(0, len(old), KIB):
            if old[at : at + KIB] != new[at : at + KIB]:
                handle.pwrite(new[at : at + KIB], at)
        handle.flush()
        handle.shutdown()
    assert saved.read_bytes() == new
    start, size = partition(saved)
    e2fsck(saved, start)
    with mount(saved, start, size) as directory:
        assert (directory / "kept").read_text() == "kept"
        assert (directory / "new").read_bytes() == b"n" * 70_000
        assert (directory / "directory").is_dir()
        assert not (directory / "doomed").exists()
    assert (tree / "doomed").exists()


def test_clients_are_told_that_it_is_full(serve: Callable[..., Any], image: Path) -> None:
    with serve("file", image, "--cow", "--cow-limit=1M") as server:
        handle = connect(server.uri)
        handle.pwrite(b"a" * MIB, 0)
        with pytest.raises(nbd.Error) as failure:
            handle.pwrite(b"b", 2 * MIB)
        assert failure.value.errnum == errno.ENOSPC
        handle.trim(64 * KIB, 0)
        handle.pwrite(b"b", 2 * MIB)
        assert (
            handle.pread(MIB, 64 * KIB)
            == b"a" * (960 * KIB) + image.read_bytes()[MIB : MIB + 64 * KIB]
        )


def test_nothing_is_left_behind(serve: Callable[..., Any], image: Path, tmp_path: Path) -> None:
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    environment = {**os.environ, "TMPDIR": os.fspath(temporary)}
    with serve("file", image, "--cow", env=environment, status=None) as server:
        connect(server.uri).pwrite(b"x" * MIB, 0)
        assert os.listdir(temporary) == []
        server.stop(signal.SIGKILL)
    assert os.listdir(temporary) == []


def test_saving_that_fails(
    serve: Callable[..., Any], run: Callable[..., Any], image: Path, tmp_path: Path
) -> None:
    directory = tmp_path / "small"
    directory.mkdir()
    run("mount", "-t", "tmpfs", "-o", "size=1m", "none", directory)
    try:
        with serve("file", image, "--cow", "--cow-save", directory / "saved", status=1) as server:
            connect(server.uri).pwrite(b"x", 0)
            server.stop()
            assert f"error: {directory}/saved: No space left on device\n" in server.log()
        assert os.listdir(directory) == []
    finally:
        run("umount", directory)


def test_a_source_in_use_is_only_read_under_an_overlay(
    nbdtool: Callable[..., Any], random_file: Callable[..., Path], tmp_path: Path
) -> None:
    image = random_file(tmp_path / "image", MIB)
    holder = FileDisk(str(image), writable=True)
    refused = nbdtool("file", image, "--run", "true")
    assert refused.returncode == 1 and "in use" in refused.stderr
    served = nbdtool("file", image, "--cow", "--run", 'qemu-io -f raw -c "write 0 64k" "$nbd"')
    assert served.returncode == 0 and "somebody writes to it" in served.stderr
    holder.close()
