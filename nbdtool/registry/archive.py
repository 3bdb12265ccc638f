"""The members of a tar archive as files, for the images that are archives."""

from __future__ import annotations

from nbdtool.disk import Disk, read_bytes
from nbdtool.disks.file import FileDisk
from nbdtool.errors import Error
from nbdtool.layers import tar
from nbdtool.layers.tar.find import find_file
from nbdtool.registry import decompress
from nbdtool.registry.digest import Stream
from nbdtool.registry.spool import Spool


class Archive:
    """The files in the archive on a disk, or in the file of a name, which may be compressed."""

    def __init__(self, archive: Disk | str) -> None:
        disk = FileDisk(archive) if isinstance(archive, str) else archive
        self.name = disk.description
        self._disk = _unpacked(disk)

    def open(self, path: str) -> Stream:
        return _DiskStream(self._member(path))

    def size(self, path: str) -> int:
        return self._member(path).size

    def _member(self, path: str) -> Disk:
        return tar.open_member(self._disk, find_file(self._disk, path))

    def close(self) -> None:
        self._disk.close()


def _unpacked(disk: Disk) -> Disk:
    stream = _DiskStream(disk)
    reader = decompress.open_reader(stream, disk.description)
    if reader.plain:
        return disk
    spool, size = Spool(disk.description), 0
    while data := reader.read(decompress.CHUNK):
        spool.write(size, data)
        size += len(data)
    return spool.disk(size, disk.description)


class _DiskStream:
    """The bytes of a disk, one after the other."""

    def __init__(self, disk: Disk) -> None:
        self._disk, self._at = disk, 0

    def read(self, size: int, /) -> bytes:
        size = min(size, self._disk.size - self._at)
        try:
            data = read_bytes(self._disk, self._at, size)
        except OSError as exc:
            raise Error(f"{self._disk.description}: {exc.strerror or exc}") from None
        self._at += size
        return data

    def close(self) -> None:
        pass
