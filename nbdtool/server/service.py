"""The server: it accepts clients, gives each a thread, and ends them in good order."""

from __future__ import annotations

import os
import select
import socket
import threading
import time

from nbdtool.errors import debug, warn
from nbdtool.server.budget import Budget
from nbdtool.server.handshake import Handshake, Policy
from nbdtool.server.parallel import ParallelTransmission
from nbdtool.server.stream import Dropped, SocketStream, Stream
from nbdtool.server.transmission import Transmission

GRACE = 5.0  # seconds for requests in flight when the server stops
_MAX_WARNINGS = 100  # different ones; the same text is printed once


class Connection:
    """One client, from its first byte to its last."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self.handshake: Handshake | None = None
        self.transmission: Transmission | None = None
        self.thread: threading.Thread | None = None

    @property
    def stream(self) -> Stream:
        """The stream that is in use: TLS takes the place of the first one."""
        return self._stream if self.handshake is None else self.handshake.stream

    def shut_idle(self) -> None:
        """End it if it waits for a request."""
        if self.transmission is None or self.transmission.idle:
            self.stream.shut(reading_only=True)


class Service:
    """Serves exports to all clients that come."""

    def __init__(self, policy: Policy, max_connections: int = 1024) -> None:
        self.stopping = False
        policy.stopping = lambda: self.stopping
        self._policy = policy
        self._max = max_connections
        self._budget = Budget()
        self._connections: set[Connection] = set()
        self._lock = threading.Lock()
        self._woken, self._wake = os.pipe()
        os.set_blocking(self._wake, False)
        os.set_blocking(self._woken, False)
        self._warned: set[str] = set()

    def stop(self) -> None:
        """Make accept() return; from a signal handler or another thread."""
        self.stopping = True
        self._poke()

    def _poke(self) -> None:
        try:
            os.write(self._wake, b"!")
        except BlockingIOError:
            pass  # it will wake anyway

    def accept(self, sockets: list[socket.socket]) -> None:
        """Take clients from listening sockets until stop()."""
        listeners = {sock.fileno(): sock for sock in sockets}
        for sock in sockets:
            sock.setblocking(False)
        while not self.stopping:
            poll = select.poll()
            poll.register(self._woken, select.POLLIN)
            if len(self._connections) < self._max:
                for fd in listeners:
                    poll.register(fd, select.POLLIN)
            for fd, _ in poll.poll():
                if fd == self._woken:
                    os.read(self._woken, 4096)
                    continue
                try:
                    sock, address = listeners[fd].accept()
                except OSError as exc:
                    if not isinstance(exc, BlockingIOError):
                        self.warn(f"no new client: {exc.strerror}")
                        time.sleep(0.1)  # out of descriptors: some may be closed by then
                    continue
                self._start(SocketStream(sock, _peer(address)))

    def _start(self, stream: Stream) -> None:
        connection = Connection(stream)
        connection.thread = threading.Thread(target=self.serve, args=(connection,), daemon=True)
        with self._lock:
            self._connections.add(connection)
        try:
            connection.thread.start()
        except RuntimeError:
            self.warn("no new client: the system has no more threads")
            stream.close()
            with self._lock:
                self._connections.discard(connection)

    def serve(self, connection: Connection) -> None:
        """Serve one client to its end, in this thread."""
        peer = connection.stream.peer
        debug(f"{peer}: connected")
        try:
            connection.handshake = Handshake(connection.stream, self._policy)
            with self._budget.connection():
                session = connection.handshake.run()
                if session is not None and session.export is not None:
                    debug(f"{peer}: opened export {session.export.name!r}")
                    # TLS can't send and receive at once.
                    parallel = session.export.disk.parallel > 1 and not connection.stream.encrypted
                    connection.transmission = (ParallelTransmission if parallel else Transmission)(
                        session, self._budget, self.warn, self._policy.stopping
                    )
                    connection.transmission.run()
            debug(f"{peer}: disconnected")
        except Dropped as exc:
            debug(f"{peer}: dropped: {exc}")
            if exc.__cause__:  # a failure of the disk that could not be answered
                self.warn(str(exc))
        except Exception as exc:
            self.warn(f"{peer}: a fault in nbdtool: {exc!r}", exc)
        finally:
            connection.stream.close()
            with self._lock:
                self._connections.discard(connection)
            self._poke()

    def finish(self) -> None:
        """Let requests in flight end, for GRACE seconds, and close all connections."""
        self.stopping = True
        deadline = time.monotonic() + GRACE
        while time.monotonic() < deadline and self._connections:
            for connection in self._snapshot():
                connection.shut_idle()
            time.sleep(0.01)
        late = self._snapshot()
        if late:
            self.warn(f"cut {len(late)} connection(s) off: their requests took too long")
        for connection in late:
            connection.stream.shut()
        for connection in self._snapshot():
            if connection.thread is not None:
                connection.thread.join(0.2)

    def _snapshot(self) -> list[Connection]:
        with self._lock:
            return list(self._connections)

    def warn(self, text: str, exc: BaseException | None = None) -> None:
        """Tell the user once of each failure that clients see."""
        if text not in self._warned and len(self._warned) < _MAX_WARNINGS:
            self._warned.add(text)
            warn(text)
        debug(text, exc)


def _peer(address: object) -> str:
    if isinstance(address, tuple):
        return f"{address[0]} port {address[1]}"
    return "client on the Unix socket"
