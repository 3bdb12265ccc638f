"""How far a long task is: on one line of a terminal, as JSON for scripts, or when a signal asks."""

from __future__ import annotations

import os
import signal
import sys
import time
from typing import Any, Callable

from nbdtool import errors

_DELAY = 0.5  # seconds before the first line: what is quick needs none
_INTERVAL = 0.2  # seconds between two lines
_WINDOW = 5  # seconds that the rate of the moment covers


def human(size: float) -> str:
    """A size in bytes as `512 B`, `1.5 KiB`, `2.0 GiB`."""
    if size < 1024:
        return f"{size:.0f} B"
    for unit in ("KiB", "MiB", "GiB", "TiB"):
        size /= 1024
        if size < 1024:
            return f"{size:.1f} {unit}"
    return f"{size / 1024:.1f} PiB"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


class Progress:
    """A line like `writing: 1.2 GiB of 4.0 GiB, 30%, 800.0 MiB/s, 0:04 left` on standard error.

    It is shown if standard error is a terminal, and wiped at the end; a signal prints it too
    (print_on_signal), and scripts get it as JSON (print_for_scripts). total is 0 where it isn't
    known. What isn't bytes has the plural of its unit, such as "files". The subject stands behind
    the task, and file, the one that is written, is for scripts.

        with Progress("writing", disk.size) as progress:
            progress.update(done)
    """

    def __init__(
        self, task: str, total: int = 0, unit: str = "", *, file: str = "", subject: str = ""
    ) -> None:
        self._task = task
        self._total = total
        self._unit = unit
        self._file = file
        self._title = f"{task} {subject}" if subject else task
        self.done = self._first = 0
        self._start = time.monotonic()
        self._samples = [(self._start, 0)]  # when how much was done, in the last seconds
        self._terminal = _status is None and _on_terminal()
        self._next = self._start + (_DELAY if self._terminal else 0)

    def __enter__(self) -> Progress:
        _under_way.append(self)
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        _under_way.remove(self)
        self._next = float("inf")
        if self._terminal and errors.unfinished_line:
            _print("\r\x1b[K")
            errors.unfinished_line = False
        if _status is not None and kind is None:
            _status(self._state(time.monotonic()))

    def update(self, done: int) -> None:
        """`done` of the total is done; cheap enough to be called every few microseconds."""
        self.done = done
        now = time.monotonic()
        if now >= self._next:
            self._show(now)

    def _show(self, now: float) -> None:
        self._next = now + (_INTERVAL if self._terminal else 1)
        while len(self._samples) > 1 and self._samples[0][0] < now - _WINDOW:
            del self._samples[0]
        self._samples.append((now, self.done))
        if _status is not None:
            _status(self._state(now))
        elif self._terminal:
            errors.unfinished_line = True
            _print("\r" + self._line(now)[: _columns() - 1] + "\x1b[K")

    def _rate(self, now: float) -> float:
        """How much is done in a second, of late."""
        then, done = self._samples[0]
        return (self.done - done) / (now - then) if now > then else 0.0

    def _average(self, now: float) -> float:
        seconds = now - self._start
        return (self.done - self._first) / seconds if seconds > 0 else 0.0

    def _left(self, now: float) -> float | None:
        """Seconds; None if nobody can tell."""
        average = self._average(now)
        return max(self._total - self.done, 0) / average if self._total and average else None

    def _line(self, now: float) -> str:
        left = self._left(now)
        end = [f"{_duration(left)} left"] if left is not None else []
        return f"{self._title}: {', '.join([*self._parts(now), *end])}"

    def _parts(self, now: float) -> list[str]:
        """What the line has between the task and the time that is left."""
        parts = [self._amount(self.done)]
        if self._total:
            parts[0] += f" of {self._amount(self._total)}"
            parts.append(f"{100 * self.done // self._total}%")
        return [*parts, f"{self._amount(self._average(now))}/s"]

    def _amount(self, count: float) -> str:
        return f"{count:,.0f} {self._unit}" if self._unit else human(count)

    def _state(self, now: float) -> dict[str, Any]:
        """The line for scripts: amounts, rates per second, seconds; null is what isn't known."""
        left = self._left(now)
        return {
            "status": "running",
            "task": self._task,
            **({"file": self._file} if self._file else {}),
            "unit": self._unit or "bytes",
            "done": self.done,
            "total": self._total or None,
            "rate": round(self._rate(now)),
            "average": round(self._average(now)),
            "seconds": round(now - self._start, 1),
            "eta": None if left is None else round(left, 1),
        }


