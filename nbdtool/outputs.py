"""Where a disk is written to: a regular file, a block device, or a stream of bytes.

What goes wrong with the output is an OSError, and with the source a SourceError.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
import struct
from collections.abc import Iterator, Sequence
from typing import Callable, Union

from nbdtool.disk import FileSpan, SpanFile
from nbdtool.errors import Error
from nbdtool.replacement import closing, replacement

CHUNK = 1 << 20  # bytes copied through memory at once
_PIECE = 32 << 20  # bytes that one system call copies or zeroes at most
_BLKZEROOUT = 0x127F  # linux/fs.h

Memory = Union[bytes, memoryview]


class SourceError(Error):
    """What was to be written can't be read, or changed meanwhile."""

    @classmethod
    def of(cls, error: OSError) -> SourceError:
        text = error.strerror or str(error)
        return cls(f"{os.fsdecode(error.filename)}: {text}" if error.filename else text)


@contextlib.contextmanager
def open_output(target: str, size: int, *, inside: bool = False) -> Iterator[Stream]:
    """The output at `target`, a path or "-" for standard output, of `size` bytes. Raises OSError.

    A regular file appears, or takes the place of an old one, once the block ends without an
    exception; what isn't regular is written in place. Regular files and block devices can be read
    as well. `inside` takes nothing but a regular file, and follows no link out of its directory.
    """
    if target == "-":
        yield _standard_output()
        return
    if inside:
        refuse_special(target)
        folder, name = os.path.split(target)
        with replacement(os.path.join(os.path.realpath(folder), name)) as fd:
            yield RegularFile(fd)
        return
    kind = file_type(target)
    if kind == stat.S_IFREG:
        with replacement(os.path.realpath(target)) as fd:
            yield RegularFile(fd)
    elif kind == stat.S_IFBLK:
        with closing(os.open(target, os.O_RDWR | os.O_EXCL)) as fd:
            yield BlockDevice(fd, size)
    else:
        with closing(os.open(target, os.O_WRONLY | os.O_NOCTTY)) as fd:
            _refuse_terminal(fd)
            yield Stream(fd)


class Stream:
    """A descriptor that takes bytes in order.

    While one call takes long, it tells `moved` up to which offset it got.
    """

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self.moved: Callable[[int], object] = lambda offset: None

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
                self.moved(offset + done)
        except OSError:
            pass  # the kernel can't, or what is wrong shows below
        for data in read_file(FileSpan(file, position + done, length - done)):
            done += self.write(offset + done, [data])
            self.moved(offset + done)

    def write_zeroes(self, offset: int, length: int) -> None:
        zeroes = memoryview(bytes(min(length, CHUNK)))
        end = offset + length
        while offset < end:
            offset += self.write(offset, [zeroes[: end - offset]])
            self.moved(offset)

    def finish(self, size: int) -> None:
        """All `size` bytes were written: see that they stay."""


def read_file(span: FileSpan, buffers: int = 1) -> Iterator[memoryview]:
    """The bytes of a span in pieces, which stay for as long as `buffers` says: 1 up to the next.

    Raises SourceError, at last if the file changed meanwhile.
    """
    file, position, length = span
    ready: list[memoryview] = []
    while length:
        new = len(ready) < buffers
        buffer = memoryview(bytearray(min(length, CHUNK))) if new else ready.pop(0)
        ready.append(buffer)
        try:
            count = os.preadv(file.fd, [buffer[:length]], position)
        except OSError as error:
            raise SourceError(f"{file.name}: {error.strerror}") from error
        if not count:
            raise SourceError(f"{file.name}: ends early, at byte {position}")
        yield buffer[:count]
        position, length = position + count, length - count
    try:
        file.check()
    except OSError as error:
        raise SourceError.of(error) from error


class RegularFile(Stream):
    """A regular file from `base`, its end, onwards."""

    def __init__(self, fd: int, base: int = 0) -> None:
        super().__init__(fd)
        self.base = base

    def _writev(self, parts: Sequence[Memory], offset: int) -> int:
        return os.pwritev(self.fd, parts, self.base + offset)

    def _transfer(self, file: SpanFile, position: int, length: int, offset: int) -> int:
        length = min(length, _PIECE)
        return os.copy_file_range(file.fd, self.fd, length, position, self.base + offset)

    def write_zeroes(self, offset: int, length: int) -> None:
        pass  # a hole

    def finish(self, size: int) -> None:
        os.ftruncate(self.fd, self.base + size)
        os.fsync(self.fd)
        os.lseek(self.fd, self.base + size, os.SEEK_SET)  # another program may go on there


class BlockDevice(RegularFile):
    """A block device, written from its start; what lies behind the disk is left alone."""

    def __init__(self, fd: int, size: int) -> None:
        super().__init__(fd)
        capacity = os.lseek(fd, 0, os.SEEK_END)
        if capacity < size:
            raise OSError(errno.EFBIG, f"the device has {capacity} bytes, the disk {size}")

    def write_zeroes(self, offset: int, length: int) -> None:
        end = offset + length
        start, stop = -(-offset // 4096) * 4096, end // 4096 * 4096  # whole blocks for sure
        if start >= stop:
            Stream.write_zeroes(self, offset, length)
            return
        Stream.write_zeroes(self, offset, start - offset)
        for at in range(start, stop, _PIECE):
            length = min(_PIECE, stop - at)
            try:
                fcntl.ioctl(self.fd, _BLKZEROOUT, struct.pack("QQ", at, length))
            except OSError:
                Stream.write_zeroes(self, at, length)
            self.moved(at + length)
        Stream.write_zeroes(self, stop, end - stop)

    def finish(self, size: int) -> None:
        os.fsync(self.fd)


def _standard_output() -> Stream:
    fd = 1
    _refuse_terminal(fd)
    if stat.S_ISREG(os.fstat(fd).st_mode) and not fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_APPEND:
        position = os.lseek(fd, 0, os.SEEK_CUR)
        if position >= os.fstat(fd).st_size:
            return RegularFile(fd, position)
    return Stream(fd)


def _refuse_terminal(fd: int) -> None:
    if os.isatty(fd):
        raise OSError(errno.EINVAL, "a disk isn't written to a terminal; give a file or a pipe")


def file_type(path: str) -> int:
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


def refuse_special(path: str) -> None:
    """OSError if there is something other than a regular file, such as a symbolic link."""
    try:
        kind = stat.S_IFMT(os.lstat(path).st_mode)
    except FileNotFoundError:
        return
    if kind != stat.S_IFREG:
        what = (
            "a symbolic link, which isn't followed" if kind == stat.S_IFLNK else "no regular file"
        )
        raise OSError(errno.EEXIST, f"is {what}: remove it first")
