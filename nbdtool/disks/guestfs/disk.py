"""Devices and files in the appliance as disks."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from functools import partial
from typing import Any

from nbdtool.disk import ZEROES, Disk, Span, ZeroSpan
from nbdtool.disks.buffers import keep_buffers
from nbdtool.disks.guestfs.appliance import Appliance
from nbdtool.disks.guestfs.nodes import ZERO

PIECE = 1 << 20  # bytes of one call; more is slower, and the protocol ends below 4 MiB
_ZEROED = 32 << 20  # bytes that the appliance writes in one call, for which all others wait


class ApplianceDisk(Disk):
    """The file at `path` in the appliance's tree, or by its own name a device, which is slow.

    A path beside a device is that of its node. The size stays: nothing is written behind it. The
    appliance is closed with the last of its disks.
    """

    def __init__(
        self, appliance: Appliance, path: str, size: int, *, writable: bool, device: str = ""
    ) -> None:
        keep_buffers()
        self.size, self.writable = size, writable
        self._appliance = appliance
        self._path = path or device
        self._pread, self._pwrite = "pread", "pwrite"
        if not path:
            self._pread, self._pwrite = "pread_device", "pwrite_device"
        self._is_node = bool(path and device)
        appliance.share()

    def read(self, offset: int, length: int) -> list[Span]:
        call = self._appliance.call
        spans: list[Span] = []
        for at, count in _pieces(offset, length, PIECE):
            spans += call(partial(self._read, offset=at, length=count))
        return spans

    def _read(self, g: Any, offset: int, length: int) -> list[Span]:
        spans: list[Span] = []
        while length:
            data = getattr(g, self._pread)(self._path, length, offset)
            if not data:
                raise OSError(errno.EIO, f"{self.description}: ends early, at byte {offset}")
            is_zero = data[:16] == ZEROES[:16] and data == ZEROES[: len(data)]
            spans.append(ZeroSpan(len(data)) if is_zero else data)
            offset += len(data)
            length -= len(data)
        return spans

    def write(self, offset: int, data: memoryview) -> None:
        for at, count in _pieces(offset, len(data), PIECE):
            start = at - offset
            piece = bytes(data[start : start + count])
            self._appliance.call(partial(self._write, offset=at, data=piece))

    def _write(self, g: Any, offset: int, data: bytes) -> None:
        self._appliance.dirty = True
        while data:
            done = getattr(g, self._pwrite)(self._path, data, offset)
            if not done:
                raise OSError(errno.EIO, f"{self.description}: nothing is written at {offset}")
            data = data[done:]
            offset += done

    def zero(self, offset: int, length: int, *, punch: bool, fast: bool) -> None:
        if fast or not self._is_node:
            super().zero(offset, length, punch=punch, fast=fast)
            return
        for at, count in _pieces(offset, length, _ZEROED):
            self._appliance.call(partial(self._zero, offset=at, length=count))

    def _zero(self, g: Any, offset: int, length: int) -> None:
        """Zeroes that are made in the appliance: few bytes go there."""
        self._appliance.dirty = True
        g.copy_file_to_file(ZERO, self._path, destoffset=offset, size=length)

    def flush(self) -> None:
        self._appliance.flush()

    def close(self) -> None:
        self._appliance.release()


def _pieces(offset: int, length: int, most: int) -> Iterator[tuple[int, int]]:
    end = offset + length
    for at in range(offset, end, most):
        yield at, min(most, end - at)
