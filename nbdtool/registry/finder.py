"""Find the disk of a virtual machine in an image: the file below disk/ that a guest would get.

The convention is KubeVirt's containerDisk. Specification of whiteouts: OCI image-spec, layer.md.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Optional

from nbdtool.disk import Disk, read_bytes
from nbdtool.errors import Error, listed
from nbdtool.layers.tar.walk import DIRECTORY, HARD_LINK, REGULAR, Member, StreamSource, walk
from nbdtool.registry.decompress import CHUNK
from nbdtool.registry.digest import Stream
from nbdtool.registry.fetch import open_layer
from nbdtool.registry.manifest import Image, Source
from nbdtool.registry.spool import Spool

_FOLDER = b"disk"
_WHITEOUT, _OPAQUE = b".wh.", b".wh..wh..opq"
_MAX_ENTRIES = 10_000  # below disk/, in all layers
_SHOWN = 10

Path = tuple[bytes, ...]

# What a disk image of a format that isn't decoded begins with
_FORMATS = {
    b"KDMV": "VMDK",
    b"# Disk DescriptorFile": "VMDK",
    b"vhdxfile": "VHDX",
    b"conectix": "VHD",
    b"<<< ": "VDI",
    b"\x1f\x8b\x08": "gzip",
    b"\xfd7zXZ\0": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"BZh": "bzip2",
}


def find_disk(source: Source, image: Image, max_size: int | None) -> Disk:
    """The file in a temporary file, as it is in the image; its layers verified. Raises Error."""
    upper = _Upper()
    for number in reversed(range(len(image.layers))):
        what = f"{source.description}, layer {number}"
        scan = _Scan(what, upper, max_size)
        with open_layer(source, image, number) as layer:
            scan.run(layer)
        if len(scan.files) > 1:
            raise Error(
                f"{what}: which disk? There are {_listed(scan.files)}; choose with"
                f" layer={number} --tar-entry=NAME"
            )
        if scan.files:
            ((path, member),) = scan.files.items()
            if scan.spooled != member.header:
                # A link to a file elsewhere, or a file that became the only one later on.
                link = member.type == HARD_LINK
                place = _components(member.link) if link else path
                scan = _Scan(what, upper, max_size, only=place, before=member.header + (not link))
                with open_layer(source, image, number) as layer:
                    scan.run(layer)
            if scan.spool is None:
                raise Error(f"{what}: {_shown(path)} is a link to a file that isn't in this layer")
            return scan.spool.disk(scan.size, f"{what}, {_shown(path)}")
        upper.add(scan)
    raise Error(
        f"{source.description}: has no file below disk/; --list shows what there is, and layer=N"
        " --tar-entry=NAME serves it"
    )


def refuse_other_formats(disk: Disk) -> None:
    """Raise Error if it looks like an image of a format that isn't decoded here."""
    first = read_bytes(disk, 0, min(32, disk.size))
    for magic, name in _FORMATS.items():
        if first.startswith(magic):
            raise Error(f"{disk.description}: its format is {name}; --raw serves it as it is")


@dataclass
class _Upper:
    """What the layers seen so far, the upper ones, hide of those below."""

    hidden: set[Path] = field(default_factory=set)  # and all below these
    replaced: set[Path] = field(default_factory=set)

    def add(self, scan: _Scan) -> None:
        self.hidden |= scan.hidden
        self.replaced |= scan.replaced
        if len(self.hidden) + len(self.replaced) > _MAX_ENTRIES:
            raise Error(f"{scan.what}: too many entries below disk/")

    def hides(self, path: Path) -> bool:
        return path in self.replaced or any(path[:n] in self.hidden for n in range(len(path) + 1))


@dataclass
class _Scan:
    """One pass over a layer, which spools the first file below disk/, or the last one at `only`."""

    what: str
    upper: _Upper
    max_size: Optional[int]
    only: Optional[Path] = None
    before: int = 0  # only what begins before this byte counts
    files: dict[Path, Member] = field(default_factory=dict)
    hidden: set[Path] = field(default_factory=set)
    replaced: set[Path] = field(default_factory=set)
    spool: Optional[Spool] = None
    spooled: int = -1  # the header of the file in the spool
    size: int = 0

    def run(self, layer: Stream) -> None:
        source = StreamSource(layer)
        place: Optional[Path] = None  # of what is in the spool
        for member in walk(source, self.what):
            path = _components(member.name)
            if self.only is not None:
                wanted = path == self.only and member.header < self.before
            else:
                wanted = self._see(path, member) and place in (None, path)
            if wanted and member.type == REGULAR:
                place = path
                self._keep(source, member)

    def _see(self, path: Path, member: Member) -> bool:
        """Note what is at the path; whether it is a file that may be the disk."""
        name = path[-1] if path else b""
        if name.startswith(_WHITEOUT):
            if len(path) == 1 or path[0] == _FOLDER:
                gone = path[:-1] if name == _OPAQUE else (*path[:-1], name[len(_WHITEOUT) :])
                self.hidden.add(gone)
            return False
        if path[:1] != (_FOLDER,) or b".." in path:
            return False
        (self.replaced if member.type == DIRECTORY else self.hidden).add(path)
        if len(self.replaced) + len(self.hidden) > _MAX_ENTRIES:
            raise Error(f"{self.what}: too many entries below disk/")
        if member.type != DIRECTORY:
            for other in [other for other in self.files if other[: len(path)] == path]:
                del self.files[other]
        if member.type not in (REGULAR, HARD_LINK) or len(path) < 2 or self.upper.hides(path):
            return False
        self.files[path] = member
        return True

    def _keep(self, source: StreamSource, member: Member) -> None:
        if self.spool is None:
            self.spool = Spool(self.what, self.max_size)
        self.spool.clear()
        self.spool.expect(max(member.stored, member.size if self.max_size is not None else 0))
        segments = [(0, member.stored)]
        if member.sparse:
            segments = list(zip(member.sparse.starts, member.sparse.lengths))
        for start, length in segments:
            end = start + length
            while start < end:
                data = source.read(min(CHUNK, end - start))
                if not data:
                    return  # cut off: the walk tells
                self.spool.write(start, data)
                start += len(data)
        self.spooled, self.size = member.header, member.size


def _components(name: bytes) -> Path:
    return tuple(part for part in name.split(b"/") if part not in (b"", b"."))


def _shown(path: Path) -> str:
    return os.fsdecode(b"/".join(path))


def _listed(paths: dict[Path, Member]) -> str:
    return listed(sorted(map(_shown, paths)), _SHOWN)