class RescueProgress(Progress):
    """The same of a rescue: what is bad, both rates, and what it is doing.

    `rescuing: 1.2 GiB of 4.0 GiB, 30%, 3.5 KiB bad in 2 areas, 8.0 MiB/s, average 9.5 MiB/s,
    trimming, 5:02 left`. What earlier runs rescued, the first update says; it has no part in the
    rates.
    """

    def __init__(self, total: int, *, file: str = "", subject: str = "") -> None:
        super().__init__("rescuing", total, file=file, subject=subject)
        self.bad = self.areas = 0
        self.phase = ""

    def update(self, done: int, *, bad: int = 0, areas: int = 0, phase: str = "") -> None:
        """Bytes rescued and bytes that failed in so many areas."""
        if not self.phase:
            self._first = done
            self._samples = [(self._start, done)]
        self.bad, self.areas, self.phase = bad, areas, phase
        super().update(done)

    def _left(self, now: float) -> float | None:
        rate = self._rate(now)  # what is bad slows it down for long
        return max(self._total - self.done, 0) / rate if rate else None

    def _parts(self, now: float) -> list[str]:
        *amounts, average = super()._parts(now)
        areas = f"{self.areas} area{'s'[: self.areas != 1]}"
        bad = f"{human(self.bad)} bad in {areas}" if self.bad else "nothing bad"
        rate = f"{human(self._rate(now))}/s"
        return [*amounts, bad, rate, f"average {average}", self.phase]

    def _state(self, now: float) -> dict[str, Any]:
        details = {"phase": self.phase, "bad": self.bad, "bad_areas": self.areas}
        return {**super()._state(now), **details}


_under_way: list[Progress] = []  # the innermost last
_status: Callable[[dict[str, Any]], None] | None = None


def print_for_scripts(fd: int) -> Callable[[dict[str, Any]], None]:
    """From now on, have a line of JSON on a descriptor each second, and none on the terminal.

    Returns what prints such a line. If nobody reads them, the work goes on.
    """
    import json

    def line(state: dict[str, Any]) -> None:
        nonlocal fd
        rest = memoryview(json.dumps(state).encode() + b"\n")
        try:
            while rest and fd >= 0:
                rest = rest[os.write(fd, rest) :]
        except OSError:
            fd = -1

    global _status
    _status = line
    return line


def print_on_signal(number: int) -> None:
    """From now on, print what is under way on standard error when a signal comes."""

    def show(*_: object) -> None:
        now = time.monotonic()
        lines = [task._line(now) for task in list(_under_way)] or ["preparing"]
        start = "\r\x1b[K" if errors.unfinished_line else ""
        text = "".join(f"nbdtool: {errors.printable(line)}\n" for line in lines)
        try:
            os.write(2, (start + text).encode())  # the buffer of sys.stderr may be in use just now
        except OSError:
            pass

    signal.signal(number, show)


def _on_terminal() -> bool:
    try:
        return os.isatty(sys.stderr.fileno())
    except (AttributeError, OSError, ValueError):  # closed, or replaced
        return False


def _columns() -> int:
    try:  # as shutil.get_terminal_size, which is slow to load
        return int(os.environ.get("COLUMNS") or os.get_terminal_size(sys.stderr.fileno()).columns)
    except (OSError, ValueError):
        return 80


def _print(text: str) -> None:
    try:
        sys.stderr.write(text)
        sys.stderr.flush()
    except (OSError, ValueError):
        pass
