"""Tables for people to read."""

from __future__ import annotations

from collections.abc import Sequence


def table(rows: Sequence[Sequence[str]]) -> str:
    """Lines of the rows with their columns below one another; the first row is the head."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = ("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)
    return "".join(f"{printable(line)}\n" for line in lines)


def printable(text: str) -> str:
    """The text with what a terminal would obey escaped."""
    escaped = (c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return "".join("".join(escaped).encode(errors="backslashreplace").decode())
