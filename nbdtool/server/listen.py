"""Where clients connect: TCP, a Unix socket, or what systemd hands over."""

from __future__ import annotations

import errno
import os
import socket
import stat
from urllib.parse import quote

from nbdtool.errors import Error, debug, warn

_ACTIVATION_FD = 3  # SD_LISTEN_FDS_START


class Place:
    """The listening sockets, and how a client names them: by port or by path of a Unix socket."""

    def __init__(
        self, sockets: list[socket.socket], *, port: int | None = None, path: str | None = None
    ) -> None:
        self.sockets = sockets
        self.port = port
        self.path = path
        self.host = "localhost"
        self.audience = "this machine"  # who can connect
        self.made: list[str] = []  # files and then directories to remove at the end

    def uri(self, export: str = "", tls: bool = False) -> str:
        """The NBD URI (doc/uri.md) of an export."""
        scheme = "nbds" if tls else "nbd"
        name = quote(export, safe="/")
        if self.path is not None:
            return f"{scheme}+unix:///{name}?socket={quote(os.fsencode(self.path), safe='/')}"
        port = "" if self.port == 10809 else f":{self.port}"
        return f"{scheme}://{self.host}{port}/{name}".rstrip("/" if not name else "")

    def close(self) -> None:
        """Stop listening, and remove the socket that we made."""
        for sock in self.sockets:
            sock.close()
        for path in self.made:
            try:
                (os.rmdir if os.path.isdir(path) else os.unlink)(path)
            except OSError as exc:
                debug(f"{path}: not removed: {exc.strerror}")
        self.made = []


def on_tcp(address: str | None, port: int, families: list[int]) -> Place:
    """Listen on one port of an address; of loopback, in both families, if it is None.

    Port 0 picks one that is free in all families. Error if that can't be had.
    """
    wanted = _addresses(address, families)
    for attempt in range(16):
        sockets: list[socket.socket] = []
        chosen = port
        try:
            for family, host in wanted:
                sock = _bound(family, host, chosen)
                if sock is not None:
                    sockets.append(sock)
                    chosen = sock.getsockname()[1]
        except OSError as exc:
            for sock in sockets:
                sock.close()
            if port == 0 and exc.errno == errno.EADDRINUSE and attempt < 15:
                continue
            hint = "; choose another with -p, or -p 0" if exc.errno == errno.EADDRINUSE else ""
            raise Error(f"{host} port {chosen}: {exc.strerror}{hint}") from None
        break
    if not sockets:
        raise Error(f"{address or 'loopback'}: no such address on this machine")
    place = Place(sockets, port=chosen)
    hosts = [str(sock.getsockname()[0]) for sock in sockets]
    if not {"127.0.0.1", "0.0.0.0"} & set(hosts):
        host = "::1" if "::" in hosts else hosts[0]
        place.host = f"[{host}]" if ":" in host else host
    reached = [host for host in hosts if not host.startswith("127.") and host != "::1"]
    if {"0.0.0.0", "::"} & set(reached):
        place.audience = f"anyone who reaches this machine's port {chosen}"
    elif reached:
        place.audience = f"anyone who reaches {' or '.join(reached)} port {chosen}"
    return place


