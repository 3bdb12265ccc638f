"""nbdtool nbd: layers and targets over other NBD servers."""

from __future__ import annotations

import json
import subprocess
import time
from pathlib import Path
from typing import Any, Callable

import pytest

MIB = 1 << 20


@pytest.fixture
def image(tmp_path: Path, random_file: Callable[..., Path]) -> Path:
    path = random_file(tmp_path / "image", 5 * MIB)
    with path.open("r+b") as file:
        file.truncate(9 * MIB)
    return path


def test_a_server_behind_ours(
    image: Path, tmp_path: Path, serve: Callable[..., Any], run: Callable[..., Any]
) -> None:
    with serve("file", image) as behind, serve("nbd", behind.uri) as server:
        run("qemu-img", "compare", "-f", "raw", "-F", "raw", server.uri, image)
        assert json.loads(run("nbdinfo", "--map", "--json", server.uri)) == json.loads(
            run("nbdinfo", "--map", "--json", behind.uri)
        )
        run("qemu-io", "-f", "raw", "-c", "write -P 9 1M 64k", "-c", "flush", server.uri)
        run("nbdcopy", server.uri, tmp_path / "copy")
        assert (tmp_path / "copy").read_bytes() == image.read_bytes()
    assert image.read_bytes()[MIB : MIB + 65536] == b"\x09" * 65536


def test_qcow2_over_a_server_to_a_file(
    image: Path, tmp_path: Path, serve: Callable[..., Any], nbdtool: Any, run: Callable[..., Any]
) -> None:
    qcow2, out = tmp_path / "image.qcow2", tmp_path / "out"
    run("qemu-img", "convert", "-c", "-f", "raw", "-O", "qcow2", image, qcow2)
    with serve("file", qcow2, "-r") as behind:
        nbdtool("nbd", behind.uri, "--qcow2", "--to-file", out, status=0)
    assert out.read_bytes() == image.read_bytes()
    assert out.stat().st_blocks * 512 < 7 * MIB


def test_cow_over_a_read_only_server(
    image: Path, serve: Callable[..., Any], run: Callable[..., Any]
) -> None:
    before = image.read_bytes()
    with serve("file", image, "-r") as behind, serve("nbd", behind.uri, "--cow") as server:
        run("qemu-io", "-f", "raw", "-c", "write -P 9 1M 64k", server.uri)
        run("qemu-io", "-f", "raw", "-c", "read -P 9 1M 64k", server.uri)
        run("qemu-io", "-f", "raw", "-c", "read -P 0 6M 64k", server.uri)
    assert image.read_bytes() == before


@pytest.mark.slow
def test_a_copy_survives_a_restart_of_the_server(
    tmp_path: Path, random_file: Callable[..., Path], command: list[str], serve: Any
) -> None:
    image, out, path = random_file(tmp_path / "big", 48 * MIB), tmp_path / "out", tmp_path / "s"
    slow = ("nbdkit", "-f", "-U", path, "--filter=rate", "file", image, "rate=100M")
    behind = subprocess.Popen(slow)
    while not path.exists():
        time.sleep(0.01)
    copy = subprocess.Popen(
        [*command, "nbd", f"nbd+unix:///?socket={path}", "--to-file", out],
        stderr=subprocess.PIPE,
    )
    time.sleep(1)
    assert copy.poll() is None
    behind.kill()
    behind.wait()
    path.unlink()
    time.sleep(0.5)
    behind = subprocess.Popen([word if word != "rate=100M" else "rate=4G" for word in slow])
    try:
        _, errors = copy.communicate(timeout=60)
        assert copy.returncode == 0, errors
        assert out.read_bytes() == image.read_bytes()
    finally:
        behind.kill()
        behind.wait()


@pytest.mark.parametrize(
    ("words", "said", "status"),
    [
        (["nbd"], "which export?", 2),
        (["nbd", "http://localhost/"], "not an NBD URI", 1),
        (["nbd", "nbd+unix:///?socket=/nonexistent"], "No such file or directory", 1),
        (["nbd", "nbd://localhost:1/"], "Connection refused", 1),
        (["nbd", "--connections=0", "nbd://localhost/"], "not a number of connections", 2),
    ],
)
def test_failures_are_one_line(words: list[str], said: str, status: int, nbdtool: Any) -> None:
    done = nbdtool(*words, "--run", "true", status=status)
    assert said in done.stderr and done.stderr.count("\n") == 1
