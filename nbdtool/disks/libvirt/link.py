"""A connection to libvirt that is made again when it is lost."""

from __future__ import annotations

import errno
import importlib
import os
import socket
import threading
import time
from typing import Any, Callable, Optional, TypeVar
from urllib.parse import urlsplit

from nbdtool.disk import Gone
from nbdtool.errors import Error, debug

Result = TypeVar("Result")

_PAUSES = (0.1, 0.2, 0.5, 1.0, 2.0)  # seconds between attempts to connect
_KEEPALIVE = (5, 3)  # seconds, and how many times, until a silent link is taken for dead
_LEAVING = 1.0  # seconds for a connection to close
_INTERNAL_ERROR, _SYSTEM_ERROR, _NO_CONNECT, _RPC = 1, 38, 5, 39  # virErrorNumber
_FROM_RPC = 7  # virErrorDomain

_events = threading.Lock()  # held for good once libvirt's event loop runs


class Failure(OSError):
    """What libvirt says has failed; number is one of virErrorNumber."""

    def __init__(self, message: str, number: int) -> None:
        super().__init__(errno.EIO, message)
        self.number = number


class Lost(Failure, Gone):
    """There is no connection to libvirt any more, or no such guest."""


def module() -> Any:
    """libvirt's own module; Error if there is none."""
    try:
        libvirt: Any = importlib.import_module("libvirt")
    except ImportError:
        raise Error(
            "libvirt's Python module is missing: install python3-libvirt (or libvirt-python with"
            " pip) for the Python that runs nbdtool"
        ) from None
    # It would print every message, beside the one line that is ours.
    libvirt.registerErrorHandler(lambda *_: None, None)
    return libvirt


class Link:
    """A connection to the hypervisor at uri ("" is libvirt's default). Methods are thread safe.

    Calls on a lost one wait for another, up to `reconnect` seconds from the start of the outage;
    then they fail, until libvirt is back. Failures are Failure, an OSError; Error if there never
    was a connection.
    """

    def __init__(
        self, uri: str, *, read_only: bool = False, password_file: str = "", reconnect: float = 30.0
    ) -> None:
        self._libvirt = module()
        self._uri, self._read_only = uri, read_only
        self._answers = _Answers(password_file)
        self._reconnect = reconnect
        self._lock = threading.Lock()
        self._closed = False
        self._outage: Optional[float] = None  # since when it is lost
        if _needs_events(uri):
            _run_events(self._libvirt)
        try:
            self._connection: Any = self._open()
        except self._libvirt.libvirtError as exc:
            self._connection = None
            if not (reconnect and _broke_off(exc, uri)):
                hint = self._answers.missing and "; a password can be given with --password-file"
                raise Error(f"{exc.get_error_message()}{hint or ''}") from None
            try:
                self.call(lambda connection: None)
            except Failure as failure:
                raise Error(str(failure.strerror)) from None

    def clone(self, *, read_only: bool = False) -> Link:
        """Another connection to the same place, with the same answers."""
        made = Link.__new__(Link)
        made.__dict__.update(self.__dict__)
        made._lock, made._read_only = threading.Lock(), read_only
        made._connection = made._outage = None
        return made

    def _open(self) -> Any:
        libvirt = self._libvirt
        kinds = [
            libvirt.VIR_CRED_USERNAME,
            libvirt.VIR_CRED_AUTHNAME,
            libvirt.VIR_CRED_PASSPHRASE,
            libvirt.VIR_CRED_ECHOPROMPT,
            libvirt.VIR_CRED_NOECHOPROMPT,
        ]
        flags = libvirt.VIR_CONNECT_RO if self._read_only else 0
        auth = [kinds, self._answers.give, libvirt]
        connection = libvirt.openAuth(self._uri or None, auth, flags)
        if _needs_events(self._uri):
            try:
                connection.setKeepAlive(*_KEEPALIVE)
            except libvirt.libvirtError as exc:
                debug(f"no keepalive: {exc}")
        return connection

    def call(self, work: Callable[[Any], Result]) -> Result:
        """work(connection), again with another connection if that one is lost meanwhile."""
        attempt = 0
        while True:
            connection = None
            try:
                connection = self._connection or self._again()
                result = _interruptibly(work, connection)
                self._outage = None
                return result
            except self._libvirt.libvirtError as exc:
                failure = Failure(exc.get_error_message() or str(exc), exc.get_error_code())
                if self._closed:  # and the connection, perhaps, is freed
                    raise Lost(str(failure.strerror), failure.number) from None
                if connection is not None and not _lost(connection, exc):
                    self._outage = None
                    raise failure from None
            with self._lock:
                if self._connection is connection:
                    self._connection = None
                now = time.monotonic()
                since = self._outage = self._outage or now
            if now - since >= self._reconnect:
                raise Lost(str(failure.strerror), failure.number)
            debug(f"{failure.strerror}; connecting again")
            if attempt:
                time.sleep(_PAUSES[min(attempt, len(_PAUSES)) - 1])
            attempt += 1

    def _again(self) -> Any:
        with self._lock:
            if self._closed:
                raise Lost("the connection to libvirt was closed", 0)
            if self._connection is None:
                self._connection = self._open()
            return self._connection

    def is_local(self) -> bool:
        """Whether the hypervisor runs on this host, and its paths are ours."""
        uri = urlsplit(self.call(lambda connection: str(connection.getURI())))
        scheme, _, transport = uri.scheme.partition("+")
        if uri.hostname or transport not in ("", "unix") or scheme == "test":
            return False
        return self.call(lambda connection: str(connection.getHostname())) in (
            socket.gethostname(),
            socket.getfqdn(),
        )

    def close(self, held: Optional[list[Any]] = None) -> None:
        """Take leave, and empty `held` of what lives on the connection.

        A link that has gone silent isn't waited for, neither here nor where that would be freed.
        """
        self._closed = True
        connection = None
        if self._lock.acquire(timeout=_LEAVING):  # else one is being made
            connection, self._connection = self._connection, None
            self._lock.release()

        def leave(connection: Any, held: list[Any]) -> None:
            try:
                if connection is not None:
                    connection.close()
            except self._libvirt.libvirtError as exc:
                debug(f"closing: {exc}")
            held.clear()

        if connection is None and not held:
            return
        thread = threading.Thread(target=leave, args=(connection, held or []), daemon=True)
        thread.start()
        thread.join(_LEAVING)


