"""A regular file or a block device as a Disk."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator

from nbdtool.disk import DATA, HOLE, Disk, Extent, FileSpan, Span, SpanFile
from nbdtool.errors import Error


class FileDisk(Disk):
    """The file at path, whose size is fixed when it is opened; Error if it can't be served."""

    def __init__(self, path: str) -> None:
        try:
            # O_NONBLOCK: a fifo must not make us wait before it is refused.
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError as exc:
            raise Error(f"{path}: {exc.strerror}") from None
        self.file = SpanFile(fd, path)
        st = os.fstat(fd)
        if not stat.S_ISREG(st.st_mode) and not stat.S_ISBLK(st.st_mode):
            hint = "; `nbdtool linuxdisk` makes a disk of one" if stat.S_ISDIR(st.st_mode) else ""
            raise Error(f"{path}: neither a regular file nor a block device{hint}")
        self.size = os.lseek(fd, 0, os.SEEK_END)
        self.description = path

    def read(self, offset: int, length: int) -> list[Span]:
        return [FileSpan(self.file, offset, length)]

    def extents(self, offset: int, length: int) -> Iterator[Extent]:
        fd, end = self.file.fd, offset + length
        while offset < end:
            try:
                data = min(os.lseek(fd, offset, os.SEEK_DATA), end)
            except OSError as exc:
                if exc.errno != errno.ENXIO:  # a device or filesystem that can't tell
                    yield Extent(end - offset, DATA)
                    return
                data = end
            if data > offset:
                yield Extent(data - offset, HOLE)
            if data < end:
                offset = min(os.lseek(fd, data, os.SEEK_HOLE), end)
                yield Extent(offset - data, DATA)
            else:
                offset = end
