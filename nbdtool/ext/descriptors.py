"""Descriptors of the host's files: opened without side effects, and a bounded number kept."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Optional

from nbdtool.disk import SpanFile

OPEN_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_OPEN_FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC

_DESCRIPTORS = 1 << 17


class Recent:
    """The values used last: between `limit` and twice as many; safe with threads.

    There are two generations. The younger one becomes the older one when it is full, and what is
    found in the older one moves to the younger, so that a hit costs one look-up and no lock: those
    in a hurry look into `young` first.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self.young: dict[int, SpanFile] = {}
        self._old: dict[int, SpanFile] = {}

    def get(self, key: int) -> Optional[SpanFile]:
        value = self.young.get(key)
        if value is None:
            value = self._old.get(key)
            if value is not None:
                self.put(key, value)
        return value

    def put(self, key: int, value: SpanFile) -> SpanFile:
        if len(self.young) >= self._limit:
            self._old, self.young = self.young, {}
        self.young[key] = value
        return value


@contextlib.contextmanager
def working_directory() -> Iterator[None]:
    """Come back to the working directory afterwards."""
    here = os.open(".", os.O_PATH | os.O_CLOEXEC)
    try:
        yield
    finally:
        os.fchdir(here)
        os.close(here)


def open_unnoticed(name: bytes, flags: int, directory: Optional[int]) -> int:
    """Open without touching the access time, which only the owner may ask for."""
    try:
        return os.open(name, flags | os.O_NOATIME, dir_fd=directory)
    except PermissionError:
        return os.open(name, flags, dir_fd=directory)


def open_file(name: bytes, directory: Optional[int]) -> int:
    """Open what should be a regular file; nothing happens if it is a fifo or a device."""
    return open_unnoticed(name, _OPEN_FILE, directory)


def raise_descriptor_limit() -> int:
    """Allow this process more descriptors, as many as it may have; return how many those are."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if 0 <= hard < _DESCRIPTORS:
        with contextlib.suppress(OSError, ValueError):  # for root alone
            resource.setrlimit(resource.RLIMIT_NOFILE, (_DESCRIPTORS, _DESCRIPTORS))
            return _DESCRIPTORS
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return hard if hard != resource.RLIM_INFINITY else 1 << 20
