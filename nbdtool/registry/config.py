"""registries.conf: what a short name means, and where a registry's images are.

Specification: containers-registries.conf(5), version 2, and containers-registries.conf.d(5).
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from nbdtool.errors import Error
from nbdtool.registry.reference import DOCKER_HUB, Reference, is_short, parse

_SYSTEM = Path("/etc/containers/registries.conf")
_USER = Path("~/.config/containers/registries.conf")
_CACHE = "short-name-aliases.conf"


class Endpoint(NamedTuple):
    """Where an image may be fetched: its name there, and whether TLS may be bad or missing."""

    reference: Reference
    insecure: bool


@dataclass
class Registries:
    """What the files say, later ones over earlier ones."""

    search: list[str] = field(default_factory=list)
    short_names: str = "permissive"
    helpers: list[str] = field(default_factory=lambda: ["containers-auth.json"])
    aliases: dict[str, str] = field(default_factory=dict)
    tables: dict[str, dict[str, Any]] = field(default_factory=dict)  # by prefix

    def candidates(self, text: str) -> list[Reference]:
        """The images that a name may mean, to be tried in this order; raises Error."""
        if text.startswith("docker://"):
            return [parse(text[len("docker://") :])]
        if not is_short(text):
            return [parse(text)]
        plain = parse(text)  # of docker.io, and so checked
        base, rest = _split(text)
        if base in self.aliases:
            return [parse(self.aliases[base] + rest)]
        if self.short_names == "enforcing" and len(self.search) > 1:
            names = ", ".join(f"{host}/{text}" for host in self.search)
            raise Error(f"{text}: which one of {names}? Give the full name")
        return [parse(f"{host}/{text}") for host in self.search] or [plain]

    def endpoints(self, reference: Reference) -> list[Endpoint]:
        """Where to get the image, mirrors first; raises Error if its registry is blocked."""
        matching = [prefix for prefix in self.tables if _matches(prefix, reference)]
        if not matching:
            return [Endpoint(reference, False)]
        prefix = max(matching, key=len)
        table = self.tables[prefix]
        if table.get("blocked"):
            raise Error(f"{reference}: registries.conf blocks {prefix}")
        places = []
        for mirror in table.get("mirror", []):
            wanted = mirror.get("pull-from-mirror", "all")
            if table.get("mirror-by-digest-only"):
                wanted = "digest-only"
            if wanted == "all" or (wanted == "digest-only") == bool(reference.digest):
                places.append(mirror)
        places.append(table)
        return [
            Endpoint(
                _moved(reference, prefix, place.get("location", "")), bool(place.get("insecure"))
            )
            for place in places
        ]


def load() -> Registries:
    """What the files on this machine say; Error for one that can't be understood."""
    result = Registries()
    override = os.environ.get("CONTAINERS_REGISTRIES_CONF")
    user = _USER.expanduser()
    folders = [_SYSTEM.with_name("registries.conf.d"), user.with_name("registries.conf.d")]
    if override:
        main = Path(override)
    elif user.exists():
        main, folders = user, folders[1:]
    else:
        main = _SYSTEM
    drop_ins = [path for folder in folders for path in sorted(folder.glob("*.conf"))]
    for path in (main, *drop_ins):
        _merge(result, path, _read(path))
    cached = _read(_cache())
    result.aliases |= {k: v for k, v in cached.get("aliases", {}).items() if isinstance(v, str)}
    return result


def _cache() -> Path:
    """Where podman notes what a user chose for a short name."""
    if os.geteuid() == 0:
        return Path("/var/cache/containers", _CACHE)
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(home, "containers", _CACHE).expanduser()


def _read(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text()
    except FileNotFoundError:
        return {}
    except (OSError, UnicodeDecodeError) as exc:
        raise Error(f"{path}: {getattr(exc, 'strerror', None) or exc}") from None
    if not any(line and not line.startswith("#") for line in map(str.strip, text.splitlines())):
        return {}
    try:
        toml = importlib.import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")
    except ImportError:
        raise Error(f"{path}: reading it needs Python 3.11 or the tomli module") from None
    try:
        result: dict[str, Any] = toml.loads(text)
    except (ValueError, RecursionError) as exc:
        raise Error(f"{path}: not TOML: {exc}") from None
    return result


def _merge(result: Registries, path: Path, document: dict[str, Any]) -> None:
    result.search = document.get("unqualified-search-registries", result.search)
    result.short_names = document.get("short-name-mode", result.short_names)
    result.helpers = document.get("credential-helpers", result.helpers)
    aliases, tables = document.get("aliases", {}), document.get("registry", [])
    if (
        not _are(str, result.search)
        or not _are(str, result.helpers)
        or not isinstance(aliases, dict)
        or not _are(str, aliases.values())
        or not _are(dict, tables)
    ):
        raise Error(f"{path}: not as containers-registries.conf(5) says")
    result.aliases |= aliases
    for table in tables:
        mirrors = table.get("mirror", [])
        if not _are(dict, mirrors):
            raise Error(f"{path}: not as containers-registries.conf(5) says")
        places = [table.get("prefix", ""), *(t.get("location", "") for t in (table, *mirrors))]
        prefix = places[0] or places[1]
        if not _are(str, places) or not prefix or not all(places[2:]):
            raise Error(f"{path}: a [[registry]] or its mirror has neither prefix nor location")
        result.tables[prefix] = table


def _are(kind: type, values: object) -> bool:
    return isinstance(values, Iterable) and all(isinstance(value, kind) for value in values)


def _split(text: str) -> tuple[str, str]:
    """A short name and its tag or digest."""
    name = text.partition("@")[0]
    slash = name.rfind("/")
    colon = name.find(":", slash + 1)
    at = colon if colon >= 0 else len(name)
    return text[:at], text[at:]


def _matches(prefix: str, reference: Reference) -> bool:
    if prefix.startswith("*."):
        host, slash, rest = prefix[1:].partition("/")
        if not reference.host.endswith(host):
            return False
        prefix = f"{reference.host}{slash}{rest}"
    text = str(reference)
    return text == prefix or (text.startswith(prefix) and text[len(prefix)] in ":/@")


def _moved(reference: Reference, prefix: str, location: str) -> Reference:
    """The image under the location that stands for the prefix."""
    if not location or prefix.startswith("*."):
        return reference
    moved = parse(location + str(reference)[len(prefix) :])
    if moved.host == DOCKER_HUB and is_short(location):
        raise Error(f"registries.conf: {location!r}, of {prefix}, names no registry")
    return moved
