"""One bound on the memory that all clients' payloads and replies take together."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Callable

_LARGE = 96 << 20  # bytes for large requests, which wait when nothing is left
_SHARED = 40 << 20  # bytes that the connections share evenly, twice: queued replies, kept buffers
_SHARE_MAX = 1 << 20
_THREADS = 512  # of connections that use more than one each


class Budget:
    """What the connections of a server may hold in memory.

    share is what a connection may use without asking, in bytes, for queued replies and again for a
    payload buffer that it keeps; take() is for a request that needs more. threads is how many it
    may have. alone says that there is one connection and a processor to spare for it: it may look
    out for the next request awake.
    """

    def __init__(self) -> None:
        self.share = _SHARE_MAX
        self.threads = 1
        self.alone = False
        self._processors = len(os.sched_getaffinity(0))
        self._connections = 0
        self._free = _LARGE
        self._changed = threading.Condition()

    @contextmanager
    def connection(self) -> Iterator[None]:
        """Count one more connection for the duration."""
        self._count(1)
        try:
            yield
        finally:
            self._count(-1)

    def _count(self, change: int) -> None:
        with self._changed:
            self._connections += change
            self.share = min(_SHARE_MAX, _SHARED // max(self._connections, 1))
            self.threads = max(_THREADS // max(self._connections, 1), 1)
            self.alone = self._connections == 1 < self._processors

    @contextmanager
    def take(self, length: int, before_waiting: Callable[[], None]) -> Iterator[None]:
        """Hold length bytes for the duration; wait until they are free."""
        if self._free < length:
            before_waiting()
        with self._changed:
            while self._free < length:
                self._changed.wait()
            self._free -= length
        try:
            yield
        finally:
            with self._changed:
                self._free += length
                self._changed.notify_all()
