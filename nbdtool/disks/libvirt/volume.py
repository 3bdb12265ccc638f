"""Method volume: the images of a stopped guest, downloaded from their storage pools."""

from __future__ import annotations

import errno
import os
import tempfile
from typing import Any, BinaryIO

from nbdtool.disk import Disk
from nbdtool.disks.file import FileDisk
from nbdtool.disks.libvirt.guests import Guest, GuestDisk, Image, Watch
from nbdtool.disks.libvirt.link import Link, module
from nbdtool.disks.libvirt.local import open_chain, refuse_special
from nbdtool.disks.libvirt.pools import volume_of
from nbdtool.errors import Error
from nbdtool.progress import Progress, human

_PIECE = 1 << 20  # bytes asked of a stream; it gives less
_HOLE = -3  # what recvFlags says of a hole
_FLAG_SPARSE, _FLAG_STOP_AT_HOLE = 1, 1


def open_volume(link: Link, guest: Guest, disk: GuestDisk) -> Disk:
    """Raises Error if the guest runs, or a pool lacks one of its images."""
    if guest.active:
        raise Error(
            f"{guest.name}: is {guest.state}: its disk changes while it is downloaded; use"
            " --method backup on its host, or stop it"
        )
    made = open_chain(disk, lambda image: _fetch(link, image))
    try:
        Watch(link, guest, disk).check()
    except BaseException:
        made.close()
        raise
    made.description = f"{guest.name} {disk.target} by method volume (downloaded)"
    return made


def _fetch(link: Link, image: Image) -> Disk:
    """An image in an unlinked temporary file."""
    refuse_special(image)
    with tempfile.TemporaryFile(dir=os.environ.get("TMPDIR") or "/var/tmp") as file:
        link.call(lambda connection: _download(connection, image, file))
        disk = FileDisk(f"/proc/self/fd/{file.fileno()}")
    disk.file.name = disk.description = str(image)
    return disk


def _download(connection: Any, image: Image, file: BinaryIO) -> None:
    volume = volume_of(connection, image)
    if volume is None:
        raise Error(
            f"{image}: isn't in an active storage pool; make one of its directory on the guest's"
            " host: virsh pool-create-as NAME dir --target DIRECTORY"
        )
    free = os.statvfs(file.fileno())
    if volume.info()[2] > free.f_bavail * free.f_frsize:
        raise Error(
            f"{image}: its {human(volume.info()[2])} don't fit into the"
            f" {human(free.f_bavail * free.f_frsize)} that are free; set TMPDIR"
        )
    file.truncate(0)
    stream = connection.newStream(0)
    volume.download(stream, 0, 0, _FLAG_SPARSE)
    try:
        with Progress(f"downloading {os.path.basename(image.path)}", volume.info()[1]) as progress:
            file.truncate(_receive(stream, file.fileno(), progress))
        stream.finish()
    except BaseException as exc:
        try:
            stream.abort()
        except module().libvirtError:
            pass
        if isinstance(exc, OSError):
            raise Error(f"{image}: downloading: {exc.strerror or exc}") from None
        raise


def _receive(stream: Any, fd: int, progress: Progress) -> int:
    """Write what a stream has to a file; how long that is, with its holes."""
    at = 0
    while True:
        got = stream.recvFlags(_PIECE, _FLAG_STOP_AT_HOLE)
        if got == _HOLE:
            at += max(stream.recvHole(), 0)
            if at >= 1 << 63:
                raise OSError(errno.EFBIG, os.strerror(errno.EFBIG))
        elif got:
            done = 0
            while done < len(got):
                done += os.pwrite(fd, memoryview(got)[done:], at + done)
            at += done
        else:
            return at
        progress.update(at)
