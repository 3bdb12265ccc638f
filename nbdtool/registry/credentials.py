"""User names and passwords for registries.

Specification: containers-auth.json(5), Docker's config.json and its credential helpers' protocol.
"""

from __future__ import annotations

import base64
import binascii
import json
import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from nbdtool.errors import Error, debug
from nbdtool.registry.reference import DOCKER_HUB, Reference

_HELPER_TIMEOUT = 60  # seconds
_MAX_FILE = 4 << 20  # bytes


class Login(NamedTuple):
    """Credentials, and where they come from; an identity token stands for both others."""

    user: str
    password: str
    source: str
    identity_token: str = ""

    @property
    def basic(self) -> str:
        """The value of an Authorization header."""
        pair = f"{self.user}:{self.password}".encode()
        return f"Basic {base64.b64encode(pair).decode()}"


def find(reference: Reference, authfile: str | None, helpers: list[str]) -> Login | None:
    """The most specific login of the first source that has one, in podman's order."""
    for helper in helpers:
        if helper == "containers-auth.json":
            for path, legacy in _files(authfile):
                login = _in_file(path, legacy, reference)
                if login:
                    return login
        else:
            login = _ask(helper, reference.host)
            if login:
                return login
    return None


def _files(authfile: str | None) -> Iterator[tuple[Path, bool]]:
    """The files to look into, and whether each has the form before config.json."""
    named = authfile or os.environ.get("REGISTRY_AUTH_FILE")
    if named:
        if authfile and not Path(named).exists():
            raise Error(f"{named}: no such file; --authfile names it")
        yield Path(named), False
        return
    home = Path("~").expanduser()
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    folder = Path(runtime, "containers") if runtime else Path(f"/run/containers/{os.geteuid()}")
    yield folder / "auth.json", False
    yield Path(os.environ.get("XDG_CONFIG_HOME") or home / ".config", "containers/auth.json"), False
    yield Path(os.environ.get("DOCKER_CONFIG") or home / ".docker", "config.json"), False
    yield home / ".dockercfg", True


def _in_file(path: Path, legacy: bool, reference: Reference) -> Login | None:
    try:
        with path.open("rb") as file:
            document = json.loads(file.read(_MAX_FILE))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as exc:
        raise Error(f"{path}: {exc.strerror}") from None
    except (ValueError, RecursionError):
        raise Error(f"{path}: not JSON as containers-auth.json(5) describes it") from None
    if not isinstance(document, dict):
        raise Error(f"{path}: not as containers-auth.json(5) says")
    if legacy:
        document = {"auths": document}
    helper = _table(document, "credHelpers").get(reference.host)
    if helper:
        return _ask(helper, reference.host)
    auths = _table(document, "auths")
    for key in _keys(reference):
        if key in auths:
            return _login(auths[key], path)
    for key, entry in auths.items():
        if _host_of(key) == reference.host:
            return _login(entry, path)
    store = document.get("credsStore")
    if store:
        server = "https://index.docker.io/v1/" if reference.host == DOCKER_HUB else reference.host
        return _ask(store, server)
    return None


def _table(document: dict[str, Any], name: str) -> dict[str, Any]:
    table = document.get(name) or {}
    return table if isinstance(table, dict) else {}


def _keys(reference: Reference) -> Iterator[str]:
    """The keys that fit, the most specific first."""
    key = reference.repository
    while key:
        yield key
        key = key.rpartition("/")[0]


def _host_of(key: str) -> str:
    """The registry of a key as docker writes it, like https://index.docker.io/v1/."""
    scheme, there, rest = key.partition("://")
    if there and scheme in ("http", "https"):
        key = rest.partition("/")[0]
    return DOCKER_HUB if key in ("index.docker.io", "registry-1.docker.io") else key


def _login(entry: object, path: Path) -> Login | None:
    if not isinstance(entry, dict):
        return None
    token = entry.get("identitytoken")
    try:
        pair = base64.b64decode(entry.get("auth") or "", validate=True).decode()
    except (TypeError, ValueError, binascii.Error):
        raise Error(f"{path}: an auth entry is not base64 of USER:PASSWORD") from None
    user, colon, password = pair.partition(":")
    password = password.rstrip("\0")
    if token and isinstance(token, str):
        return Login(user, "", str(path), token)
    return Login(user, password, str(path)) if colon else None


def _ask(helper: object, server: str) -> Login | None:
    """What docker-credential-HELPER says about the registry; None if it knows nothing."""
    if not isinstance(helper, str) or not re.fullmatch(r"[\w.][\w.-]*", helper):
        raise Error(f"{helper!r} can't be a credential helper's name")
    program = f"docker-credential-{helper}"
    try:
        done = subprocess.run(
            [program, "get"],
            input=server.encode(),
            capture_output=True,
            timeout=_HELPER_TIMEOUT,
            check=False,
        )
    except FileNotFoundError:
        raise Error(f"{program}, which has the login for {server}, isn't installed") from None
    except (OSError, subprocess.TimeoutExpired) as exc:
        raise Error(f"{program}: {exc}") from None
    text = (done.stdout + done.stderr).decode(errors="replace").strip()
    if done.returncode:
        if "not found" in text:
            debug(f"{program}: {text}")
            return None
        raise Error(f"{program}: {text or f'exit status {done.returncode}'}")
    try:
        answer = json.loads(done.stdout)
        user, secret = answer["Username"], answer["Secret"]
        if not isinstance(user, str) or not isinstance(secret, str):
            raise ValueError
    except (ValueError, KeyError, TypeError, RecursionError):
        raise Error(f"{program}: its answer is not JSON with Username and Secret") from None
    if user == "<token>":
        return Login("", "", program, secret)
    return Login(user, secret, program) if user or secret else None