def _addresses(address: str | None, families: list[int]) -> list[tuple[int, str]]:
    if address is None:
        loopback: dict[int, str] = {socket.AF_INET: "127.0.0.1", socket.AF_INET6: "::1"}
        return [(family, loopback[family]) for family in families]
    if address == "*":
        anywhere: dict[int, str] = {socket.AF_INET: "0.0.0.0", socket.AF_INET6: "::"}
        return [(family, anywhere[family]) for family in families]
    try:
        found = socket.getaddrinfo(address, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as exc:
        reason = getattr(exc, "strerror", None) or exc
        raise Error(f"{address or repr(address)}: not an address to listen on: {reason}") from None
    usable = [(info[0], str(info[4][0])) for info in found if info[0] in families]
    if not usable:
        raise Error(f"{address}: has no address of the family asked for")
    return list(dict.fromkeys(usable))


def _bound(family: int, host: str, port: int) -> socket.socket | None:
    """A listening socket; None where the kernel has no such family or loopback address."""
    try:
        sock = socket.socket(family, socket.SOCK_STREAM)
    except OSError as exc:
        if exc.errno == errno.EAFNOSUPPORT:
            return None
        raise
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        sock.bind((host, port))
        sock.listen(socket.SOMAXCONN)
    except OSError as exc:
        sock.close()
        if exc.errno == errno.EADDRNOTAVAIL and host == "::1":
            return None
        raise
    return sock


def on_unix(path: str, mode: int) -> Place:
    """Listen on a Unix socket of that mode; "-" is one in a new private directory.

    A socket that nobody answers on is taken over.
    """
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    made = []
    if path == "-":
        made.append(_private_directory())
        path = os.path.join(made[0], "socket")
    path = os.path.abspath(path)
    umask = os.umask(0o777)
    try:
        try:
            sock.bind(path)
        except OSError as exc:
            if exc.errno != errno.EADDRINUSE or not _stale(path):
                raise
            os.unlink(path)
            sock.bind(path)
        sock.listen(socket.SOMAXCONN)
        os.chmod(path, mode)
    except OSError as exc:
        sock.close()
        for directory in made:
            os.rmdir(directory)
        text = exc.strerror or "the path is longer than a Unix socket's can be (107 bytes)"
        if exc.errno == errno.EADDRINUSE:
            answers = _is_socket(path)
            text = "a server answers there already" if answers else "is there, and is no socket"
        raise Error(f"{path}: {text}; choose another path with -U") from None
    finally:
        os.umask(umask)
    place = Place([sock], path=path)
    place.made = [path, *made]
    place.audience = _readers(mode)
    return place


def _private_directory() -> str:
    path = os.path.join(os.environ.get("TMPDIR") or "/tmp", f"nbdtool-{os.urandom(8).hex()}")
    try:
        os.mkdir(path, 0o700)
    except OSError as exc:
        raise Error(f"{path}: {exc.strerror}; set TMPDIR to a directory for sockets") from None
    return path


def _is_socket(path: str) -> bool:
    return stat.S_ISSOCK(os.lstat(path).st_mode)


def _stale(path: str) -> bool:
    """Whether path is a socket that nobody listens on."""
    if not _is_socket(path):
        return False
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        return probe.connect_ex(path) == errno.ECONNREFUSED


def _readers(mode: int) -> str:
    if mode & 0o002:
        return "all users of this machine"
    return "this user and group" if mode & 0o020 else "this user"


def on_activation() -> Place | None:
    """The sockets that systemd (or who acts like it) listens on for us; sd_listen_fds(3)."""
    if os.environ.get("LISTEN_PID") != str(os.getpid()):
        return None
    count = os.environ.get("LISTEN_FDS", "")
    for name in ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"):
        os.environ.pop(name, None)
    if not count.isdecimal() or not 0 < int(count) <= 1024:
        raise Error(f"LISTEN_FDS={count}: not a number of sockets")
    sockets = []
    for fd in range(_ACTIVATION_FD, _ACTIVATION_FD + int(count)):
        os.set_inheritable(fd, False)
        try:
            sock = socket.socket(fileno=fd)
            if not sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
                raise OSError(errno.EINVAL, "not a listening socket")
        except OSError as exc:
            raise Error(f"descriptor {fd} from the service manager: {exc.strerror}") from None
        sockets.append(sock)
    place = Place(sockets)
    place.audience = "whoever reaches the service manager's sockets"
    for sock in sockets:
        name = sock.getsockname()
        if sock.family == socket.AF_UNIX:
            place.path = name if isinstance(name, str) else "@" + name[1:].decode(errors="replace")
        else:
            place.port = name[1]
    if len(sockets) > 1:
        warn(f"{len(sockets)} sockets from the service manager; all are served")
    return place
