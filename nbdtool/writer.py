"""Write a Disk to a file, a block device or a stream, byte for byte as it would be served."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
import struct
from collections.abc import Iterable, Iterator, Sequence
from typing import Union

from nbdtool.disk import (
    DATA,
    HOLE,
    STATE_ZERO,
    ZEROES,
    Disk,
    Extent,
    FileSpan,
    Span,
    SpanFile,
    ZeroSpan,
    merge_extents,
)
from nbdtool.errors import Error
from nbdtool.progress import Progress
from nbdtool.replacement import closing, replacement

_CHUNK = 1 << 20  # bytes asked of a disk, or copied through memory, at once
_BATCH = 8  # chunks that a slow source prepares while as many are written
_RUN = 128 << 20  # bytes that one system call copies at most
_PARTS = 1024  # IOV_MAX
_HOLE = 4096  # bytes that a hole has at least
_BLKZEROOUT = 0x127F  # linux/fs.h

Memory = Union[bytes, memoryview]
Run = Union[list[Memory], FileSpan, ZeroSpan]


def write_disk(disk: Disk, target: str) -> None:
    """Write a disk to `target`: a path, or "-" for standard output. Raises Error.

    A regular file appears, or takes the place of an old one, only once it is complete and on stable
    storage: neither a failure nor a kill leaves a part of it. What isn't regular is written in
    place.
    """
    name = "standard output" if target == "-" else target
    with Progress("writing", disk.size) as progress, _naming(name):
        if target == "-":
            _copy(disk, _standard_output(), progress)
            return
        kind = _file_type(target)
        if kind == stat.S_IFREG:
            with replacement(os.path.realpath(target)) as fd:
                _copy(disk, _RegularFile(fd), progress)
        elif kind == stat.S_IFBLK:
            with closing(os.open(target, os.O_WRONLY | os.O_EXCL)) as fd:
                _copy(disk, _BlockDevice(fd, disk.size), progress)
        else:
            with closing(os.open(target, os.O_WRONLY | os.O_NOCTTY)) as fd:
                _refuse_terminal(fd)
                _copy(disk, _Stream(fd), progress)


# The spans of a disk, gathered into runs


def _copy(disk: Disk, output: _Stream, progress: Progress) -> None:
    """Write all of a disk."""
    offset = 0
    for run in _runs(_spans(disk)):
        if isinstance(run, FileSpan):
            output.write_file(offset, run)
            offset += run.length
        elif isinstance(run, ZeroSpan):
            output.write_zeroes(offset, run.length)
            offset += run.length
        else:
            offset += output.write(offset, run)
        progress.update(offset)
    output.finish(offset)


def _spans(disk: Disk) -> Iterator[Span]:
    """The spans of a whole disk, in order; what is known to read as zeroes isn't read."""
    ready: list[tuple[int, int]] = []
    try:
        for batch in _batches(disk):
            disk.prefetch([chunk for chunk in batch if chunk[0] >= 0])
            yield from _read(disk, ready)
            ready = batch
        yield from _read(disk, ready)
    except OSError as error:
        raise _source_error(error) from error


def _read(disk: Disk, chunks: list[tuple[int, int]]) -> Iterator[Span]:
    for offset, length in chunks:
        if offset < 0:
            yield ZeroSpan(length)
        else:
            yield from disk.read(offset, length)


def _batches(disk: Disk) -> Iterator[list[tuple[int, int]]]:
    """Lists of (offset, length) that cover the disk; the offset is -1 for a run of zeroes."""
    step = min(_CHUNK, disk.block_size[2])
    batch: list[tuple[int, int]] = []
    offset = 0
    for length, state in merge_extents(_worthwhile(disk)):
        end = offset + length
        if state == HOLE:
            batch.append((-1, length))
            offset = end
        while offset < end:
            stop = min(end, offset - offset % step + step)
            batch.append((offset, stop - offset))
            offset = stop
            if len(batch) >= _BATCH:
                yield batch
                batch = []
    if batch:
        yield batch


def _worthwhile(disk: Disk) -> Iterator[Extent]:
    """The extents of a disk, with what can't be a hole as data."""
    if disk.size:
        for length, state in disk.extents(0, disk.size):
            yield Extent(length, HOLE if state & STATE_ZERO and length >= _HOLE else DATA)


def _runs(spans: Iterable[Span]) -> Iterator[Run]:
    """Neighbouring spans as one, as far as one system call takes them."""
    run: Run = []
    size = 0  # of a run in memory
    for span in spans:
        if isinstance(span, FileSpan):
            if (
                isinstance(run, FileSpan)
                and run.file is span.file
                and run.offset + run.length == span.offset
                and run.length < _RUN
            ):
                run = FileSpan(run.file, run.offset, run.length + span.length)
                continue
        elif isinstance(span, ZeroSpan):
            if isinstance(run, ZeroSpan):
                run = ZeroSpan(run.length + span.length)
                continue
            if isinstance(run, list) and run and span.length < _HOLE and len(run) < _PARTS:
                run.append(ZEROES[: span.length])  # what fills a file's last block up
                size += span.length
                continue
        elif isinstance(run, list) and size < _CHUNK and len(run) < _PARTS:
            run.append(span)
            size += len(span)
            continue
        if run:
            yield run
        if isinstance(span, (FileSpan, ZeroSpan)):
            run = span
        else:
            run, size = [span], len(span)
    if run:
        yield run


