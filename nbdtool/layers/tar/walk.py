"""The members of a tar archive, in one pass forward: over a Disk, or a stream as it comes.

Specifications: POSIX.1-2018, pax, "ustar Interchange Format" and "pax Interchange Format"; the
GNU tar manual, appendix "Tar Internals", for base-256 numbers, long names and sparse members.
Everything that an archive says is checked, and nothing of it is kept: memory is bounded by the
largest extended header that is allowed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NoReturn, Protocol

from nbdtool.disk import Disk, read_bytes
from nbdtool.errors import Error, warn
from nbdtool.layers.tar.sparse import MAX_SEGMENTS, BadMap, SparseMap, pax_segments

BLOCK = 512

# Type flags
REGULAR, OLD_REGULAR, HARD_LINK, SYMBOLIC_LINK = b"0", b"\0", b"1", b"2"
CHARACTER_DEVICE, BLOCK_DEVICE, DIRECTORY, FIFO, CONTIGUOUS = b"3", b"4", b"5", b"6", b"7"
_GNU_SPARSE, _GNU_NAME, _GNU_LINK, _GNU_DIRECTORY = b"S", b"L", b"K", b"D"
_PAX, _PAX_GLOBAL, _PAX_SUN = b"x", b"g", b"X"
_EXTENDED = (_GNU_NAME, _GNU_LINK, _PAX, _PAX_GLOBAL, _PAX_SUN)
_WITHOUT_DATA = (HARD_LINK, SYMBOLIC_LINK, CHARACTER_DEVICE, BLOCK_DEVICE, DIRECTORY, FIFO)

_MAX_EXTENDED = 4 << 20  # bytes of an extended header
_MAX_SIZE = (1 << 63) - 1
_CHUNK = 32 << 10  # bytes that are read of a disk at once


class Source(Protocol):
    """Where an archive comes from; the first byte read is that at offset 0."""

    def read(self, size: int, /) -> bytes:
        """The next `size` bytes; fewer only at the end."""

    def seek(self, offset: int, /) -> bool:
        """Go forward to `offset`; False if the end comes before it."""


class DiskSource:
    """A disk as the source of a walk."""

    def __init__(self, disk: Disk) -> None:
        self._disk = disk
        self._at = self._start = 0
        self._kept = b""  # what was read at _start

    def read(self, size: int, /) -> bytes:
        begin = self._at - self._start
        data = self._kept[begin : begin + size]
        if len(data) < size and self._at + len(data) < self._disk.size:
            length = min(max(size, _CHUNK), self._disk.size - self._at)
            self._start, self._kept = self._at, read_bytes(self._disk, self._at, length)
            data = self._kept[:size]
        self._at += len(data)
        return data

    def seek(self, offset: int, /) -> bool:
        self._at = min(offset, self._disk.size)
        if not self._start <= self._at <= self._start + len(self._kept):
            self._start, self._kept = self._at, b""
        return self._at == offset


class StreamSource:
    """A stream with read(n), which may return less than n, as the source of a walk.

    Between two members a consumer may read the content of the first one from it.
    """

    def __init__(self, stream: Readable) -> None:
        self._stream = stream
        self.position = 0

    def read(self, size: int, /) -> bytes:
        parts = []
        while size:
            part = self._stream.read(size)
            if not part:
                break
            parts.append(part)
            size -= len(part)
        data = parts[0] if len(parts) == 1 else b"".join(parts)
        self.position += len(data)
        return data

    def seek(self, offset: int, /) -> bool:
        while self.position < offset:
            if not self.read(min(_CHUNK * 8, offset - self.position)):
                return False
        return True


class Readable(Protocol):
    def read(self, size: int, /) -> bytes: ...


@dataclass(frozen=True)
class Member:
    """A member of an archive; offsets and sizes are bytes, names are as they are stored."""

    name: bytes
    type: bytes  # the type flag; DIRECTORY, REGULAR for all the ways to store those two
    link: bytes  # what a link points to
    header: int  # where its first header begins
    offset: int  # where its stored content begins
    stored: int  # the length of that
    size: int  # of the content
    sparse: SparseMap | None  # where the content is, if it isn't stored as it is
    block: bytes = field(repr=False)  # the ustar header
    pax: dict[str, bytes] = field(repr=False)  # its extended header records

    @property
    def mode(self) -> int:
        return self._number(100, 8) & 0o7777

    @property
    def uid(self) -> int:
        return self._pax_number("uid", 108)

    @property
    def gid(self) -> int:
        return self._pax_number("gid", 116)

    @property
    def mtime(self) -> int:
        """Nanoseconds since the Epoch."""
        text = self.pax.get("mtime")
        if not text:
            return self._number(136, 12) * 10**9
        whole, _, fraction = text.strip().partition(b".")
        digits = whole.lstrip(b"-")
        if not (digits + fraction).isdigit() or len(text) > 64:
            _fail(self.header, f"its time {text[:64]!r} isn't a number")
        result = int(digits or b"0") * 10**9 + int(fraction[:9].ljust(9, b"0"))
        return -result if whole.startswith(b"-") else result

    @property
    def device(self) -> tuple[int, int]:
        """The major and minor number of a device."""
        return self._number(329, 8), self._number(337, 8)

    def _number(self, start: int, length: int) -> int:
        return _number(self.block[start : start + length], self.header)

    def _pax_number(self, key: str, start: int) -> int:
        text = self.pax.get(key)
        return _decimal(text, self.header) if text else self._number(start, 8)


class _Bad(Exception):
    """What is wrong, and at which byte."""


def _fail(offset: int, text: str) -> NoReturn:
    raise _Bad(f"{text} (the header at byte {offset})")


def walk(source: Source, name: str) -> Iterator[Member]:
    """The members of the archive `name`, in their order.

    The source is at the beginning of a member's content when the member is yielded, and is moved to
    the next header after that. Raises Error for what isn't a tar archive, is cut off or contradicts
    itself.
    """
    try:
        yield from _members(source, name)
    except _Bad as bad:
        raise Error(f"{name}: not a tar archive, or a damaged one: {bad}") from None


def _members(source: Source, name: str) -> Iterator[Member]:
    shared: dict[str, bytes] = {}  # the records of global extended headers
    begin = 0
    while True:
        at, block = begin, source.read(BLOCK)
        if block and at == 0:
            _refuse_compressed(block)
        records: list[tuple[str, bytes]] = []
        long: dict[bytes, bytes] = {}
        extended = 0
        while kind := _kind(block, at):
            if kind not in _EXTENDED:
                break
            size = _size(block, at)
            extended += size
            if extended > _MAX_EXTENDED:
                _fail(at, f"extended headers of {extended} bytes are more than is allowed")
            data = source.read(-(-size // BLOCK) * BLOCK)[:size]
            if len(data) < size:
                _fail(at, "the archive is cut off in an extended header")
            if kind in (_GNU_NAME, _GNU_LINK):
                long[kind] = data.split(b"\0", 1)[0]
            elif kind == _PAX_GLOBAL:
                shared.update(_records(data, at))
                if sum(map(len, shared.values())) > _MAX_EXTENDED:
                    _fail(at, "the global extended headers are more than is allowed")
            else:
                records += _records(data, at)
            at += BLOCK + -(-size // BLOCK) * BLOCK
            block = source.read(BLOCK)
            if not block.strip(b"\0"):
                _fail(begin, "the archive is cut off after an extended header")
        if not kind:
            if not block:
                if at == 0:
                    _fail(0, "it is empty")
                warn(f"{name}: the tar archive has no end marker; it may be cut off")
            return
        member = _member(source, block, begin, at, long, shared, records)
        yield member
        end = member.offset + member.stored
        if not source.seek(end):
            _fail(member.header, f"the archive is cut off in {_shown(member.name)}")
        source.read(-end % BLOCK)
        begin = end + -end % BLOCK


def _kind(block: bytes, at: int) -> bytes:
    """The type flag of a header; b"" at the end of the archive."""
    if not block or (len(block) == BLOCK and not block.strip(b"\0")):
        return b""
    if len(block) < BLOCK:
        _fail(at, "the archive is cut off in a header")
    told = _number(block[148:156], at)
    rest = block[:148] + b" " * 8 + block[156:]
    # Some old programs summed signed bytes.
    if told != sum(rest) and told != sum(rest) - 256 * sum(byte > 127 for byte in rest):
        _fail(at, "its checksum is wrong")
    return block[156:157]


def _member(
    source: Source,
    block: bytes,
    begin: int,
    at: int,
    long: dict[bytes, bytes],
    shared: dict[str, bytes],
    records: list[tuple[str, bytes]],
) -> Member:
    pax = {**shared, **dict(records)} if shared or records else {}
    kind = block[156:157]
    name = pax.get("GNU.sparse.name") or pax.get("path") or long.get(_GNU_NAME) or _name(block)
    link = pax.get("linkpath") or long.get(_GNU_LINK) or block[157:257].split(b"\0", 1)[0]
    stored = _decimal(pax["size"], begin) if pax.get("size") else _size(block, at)
    offset = at + BLOCK
    if b"\0" in name:
        _fail(begin, f"the name {_shown(name)} has a NUL")
    if kind == _GNU_DIRECTORY:
        kind = DIRECTORY
    elif kind in _WITHOUT_DATA:
        # Some writers tell the size of what a hard link is to, or of a directory.
        if stored and kind not in (HARD_LINK, DIRECTORY):
            _fail(begin, f"{_shown(name)} can't have content, but says it has {stored} bytes")
        stored = 0
    elif kind in (OLD_REGULAR, CONTIGUOUS):
        kind = DIRECTORY if name.endswith(b"/") else REGULAR
    size, sparse = stored, None
    try:
        if kind == _GNU_SPARSE:
            kind = REGULAR
            size = _number(block[483:495], at)
            segments, length = _old_gnu_segments(source, block, at)
            offset += length
            sparse = SparseMap(segments, size, stored)
        elif kind == REGULAR and any(key.startswith("GNU.sparse.") for key in pax):
            real = pax.get("GNU.sparse.realsize", pax.get("GNU.sparse.size", b""))
            size = _decimal(real, begin)
            segments, length = pax_segments(source, records, stored)
            offset, stored = offset + length, stored - length
            sparse = SparseMap(segments, size, stored)
        elif kind == REGULAR and "SCHILY.realsize" in pax:
            raise BadMap("the way in which star stores it is not supported")
    except BadMap as bad:
        _fail(begin, f"the sparse member {_shown(name)}: {bad}")
    if max(offset + stored, size) > _MAX_SIZE:
        _fail(begin, f"{_shown(name)} has an impossible size")
    return Member(name, kind, link, begin, offset, stored, size, sparse, block, pax)


def _shown(name: bytes) -> str:
    return repr(name[:100].decode(errors="backslashreplace"))


def _name(block: bytes) -> bytes:
    name = block[:100].split(b"\0", 1)[0]
    if block[257:263] == b"ustar\0":  # GNU's magic is another, and has no prefix
        prefix = block[345:500].split(b"\0", 1)[0]
        return prefix + b"/" + name if prefix else name
    return name


def _size(block: bytes, at: int) -> int:
    size = _number(block[124:136], at)
    if not 0 <= size <= _MAX_SIZE:
        _fail(at, f"a size of {size} bytes is impossible")
    return size


def _number(text: bytes, at: int) -> int:
    """An octal or a base-256 number."""
    if text[0] & 0x80:
        if text[0] & 0x40:
            return int.from_bytes(text, "big", signed=True)
        return int.from_bytes(bytes((text[0] & 0x7F,)) + text[1:], "big")
    digits = text.split(b"\0", 1)[0].strip(b" ") or b"0"
    if digits.strip(b"01234567"):
        _fail(at, f"{text!r} isn't a number")
    return int(digits, 8)


def _decimal(text: bytes, at: int) -> int:
    if not text.isdigit() or len(text) > 19:
        _fail(at, f"{text[:64]!r} isn't a number")
    return int(text)


def _records(data: bytes, at: int) -> list[tuple[str, bytes]]:
    """The records of a pax extended header: each is "LENGTH KEY=VALUE\\n"."""
    result = []
    begin = 0
    while begin < len(data):
        space = data.find(b" ", begin, begin + 10)
        digits = data[begin : max(begin, space)]
        end = begin + (int(digits) if digits.isdigit() else 0)
        key, equals, value = data[space + 1 : end].partition(b"=")
        if not begin < space < end <= len(data) or not equals or not value.endswith(b"\n"):
            if not data[begin:].strip(b"\0"):
                break  # padding of careless writers
            _fail(at, "an extended header is malformed")
        result.append((key.decode(errors="backslashreplace"), value[:-1]))
        begin = end
    return result


def _old_gnu_segments(source: Source, block: bytes, at: int) -> tuple[list[tuple[int, int]], int]:
    """The segments of an old GNU sparse header, and the length of the blocks that continue it."""
    segments: list[tuple[int, int]] = []
    start, count, more, length = 386, 4, block[482], 0
    while True:
        for n in range(start, start + 24 * count, 24):
            if not block[n]:
                break
            segments.append((_number(block[n : n + 12], at), _number(block[n + 12 : n + 24], at)))
        if not more:
            return segments, length
        block = source.read(BLOCK)
        if len(block) < BLOCK or len(segments) > MAX_SEGMENTS:
            raise BadMap("its map is cut off, or too long")
        start, count, more, length = 0, 21, block[504], length + BLOCK


def _refuse_compressed(block: bytes) -> None:
    for magic, what in (
        (b"\x1f\x8b", "gzip"),
        (b"\xfd7zXZ\0", "xz"),
        (b"\x28\xb5\x2f\xfd", "zstd"),
        (b"BZh", "bzip2"),
    ):
        if block.startswith(magic) and block[257:262] != b"ustar":
            raise _Bad(f"it is compressed with {what}; decompress it first")
