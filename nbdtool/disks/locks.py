"""qemu's image locks, by which a disk that a guest uses is known (qemu's block/file-posix.c).

Who has a permission holds a shared lock on the byte 100 + its bit; who doesn't let others have one
holds byte 200 + its bit. They are open file description locks (fcntl(2)).
"""

from __future__ import annotations

import fcntl
import struct

_FLOCK = struct.Struct("@hhqqi4x")
_CONSISTENT_READ, _WRITE, _RESIZE = 0, 1, 3  # BLK_PERM_* as bits
_HAS, _UNSHARED = 100, 200


def take(fd: int, *, writing: bool) -> None:
    """Say that we read, or write and let nobody else; they go with the descriptor."""
    places = [_HAS + _CONSISTENT_READ]
    if writing:
        places += [_HAS + _WRITE, _UNSHARED + _WRITE, _UNSHARED + _RESIZE]
    for place in places:
        try:
            fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _FLOCK.pack(fcntl.F_RDLCK, 0, place, 1, 0))
        except OSError:
            return  # a filesystem without locks


def in_use(fd: int, *, writing: bool) -> bool:
    """Whether somebody writes to the image, or lets nobody write if that is what we want."""
    places = [_HAS + _WRITE, *([_UNSHARED + _WRITE] if writing else [])]
    return any(_locked(fd, place) for place in places)


def _locked(fd: int, place: int) -> bool:
    try:
        query = _FLOCK.pack(fcntl.F_WRLCK, 0, place, 1, 0)
        answer = fcntl.fcntl(fd, fcntl.F_OFD_GETLK, query)
    except OSError:
        return False
    return bool(_FLOCK.unpack(answer)[0] != fcntl.F_UNLCK)
