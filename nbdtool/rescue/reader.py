"""Reads that may fail or hang, each copied to the target by a thread that can be left behind."""

from __future__ import annotations

import errno
import mmap
import os
import threading
import time
import weakref
from collections import deque
from collections.abc import Iterator, Sequence
from queue import Empty, SimpleQueue
from typing import Callable, NamedTuple, Optional, Union

from nbdtool.disk import Disk, Extent, FileSpan, Gone, Span, SpanFile
from nbdtool.errors import Error, debug
from nbdtool.rescue.target import Target

_STEP = 1 << 20  # bytes that one system call reads: what may hang together
_FINE = 64 << 10  # bytes: reads up to that are direct, if the page cache can be passed by
_WORKERS = 2  # threads that copy, as long as several reads are asked for at a time
_MANY = 8  # threads that hang
_PATIENCE = 10  # read_timeouts that are waited for one of them
_LEAVING = 2.0  # seconds for a thread to end
_TICK = 0.5  # seconds between two reports while a read takes its time

# What a disk says that isn't there any more, and never a sector that can't be read.
_GONE = {
    errno.ENXIO,
    errno.ENODEV,
    errno.ENOMEDIUM,
    errno.ENOTCONN,
    errno.ECONNABORTED,
    errno.ESHUTDOWN,
    errno.ESTALE,
}


class Outcome(NamedTuple):
    """What became of the read of [start, end): it was copied up to `done`.

    error says why not to the end; exact: what can't be read starts at done, and not somewhere
    behind it; ended: nor can what follows, for the file of the source ends there.
    """

    start: int
    end: int
    done: int
    error: Optional[OSError] = None
    exact: bool = False
    ended: bool = False
    seconds: float = 0.0


class _Ended(OSError):
    """A file of the source is shorter than it was."""


class _Exact(OSError):
    """A read that failed just behind what was copied."""


Job = Union[tuple[int, int], Callable[[], object]]


class Reader:
    """Copies ranges of a disk to a target in the order asked for; one thread uses it.

    A read that makes no progress for `timeout` seconds has failed (ETIMEDOUT); the others that were
    asked for weren't tried (ECANCELED). tick is called now and then while it waits. Error if the
    source is gone, if the target fails, or if too many reads hang.
    """

    def __init__(
        self, disk: Disk, target: Target, timeout: float, tick: Callable[[str], None]
    ) -> None:
        self._disk, self._target = disk, target
        self._timeout, self._tick = timeout, tick
        self._workers = [_Worker(disk, target) for _ in range(_WORKERS)]
        self._turn = 0
        self._asked: deque[tuple[int, int, _Worker]] = deque()
        self._left: list[_Worker] = []  # behind

    def __len__(self) -> int:
        """How many reads are under way."""
        return len(self._asked)

    def ask(self, start: int, end: int) -> None:
        self._turn = (self._turn + 1) % _WORKERS
        worker = self._workers[self._turn]
        self._asked.append((start, end, worker))
        worker.jobs.put((start, end))

    def extents(self, start: int, end: int) -> list[Extent]:
        """The extents of a range, while no read is under way; OSError."""
        worker = self._workers[0]
        worker.jobs.put(lambda: list(self._disk.extents(start, end - start)))
        found = self._wait(worker)
        if isinstance(found, OSError):
            self._refuse_gone(found)
            raise found
        if not isinstance(found, list):
            raise OSError(errno.ETIMEDOUT, "no answer")
        return found

    def take(self) -> Outcome:
        """The outcome of the oldest read under way."""
        start, end, worker = self._asked.popleft()
        if worker.abandoned:
            return Outcome(start, end, start, OSError(errno.ECANCELED, "not tried"))
        found = self._wait(worker)
        if isinstance(found, Outcome):
            if found.error:
                self._refuse_gone(found.error)
            return found
        text = f"no answer for {self._timeout:g} seconds"
        return Outcome(start, end, start, OSError(errno.ETIMEDOUT, text), seconds=self._timeout)

    def _wait(self, worker: _Worker) -> object:
        """Its next result; None once it hangs, and another thread has taken its place."""
        since = time.monotonic()
        moved = worker.moved
        while True:
            left = since + self._timeout - time.monotonic()
            try:
                found = worker.results.get(timeout=max(min(left, _TICK), 0.001))
            except Empty:
                self._tick("")
                self._look_behind()
                if worker.moved != moved:
                    moved, since = worker.moved, time.monotonic()
                elif left <= 0:
                    self._replace(worker)
                    return None
                continue
            if isinstance(found, BaseException) and not isinstance(found, OSError):
                raise found
            return found

    def _refuse_gone(self, error: OSError) -> None:
        if isinstance(error, Gone) or error.errno in _GONE:
            raise Error(
                f"{error.strerror or error}; the source is gone: what was rescued is kept, run"
                " again to go on"
            )

    def _look_behind(self) -> None:
        for worker in self._left:
            if worker.gone is not None:
                self._refuse_gone(worker.gone)
        self._left = [worker for worker in self._left if worker.thread.is_alive()]

    def _replace(self, worker: _Worker) -> None:
        debug(f"a read hangs for {self._timeout:g} seconds")
        worker.abandon()
        self._left.append(worker)
        deadline = time.monotonic() + _PATIENCE * self._timeout
        while len(self._left) >= _MANY:
            if time.monotonic() > deadline:
                raise Error(
                    f"{len(self._left)} reads hang: the source doesn't answer; what was rescued is"
                    " kept, run again to go on"
                )
            self._tick("waiting")
            time.sleep(min(_TICK, self._timeout))
            self._look_behind()
        self._workers[self._workers.index(worker)] = _Worker(self._disk, self._target)

    def close(self) -> bool:
        """End; False if a thread still hangs, and may use the disk and the target."""
        for worker in self._workers:
            worker.abandon()
        deadline = time.monotonic() + min(self._timeout, _LEAVING)
        for worker in self._workers:
            worker.thread.join(max(deadline - time.monotonic(), 0))
        return not any(worker.thread.is_alive() for worker in (*self._workers, *self._left))

    def copied(self) -> Iterator[tuple[int, int]]:
        """What was copied and never taken; for when it is closed."""
        for worker in self._workers:
            while not worker.results.empty():
                found = worker.results.get()
                if isinstance(found, Outcome) and found.done > found.start:
                    yield found.start, found.done


