"""The syntax of LVM2's metadata: sections in braces, which hold `key = value` and sections.

Source: lvm.conf(5), and libdm/libdm-config.c of LVM2 where the page is silent.
"""

from __future__ import annotations

import re
from typing import Any, Union

from nbdtool.errors import Error

Value = Union[int, str, list[Any], dict[str, Any]]

_DEPTH = 8  # of sections; LVM's own have five
_TOKENS = 2_000_000
# Each matches in one way only, so that no text takes long.
_BLANK = re.compile(r"\s*(?:#[^\n]*(?:\n\s*|\Z))*")
_TOKEN = re.compile(
    r'"(?P<string>[^"\\]*(?:\\.[^"\\]*)*)"|(?P<mark>[{}\[\]=,])'
    r"|(?P<word>[^\s\0\"{}\[\]=,#]+)|(?P<end>\Z)",
    re.DOTALL,
)
_NUMBER = re.compile(r"[-+]?[0-9]{1,20}")


def parse(text: bytes) -> dict[str, Any]:
    """The sections as dicts, and their values: int, str and lists of these. Raises Error."""
    return _Parser(text.rstrip(b"\0").decode("utf-8", "surrogateescape")).section(0)


class _Parser:
    def __init__(self, text: str) -> None:
        self._text, self._at, self._count = text, 0, 0

    def _next(self) -> tuple[str, str]:
        """The kind of the next token (string, mark, word or end), and what it says."""
        blank = _BLANK.match(self._text, self._at)
        match = _TOKEN.match(self._text, blank.end() if blank else self._at)
        self._count += 1
        if match is None or match.lastgroup is None or self._count > _TOKENS:
            raise Error(f"its syntax is damaged at byte {self._at}")
        self._at = match.end()
        return match.lastgroup, match[match.lastgroup]

    def section(self, depth: int) -> dict[str, Any]:
        """What is between braces; all of the text at depth 0."""
        found: dict[str, Any] = {}
        last = ("mark", "}") if depth else ("end", "")
        while True:
            token = kind, key = self._next()
            if token == last:
                return found
            if kind not in ("word", "string") or key in found or depth > _DEPTH:
                raise Error(f"its syntax is damaged at byte {self._at}")
            token = self._next()
            if token == ("mark", "{"):
                found[key] = self.section(depth + 1)
            elif token == ("mark", "="):
                found[key] = self._value()
            else:
                raise Error(f"its syntax is damaged at byte {self._at}")

    def _value(self) -> Value:
        token = self._next()
        if token != ("mark", "["):
            return self._scalar(token)
        values: list[Value] = []
        token = self._next()
        while token != ("mark", "]"):
            values.append(self._scalar(token))
            token = self._next()
            if token == ("mark", ","):
                token = self._next()
            elif token != ("mark", "]"):
                raise Error(f"its syntax is damaged at byte {self._at}")
        return values

    def _scalar(self, token: tuple[str, str]) -> Value:
        kind, text = token
        if kind == "string":
            return re.sub(r"\\(.)", r"\1", text, flags=re.DOTALL) if "\\" in text else text
        if kind == "word" and _NUMBER.fullmatch(text):
            return int(text)
        raise Error(f"its syntax is damaged at byte {self._at}")