# Where they go


class _Stream:
    """A descriptor that takes bytes in order."""

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def _writev(self, parts: Sequence[Memory], offset: int) -> int:
        return os.writev(self.fd, parts)

    def _transfer(self, file: SpanFile, position: int, length: int, offset: int) -> int:
        """Have the kernel copy some of `length` bytes; 0 at the end of the file."""
        return os.sendfile(self.fd, file.fd, position, length)

    def write(self, offset: int, parts: Sequence[Memory]) -> int:
        """Write the parts one after the other; returns their length."""
        total = sum(map(len, parts))
        done = self._writev(parts, offset)
        if done < total:
            rest = memoryview(b"".join(parts))
            while done < total:
                done += self._writev([rest[done:]], offset + done)
        return total

    def write_file(self, offset: int, span: FileSpan) -> None:
        file, position, length = span
        done = 0
        try:
            while done < length:
                count = self._transfer(file, position + done, length - done, offset + done)
                if not count:
                    break
                done += count
        except OSError:
            pass  # the kernel can't, or what is wrong shows below
        if done < length:
            buffer = memoryview(bytearray(min(length - done, _CHUNK)))
            while done < length:
                count = _read_into(buffer[: length - done], file, position + done)
                done += self.write(offset + done, [buffer[:count]])
        try:
            file.check()
        except OSError as error:
            raise _source_error(error) from error

    def write_zeroes(self, offset: int, length: int) -> None:
        zeroes = memoryview(bytes(min(length, _CHUNK)))
        end = offset + length
        while offset < end:
            offset += self.write(offset, [zeroes[: end - offset]])

    def finish(self, size: int) -> None:
        """All `size` bytes were written: see that they stay."""


def _read_into(buffer: memoryview, file: SpanFile, position: int) -> int:
    try:
        count = os.preadv(file.fd, [buffer], position)
    except OSError as error:
        raise Error(f"{file.name}: {error.strerror}") from error
    if not count:
        raise Error(f"{file.name}: ends early, at byte {position}")
    return count


class _RegularFile(_Stream):
    """A regular file from `base`, its end, onwards."""

    def __init__(self, fd: int, base: int = 0) -> None:
        super().__init__(fd)
        self.base = base

    def _writev(self, parts: Sequence[Memory], offset: int) -> int:
        return os.pwritev(self.fd, parts, self.base + offset)

    def _transfer(self, file: SpanFile, position: int, length: int, offset: int) -> int:
        return os.copy_file_range(file.fd, self.fd, length, position, self.base + offset)

    def write_zeroes(self, offset: int, length: int) -> None:
        pass  # a hole

    def finish(self, size: int) -> None:
        os.ftruncate(self.fd, self.base + size)
        os.fsync(self.fd)
        os.lseek(self.fd, self.base + size, os.SEEK_SET)  # another program may go on there


class _BlockDevice(_RegularFile):
    """A block device, written from its start; what lies behind the disk is left alone."""

    def __init__(self, fd: int, size: int) -> None:
        super().__init__(fd)
        capacity = os.lseek(fd, 0, os.SEEK_END)
        if capacity < size:
            raise OSError(errno.ENOSPC, f"the device has {capacity} bytes, the disk {size}")

    def write_zeroes(self, offset: int, length: int) -> None:
        end = offset + length
        start, stop = -(-offset // 4096) * 4096, end // 4096 * 4096  # whole blocks for sure
        if start >= stop:
            _Stream.write_zeroes(self, offset, length)
            return
        _Stream.write_zeroes(self, offset, start - offset)
        for at in range(start, stop, _RUN):
            length = min(_RUN, stop - at)
            try:
                fcntl.ioctl(self.fd, _BLKZEROOUT, struct.pack("QQ", at, length))
            except OSError:
                _Stream.write_zeroes(self, at, length)
        _Stream.write_zeroes(self, stop, end - stop)

    def finish(self, size: int) -> None:
        os.fsync(self.fd)


def _standard_output() -> _Stream:
    fd = 1
    _refuse_terminal(fd)
    if stat.S_ISREG(os.fstat(fd).st_mode) and not fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_APPEND:
        position = os.lseek(fd, 0, os.SEEK_CUR)
        if position >= os.fstat(fd).st_size:
            return _RegularFile(fd, position)
    return _Stream(fd)


def _refuse_terminal(fd: int) -> None:
    if os.isatty(fd):
        raise OSError(errno.EINVAL, "a disk isn't written to a terminal; give a file or a pipe")


def _file_type(path: str) -> int:
    """The type of a file, links followed; that of a regular file if there is none."""
    try:
        kind = stat.S_IFMT(os.stat(path).st_mode)
    except FileNotFoundError:
        if not os.path.basename(path):
            raise
        return stat.S_IFREG
    if kind == stat.S_IFDIR:
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    return kind


@contextlib.contextmanager
def _naming(name: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise Error(f"{name}: {error.strerror or error}") from error


def _source_error(error: OSError) -> Error:
    text = error.strerror or str(error)
    return Error(f"{os.fsdecode(error.filename)}: {text}" if error.filename else text)
