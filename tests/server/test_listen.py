"""Where a server listens, and whom it takes over from."""

from __future__ import annotations

import re
import socket
import subprocess
from pathlib import Path
from typing import Any, Callable

import pytest

from tests.server.wire import MIB, wait_for

Run = Callable[..., Any]


def listeners(pid: int) -> set[tuple[str, int]]:
    """(address, port) of all TCP sockets that a process listens on."""
    lines = subprocess.check_output(["ss", "-Hltnp"], text=True).splitlines()
    addresses = [line.split()[3] for line in lines if f"pid={pid}," in line]
    return {(address.rpartition(":")[0], int(address.rpartition(":")[2])) for address in addresses}


# TCP


@pytest.mark.parametrize(
    ("options", "hosts"),
    [
        ([], {"127.0.0.1", "[::1]"}),
        (["-4"], {"127.0.0.1"}),
        (["-6"], {"[::1]"}),
        (["-i", "127.0.0.1"], {"127.0.0.1"}),
        (["-i", "::1"], {"[::1]"}),
        (["-i", "0.0.0.0"], {"0.0.0.0"}),
        (["-i", "::"], {"[::]"}),
        (["-i", "*"], {"0.0.0.0", "[::]"}),
        (["-i", "127.0.0.9"], {"127.0.0.9"}),
        (["-4", "--ipaddr=localhost"], {"127.0.0.1"}),
    ],
)
def test_listens_where_it_is_told_on_one_port(
    start: Run, run: Run, image: Path, options: list[str], hosts: set[str]
) -> None:
    with start("file", image, "-r", "-p", "0", "--print-uri", *options) as process:
        uri = wait_for(process.out).strip()
        port = int(uri.rpartition(":")[2].rstrip("/"))
        assert listeners(process.pid) == {(host, port) for host in hosts}
        for host in hosts:
            host = {"0.0.0.0": "127.0.0.1", "[::]": "[::1]"}.get(host, host)
            assert run("nbdinfo", "--size", f"nbd://{host}:{port}") == f"{4 * MIB}\n"
        assert run("nbdinfo", "--size", uri) == f"{4 * MIB}\n"


def test_the_start_line_says_who_can_reach_it_and_its_commands_work(
    start: Run, run: Run, image: Path
) -> None:
    with start("file", image, "-r", "-p", "0", "-e", "a b;c") as process:
        log = wait_for(lambda: process.log() if "guestfish" in process.log() else "")
        assert str(image) in log
        assert "4.0 MiB" in log
        assert "read-only" in log
        assert "to this machine" in log
        nbdinfo, guestfish = [line.strip() for line in log.splitlines() if line.startswith("    ")]
        assert f"export-size: {4 * MIB}" in run("sh", "-c", nbdinfo)
        assert guestfish.startswith("guestfish --ro --format=raw -a nbd://localhost:")
        assert guestfish.endswith("/a%20b%3Bc")
    with start("file", image, "-p", "0", "-i", "*") as process:
        log = wait_for(process.log)
        assert "to anyone who reaches this machine's port" in log
        assert "writable" in log


def test_a_port_in_use_is_an_error_of_one_line(nbdtool: Run, image: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        done = nbdtool("file", image, "-p", port.__str__(), status=1)
    assert re.fullmatch(f"nbdtool: error: .*{port}.*in use.*-p 0\n", done.stderr)


@pytest.mark.parametrize("address", ["192.0.2.1", "nowhere.invalid", "::ffff:1:2:3:4:5:6:7:8", ""])
def test_addresses_that_are_not_here(nbdtool: Run, image: Path, address: str) -> None:
    done = nbdtool("file", image, "-p", "0", "-i", address, status=1)
    assert done.stderr.startswith("nbdtool: error: ")
    assert done.stderr.count("\n") == 1


# Unix sockets


def test_a_unix_socket_is_for_its_owner_and_removed(
    start: Run, run: Run, image: Path, tmp_path: Path
) -> None:
    path = tmp_path / "a socket"
    with start("file", image, "-U", path, umask=0) as process:
        assert path.stat().st_mode & 0o7777 == 0o600
        line = next(line for line in wait_for(process.log).splitlines() if "nbdinfo" in line)
        assert "to this user" in process.log()
        assert "export-size" in run("sh", "-c", line)
    assert not path.exists()
    assert process.returncode == 0
    with start("file", image, "-U", path, "--unix-mode=666", umask=0o077) as process:
        assert path.stat().st_mode & 0o7777 == 0o666
        assert "to all users of this machine" in wait_for(process.log)


def test_a_private_socket_lies_in_a_private_directory(start: Run, run: Run, image: Path) -> None:
    with start("file", image, "-U", "-", "--print-uri") as process:
        uri = wait_for(process.out).strip()
        path = Path(uri.partition("?socket=")[2])
        assert path.parent.stat().st_mode & 0o7777 == 0o700
        assert run("nbdinfo", "--size", uri) == f"{4 * MIB}\n"
    assert not path.parent.exists()


def test_a_stale_socket_is_taken_over_and_a_live_one_is_not(
    start: Run, nbdtool: Run, run: Run, image: Path, tmp_path: Path
) -> None:
    path = tmp_path / "socket"
    with start("file", image, "-U", path) as process:
        process.kill()
        process.wait()
    assert path.is_socket()
    with start("file", image, "-r", "-U", path):
        done = nbdtool("file", image, "-r", "-U", path, status=1)
        assert "answers there already" in done.stderr
        assert run("nbdinfo", "--size", f"nbd+unix:///?socket={path}") == f"{4 * MIB}\n"
    assert not path.exists()


def test_other_files_are_never_taken_for_a_socket(
    nbdtool: Run, image: Path, tmp_path: Path
) -> None:
    precious = tmp_path / "precious"
    precious.write_text("data")
    for path in precious, tmp_path, tmp_path / "none" / "socket", tmp_path / ("n" * 200), "":
        done = nbdtool("file", image, "-U", path, status=1)
        assert done.stderr.startswith("nbdtool: error: ")
        assert done.stderr.count("\n") == 1
    assert precious.read_text() == "data"


def test_a_dangling_symlink_is_not_followed(nbdtool: Run, image: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "nothing")
    nbdtool("file", image, "-U", tmp_path / "link", status=1)
    assert not (tmp_path / "nothing").exists()
