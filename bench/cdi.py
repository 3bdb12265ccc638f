"""The disk in a container image, beside nbdkit's plugin and what people do by hand."""

from __future__ import annotations

import atexit
import contextlib
import gzip
import hashlib
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from functools import cache, partial
from pathlib import Path

from bench.programs import MIB, NBDTOOL, peak_memory, run, seconds
from bench.race import MEBIBYTES, SECONDS, Measure, Race, cost, faster, row

NBDKIT, BY_HAND = "nbdkit cdi", "skopeo, gunzip, tar"
PIPELINE = "nbdkit cdi, tar filter, qemu-img"
TREES = ("/usr/bin", "/usr/lib/python3", "/usr/share")
OCI = "application/vnd.oci.image."

# What nbdkit runs: it asks podman for a format that has another meaning nowadays.
SHIM = """#!/bin/sh
for word; do
    shift
    [ "$word" != oci-dir ] || word=docker-dir
    set -- "$@" "$word"
done
PATH=${PATH#*:}
exec podman "$@"
"""


def filesystem(target: Path) -> None:
    """A disk of 1 GiB, with as many programs and documents as make a qcow2 of some 840 MiB."""
    tree = target.with_suffix(".tree")
    tree.mkdir()
    left = 800 * MIB
    for source in TREES:
        for folder, _, names in os.walk(source):
            for name in names:
                path = Path(folder, name)
                if left <= 0 or path.is_symlink() or not path.is_file():
                    continue
                copy = tree / str(path)[1:]
                copy.parent.mkdir(parents=True, exist_ok=True)
                with contextlib.suppress(OSError):
                    os.link(path, copy) if os.stat(tree).st_dev == os.stat(path).st_dev else (
                        shutil.copyfile(path, copy)
                    )
                    left -= -(-path.stat().st_size // 4096) * 4096
    run("mke2fs", "-q", "-F", "-t", "ext4", "-N", "200000", "-d", tree, target, "1G")
    shutil.rmtree(tree)


def blob(layout: Path, data: Path, media_type: str) -> dict[str, object]:
    """Move a file into an OCI layout; its descriptor."""
    with data.open("rb") as file:
        made = hashlib.sha256()
        while piece := file.read(MIB):
            made.update(piece)
    size = data.stat().st_size
    folder = layout / "blobs/sha256"
    folder.mkdir(parents=True, exist_ok=True)
    data.rename(folder / made.hexdigest())
    return {"mediaType": media_type, "digest": f"sha256:{made.hexdigest()}", "size": size}


def layout(folder: Path, disk: Path) -> None:
    """An OCI layout with one image, whose one gzip layer has the disk."""
    folder.mkdir()
    layer = folder / "layer.tar"
    run("tar", "-C", disk.parent, "--transform=s,.*,disk/downloaded,", "-cf", layer, disk.name)
    diff_id = run("sha256sum", layer).split()[0]
    with layer.open("rb") as source, gzip.open(folder / "layer", "wb", 6) as target:
        shutil.copyfileobj(source, target, MIB)
    layer.unlink()
    document = folder / "document"
    descriptor = blob(folder, folder / "layer", f"{OCI}layer.v1.tar+gzip")
    root = {"type": "layers", "diff_ids": [f"sha256:{diff_id}"]}
    document.write_text(json.dumps({"architecture": "amd64", "os": "linux", "rootfs": root}))
    config = blob(folder, document, f"{OCI}config.v1+json")
    content = {"schemaVersion": 2, "config": config, "layers": [descriptor]}
    document.write_text(json.dumps({**content, "mediaType": f"{OCI}manifest.v1+json"}))
    manifest = blob(folder, document, f"{OCI}manifest.v1+json")
    (folder / "index.json").write_text(json.dumps({"schemaVersion": 2, "manifests": [manifest]}))
    (folder / "oci-layout").write_text('{"imageLayoutVersion":"1.0.0"}')


@cache
def image_layout(parent: Path, *options: str) -> Path:
    """An OCI layout, made once, with a qcow2 that qemu-img makes with the options."""
    # Removed when the program ends.
    kept = tempfile.TemporaryDirectory(prefix="nbdtool-bench-", dir=parent)
    atexit.register(kept.cleanup)
    raw, disk = Path(kept.name, "disk.raw"), Path(kept.name, "disk.qcow2")
    filesystem(raw)
    run("qemu-img", "convert", "-O", "qcow2", *options, raw, disk)
    raw.unlink()
    layout(Path(kept.name, "layout"), disk)
    disk.unlink()
    return Path(kept.name, "layout")


@contextlib.contextmanager
def registry(directory: Path, *options: str) -> Iterator[str]:
    """A local registry with the image, of a qcow2 that qemu-img makes with the options."""
    source = image_layout(directory.parent, *options)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        host = f"127.0.0.1:{listener.getsockname()[1]}"
    settings = {
        "version": "0.1",
        "log": {"level": "error"},
        "storage": {"filesystem": {"rootdirectory": str(directory / "storage")}},
        "http": {"addr": host},
    }
    (directory / "registry.yml").write_text(json.dumps(settings))
    (directory / "registries.conf").write_text(f'[[registry]]\nlocation="{host}"\ninsecure=true\n')
    (directory / "storage.conf").write_text(
        f'[storage]\ndriver="overlay"\ngraphroot="{directory}/podman"\nrunroot="{directory}/run"\n'
    )
    (directory / "tmp").mkdir()
    # All contestants work on the filesystem that the benchmark was given, and on no other.
    own = {
        "TMPDIR": str(directory / "tmp"),
        "CONTAINERS_REGISTRIES_CONF": str(directory / "registries.conf"),
        "CONTAINERS_STORAGE_CONF": str(directory / "storage.conf"),
    }
    before = dict(os.environ)
    os.environ.update(own)
    shim = directory / "bin/podman"
    shim.parent.mkdir()
    shim.write_text(SHIM)
    shim.chmod(0o755)
    process = subprocess.Popen(
        ["docker-registry", "serve", directory / "registry.yml"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        while True:
            with contextlib.suppress(OSError):
                port = int(host.partition(":")[2])
                socket.create_connection(("127.0.0.1", port)).close()
                break
            time.sleep(0.02)
        image = f"{host}/bench/disk:v1"
        run("skopeo", "copy", "--dest-tls-verify=false", f"oci:{source}",
            f"docker://{image}")  # fmt: skip
        yield image
    finally:
        process.terminate()
        process.wait()
        os.environ.clear()
        os.environ.update(before)
        subprocess.run(["umount", directory / "podman/overlay"], stderr=subprocess.DEVNULL)


def ready(image: str) -> float:
    """Seconds until the disk could be used, start and end of the program included."""
    return seconds(NBDTOOL, "cdi", image, "--find-disk", "--run", "true")


def nbdkit(directory: Path, image: str, *words: str) -> float:
    """The same with nbdkit; the image isn't on the machine before."""
    environment = {**os.environ, "PATH": f"{directory}/bin:{os.environ['PATH']}"}
    try:
        return seconds("nbdkit", "-U", "-", "cdi", image, *words, env=environment)
    finally:
        run("podman", "rmi", "-f", image)


def by_hand(directory: Path, image: str) -> float:
    """skopeo copy, and the one layer unpacked."""
    folder = directory / "tmp/by-hand"
    script = (
        f"mkdir {folder} && cd {folder} && skopeo copy -q --src-tls-verify=false"
        f" docker://{image} oci:copy && gunzip -c"
        ' "$(ls -S copy/blobs/sha256/* | head -n 1)" > layer.tar && tar xf layer.tar'
    )
    try:
        return seconds("sh", "-ec", script)
    finally:
        shutil.rmtree(folder)


@row(
    "cdi-plain",
    "an image's qcow2 of plain clusters, 840 MiB in a gzip layer, until ready",
    {NBDKIT: faster(3.5), BY_HAND: faster(2.5)},
    rounds=3,
)
def plain(directory: Path) -> Iterator[Race]:
    with registry(directory) as image:
        contestants: dict[str, Measure] = {
            "nbdtool": partial(ready, image),
            NBDKIT: partial(nbdkit, directory, image, "--run", "true"),
            BY_HAND: partial(by_hand, directory, image),
        }
        yield Race(SECONDS, contestants)


@row("cdi-isal", "the same with isal", {NBDKIT: faster(7)}, rounds=3)
def isal(directory: Path) -> Iterator[Race]:
    modules = directory / "modules"
    python = "/usr/bin/python3"
    run(sys.executable, "-m", "pip", "install", "-q", "--target", modules, "isal")

    def with_isal(image: str) -> float:
        environment = {**os.environ, "PYTHONPATH": str(modules)}
        words = ("cdi", image, "--find-disk", "--run", "true")
        return seconds(python, NBDTOOL, *words, env=environment)

    with registry(directory) as image:
        contestants: dict[str, Measure] = {
            "nbdtool": partial(with_isal, image),
            NBDKIT: partial(nbdkit, directory, image, "--run", "true"),
        }
        yield Race(SECONDS, contestants)


@row(
    "cdi-compressed",
    "an image's qcow2 of compressed clusters in a gzip layer, until ready",
    {NBDKIT: faster(6)},
    rounds=3,
)
def compressed(directory: Path) -> Iterator[Race]:
    with registry(directory, "-c") as image:
        contestants: dict[str, Measure] = {
            "nbdtool": partial(ready, image),
            NBDKIT: partial(nbdkit, directory, image, "--run", "true"),
        }
        yield Race(SECONDS, contestants)


@row("cdi-to-file", "an image's disk to a raw file", {PIPELINE: faster(2.5)}, rounds=3)
def to_file(directory: Path) -> Iterator[Race]:
    target = directory / "tmp/disk.img"

    def ours(image: str) -> float:
        target.unlink(missing_ok=True)
        return seconds(NBDTOOL, "cdi", image, "--find-disk", "--to-file", target)

    def theirs(image: str) -> float:
        target.unlink(missing_ok=True)
        convert = f'qemu-img convert -f qcow2 -O raw "$uri" {target}'
        words = ("--filter=tar", "tar-entry=disk/downloaded", "--run", convert)
        return nbdkit(directory, image, *words)

    with registry(directory) as image:
        yield Race(SECONDS, {"nbdtool": partial(ours, image), PIPELINE: partial(theirs, image)})


@row(
    "cdi-space",
    "extra space on disk while the disk of an image is served",
    {"the file in the image": cost(1.02)},
    rounds=1,
)
def space(directory: Path) -> Iterator[Race]:
    with registry(directory) as image:
        yield Race(
            MEBIBYTES,
            {
                "nbdtool": cache(lambda: spooled(image, "st_blocks") / 2048),
                "the file in the image": cache(lambda: spooled(image, "st_size") / MIB),
            },
        )


def spooled(image: str, what: str) -> int:
    """Of the files without a name that a server holds: what `what` says of them together."""
    script = 'for fd in /proc/$PPID/fd/*; do stat -Lc "%F %b %s %h" "$fd"; done; true'
    total = 0
    for line in run(NBDTOOL, "cdi", image, "--find-disk", "--run", script).splitlines():
        *_, blocks, size, links = line.split()
        if line.startswith("regular") and links == "0":
            total += int(blocks if what == "st_blocks" else size)
    return total


@row("cdi-memory", "peak memory", {"the most allowed": cost(1)}, rounds=3)
def memory(directory: Path) -> Iterator[Race]:
    with registry(directory) as image:
        words = (NBDTOOL, "cdi", image, "--find-disk", "--run", "true")
        yield Race(
            MEBIBYTES,
            {
                "nbdtool": lambda: peak_memory(*words) / MIB,
                "the most allowed": lambda: 80,
            },
        )
