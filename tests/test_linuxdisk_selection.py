"""linuxdisk: what of the tree is taken, whose it becomes, and the same bytes each time."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from nbdtool.errors import Error, UsageError
from tests.ext import oracle


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    tree = tmp_path / "tree"
    (tree / "sub" / "deep").mkdir(parents=True)
    for name in ("a.txt", "b.o", "sub/c.txt", "sub/d.o", "sub/deep/e.o"):
        (tree / name).write_text(name)
        os.chown(tree / name, 1000, 2000)
    return tree


@pytest.fixture
def contents(
    tmp_path: Path, partition: Callable[..., Any], mount: Callable[..., Any], e2fsck: Any
) -> Callable[..., dict[str, Any]]:
    """contents(argument, ...) -> {path: entry} of the disk's filesystem."""

    def contents(*arguments: Any) -> dict[str, Any]:
        image = tmp_path / "image"
        oracle.write_disk(oracle.open_disk(*arguments), image)
        offset, size = partition(image)
        e2fsck(image, offset)
        with mount(image, offset, size) as mounted:
            return {os.fsdecode(path): entry for path, entry in oracle.entries(mounted).items()}

    return contents


Contents = Callable[..., dict[str, Any]]


@pytest.mark.parametrize(
    ("globs", "left"),
    [
        (["*.o"], {"a.txt", "sub", "sub/c.txt", "sub/deep"}),
        (["deep"], {"a.txt", "b.o", "sub", "sub/c.txt", "sub/d.o"}),
        (["sub/*.o"], {"a.txt", "b.o", "sub", "sub/c.txt", "sub/deep"}),
        (["/sub", "b.?"], {"a.txt"}),
        (["/c.txt"], {"a.txt", "b.o", "sub", "sub/c.txt", "sub/d.o", "sub/deep", "sub/deep/e.o"}),
    ],
)
def test_exclude(tree: Path, contents: Contents, globs: list[str], left: set[str]) -> None:
    assert contents(tree, *(f"exclude={glob}" for glob in globs)).keys() == left


@pytest.mark.parametrize(
    ("option", "owner"),
    [("--all-root", (0, 0)), ("chown=5:70000", (5, 70000)), ("chown=:7", (1000, 7))],
)
def test_owners(tree: Path, contents: Contents, option: str, owner: tuple[int, int]) -> None:
    assert contents(tree, option)["a.txt"][1] == owner


def test_mtime(tree: Path, contents: Contents) -> None:
    times = {entry[2] for entry in contents(tree, "mtime=2026-01-02T03:04:05Z").values()}
    assert times == {1767323045 * 10**9}
    assert contents(tree, "mtime=@77")["a.txt"][2] == 77 * 10**9


def test_other_filesystems(
    tree: Path, contents: Contents, run: Callable[..., Any], capfd: pytest.CaptureFixture[str]
) -> None:
    (tree / "proc").mkdir()
    (tree / "tmp").mkdir()
    run("mount", "-t", "tmpfs", "none", tree / "tmp")
    try:
        run("mount", "-t", "proc", "none", tree / "proc")
        try:
            (tree / "tmp" / "file").touch()
            found = contents(tree)
            assert "tmp/file" in found
            assert [path for path in found if path.startswith("proc")] == ["proc"]
            assert "proc: left out what is in it, a proc filesystem" in capfd.readouterr().err
            found = contents(tree, "--one-file-system")
            assert "tmp/file" not in found
            assert "tmp" in found
        finally:
            run("umount", tree / "proc")
    finally:
        run("umount", tree / "tmp")


def as_nobody(*arguments: Any) -> subprocess.CompletedProcess[str]:
    words = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]
    words += [sys.executable, "-m", "nbdtool", "linuxdisk", *map(str, arguments)]
    return subprocess.run(words, capture_output=True, text=True, check=False, cwd=Path.cwd())


@pytest.fixture
def open_place(tmp_path: Path) -> Iterator[Path]:
    """A directory that every user may come to."""
    for path in (tmp_path, *tmp_path.parents):
        if path.stat().st_mode & 0o005 != 0o005:
            path.chmod(path.stat().st_mode | 0o055)
    yield tmp_path


