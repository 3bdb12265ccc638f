"""What the server's process does beside serving: background, privileges, pid file, readiness."""

from __future__ import annotations

import grp
import os
import pwd
import signal
import socket
import stat
import sys
from collections.abc import Iterable
from typing import Callable

from nbdtool.errors import Error

_PR_SET_PDEATHSIG = 1


def fork_to_background() -> Callable[[], None]:
    """Return in the child only; what it returns tells the parent that clients can connect.

    The parent exits 0 then, or with the child's status if the child ends before.
    """
    reading, writing = os.pipe()
    child = os.fork()
    if child:
        os.close(writing)
        if os.read(reading, 1):
            os._exit(0)
        _, status = os.waitpid(child, 0)
        os._exit(os.WEXITSTATUS(status) if os.WIFEXITED(status) else 128 + os.WTERMSIG(status))
    os.close(reading)
    os.setsid()

    def ready() -> None:
        os.chdir("/")
        null = os.open(os.devnull, os.O_RDWR)
        for fd in (0, 1, *([2] if os.isatty(2) or not _is_file(2) else [])):
            os.dup2(null, fd)
        os.close(null)
        os.write(writing, b"1")
        os.close(writing)

    return ready


def _is_file(fd: int) -> bool:
    """Whether messages still go somewhere when the terminal is gone."""
    return stat.S_ISREG(os.fstat(fd).st_mode)


def log_to(target: str) -> None:
    """Send messages to a file from here on; Error if it can't be opened."""
    if target == "stderr":
        return
    try:
        fd = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    except OSError as exc:
        raise Error(f"{target}: {exc.strerror}; give --log another file") from None
    sys.stderr.flush()
    os.dup2(fd, 2)
    os.close(fd)


def exit_with_parent() -> None:
    """Have the kernel send us SIGTERM when our parent ends (prctl(2))."""
    import ctypes  # slow to load

    parent = os.getppid()
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0):
        raise Error("--exit-with-parent: " + os.strerror(ctypes.get_errno()))
    if os.getppid() != parent:
        raise Error("--exit-with-parent: the parent has ended already")


class Privileges:
    """The user and group to become, looked up at the start; Error if there is none such."""

    def __init__(self, user: str | None, group: str | None) -> None:
        self.uid: int | None = None
        self.gid: int | None = None
        self._groups: list[int] = []
        if user is not None or group is not None:
            # What is imported later otherwise: they may be unable to read it.
            import subprocess  # noqa: F401
            import traceback  # noqa: F401
        if user is not None:
            try:
                entry = pwd.getpwuid(_number(user)) if user.isdecimal() else pwd.getpwnam(user)
                self.uid, self.gid = entry.pw_uid, entry.pw_gid
                self._groups = os.getgrouplist(entry.pw_name, entry.pw_gid)
            except KeyError:
                if not user.isdecimal():
                    raise Error(f"{user}: no such user; give -u another") from None
                if group is None:
                    raise Error(f"{user}: no such user, whose group is unknown; add -g") from None
                self.uid = _number(user)
        if group is not None:
            try:
                self.gid = _number(group) if group.isdecimal() else grp.getgrnam(group).gr_gid
            except KeyError:
                raise Error(f"{group}: no such group; give -g another") from None

    def give(self, paths: Iterable[str]) -> None:
        """Make them the owners of what is to be removed at the end; Error if we may not."""
        if self.uid is not None:
            try:
                for path in paths:
                    os.chown(path, self.uid, -1 if self.gid is None else self.gid)
            except OSError as exc:
                raise _denied(exc) from None

    def drop(self) -> None:
        """Become them for good; Error if we may not."""
        try:
            if self.gid is not None:
                os.setgroups(self._groups or [self.gid])
                os.setgid(self.gid)
            if self.uid is not None:
                os.setuid(self.uid)
        except OSError as exc:
            raise _denied(exc) from None


def _number(text: str) -> int:
    number = int(text)
    if number >= 0xFFFFFFFF:  # -1 stands for none
        raise Error(f"{text}: too large for a user or group ID; give -u or -g another")
    return number


def _denied(exc: OSError) -> Error:
    return Error(f"-u/-g: {exc.strerror}; start as root to change the user")


def check_pid_file(path: str) -> None:
    """Error if a pid file can't be written there: better known before a source is opened."""
    folder = os.path.dirname(os.path.abspath(path))
    if not os.access(path if os.path.exists(path) else folder, os.W_OK) or os.path.isdir(path):
        raise Error(f"{path}: can't be written; give -P another file")


def write_pid_file(path: str) -> None:
    """Say who we are, to those who wait for it; the file stays, as nbdkit's does."""
    target = path if os.path.lexists(path) else f"{path}.{os.getpid()}"
    try:
        with open(target, "w", encoding="ascii") as file:
            file.write(f"{os.getpid()}\n")
        if target != path:  # a new file has its content from the start
            os.rename(target, path)
    except OSError as exc:
        raise Error(f"{path}: {exc.strerror}; give -P another file") from None


def notify(state: str) -> None:
    """Tell the service manager, if there is one (sd_notify(3))."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if address[:1] not in ("/", "@"):
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
        try:
            sock.sendto(state.encode(), "\0" + address[1:] if address[0] == "@" else address)
        except OSError:
            pass  # its loss is not ours
