"""Bytes to and from one client, over a socket or a pair of pipes (over TLS: tls.py).

All block. What makes no progress for `patience` seconds raises Stalled, a peer that is gone Ended;
never OSError, so that a failure of the disk can't be taken for one of the client.
"""

from __future__ import annotations

import errno
import os
import select
import socket
import struct
from collections.abc import Sequence

from nbdtool.disk import SpanFile
from nbdtool.protocol import Buffer, unsent

_IOV_MAX = 1024
_PIECE = 256 << 10  # bytes that pass through memory at once where sendfile can't be used
_SPARE_MAX = 8
_spare: list[memoryview] = []  # buffers for that: fresh ones cost as much as the copying
_UNIX_BUFFER = 256 << 10
_TRIES = 50  # of a receive, some 50 us, before sleeping: waking up takes as long


class Dropped(Exception):
    """The connection must end; the text says why."""


class Ended(Dropped):
    """The peer has gone."""


class Stalled(Dropped):
    """No progress within the patience."""


class Stream:
    peer: str  # who is at the other end, for messages
    encrypted = False

    def set_patience(self, seconds: float) -> None:
        """How long a transfer may go without progress."""
        raise NotImplementedError

    def recv_into(self, view: memoryview, *, soon: bool = False, fully: bool = False) -> int:
        """Read at least one byte into view, and say how many.

        soon: they are under way, to sleep would take longer; fully: try to fill view.
        """
        raise NotImplementedError

    def ready(self) -> bool:
        """Whether recv_into() would not have to wait."""
        raise NotImplementedError

    def send(self, buffers: Sequence[Buffer], length: int, *, more: bool = False) -> None:
        """Write all of buffers, length bytes in sum; more follows at once if `more`."""
        raise NotImplementedError

    def sendfile(self, file: SpanFile, offset: int, length: int) -> int:
        """Write a range of a file; fewer bytes than asked for where it can't be read on."""
        try:
            buffer = _spare.pop()
        except IndexError:
            buffer = memoryview(bytearray(_PIECE))
        sent = 0
        while sent < length:
            try:
                count = os.preadv(file.fd, [buffer[: length - sent]], offset + sent)
            except OSError:
                break
            if not count:
                break
            self.send((buffer[:count],), count)
            sent += count
        if len(_spare) < _SPARE_MAX:
            _spare.append(buffer)
        return sent

    def shut(self, *, reading_only: bool = False) -> None:
        """From another thread: let blocked calls of this stream end."""

    def close(self) -> None:
        raise NotImplementedError


# What a socket says of its peer, where sendfile could also speak of the file
_PEER_ERRORS = (errno.EPIPE, errno.ECONNRESET, errno.ENOTCONN, errno.ETIMEDOUT, errno.ECONNABORTED)


class SocketStream(Stream):
    def __init__(self, sock: socket.socket, peer: str) -> None:
        self.sock, self.peer = sock, peer
        sock.setblocking(True)
        self._fd = sock.fileno()
        if sock.family == socket.AF_UNIX:
            # Room for a large reply and the next one: fewer awakenings on both sides. TCP sees to
            # its own buffers.
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _UNIX_BUFFER)
        elif sock.family in (socket.AF_INET, socket.AF_INET6):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)

    def set_patience(self, seconds: float) -> None:
        # Not settimeout: it makes the socket non-blocking, which sendfile can't take.
        whole = max(int(seconds), 0)
        value = struct.pack("@ll", whole, max(int((seconds - whole) * 1e6), 1))
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, value)
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, value)

    def recv_into(self, view: memoryview, *, soon: bool = False, fully: bool = False) -> int:
        try:
            if soon:
                for _ in range(_TRIES):
                    try:
                        return self.sock.recv_into(view, 0, socket.MSG_DONTWAIT) or end()
                    except BlockingIOError:
                        pass
            return self.sock.recv_into(view, 0, socket.MSG_WAITALL * fully) or end()
        except BlockingIOError:
            raise Stalled("the client sends nothing") from None
        except OSError as exc:
            raise Ended(str(exc)) from None

    def ready(self) -> bool:
        return _ready(self._fd)

    def send(self, buffers: Sequence[Buffer], length: int, *, more: bool = False) -> None:
        flags = socket.MSG_MORE if more else 0
        try:
            sent = self.sock.sendmsg(buffers[:_IOV_MAX], (), flags)
            while sent < length:
                length -= sent
                buffers = unsent(buffers, sent)
                sent = self.sock.sendmsg(buffers[:_IOV_MAX], (), flags)
        except BlockingIOError:
            raise Stalled("the client takes no data") from None
        except OSError as exc:
            raise Ended(str(exc)) from None

    def sendfile(self, file: SpanFile, offset: int, length: int) -> int:
        end = offset + length
        try:
            while offset < end:
                sent = os.sendfile(self._fd, file.fd, offset, end - offset)
                if not sent:
                    break
                offset += sent
        except BlockingIOError:
            raise Stalled("the client takes no data") from None
        except OSError as exc:
            if exc.errno in _PEER_ERRORS:
                raise Ended(str(exc)) from None
        return length - (end - offset)

    def shut(self, *, reading_only: bool = False) -> None:
        try:
            self.sock.shutdown(socket.SHUT_RD if reading_only else socket.SHUT_RDWR)
        except OSError:
            pass  # it is gone already

    def close(self) -> None:
        self.sock.close()