def test_unreadable_files_are_named(tree: Path, open_place: Path) -> None:
    for number in range(12):
        (tree / f"secret{number:02}").write_text("x")
        (tree / f"secret{number:02}").chmod(0)
    (tree / "sub").chmod(0)
    (open_place / "out").mkdir(mode=0o777)
    (open_place / "out").chmod(0o777)
    done = as_nobody(tree, "--to-file", open_place / "out" / "image")
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "13 files" in done.stderr and "and 3 more" in done.stderr
    assert f"{tree}/secret00: Permission denied" in done.stderr
    assert not (open_place / "out" / "image").exists()
    done = as_nobody(tree, "--skip-unreadable", "--to-file", open_place / "out" / "image")
    assert done.returncode == 0
    assert "secret00" in done.stderr
    listing = subprocess.run(
        ["debugfs", "-R", "ls -p", f"{open_place}/out/image?offset={1 << 20}"],
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    assert "/a.txt/" in listing and "/sub/" in listing and "secret" not in listing


def test_later_directories_win(tmp_path: Path, contents: Contents) -> None:
    for layer, names in (("1", "same one d/x d/y file/z"), ("2", "same two d/y d/z file one/q")):
        for name in names.split():
            path = tmp_path / layer / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"{layer} {name}")
    (tmp_path / "1" / "d").chmod(0o700)
    (tmp_path / "2" / "d").chmod(0o751)
    os.setxattr(tmp_path / "1" / "d", "user.first", b"1")
    os.setxattr(tmp_path / "1" / "one", "user.first", b"1")
    expected = tmp_path / "expected"
    shutil.copytree(tmp_path / "1", expected, symlinks=True)
    for name in ("one", "file"):
        shutil.rmtree(expected / name) if (expected / name).is_dir() else (expected / name).unlink()
    shutil.copytree(tmp_path / "2", expected, symlinks=True, dirs_exist_ok=True)
    os.removexattr(expected / "d", "user.first")
    found = contents(tmp_path / "1", tmp_path / "2")
    wanted = {os.fsdecode(path): entry for path, entry in oracle.entries(expected).items()}
    assert {path: (entry[0], entry[5], entry[6]) for path, entry in found.items()} == {
        path: (entry[0], entry[5], entry[6]) for path, entry in wanted.items()
    }


def test_whiteouts(tmp_path: Path, contents: Contents) -> None:
    lower, upper = tmp_path / "lower", tmp_path / "upper"
    for name in ("gone", "kept", "opaque/old", "both/old", "tree/a/b"):
        (lower / name).parent.mkdir(parents=True, exist_ok=True)
        (lower / name).write_text("lower")
    for name in (".wh.gone", ".wh.never", "opaque/.wh..wh..opq", "opaque/new", "both/new",
                 ".wh.both", ".wh.tree"):  # fmt: skip
        (upper / name).parent.mkdir(parents=True, exist_ok=True)
        (upper / name).write_text("upper")
    left = {"kept", "opaque", "opaque/new", "both", "both/new"}
    assert contents(lower, upper, "--whiteouts").keys() == left
    assert ".wh.gone" in contents(lower, upper)


@pytest.mark.slow
def test_reproducible(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Callable[..., Any]
) -> None:
    """The same bytes from files made in another order, under each Python, at another time."""
    names = [f"{letter}{number}" for letter in "abc" for number in range(40)]
    for place, order in (("one", names), ("two", random.Random(3).sample(names, len(names)))):
        for name in order:
            path = tmp_path / place / name[0] / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(name * 1000)
            os.utime(path, ns=(0, int(name[1:]) * 10**17))
        for path in (tmp_path / place).rglob("*"):
            if path.is_dir():
                os.utime(path, ns=(0, 10**18))
        os.setxattr(tmp_path / place / "a" / "a1", "user.one", b"1")
        os.setxattr(tmp_path / place / "a" / "a1", "user.two", b"2")
        os.utime(tmp_path / place, ns=(0, 10**18))
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    pythons = [sys.executable]
    root = subprocess.run(["pyenv", "root"], capture_output=True, text=True, check=True).stdout
    for version in ("3.9", "3.13"):
        pythons += map(str, sorted(Path(root.strip()).glob(f"versions/{version}*/bin/python3")))
    assert len(pythons) >= 3
    for kind in ("ext2", "ext4"):
        images = set()
        for python in pythons:
            for place in ("one", "two"):
                target = tmp_path / "image"
                run(python, "-m", "nbdtool", "linuxdisk", tmp_path / place, f"type={kind}",
                    "--to-file", target)  # fmt: skip
                images.add(target.read_bytes())
        assert len(images) == 1
    (tmp_path / "two" / "a" / "a1").chmod(0o600)
    run(sys.executable, "-m", "nbdtool", "linuxdisk", tmp_path / "two", "--to-file", target)
    assert oracle.dumpe2fs(oracle.extract_partition(target, 1 << 20, 1 << 20))["Filesystem created"]
    assert target.read_bytes()[(1 << 20) + 1024 + 0x68 :][:16] not in images.pop()


