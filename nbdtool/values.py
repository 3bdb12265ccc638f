"""Values that a user gives on the command line: sizes, booleans, and options that hold them."""

from __future__ import annotations

import argparse
import os
import re
from typing import Any, Callable

_UNITS: dict[str, int] = {
    "": 1,
    "b": 1,
    "s": 512,
    **{u: 1 << (10 * n) for n, u in enumerate("kmgtpe", 1)},
}


def size(text: str) -> int:
    """Bytes of `512`, `10K`, `1.5G`, `2048s` (sectors) or `1MiB`; ArgumentTypeError otherwise."""
    match = re.fullmatch(r"(\d+)(?:\.(\d+))?([bskmgtpe]?)(?:i?b)?", text.strip().lower(), re.ASCII)
    if not match or len(text) > 32:
        raise argparse.ArgumentTypeError(f"not a size: {text!r} (like 512, 10K, 1.5G or 2048s)")
    whole, fraction = match[1], match[2] or ""
    unit: int = _UNITS[match[3]]
    result, rest = divmod(int(whole + fraction) * unit, int("1" + "0" * len(fraction)))
    if rest or result >= 1 << 63:
        raise argparse.ArgumentTypeError(f"not a size in bytes: {text!r}")
    return result


def seconds(text: str) -> float:
    """A number of seconds from 0 to a million; ArgumentTypeError otherwise."""
    try:
        value = float(text)
    except ValueError:
        value = -1
    if not 0 <= value < 1e6:
        raise argparse.ArgumentTypeError(f"not a number of seconds: {text!r}")
    return value


def pattern(text: str) -> bytes:
    """The bytes of a text, or of 0x and pairs of hexadecimal digits; ArgumentTypeError if none."""
    try:
        data = bytes.fromhex(text[2:]) if text[:2] == "0x" else os.fsencode(text)
    except ValueError:
        data = b""
    if not data:
        raise argparse.ArgumentTypeError(f"no bytes: {text!r} (like BAD or 0xdeadbeef)")
    return data


def count(what: str, least: int, most: int) -> Callable[[str], int]:
    """A type for a number of something, within bounds; it raises ArgumentTypeError otherwise."""

    def count(text: str) -> int:
        if not re.fullmatch("[0-9]{1,18}", text) or not least <= int(text) <= most:
            raise argparse.ArgumentTypeError(
                f"not a number of {what}: {text!r} ({least} to {most})"
            )
        return int(text)

    return count


def boolean(text: str) -> bool:
    """on, true, yes, 1 or off, false, no, 0, in any case; ArgumentTypeError otherwise."""
    word = text.lower()
    if word in ("on", "true", "yes", "1"):
        return True
    if word in ("off", "false", "no", "0"):
        return False
    raise argparse.ArgumentTypeError(f"not a boolean: {text!r} (on or off)")


def add_flag(parser: Any, *names: str, **kwargs: Any) -> None:
    """Add an option that is given as --name, --name=off, name=on or name=off; the default is False.

    The command line is normalised before argparse sees it, so that the value is never taken from
    the next argument.
    """
    kwargs.setdefault("default", False)
    parser.add_argument(*names, nargs="?", const=True, type=boolean, metavar="on|off", **kwargs)
