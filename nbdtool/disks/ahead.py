"""Reads that were announced and started, kept until they are asked for."""

from __future__ import annotations

import threading
import time
from typing import Generic, Optional, TypeVar

Item = TypeVar("Item")

_LIMIT = 32 << 20  # bytes that may wait
_FRESH = 10.0  # seconds; what waits longer was abandoned, and may have become old


class Ahead(Generic[Item]):
    """What Disk.prefetch started, by range; each is for the thread that announced it.

    Other threads may read the same range for a client that knows of later writes.
    """

    def __init__(self, limit: int = _LIMIT) -> None:
        self._limit = limit
        self._bytes = 0
        self._items: dict[tuple[int, int, int], tuple[float, Item]] = {}
        self._lock = threading.Lock()

    def wants(self, offset: int, length: int) -> bool:
        """Whether the range isn't there yet, and there is room for it."""
        if self._bytes + length > self._limit:
            self._drop_old()
        here = (threading.get_ident(), offset, length) in self._items
        return not here and self._bytes + length <= self._limit

    def add(self, offset: int, length: int, item: Item) -> None:
        key = (threading.get_ident(), offset, length)
        with self._lock:
            if key not in self._items:
                self._bytes += length
            self._items[key] = (time.monotonic(), item)

    def take(self, offset: int, length: int) -> Optional[Item]:
        """What this thread announced of exactly this range, once."""
        if not self._items:
            return None
        with self._lock:
            found = self._items.pop((threading.get_ident(), offset, length), None)
            if found is None:
                return None
            self._bytes -= length
        return found[1] if time.monotonic() - found[0] < _FRESH else None

    def forget(self, offset: int, length: int) -> None:
        """Drop what overlaps a range that is written."""
        if self._items:
            self._drop(
                [
                    key
                    for key in list(self._items)
                    if key[1] < offset + length and offset < sum(key[1:])
                ]
            )

    def _drop_old(self) -> None:
        now = time.monotonic()
        self._drop([key for key, (since, _) in list(self._items.items()) if now - since > _FRESH])

    def _drop(self, keys: list[tuple[int, int, int]]) -> None:
        with self._lock:
            for key in keys:
                if self._items.pop(key, None) is not None:
                    self._bytes -= key[2]
