"""Digests, and readers that check them.

Specification: OCI image-spec, descriptor.md, section "Digests".
"""

from __future__ import annotations

import hashlib
import re
from typing import Any, Protocol

from nbdtool.errors import Error

_LENGTHS = {"sha256": 64, "sha384": 96, "sha512": 128}  # hexadecimal digits


class Stream(Protocol):
    """What has read(n), up to n bytes and none at the end, and close()."""

    def read(self, size: int, /) -> bytes: ...

    def close(self) -> None: ...


def is_digest(text: object) -> bool:
    """Whether text is `algorithm:hex` of an algorithm that is known here."""
    match = re.fullmatch(r"(sha\d{3}):([0-9a-f]+)", text) if isinstance(text, str) else None
    return match is not None and _LENGTHS.get(match[1]) == len(match[2])


def new_hash(digest: str) -> Any:
    """A hash object of the digest's algorithm."""
    return hashlib.new(digest.partition(":")[0])


def digest_of(data: bytes, like: str = "sha256:") -> str:
    """The digest of data by the algorithm of `like`."""
    made = new_hash(like)
    made.update(data)
    return f"{made.name}:{made.hexdigest()}"


def verify(data: bytes, digest: str, what: str) -> None:
    """Raise Error unless data has the digest."""
    found = digest_of(data, digest)
    if found != digest:
        raise _differs(what, found, digest)


class Verified:
    """Reads from source and raises Error unless it is what digest and size promise.

    Either may be empty, or None: then any will do. The read that meets the end is the one that
    checks, so a caller must read until the end; then `complete` is true.
    """

    def __init__(self, source: Stream, digest: str, size: int | None, what: str) -> None:
        self._source, self._digest, self._size, self._what = source, digest, size, what
        self._hash = new_hash(digest) if digest else None
        self.length = 0  # bytes read
        self.complete = False

    def read(self, size: int, /) -> bytes:
        data = self._source.read(size)
        if self._hash:
            self._hash.update(data)
        self.length += len(data)
        if self._size is not None and self.length > self._size:
            raise Error(f"{self._what}: longer than the {self._size} bytes that were promised")
        if not data and not self.complete:
            self._check()
        return data

    def _check(self) -> None:
        if self._size is not None and self.length != self._size:
            raise Error(
                f"{self._what}: ends after {self.length} of the {self._size} bytes promised"
            )
        found = f"{self._hash.name}:{self._hash.hexdigest()}" if self._hash else ""
        if found != self._digest:
            raise _differs(self._what, found, self._digest)
        self.complete = True

    def close(self) -> None:
        self._source.close()


def _differs(what: str, found: str, promised: str) -> Error:
    return Error(f"{what}: its digest is {found}, not {promised} as promised: it was altered")
