"""Files of an ext2, ext3 or ext4 filesystem, found and mapped without the kernel.

What is answered is what the kernel would answer: where that isn't sure, there is Uncertain and the
reason. Nothing is written, no journal replayed. Source: the Linux kernel,
Documentation/filesystems/ext4/ (directory, journal), and the limits of its path look-up.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterator
from itertools import islice
from typing import NamedTuple, Optional, Union

from nbdtool.disk import Disk
from nbdtool.errors import Error
from nbdtool.ext import structures as s
from nbdtool.ext.blocks import read_runs
from nbdtool.ext.checksum import crc32c
from nbdtool.ext.volume import DIRECTORY, KINDS, REGULAR, SYMLINK, Inode, Volume, overlapping

_MAX_PATH = 4096
_MAX_NAME = 255
_MAX_SYMLINKS = 40
_MAX_DIRECTORY = 64 << 20  # bytes
_CHUNK = 1 << 20  # bytes of a directory read at a time
_LISTED = 20  # names that an error shows
_FAST_SYMLINK = 60  # bytes that i_block holds


class _Place(NamedTuple):
    """What is on the way, and its path without symbolic links."""

    inode: Inode
    path: bytes


class Filesystem:
    """The filesystem that starts where `disk` does, clean and unmounted.

    Raises Uncertain if it is none, or not one that can be read without the kernel: in use, with
    features that aren't known, damaged.
    """

    def __init__(self, disk: Disk) -> None:
        self._volume = Volume(disk)
        self._journal: list[tuple[int, int]] = []  # where it is: (first, last + 1) in blocks
        if self._volume.superblock.s_feature_compat & s.HAS_JOURNAL:
            self._check_journal()

    def find(
        self, path: Union[bytes, str], covered: Collection[bytes] = (), *, mounted: bool = False
    ) -> int:
        """The number of the regular file at `path`, from the root; symbolic links are followed.

        covered: directories, such as /a/b, that other filesystems are mounted on; mounted: this
        one is mounted on a directory itself. A way that leads into another filesystem is a doubt.
        Raises Error if there is no such file, and Uncertain.
        """
        volume = self._volume
        volume.begin()
        path = os.fsencode(path) or b"/"
        if len(path) >= _MAX_PATH:
            raise self._error(path, "too long a path")
        root = _Place(volume.inode(s.ROOT), b"/")
        way = [root]
        names = path.split(b"/")[::-1]
        symlinks = 0
        while names:
            name, here, leaves = names.pop(), way[-1], False
            if here.inode.kind != DIRECTORY:
                raise self._error(here.path, f"{KINDS[here.inode.kind]}, not a directory")
            if name == b"..":
                leaves = mounted and len(way) == 1
                way = way[:-1] or [root]
            elif name not in (b"", b"."):
                place = self._enter(here, name)
                if place.inode.kind != SYMLINK:
                    way, leaves = [*way, place], place.path in covered
                else:
                    symlinks += 1
                    if symlinks > _MAX_SYMLINKS:
                        raise self._error(path, "too many symbolic links")
                    target = self._target(place.inode)
                    if target.startswith(b"/"):
                        way, leaves = [root], mounted
                    names += target.split(b"/")[::-1]
            if leaves:
                raise volume.doubt(f"{os.fsdecode(path)} leads into another filesystem")
        found = way[-1].inode
        if found.kind != REGULAR:
            raise self._error(path, f"{KINDS[found.kind]}, not a regular file")
        return found.number

    def map(self, number: int) -> tuple[int, list[tuple[int, Optional[int]]]]:
        """The size of an inode's content, and its pieces: (length, offset on the disk), in bytes.

        The offset is None where there are zeroes: holes, what is unwritten, and what is behind the
        last block. Raises Uncertain.
        """
        volume = self._volume
        volume.begin()
        inode = volume.inode(number)
        size, block_size = inode.size, volume.block_size
        pieces: list[tuple[int, Optional[int]]] = []
        at = 0
        for first, count, start in read_runs(volume, inode, self._journal):
            begin, end = first * block_size, min((first + count) * block_size, size)
            if begin >= size:
                break
            if begin > at:
                pieces.append((begin - at, None))
            pieces.append((end - begin, None if start is None else start * block_size))
            at = end
        if at < size:
            pieces.append((size - at, None))
        return size, pieces

    def _error(self, path: bytes, what: str) -> Error:
        name = self._volume.disk.description or "the disk"
        return Error(f"{name}: {os.fsdecode(path)}: {what}")

    def _check_journal(self) -> None:
        """That it is empty; what it holds would be newer than the filesystem."""
        volume = self._volume
        number = volume.superblock.s_journal_inum
        if not number or volume.superblock.s_journal_dev:
            raise volume.doubt("the filesystem has its journal on another device")
        if number != s.JOURNAL:
            raise volume.damage(f"its journal is said to be inode {number}")
        inode = volume.inode(number, s.JOURNAL)
        runs = read_runs(volume, inode)
        self._journal = sorted((start, start + n) for _, n, start in runs if start is not None)
        if inode.kind != REGULAR or not runs or runs[0].first or runs[0].start is None:
            raise volume.damage("it has no journal")
        if overlapping(self._journal):
            raise volume.damage("its journal overlaps itself")
        journal = s.JOURNAL_SUPERBLOCK.unpack(volume.read(runs[0].start))
        if (
            journal.h_magic != s.JOURNAL_MAGIC
            or journal.h_blocktype not in (s.JOURNAL_SUPERBLOCK_V1, s.JOURNAL_SUPERBLOCK_V2)
            or journal.s_blocksize != volume.block_size
            or not 0 < journal.s_first < journal.s_maxlen <= inode.size // volume.block_size
            or journal.s_errno
        ):
            raise volume.damage("the superblock of its journal is wrong")
        if journal.s_start:
            raise volume.doubt("the filesystem's journal isn't empty, and not to be replayed")

    # Directories

    def _enter(self, place: _Place, name: bytes) -> _Place:
        """What a directory has under a name; Error if there is nothing."""
        path = place.path.rstrip(b"/") + b"/" + name
        number = self._look_up(place, name)
        if number is None:
            raise self._error(path, f"no such file; {self._listing(place)}")
        return _Place(self._volume.inode(number), path)

    def _look_up(self, place: _Place, name: bytes) -> Optional[int]:
        """The inode number of a name in a directory, None if it isn't there."""
        volume, directory = self._volume, place.inode
        if len(name) > _MAX_NAME:
            raise self._error(place.path, f"no name has {len(name)} bytes")
        found = None
        # inode, rec_len, name_len, file_type: blocks that have no such bytes have no such entry
        likely = re.compile(re.escape(bytes([len(name)])) + b"." + re.escape(name), re.DOTALL)
        for block in self._directory_blocks(directory):
            if not likely.search(block):
                continue
            entries = [inode for inode, called in self._entries(directory, block) if called == name]
            if len(entries) > 1 or (entries and found):
                raise volume.damage(f"a directory has {os.fsdecode(name)} several times")
            if entries:
                self._verify_directory(directory, block)
                found = entries[0]
        return found

    def _directory_blocks(self, directory: Inode) -> Iterator[bytes]:
        volume, size = self._volume, self._volume.block_size
        if directory.size > _MAX_DIRECTORY:
            raise volume.doubt(f"a directory of {directory.size} bytes is too long to be read here")
        if directory.size % size or not directory.size:
            raise volume.damage(f"a directory has {directory.size} bytes")
        end = directory.size // size
        for first, count, start in read_runs(volume, directory, self._journal):
            if start is None or first + count > end:
                raise volume.damage("a directory has blocks behind its end, or unwritten ones")
            step = _CHUNK // size
            for skip in range(0, count, step):
                chunk = volume.read(start + skip, min(step, count - skip))
                for at in range(0, len(chunk), size):
                    yield chunk[at : at + size]

    def _entries(self, directory: Inode, block: bytes) -> Iterator[tuple[int, bytes]]:
        """(inode, name) of a directory block, without the unused entries."""
        at, end = 0, len(block)
        most = self._volume.superblock.s_inodes_count
        while at < end:
            inode, length, name_length, _ = s.DIRECTORY_ENTRY.unpack_from(block, at)
            if end == 1 << 16:  # which 16 bits can't hold
                length = end if length in (0, end - 1) else length & ~3 | (length & 3) << 16
            after = end - at - length
            if (
                length < 12
                or length % 4
                or length < 8 + name_length
                or after < 0
                or 0 < after < 12
                or inode > most
            ):
                raise self._volume.damage(f"directory {directory.number} has a wrong entry")
            if inode:
                yield inode, block[at + 8 : at + 8 + name_length]
            at += length

    def _verify_directory(self, directory: Inode, block: bytes) -> None:
        """The checksum in the tail of a directory block that has entries."""
        if not self._volume.has_checksums:
            return
        tail = s.DIRECTORY_TAIL.unpack(block[-s.DIRECTORY_TAIL.size :])
        size = s.DIRECTORY_TAIL.size
        if (
            (tail.det_reserved_zero1, tail.det_rec_len) != (0, size)
            or (tail.det_reserved_zero2, tail.det_reserved_ft) != (0, s.DIRECTORY_TAIL_TYPE)
            or crc32c(memoryview(block)[:-size], directory.seed) != tail.det_checksum
        ):
            raise self._volume.damage(f"directory {directory.number} has a wrong checksum")

    def _listing(self, place: _Place) -> str:
        """What a directory has, for an error."""
        entries = (
            os.fsdecode(name)
            for block in self._directory_blocks(place.inode)
            for _, name in self._entries(place.inode, block)
            if name not in (b".", b"..")
        )
        shown = list(islice(entries, _LISTED + 1))
        names = ", ".join(sorted(shown[:_LISTED])) or "nothing"
        more = " and more" if len(shown) > _LISTED else ""
        return f"{os.fsdecode(place.path)} has {names}{more}"

    def _target(self, link: Inode) -> bytes:
        """What a symbolic link says."""
        volume = self._volume
        attributes = volume.block_size if link.has_xattr_block else 0
        if link.allocated == attributes:  # the target is in the inode
            target = link.block[: link.size]
            fits = link.size < _FAST_SYMLINK
        else:
            runs = read_runs(volume, link, self._journal)
            whole = runs[:1] and runs[0][:1] == (0,) and runs[0].start is not None
            if not whole:
                raise volume.damage(f"symbolic link {link.number} has no target")
            target = volume.read(runs[0].start or 0)[: link.size]
            fits = link.size < min(volume.block_size, _MAX_PATH)
        if not target or not fits or b"\0" in target:
            raise volume.damage(f"symbolic link {link.number} has a wrong target")
        return target
