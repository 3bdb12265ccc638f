"""A qcow2 image as the disk that is in it, for reading.

Specification: docs/interop/qcow2.txt of QEMU, sections "Cluster mapping" and "Extended L2 Entries".
Nothing is opened because an image names it: a backing file is given by the user or not at all.
"""

from __future__ import annotations

import errno
import sys
import threading
from array import array
from collections.abc import Iterator, Sequence

from nbdtool import deflate, zstd
from nbdtool.disk import DATA, HOLE, Disk, Extent, Span, ZeroSpan, read_bytes
from nbdtool.errors import Error, warn
from nbdtool.layers.qcow2.header import (
    ZSTD,
    Header,
    Snapshot,
    check_snapshot,
    read_header,
    read_snapshots,
)
from nbdtool.layers.qcow2.inflater import Inflater, Piece

_OFFSET = 0x00FFFFFFFFFFFE00  # the place in an L1 or L2 entry
_COMPRESSED = 1 << 62
_ZERO = 1 << 0
_WINDOW_BITS = 12  # of deflate data

_TABLES = 64 << 20  # bytes of L2 tables that are kept
_INFLATED = 64 << 20  # bytes of decompressed clusters that are kept

# What a run of the disk is: (kind, where, length)
_UNALLOCATED, _ZEROES, _STORED, _DEFLATED = range(4)


