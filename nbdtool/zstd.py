"""Zstandard decompression by what is at hand.

Python has it since 3.14 (compression.zstd; backports.zstd before). Without that the C library
serves, which most systems have anyway, the zstandard module or the zstd program.
Specification: RFC 8878.
"""

from __future__ import annotations

import ctypes
import errno
import functools
import importlib
import io
import shutil
import subprocess
import threading
from typing import IO, Any, Callable, Optional, Protocol

from nbdtool.errors import Error

_MAGIC = b"\x28\xb5\x2f\xfd"
_CHUNK = 128 << 10  # bytes


class Readable(Protocol):
    """What has read(n): up to n bytes, none at the end."""

    def read(self, size: int, /) -> bytes: ...


Open = Callable[[Readable], Readable]


def open_reader(source: Readable) -> Readable:
    """What the frames of source decompress to, a read of n bytes holding hardly more in memory.

    Raises Error if nothing here decompresses zstd; reading raises OSError (EIO) for bad data. That
    the data ends in the middle of a frame is a failure too, but the zstandard module doesn't tell.
    """
    return _Checked(_find()(source))


def require(what: str) -> None:
    """Raise Error saying that `what` needs a decompressor, if there is none."""
    try:
        _find()
    except Error as exc:
        raise Error(f"{what}: {exc}") from None


def decompress_frame(data: bytes, size: int) -> bytes:
    """The `size` bytes of the one frame that data begins with; more or fewer are OSError (EIO)."""
    reader = open_reader(io.BytesIO(data[: _frame_length(data)]))
    parts, left = [], size + 1
    while left:
        part = reader.read(left)
        if not part:
            break
        parts.append(part)
        left -= len(part)
    if left != 1:
        raise OSError(errno.EIO, f"zstd: the data is not the {size} bytes that it should be")
    return parts[0] if len(parts) == 1 else b"".join(parts)


def _frame_length(data: bytes) -> int:
    """The length of the frame that data begins with (RFC 8878, section 3.1.1)."""
    try:
        if data[:4] != _MAGIC:
            raise ValueError
        descriptor = data[4]
        single = descriptor >> 5 & 1
        size_flag = descriptor >> 6
        size_bytes = 1 << size_flag if size_flag else single
        at = 5 + (not single) + (0, 1, 2, 4)[descriptor & 3] + size_bytes
        last = False
        while not last:
            block = int.from_bytes(data[at : at + 3], "little")
            last, kind, length = bool(block & 1), block >> 1 & 3, block >> 3
            at += 3 + (1 if kind == 1 else length)
            if at > len(data):
                raise ValueError
        at += 4 * (descriptor >> 2 & 1)
        if at > len(data):
            raise ValueError
    except (IndexError, ValueError):
        raise OSError(errno.EIO, "zstd: not a whole frame") from None
    return at


class _Checked:
    """A reader whose failures are OSError, whatever its module raises."""

    def __init__(self, reader: Readable) -> None:
        self._reader = reader

    def read(self, size: int, /) -> bytes:
        try:
            return self._reader.read(size)
        except OSError:
            raise
        except Exception as exc:  # each module has a class of its own
            raise OSError(errno.EIO, f"zstd: {exc}") from exc


# What may be at hand: each is None or opens a reader


def _python(name: str) -> Open | None:
    try:
        module: Any = importlib.import_module(name)
    except ImportError:
        return None
    return lambda source: module.ZstdFile(_Seekless(source))


def _zstandard() -> Open | None:
    try:
        module: Any = importlib.import_module("zstandard")
    except ImportError:
        return None
    return lambda source: module.ZstdDecompressor().stream_reader(source, read_across_frames=True)


def _library() -> Open | None:
    try:
        library = ctypes.CDLL("libzstd.so.1")
    except OSError:
        return None
    library.ZSTD_createDStream.restype = ctypes.c_void_p
    library.ZSTD_freeDStream.argtypes = [ctypes.c_void_p]
    library.ZSTD_decompressStream.restype = ctypes.c_size_t
    library.ZSTD_decompressStream.argtypes = [ctypes.c_void_p] + [ctypes.POINTER(_Buffer)] * 2
    library.ZSTD_isError.argtypes = [ctypes.c_size_t]
    library.ZSTD_getErrorName.restype = ctypes.c_char_p
    library.ZSTD_getErrorName.argtypes = [ctypes.c_size_t]
    return lambda source: _LibraryReader(library, source)


