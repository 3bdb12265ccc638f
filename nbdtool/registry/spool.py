"""A temporary file for what is unpacked: sparse, and without a name, so that nothing is left."""

from __future__ import annotations

import errno
import os
import tempfile

from nbdtool.disk import Disk
from nbdtool.disks.file import FileDisk
from nbdtool.errors import Error
from nbdtool.progress import human

_BLOCK = 64 << 10  # bytes: so many zeroes become a hole
_ZEROES = bytes(_BLOCK)


class Spool:
    """A file in TMPDIR that is written at any offset; max_size (None: any) bounds its length."""

    def __init__(self, what: str, max_size: int | None = None) -> None:
        self._what, self._max_size = what, max_size
        self._directory = os.environ.get("TMPDIR") or "/var/tmp"
        try:
            self._file = tempfile.TemporaryFile(  # noqa: SIM115 (the spool's life is longer)
                dir=self._directory, buffering=0
            )
        except OSError as exc:
            raise Error(
                f"{self._directory}: {exc.strerror}; name another folder in TMPDIR"
            ) from None

    def expect(self, size: int) -> None:
        """Raise Error if `size` bytes are too many, or if the filesystem has no room for them."""
        self._bound(size)
        place = os.fstatvfs(self._file.fileno())
        free = place.f_bavail * place.f_frsize
        if size > free:
            raise Error(
                f"{self._what}: needs {human(size)}, and {self._directory} has {human(free)} free;"
                " name another folder in TMPDIR"
            )

    def write(self, offset: int, data: bytes) -> None:
        """Put data there; zeroes are left out, for the file has none but zeroes before."""
        self._bound(offset + len(data))
        if not any(data[at] == 0 for at in range(0, len(data), _BLOCK)):
            self._write(offset, memoryview(data))
            return
        start = 0  # of what isn't written yet
        for at in range(0, len(data), _BLOCK):
            if data[at] == 0 and _ZEROES.startswith(data[at : at + _BLOCK]):
                self._write(offset + start, memoryview(data)[start:at])
                start = at + _BLOCK
        self._write(offset + start, memoryview(data)[start:])

    def clear(self) -> None:
        """Forget all that was written."""
        self._file.truncate(0)

    def disk(self, size: int, description: str) -> Disk:
        """The first `size` bytes as a Disk; the spool isn't written any more."""
        try:
            self._file.truncate(size)
        except OSError as exc:
            raise self._failure(exc) from None
        with self._file:
            disk = FileDisk(f"/proc/self/fd/{self._file.fileno()}", allow_live=True)
        disk.file.name = self._what
        disk.description = description
        return disk

    def _bound(self, size: int) -> None:
        if self._max_size is not None and size > self._max_size:
            raise Error(
                f"{self._what}: bigger than the {human(self._max_size)} that --max-size allows"
            )

    def _write(self, offset: int, data: memoryview) -> None:
        fd = self._file.fileno()
        try:
            while data:
                done = os.pwrite(fd, data, offset)
                offset, data = offset + done, data[done:]
        except OSError as exc:
            raise self._failure(exc) from None

    def _failure(self, exc: OSError) -> Error:
        hint = ""
        if exc.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            hint = "; name another folder in TMPDIR"
        return Error(f"{self._directory}: {exc.strerror} (for {self._what}){hint}")
