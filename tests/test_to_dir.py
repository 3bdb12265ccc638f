"""--to-dir: each export to a file of its own, whatever it is called, and nothing outside."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
from argparse import Namespace
from pathlib import Path
from typing import Any, Callable

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from nbdtool import __main__, cli, copying, progress
from nbdtool.copying import file_name
from nbdtool.disk import Disk, Span, ZeroSpan
from nbdtool.errors import UsageError
from tests.span_disk import SpanDisk

HOSTILE = [
    "..", ".", "/", "//", "", "../../etc/passwd", "/etc/passwd", ".bashrc", "-rf", "~root", "a/b",
    "a+b", "/a/b", "a%2Fb", "a\0b", "a\nb", "\x1b[31m", "disk", "%64isk", "ä", "\udcff", "a b",
    "$(id)",
]  # fmt: skip
NAMES = st.one_of(st.sampled_from(HOSTILE), st.text(st.sampled_from("/.+%-~_a2F\0\nä\udc80")))


@pytest.mark.parametrize(
    ("export", "name"),
    [
        ("", "disk.img"),
        ("vda", "vda.img"),
        ("/dev/sda1", "dev+sda1.img"),
        ("/dev/fedora-vg/lv_root", "dev+fedora-vg+lv_root.img"),
        ("My disk", "My%20disk.img"),
        ("..", "%2E..img"),
        ("../x", "%2E.%2Fx.img"),
        ("disk", "%64isk.img"),
    ],
)
def test_names(export: str, name: str) -> None:
    assert file_name(export) == name


@given(NAMES, NAMES)
@example("/a/b", "a+b")
@example("/a/b", "a/b")
@example("a", "/a")
def test_no_name_leads_astray_and_no_two_are_the_same(one: str, other: str) -> None:
    name = file_name(one)
    assert name.isascii() and name.isprintable() and not set(name) & set("/ \\'\"$;&|<>()*?[]!#`")
    assert name[0] not in ".-~" and name.endswith(".img") and len(name) > 4
    assert (name == file_name(other)) == (one == other)


class FailingDisk(SpanDisk):
    def read(self, offset: int, length: int) -> list[Span]:
        raise OSError(5, "the source broke")


@pytest.fixture
def write(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[dict[str, Disk], str], int]:
    """write(disks, *options): what --to-dir=tmp_path/dir does with them; the exit status."""

    def write(disks: dict[str, Disk], *words: str) -> int:
        monkeypatch.setattr(cli, "open_disks", lambda command, args: disks)
        monkeypatch.setattr(progress, "_status", None)
        _, args = cli.parse([f"--to-dir={tmp_path}/dir", "file", "x", *words])
        cli.settle(args)
        return __main__._write("file", args)

    return write


def some_disks(count: int = 3) -> dict[str, Disk]:
    return {f"vd{c}": SpanDisk([c.encode() * 5000, ZeroSpan(1 << 20)]) for c in "abcdef"[:count]}


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_each_export_has_its_file(write: Any, tmp_path: Path) -> None:
    disks = some_disks()
    expected = {f"{name}.img": disk.content() for name, disk in disks.items()}
    assert write(disks) == 0
    assert contents(tmp_path / "dir") == expected
    (tmp_path / "dir" / "vda.img").write_bytes(b"old")
    (tmp_path / "dir" / "other").write_bytes(b"other")
    assert write(disks, "--verify") == 0
    assert contents(tmp_path / "dir") == {**expected, "other": b"other"}


def test_one_disk_too(write: Any, tmp_path: Path) -> None:
    assert write({"": SpanDisk([b"x" * 512])}) == 0
    assert contents(tmp_path / "dir") == {"disk.img": b"x" * 512}


def test_hostile_names_stay_inside(write: Any, tmp_path: Path) -> None:
    before = os.listdir("/tmp")
    disks: dict[str, Disk] = {name: SpanDisk([name.encode("utf-8", "surrogateescape") * 600])
                              for name in HOSTILE if name}  # fmt: skip
    assert write(disks) == 0
    assert sorted(contents(tmp_path / "dir").values()) == sorted(
        disk.content() for disk in disks.values()
    )
    assert os.listdir(tmp_path) == ["dir"]
    assert set(os.listdir("/tmp")) - set(before) == set()


def test_nothing_is_followed_out(write: Any, tmp_path: Path, capfd: Any) -> None:
    folder = tmp_path / "dir"
    folder.mkdir()
    (tmp_path / "precious").write_bytes(b"precious")
    (folder / "vda.img").symlink_to("../precious")
    (folder / "vdb.img").symlink_to("../missing")
    (folder / "vdc.img").mkdir()
    os.mkfifo(folder / "vdd.img")
    assert write(some_disks(5)) == 1
    lines = capfd.readouterr().err.splitlines()
    assert [line.partition("dir/")[2][:30] for line in lines] == [
        "vda.img: is a symbolic link, w",
        "vdb.img: is a symbolic link, w",
        "vdc.img: is no regular file: r",
        "vdd.img: is no regular file: r",
    ]
    assert (folder / "vde.img").read_bytes()[:5] == b"eeeee", "the others are written"
    assert sorted(os.listdir(tmp_path)) == ["dir", "precious"]
    assert (tmp_path / "precious").read_bytes() == b"precious"


def test_what_fails_of_one_does_not_keep_the_others(write: Any, tmp_path: Path, capfd: Any) -> None:
    disks = {**some_disks(1), "bad": FailingDisk([b"x" * 512]), "good": SpanDisk([b"y" * 512])}
    assert write(disks, "--sha256") == 1
    output = capfd.readouterr()
    assert output.err == "nbdtool: error: the source broke\n"
    assert sorted(contents(tmp_path / "dir")) == ["good.img", "vda.img"]
    assert output.out.count("\n") == 2


def test_digests_are_understood_by_sha256sum(
    write: Any, tmp_path: Path, capfd: Any, run: Callable[..., str]
) -> None:
    assert write(some_disks(), "--sha256") == 0
    lines = capfd.readouterr().out
    assert f"{hashlib.sha256(b'a' * 5000 + bytes(1 << 20)).hexdigest()}  {tmp_path}" in lines
    (tmp_path / "sums").write_text(lines)
    assert run("sha256sum", "--strict", "-c", tmp_path / "sums").count(": OK\n") == 3


def test_lines_for_scripts(write: Any, tmp_path: Path, capfd: Any) -> None:
    disks = {**some_disks(1), "bad": FailingDisk([b"x" * 512])}
    assert write(disks, "--sha256", "--json") == 1
    *lines, last = map(json.loads, capfd.readouterr().out.splitlines())
    assert {line["status"] for line in lines} == {"running"}
    assert lines[-1]["file"] == f"{tmp_path}/dir/vda.img"
    assert lines[-1]["done"] == lines[-1]["total"] == 5000 + (1 << 20)
    assert last["status"] == "failed"
    good, bad = last["files"]
    assert (good["export"], good["complete"], len(good["sha256"])) == ("vda", True, 64)
    assert (bad["export"], bad["complete"], bad["error"]) == ("bad", False, "the source broke")


# With --rescue


class Scratched(SpanDisk):
    """A disk of which one sector can't be read."""

    def read(self, offset: int, length: int) -> list[Span]:
        if offset < 40960 + 512 and offset + length > 40960:
            raise OSError(5, "a scratch")
        return super().read(offset, length)


