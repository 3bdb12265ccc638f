"""Method backup: a running guest's disks at one point in time, by virDomainBackupBegin (pull).

qemu serves them on an NBD socket, and keeps what the guest overwrites meanwhile in scratch files.
Specification: formatbackup.html of libvirt.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import tempfile
import threading
import time
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from nbdtool import temporary
from nbdtool.disk import Extent, Span
from nbdtool.disks.libvirt.guests import Guest, GuestDisk, Watch
from nbdtool.disks.libvirt.link import Failure, Link, Lost, module
from nbdtool.disks.nbd import NbdDisk
from nbdtool.disks.nbd.uri import Address
from nbdtool.errors import Error, debug, warn
from nbdtool.progress import human

_LOW = 0.05  # of the scratch filesystem: with less free, the guest could stop on a full one
_EVERY = 0.5  # seconds between two looks at it
_PATIENCE = 10.0  # seconds that the end of a backup may take
_SOCKET = "nbd"


@dataclass(frozen=True)
class Scratch:
    """Where what the guest overwrites is kept meanwhile."""

    directory: str = ""  # $TMPDIR or /var/tmp
    force: bool = False  # although it may not suffice
    quiesce: bool = False  # freeze the guest's filesystems while the backup begins


class Job:
    """A backup of some disks of a guest, which lasts until each of its disks is closed.

    Raises Error if it can't begin; nothing of it remains then.
    """

    def __init__(self, link: Link, guest: Guest, disks: list[GuestDisk], scratch: Scratch) -> None:
        if not guest.active:
            raise Error(f"{guest.name}: is {guest.state}: only a running guest has backups")
        self.failure = ""  # why the backup was ended
        self._link, self._guest = link, guest
        self._watch = Watch(link, guest, disks[0])
        self._left = len(disks)
        self._began = False
        self._ending = threading.Event()
        self._lock = threading.Lock()
        place = scratch.directory or os.environ.get("TMPDIR") or "/var/tmp"
        self._check_space(place, disks, scratch.force)
        try:
            self._folder = tempfile.mkdtemp(prefix="nbdtool-backup-", dir=place)
        except OSError as exc:
            raise Error(f"{place}: {exc.strerror}; see --scratch-dir") from None
        try:
            if guest.owner is not None and os.geteuid() == 0:
                os.chown(self._folder, *guest.owner)
            self._begin(_xml(self._folder, guest, disks), scratch.quiesce)
            temporary.paths.update((self._folder, os.path.join(self._folder, _SOCKET)))
            self.moment = time.strftime("%H:%M:%S")
            self.disks = {disk.target: BackupDisk(self, guest, disk.target) for disk in disks}
        except BaseException:
            self._end()
            raise
        self._guard = threading.Thread(target=self._watch_space, daemon=True)
        self._guard.start()

    def address(self, target: str) -> Address:
        return Address(export=target, path=os.path.join(self._folder, _SOCKET))

    def _check_space(self, place: str, disks: list[GuestDisk], force: bool) -> None:
        def capacity(connection: Any) -> int:
            domain = self._domain(connection)
            return sum(int(domain.blockInfo(disk.target)[0]) for disk in disks)

        needed, free = self._link.call(capacity), _free(place)[0]
        if free >= needed:
            return
        text = (
            f"{place}: has {human(free)} free, and a guest that overwrites all of its disk while it"
            f" is read needs {human(needed)}"
        )
        if not force:
            raise Error(f"{text}; choose another --scratch-dir, or take the risk: --force-scratch")
        warn(text)

    def _begin(self, text: str, quiesce: bool) -> None:
        def begin(connection: Any) -> None:
            domain = self._domain(connection)
            running = _backup_of(domain)
            if self._began and self._is_ours(running):
                return  # the connection was lost only after it had begun
            if running:  # libvirt would wait for the end of that one
                name = self._guest.name
                raise Failure(f"there is another backup of it (virsh backup-dumpxml {name}); if it"
                              f" was left behind, end it: virsh domjobabort {name}", 0)  # fmt: skip
            self._began = True  # or may have
            domain.backupBegin(text, None)

        try:
            with self._frozen() if quiesce else contextlib.nullcontext():
                self._link.call(begin)
        except Failure as exc:
            hint = ""
            if "ermission denied" in str(exc.strerror):
                hint = "; choose a --scratch-dir that the guest's qemu may write to"
            raise Error(f"{self._guest.name}: no backup: {exc.strerror}{hint}") from None

    @contextlib.contextmanager
    def _frozen(self) -> Iterator[None]:
        """The guest's filesystems are frozen meanwhile; raises Failure if they can't be."""
        thaw = True  # whatever else fails
        try:
            try:
                self._link.call(lambda connection: self._domain(connection).fsFreeze())
            except Failure as exc:
                # Without an answer they may be frozen. Else they aren't, or another froze them.
                thaw = isinstance(exc, Lost) or exc.number == module().VIR_ERR_AGENT_UNRESPONSIVE
                raise
            yield
        finally:
            if thaw:
                try:
                    self._link.call(lambda connection: self._domain(connection).fsThaw())
                except Failure as exc:
                    warn(
                        f"{self._guest.name}: its filesystems may still be frozen: {exc.strerror};"
                        f" thaw them: virsh domfsthaw {self._guest.name}"
                    )

    def _is_ours(self, backup: str) -> bool:
        return os.path.join(self._folder, _SOCKET) in backup

    def _domain(self, connection: Any) -> Any:
        return connection.lookupByUUIDString(self._guest.uuid)

    def _watch_space(self) -> None:
        while not self._ending.wait(_EVERY):
            try:
                free, total = _free(self._folder)
            except OSError:
                return
            if free < _LOW * total:
                self.failure = (
                    f"{self._guest.name}: the backup was ended: {os.path.dirname(self._folder)} has"
                    f" only {human(free)} free for what the guest overwrites"
                )
                warn(self.failure)
                self._end()
                return

    def explain(self, exc: OSError) -> OSError:
        """What a read failed for, if more is known of it."""
        if not self.failure and not self._ending.is_set():
            try:
                self._watch.check()
            except OSError as more:
                self.failure = more.strerror or ""
        return OSError(errno.EIO, self.failure) if self.failure else exc

    def release(self) -> None:
        """One of the disks is closed."""
        with self._lock:
            self._left -= 1
            last = self._left == 0
        if last:
            self._end()
            self._link.close()

    def _end(self) -> None:
        """Abort the job, if it is still ours, and remove what it had on the disk."""
        self._ending.set()
        if self._began:
            self._began = False
            try:
                self._link.call(self._abort)
            except OSError as exc:
                if exc.errno is not None and not self.failure:
                    warn(f"{self._guest.name}: the backup could not be ended: {exc.strerror};"
                         " look with virsh domjobinfo")  # fmt: skip
        temporary.paths.difference_update((self._folder, os.path.join(self._folder, _SOCKET)))
        shutil.rmtree(self._folder, ignore_errors=True)
        if os.path.exists(self._folder):
            warn(f"{self._folder}: could not be removed")

    def _abort(self, connection: Any) -> None:
        libvirt = module()
        try:
            domain = self._domain(connection)
            if self._is_ours(_backup_of(domain)):
                domain.abortJob()
                deadline = time.monotonic() + _PATIENCE
                while _backup_of(domain) and time.monotonic() < deadline:
                    time.sleep(0.02)
        except libvirt.libvirtError as exc:
            # it has no such job any more, or there is no such guest
            if exc.get_error_code() not in (
                libvirt.VIR_ERR_NO_DOMAIN,
                libvirt.VIR_ERR_OPERATION_INVALID,
            ):
                raise
            debug(f"the backup has ended already: {exc}")


def _backup_of(domain: Any) -> str:
    """The XML of the backup that is under way; "" if there is none."""
    libvirt = module()
    try:
        text: str = domain.backupGetXMLDesc(0)
        return text
    except libvirt.libvirtError as exc:
        if exc.get_error_code() in (
            libvirt.VIR_ERR_NO_DOMAIN_BACKUP,
            libvirt.VIR_ERR_OPERATION_INVALID,  # the guest doesn't run
        ):
            return ""
        raise


class BackupDisk(NbdDisk):
    """One disk of a Job, by qemu's NBD server."""

    def __init__(self, job: Job, guest: Guest, target: str) -> None:
        super().__init__(job.address(target), reconnect=0)
        self.description = f"{guest.name} {target} by method backup, as it was at {job.moment}"
        self._job = job

    def read(self, offset: int, length: int) -> list[Span]:
        try:
            return super().read(offset, length)
        except OSError as exc:
            raise self._job.explain(exc) from None

    def extents(self, offset: int, length: int) -> Iterator[Extent]:
        try:
            yield from super().extents(offset, length)
        except OSError as exc:
            raise self._job.explain(exc) from None

    def close(self) -> None:
        if not self._closing.is_set():
            super().close()
            self._job.release()


def _xml(folder: str, guest: Guest, disks: list[GuestDisk]) -> str:
    root = ET.Element("domainbackup", mode="pull")
    ET.SubElement(root, "server", transport="unix", socket=os.path.join(folder, _SOCKET))
    parent = ET.SubElement(root, "disks")
    wanted = {disk.target for disk in disks}
    for each in guest.disks:
        if each.target not in wanted:
            ET.SubElement(parent, "disk", name=each.target, backup="no")
            continue
        attributes = {"backup": "yes", "type": "file", "exportname": each.target}
        node = ET.SubElement(parent, "disk", attributes, name=each.target)
        ET.SubElement(node, "scratch", file=os.path.join(folder, f"{each.target}.scratch"))
    return ET.tostring(root, encoding="unicode")


def _free(path: str) -> tuple[int, int]:
    """Bytes free and in all, on the filesystem of a path; raises OSError."""
    try:
        stat = os.statvfs(path)
    except OSError as exc:
        raise Error(f"{path}: {exc.strerror}; see --scratch-dir") from None
    return stat.f_bavail * stat.f_frsize, stat.f_blocks * stat.f_frsize
