"""A server in this process, and a disk in memory for it to serve."""

from __future__ import annotations

import contextlib
import gc
import os
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any, Union

from nbdtool.disk import DATA, HOLE, Disk, Extent, Span, ZeroSpan
from nbdtool.server.exports import Exports
from nbdtool.server.handshake import Policy
from nbdtool.server.service import Connection, Service
from nbdtool.server.stream import SocketStream
from tests.server.wire import MIB, Client


class MemoryDisk(Disk):
    """A writable disk in memory, which remembers what was done to it."""

    description = "memory"
    writable = can_trim = can_fast_zero = True

    def __init__(self, size: int = MIB) -> None:
        self.size = size
        self.content = bytearray(size)
        self.done: list[tuple[Any, ...]] = []

    def prefetch(self, ranges: Any) -> None:
        self.done.append(("prefetch", list(ranges)))

    def read(self, offset: int, length: int) -> list[Span]:
        data = bytes(self.content[offset : offset + length])
        return [data] if any(data) else [ZeroSpan(length)]

    def write(self, offset: int, data: memoryview) -> None:
        self.done.append(("write", offset, len(data)))
        self.content[offset : offset + len(data)] = data

    def zero(self, offset: int, length: int, *, punch: bool, fast: bool) -> None:
        self.done.append(("zero", offset, length, punch, fast))
        self.content[offset : offset + length] = bytes(length)

    def trim(self, offset: int, length: int) -> None:
        self.done.append(("trim", offset, length))

    def flush(self) -> None:
        self.done.append(("flush",))

    def extents(self, offset: int, length: int) -> Iterator[Extent]:
        while length:
            step = min(4096 - offset % 4096, length)
            page = self.content[offset // 4096 * 4096 :][:4096]
            yield Extent(step, DATA if any(page) else HOLE)
            offset, length = offset + step, length - step


class Harness:
    """A server in this process; each connect() is a client over a socketpair."""

    def __init__(self, disks: Union[Disk, dict[str, Disk]], **options: Any) -> None:
        if isinstance(disks, Disk):
            disks = {"": disks}
        names = {key: options.pop(key) for key in ("name", "read_only") if key in options}
        self.service = Service(Policy(Exports(disks, **names), **options))
        self.warnings: list[str] = []
        self.service.warn = self._warn  # type: ignore[method-assign]
        self.threads: list[threading.Thread] = []
        self.clients: list[Client] = []

    def _warn(self, text: str, exc: BaseException | None = None) -> None:
        self.warnings.append(text)

    def connect(self, *, tcp: bool = False) -> Client:
        """A client that has not said anything yet."""
        ours, theirs = _tcp_pair() if tcp else socket.socketpair()
        connection = Connection(SocketStream(theirs, "the test"))
        connection.thread = threading.Thread(target=self.service.serve, args=(connection,))
        self.service._connections.add(connection)
        self.threads.append(connection.thread)
        connection.thread.start()
        self.clients.append(Client(ours))
        return self.clients[-1]

    def client(self, name: str = "", **options: Any) -> Client:
        """A client in transmission."""
        client = self.connect().hello()
        client.go(name, **options)
        return client

    def leave(self, timeout: float = 20) -> None:
        """All clients go, and the server's threads with them."""
        for client in self.clients:
            client.close()
        deadline = time.monotonic() + timeout
        for thread in self.threads:
            thread.join(max(deadline - time.monotonic(), 0))
            assert not thread.is_alive(), "a connection doesn't end"
        self.threads.clear()
        self.clients.clear()
        assert not self.service._connections


def _tcp_pair() -> tuple[socket.socket, socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        ours = socket.create_connection(listener.getsockname())
        return ours, listener.accept()[0]


@contextlib.contextmanager
def harness(disks: Union[Disk, dict[str, Disk]], **options: Any) -> Iterator[Harness]:
    """A Harness that leaves no thread and no descriptor behind.

    options are Policy's, and Exports' name and read_only.
    """
    before = _open_sockets()
    running = Harness(disks, **options)
    try:
        yield running
    finally:
        running.leave()
        os.close(running.service._woken)
        os.close(running.service._wake)
    assert not [text for text in running.warnings if "fault" in text]
    del running
    assert _open_sockets() == before


def _open_sockets() -> set[str]:
    gc.collect()
    names = set()
    for entry in os.scandir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # that of scandir itself
            names.add(os.readlink(entry.path))
    return {name for name in names if name.startswith(("socket:", "pipe:"))}
