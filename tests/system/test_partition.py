"""--partition and --filter=partition: naked filesystems, and how they stack with --cow."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Callable

import nbd
import pytest

MIB = 1 << 20


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree" / "file").write_bytes(b"content " * 10_000)
    return tmp_path / "tree"


def test_naked_filesystem(
    nbdtool: Callable[..., Any],
    serve: Callable[..., Any],
    run: Callable[..., Any],
    e2fsck: Callable[..., None],
    mount: Callable[..., Any],
    tree: Path,
    tmp_path: Path,
) -> None:
    for target, words in {
        "own": ["linuxdisk", tree, "--partition", "1"],
        "nbdkit's": ["--filter=partition", "linuxdisk", tree, "partition=1"],
    }.items():
        image = tmp_path / target
        nbdtool(*words, "--to-file", image, status=0)
        e2fsck(image)
        with mount(image) as directory:
            content = (directory / "file").read_bytes()
            assert content == (tree / "file").read_bytes()
        with serve(*words) as server:
            assert run("nbdinfo", "--size", server.uri).strip() == str(image.stat().st_size)


def test_missing_partition(nbdtool: Callable[..., Any], tree: Path, tmp_path: Path) -> None:
    for how in ["--to-file", tmp_path / "target"], ["-U", tmp_path / "socket"]:
        done = nbdtool("linuxdisk", tree, "--partition=2", *how, status=1)
        assert "no partition '2'; there is 1 (" in done.stderr
        assert done.stderr.count("\n") == 1
    assert not (tmp_path / "target").exists()
    done = nbdtool("file", tree / "file", "--partition=1", "--to-file", "-", status=1)
    assert done.stderr == f"nbdtool: error: {tree}/file: no partition table (GPT or MBR)\n"


def test_windows_and_overlays_stack(
    serve: Callable[..., Any], run: Callable[..., Any], tmp_path: Path
) -> None:
    """Each layer alone at its place: the partition of an overlay, the overlay of a partition."""
    image = tmp_path / "image"
    with image.open("wb") as file:
        file.truncate(16 * MIB)
    run("sfdisk", "--quiet", image, input="label: gpt\nsize=4MiB\nsize=4MiB, name=data\n")
    before = image.read_bytes()
    for words in ["--cow", "--partition=data"], ["--partition=data", "--cow"]:
        with serve("file", image, *words) as server:
            handle = nbd.NBD()
            handle.connect_uri(server.uri)
            assert handle.get_size() == 4 * MIB
            handle.pwrite(b"changed", 3 * MIB)
            handle.zero(MIB, 100)
            assert handle.pread(9, 3 * MIB - 1) == b"\0changed\0"
            handle.shutdown()
    assert image.read_bytes() == before
    with serve("file", image, "--partition=data") as server:
        handle = nbd.NBD()
        handle.connect_uri(server.uri)
        handle.pwrite(b"changed", 3 * MIB)
        handle.shutdown()
    after = image.read_bytes()
    assert after[8 * MIB : 8 * MIB + 7] == b"changed"
    assert after[: 8 * MIB] + before[8 * MIB : 8 * MIB + 7] + after[8 * MIB + 7 :] == before
