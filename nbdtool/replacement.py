"""A regular file that appears, or takes the place of an old one, only when it is complete."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Iterator


@contextlib.contextmanager
def closing(fd: int) -> Iterator[int]:
    """Close a descriptor at the end."""
    try:
        yield fd
    finally:
        os.close(fd)


@contextlib.contextmanager
def replacement(path: str) -> Iterator[int]:
    """A descriptor of a new, empty file, which is put at `path` if nothing is raised.

    path is absolute and free of symbolic links; The owner and the mode of an old file are kept;
    OSError if they can't be, or if we couldn't write to it.
    """
    folder, name = os.path.split(path)
    temporary = f".{name[:48]}.{os.urandom(6).hex()}.tmp"
    with closing(os.open(folder, os.O_RDONLY | os.O_DIRECTORY)) as directory:
        try:
            old = _old_file(path)
            mode = 0o600 if old else 0o666
            with closing(_new_file(folder, temporary, directory, mode)) as fd:
                if old:
                    _take_after(old, fd)
                yield fd
                _publish(fd, directory, temporary, name)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(temporary, dir_fd=directory)
            raise
        with contextlib.suppress(OSError):  # not every filesystem can
            os.fsync(directory)


def _new_file(folder: str, temporary: str, directory: int, mode: int) -> int:
    """Open an unnamed file, or a named one where an unnamed one can't be had or linked."""
    if os.path.exists("/proc/self/fd"):
        try:
            return os.open(folder, os.O_TMPFILE | os.O_RDWR, mode)
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL, errno.ENOENT):
                raise
    return os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_RDWR, mode, dir_fd=directory)


def _old_file(path: str) -> os.stat_result | None:
    """The file that will be replaced, if there is one; OSError if we couldn't write to it."""
    try:
        old = os.lstat(path)
    except FileNotFoundError:
        return None
    os.close(os.open(path, os.O_WRONLY | os.O_NOFOLLOW | os.O_NONBLOCK))
    return old


def _take_after(old: os.stat_result, fd: int) -> None:
    """Give a new file the owner and the mode of the old one."""
    new = os.fstat(fd)
    if (old.st_uid, old.st_gid) != (new.st_uid, new.st_gid):
        try:
            os.fchown(fd, old.st_uid, old.st_gid)
        except PermissionError:
            text = "it belongs to somebody else, which can't be kept: remove it first"
            raise PermissionError(errno.EPERM, text) from None
    os.fchmod(fd, stat.S_IMODE(old.st_mode))


def _publish(fd: int, directory: int, temporary: str, name: str) -> None:
    """Put a complete file in its place.

    linkat can't replace a file: over an old one, an unnamed file gets a name for a moment.
    """
    if not os.fstat(fd).st_nlink:
        try:
            _link(fd, directory, name)
            return
        except FileExistsError:
            _link(fd, directory, temporary)
    os.rename(temporary, name, src_dir_fd=directory, dst_dir_fd=directory)


def _link(fd: int, directory: int, name: str) -> None:
    # With src_dir_fd Python calls linkat, and that with AT_SYMLINK_FOLLOW.
    os.link(f"/proc/self/fd/{fd}", name, src_dir_fd=directory, dst_dir_fd=directory)
