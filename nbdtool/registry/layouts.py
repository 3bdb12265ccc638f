"""Images that are files on this machine: oci:, oci-archive:, docker-archive:, dir: and podman's.

Specification: OCI image-layout.md; containers-transports(5); `docker save`'s manifest.json.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Callable, Protocol

from nbdtool.errors import Error, UsageError
from nbdtool.registry import decompress, digest, manifest
from nbdtool.registry.archive import Archive
from nbdtool.registry.digest import Stream
from nbdtool.registry.manifest import Descriptor, Document, Source
from nbdtool.registry.reference import parse
from nbdtool.registry.spool import Spool

_TAG = "org.opencontainers.image.ref.name"


class Files(Protocol):
    """Named files, in a directory or in an archive; failures are Error."""

    name: str

    def open(self, path: str) -> Stream: ...

    def size(self, path: str) -> int: ...

    def close(self) -> None: ...


class Folder:
    """The files of a directory. Symbolic links are followed: what they lead to is verified."""

    def __init__(self, name: str) -> None:
        self.name = name
        if not Path(name).is_dir():
            raise Error(f"{name}: no such directory")

    def open(self, path: str) -> Stream:
        name = os.path.join(self.name, path)
        try:
            fd = os.open(name, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError as exc:
            raise Error(f"{name}: {exc.strerror}") from None
        file = os.fdopen(fd, "rb", buffering=0)
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            file.close()
            raise Error(f"{name}: not a regular file")
        return file

    def size(self, path: str) -> int:
        with self.open(path) as file:  # type: ignore[attr-defined]
            return os.fstat(file.fileno()).st_size

    def close(self) -> None:
        pass


def _read(files: Files, path: str) -> bytes:
    """A document, bounded."""
    what = f"{files.name}: {path}"
    stream = files.open(path)
    try:
        data = b""
        while piece := stream.read(manifest.LIMIT + 1 - len(data)):
            data += piece
            if len(data) > manifest.LIMIT:
                raise Error(f"{what}: longer than {manifest.LIMIT >> 20} MiB")
    except OSError as exc:
        raise Error(f"{what}: {exc.strerror}") from None
    finally:
        stream.close()
    return data


class _Local:
    def __init__(self, files: Files, description: str) -> None:
        self._files, self.description = files, description

    def close(self) -> None:
        self._files.close()


class OciLayout(_Local):
    """An OCI image layout; tag chooses one of several images."""

    def __init__(self, files: Files, description: str, tag: str) -> None:
        super().__init__(files, description)
        self._tag = tag

    def manifest(self, digest: str = "") -> Document:
        if digest:
            return Document(_read(self._files, _blob_path(digest)), "", digest)
        what = f"{self.description}: index.json"
        index = manifest.parse_json(_read(self._files, "index.json"), what)
        entries = index.get("manifests")
        entries = [e for e in entries if isinstance(e, dict)] if isinstance(entries, list) else []
        tags = [_tag_of(entry) for entry in entries]
        if self._tag:
            entries = [entry for entry, tag in zip(entries, tags) if tag == self._tag]
            if not entries:
                raise Error(f"{self.description}: no such image; {_there(tags)}")
        elif len(set(tags)) > 1:
            raise Error(f"{self.description}: several images; {_there(tags)}")
        return Document(json.dumps({**index, "manifests": entries}).encode(), "", "")

    def blob(self, descriptor: Descriptor) -> Stream:
        return self._files.open(_blob_path(descriptor.digest))


def _tag_of(entry: dict[str, Any]) -> str:
    annotations = entry.get("annotations")
    tag = annotations.get(_TAG) if isinstance(annotations, dict) else None
    return tag if isinstance(tag, str) else ""


def _there(names: Sequence[str]) -> str:
    known = sorted(set(filter(None, names)))[:20]
    return f"there are {', '.join(known)}" if known else "none has a name"


def _blob_path(text: str) -> str:
    if not digest.is_digest(text):
        raise Error(f"{text!r} is not a digest")
    algorithm, _, value = text.partition(":")
    return f"blobs/{algorithm}/{value}"


class DirLayout(_Local):
    """What `skopeo copy ... dir:DIR` writes."""

    def manifest(self, digest: str = "") -> Document:
        name = f"{digest.partition(':')[2]}.manifest.json" if digest else "manifest.json"
        return Document(_read(self._files, name), "", digest)

    def blob(self, descriptor: Descriptor) -> Stream:
        return self._files.open(descriptor.digest.partition(":")[2])


class DockerArchive(_Local):
    """What `docker save` and `podman save` write; name chooses one of several images.

    It has no manifest of our kind, so that one is made up: the layers are known by their diff_ids.
    """

    def __init__(self, files: Files, description: str, name: str) -> None:
        super().__init__(files, description)
        entry = self._choose(name)
        self._paths: dict[str, str] = {}
        self._config = _read(files, entry["Config"])
        config = manifest.parse_json(self._config, f"{description}: the configuration")
        root = config.get("rootfs")
        diff_ids = root.get("diff_ids") if isinstance(root, dict) else None
        if not isinstance(diff_ids, list) or len(diff_ids) != len(entry["Layers"]):
            raise Error(f"{description}: its configuration has other layers than manifest.json")
        layers = []
        for diff_id, path in zip(diff_ids, entry["Layers"]):
            if not digest.is_digest(diff_id):
                raise Error(f"{description}: {diff_id!r} is not a digest")
            packed = _digest(files, path, diff_id)
            self._paths[packed] = path
            layers.append(_entry(manifest.TAR, packed, files.size(path)))
        self._config_digest = digest.digest_of(self._config)
        self._document = {
            "schemaVersion": 2,
            "mediaType": manifest.ACCEPT[-2],
            "config": _entry(manifest.CONFIG, self._config_digest, len(self._config)),
            "layers": layers,
        }

    def _choose(self, name: str) -> dict[str, Any]:
        what = f"{self.description}: manifest.json"
        try:
            entries = json.loads(_read(self._files, "manifest.json"))
        except (ValueError, RecursionError):
            entries = None
        if not isinstance(entries, list) or not all(map(_is_entry, entries)):
            raise Error(f"{what} is not what docker save writes")
        tags = [tag for entry in entries for tag in entry.get("RepoTags") or ()]
        if name.startswith("@") and name[1:].isdecimal() and int(name[1:]) < len(entries):
            return dict(entries[int(name[1:])])
        if name:
            wanted = _full(name)
            entries = [e for e in entries if wanted in map(_full, e.get("RepoTags") or ())]
        if len(entries) != 1:
            which = "no such image" if name else f"{len(entries)} images"
            raise Error(f"{self.description}: {which}; {_there(tags)}")
        return dict(entries[0])

    def manifest(self, digest: str = "") -> Document:
        return Document(json.dumps(self._document).encode(), "", "")

    def blob(self, descriptor: Descriptor) -> Stream:
        if descriptor.digest == self._config_digest:
            return io.BytesIO(self._config)
        return self._files.open(self._paths[descriptor.digest])


def _digest(files: Files, path: str, diff_id: str) -> str:
    """The digest of a layer as it is stored, which is hardly ever compressed."""
    stream = files.open(path)
    try:
        data = stream.read(decompress.CHUNK)
        if not decompress.is_compressed(data):
            return diff_id
        made = digest.new_hash("sha256:")
        while data:
            made.update(data)
            data = stream.read(decompress.CHUNK)
    finally:
        stream.close()
    return f"sha256:{made.hexdigest()}"


def _is_entry(entry: object) -> bool:
    if not isinstance(entry, dict) or not isinstance(entry.get("Config"), str):
        return False
    tags, layers = entry.get("RepoTags") or [], entry.get("Layers")
    return all(
        isinstance(names, list) and all(isinstance(name, str) for name in names)
        for names in (tags, layers)
    )


def _entry(media_type: str, digest: str, size: int) -> dict[str, Any]:
    return {"mediaType": media_type, "digest": digest, "size": size}


def _full(name: str) -> str:
    try:
        return str(parse(name))
    except Error:
        return name


# What stands behind the colon of each transport


def split(text: str) -> tuple[str, str]:
    """PATH[:NAME]."""
    path, _, name = text.partition(":")
    if not path:
        raise UsageError(f"{text!r}: names no file or directory")
    return path, name


def _oci(text: str) -> Source:
    path, tag = split(text)
    return OciLayout(Folder(path), f"oci:{text}", tag)


def _oci_archive(text: str) -> Source:
    path, tag = split(text)
    return OciLayout(Archive(path), f"oci-archive:{text}", tag)


def _docker_archive(text: str) -> Source:
    path, name = split(text)
    return DockerArchive(Archive(path), f"docker-archive:{text}", name)


def _dir(text: str) -> Source:
    return DirLayout(Folder(text), f"dir:{text}")


def _storage(text: str) -> Source:
    """An image in podman's storage, taken out of it into a temporary file."""
    name = f"containers-storage:{text}"
    if not text or text.startswith("-"):
        raise UsageError(f"{name}: names no image")
    save = ["podman", "save", "--quiet", "--format"]
    copy = ["skopeo", "copy", "--quiet", name, "docker-archive:/dev/stdout"]
    failures = []
    for command, oci in (
        ([*save, "docker-archive", text], False),
        ([*save, "oci-archive", text], True),  # of zstd layers podman makes no docker-archive
        (copy, False),
    ):
        if not shutil.which(command[0]):
            continue
        spool = Spool(name)
        size, failure = _run(command, spool)
        if not failure:
            archive = Archive(spool.disk(size, name))
            return OciLayout(archive, name, "") if oci else DockerArchive(archive, name, "@0")
        failures.append(failure)
    raise Error(f"{name}: {failures[0] if failures else 'needs podman or skopeo; install one'}")


def _run(command: list[str], spool: Spool) -> tuple[int, str]:
    """Spool what a program writes; how much that was, and why it failed ("" if it didn't)."""
    size = 0
    with tempfile.TemporaryFile() as messages:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=messages
        )
        try:
            assert process.stdout
            while data := process.stdout.read(decompress.CHUNK):
                spool.write(size, data)
                size += len(data)
            process.wait()
        finally:
            process.kill()
            process.wait()
        messages.seek(0)
        lines = messages.read(64 << 10).decode(errors="replace").strip().splitlines()
    if process.returncode:
        reason = lines[-1] if lines else f"exit status {process.returncode}"
        return 0, f"{command[0]}: {reason}"
    return size, ""


TRANSPORTS: dict[str, Callable[[str], Source]] = {
    "oci": _oci,
    "oci-archive": _oci_archive,
    "docker-archive": _docker_archive,
    "dir": _dir,
    "containers-storage": _storage,
}
