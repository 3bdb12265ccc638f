"""The transmission phase for a disk whose reads take long: several threads answer one client."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Sequence
from typing import NamedTuple, Optional

from nbdtool import protocol as p
from nbdtool.disk import FileSpan, Gone, Span, ZeroSpan, cut_spans
from nbdtool.protocol import Buffer
from nbdtool.server.budget import Budget
from nbdtool.server.handshake import Session
from nbdtool.server.replies import Replies
from nbdtool.server.stream import Dropped, Stream
from nbdtool.server.transmission import SMALL, Log, Stopping, Transmission

_TOGETHER = 512 << 10  # bytes that neighbouring reads may have to be done as one

_QUICK = 5e-5  # seconds: a read that found its data in memory
_LONE = 16  # requests of a client, one after the other, until no thread is kept ready beside


class _Read(NamedTuple):
    cookie: int
    offset: int
    length: int


class _Outgoing(Stream):
    """The sending half of a stream, for several threads."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self._lock = threading.Lock()

    def send(self, buffers: Sequence[Buffer], length: int, *, more: bool = False) -> None:
        with self._lock:
            self._stream.send(buffers, length, more=more)


class ParallelTransmission(Transmission):
    """Serves one session with up to `disk.parallel` threads, which start when there is work.

    Whoever has the turn receives requests, answers all but plain reads, and leaves the turn to
    another for doing one. Nobody is woken for a client that has one request under way at a time,
    unless its data is there already: then two threads in turns are sooner back on a processor.
    """

    def __init__(self, session: Session, budget: Budget, log: Log, stopping: Stopping) -> None:
        self._outgoing = _Outgoing(session.inbox.stream)
        super().__init__(session, budget, log, stopping)
        self._most = min(self._disk.parallel, budget.threads)
        self._turn, self._hiring = threading.Lock(), threading.Lock()
        self._received: deque[list[_Read]] = deque()  # of neighbouring ranges
        self._crew: list[threading.Thread] = []  # beside the thread of the connection
        self._asleep: list[threading.Lock] = []
        self._reading: set[int] = set()  # threads
        self._lone = 0  # requests in a row that came when nothing else was to be done
        self._quick = False  # the last read was
        self._over = False
        self._failure: Optional[Exception] = None

    def _new_replies(self) -> Replies:
        return Replies(self._outgoing, self._structured, self._extended)

    @property
    def idle(self) -> bool:
        return self._waiting and not self._received and len(self._asleep) == len(self._crew)

    def run(self) -> None:
        self._work()
        for thread in self._crew:
            thread.join()
        if self._failure is not None:
            raise self._failure

    def _work(self) -> None:
        replies, sleep = self._new_replies(), threading.Lock()
        sleep.acquire()
        try:
            while True:
                try:
                    reads = self._received.popleft()
                except IndexError:
                    if self._over:
                        break
                    if self._turn.acquire(blocking=False):
                        try:
                            self._receive()
                        finally:
                            self._turn.release()
                        if self._quick or self._lone < _LONE:
                            self._wake()
                    else:
                        self._sleep(sleep)
                else:
                    if self._received:
                        self._wake()
                    self._serve(reads, replies)
        except Exception as exc:
            self._failure = self._failure or exc
            self._over = True
            self._received.clear()
            self._stream.shut()
        while self._asleep:
            self._wake()

    def _sleep(self, sleep: threading.Lock) -> None:
        """Wait until _wake() releases the lock."""
        self._asleep.append(sleep)
        if self._over or self._received or not self._turn.locked():
            # Whoever had the turn may have looked for somebody to wake before this.
            try:
                self._asleep.remove(sleep)
                return
            except ValueError:
                pass
        sleep.acquire()

    def _wake(self) -> None:
        """Let one more thread work, if there is one or may be."""
        try:
            self._asleep.pop().release()
        except IndexError:
            with self._hiring:
                if len(self._crew) + 1 < self._most and not self._over:
                    thread = threading.Thread(target=self._work, daemon=True)
                    try:
                        thread.start()
                    except RuntimeError:
                        return  # the system has no more
                    self._crew.append(thread)

    def _receive(self) -> None:
        """Wait for reads, and answer what isn't one, up to the end of the session."""
        while not self._over:
            self._sort()
            if self._received:
                more = self._reading or len(self._received) > 1
                self._lone = 0 if more else self._lone + 1
                break
            self._over = self._over or not self._fill(soon=False)

    def _sort(self) -> None:
        """Take from the inbox all reads, of neighbouring ranges as one, and answer the rest."""
        inbox, header, size = self._inbox, self._header, self._size
        magic = p.EXTENDED_REQUEST_MAGIC if self._extended else p.REQUEST_MAGIC
        most = self._maximum if self._minimum == 1 else 0
        reads: list[_Read] = []
        start = end = 0
        while inbox.end - inbox.start >= header.size:
            got, flags, command, cookie, offset, length = header.unpack_from(
                inbox.view, inbox.start
            )
            if got != magic:
                raise Dropped("a request without its magic number")
            inbox.start += header.size
            if command or flags or not 0 < length <= most or offset + length > size:
                if command == p.CMD_DISC:
                    self._over = True
                    break
                self._answer(flags, command, cookie, offset, length)
                self._replies.send()
                continue
            if reads and (offset != end or offset + length - start > _TOGETHER):
                self._received.append(reads)
                reads = []
            if not reads:
                start = offset
            reads.append(_Read(cookie, offset, length))
            end = offset + length
        if reads:
            self._received.append(reads)

    def _serve(self, reads: list[_Read], replies: Replies) -> None:
        """Answer reads of neighbouring ranges."""
        start = reads[0].offset
        total = reads[-1].offset + reads[-1].length - start
        try:
            if total > SMALL:
                with self._budget.take(total, replies.send):
                    self._read_all(reads, start, total, replies)
            else:
                self._read_all(reads, start, total, replies)
        except Dropped:
            raise
        except Exception as exc:
            if len(reads) > 1 and not isinstance(exc, Gone):
                for read in reads:  # some may be well
                    self._serve([read], replies)
                return
            for read in reads:
                replies.failure(*read[:2], *self._reported(exc, 0))
            replies.send()

    def _read_all(self, reads: list[_Read], start: int, total: int, replies: Replies) -> None:
        me = threading.get_ident()
        self._reading.add(me)
        began = time.monotonic()
        try:
            spans = self._disk.read(start, total)
        finally:
            self._reading.discard(me)
        self._quick = time.monotonic() - began < _QUICK
        if self._lone >= _LONE and not self._quick and self._stream.ready():
            self._lone = 0  # a request came before the answer to this one
        if len(reads) == len(spans) == 1 and type(spans[0]) is bytes:
            replies.small_data(*reads[0][:2], spans[0])
            replies.send()
            return
        spans = list(map(self._loaded, spans))
        for read in reads:
            parts = list(cut_spans(spans, read.offset - start, read.length))
            if len(parts) == 1 and not isinstance(parts[0], (ZeroSpan, FileSpan)):
                replies.small_data(read.cookie, read.offset, parts[0])
            else:
                replies.data(*read, parts, whole=False)
        replies.send()

    def _cache(self, flags: int, cookie: int, offset: int, length: int) -> None:
        # What this thread read ahead would not be found by the one that is asked for it.
        self._replies.success(cookie, offset)

    @staticmethod
    def _loaded(span: Span) -> Span:
        # A file range would be sent by itself, and another thread's reply get in between.
        return span.file.pread(span.offset, span.length) if isinstance(span, FileSpan) else span
