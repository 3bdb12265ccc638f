"""The main jobs in short: run under each Python, with NBDTOOL naming the executable."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, Callable

import pytest


@pytest.fixture
def tree(tmp_path: Path, random_file: Callable[..., Path]) -> Path:
    tree = tmp_path / "tree"
    (tree / "directory").mkdir(parents=True)
    random_file(tree / "directory" / "random", 300_000)
    (tree / "symlink").symlink_to("directory/random")
    os.link(tree / "directory" / "random", tree / "link")
    (tree / "empty").touch(mode=0o640)
    return tree


def test_version(nbdtool: Callable[..., Any]) -> None:
    assert nbdtool("--version", status=0).stdout.startswith("nbdtool 0.")


def test_file_over_nbd(
    serve: Callable[..., Any],
    run: Callable[..., Any],
    random_file: Callable[..., Path],
    tmp_path: Path,
) -> None:
    image = random_file(tmp_path / "image", 3 << 20)
    os.truncate(image, 10 << 20)
    with serve("file", image, "-r") as server:
        info = json.loads(run("nbdinfo", "--json", server.uri))
        assert info["exports"][0]["export-size"] == 10 << 20
        assert json.loads(run("nbdinfo", "--map", "--json", server.uri)) == [
            {"offset": 0, "length": 3 << 20, "type": 0, "description": "data"},
            {"offset": 3 << 20, "length": 7 << 20, "type": 3, "description": "hole,zero"},
        ]
        run("nbdcopy", server.uri, tmp_path / "copy")
        run("qemu-img", "compare", "-f", "raw", "-F", "raw", server.uri, image)
    assert (tmp_path / "copy").read_bytes() == image.read_bytes()


def test_linuxdisk_over_nbd_and_to_file(
    tree: Path,
    serve: Callable[..., Any],
    nbdtool: Callable[..., Any],
    run: Callable[..., Any],
    partition: Callable[..., tuple[int, int]],
    e2fsck: Callable[..., None],
    mount: Callable[..., Any],
    tmp_path: Path,
) -> None:
    written, served = tmp_path / "written", tmp_path / "served"
    nbdtool("linuxdisk", tree, "--to-file", written, status=0)
    with serve("linuxdisk", tree) as server:
        assert json.loads(run("nbdinfo", "--json", server.uri))["exports"][0]["is_read_only"]
        run("nbdcopy", server.uri, served)
    for image in written, served:
        offset, size = partition(image)
        e2fsck(image, offset)
        with mount(image, offset, size) as mounted:
            excluded = "--exclude=lost+found"
            run("diff", "--recursive", "--no-dereference", excluded, tree, mounted)