class _Worker:
    """A thread that reads and writes what it is told to."""

    def __init__(self, disk: Disk, target: Target) -> None:
        self._disk, self._target = disk, target
        self.jobs: SimpleQueue[Optional[Job]] = SimpleQueue()
        self.results: SimpleQueue[object] = SimpleQueue()
        self.moved = 0  # counts steps, by which a slow read differs from one that hangs
        self.gone: Optional[OSError] = None
        self.abandoned = False
        self._at = 0  # up to where the range at hand is copied
        self._buffer: Optional[memoryview] = None
        self._direct: weakref.WeakKeyDictionary[SpanFile, _Direct] = weakref.WeakKeyDictionary()
        self.thread = threading.Thread(target=self._run, daemon=True, name="rescue")
        self.thread.start()

    def abandon(self) -> None:
        """Let it do nothing more, whenever it comes back."""
        self.abandoned = True
        self.jobs.put(None)

    def _run(self) -> None:
        for job in self._taken():
            try:
                self.results.put(job() if callable(job) else self._read(*job))
            except OSError as error:
                self.results.put(error)
            except BaseException as error:
                self.results.put(error)
                return

    def _taken(self) -> Iterator[Job]:
        """The jobs; all that are there at once are announced to the disk."""
        taken: deque[Optional[Job]] = deque()
        while True:
            ranges = []
            while not taken or not self.jobs.empty():
                job = self.jobs.get()
                taken.append(job)
                if isinstance(job, tuple):
                    ranges.append((job[0], job[1] - job[0]))
            first = taken.popleft()
            if first is None or self.abandoned:
                return
            if len(ranges) > 1 or (ranges and taken):
                self._disk.prefetch(ranges)
            yield first

    def _read(self, start: int, end: int) -> Outcome:
        began = time.monotonic()
        self._at = start
        error: Optional[OSError] = None
        try:
            self._copy(self._disk.read(start, end - start), fine=end - start <= _FINE)
        except OSError as failed:
            error = failed
            if isinstance(failed, Gone):
                self.gone = failed
        seconds = time.monotonic() - began
        exact, ended = isinstance(error, (_Exact, _Ended)), isinstance(error, _Ended)
        return Outcome(start, end, self._at, error, exact, ended, seconds)

    def _copy(self, spans: Sequence[Span], *, fine: bool) -> None:
        parts: list[Union[bytes, memoryview]] = []
        for span in (*spans, None):
            if isinstance(span, (bytes, memoryview)):
                parts.append(span)
                continue
            if parts:
                self._step()
                self._target.write(self._at, parts)
                self._at += sum(map(len, parts))
                parts = []
            if isinstance(span, FileSpan):
                self._copy_file(span, fine)
            elif span is not None:
                self._step()
                self._target.zero(self._at, span.length)
                self._at += span.length

    def _step(self) -> None:
        if self.abandoned:
            raise OSError(errno.ECANCELED, "it took too long")
        self.moved += 1

    def _copy_file(self, span: FileSpan, fine: bool) -> None:
        file, position, length = span
        start, end = self._at, self._at + length
        # The kernel isn't asked to copy: it may let both files share what can't be read.
        while self._at < end:
            self._step()
            view = self._read_file(file, position + self._at - start, end - self._at, fine)
            self._target.write(self._at, [view])
            self._at += len(view)
        try:
            file.check()
        except OSError:
            self._at = start
            raise

    def _read_file(self, file: SpanFile, position: int, length: int, fine: bool) -> memoryview:
        """Some of `length` bytes of a file; OSError, _Exact or _Ended."""
        if self._buffer is None:
            self._buffer = memoryview(mmap.mmap(-1, _STEP))  # aligned, as direct reads need it
        view = self._buffer[: min(length, _STEP)]
        if fine:
            direct = self._direct.get(file)
            if direct is None:
                direct = self._direct[file] = _Direct(file)
            count = direct.read(view, position)
            if count:
                return view[:count]
        try:
            count = os.preadv(file.fd, [view], position)
        except OSError as error:
            raise _Exact(error.errno, f"{file.name}: {error.strerror}") from None
        if not count:
            raise _Ended(errno.EIO, f"{file.name}: ends early, at byte {position}")
        return view[:count]


class _Direct:
    """Reads of a file past the page cache, whose pages hold good sectors beside bad ones."""

    def __init__(self, file: SpanFile) -> None:
        try:
            self._fd = os.open(f"/proc/self/fd/{file.fd}", os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC)
        except (OSError, AttributeError) as error:
            debug(f"{file.name}: not read directly: {error}")
            self._fd = -1

    def read(self, view: memoryview, position: int) -> int:
        """How much was read, 0 where that can't be done; OSError if it failed."""
        if self._fd < 0 or (position | len(view)) % 512:
            return 0
        try:
            return os.preadv(self._fd, [view], position)
        except OSError as error:
            if error.errno in (errno.EINVAL, errno.EOPNOTSUPP):  # larger sectors
                return 0
            raise

    def __del__(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