def test_reproducible_in_other_surroundings(
    tree: Path, tmp_path: Path, nbdtool: Callable[..., Any]
) -> None:
    """No umask, time zone, language, home or order of hashes leaves a trace."""
    (tree / "größe").write_text("a file")
    images = []
    for number, (umask, source, surroundings) in enumerate((
        (0o022, tree, {}),
        (0o777, tree, {"TZ": "Asia/Tokyo", "LC_ALL": "C", "HOME": "/nowhere"}),
        (0o000, os.path.relpath(tree), {"TZ": "UTC-9", "LC_ALL": "C.UTF-8", "PYTHONHASHSEED": "7"}),
    )):  # fmt: skip
        image = tmp_path / f"image{number}"
        nbdtool(
            *("linuxdisk", source, "type=ext4", "chown=1:2", "mtime=2026-01-02T03:04:05Z"),
            *("--to-file", image), status=0, umask=umask,
            env={**os.environ, "SOURCE_DATE_EPOCH": "1700000000", **surroundings},
        )  # fmt: skip
        images.append(image.read_bytes())
    assert images[1:] == images[:-1]


def test_different_identities_without_a_fixed_time(tree: Path, tmp_path: Path) -> None:
    uuids = set()
    for number in range(2):
        image = tmp_path / f"image{number}"
        oracle.write_disk(oracle.open_disk(tree), image)
        table = json.loads(subprocess.run(
            ["sfdisk", "--json", image], capture_output=True, check=True
        ).stdout)["partitiontable"]  # fmt: skip
        uuids |= {table["id"], table["partitions"][0]["uuid"]}
    assert len(uuids) == 4


def test_date_that_no_filesystem_holds(
    contents: Contents, capfd: pytest.CaptureFixture[str], run: Callable[..., Any], tmp_path: Path
) -> None:
    with (tmp_path / "xfs").open("wb") as file:
        file.truncate(400 << 20)
    run("mkfs.xfs", "-q", tmp_path / "xfs")
    (tmp_path / "tree").mkdir()
    run("mount", "-o", "loop", tmp_path / "xfs", tmp_path / "tree")
    try:
        (tmp_path / "tree" / "late").touch()
        os.utime(tmp_path / "tree" / "late", (16000000000, 16000000000))
        stored = (tmp_path / "tree" / "late").stat().st_mtime_ns
        found = contents(tmp_path / "tree")
        latest = ((1 << 34) - (1 << 31)) * 10**9 - 1
        assert found["late"][2] == min(stored, latest)
        assert ("late" in capfd.readouterr().err) is (stored > latest)
    finally:
        run("umount", tmp_path / "tree")


@pytest.mark.parametrize(
    "option",
    ["type=ext5", "type=xfs", "type=ext2 -L x; touch pwned", "size=abc", "block-size=512", "uuid=x",
     "part-type=nothing", "chown=root", "mtime=yesterday", "reserved=90", "inodes=-1"],
)  # fmt: skip
def test_wrong_usage(tree: Path, option: str) -> None:
    with pytest.raises(UsageError):
        oracle.open_disk(tree, option)


def test_wrong_epoch(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "now")
    with pytest.raises(Error, match="SOURCE_DATE_EPOCH"):
        oracle.open_disk(tree)
