"""nbdtool --run: a command that has the server to itself, and the variables that it sees."""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING
from urllib.parse import quote

from nbdtool.server.listen import Place

if TYPE_CHECKING:
    import subprocess

_GUESTFISH = re.compile(r"guestfish|guestmount|virt-[\w-]+")
_QEMU = re.compile(r"qemu(-[\w.-]+)?|kvm")


def start(command: str, place: Place, export: str, tls: bool) -> subprocess.Popen[bytes]:
    """Run command in a shell; OSError if there is none."""
    import subprocess  # slow to load, and seldom needed

    uri = place.uri(export, tls)
    variables = {
        "uri": uri,
        "nbd": spelling(command, place, export, uri),
        "port": str(place.port or ""),
        "unixsocket": place.path or "",
        "exportname": export,
        "tls": "on" if tls else "",
    }
    return subprocess.Popen(["/bin/sh", "-c", command], env={**os.environ, **variables})


def spelling(command: str, place: Place, export: str, uri: str) -> str:
    """$nbd as the first known program in command wants it."""
    for word in re.findall(r"[\w./-]+", command):
        name = word.rpartition("/")[2]
        if _GUESTFISH.fullmatch(name):
            if place.path is None:
                return uri
            start = f"nbd:///{quote(export)}" if export else "nbd://"
            return f"{start}?socket={quote(os.fsencode(place.path))}"
        if _QEMU.fullmatch(name):
            suffix = f":exportname={export}" if export else ""
            if place.path is None:
                return f"nbd:{place.host}:{place.port}{suffix}"
            return f"nbd:unix:{place.path}{suffix}"
    return uri


def status(returncode: int) -> int:
    """The exit status of a command as a shell gives it: 128 + signal if it was killed."""
    return 128 - returncode if returncode < 0 else returncode


def quoted(word: str) -> str:
    """word as a shell takes it."""
    return word if re.fullmatch(r"[\w@%+:,./-]+", word) else "'" + word.replace("'", "'\\''") + "'"
