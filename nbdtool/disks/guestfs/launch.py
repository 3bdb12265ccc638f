"""Starting libguestfs' appliance."""

from __future__ import annotations

import contextlib
import importlib
import os
import re
import signal
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Callable, Protocol

from nbdtool.disks.guestfs import letters
from nbdtool.disks.guestfs.hypervisor import guarded
from nbdtool.errors import Error, debug, warn

# How libguestfs and qemu say that KVM is there and doesn't work, as under another hypervisor.
_CRASHED = re.compile(r"killed by signal|closed the connection unexpectedly|appliance .*crashed")
_HUNG = ("KVM internal error", "kvm_msr_buf", "KVM: entry failed")
_PATIENCE = 60.0  # seconds for an appliance with KVM, which takes five
_PROGRAMS = ("qemu", "kvm", "supermin")
_KEPT = 4096  # characters of what is said at once, and of what qemu said last


class Drive(Protocol):
    """A disk image, and how it is opened."""

    @property
    def path(self) -> str: ...
    @property
    def format(self) -> str: ...
    @property
    def read_only(self) -> bool: ...
    @property
    def sector(self) -> int: ...


def module() -> Any:
    """libguestfs' Python module; Error if there is none."""
    try:
        return importlib.import_module("guestfs")
    except ImportError:
        raise Error(
            "libguestfs' Python module is missing: install python3-guestfs (Debian, Ubuntu) or"
            " python3-libguestfs (Fedora), for the Python that runs nbdtool"
        ) from None


class Launcher:
    """Starts appliances with `drives`; debug and trace are libguestfs', to be seen with -v.

    progress is called with the steps of a launch that are done, and their number.
    """

    def __init__(
        self,
        drives: Sequence[Drive],
        *,
        writable: bool,
        debug: bool = False,
        trace: bool = False,
        progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> None:
        self._guestfs = module()
        self._drives, self._writable = drives, writable
        self._debug, self._trace = debug, trace
        self._progress = progress
        self._without_kvm = False
        self.given_up = False  # nobody waits for it any more

    def start(self) -> Any:
        """A running appliance's handle. Raises Error."""
        try:
            return self._try()
        except _Crash as exc:
            if self.given_up:
                raise
            warn(f"{exc}: KVM doesn't work here; trying again without it, which is slower")
        self._without_kvm = True
        return self._try()

    def _try(self) -> Any:
        g = self._guestfs.GuestFS(python_return_dict=True, close_on_exit=False)
        said = _Said(self._guestfs, self._progress)
        patience = threading.Timer(_PATIENCE, said.hang)
        patience.daemon = True
        uses_kvm = False
        try:
            g.set_event_callback(said.hear, said.events)
            g.set_pgroup(True)  # or ^C at the terminal would be for it, too
            g.set_verbose(self._debug)
            g.set_trace(self._trace)
            if self._without_kvm:
                g.set_backend_setting("force_tcg", "1")
            for number, drive in enumerate(self._drives):
                options: dict[str, Any] = {"blocksize": drive.sector} if drive.sector != 512 else {}
                options["readonly"] = drive.read_only or not self._writable
                options["label"] = letters(number)
                g.add_drive_opts(drive.path, format=drive.format, **options)
            uses_kvm = os.access("/dev/kvm", os.R_OK | os.W_OK) and not _has_setting(g, "force_tcg")
            if uses_kvm:
                patience.start()
            with guarded(g):
                g.launch()
        except RuntimeError as exc:
            g.close()
            text = f"libguestfs: {said.reason or first_line(exc)}"
            if uses_kvm and (said.hung or _CRASHED.search(str(exc))):
                raise _Crash(text) from None
            hint = "" if self._debug else "; debug=on and -v show more"
            raise Error(f"{text}{hint}") from None
        finally:
            said.starting = False
            patience.cancel()
        return g


class _Crash(Error):
    """qemu ended by itself, or stopped for good."""


class _Said:
    """What libguestfs and its qemu tell while they run."""

    def __init__(self, guestfs: Any, progress: Callable[[int, int], None]) -> None:
        self._guestfs, self._progress = guestfs, progress
        self.events = guestfs.EVENT_PROGRESS | guestfs.EVENT_APPLIANCE | guestfs.EVENT_LIBRARY
        self.events |= guestfs.EVENT_TRACE | guestfs.EVENT_WARNING
        self.starting = True
        self.hung = False
        self._text = ""  # of qemu

    def hear(self, event: int, handle: int, text: str, numbers: Sequence[int]) -> None:
        if event == self._guestfs.EVENT_PROGRESS:
            if self.starting:
                self._progress(numbers[2], numbers[3])
            return
        for line in text[:_KEPT].splitlines():  # calls are traced with what they read
            debug(f"libguestfs: {line}")
        if event == self._guestfs.EVENT_APPLIANCE and self.starting:
            self._text = (self._text + text)[-_KEPT:]
            if any(sign in self._text for sign in _HUNG):
                self.hang()

    def hang(self) -> None:
        """It will never be there, and be waited for."""
        if self.starting and not self.hung:
            self.hung = True
            end_children()

    @property
    def reason(self) -> str:
        """What qemu itself says is wrong; "" if nothing."""
        lines = re.findall(r"^(?:qemu[\w-]*: |KVM ).*$", self._text, re.MULTILINE)
        if self.hung and not lines:
            return f"no sign of life after {_PATIENCE:.0f} s"
        return lines[-1].strip() if lines else ""


def _has_setting(g: Any, name: str) -> bool:
    return any(setting.partition("=")[0] == name for setting in g.get_backend_settings())


def first_line(exc: BaseException) -> str:
    """What an error of libguestfs says, without the advice that follows."""
    return str(exc).partition("\n")[0].strip().rstrip(".")


def end_children() -> None:
    """End the programs that libguestfs has started: its call that waits for them then fails."""
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError, ValueError):
            name, _, rest = path.read_text().partition("(")[2].rpartition(")")
            if int(rest.split()[1]) == os.getpid() and name.startswith(_PROGRAMS):
                os.kill(int(path.parent.name), signal.SIGKILL)