class Qcow2(Disk):
    """The disk in the qcow2 image on `disk`, over the Disk `backing` if it has a backing file.

    snapshot is the name or ID of an internal snapshot. Raises Error if the image is not readable.
    """

    def __init__(
        self,
        disk: Disk,
        *,
        backing: Disk | None = None,
        snapshot: str = "",
        allow_corrupt: bool = False,
    ) -> None:
        header = read_header(disk)
        name = disk.description or "the image"
        _refuse(header, name, backing is not None, allow_corrupt)
        if header.compression == ZSTD:
            zstd.require(name)
        if header.dirty:
            warn(f"{name}: is marked dirty, as if it were in use or its writer had crashed")
        self.size, self.description = header.size, f"{name} (qcow2)"
        l1_offset = header.l1_offset
        snapshots = read_snapshots(disk, header)
        if snapshot:
            chosen = _find_snapshot(snapshots, snapshot, name)
            check_snapshot(disk, header, chosen)
            self.size, l1_offset = chosen.size, chosen.l1_offset
            self.description = f"{name} (qcow2, snapshot {chosen.name})"
        self._disk, self._backing, self._header = disk, backing, header
        self._end = disk.size
        self._bits = header.cluster_bits
        self._cluster = 1 << header.cluster_bits
        self._mask = self._cluster - 1
        self._l2_bits = header.cluster_bits - (4 if header.extended_l2 else 3)
        self._l2_mask = (1 << self._l2_bits) - 1
        self._l1 = _table(disk, l1_offset, header.l1_needed(self.size) * 8)
        # L2 tables by their index in L1: those used lately, and those used before them.
        self._recent: dict[int, array[int]] = {}
        self._older: dict[int, array[int]] = {}
        self._tables = max(2, (_TABLES // 2) >> self._bits)
        self._lock = threading.Lock()
        # An entry with none of these bits is that of a plain cluster, if it has an offset.
        self._special = -1 if header.extended_l2 else _COMPRESSED | _ZERO | self._mask & _OFFSET
        self._last = self._end - self._cluster
        self._forwards = _prefetches(disk) or (backing is not None and _prefetches(backing))
        self._inflater = Inflater(self._inflate, max(8, _INFLATED >> self._bits))
        self._compressed = False  # whether a compressed cluster has been met

    # Reading

    def read(self, offset: int, length: int) -> list[Span]:
        inside = offset & self._mask
        if inside + length <= self._cluster:
            index = offset >> self._bits
            table = self._recent.get(index >> self._l2_bits)
            if table is not None:
                entry = table[index & self._l2_mask]
                if not entry & self._special and 0 < (entry & _OFFSET) <= self._last:
                    return self._disk.read((entry & _OFFSET) + inside, length)
        runs = list(self._runs(offset, length))
        deflated = [where for kind, where, _ in runs if kind == _DEFLATED]
        if deflated:
            self._compressed = True
            self._inflater.start(deflated[1:])
        spans: list[Span] = []
        for kind, where, size in runs:
            if kind == _STORED:
                spans += self._stored(where, size)
            elif kind == _DEFLATED:
                data, inside = self._inflater.get(where), offset & self._mask
                whole = size == self._cluster
                spans.append(data if whole else memoryview(data)[inside : inside + size])
            elif kind == _UNALLOCATED and self._backing:
                spans += self._below(offset, size)
            else:
                spans.append(ZeroSpan(size))
            offset += size
        return spans

    def _stored(self, where: int, length: int) -> list[Span]:
        """The spans of plain clusters, which read as zeroes after the end of the image."""
        here = self._stored_length(where, length)
        spans = self._disk.read(where, here)
        return spans if here == length else [*spans, ZeroSpan(length - here)]

    def _stored_length(self, where: int, length: int) -> int:
        """How many of these bytes there are: the image may end within its last cluster."""
        here = min(length, self._end - where)
        if here < length:
            self._check_place((where + length - 1) & ~self._mask, "a cluster")
        return here

    def _below(self, offset: int, length: int) -> list[Span]:
        """What the backing file has there; it may be shorter than the image."""
        assert self._backing
        here = max(0, min(length, self._backing.size - offset))
        spans = self._backing.read(offset, here) if here else []
        return spans if here == length else [*spans, ZeroSpan(length - here)]

    def extents(self, offset: int, length: int) -> Iterator[Extent]:
        for kind, where, size in self._runs(offset, length):
            if kind == _STORED:
                self._stored_length(where, size)
                yield from _extents(self._disk, where, size)
            elif kind == _DEFLATED:
                yield Extent(size, DATA)
            elif kind == _UNALLOCATED and self._backing:
                yield from _extents(self._backing, offset, size)
            else:
                yield Extent(size, HOLE)
            offset += size

    def prefetch(self, ranges: Sequence[tuple[int, int]]) -> None:
        if not self._compressed and not self._forwards:
            return
        own: list[tuple[int, int]] = []
        below: list[tuple[int, int]] = []
        deflated: list[int] = []
        for offset, length in ranges:
            try:
                for kind, where, size in self._runs(offset, length):
                    if kind == _STORED:
                        own.append((where, min(size, self._end - where)))
                    elif kind == _DEFLATED:
                        deflated.append(where)
                        own.append(self._deflated_range(where))
                    elif kind == _UNALLOCATED and self._backing:
                        below.append((offset, min(size, self._backing.size - offset)))
                    offset += size
            except OSError:
                continue  # the read will tell
        if self._forwards:
            self._disk.prefetch([(at, size) for at, size in own if size > 0])
            if self._backing:
                self._backing.prefetch([(at, size) for at, size in below if size > 0])
        if deflated:
            self._inflater.start(deflated)

    def verify_access(self) -> None:
        self._disk.verify_access()
        if self._backing:
            self._backing.verify_access()

    def close(self) -> None:
        self._inflater.close()
        if self._backing:
            self._backing.close()
        self._disk.close()

    # The mapping

    def _runs(self, offset: int, length: int) -> Iterator[tuple[int, int, int]]:
        """What [offset, offset + length) is, as (kind, where, length).

        where is the offset of stored bytes, or the L2 entry of a deflated cluster.
        """
        shift = self._bits + self._l2_bits
        end = offset + length
        while offset < end:
            index = offset >> shift
            stop = min(end, (index + 1) << shift)
            table = self._l2_table(index)
            if table is None:
                yield _UNALLOCATED, 0, stop - offset
            elif self._header.extended_l2:
                yield from self._subcluster_runs(table, offset, stop)
            else:
                yield from self._cluster_runs(table, offset, stop)
            offset = stop

    def _cluster_runs(
        self, table: array[int], offset: int, stop: int
    ) -> Iterator[tuple[int, int, int]]:
        """The runs of [offset, stop), which one L2 table maps."""
        first = offset >> self._bits & self._l2_mask
        last = (stop - 1) >> self._bits & self._l2_mask
        at = offset & ~self._mask  # where the cluster begins on the disk
        begin, kind, where, expected, step = offset, -1, 0, -1, 0
        for entry in table[first : last + 1]:
            if entry != expected:
                new, place = self._cluster_at(entry)
                if new == _STORED:
                    self._check_place(place, "a cluster")
                    place += max(0, offset - at)
                if new != kind or new == _DEFLATED or place != where + (at - begin) * (step > 0):
                    if at > begin:
                        yield kind, where, at - begin
                        begin = at
                    kind, where = new, place
                step = self._cluster if kind == _STORED else 0
            expected = entry + step if kind != _DEFLATED else -1
            at += self._cluster
        yield kind, where, stop - begin

    def _subcluster_runs(
        self, table: array[int], offset: int, stop: int
    ) -> Iterator[tuple[int, int, int]]:
        """The same for extended L2 entries; a cluster has 32 subclusters."""
        kind = where = length = 0
        for new, place, size in self._subclusters(table, offset, stop):
            follows = place == (where + length if kind == _STORED else where)
            if length and (new != kind or new == _DEFLATED or not follows):
                yield kind, where, length
                length = 0
            if not length:
                kind, where = new, place
            length += size
        yield kind, where, length

    def _subclusters(
        self, table: array[int], offset: int, stop: int
    ) -> Iterator[tuple[int, int, int]]:
        bits = self._bits - 5
        while offset < stop:
            index = offset >> self._bits & self._l2_mask
            entry, bitmap = table[2 * index], table[2 * index + 1]
            end = min(stop, (offset | self._mask) + 1)
            kind, place = self._cluster_at(entry)
            if kind == _DEFLATED:
                yield kind, place, end - offset
                offset = end
                continue
            allocated, zero = bitmap & 0xFFFFFFFF, bitmap >> 32
            if allocated & (zero if kind == _STORED else -1):
                raise _damaged(f"L2 entry {entry:#x} contradicts its subclusters {bitmap:#x}")
            while offset < end:
                inside = offset & self._mask
                n = inside >> bits
                size = min(end - offset, ((n + 1) << bits) - inside)
                if allocated >> n & 1:
                    self._check_place(place, "a cluster")
                    yield _STORED, place + inside, size
                else:
                    yield _ZEROES if zero >> n & 1 else _UNALLOCATED, 0, size
                offset += size

    def _cluster_at(self, entry: int) -> tuple[int, int]:
        """Kind and place of an L2 entry; with extended L2, of what is allocated."""
        if entry & _COMPRESSED:
            return _DEFLATED, entry
        place = entry & _OFFSET
        if place & self._mask:
            raise _damaged(f"a cluster is not where one can be, at byte {place}")
        if entry & _ZERO and not self._header.extended_l2:
            if self._header.version < 3:
                raise _damaged("a zero cluster, which version 2 doesn't have")
            return _ZEROES, 0
        return (_STORED, place) if place else (_UNALLOCATED, 0)

    def _check_place(self, place: int, what: str) -> None:
        if place >= self._end:
            text = f"{what} lies outside the image (at byte {place} of {self._end}), which is cut"
            raise _damaged(text)

    def _l2_table(self, index: int) -> array[int] | None:
        table = self._recent.get(index)
        if table is not None:
            return table
        place = self._l1[index] & _OFFSET
        if not place:
            return None
        table = self._older.get(index)
        if table is None:
            if place & self._mask:
                raise _damaged(f"an L2 table is not where one can be, at byte {place}")
            self._check_place(place + self._mask, "an L2 table")
            table = _table(self._disk, place, self._cluster)
        with self._lock:
            if len(self._recent) >= self._tables:
                self._older, self._recent = self._recent, {}
            self._recent[index] = table
        return table

    # Compressed clusters

    def _deflated_range(self, entry: int) -> tuple[int, int]:
        """Offset and length of the sectors with a compressed cluster, as far as they exist."""
        shift = 62 - (self._bits - 8)
        place = entry & (1 << shift) - 1
        sectors = (entry & _COMPRESSED - 1) >> shift
        return place, min((sectors + 1) * 512 - place % 512, self._end - place)

    def _inflate(self, entry: int) -> Piece:
        """The cluster; its data may end before its sectors do, and they after the image."""
        place, length = self._deflated_range(entry)
        self._check_place(place, "a compressed cluster")
        data = read_bytes(self._disk, place, length)
        if self._header.compression == ZSTD:
            return zstd.decompress_frame(data, self._cluster)
        try:
            return deflate.decompress(data, self._cluster, _WINDOW_BITS)
        except ValueError as exc:
            raise _damaged(f"a compressed cluster at byte {place}: {exc}") from None


def _extents(disk: Disk, offset: int, length: int) -> Iterator[Extent]:
    """The extents of a part of a disk that may end before the part does."""
    here = max(0, min(length, disk.size - offset))
    if here:
        yield from disk.extents(offset, here)
    if here < length:
        yield Extent(length - here, HOLE)


def _prefetches(disk: Disk) -> bool:
    return type(disk).prefetch is not Disk.prefetch


def _table(disk: Disk, offset: int, length: int) -> array[int]:
    """Big-endian numbers of 8 bytes."""
    table = array("Q", read_bytes(disk, offset, length))
    if sys.byteorder == "little":
        table.byteswap()
    return table


def _damaged(text: str) -> OSError:
    return OSError(errno.EIO, f"the qcow2 image is damaged: {text}")


def _refuse(header: Header, name: str, backed: bool, allow_corrupt: bool) -> None:
    """Raise Error if policy, not form, is against reading an image."""
    if header.encryption:
        raise Error(
            f"{name}: is encrypted ({header.encryption}), which is not supported; "
            "decrypt a copy with qemu-img convert"
        )
    if header.external_data:
        raise Error(
            f"{name}: its data is in another file ({header.data_file or 'which it does not name'}),"
            " and no file is opened because an image names it; merge them with qemu-img convert"
        )
    if header.backing_file and not backed:
        raise Error(
            f"{name}: has the backing file {header.backing_file}, and no file is opened because an "
            "image names it; give it yourself with --backing PATH"
        )
    if backed and not header.backing_file:
        raise Error(f"{name}: has no backing file; leave --backing out")
    if header.corrupt and not allow_corrupt:
        raise Error(
            f"{name}: is marked corrupt; repair it with qemu-img check -r all, "
            "or read it as it is with --allow-corrupt"
        )


def _find_snapshot(snapshots: list[Snapshot], wanted: str, name: str) -> Snapshot:
    """By name, else by ID."""
    named = [snapshot for snapshot in snapshots if snapshot.name == wanted]
    if len(named) > 1:
        ids = ", ".join(snapshot.id for snapshot in named[:10])
        raise Error(f"{name}: has several snapshots {wanted!r}; choose by ID: {ids}")
    for snapshot in named or snapshots:
        if wanted in (snapshot.name, snapshot.id):
            return snapshot
    known = ", ".join(f"{snapshot.name} (ID {snapshot.id})" for snapshot in snapshots[:20])
    raise Error(f"{name}: has no snapshot {wanted!r}; it has {known or 'none'}")
