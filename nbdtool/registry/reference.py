"""Image names.

Specification: the grammar of github.com/distribution/reference, and containers-transports(5).
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from nbdtool.errors import Error
from nbdtool.registry.digest import is_digest

_HOST = re.compile(
    r"(?:(?:[a-z0-9](?:[a-z0-9-]*[a-z0-9])?\.)*[a-z0-9](?:[a-z0-9-]*[a-z0-9])?|\[[0-9a-f:.]+\])"
    r"(?::[0-9]{1,5})?",
    re.IGNORECASE | re.ASCII,
)
_COMPONENT = re.compile(r"[a-z0-9]+(?:(?:\.|_{1,2}|-+)[a-z0-9]+)*")
_TAG = re.compile(r"\w[\w.-]{0,127}", re.ASCII)
_MAX_NAME = 255

DOCKER_HUB = "docker.io"


@dataclass(frozen=True)
class Reference:
    """An image in a registry; tag or digest is empty, and both are for a repository."""

    host: str  # with the port, if one is given
    path: str
    tag: str = ""
    digest: str = ""

    @property
    def repository(self) -> str:
        return f"{self.host}/{self.path}"

    @property
    def version(self) -> str:
        return self.digest or self.tag

    def __str__(self) -> str:
        tag = f":{self.tag}" if self.tag else ""
        return self.repository + (f"@{self.digest}" if self.digest else tag)


def is_short(text: str) -> bool:
    """Whether the name leaves open which registry it means."""
    host, slash, _ = text.partition("/")
    return not slash or not ("." in host or ":" in host or host == "localhost")


def parse(text: str) -> Reference:
    """The image that text names; without a registry docker.io, without a tag `latest`; Error."""
    name, at, digest = text.partition("@")
    if at and not is_digest(digest):
        raise Error(f"{text!r}: {digest!r} is not a digest (like sha256: and 64 hex digits)")
    tag = ""
    if ":" in name.rpartition("/")[2]:
        name, _, tag = name.rpartition(":")
        if not _TAG.fullmatch(tag):
            raise Error(f"{text!r}: {tag!r} is not a tag")
    host, path = (DOCKER_HUB, name) if is_short(name) else tuple(name.split("/", 1))
    if host in ("index.docker.io", "registry-1.docker.io"):
        host = DOCKER_HUB
    if host == DOCKER_HUB and "/" not in path:
        path = f"library/{path}"
    if len(path) > _MAX_NAME or not _HOST.fullmatch(host):
        raise Error(f"{text!r}: not the name of an image (like HOST/PATH:TAG)")
    for component in path.split("/"):
        if not _COMPONENT.fullmatch(component):
            hint = "; names are in lower case" if component != component.lower() else ""
            raise Error(f"{text!r}: {component!r} can't be part of an image's name{hint}")
    return Reference(host, path, "" if digest else tag or "latest", digest)
