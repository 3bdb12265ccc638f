"""Method peek: virDomainBlockPeek, a remote procedure call for each piece of a raw disk."""

from __future__ import annotations

import itertools
import threading
import time
from typing import Any

from nbdtool.disk import ZEROES, Disk, Span, ZeroSpan
from nbdtool.disks.buffers import keep_buffers
from nbdtool.disks.libvirt.guests import Guest, GuestDisk, Watch
from nbdtool.disks.libvirt.link import Failure, Link, Lost
from nbdtool.disks.libvirt.local import refuse_special
from nbdtool.errors import Error, warn

CONNECTIONS = 2

# Bytes of a call from which on they are spread over the connections. Small ones share one, and so
# the awakenings of who receives, in libvirtd as here.
_LARGE = 64 << 10

# Bytes of one call. Every libvirt since 0.9.13 takes 1 MiB; but each byte is copied four times on
# its way, which costs least while a processor's cache holds it, and each call wakes four threads.
_PIECE = 512 << 10
_WORKERS, _PARALLEL = 2, 8
_REMOTE_PIECE, _REMOTE_WORKERS = 256 << 10, 16  # to fill a long link
_EVERY = 0.25  # seconds between two looks at the guest


class PeekDisk(Disk):
    """A raw disk of a guest, by target; reads are safe, and worth it, from several threads."""

    def __init__(self, link: Link, guest: Guest, disk: GuestDisk) -> None:
        keep_buffers()
        capacity, _, physical = link.call(
            lambda connection: _domain(connection, guest).blockInfo(disk.target)
        )
        if not 0 <= physical < 1 << 63 or not 0 <= capacity < 1 << 63:
            raise Error(f"{guest.name}: {disk.target}: {capacity} bytes can't be its capacity")
        self.size: int = capacity
        self._end = min(capacity, physical)  # of what can be peeked; qemu rounds up
        self.description = f"{guest.name} {disk.target} by method peek"
        self._guest = guest
        # A source path, other than a target, can't come to mean another image.
        self._name = disk.top.path or disk.target
        self._links = [link.clone() for _ in range(CONNECTIONS)]
        self._domains: list[tuple[Any, Any]] = [(None, None)] * CONNECTIONS
        self._watch = Watch(link, guest, disk)
        self._seen = time.monotonic()
        self._looking = threading.Lock()
        self._mine = threading.local()  # number: the link of this thread
        self._numbers = itertools.count()
        if self._end:
            self._piece(0, 1)  # whether it can be done

    def read(self, offset: int, length: int) -> list[Span]:
        spans: list[Span] = []
        for at in range(offset, offset + length, _PIECE):
            spans += self._piece(at, min(_PIECE, offset + length - at))
        if time.monotonic() - self._seen > _EVERY:
            self._look()
        return spans

    def _piece(self, offset: int, length: int) -> list[Span]:
        here = min(length, self._end - offset)
        if here <= 0:
            return [ZeroSpan(length)]
        number = 0
        if length >= _LARGE:
            try:
                number = self._mine.number
            except AttributeError:
                number = self._mine.number = next(self._numbers) % CONNECTIONS
        try:
            data = self._links[number].call(lambda c: self._peek(c, number, offset, here))
        except Lost:
            raise
        except Failure:
            self._watch.check()  # which says more, if it is that
            raise
        if len(data) != here:
            raise Failure(f"{self.description}: {len(data)} bytes instead of {here}", 0)
        span: Span = data
        if data[:16] == ZEROES[:16] and data == ZEROES[:here]:
            span = ZeroSpan(here)
        return [span] if here == length else [span, ZeroSpan(length - here)]

    def _peek(self, connection: Any, number: int, offset: int, length: int) -> bytes:
        known, domain = self._domains[number]
        if known is not connection:
            domain = _domain(connection, self._guest)
            self._domains[number] = (connection, domain)
        data: bytes = domain.blockPeek(self._name, offset, length, 0)
        return data

    def _look(self) -> None:
        """Nothing is handed out that was read after the guest was seen as it should be."""
        # One looks for all; but in an outage each waits for itself, not for the others in turn.
        alone = self._looking.acquire(timeout=1)
        try:
            now = time.monotonic()
            if now - self._seen > _EVERY:
                self._watch.check()
                self._seen = now
        finally:
            if alone:
                self._looking.release()

    def close(self) -> None:
        for number, link in enumerate(self._links):
            held, self._domains[number] = [self._domains[number]], (None, None)
            link.close(held)


def _domain(connection: Any, guest: Guest) -> Any:
    return connection.lookupByUUIDString(guest.uuid)


def open_peek(link: Link, guest: Guest, disk: GuestDisk) -> Disk:
    """Raises Error if the disk isn't raw."""
    if disk.top.format != "raw":
        raise Error(
            f"{guest.name}: {disk.target} is {disk.top.format}, and libvirt lets only raw disks be"
            " peeked at; use another --method"
        )
    refuse_special(disk.top)
    made = PeekDisk(link, guest, disk)
    if guest.active:
        made.description += ", not a point in time"
        warn(
            f"{guest.name}: is {guest.state}: what is read of {disk.target} is not a point in time,"
            " and misses what the guest hasn't written yet"
        )
    from nbdtool.layers.readahead import ReadAhead

    if link.is_local():
        made.parallel = _PARALLEL
        return ReadAhead(made, _WORKERS, _PIECE)
    made.parallel = _REMOTE_WORKERS
    return ReadAhead(made, _REMOTE_WORKERS, _REMOTE_PIECE)