def _interruptibly(work: Callable[[Any], Result], connection: Any) -> Result:
    """work(connection), which a signal ends even if libvirt never answers.

    Python handles signals in the main thread, and not while that is in a call of C.
    """
    if threading.current_thread() is not threading.main_thread():
        return work(connection)
    results: list[Result] = []
    failures: list[BaseException] = []

    def run() -> None:
        try:
            results.append(work(connection))
        except BaseException as exc:
            failures.append(exc)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join()
    if failures:
        raise failures[0]
    return results[0]


def _lost(connection: Any, exc: Any) -> bool:
    if exc.get_error_domain() == _FROM_RPC:
        return exc.get_error_code() in (_INTERNAL_ERROR, _SYSTEM_ERROR, _NO_CONNECT, _RPC)
    try:
        return not connection.isAlive()
    except Exception:
        return True


def _broke_off(exc: Any, uri: str) -> bool:
    """Whether libvirtd was there, and was ended while it was being connected to.

    By ssh a refusal looks the same, and asking for a password again would be a nuisance.
    """
    return (
        "ssh" not in urlsplit(uri).scheme
        and exc.get_error_domain() == _FROM_RPC
        and (
            exc.get_error_code() == _INTERNAL_ERROR
            or exc.get_int1() in (errno.EIO, errno.ECONNRESET, errno.EPIPE)
        )
    )


def _needs_events(uri: str) -> bool:
    """Whether libvirt's event loop is needed: for keepalive, and drivers without a daemon.

    It costs a thread's wake-ups for each call, so that what is local does without.
    """
    parts = urlsplit(uri)
    return bool(parts.hostname or "+" in parts.scheme or parts.path == "/embed")


def _run_events(libvirt: Any) -> None:
    if not _events.acquire(blocking=False):
        return

    def loop() -> None:
        while True:
            try:
                libvirt.virEventRunDefaultImpl()
            except libvirt.libvirtError as exc:
                debug(f"libvirt's events: {exc}")
                time.sleep(1)

    libvirt.virEventRegisterDefaultImpl()
    threading.Thread(target=loop, daemon=True).start()


class _Answers:
    """What libvirt asks a user for; asked once, for all connections."""

    def __init__(self, password_file: str) -> None:
        self._known: dict[tuple[int, str], str] = {}
        self._password: Optional[str] = None
        self.missing = False
        if password_file:
            try:
                with open(password_file) as file:
                    self._password = file.readline().rstrip("\r\n")
            except (OSError, ValueError) as exc:
                raise Error(f"{password_file}: {getattr(exc, 'strerror', exc)}") from None

    def give(self, credentials: list[list[Any]], libvirt: Any) -> int:
        """libvirt's callback: [type, prompt, challenge, default, result] for each question."""
        hidden = (libvirt.VIR_CRED_PASSPHRASE, libvirt.VIR_CRED_NOECHOPROMPT)
        for credential in credentials:
            kind, prompt = credential[0], str(credential[1] or "password")
            answer = self._known.get((kind, prompt))
            if answer is None:
                answer = self._password if kind in hidden else credential[3]
            if answer is None:
                answer = _ask(prompt, hidden=kind in hidden)
            if answer is None:
                self.missing = True
                return -1
            self._known[kind, prompt] = credential[4] = answer
        return 0


def _ask(prompt: str, *, hidden: bool) -> Optional[str]:
    """The answer of whoever sits at the terminal; None if nobody does."""
    import getpass
    import io

    try:
        fd = os.open("/dev/tty", os.O_RDWR | os.O_NOCTTY)
        with io.TextIOWrapper(io.FileIO(fd, "w+"), write_through=True) as terminal:
            if hidden:
                return getpass.getpass(f"{prompt}: ", terminal)
            terminal.write(f"{prompt}: ")
            return terminal.readline().rstrip("\n")
    except (OSError, EOFError):
        return None
