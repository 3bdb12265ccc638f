"""Clients on standard input, and sockets from a service manager."""

from __future__ import annotations

import os
import re
import shlex
import socket
import subprocess
import time
from pathlib import Path
from typing import Any, Callable

import nbd
import pytest

from tests.server import wire
from tests.server.wire import MIB, Client, wait_for

Run = Callable[..., Any]


def listeners(pid: int) -> set[tuple[str, int]]:
    """(address, port) of all TCP sockets that a process listens on."""
    lines = subprocess.check_output(["ss", "-Hltnp"], text=True).splitlines()
    addresses = [line.split()[3] for line in lines if f"pid={pid}," in line]
    return {(address.rpartition(":")[0], int(address.rpartition(":")[2])) for address in addresses}


# Standard input and output


def test_one_client_over_a_socket_on_standard_input(command: list[str], image: Path) -> None:
    ours, theirs = socket.socketpair()
    process = subprocess.Popen([*command, "-s", "file", image], stdin=theirs, stdout=theirs)
    theirs.close()
    client = Client(ours).hello()
    client.go()
    assert client.read(0, 4 * MIB) == image.read_bytes()
    client.send(client.packed(wire.DISC))
    assert client.ended()
    assert process.wait(20) == 0


class Pipes:
    """Two pipes as if they were a socket."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        assert process.stdin and process.stdout
        self._in, self._out = process.stdout, process.stdin

    def settimeout(self, seconds: float) -> None:
        pass

    def sendall(self, data: bytes) -> None:
        self._out.write(data)
        self._out.flush()

    def recv(self, length: int) -> bytes:
        return os.read(self._in.fileno(), length)


def test_one_client_over_pipes(command: list[str], image: Path, tmp_path: Path) -> None:
    words = [*command, "-s", "-v", "file", image]
    with subprocess.Popen(
        words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as process:
        client = Client(Pipes(process)).hello()  # type: ignore[arg-type]
        assert client.outcome(wire.STARTTLS) in (wire.PLATFORM, wire.POLICY)
        client.go()
        assert client.read(0, 4 * MIB) == image.read_bytes()
        assert client.do(wire.READ, 4 * MIB, 1).error == wire.EINVAL
        for _ in range(20):
            client.request(wire.READ, 0, MIB)
        for _ in range(20):
            assert len(client.answer().data) == MIB
        assert process.stdin
        process.stdin.close()
        assert client.ended()
        assert process.wait(20) == 0


@pytest.mark.parametrize("pipes", [True, False])
@pytest.mark.parametrize("asked", [0, 1])
def test_a_signal_ends_the_one_client(
    command: list[str], image: Path, pipes: bool, asked: int
) -> None:
    ours, theirs = socket.socketpair()
    stdin: Any = subprocess.PIPE if pipes else theirs
    with subprocess.Popen([*command, "-s", "file", image], stdin=stdin, stdout=stdin) as process:
        theirs.close()
        client = Client(Pipes(process) if pipes else ours).hello()  # type: ignore[arg-type]
        client.go()
        client.read(0, 1)
        for _ in range(asked):
            client.request(wire.READ, 0, 4 * MIB)
        time.sleep(0.2)
        process.terminate()
        for _ in range(asked):
            assert client.answer().data == image.read_bytes()
        assert process.wait(4) == 0


def test_libnbd_starts_it_as_a_subprocess(command: list[str], run: Run, image: Path) -> None:
    handle = nbd.NBD()
    handle.connect_command([*command, "-s", "file", str(image), "-r"])
    assert handle.pread(MIB, MIB) == image.read_bytes()[MIB : 2 * MIB]
    handle.shutdown()


# Sockets from a service manager


def test_libnbd_starts_it_by_socket_activation(
    command: list[str], run: Run, image: Path, tmp_path: Path
) -> None:
    run("nbdcopy", "--", "[", *command, "file", image, "-r", "]", tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == image.read_bytes()
    run("nbdcopy", "--", image, "[", *command, "file", tmp_path / "copy", "]")
    assert run("nbdinfo", "--size", "--", "[", *command, "file", image, "]") == f"{4 * MIB}\n"


@pytest.mark.parametrize("unix", [True, False])
def test_socket_activation(
    command: list[str], run: Run, image: Path, tmp_path: Path, unix: bool
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    where = str(tmp_path / "socket") if unix else f"127.0.0.1:{port}"
    uri = f"nbd+unix:///?socket={where}" if unix else f"nbd://{where}"
    words = ["systemd-socket-activate", "-l", where, "-E", "PYTHONPATH", *command, "file", image]
    process = subprocess.Popen(words, stderr=subprocess.DEVNULL)
    try:
        if unix:
            wait_for(lambda: Path(where).exists())
        else:
            wait_for(lambda: listeners(process.pid))
        assert run("nbdinfo", "--size", uri) == f"{4 * MIB}\n"
        assert run("nbdinfo", "--size", uri) == f"{4 * MIB}\n"
    finally:
        process.terminate()
        assert process.wait(20) == 0
    assert Path(where).exists() == unix  # the socket is the manager's


def test_socket_activation_of_another_process_is_not_ours(nbdtool: Run, image: Path) -> None:
    environment = {**os.environ, "LISTEN_PID": "1", "LISTEN_FDS": "1"}
    done = nbdtool("file", image, "--run", "echo $LISTEN_PID", env=environment, status=0)
    assert done.stdout == "1\n"


@pytest.mark.parametrize("count", ["0", "x", "-1", "99999999999999999999", "2"])
def test_bad_socket_activation(command: list[str], nbdtool: Run, image: Path, count: str) -> None:
    words = " ".join(map(shlex.quote, [*command, "file", str(image)]))
    script = f"export LISTEN_PID=$$ LISTEN_FDS={count}; exec {words} 3</dev/null"
    done = subprocess.run(["sh", "-c", script], capture_output=True, text=True, timeout=30)
    assert done.returncode == 1
    assert re.fullmatch("nbdtool: error: [^\n]*\n", done.stderr)
