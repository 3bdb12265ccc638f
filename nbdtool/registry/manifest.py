"""The documents of an image: index, manifest, configuration.

Specification: OCI image-spec, image-index.md, manifest.md, config.md and descriptor.md; Docker's
Image Manifest V2, Schema 2.
"""

from __future__ import annotations

import json
import platform
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from nbdtool.errors import Error, warn
from nbdtool.registry import digest as digests
from nbdtool.registry.digest import Stream

LIMIT = 4 << 20  # bytes of a document

_OCI, _DOCKER = "application/vnd.oci.image.", "application/vnd.docker."
_INDEXES = (f"{_OCI}index.v1+json", f"{_DOCKER}distribution.manifest.list.v2+json")
_MANIFESTS = (f"{_OCI}manifest.v1+json", f"{_DOCKER}distribution.manifest.v2+json")
_CONFIGS = (f"{_OCI}config.v1+json", f"{_DOCKER}container.image.v1+json")
ACCEPT = (*_INDEXES, *_MANIFESTS)
TAR = f"{_OCI}layer.v1.tar"
CONFIG = _CONFIGS[0]

_MAX_DEPTH = 3  # of indexes within indexes
_MAX_LAYERS = 4096
_PLATFORM = r"(?a:[\w.-]+/[\w.-]+(/[\w.-]+)?)"
_MACHINES = {
    "x86_64": "amd64", "amd64": "amd64", "aarch64": "arm64", "arm64": "arm64", "i386": "386",
    "i686": "386", "armv6l": "arm", "armv7l": "arm", "armv8l": "arm", "loongarch64": "loong64",
}  # fmt: skip


class Document(NamedTuple):
    """A document as it came: its media type ("" if unknown) and the digest that it must have."""

    data: bytes
    media_type: str
    digest: str


class Descriptor(NamedTuple):
    """A blob; size in bytes."""

    media_type: str
    digest: str
    size: int

    def __str__(self) -> str:
        return self.digest

    @property
    def elsewhere(self) -> bool:
        """Whether it is one of the layers that registries don't have but other servers do."""
        return "foreign" in self.media_type or "nondistributable" in self.media_type


class Platform(NamedTuple):
    """os/architecture[/variant]; without a variant any will do."""

    os: str
    architecture: str
    variant: str = ""

    def __str__(self) -> str:
        return "/".join(filter(None, self))

    @classmethod
    def parse(cls, text: str) -> Platform:
        """The platform of os/architecture[/variant]; raises Error."""
        if not re.fullmatch(_PLATFORM, text):
            raise Error(f"--platform={text}: not like linux/amd64 or linux/arm64/v8")
        return cls(*text.split("/"))

    @classmethod
    def host(cls) -> Platform:
        """Linux on this machine."""
        machine = platform.machine()
        return cls("linux", _MACHINES.get(machine, machine))

    def fits(self, other: Platform) -> bool:
        """Whether `other` is what we ask for."""
        return other[:2] == self[:2] and self.variant in ("", other.variant)


class Source(Protocol):
    """Where an image comes from; failures are Error."""

    description: str

    def manifest(self, digest: str = "") -> Document:
        """The document with this digest, or the one that the image's name stands for."""

    def blob(self, descriptor: Descriptor) -> Stream:
        """The bytes of a blob, not verified."""

    def close(self) -> None: ...


@dataclass(frozen=True)
class Image:
    """One image of one platform, all its documents verified."""

    digest: str  # of the manifest
    platform: str  # os/architecture[/variant], "" if the configuration doesn't say
    layers: list[Descriptor]  # the lowest first
    diff_ids: list[str]  # digests of the unpacked layers; none if it isn't a container's image


def load(source: Source, wanted: Platform | None) -> Image:
    """The image at source for the wanted platform (None: this machine's); raises Error."""
    document = source.manifest()
    name = source.description
    for _ in range(_MAX_DEPTH):
        content = _parse(document, name)
        if "manifests" not in content:
            break
        chosen = _choose(content, wanted or Platform.host(), name)
        document = source.manifest(chosen.digest)
        if len(document.data) != chosen.size:
            raise Error(
                f"{name}: the manifest has {len(document.data)} bytes, its index says {chosen.size}"
            )
    else:
        raise Error(f"{name}: indexes within indexes within indexes")
    layers = content.get("layers")
    if not isinstance(layers, list) or len(layers) > _MAX_LAYERS:
        raise Error(f"{name}: its manifest has no list of layers")
    descriptors = [_descriptor(layer, f"{name}: a layer") for layer in layers]
    configuration = _descriptor(content.get("config"), f"{name}: the configuration")
    found = ""
    diff_ids: list[str] = []
    if configuration.media_type in _CONFIGS:
        found, diff_ids = _configuration(source, configuration, len(descriptors))
        if wanted and found and not wanted.fits(Platform.parse(found)):
            warn(f"{name}: is for {found}, and has nothing for {wanted}")
    digest = document.digest
    if not digests.is_digest(digest):
        digest = digests.digest_of(document.data)
    return Image(digest, found, descriptors, diff_ids)