def test_each_disk_has_its_map(write: Any, tmp_path: Path, capfd: Any) -> None:
    bad = Scratched([b"b" * 100_000])
    disks = {**some_disks(1), "/dev/bad": bad}
    assert write(disks, "--rescue=map", "--sha256", "--json", "--fill=0xee") == 1
    folder = tmp_path / "dir"
    maps = {"vda.img", "vda.img.map", "dev+bad.img", "dev+bad.img.map"}
    assert set(os.listdir(folder)) == maps
    expected = b"b" * 40960 + b"\xee" * 512 + b"b" * (100_000 - 41472)
    assert (folder / "dev+bad.img").read_bytes() == expected
    assert "0x0000A000  0x00000200  -" in (folder / "dev+bad.img.map").read_text()
    *lines, last = map(json.loads, capfd.readouterr().out.splitlines())
    assert {"rescuing", "hashing"} == {line["task"] for line in lines}
    assert last["status"] == "failed"
    whole, part = last["files"]
    assert (whole["complete"], whole["bad"], whole["bad_areas"]) == (True, 0, 0)
    assert part == {
        "export": "/dev/bad",
        "file": f"{folder}/dev+bad.img",
        "mapfile": f"{folder}/dev+bad.img.map",
        "size": 100_000,
        "complete": False,
        "rescued": 99_488,
        "bad": 512,
        "bad_areas": 1,
        "sha256": hashlib.sha256(expected).hexdigest(),
    }

    bad.__class__ = SpanDisk  # the drive has recovered
    assert write(disks, "--rescue=map", "--retries=1") == 0
    assert (folder / "dev+bad.img").read_bytes() == bad.content()


def test_rescue_follows_no_link_out(write: Any, tmp_path: Path, capfd: Any) -> None:
    folder = tmp_path / "dir"
    folder.mkdir()
    (folder / "vda.img").symlink_to("../target")
    (folder / "vdb.img.map").symlink_to("../map")
    assert write(some_disks(2), "--rescue=map") == 1
    assert capfd.readouterr().err.count("is a symbolic link, which isn't followed") == 2
    assert os.listdir(tmp_path) == ["dir"]


def test_directory_that_is_a_file(nbdtool: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "image").write_bytes(bytes(512))
    done = nbdtool("file", tmp_path / "image", "--to-dir", tmp_path / "image", status=1)
    assert done.stderr == f"nbdtool: error: {tmp_path}/image: Not a directory\n"


def test_source_is_not_overwritten(nbdtool: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "disk.img").write_bytes(b"x" * 512)
    done = nbdtool("file", tmp_path / "disk.img", "--to-dir", tmp_path, status=1)
    assert "is the source itself" in done.stderr
    done = nbdtool("linuxdisk", tmp_path, "--to-dir", tmp_path / "new", status=1)
    assert "is inside" in done.stderr
    assert contents(tmp_path) == {"disk.img": b"x" * 512}


def test_to_file_points_to_it(tmp_path: Path) -> None:
    args = Namespace(to_dir=None, to_file="x")
    with pytest.raises(UsageError, match=r"here are vda, vdb;.*--to-dir"):
        copying.copy_disks(some_disks(2), args, [])


def test_names_that_sha256sum_escapes(
    nbdtool: Callable[..., Any], run: Callable[..., str], tmp_path: Path
) -> None:
    (tmp_path / "image").write_bytes(b"x" * 512)
    for name in b"new\nline", b"back\\slash", b"return\r", b"\xff":
        target = os.fsencode(tmp_path) + b"/" + name
        done = nbdtool("file", tmp_path / "image", "--to-file", target, "--sha256", binary=True)
        expected: Any = subprocess.run(["sha256sum", target], capture_output=True, check=True)
        assert done.stdout == expected.stdout
        assert b": OK" in run("sha256sum", "-c", binary=True, input=done.stdout)
