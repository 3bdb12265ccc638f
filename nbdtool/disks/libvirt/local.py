"""Method local: the images of a stopped guest on this host, opened directly."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Callable

from nbdtool.disk import Disk, Extent, Span, Stamp
from nbdtool.disks.file import FileDisk
from nbdtool.disks.libvirt.guests import Guest, GuestDisk, Image, Watch
from nbdtool.disks.libvirt.link import Link
from nbdtool.errors import Error

_EVERY = 0.25  # seconds between two looks whether the guest was started

OpenImage = Callable[[Image], Disk]


class Watched(Disk):
    """A disk that is read while `watch` says that it is still the same; read-only."""

    def __init__(self, disk: Disk, watch: Watch, description: str) -> None:
        self.size, self.description, self.block_size = disk.size, description, disk.block_size
        self._disk, self._watch = disk, watch
        self._lock = threading.Lock()
        self._until = time.monotonic() + _EVERY

    def _look(self) -> None:
        with self._lock:  # nobody reads before it is known
            if time.monotonic() >= self._until:
                self._watch.check()
                self._until = time.monotonic() + _EVERY

    def prefetch(self, ranges: Sequence[tuple[int, int]]) -> None:
        self._disk.prefetch(ranges)

    def read(self, offset: int, length: int) -> list[Span]:
        if time.monotonic() >= self._until:
            self._look()
        return self._disk.read(offset, length)

    def extents(self, offset: int, length: int) -> Iterator[Extent]:
        self._look()
        return self._disk.extents(offset, length)

    def verify_access(self) -> None:
        self._disk.verify_access()

    def close(self) -> None:
        self._disk.close()


def open_local(link: Link, guest: Guest, disk: GuestDisk) -> Disk:
    """Raises Error if the guest runs, or its images can't be read."""
    if guest.active:
        raise Error(
            f"{guest.name}: is {guest.state}: its disk changes while it is read; use"
            " --method backup, or stop it"
        )
    opened = open_chain(disk, _open_image)
    text = f"{guest.name} {disk.target} by method local ({disk.top}, {disk.top.format})"
    return Watched(opened, Watch(link, guest, disk), text)


def open_chain(disk: GuestDisk, open_image: OpenImage) -> Disk:
    """The disk in a chain of images, each opened by open_image; raises Error.

    A backing image is what libvirt says it is; what an image says isn't followed.
    """
    from nbdtool.layers.qcow2.header import read_header
    from nbdtool.layers.qcow2.image import Qcow2

    opened: list[Disk] = []
    try:
        below: Disk | None = None
        for image in reversed(disk.chain):
            current = open_image(image)
            opened.append(current)
            if image.format == "raw":
                below = current
                continue
            if image.format != "qcow2":
                raise Error(f"{image}: the format {image.format} can't be read here")
            header = read_header(current)
            if header.backing_file and below is None and not disk.complete:
                raise Error(
                    f"{image}: libvirt doesn't say which image its backing file"
                    f" {header.backing_file!r} is; put a <backingStore> into the guest's XML"
                    " (virsh edit), or start the guest"
                )
            below = Qcow2(current, backing=below if header.backing_file else None)
    except BaseException:
        for current in opened:
            current.close()
        raise
    assert below is not None
    return below


def _open_image(image: Image) -> Disk:
    refuse_special(image)
    if image.type not in ("file", "block"):
        raise Error(f"{image}: a {image.type} disk isn't on this host; use --method peek or volume")
    disk = FileDisk(image.path)
    if image.type == "file":
        # Whoever writes to it changes the stamp, with which the server compares each read.
        disk.file.stamp = Stamp.of(os.fstat(disk.file.fd))
    return disk


def refuse_special(image: Image) -> None:
    """Raise Error for what isn't what the guest sees."""
    if not image.plain:
        raise Error(
            f"{image}: is encrypted or a slice of its file; only a running guest's disk can be"
            " read then, with --method backup"
        )
