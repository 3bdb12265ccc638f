"""The transmission phase: one connection's requests, answered in their order.

Whatever has come is answered before anything is sent, so that a client that pipelines costs one
system call for many requests. Specification: doc/proto.md, section "Transmission phase".
"""

from __future__ import annotations

import sys
from array import array
from itertools import islice
from typing import Callable, Union

from nbdtool import protocol as p
from nbdtool.disk import Disk, FileSpan, Span, ZeroSpan, merge_extents
from nbdtool.server.budget import Budget
from nbdtool.server.handshake import Session
from nbdtool.server.replies import SENDFILE_MIN, Replies, reason
from nbdtool.server.stream import Dropped, Ended, Stalled

PATIENCE = 30.0  # seconds that a started transfer may go without progress

SMALL = SENDFILE_MIN  # bytes: a request of up to this many asks for no budget

# The flags that a command takes beside FUA, where the export allows them
_FLAGS = {
    p.CMD_READ: p.CMD_FLAG_DF,
    p.CMD_WRITE: p.CMD_FLAG_PAYLOAD_LEN,
    p.CMD_FLUSH: 0,
    p.CMD_TRIM: 0,
    p.CMD_CACHE: 0,
    p.CMD_WRITE_ZEROES: p.CMD_FLAG_NO_HOLE | p.CMD_FLAG_FAST_ZERO,
    p.CMD_BLOCK_STATUS: p.CMD_FLAG_REQ_ONE,
}

Handler = Callable[[int, int, int, int], None]
Log = Callable[[str, Union[BaseException, None]], None]
Stopping = Callable[[], bool]


class Invalid(Exception):
    """A request that is refused before it reaches the disk: (error value, text[, offset])."""


