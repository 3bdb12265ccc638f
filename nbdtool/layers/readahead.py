"""Reads ahead of a client, and several at once, from a disk whose every read takes long."""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from typing import NamedTuple, Optional

from nbdtool.disk import Disk, Extent, Span, cut_spans
from nbdtool.disks.ahead import Ahead

_KEPT = 32 << 20  # bytes that are kept
_STREAMS = 32  # sequential readers that are told apart
_SEQUENTIAL = 2  # reads, one behind the other, after which more are expected
_FRESH = 10.0  # seconds; what waits longer may have become old


class _Job:
    """A read that a worker does, or whoever needs it first."""

    __slots__ = ("_claimed", "_disk", "_done", "error", "length", "offset", "since", "spans",
                 "turn")  # fmt: skip

    def __init__(self, disk: Disk, offset: int, length: int, turn: int = 0) -> None:
        self._disk, self.offset, self.length, self.turn = disk, offset, length, turn
        self.since = time.monotonic()
        self.spans: list[Span] = []
        self.error: Optional[OSError] = None
        self._claimed, self._done = threading.Lock(), threading.Lock()
        self._done.acquire()

    def run(self) -> None:
        if self._claimed.acquire(blocking=False):
            try:
                self.spans = self._disk.read(self.offset, self.length)
            except OSError as exc:
                self.error = exc
            finally:
                self._done.release()

    def part(self, offset: int, length: int) -> list[Span]:
        """The spans of a part of the disk that this has read; raises its OSError."""
        self.run()
        with self._done:
            pass
        if self.error is not None:
            raise self.error
        if length == self.length:
            return self.spans
        return list(cut_spans(self.spans, offset - self.offset, length))


class _Part(NamedTuple):
    job: _Job
    offset: int
    length: int


class _Plan(threading.local):
    """What a thread announced, in its order: what no worker has yet, and how far it has come."""

    def __init__(self) -> None:
        self.jobs: deque[_Job] = deque()
        self.last = self.taken = 0  # turns