class PipeStream(Stream):
    """Standard input and output that are not a socket."""

    def __init__(self, read_fd: int, write_fd: int) -> None:
        self.peer = "standard input"
        self._in, self._out = read_fd, write_fd
        self._patience = 0.0

    def set_patience(self, seconds: float) -> None:
        self._patience = seconds

    def _wait(self, fd: int, event: int) -> None:
        poll = select.poll()
        poll.register(fd, event)
        if not poll.poll(self._patience * 1000):
            raise Stalled("the client makes no progress")

    def recv_into(self, view: memoryview, *, soon: bool = False, fully: bool = False) -> int:
        self._wait(self._in, select.POLLIN)
        try:
            return os.readv(self._in, [view]) or end()
        except OSError as exc:
            raise Ended(str(exc)) from None

    def ready(self) -> bool:
        return _ready(self._in)

    def send(self, buffers: Sequence[Buffer], length: int, *, more: bool = False) -> None:
        try:
            while length:
                self._wait(self._out, select.POLLOUT)
                sent = os.writev(self._out, buffers[:_IOV_MAX])
                length -= sent
                buffers = unsent(buffers, sent)
        except OSError as exc:
            raise Ended(str(exc)) from None

    def shut(self, *, reading_only: bool = False) -> None:
        # From a signal's handler: the poll() that it interrupted goes on with these.
        null = os.open(os.devnull, os.O_RDWR)
        os.dup2(null, self._in, inheritable=False)
        if not reading_only:
            os.dup2(null, self._out, inheritable=False)
        os.close(null)

    def close(self) -> None:
        os.close(self._in)
        os.close(self._out)


def _ready(fd: int) -> bool:
    poll = select.poll()  # of its own: two threads can't use one at once
    poll.register(fd, select.POLLIN)
    return bool(poll.poll(0))


def end() -> int:
    """What recv_into() does at the end of the stream."""
    raise Ended("end of the stream")


class Inbox:
    """What has come from a stream and isn't used yet: view[start:end]."""

    SIZE = 64 << 10

    def __init__(self, stream: Stream) -> None:
        self.stream = stream
        self.view = memoryview(bytearray(self.SIZE))
        self.start = self.end = 0

    def fill(self, need: int, *, soon: bool = False) -> None:
        """Receive until `need` (at most SIZE) bytes are there; Ended if the stream ends.

        soon: they are expected at once, as is the rest of what has begun to come.
        """
        view = self.view
        if self.start == self.end:
            self.start = self.end = 0
        elif self.start + need > self.SIZE:
            rest = self.end - self.start
            view[:rest] = bytes(view[self.start : self.end])
            self.start, self.end = 0, rest
        while self.end - self.start < need:
            self.end += self.stream.recv_into(view[self.end :], soon=soon or self.end > self.start)

    def take(self, length: int) -> memoryview:
        """The next `length` (at most SIZE) bytes, valid until the next call of this object."""
        if self.end - self.start < length:
            self.fill(length)
        self.start += length
        return self.view[self.start - length : self.start]

    def read_into(self, view: memoryview) -> None:
        """Fill view, of any size, with what comes next."""
        done = min(self.end - self.start, len(view))
        view[:done] = self.view[self.start : self.start + done]
        self.start += done
        while done < len(view):
            done += self.stream.recv_into(view[done:], fully=True)

    def drain(self, length: int) -> None:
        """Throw away the next `length` bytes, of any number."""
        while length:
            piece = min(length, self.SIZE)
            self.take(piece)
            length -= piece
