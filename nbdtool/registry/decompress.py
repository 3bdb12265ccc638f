"""Layers unpacked as they come: gzip, zstd or a plain tar, told by their first bytes.

Specification: RFC 1952 (gzip), RFC 8878 (zstd).
"""

from __future__ import annotations

import importlib
import zlib
from typing import Any, Callable, Protocol

from nbdtool import zstd
from nbdtool.errors import Error
from nbdtool.registry.digest import Stream

CHUNK = 512 << 10  # bytes

_GZIP = b"\x1f\x8b"
_ZSTD = (b"\x28\xb5\x2f\xfd", *(bytes((0x50 + n,)) + b"\x2a\x4d\x18" for n in range(16)))
_OTHERS = {b"BZh": "bzip2", b"\xfd7zXZ": "xz"}


def open_reader(source: Stream, what: str) -> Reader:
    """What source unpacks to; it reads source to its end. Bad data is Error naming `what`."""
    peeked = _Peeked(source)
    magic = peeked.peek(6)
    if magic.startswith(_GZIP):
        return _Gzip(peeked, what)
    if magic.startswith(_ZSTD):
        zstd.require(what)
        return _Zstd(peeked, what)
    for prefix, name in _OTHERS.items():
        if magic.startswith(prefix):
            raise Error(f"{what}: it is compressed with {name}, which layers can't be")
    return peeked


def is_compressed(first: bytes) -> bool:
    """Whether data that begins so is of gzip or zstd."""
    return first.startswith((_GZIP, *_ZSTD))


def compression(media_type: str) -> str:
    """What a layer's media type says of its compression."""
    suffix = media_type.rpartition("+")[2] if "+" in media_type else media_type.rpartition(".")[2]
    return suffix if suffix in ("gzip", "zstd") else "none"


class Reader(Stream, Protocol):
    """A stream that tells whether it is as it came, not compressed."""

    plain: bool


class _Peeked:
    """A stream whose first bytes were looked at."""

    plain = True

    def __init__(self, source: Stream) -> None:
        self._source = source
        self._first = b""

    def peek(self, size: int) -> bytes:
        while len(self._first) < size:
            data = self._source.read(CHUNK)
            if not data:
                break
            self._first += data
        return self._first[:size]

    def read(self, size: int, /) -> bytes:
        if self._first:
            data, self._first = self._first[:size], self._first[size:]
            return data
        return self._source.read(size)

    def close(self) -> None:
        self._source.close()


def _inflater() -> Callable[[], Any]:
    """What makes a decompressobj for a gzip member: the fastest that is at hand."""
    for name in ("isal.isal_zlib", "zlib_ng.zlib_ng"):
        try:
            module: Any = importlib.import_module(name)
        except ImportError:
            continue
        return lambda: module.decompressobj(16 + zlib.MAX_WBITS)
    return lambda: zlib.decompressobj(16 + zlib.MAX_WBITS)


class _Gzip:
    """The members of a gzip file, one after the other."""

    plain = False

    def __init__(self, source: Stream, what: str) -> None:
        self._source, self._what = source, what
        self._new = _inflater()
        self._member = self._new()
        self._input = b""

    def read(self, size: int, /) -> bytes:
        while True:
            if not self._input:
                self._input = self._source.read(CHUNK)
                if not self._input:
                    if not self._member.eof:
                        raise Error(f"{self._what}: its gzip data ends in the middle")
                    return b""
            if self._member.eof:
                self._member = self._new()
            try:
                data: bytes = self._member.decompress(self._input, size)
            except Exception as exc:  # each module has a class of its own
                raise Error(f"{self._what}: its gzip data is damaged ({exc})") from None
            self._input = (
                self._member.unused_data if self._member.eof else self._member.unconsumed_tail
            )
            if data:
                return data

    def close(self) -> None:
        self._source.close()


class _Zstd:
    """The frames of a zstd file."""

    plain = False

    def __init__(self, source: Stream, what: str) -> None:
        self._source, self._what = source, what
        self._failure: Exception | None = None  # of the source, not of the decompressor
        self._reader = zstd.open_reader(_Caller(self._feed))

    def _feed(self, size: int) -> bytes:
        try:
            return self._source.read(size)
        except Exception as exc:
            self._failure = exc
            raise

    def read(self, size: int, /) -> bytes:
        try:
            return self._reader.read(size)
        except OSError as exc:
            if self._failure:
                raise self._failure from None
            raise Error(f"{self._what}: {exc.strerror or exc}") from None

    def close(self) -> None:
        self._source.close()


class _Caller:
    def __init__(self, read: Callable[[int], bytes]) -> None:
        self.read = read
