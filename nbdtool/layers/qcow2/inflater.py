"""Pieces of a compressed image, decompressed by several threads into a bounded cache."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Callable, Union

Piece = Union[bytes, memoryview]


class Inflater:
    """Keeps the `capacity` pieces last used of what inflate(key) returns; safe for many threads.

    A piece that several threads want at once is decompressed once.
    """

    def __init__(self, inflate: Callable[[int], Piece], capacity: int) -> None:
        self._inflate = inflate
        self._capacity = capacity
        self._lock = threading.Lock()
        self._done: OrderedDict[int, Piece] = OrderedDict()
        self._running: dict[int, Future[Piece]] = {}
        self._pool = ThreadPoolExecutor(os.cpu_count(), "inflate")

    def start(self, keys: Iterable[int]) -> None:
        """Begin with pieces that will be wanted soon, as many as can be kept until then."""
        with self._lock:
            for key in keys:
                if len(self._running) * 4 >= self._capacity:
                    return
                if key not in self._done and key not in self._running:
                    try:
                        self._running[key] = self._pool.submit(self._run, key)
                    except RuntimeError:
                        return  # no more threads are to be had: the reader does it

    def get(self, key: int) -> Piece:
        """The piece; raises what inflate raises."""
        with self._lock:
            data = self._done.get(key)
            if data is not None:
                self._done.move_to_end(key)
                return data
            running = self._running.get(key)
            if running is None:
                mine = self._running[key] = Future()
        if running is not None:
            return running.result()
        try:
            data = self._run(key)
        except BaseException as exc:
            mine.set_exception(exc)
            raise
        mine.set_result(data)
        return data

    def _run(self, key: int) -> Piece:
        try:
            data = self._inflate(key)
        except BaseException:
            with self._lock:
                self._running.pop(key, None)
            raise
        with self._lock:
            self._running.pop(key, None)
            self._done[key] = data
            if len(self._done) > self._capacity:
                self._done.popitem(last=False)
        return data

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)
