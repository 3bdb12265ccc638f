"""Outputs that check what is written: compare it with what is there already, or hash it."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import queue
import threading
from collections.abc import Iterator, Sequence
from typing import Any, Union

from nbdtool.disk import ZEROES, FileSpan, SpanFile
from nbdtool.outputs import CHUNK, Memory, SourceError, Stream, read_file

_AHEAD = 4  # pieces that may wait for being hashed
_ZEROES = 32 << 20  # bytes of zeroes in one of them


class Comparison(Stream):
    """Takes a disk as an output does, and raises OSError where the target has other bytes.

    The target is a regular file or a block device, which is read from the medium as far as the
    kernel lets us: what it holds of the target in memory is dropped before.
    """

    def __init__(self, fd: int) -> None:
        super().__init__(fd)
        self._found = bytearray()
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)  # of what isn't written yet it would not
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_SEQUENTIAL)

    def write(self, offset: int, parts: Sequence[Memory]) -> int:
        total = sum(map(len, parts))
        found = self._read(offset, total)
        at = 0
        for part in parts:
            there = found if len(part) == total else found[at : at + len(part)]
            if there != part:
                raise _difference(offset + at, there, part)
            at += len(part)
        return total

    def write_file(self, offset: int, span: FileSpan) -> None:
        with _blaming(span.file):
            for data in read_file(span):
                offset += self.write(offset, [data])
                self.moved(offset)

    def write_zeroes(self, offset: int, length: int) -> None:
        end = offset + length
        while offset < end:
            try:
                offset = os.lseek(self.fd, offset, os.SEEK_DATA)
            except OSError as error:
                if error.errno == errno.ENXIO:  # a hole up to the end
                    return
            if offset < end:
                offset += self.write(offset, [ZEROES[: min(end - offset, CHUNK)]])
            self.moved(min(offset, end))

    def _read(self, offset: int, length: int) -> Any:
        """A bytearray, which is used again: memoryviews compare byte by byte."""
        if len(self._found) != length:
            self._found = bytearray(length)
        view = memoryview(self._found)
        done = 0
        while done < length:
            count = os.preadv(self.fd, [view[done:]], offset + done)
            if not count:
                raise OSError(errno.EIO, f"ends early, at byte {offset + done}")
            done += count
        return self._found

    def finish(self, size: int) -> None:
        end = os.lseek(self.fd, 0, os.SEEK_END)
        if end < size:
            raise OSError(errno.EIO, f"ends early, at byte {end}")


@contextlib.contextmanager
def _blaming(file: SpanFile) -> Iterator[None]:
    """Of a difference, say that the file changed if it did."""
    try:
        yield
    except OSError:
        try:
            file.check()
        except OSError as error:
            raise SourceError.of(error) from error
        raise


def _difference(offset: int, there: bytes, part: Memory) -> OSError:
    first = next(i for i, (one, other) in enumerate(zip(there, part)) if one != other)
    return OSError(errno.EIO, f"differs from the source at byte {offset + first}")


class Sink(Stream):
    """Keeps nothing."""

    def __init__(self) -> None:
        super().__init__(-1)

    def write(self, offset: int, parts: Sequence[Memory]) -> int:
        return sum(map(len, parts))

    def write_zeroes(self, offset: int, length: int) -> None:
        pass


class Digest(Stream):
    """Hands all on to another output, and hashes it meanwhile in a thread of its own.

    with Digest(output) as digest: ...; digest.hexdigest
    """

    def __init__(self, output: Stream) -> None:
        super().__init__(output.fd)
        self.hexdigest = ""  # SHA-256, once the block has ended
        self._output = output
        self._pieces: queue.Queue[Union[Sequence[Memory], int, None]] = queue.Queue(_AHEAD)
        self._sha256 = hashlib.sha256()
        self._failed = False
        self._thread = threading.Thread(target=self._hash, daemon=True)

    def __enter__(self) -> Digest:
        self._thread.start()
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self._failed = kind is not None
        self._pieces.put(None)
        self._thread.join()
        self.hexdigest = self._sha256.hexdigest()

    def _hash(self) -> None:
        while True:
            piece = self._pieces.get()
            if piece is None:
                return
            for part in _zeroes(piece) if isinstance(piece, int) else piece:
                if self._failed:
                    break
                self._sha256.update(part)

    def write(self, offset: int, parts: Sequence[Memory]) -> int:
        self._pieces.put(parts)
        return self._output.write(offset, parts)

    def write_file(self, offset: int, span: FileSpan) -> None:
        with _blaming(span.file):
            for data in read_file(span, buffers=_AHEAD + 2):
                offset += self.write(offset, [data])
                self.moved(offset)

    def write_zeroes(self, offset: int, length: int) -> None:
        end = offset + length
        for at in range(offset, end, _ZEROES):
            self._pieces.put(min(_ZEROES, end - at))
            self._output.write_zeroes(at, min(_ZEROES, end - at))
            self.moved(at)

    def finish(self, size: int) -> None:
        self._output.finish(size)


def _zeroes(length: int) -> Iterator[memoryview]:
    for _ in range(length // len(ZEROES)):
        yield ZEROES
    yield ZEROES[: length % len(ZEROES)]
