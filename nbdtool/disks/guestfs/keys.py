"""Keys of encrypted devices, as the option --key of libguestfs' tools names them."""

from __future__ import annotations

from typing import NamedTuple

from nbdtool.errors import Error, UsageError

_ANY = "all"
_LONGEST = 8 << 20  # bytes; cryptsetup's limit of a key


class Key(NamedTuple):
    """A passphrase, and the device or UUID that it is for, or "all"."""

    name: str
    passphrase: str

    def fits(self, names: set[str]) -> bool:
        """Whether it is for a device that has these names."""
        return self.name in (_ANY, *names)


def parse_key(text: str) -> Key:
    """NAME:key:PASSPHRASE or NAME:file:PATH, of which the first line counts.

    Raises UsageError, and Error if the file can't be read.
    """
    for kind in "key", "file":
        name, found, value = text.partition(f":{kind}:")
        if found and name:
            return Key(name, value if kind == "key" else _first_line(value))
    # What was given may be the key itself: it isn't repeated.
    raise UsageError("--key is NAME:key:PASSPHRASE or NAME:file:PATH; NAME a device, UUID or all")


def _first_line(path: str) -> str:
    try:
        with open(path, "rb") as file:
            data = file.readline(_LONGEST)
        return data.rstrip(b"\r\n").decode()
    except OSError as exc:
        raise Error(f"{path}: {exc.strerror}") from None
    except ValueError:
        raise Error(f"{path}: a key must be text in UTF-8") from None
