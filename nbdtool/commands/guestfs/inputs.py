"""Which drives are opened, and in which format: disk=, format= and domain=.

An image's header may name other files, and so may what a guest wrote to the start of a raw disk.
What is opened is therefore known here, before anything opens it: what the command line or the
guest's XML names, and what a header names only where the user says that it is to be trusted.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

from nbdtool.disk import read_bytes
from nbdtool.disks import locks
from nbdtool.disks.file import FileDisk
from nbdtool.errors import Error, UsageError

if TYPE_CHECKING:
    from nbdtool.disks.libvirt.guests import Guest, GuestDisk
    from nbdtool.layers.qcow2.header import Header

_LONGEST = 200  # images in a chain
# How an image of those other formats begins that name files: QED, and VMDK (sparse, of ESX, text)
_NAMING = (b"QED\0", b"KDMV", b"COWD", b"#", b" ", b"vers")


class Image(NamedTuple):
    """A file that a drive's image is laid over: its absolute path and its format."""

    path: str
    format: str


class Drive(NamedTuple):
    """A drive of the appliance; the first is /dev/sda."""

    path: str  # absolute: no start of it is taken for a protocol
    format: str  # raw, qcow2, or another that the user or the guest's XML says
    told: bool  # by the user or the XML, else by the header
    live: bool = False  # somebody writes to it: what is read is no point in time
    read_only: bool = False  # it isn't to be written, or can't be
    sector: int = 512  # bytes of a logical sector
    backing: tuple[Image, ...] = ()  # the chain of its backing images, the nearest first
    data_file: str = ""  # where an image has its data, if not in itself

    def __str__(self) -> str:
        guessed = self.format != "raw" and not self.told
        text = f"{self.path} ({self.format}{' by its header' if guessed else ''}"
        others = [image.path for image in self.backing]
        if self.data_file:
            others.append(self.data_file)
        if others:
            text += f" with {', '.join(others)}"
        return text + ("; in use: not as of one point in time)" if self.live else ")")


def find_drives(
    given: Sequence[tuple[str, str]], domain: str, connect: str, *, writable: bool, allow_live: bool
) -> list[Drive]:
    """The drives for disk= (path, and format= or "") and for domain=, in this order.

    Raises Error for what can't be opened, would open files that nobody named, or is to be written
    while it is in use and not allow_live; OSError if libvirt fails.
    """
    drives = [_given(path, form, writable, allow_live) for path, form in given]
    if domain:
        drives += _of_guest(domain, connect, writable, allow_live)
    if not drives:
        raise UsageError("which disk? Give disk=PATH or domain=GUEST")
    if writable:
        _refuse_twice(drives)
    return drives


def _given(path: str, form: str, writable: bool, allow_live: bool) -> Drive:
    disk = FileDisk(path, writable=writable, allow_live=allow_live)
    told = bool(form)
    backing: list[Image] = []
    data_file = ""
    if not told:
        form = _by_header(disk)
    elif form == "qcow2":
        data_file = _data_file(_absolute(path), _header(disk))
        backing = list(_chain(disk))
    return Drive(
        path=_absolute(path),
        format=form,
        told=told,
        live=_written(disk, backing),
        read_only=not disk.writable,
        backing=tuple(backing),
        data_file=data_file,
    )


def _by_header(disk: FileDisk) -> str:
    """The format of an image of which nobody says it; Error if it isn't for us to say either."""
    from nbdtool.layers.qcow2.header import is_qcow2

    if not is_qcow2(disk):
        return "raw"
    path = disk.file.name
    choice = (
        "; put format=qcow2 before it to have that opened, or format=raw to have the image"
        " itself for the disk"
    )
    header = _header(disk, "; format=raw before it serves the image itself")
    if header.external_data:
        name = header.data_file or "which it doesn't name"
        raise Error(f"{path}: a qcow2 image that has its data in another file ({name}){choice}")
    if header.backing_file:
        raise Error(
            f"{path}: a qcow2 image that names another file, {header.backing_file}, as its backing"
            f" file{choice}"
        )
    return "qcow2"


def _header(disk: FileDisk, hint: str = "") -> Header:
    from nbdtool.layers.qcow2.header import read_header

    try:
        header = read_header(disk)
    except Error as exc:
        raise Error(f"{exc}{hint}") from None
    if header.encryption:
        raise Error(
            f"{disk.file.name}: a qcow2 image that is encrypted ({header.encryption}): format=qcow2"
            " can't read it, nor does format=raw; decrypt a copy with qemu-img convert"
        )
    return header


def _chain(disk: FileDisk, named: Sequence[Image] | None = None) -> Iterator[Image]:
    """The backing images of a qcow2 image as qemu follows its header, the nearest first.

    Where named is given, each must be what that says. Raises Error for what isn't a file.
    """
    path = _absolute(disk.file.name)
    seen = {_identity(disk)}
    while True:
        header = _header(disk)
        if len(seen) > 1 and header.external_data:
            raise Error(f"{path}: a backing image that has its data in another file")
        if not header.backing_file:
            return
        below = FileDisk(_resolve(path, header.backing_file, "backing file"), allow_live=True)
        image = Image(below.file.name, _backing_format(path, header, below))
        if named is not None:
            _check_named(path, image, named)
            named = named[1:]
        yield image
        if image.format == "raw":
            return
        path, disk = image.path, below
        if _identity(disk) in seen or len(seen) > _LONGEST:
            raise Error(f"{path}: the chain of its backing files has no end")
        seen.add(_identity(disk))