def _program() -> Open | None:
    path = shutil.which("zstd")
    return (lambda source: _ProgramReader(path, source)) if path else None


_BACKENDS: tuple[Callable[[], Optional[Open]], ...] = (
    lambda: _python("compression.zstd"),
    lambda: _python("backports.zstd"),
    _library,
    _zstandard,
    _program,
)


@functools.cache
def _find() -> Open:
    for backend in _BACKENDS:
        found = backend()
        if found:
            return found
    raise Error("it is compressed with zstd; install libzstd, the zstd program or Python 3.14")


class _Seekless:
    """A source for ZstdFile, which asks whether it is seekable."""

    def __init__(self, source: Readable) -> None:
        self.read = source.read

    def seekable(self) -> bool:
        return False


class _Buffer(ctypes.Structure):
    """ZSTD_inBuffer and ZSTD_outBuffer."""

    _fields_ = (("data", ctypes.c_void_p), ("size", ctypes.c_size_t), ("pos", ctypes.c_size_t))


class _LibraryReader:
    def __init__(self, library: ctypes.CDLL, source: Readable) -> None:
        self._library, self._source = library, source
        self._stream: int | None = library.ZSTD_createDStream()
        if not self._stream:
            raise MemoryError
        self._data = b""
        self._input = _Buffer(None, 0, 0)
        self._full = False  # the last output was: there may be more without more input
        self._unfinished = 0  # not 0 within a frame

    def __del__(self) -> None:
        self._library.ZSTD_freeDStream(self._stream)

    def read(self, size: int, /) -> bytes:
        target = ctypes.create_string_buffer(size)
        output = _Buffer(ctypes.addressof(target), size, 0)
        while not output.pos:
            if self._input.pos == self._input.size and not self._full and not self._refill():
                break
            self._unfinished = self._library.ZSTD_decompressStream(
                self._stream, output, self._input
            )
            if self._library.ZSTD_isError(self._unfinished):
                reason = self._library.ZSTD_getErrorName(self._unfinished).decode()
                raise OSError(errno.EIO, f"zstd: {reason}")
            self._full = output.pos == output.size
        return ctypes.string_at(target, output.pos)

    def _refill(self) -> bool:
        self._data = self._source.read(_CHUNK)
        if not self._data and self._unfinished:
            raise OSError(errno.EIO, "zstd: the data ends in the middle of a frame")
        pointer = ctypes.cast(ctypes.c_char_p(self._data), ctypes.c_void_p)
        self._input = _Buffer(pointer, len(self._data), 0)
        return bool(self._data)


class _ProgramReader:
    def __init__(self, path: str, source: Readable) -> None:
        self._process = subprocess.Popen(
            [path, "-dcq"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        self._failures: list[Exception] = []
        feeding = (source, self._process.stdin, self._failures)
        self._feeder = threading.Thread(target=_feed, args=feeding, daemon=True)
        self._feeder.start()

    def __del__(self) -> None:
        self._process.kill()
        self._process.wait()
        assert self._process.stdout
        self._process.stdout.close()

    def read(self, size: int, /) -> bytes:
        assert self._process.stdout
        data: bytes = self._process.stdout.read(size)
        if not data:
            self._feeder.join()
            if self._failures:
                raise self._failures[0]
            if self._process.wait():
                raise OSError(errno.EIO, "zstd: the zstd program can't decompress the data")
        return data


def _feed(source: Readable, stdin: IO[bytes], failures: list[Exception]) -> None:
    """Write all of source to the program; it holds no reference to the reader."""
    try:
        with stdin:
            while data := source.read(_CHUNK):
                stdin.write(data)
    except BrokenPipeError:
        pass  # its exit status, or that nobody reads on, tells why
    except Exception as exc:
        failures.append(exc)
