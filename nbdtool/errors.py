"""What a user is told in one line."""

from __future__ import annotations

import sys
from collections.abc import Iterable

verbose = False  # -v: debug() prints, and faults come with their traceback
unfinished_line = False  # a line of progress is on the terminal


class Error(Exception):
    """A failure (exit status 1); its text says what, where, and what to do."""


class Uncertain(Error):
    """What our own readers can't be sure of, and why; another way may do."""


class UsageError(Error):
    """Wrong usage of the command line (exit status 2)."""


def tell(line: str) -> None:
    """Print a line on standard error as it is, but for what a terminal would obey."""
    start = "\r\x1b[K" if unfinished_line else ""
    try:
        sys.stderr.write(f"{start}{printable(line)}\n")
        sys.stderr.flush()
    except (AttributeError, OSError, ValueError):
        pass  # nobody reads it


def printable(text: str) -> str:
    """The text with what a terminal would obey escaped: names come from images and clients."""
    return "".join(c if c.isprintable() else _escaped(c) for c in text)


def _escaped(c: str) -> str:
    if "\udc80" <= c <= "\udcff":  # a byte that isn't UTF-8, as os.fsdecode() has it
        return f"\\x{ord(c) - 0xDC00:02x}"
    return c.encode("unicode_escape").decode()


def listed(names: Iterable[str], most: int = 32) -> str:
    """Some of the names, for a message: `a, b and 3 more`; "" if there is none."""
    known = list(names)
    more = f" and {len(known) - most} more" if len(known) > most else ""
    return ", ".join(known[:most]) + more


def warn(text: str) -> None:
    """Tell the user, on standard error, of something that doesn't stop the work."""
    tell(f"nbdtool: warning: {text}")


def debug(text: str, exc: BaseException | None = None) -> None:
    """With -v, print text and the traceback of exc."""
    if verbose:
        tell(f"nbdtool: {text}")
        if exc:
            import traceback

            traceback.print_exception(type(exc), exc, exc.__traceback__)


def describe(exc: BaseException) -> str:
    """What went wrong, without the number of an OSError."""
    if isinstance(exc, OSError) and exc.strerror:
        return f"{exc.filename}: {exc.strerror}" if exc.filename else exc.strerror
    return str(exc)


def fail(exc: BaseException) -> None:
    """Print the one line of what failed."""
    tell(f"nbdtool: error: {describe(exc)}")
    debug("where it came from:", exc)


def fault(exc: Exception) -> None:
    """Print the one line of a mistake of ours."""
    hint = "" if verbose else "; -v shows where"
    tell(f"nbdtool: error: a fault in nbdtool: {type(exc).__name__}: {exc}{hint}")
    debug("where it came from:", exc)