def _backing_format(path: str, header: Header, backing: FileDisk) -> str:
    """raw or qcow2, as qemu will take a backing file."""
    from nbdtool.layers.qcow2.header import is_qcow2

    form = header.backing_format
    if not form:  # qemu guesses
        if is_qcow2(backing):
            below = _header(backing)
            form = "" if below.backing_file or below.external_data else "qcow2"
        elif not read_bytes(backing, 0, min(4, backing.size)).startswith(_NAMING):
            form = "raw"
    if form not in ("raw", "qcow2"):
        raise Error(
            f"{path}: its backing file {backing.file.name} is {form or 'of a format not said'};"
            " only what is said to be raw or qcow2 is opened (qemu-img rebase -u -F FORMAT says it)"
        )
    return form


def _check_named(path: str, image: Image, named: Sequence[Image]) -> None:
    """Raise Error unless the next of those named in the guest's XML is this image."""
    if not named:
        raise Error(
            f"{path}: names the backing file {image.path}, and libvirt doesn't; put a"
            " <backingStore> into the guest's XML (virsh edit), or start the guest"
        )
    there = named[0]
    try:
        same = os.path.samefile(image.path, there.path)
    except OSError as exc:
        raise Error(f"{exc.filename}: {exc.strerror}") from None
    if not same or image.format != there.format:
        raise Error(
            f"{path}: has the backing file {image.path} ({image.format}), but the guest's XML says"
            f" {there.path} ({there.format}); qemu-img rebase -u corrects the image"
        )


def _resolve(path: str, name: str, what: str) -> str:
    """Where qemu finds a file that the image at path names; Error if it is no file's name."""
    if ":" in name.partition("/")[0]:
        raise Error(f"{path}: names {name} as its {what}, and only files are opened")
    return os.path.join(os.path.dirname(path), name)


def _data_file(path: str, header: Header) -> str:
    """Where an image has its data, "" if that is itself."""
    name = header.data_file
    if header.external_data and not name.startswith("/"):
        # qemu looks for it not beside the image, but in the directory that it runs in.
        raise Error(
            f"{path}: has its data in {name or 'a file that it does not name'}; only an absolute"
            " name is followed (qemu-img amend -o data_file=PATH sets it)"
        )
    return name if header.external_data else ""


def _of_guest(name: str, connect: str, writable: bool, allow_live: bool) -> list[Drive]:
    from nbdtool.disks.libvirt import guests, pools
    from nbdtool.disks.libvirt.link import Link

    link = Link(connect, read_only=True, reconnect=0)
    try:
        guest = guests.find(link, name)
        if not link.is_local():
            raise Error(f"{guest.name}: is on another host; copy nbdtool there and run it")
        if guest.active and writable and not allow_live:
            raise Error(
                f"{guest.name}: is {guest.state}, and writing to its disks would destroy what is on"
                " them; open them read-only (-r), or with --allow-live if you must"
            )
        # As guestfs_add_domain() has it: whatever has a medium, CD-ROMs too.
        disks = [pools.resolve(link, disk) for disk in guest.disks if disk.chain]
    finally:
        link.close()
    if not disks:
        raise Error(f"{guest.name}: has no disk")
    return [_of_disk(guest, disk, writable, allow_live or guest.active) for disk in disks]


def _of_disk(guest: Guest, disk: GuestDisk, writable: bool, allow_live: bool) -> Drive:
    top = disk.top
    where = f"{guest.name}: {disk.target}"
    for image in disk.chain:
        if image.type not in ("file", "block"):
            raise Error(f"{where}: {image} is no file of this host; serve it with nbdtool libvirt")
        if not image.plain:
            raise Error(
                f"{where}: {image} is encrypted or a slice of its file, which can't be read"
            )
    opened = FileDisk(top.path, writable=writable and not disk.read_only, allow_live=allow_live)
    backing: list[Image] = []
    if top.format == "qcow2":
        if _header(opened).external_data:
            raise Error(f"{where}: {top} has its data in another file, which the XML doesn't name")
        backing = list(_chain(opened, [Image(i.path, i.format) for i in disk.chain[1:]]))
    elif top.format != "raw" and len(disk.chain) > 1:
        raise Error(f"{where}: {top} is {top.format}, whose backing files can't be checked")
    return Drive(
        path=_absolute(top.path),
        format=top.format,
        told=True,
        live=guest.active or _written(opened, backing),
        read_only=not opened.writable,
        sector=disk.sector,
        backing=tuple(backing),
    )


def _written(disk: FileDisk, backing: Sequence[Image]) -> bool:
    """Whether somebody writes to an image or to one under it."""
    below = [FileDisk(image.path, allow_live=True) for image in backing]
    return any(locks.in_use(image.file.fd, writing=False) for image in (disk, *below))


def _refuse_twice(drives: Sequence[Drive]) -> None:
    seen: set[tuple[int, int]] = set()
    for drive in drives:
        st = os.stat(drive.path)
        if (st.st_dev, st.st_ino) in seen:
            raise Error(f"{drive.path}: given twice, and it can be written only once")
        seen.add((st.st_dev, st.st_ino))


def _identity(disk: FileDisk) -> tuple[int, int]:
    st = os.fstat(disk.file.fd)
    return st.st_dev, st.st_ino


def _absolute(path: str) -> str:
    # As libguestfs makes it, beside which relative names are looked for.
    return os.path.realpath(path)