def _parse(document: Document, name: str) -> dict[str, Any]:
    """A manifest or index, checked to be one and only one of them."""
    if digests.is_digest(document.digest):
        digests.verify(document.data, document.digest, f"{name}: the manifest")
    content = parse_json(document.data, f"{name}: the manifest")
    if "manifests" in content and ("layers" in content or "config" in content):
        raise Error(f"{name}: its manifest is an index too; which is meant is anyone's guess")
    if content.get("schemaVersion") != 2:
        if content.get("schemaVersion") == 1:
            raise Error(f"{name}: has a manifest of the obsolete schema 1; push the image anew")
        raise Error(f"{name}: not the manifest of an image")
    kind = content.get("mediaType", document.media_type)
    if document.media_type in ACCEPT and kind != document.media_type:
        raise Error(f"{name}: its manifest says {kind!r}, the registry {document.media_type!r}")
    if kind in ACCEPT and (kind in _INDEXES) != ("manifests" in content):
        raise Error(f"{name}: its manifest is not the {kind!r} that it says it is")
    return content


def _choose(index: dict[str, Any], wanted: Platform, name: str) -> Descriptor:
    """The entry of the index for the platform."""
    entries = index["manifests"]
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise Error(f"{name}: its index has no list of manifests")
    there = []
    for entry in entries:
        found = _platform(entry.get("platform"))
        if found is None and len(entries) == 1:
            found = wanted
        if found and wanted.fits(found):
            descriptor = _descriptor(entry, f"{name}: the manifest for {wanted}")
            if descriptor.size > LIMIT:
                raise Error(f"{name}: a manifest of {descriptor.size} bytes is too long")
            return descriptor
        if found and found.os != "unknown":
            there.append(str(found))
    raise Error(
        f"{name}: nothing for {wanted}, but for {_listed(there)}; choose with --platform"
        if there
        else f"{name}: nothing for {wanted} in its index"
    )


def _platform(entry: object) -> Platform | None:
    if not isinstance(entry, dict):
        return None
    values = [entry.get(key, "") for key in ("os", "architecture", "variant")]
    return Platform(*values) if all(isinstance(value, str) for value in values) else None


def _listed(names: Iterable[str]) -> str:
    return ", ".join(sorted(set(names))[:20])


def _descriptor(entry: object, what: str) -> Descriptor:
    """A descriptor whose digest and size can be relied on; its `urls` are never used."""
    if not isinstance(entry, dict):
        raise Error(f"{what} has no descriptor")
    kind, digest, size = entry.get("mediaType", ""), entry.get("digest"), entry.get("size")
    if not digests.is_digest(digest) or not isinstance(kind, str):
        raise Error(f"{what} has the digest {digest!r}, which is none that is known here")
    if type(size) is not int or not 0 <= size < 1 << 63:
        raise Error(f"{what} has the size {size!r}")
    return Descriptor(kind, str(digest), size)


def _configuration(source: Source, descriptor: Descriptor, layers: int) -> tuple[str, list[str]]:
    """The platform, and the digests of the unpacked layers."""
    what = f"{source.description}: the configuration"
    content = parse_json(read_document(source, descriptor, what), what)
    root = content.get("rootfs")
    diff_ids = root.get("diff_ids") if isinstance(root, dict) else None
    if not isinstance(diff_ids, list) or not all(map(digests.is_digest, diff_ids)):
        raise Error(f"{what} has no digests of the unpacked layers")
    if len(diff_ids) != layers:
        raise Error(f"{what} has {len(diff_ids)} layers, the manifest has {layers}")
    found = _platform(content) or Platform("", "")
    return str(found) if re.fullmatch(_PLATFORM, str(found)) else "", diff_ids


def read_document(source: Source, descriptor: Descriptor, what: str) -> bytes:
    """A small blob, verified."""
    if descriptor.size > LIMIT:
        raise Error(f"{what}: {descriptor.size} bytes are too many (at most {LIMIT >> 20} MiB)")
    reader = digests.Verified(source.blob(descriptor), descriptor.digest, descriptor.size, what)
    try:
        data = b""
        while piece := reader.read(LIMIT):
            data += piece
    finally:
        reader.close()
    return data


def parse_json(data: bytes, what: str) -> dict[str, Any]:
    """The object that a document is; raises Error."""
    try:
        content = json.loads(data)
    except (ValueError, RecursionError):
        content = None
    if not isinstance(content, dict):
        raise Error(f"{what} is not a JSON object")
    return content
