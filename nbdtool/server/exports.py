"""What a server offers: disks by export name, with the transmission flags that follow from them."""

from __future__ import annotations

from nbdtool import protocol as p
from nbdtool.disk import Disk


class Export:
    """One disk under one name."""

    def __init__(self, name: str, disk: Disk, read_only: bool) -> None:
        self.name = name
        self.disk = disk
        self.read_only = read_only or not disk.writable
        minimum, preferred, maximum = disk.block_size
        self.block_size = (minimum, preferred, min(maximum, p.MAX_PAYLOAD))

    def flags(self, structured: bool) -> int:
        """The transmission flags, section "Transmission flags"."""
        disk = self.disk
        flags = p.FLAG_HAS_FLAGS | p.FLAG_SEND_FLUSH | p.FLAG_SEND_FUA | p.FLAG_SEND_CACHE
        flags |= p.FLAG_SEND_DF * structured
        flags |= p.FLAG_CAN_MULTI_CONN * disk.multi_conn
        if self.read_only:
            return flags | p.FLAG_READ_ONLY
        flags |= p.FLAG_SEND_WRITE_ZEROES | p.FLAG_SEND_TRIM * disk.can_trim
        return flags | p.FLAG_SEND_FAST_ZERO * disk.can_fast_zero


class Exports:
    """All of a server's exports.

    One alone answers to any name, unless it was given one; among several the name must match.
    """

    def __init__(
        self, disks: dict[str, Disk], *, name: str | None = None, read_only: bool = False
    ) -> None:
        self._strict = len(disks) > 1 or name is not None
        if name is not None and len(disks) == 1:
            disks = dict(zip([name], disks.values()))
        self.all = [Export(name, disk, read_only) for name, disk in disks.items()]

    def find(self, name: str) -> Export | None:
        """The export of that name; None if there is none."""
        if not self._strict:
            return self.all[0]
        return next((export for export in self.all if export.name == name), None)
