"""Raw deflate data whose decompressed size is known, by libdeflate where there is one.

That is more than twice as fast as zlib, which does it otherwise. Specification: RFC 1951.
"""

from __future__ import annotations

import ctypes
import threading
import zlib
from typing import Union


class _Library:
    """libdeflate; a decompressor of it serves one thread at a time."""

    def __init__(self) -> None:
        library = ctypes.CDLL("libdeflate.so.0")
        self._alloc = library.libdeflate_alloc_decompressor
        self._alloc.restype = ctypes.c_void_p
        self.free = library.libdeflate_free_decompressor
        self.free.argtypes = [ctypes.c_void_p]
        self._decompress = library.libdeflate_deflate_decompress
        pointer, size = ctypes.c_void_p, ctypes.c_size_t
        self._decompress.argtypes = [pointer, ctypes.c_char_p, size, pointer, size, pointer]
        self._threads = threading.local()

    def decompress(self, data: bytes, size: int) -> memoryview | None:
        """None if it can't be done, for whatever reason."""
        own = getattr(self._threads, "own", None)
        if own is None:
            own = self._threads.own = _Decompressor(self, self._alloc())
        if not own.handle:
            return None
        result = bytearray(size)
        target = (ctypes.c_char * size).from_buffer(result)
        if self._decompress(own.handle, data, len(data), target, size, None):
            return None
        return memoryview(result)


class _Decompressor:
    """A decompressor that is freed with its thread."""

    def __init__(self, library: _Library, handle: int | None) -> None:
        self._library, self.handle = library, handle

    def __del__(self) -> None:
        self._library.free(self.handle)


try:
    _library: _Library | None = _Library()
except (OSError, AttributeError):
    _library = None


def decompress(data: bytes, size: int, window_bits: int) -> Union[bytes, memoryview]:
    """The first `size` bytes of what data decompresses to; ValueError if there aren't as many.

    What follows the end of the compressed data is ignored; its window is 2**window_bits bytes.
    """
    result = _library.decompress(data, size) if _library else None
    if result is not None:
        return result
    try:
        # It is the judge of data that libdeflate doesn't take: more than `size` bytes, say.
        plain = zlib.decompressobj(-window_bits).decompress(data, size)
    except zlib.error as exc:
        raise ValueError(str(exc)) from None
    if len(plain) != size:
        raise ValueError(f"{len(plain)} bytes instead of {size}")
    return plain
