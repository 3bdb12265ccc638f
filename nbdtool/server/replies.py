"""Replies of the transmission phase: simple, structured or extended, queued until they are sent.

Specification: doc/proto.md, sections "Simple reply message", "Structured reply chunk message".
"""

from __future__ import annotations

import errno
from collections.abc import Sequence
from struct import Struct

from nbdtool import protocol as p
from nbdtool.disk import ZEROES, FileSpan, Span, ZeroSpan, span_length
from nbdtool.protocol import Buffer
from nbdtool.server.stream import Dropped, Stream

SENDFILE_MIN = 64 << 10  # bytes: below, a pread and a shared sendmsg are faster than sendfile

_HOLE_MIN = 4096  # bytes: fewer zeroes are sent as data, a chunk of their own costs more

# The whole header of a read's only chunk
_STRUCTURED_DATA = Struct(p.STRUCTURED_REPLY.format + "Q")
_EXTENDED_DATA = Struct(p.EXTENDED_REPLY.format + "Q")

Run = tuple[bool, int, int, Sequence[Span]]  # is a hole, offset, length, parts


class Replies:
    """What one client is to be sent, in order. Dropped if it can't be.

    cookie and offset are the request's; extended replies repeat both.
    """

    def __init__(self, stream: Stream, structured: bool, extended: bool) -> None:
        self.queued = 0  # bytes
        self._queue: list[Buffer] = []
        self._stream = stream
        self._structured = structured
        self._extended = extended

    def send(self, *, more: bool = False) -> None:
        """Send what is queued; more follows at once if `more`."""
        if self.queued:
            queue, length = self._queue, self.queued
            self._queue, self.queued = [], 0
            self._stream.send(queue, length, more=more)

    def success(self, cookie: int, offset: int, *, read: bool = False) -> None:
        """Queue a success without data; read says that it answers a READ (of no bytes)."""
        if self._extended or (self._structured and read):
            self.chunk(p.REPLY_FLAG_DONE, p.REPLY_TYPE_NONE, cookie, offset)
        else:
            self._put(p.SIMPLE_REPLY.pack(p.SIMPLE_REPLY_MAGIC, 0, cookie))

    def failure(
        self, cookie: int, offset: int, error: int, message: str, at: int | None = None
    ) -> None:
        """Queue an error, with its text and the place of the fault where the client takes them."""
        if not self._structured:
            self._put(p.SIMPLE_REPLY.pack(p.SIMPLE_REPLY_MAGIC, error, cookie))
            return
        text = p.text(message)
        parts = [p.ERROR.pack(error, len(text)), text]
        type_ = p.REPLY_TYPE_ERROR
        if at is not None:
            type_ = p.REPLY_TYPE_ERROR_OFFSET
            parts.append(p.OFFSET.pack(at))
        self.chunk(p.REPLY_FLAG_DONE, type_, cookie, offset, *parts)

    def small_data(self, cookie: int, offset: int, data: Buffer) -> None:
        """Queue the data of a read that is all in memory: data() in fewer steps."""
        length = len(data)
        if self._extended:
            header = _EXTENDED_DATA.pack(
                p.EXTENDED_REPLY_MAGIC, 1, 1, cookie, offset, length + 8, offset
            )
        elif self._structured:
            header = _STRUCTURED_DATA.pack(
                p.STRUCTURED_REPLY_MAGIC, 1, 1, cookie, length + 8, offset
            )
        else:
            header = p.SIMPLE_REPLY.pack(p.SIMPLE_REPLY_MAGIC, 0, cookie)
        self._queue += header, data
        self.queued += len(header) + length

    def data(
        self, cookie: int, offset: int, length: int, parts: Sequence[Span], *, whole: bool
    ) -> OSError | None:
        """Queue or send the data of a read, in one chunk if `whole`; file ranges were checked.

        A file that fails all the same is what is returned: the client gets an error after the data,
        or is dropped if it doesn't know structured replies.
        """
        if not self._structured:
            self._put(p.SIMPLE_REPLY.pack(p.SIMPLE_REPLY_MAGIC, 0, cookie))
            for part in parts:
                failure = self._put_parts([part])
                if failure:  # what comes behind it must not be sent
                    raise Dropped(reason(failure)) from failure
            return None
        runs: list[Run] = [(False, offset, length, parts)]
        if not whole and ZeroSpan in map(type, parts):
            runs = _runs(offset, parts)
        for n, (hole, at, size, run) in enumerate(runs, 1):
            done = p.REPLY_FLAG_DONE * (n == len(runs))
            if hole:
                self.chunk(
                    done, p.REPLY_TYPE_OFFSET_HOLE, cookie, offset, p.OFFSET_HOLE.pack(at, size)
                )
                continue
            uncertain = FileSpan in map(type, run)
            flags = 0 if uncertain else done
            start = p.OFFSET.pack(at)
            self.chunk(flags, p.REPLY_TYPE_OFFSET_DATA, cookie, offset, start, follows=size)
            failure = self._put_parts(run)
            if failure:
                # The chunk went out whole, padded with zeroes; this takes it back.
                self.failure(cookie, offset, p.nbd_error(failure.errno), reason(failure), at)
                return failure
            if uncertain and done:
                self.chunk(done, p.REPLY_TYPE_NONE, cookie, offset)
        return None

    def chunk(
        self, flags: int, type_: int, cookie: int, offset: int, *parts: bytes, follows: int = 0
    ) -> None:
        """Queue a chunk of parts, and of `follows` bytes more that come next."""
        length = sum(map(len, parts)) + follows
        if self._extended:
            header = p.EXTENDED_REPLY.pack(
                p.EXTENDED_REPLY_MAGIC, flags, type_, cookie, offset, length
            )
        else:
            header = p.STRUCTURED_REPLY.pack(p.STRUCTURED_REPLY_MAGIC, flags, type_, cookie, length)
        self._put(b"".join((header, *parts)))

    def _put(self, data: Buffer) -> None:
        self._queue.append(data)
        self.queued += len(data)

    def _put_parts(self, parts: Sequence[Span]) -> OSError | None:
        failure = None
        for part in parts:
            if isinstance(part, ZeroSpan):
                self._put_zeroes(part.length)
            elif isinstance(part, FileSpan):
                failure = self._send_file(part) or failure
            else:
                self._put(part)
        return failure

    def _put_zeroes(self, length: int) -> None:
        while length:
            piece = ZEROES[:length]
            self._put(piece)
            length -= len(piece)

    def _send_file(self, span: FileSpan) -> OSError | None:
        """Send a file's range; where it fails, zeroes in its place, and the failure is returned."""
        self.send(more=True)
        sent = self._stream.sendfile(span.file, span.offset, span.length)
        try:
            span.file.check()
            if sent < span.length:
                where = span.offset + sent
                raise OSError(errno.EIO, f"{span.file.name}: can't be read on at byte {where}")
        except OSError as exc:
            self._put_zeroes(span.length - sent)
            return exc
        return None


def reason(exc: OSError) -> str:
    """What an OSError says, without its number."""
    return exc.strerror or str(exc)


def _runs(offset: int, parts: Sequence[Span]) -> list[Run]:
    """Parts as runs of data and of zeroes that are worth a chunk."""
    runs: list[Run] = []
    for part in parts:
        length = span_length(part)
        hole = type(part) is ZeroSpan and (length >= _HOLE_MIN or len(parts) == 1)
        if runs and runs[-1][0] == hole:
            _, at, before, run = runs[-1]
            runs[-1] = (hole, at, before + length, [*run, part])
        else:
            runs.append((hole, offset, length, [part]))
        offset += length
    return runs