class Transmission:
    """Serves one session; run() returns when the client disconnects, Dropped ends it otherwise."""

    def __init__(self, session: Session, budget: Budget, log: Log, stopping: Stopping) -> None:
        assert session.export is not None
        self._waiting = False  # for a request, none of which has come
        self._stopping = stopping
        self._inbox = session.inbox
        self._stream = session.inbox.stream
        self._stream.set_patience(PATIENCE)
        self._export = session.export
        self._disk = session.export.disk
        self._size = self._disk.size
        self._flags = session.export.flags(session.structured)
        self._minimum, _, self._maximum = session.export.block_size
        self._structured = session.structured
        self._extended = session.extended
        self._status = session.block_status
        self._header = p.EXTENDED_REQUEST if session.extended else p.REQUEST
        self._budget = budget
        self._log = log
        self._replies = self._new_replies()
        self._kept = bytearray()  # a payload buffer that is used again
        self._commands: dict[int, Handler] = {
            p.CMD_READ: self._read,
            p.CMD_WRITE: self._write,
            p.CMD_FLUSH: self._flush,
            p.CMD_TRIM: self._trim,
            p.CMD_CACHE: self._cache,
            p.CMD_WRITE_ZEROES: self._write_zeroes,
            p.CMD_BLOCK_STATUS: self._block_status,
        }

    def _new_replies(self) -> Replies:
        return Replies(self._stream, self._structured, self._extended)

    @property
    def idle(self) -> bool:
        """Whether nothing that came is still to be answered."""
        return self._waiting

    def run(self) -> None:
        inbox, view, budget = self._inbox, self._inbox.view, self._budget
        unpack_from, header = self._header.unpack_from, self._header.size
        magic = p.EXTENDED_REQUEST_MAGIC if self._extended else p.REQUEST_MAGIC
        size, small = self._size, SMALL if self._minimum == 1 else 0
        writable = not self._export.read_only
        reads_on = self._disk.reads_on
        prefetches = type(self._disk).prefetch is not Disk.prefetch
        while True:
            if prefetches:
                self._announce()
            while inbox.end - inbox.start >= header:
                got, flags, command, cookie, offset, length = unpack_from(view, inbox.start)
                if got != magic:
                    raise Dropped("a request without its magic number")
                inbox.start += header
                if command == p.CMD_DISC:
                    self._replies.send()
                    return
                if flags or not 0 < length <= small or offset + length > size:
                    self._answer(flags, command, cookie, offset, length)
                elif command == p.CMD_READ:
                    self._quick_read(cookie, offset, length)
                elif command == p.CMD_WRITE and writable:
                    self._quick_write(cookie, offset, length)
                else:
                    self._answer(flags, command, cookie, offset, length)
                if self._replies.queued >= budget.share:
                    self._replies.send()
            if self._replies.queued:
                self._replies.send()
            if not self._fill(soon=budget.alone and not reads_on):
                return

    def _fill(self, *, soon: bool) -> bool:
        """Wait for more requests; False where the client, or the server, has come to its end."""
        inbox = self._inbox
        self._waiting = inbox.start == inbox.end
        if self._stopping() and self.idle:
            return False
        try:
            inbox.fill(inbox.end - inbox.start + 1, soon=soon)
        except (Stalled, Ended) as exc:
            if inbox.start != inbox.end:
                raise Dropped(f"{exc}, in the middle of a request") from None
            return not isinstance(exc, Ended)
        self._waiting = False
        return True

    def _announce(self) -> None:
        """Tell the disk about all reads that have come, before the first is answered."""
        inbox, header = self._inbox, self._header.size
        ranges, at = [], inbox.start
        while inbox.end - at >= header:
            _, _, command, _, offset, length = self._header.unpack_from(inbox.view, at)
            at += header + length * (command == p.CMD_WRITE)
            inside = offset + length <= self._size and 0 < length <= self._maximum
            if command == p.CMD_READ and inside:
                ranges.append((offset, length))
        if len(ranges) > 1:
            try:
                self._disk.prefetch(ranges)
            except OSError as exc:
                self._log(reason(exc), None)  # the reads will fail with it, if they do

    # Requests

    def _answer(self, flags: int, command: int, cookie: int, offset: int, length: int) -> None:
        try:
            if (
                command
                or flags
                or not 0 < length <= self._maximum
                or offset + length > self._size
                or self._minimum > 1
            ) and not self._check(flags, command, offset, length):
                self._replies.success(cookie, offset, read=command == p.CMD_READ)
                return
            self._commands[command](flags, cookie, offset, length)
        except Invalid as invalid:
            self._replies.failure(cookie, offset, *invalid.args)
        except Dropped:
            raise
        except Exception as exc:
            self._failed(exc, flags, cookie, offset)

    def _failed(self, exc: Exception, flags: int, cookie: int, offset: int) -> None:
        """The disk raised exc."""
        self._replies.failure(cookie, offset, *self._reported(exc, flags))

    def _reported(self, exc: Exception, flags: int) -> tuple[int, str]:
        """The error value and the text for a client, once the user knows, too."""
        if isinstance(exc, OSError):
            self._log(reason(exc), None)
            return p.nbd_error(exc.errno, flags), reason(exc)
        self._log(f"a fault in nbdtool: {exc!r}", exc)
        return p.EIO, "a fault in the server"

    def _check(self, flags: int, command: int, offset: int, length: int) -> bool:
        """Whether there is anything to do; Invalid if the request is not allowed."""
        try:
            self._check_flags(flags, command)
            return self._check_range(command, offset, length)
        except Invalid:
            if command == p.CMD_WRITE or (self._extended and flags & p.CMD_FLAG_PAYLOAD_LEN):
                self._drain(length)
            raise

    def _check_flags(self, flags: int, command: int) -> None:
        if command not in _FLAGS:
            raise Invalid(p.EINVAL, f"command {command} is unknown")
        if command in (p.CMD_WRITE, p.CMD_TRIM, p.CMD_WRITE_ZEROES) and self._export.read_only:
            raise Invalid(p.EPERM, "the export is read-only")
        if command == p.CMD_TRIM and not self._flags & p.FLAG_SEND_TRIM:
            raise Invalid(p.EINVAL, "the export has no TRIM")
        if command == p.CMD_BLOCK_STATUS and not self._status:
            raise Invalid(p.EINVAL, "no metadata context was chosen")
        allowed = p.CMD_FLAG_FUA | _FLAGS[command]
        if not self._structured:
            allowed &= ~p.CMD_FLAG_DF
        if not self._extended:
            allowed &= ~p.CMD_FLAG_PAYLOAD_LEN
        if not self._flags & p.FLAG_SEND_FAST_ZERO:
            allowed &= ~p.CMD_FLAG_FAST_ZERO
        if flags & ~allowed:
            raise Invalid(p.EINVAL, f"flags {flags:#x} are not for command {command}")

    def _check_range(self, command: int, offset: int, length: int) -> bool:
        if command == p.CMD_FLUSH:
            if offset or length:
                raise Invalid(p.EINVAL, "a FLUSH with an offset or a length")
            return True
        if offset + length > self._size:
            error = p.ENOSPC if command in (p.CMD_WRITE, p.CMD_WRITE_ZEROES) else p.EINVAL
            text = f"the export ends at byte {self._size}"
            raise Invalid(error, text, *((self._size,) if offset < self._size else ()))
        if (offset | length) % self._minimum and offset + length != self._size:
            raise Invalid(p.EINVAL, f"not a multiple of the block size, {self._minimum} bytes")
        if command in (p.CMD_READ, p.CMD_WRITE) and length > self._maximum:
            error = p.EOVERFLOW if self._structured and command == p.CMD_READ else p.EINVAL
            raise Invalid(error, f"more than the maximum payload, {self._maximum} bytes")
        if command == p.CMD_BLOCK_STATUS and not length:
            raise Invalid(p.EINVAL, "a block status of no bytes")
        return length > 0

    def _drain(self, length: int) -> None:
        if length > 0xFFFFFFFF:
            raise Dropped(f"a payload of {length} bytes")
        self._replies.send()
        self._inbox.drain(length)

    def _read(self, flags: int, cookie: int, offset: int, length: int) -> None:
        whole = bool(flags & p.CMD_FLAG_DF)
        with self._budget.take(length if length > SMALL else 0, self._replies.send):
            parts = [self._loaded(span) for span in self._disk.read(offset, length)]
            failure = self._replies.data(cookie, offset, length, parts, whole=whole)
            if failure:
                self._log(reason(failure), None)
            if self._replies.queued >= self._budget.share:
                self._replies.send()

    @staticmethod
    def _loaded(span: Span) -> Span:
        """What a reply can be made of: small file ranges as bytes, large ones checked."""
        if type(span) is FileSpan:
            if span.length <= SENDFILE_MIN:
                return span.file.pread(span.offset, span.length)
            span.file.check()
        return span

    def _quick_read(self, cookie: int, offset: int, length: int) -> None:
        """What _answer and _read do with a plain small read, in fewer steps."""
        try:
            parts = [
                span.file.pread(span.offset, span.length) if type(span) is FileSpan else span
                for span in self._disk.read(offset, length)
            ]
        except Exception as exc:
            self._failed(exc, 0, cookie, offset)
            return
        data = parts[0]
        if len(parts) > 1 or isinstance(data, (ZeroSpan, FileSpan)):
            self._replies.data(cookie, offset, length, parts, whole=False)
        else:
            self._replies.small_data(cookie, offset, data)

    def _quick_write(self, cookie: int, offset: int, length: int) -> None:
        """What _answer and _write do with a plain small write, in fewer steps."""
        inbox = self._inbox
        if inbox.end - inbox.start < length:
            self._replies.send()
        payload = inbox.take(length)
        try:
            self._disk.write(offset, payload)
        except Exception as exc:
            self._failed(exc, 0, cookie, offset)
        else:
            self._replies.success(cookie, offset)

    def _write(self, flags: int, cookie: int, offset: int, length: int) -> None:
        if length <= SMALL:
            if self._inbox.end - self._inbox.start < length:
                self._replies.send()
            self._disk.write(offset, self._inbox.take(length))
        else:
            self._replies.send()
            with self._budget.take(length, self._replies.send):
                if len(self._kept) < length:
                    self._kept = bytearray(length)
                with memoryview(self._kept)[:length] as payload:
                    self._inbox.read_into(payload)
                    self._disk.write(offset, payload)
                if len(self._kept) > self._budget.share:
                    self._kept = bytearray()
        self._written(flags, cookie, offset)

    def _trim(self, flags: int, cookie: int, offset: int, length: int) -> None:
        self._disk.trim(offset, length)
        self._written(flags, cookie, offset)

    def _write_zeroes(self, flags: int, cookie: int, offset: int, length: int) -> None:
        punch = not flags & p.CMD_FLAG_NO_HOLE
        self._disk.zero(offset, length, punch=punch, fast=bool(flags & p.CMD_FLAG_FAST_ZERO))
        self._written(flags, cookie, offset)

    def _written(self, flags: int, cookie: int, offset: int) -> None:
        if flags & p.CMD_FLAG_FUA:
            self._disk.flush()
        self._replies.success(cookie, offset)

    def _flush(self, flags: int, cookie: int, offset: int, length: int) -> None:
        self._disk.flush()
        self._replies.success(cookie, offset)

    def _cache(self, flags: int, cookie: int, offset: int, length: int) -> None:
        self._disk.prefetch([(offset, min(length, p.MAX_PAYLOAD))])
        self._replies.success(cookie, offset)

    def _block_status(self, flags: int, cookie: int, offset: int, length: int) -> None:
        most = 1 if flags & p.CMD_FLAG_REQ_ONE else p.MAX_EXTENTS
        # Cut before the merge, too: a hostile image can have equal extents without end.
        known = islice(self._disk.extents(offset, length), p.MAX_EXTENTS)
        extents = islice(merge_extents(known), most)
        with self._budget.take(min(length // 32, 16 * most), self._replies.send):
            values = array("Q" if self._extended else "I")
            for extent in extents:
                values.extend(extent)
            count = len(values) // 2
            if sys.byteorder == "little":
                values.byteswap()
            data = values.tobytes()
            if self._extended:
                head = p.BLOCK_STATUS_EXT_HEAD.pack(1, count)
                type_ = p.REPLY_TYPE_BLOCK_STATUS_EXT
            else:
                head, type_ = p.BLOCK_STATUS_HEAD.pack(1), p.REPLY_TYPE_BLOCK_STATUS
            self._replies.chunk(p.REPLY_FLAG_DONE, type_, cookie, offset, head, data)
            if self._replies.queued >= self._budget.share:
                self._replies.send()
