"""Bytes to and from an NBD server: one thread receives, another may send at the same time.

What is gone, or makes no progress for `patience` seconds, raises OSError.
"""

from __future__ import annotations

import os
import select
import socket
import struct
import threading
import time
from typing import TYPE_CHECKING, Union

from nbdtool.errors import Error
from nbdtool.protocol import Buffer

if TYPE_CHECKING:
    import ssl
    from collections.abc import Sequence

    from nbdtool.disks.nbd.uri import Address


_IOV_MAX = 1024
_PIECE = 1 << 20  # bytes that TLS is given at once


class Wire:
    """A connected socket. Nothing is sent or received before start()."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self._patience = 30.0

    def start(self, patience: float) -> None:
        """Let a transfer go without progress for this many seconds."""
        self._patience = patience
        self.sock.setblocking(True)
        whole = int(patience)
        value = struct.pack("@ll", whole, max(int((patience - whole) * 1e6), 1))
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, value)

    def recv_into(self, view: memoryview) -> int:
        """Receive at least one byte."""
        try:
            count = self.sock.recv_into(view)
        except BlockingIOError:
            raise self._stalled() from None
        return count or self._ended()

    def recv(self, length: int) -> Union[bytes, memoryview]:
        """Receive exactly `length` bytes."""
        try:
            data = self.sock.recv(length, socket.MSG_WAITALL)
            while len(data) < length:
                rest = self.sock.recv(length - len(data), socket.MSG_WAITALL)
                if not rest:
                    self._ended()
                data = b"".join((data, rest))
        except BlockingIOError:
            raise self._stalled() from None
        return data

    def try_send(self, buffers: Sequence[Buffer]) -> int:
        """Send what can be sent at once; the number of bytes, 0 if it has to wait."""
        try:
            return self.sock.sendmsg(buffers[:_IOV_MAX], (), socket.MSG_DONTWAIT)
        except BlockingIOError:
            return 0

    def wait(self, events: int, timeout: float) -> int:
        """Wait for poll(2) events; those that came, or 0."""
        poll = select.poll()
        poll.register(self.sock, events)
        return next((event for _, event in poll.poll(max(timeout, 0) * 1000)), 0)

    def shut(self) -> None:
        """Let what blocks on it end, in whatever thread."""
        try:
            socket.socket.shutdown(self.sock, socket.SHUT_RDWR)
        except OSError:
            pass

    def _ended(self) -> int:
        raise ConnectionResetError("it closed the connection")

    def _stalled(self) -> OSError:
        return TimeoutError(f"it doesn't answer for {self._patience:g} seconds")


class TLSWire(Wire):
    """TLS over a connected socket; OpenSSL takes one call at a time, so none blocks."""

    def __init__(self, sock: socket.socket, address: Address) -> None:
        context = _context(address)
        name = address.tls_hostname or ("localhost" if address.path else address.host)
        self._tls: ssl.SSLSocket = context.wrap_socket(sock, server_hostname=name)
        self._lock = threading.Lock()
        super().__init__(self._tls)

    def start(self, patience: float) -> None:
        self._patience = patience
        self.sock.setblocking(False)

    def recv_into(self, view: memoryview) -> int:
        import ssl

        deadline = time.monotonic() + self._patience
        while True:
            with self._lock:
                try:
                    return self.sock.recv_into(view) or self._ended()
                except ssl.SSLWantReadError:
                    events = select.POLLIN
                except ssl.SSLWantWriteError:
                    events = select.POLLOUT
            if not self.wait(events, deadline - time.monotonic()):
                raise self._stalled()

    def recv(self, length: int) -> Union[bytes, memoryview]:
        view = memoryview(bytearray(length))
        done = 0
        while done < length:
            done += self.recv_into(view[done:])
        return view

    def try_send(self, buffers: Sequence[Buffer]) -> int:
        import ssl

        with self._lock:
            try:
                return self.sock.send(memoryview(buffers[0])[:_PIECE])
            except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
                return 0


def _context(address: Address) -> ssl.SSLContext:
    import ssl

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    if not address.tls_verify_peer:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    folder = address.tls_certificates
    try:
        if not folder:
            context.load_default_certs()
            return context
        if address.tls_verify_peer:
            context.load_verify_locations(os.path.join(folder, "ca-cert.pem"))
        certificate = os.path.join(folder, "client-cert.pem")
        if os.path.exists(certificate):
            key = os.path.join(folder, "client-key.pem")
            context.load_cert_chain(certificate, key, password=lambda: b"")
    except (OSError, ValueError) as exc:
        raise Error(f"{folder}: its certificates can't be used: {exc}") from None
    return context
