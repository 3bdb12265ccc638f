"""Which file of an image is the disk, and in which format."""

from __future__ import annotations

import shutil
import tarfile
from pathlib import Path
from typing import Any, Callable

import pytest

from tests.registry import rig

MIB = 1 << 20
Tool = Callable[..., Any]
pytestmark = pytest.mark.usefixtures("own_files")


def layered(tmp_path: Path, *layers: bytes) -> str:
    layout = rig.Layout(tmp_path / "layered")
    layout.image(*layers, tag="v1")
    return f"oci:{layout.path}"


def directory(name: str) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type = tarfile.DIRTYPE
    return info


def link(name: str, target: str, kind: bytes) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


OLD = rig.tar(("disk/old", b"old"))


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        ((OLD, rig.tar(("disk/new", b"new"))), b"new"),
        ((OLD, rig.tar(("etc/x", b"x")), rig.tar(("disk2/x", b"x"))), b"old"),
        ((rig.tar(("disk/a", b"a")), OLD, rig.tar(("disk/.wh.old", b""))), b"a"),
        ((rig.tar(("disk/old", b"1")), rig.tar(("./disk/old", b"2"))), b"2"),
        ((rig.tar(("disk/a", b"1"), ("/disk/a", b"22"), ("x", b"y")),), b"22"),
        (
            (rig.tar(("disk/a", b"x" * 200_000), ("disk/a", bytes(150_000) + b"y")),),
            bytes(150_000) + b"y",
        ),
        ((rig.tar(directory("disk/"), ("disk/deep/er/a", b"deep")),), b"deep"),
        ((rig.tar(("images/a", b"hard"), link("disk/a", "images/a", tarfile.LNKTYPE)),), b"hard"),
        (
            (rig.tar(("disk/a", b"a"), link("disk/a", "x", tarfile.SYMTYPE), ("disk/b", b"b")),),
            b"b",
        ),
        ((rig.tar(("disk/../etc/passwd", b"x"), ("disk/a", b"a")),), b"a"),
    ],
    ids=[
        "topmost",
        "lower",
        "whiteout",
        "replaced",
        "appended",
        "zeroed",
        "deep",
        "hard",
        "over",
        "dots",
    ],
)
def test_which_file_is_the_disk(
    layers: tuple[bytes, ...], expected: bytes, written: Tool, tmp_path: Path
) -> None:
    assert written(layered(tmp_path, *layers), "--find-disk") == expected


@pytest.mark.parametrize(
    "upper",
    [
        rig.tar(("disk/.wh.old", b"")),
        rig.tar(("disk/.wh..wh..opq", b"")),
        rig.tar(("./.wh.disk", b"")),
        rig.tar((".wh..wh..opq", b"")),
        rig.tar(link("disk", "elsewhere", tarfile.SYMTYPE)),
        rig.tar(link("disk/old", "elsewhere", tarfile.SYMTYPE)),
        rig.tar(directory("disk/old/")),
    ],
    ids=["file", "opaque", "folder", "root", "link", "file-link", "directory"],
)
def test_hidden_disk_is_not_found(upper: bytes, cdi: Tool, tmp_path: Path) -> None:
    done = cdi(layered(tmp_path, OLD, upper), "--find-disk", "--to-file", "-", status=1)
    assert "no file below disk/" in done.stderr and "--list" in done.stderr


def test_several_disks_are_listed(cdi: Tool, tmp_path: Path) -> None:
    name = layered(tmp_path, rig.tar(("disk/b", b"b"), ("disk/a", b"a")))
    done = cdi(name, "--find-disk", "--to-file", "-", status=1)
    assert "disk/a, disk/b" in done.stderr and done.stdout == ""


def test_sparse_member_is_expanded(raw: Path, written: Tool, run: Tool, tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    shutil.copy(raw, tmp_path / "disk/vm.raw")
    run("fallocate", "--dig-holes", tmp_path / "disk/vm.raw")
    for form in "gnu", "posix":
        archive = tmp_path / "layer.tar"
        run("tar", "-C", tmp_path, f"--format={form}", "--sparse", "-cf", archive, "disk")
        assert archive.stat().st_size < 8 * MIB
        (tmp_path / form).mkdir()
        name = layered(tmp_path / form, archive.read_bytes())
        assert written(name, "--find-disk") == raw.read_bytes()


@pytest.mark.parametrize(("start", "word"), [(b"KDMV", "VMDK"), (b"\x1f\x8b\x08", "gzip")])
def test_other_formats_are_not_taken_for_raw(
    start: bytes, word: str, cdi: Tool, written: Tool, tmp_path: Path
) -> None:
    data = start + bytes(1000)
    name = layered(tmp_path, rig.tar(("disk/x", data)))
    assert word in cdi(name, "--find-disk", "--to-file", "-", status=1).stderr
    assert written(name, "--find-disk", "--raw") == data


def test_qcow2_that_names_a_host_file_is_refused(
    cdi: Tool, raw: Path, run: Tool, tmp_path: Path
) -> None:
    overlay = tmp_path / "overlay"
    run("qemu-img", "create", "-q", "-f", "qcow2", "-b", raw, "-F", "raw", overlay)
    name = layered(tmp_path, rig.tar(("disk/x", overlay.read_bytes())))
    done = cdi(name, "--find-disk", "--to-file", "-", status=1)
    assert "backing file" in done.stderr and done.stdout == ""
