"""Making a disk of a directory, beside mke2fs -d."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from bench.programs import (
    MIB,
    NBDTOOL,
    command,
    fio,
    peak_memory,
    random_file,
    run,
    seconds,
    serving,
    uri,
)
from bench.race import BYTES, MEBIBYTES, RATE, SECONDS, Measure, Race, cost, faster, row

GIB = 1 << 30
TREE = Path("/usr/share")


def survey(tree: Path) -> tuple[int, int]:
    """The number of entries of a tree, and the KiB that their contents take at most."""
    entries = kib = 0
    for folder, folders, files in os.walk(tree):
        entries += len(folders) + len(files)
        kib += 4 * len(folders)
        for name in files:
            kib += (os.lstat(os.path.join(folder, name)).st_size + 4095) // 4096 * 4
    return entries, kib


def mke2fs(tree: Path, image: Path, kind: str) -> float:
    """Seconds for mke2fs to make an image with room for all, whose size and inodes are given."""
    entries, kib = survey(tree)
    image.unlink(missing_ok=True)
    size = int((kib + entries // 2) * 1.1) + (64 << 10)
    inodes = entries + 1000
    with image.open("wb") as file:
        file.truncate(size << 10)
    options = ("-q", "-F", "-t", kind, "-b", "4096", "-N", str(inodes), "-d", tree)
    return seconds("mke2fs", *options, image, f"{size}k")


def ready(tree: Path, kind: str = "ext2") -> float:
    """Seconds until a server of the tree could be used, start and end of the program included."""
    return seconds(NBDTOOL, "linuxdisk", tree, f"type={kind}", "--run", "true")


def to_file(tree: Path, image: Path, kind: str = "ext2") -> float:
    image.unlink(missing_ok=True)
    return seconds(NBDTOOL, "linuxdisk", tree, f"type={kind}", "--to-file", image)


def against_mke2fs(ours: Measure, tree: Path, directory: Path, kind: str) -> Race:
    theirs = partial(mke2fs, tree, directory / "peer", kind)
    return Race(SECONDS, {"nbdtool": ours, f"mke2fs -t {kind} -d": theirs})


def rows_for_types(name: str, what: str, goals: dict[str, float]) -> None:
    """The rows `name`-ext2 and `name`-ext4; trees that aren't there are made."""
    for kind, goal in goals.items():

        @row(
            f"{name}-{kind}",
            f"{what}, {kind}",
            {f"mke2fs -t {kind} -d": faster(goal)},
            rounds=5 if name == "share-ready" else 3,
        )
        def race(directory: Path, kind: str = kind) -> Iterator[Race]:
            tree = TREES[name](directory) if name in TREES else TREE
            ours = partial(ready, tree, kind)
            if name == "share-to-file":
                ours = partial(to_file, tree, directory / "ours", kind)
            yield against_mke2fs(ours, tree, directory, kind)


def tiny_files(directory: Path) -> Path:
    """200,000 files of 100 bytes in 200 directories."""
    tree = directory / "tree"
    for number in range(200):
        folder = tree / f"{number:03}"
        folder.mkdir(parents=True)
        for name in range(1000):
            (folder / f"file{name}").write_bytes(b"x" * 100)
    return tree


def one_large_file(directory: Path) -> Path:
    tree = directory / "tree"
    tree.mkdir()
    random_file(tree / "large", 4 * GIB)
    return tree


TREES = {"tiny-ready": tiny_files, "large-ready": one_large_file}
rows_for_types("share-ready", "/usr/share ready to serve", {"ext2": 12, "ext4": 40})
rows_for_types("tiny-ready", "200,000 tiny files ready to serve", {"ext2": 2, "ext4": 2.5})
rows_for_types("large-ready", "a file of 4 GiB ready to serve", {"ext2": 60, "ext4": 200})
rows_for_types("share-to-file", "/usr/share `--to-file`", {"ext2": 7, "ext4": 20})


@row("share-tar", "/usr/share ready to serve", {"tar cf - \\| wc -c": faster(1)})
def share_tar(directory: Path) -> Iterator[Race]:
    tar = partial(seconds, "sh", "-c", 'tar cf - -C "$0" . | wc -c', TREE)
    yield Race(SECONDS, {"nbdtool": partial(ready, TREE), "tar cf - \\| wc -c": tar})


@row("share-memory", "peak memory for /usr/share", {"a limit": cost(1)}, rounds=3)
def share_memory(directory: Path) -> Iterator[Race]:
    def ours() -> float:
        return peak_memory(NBDTOOL, "linuxdisk", TREE, "--run", "true") / MIB

    yield Race(MEBIBYTES, {"nbdtool": ours, "a limit": lambda: 150.0})


@row("tiny-memory", "peak memory per entry, 200,000 tiny files", {"a limit": cost(1)}, rounds=3)
def tiny_memory(directory: Path) -> Iterator[Race]:
    tree = tiny_files(directory)
    entries, _ = survey(tree)

    def ours() -> float:
        return peak_memory(NBDTOOL, "linuxdisk", tree, "--run", "true") / entries

    yield Race(BYTES, {"nbdtool": ours, "a limit": lambda: 1536.0})


@row(
    "reflink-space",
    "space that `--to-file` of 1 GiB takes, on one xfs",
    {"a limit": cost(1)},
    rounds=3,
)
def reflink_space(directory: Path) -> Iterator[Race]:
    image, mounted = directory / "image", directory / "mounted"
    with image.open("wb") as file:
        file.truncate(6 * GIB)
    run("mkfs.xfs", "-q", image)
    mounted.mkdir()
    with contextlib.ExitStack() as stack:
        run("mount", "-o", "loop", image, mounted)
        stack.callback(run, "umount", mounted)
        tree = mounted / "tree"
        tree.mkdir()
        for number in range(16):
            random_file(tree / str(number), 64 * MIB)
        run("sync", "-f", mounted)

        def used() -> int:
            usage = os.statvfs(mounted)
            return (usage.f_blocks - usage.f_bfree) * usage.f_frsize

        def extra() -> float:
            (mounted / "disk").unlink(missing_ok=True)
            run("sync", "-f", mounted)
            before = used()
            to_file(tree, mounted / "disk")
            run("sync", "-f", mounted)
            return (used() - before) / MIB

        yield Race(MEBIBYTES, {"nbdtool": extra, "a limit": lambda: 102.4})


@row(
    "share-fio", "fio, 4 KiB random reads, depth 16, /usr/share's disk", {"nbdkit file": faster(1)}
)
def share_fio(directory: Path) -> Iterator[Race]:
    image = directory / "peer"
    mke2fs(TREE, image, "ext2")
    ours, theirs = directory / "ours", directory / "theirs"
    with contextlib.ExitStack() as stack:
        words = [NBDTOOL, "linuxdisk", str(TREE), "-f", "-U", str(ours)]
        stack.enter_context(serving(words, ours))
        stack.enter_context(serving(command("nbdkit file", image, theirs), theirs))
        yield Race(
            RATE,
            {
                name: partial(fio, uri(directory, path.name), "randread", 16)
                for name, path in (("nbdtool", ours), ("nbdkit file", theirs))
            },
        )