class ReadAhead(Disk):
    """`disk`, read by `workers` threads beside those of the callers, `piece` bytes at a time.

    Reads that a client announces, or that follow one another, are started before they are asked
    for, as many as keep the workers busy. What was read ahead is given once it is asked for, up to
    10 s later.
    """

    reads_on = True

    def __init__(self, disk: Disk, workers: int = 4, piece: int = 1 << 20) -> None:
        self.size, self.description, self.block_size = disk.size, disk.description, disk.block_size
        self.writable, self.multi_conn = disk.writable, disk.multi_conn
        self.can_trim, self.can_fast_zero = disk.can_trim, disk.can_fast_zero
        self.parallel = disk.parallel
        self._disk = disk
        self._announced: Ahead[list[_Part]] = Ahead()
        self._plan = _Plan()
        self._piece = piece
        # One in the hands of each worker, and one more: what waits longer for its reader has left
        # the processor's cache when it comes.
        self._depth = 2 * workers
        self._pieces: dict[int, _Job] = {}  # by their number on the disk
        # Where each reader goes on: reads that it did so far, and the first piece not yet started.
        self._streams: dict[int, tuple[int, int]] = {}
        self._under_way: set[int] = set()  # the ends of reads
        self._lock = threading.Lock()
        self._queue: queue.SimpleQueue[Optional[_Job]] = queue.SimpleQueue()
        self._workers = [threading.Thread(target=self._work, daemon=True) for _ in range(workers)]
        for worker in self._workers:
            worker.start()

    def _work(self) -> None:
        while True:
            job = self._queue.get()
            if job is None:
                return
            job.run()
            del job

    # What was announced

    def prefetch(self, ranges: Sequence[tuple[int, int]]) -> None:
        start = end = -1
        waiting: list[tuple[int, int]] = []  # neighbours, which are read as one
        for offset, length in ranges:
            if not self._announced.wants(offset, length):
                continue
            if offset != end or offset + length - start > self._piece:
                self._start(waiting)
                waiting, start = [], offset
            waiting.append((offset, length))
            end = offset + length
        self._start(waiting)
        self._hand_out()

    def _start(self, ranges: list[tuple[int, int]]) -> None:
        """Start reading ranges that follow one another, and keep them as announced."""
        if not ranges:
            return
        start, end = ranges[0][0], sum(ranges[-1])
        plan = self._plan
        jobs = [
            _Job(self._disk, at, min(self._piece, end - at), plan.last + number)
            for number, at in enumerate(range(start, end, self._piece), 1)
        ]  # more than one for one large range only
        plan.last += len(jobs)
        plan.jobs.extend(jobs)
        for offset, length in ranges:
            parts = [_Part(jobs[0], offset, length)]
            if len(jobs) > 1:
                parts = [_Part(job, job.offset, job.length) for job in jobs]
            self._announced.add(offset, length, parts)

    def _hand_out(self, taken: Sequence[_Part] = ()) -> None:
        """Keep the workers a little ahead of this thread, which takes what it announced."""
        plan = self._plan
        if taken:
            plan.taken = taken[-1].job.turn
        while plan.jobs and plan.jobs[0].turn <= plan.taken + self._depth:
            job = plan.jobs.popleft()
            if not taken or job.turn > taken[0].job.turn:  # which this thread does itself
                self._queue.put(job)

    # Reading

    def read(self, offset: int, length: int) -> list[Span]:
        parts = self._announced.take(offset, length)
        if parts is not None:
            self._hand_out(parts)
            return _joined(parts)
        parts = self._expected(offset, length)
        self._under_way.add(offset + length)
        try:
            if parts is None and length > self._piece:
                self._start([(offset, length)])
                parts = self._announced.take(offset, length)
                self._hand_out(parts or ())
            return _joined(parts) if parts else self._disk.read(offset, length)
        finally:
            self._under_way.discard(offset + length)

    def _expected(self, offset: int, length: int) -> Optional[list[_Part]]:
        """The parts of a read among what is read ahead; starts more where a client goes on."""
        end = offset + length
        piece, pieces, now = self._piece, self._pieces, time.monotonic()
        first, last = offset // piece, (end - 1) // piece
        with self._lock:
            count, started = self._streams.pop(offset, (0, 0))
            if length >= piece // 4 and offset in self._under_way:
                count = 0  # the client reads ahead itself
            if len(self._streams) >= _STREAMS:
                del self._streams[next(iter(self._streams))]
            if count >= _SEQUENTIAL:
                held = pieces.get(first)
                if held is None or now - held.since > _FRESH:
                    started = first  # another reader took it, or this one was away
                ahead = min((1 << min(count - _SEQUENTIAL, 30)) - 1, self._depth)
                stop = min(last + ahead, (self.size - 1) // piece) + 1
                for number in range(max(started, first), stop):
                    self._fetch(number, now)
                started = max(started, stop)
            self._streams[end] = (count + 1, started)
            if not pieces:
                return None
            jobs = [pieces.get(number) for number in range(first, last + 1)]
            if count >= _SEQUENTIAL:
                for number in range(first, end // piece):  # done with
                    pieces.pop(number, None)
        parts = []
        for job in jobs:
            if job is None or now - job.since > _FRESH or job.error is not None:
                return None
            at = max(offset, job.offset)
            parts.append(_Part(job, at, min(end, job.offset + job.length) - at))
        return parts

    def _fetch(self, number: int, now: float) -> None:
        job = self._pieces.get(number)
        if job is not None and now - job.since <= _FRESH and job.error is None:
            return
        self._pieces.pop(number, None)
        if len(self._pieces) >= _KEPT // self._piece:
            del self._pieces[next(iter(self._pieces))]
        at = number * self._piece
        job = self._pieces[number] = _Job(self._disk, at, min(self._piece, self.size - at))
        self._queue.put(job)

    def extents(self, offset: int, length: int) -> Iterator[Extent]:
        return self._disk.extents(offset, length)

    # Writing

    def _forget(self, offset: int, length: int) -> None:
        self._announced.forget(offset, length)
        with self._lock:
            for number in range(offset // self._piece, (offset + length - 1) // self._piece + 1):
                self._pieces.pop(number, None)

    def write(self, offset: int, data: memoryview) -> None:
        try:
            self._disk.write(offset, data)
        finally:
            self._forget(offset, len(data))

    def zero(self, offset: int, length: int, *, punch: bool, fast: bool) -> None:
        try:
            self._disk.zero(offset, length, punch=punch, fast=fast)
        finally:
            self._forget(offset, length)

    def trim(self, offset: int, length: int) -> None:
        try:
            self._disk.trim(offset, length)
        finally:
            self._forget(offset, length)

    def flush(self) -> None:
        self._disk.flush()

    def verify_access(self) -> None:
        self._disk.verify_access()

    def close(self) -> None:
        for _ in self._workers:
            self._queue.put(None)
        self._disk.close()
        for worker in self._workers:
            worker.join(1)


def _joined(parts: Sequence[_Part]) -> list[Span]:
    if len(parts) == 1:
        return parts[0].job.part(parts[0].offset, parts[0].length)
    return [span for part in parts for span in part.job.part(part.offset, part.length)]
