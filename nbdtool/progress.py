"""How far a long task is, on one line of a terminal."""

from __future__ import annotations

import os
import sys
import time

_DELAY = 0.5  # seconds before the first line: what is quick needs none
_INTERVAL = 0.2  # seconds between two lines


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

    Nothing is printed unless standard error is a terminal, and the line is wiped at the end. total
    is 0 where it isn't known. What isn't bytes has the plural of its unit, such as "files".

        with Progress("writing", disk.size) as progress:
            progress.update(done)
    """

    def __init__(self, task: str, total: int = 0, unit: str = "") -> None:
        self._task = task
        self._total = total
        self._unit = unit
        self._start = time.monotonic()
        self._next = self._start + _DELAY if _on_terminal() else float("inf")
        self._shown = False

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        if self._shown:
            _print("\r\x1b[K")
            self._shown = False
        self._next = float("inf")

    def update(self, done: int) -> None:
        """`done` of the total is done; cheap enough to be called every few microseconds."""
        now = time.monotonic()
        if now >= self._next:
            self._next = now + _INTERVAL
            self._shown = True
            columns = _columns()
            _print("\r" + self._line(done, now - self._start)[: columns - 1] + "\x1b[K")

    def _line(self, done: int, seconds: float) -> str:
        rate = done / seconds if seconds else 0.0
        parts = [self._amount(done)]
        if self._total:
            parts[0] += f" of {self._amount(self._total)}"
            parts.append(f"{100 * done // self._total}%")
        parts.append(f"{self._amount(rate)}/s")
        if self._total and rate:
            parts.append(f"{_duration((self._total - done) / rate)} left")
        return f"{self._task}: {', '.join(parts)}"

    def _amount(self, count: float) -> str:
        return f"{count:,.0f} {self._unit}" if self._unit else human(count)


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
