"""Running nbdtool and its peers, and measuring their clients."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import struct
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

NBDTOOL = os.environ.get("NBDTOOL") or str(Path(__file__).resolve().parent.parent / "dist/nbdtool")
MIB = 1 << 20
BLOCK = os.urandom(MIB)


def run(*command: Any, **kwargs: Any) -> str:
    """Run a command to its end; its standard output."""
    kwargs.setdefault("stderr", subprocess.PIPE)
    words = [os.fspath(word) for word in command]
    done: subprocess.CompletedProcess[str] = subprocess.run(
        words, check=False, stdout=subprocess.PIPE, text=True, **kwargs
    )
    if done.returncode:
        print(" ".join(words), done.stderr, sep="\n")
        done.check_returncode()
    return done.stdout


def seconds(*command: Any, **kwargs: Any) -> float:
    """How long a command takes."""
    began = time.perf_counter()
    run(*command, **kwargs)
    return time.perf_counter() - began


def peak_memory(*command: Any) -> int:
    """The most memory that a command had resident, in bytes."""
    process = subprocess.Popen(
        [os.fspath(word) for word in command], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, process.args)
    return usage.ru_maxrss * 1024


def random_file(path: Path, size: int) -> Path:
    """A file that doesn't compress; one random MiB and a counter make up each MiB of it."""
    with path.open("wb") as file:
        for number in range(size // MIB):
            file.write(struct.pack("<Q", number))
            file.write(BLOCK[8:])
    return path


def uri(directory: Path, name: str) -> str:
    return f"nbd+unix:///?socket={directory / name}"


def command(server: str, path: Path, socket_path: Path, *options: str) -> list[str]:
    """How each server serves a raw file on a Unix socket, in the foreground."""
    unix = str(socket_path)
    if server == "nbdtool":
        return [NBDTOOL, "file", str(path), "-f", "-U", unix, *options]
    if server == "nbdkit file":
        return ["nbdkit", "-f", "-U", unix, *options, "file", str(path)]
    if server == "qemu-nbd":
        return [
            "qemu-nbd",
            "-t",
            "-e",
            "16",
            "-f",
            "raw",
            "-x",
            "",
            "-k",
            unix,
            *options,
            str(path),
        ]
    raise ValueError(server)


@contextlib.contextmanager
def serving(words: list[str], socket_path: Path) -> Iterator[None]:
    """A server that runs until the end of the block; ready when it greets."""
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_for_greeting(process, socket_path).close()
        yield
    finally:
        process.terminate()
        process.wait()


def wait_for_greeting(process: subprocess.Popen[Any], path: Path) -> socket.socket:
    """A connection to the server as soon as it accepts one; the greeting is still to be read."""
    while True:
        if process.poll() is not None:
            raise subprocess.CalledProcessError(process.returncode, process.args)
        connection = socket.socket(socket.AF_UNIX)
        try:
            connection.connect(str(path))
            connection.recv(16, socket.MSG_PEEK | socket.MSG_WAITALL)
            return connection
        except OSError:
            connection.close()
            time.sleep(0.001)


def receive(connection: socket.socket, length: int) -> bytes:
    data = b""
    while len(data) < length:
        piece = connection.recv(length - len(data))
        if not piece:
            raise ConnectionError("the server closed the connection")
        data += piece
    return data


def first_byte(words: list[str], path: Path) -> float:
    """Seconds from the start of a server to the first bytes of its disk, by NBD_OPT_EXPORT_NAME."""
    began = time.perf_counter()
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        with wait_for_greeting(process, path) as connection:
            receive(connection, 18)
            connection.sendall(struct.pack(">I8sII", 3, b"IHAVEOPT", 1, 0))
            receive(connection, 10)
            connection.sendall(struct.pack(">IHHQQI", 0x25609513, 0, 0, 1, 0, 512))
            receive(connection, 16 + 512)
            return time.perf_counter() - began
    finally:
        process.terminate()
        process.wait()
        path.unlink(missing_ok=True)


def fio(uri: str, mode: str, depth: int, *, jobs: int = 1, runtime: float = 2) -> float:
    """4 KiB requests per second of fio's nbd engine."""
    output = run(
        "fio",
        "--name=bench",
        "--ioengine=nbd",
        f"--uri={uri}",
        f"--rw={mode}",
        "--bs=4k",
        f"--iodepth={depth}",
        f"--numjobs={jobs}",
        "--group_reporting",
        "--time_based",
        f"--runtime={runtime}",
        "--output-format=json",
    )
    job = json.loads(output[output.index("{") :])["jobs"][0]
    return float(job["read" if "read" in mode else "write"]["iops"])


def bare_sendfile(path: Path, piece: int = 256 << 10) -> float:
    """Seconds to move a file through a socketpair with nothing else to do: the machine's limit."""
    ours, theirs = socket.socketpair()
    drain = os.fork()
    if drain == 0:
        ours.close()
        buffer = bytearray(MIB)
        while theirs.recv_into(buffer):
            pass
        os._exit(0)
    theirs.close()
    began = time.perf_counter()
    with path.open("rb") as file, ours:
        offset = 0
        while sent := os.sendfile(ours.fileno(), file.fileno(), offset, piece):
            offset += sent
    os.waitpid(drain, 0)
    return time.perf_counter() - began
