"""Targets and map files that aren't what they should be, or are in use."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.rescue.faults import MIB, SECTOR, failing, read_map, write_map

SECTORS = 8 * MIB // SECTOR


@pytest.fixture
def refused(rescue: Any, image: Path, tmp_path: Path) -> Any:
    """refused(text): a rescue of the image fails for that; neither target nor map is changed."""

    def refused(text: str) -> None:
        places = [tmp_path / "target", tmp_path / "map"]
        before = [place.read_bytes() if place.is_file() else None for place in places]
        done = rescue("file", image, status=1)
        assert done.stderr.startswith("nbdtool: error: "), done.stderr
        assert done.stderr.count("\n") == 1
        assert text in done.stderr
        after = [place.read_bytes() if place.is_file() else None for place in places]
        assert after == before

    return refused


def test_target_without_map(refused: Any, tmp_path: Path) -> None:
    (tmp_path / "target").write_bytes(b"precious")
    refused("exists without its map file")
    refused("exists without its map file")


def test_map_without_target(refused: Any, tmp_path: Path) -> None:
    write_map(tmp_path / "map", "+" * 8 + "?" * (SECTORS - 8))
    refused("by its map file there is data in it")


def test_target_of_another_size(refused: Any, tmp_path: Path) -> None:
    write_map(tmp_path / "map", "+" * 8 + "?" * (SECTORS - 8))
    (tmp_path / "target").write_bytes(bytes(4095))
    refused("it has 4095 bytes, 4096 to 8388608 are expected")


def test_longer_target_that_has_nothing_yet(refused: Any, tmp_path: Path) -> None:
    write_map(tmp_path / "map", "?" * SECTORS)
    (tmp_path / "target").write_bytes(b"precious" * (MIB + 1))
    refused("it has 8388616 bytes, 0 to 8388608 are expected")


def test_target_as_map(nbdtool: Any, image: Path, tmp_path: Path) -> None:
    target, link = tmp_path / "target", tmp_path / "link"
    link.symlink_to(target)
    for words in (["--rescue", link], ["--rescue="]):
        done = nbdtool("file", image, "--to-file", target, *words, status=2)
        assert "its own" in done.stderr or "value is missing" in done.stderr
        assert not target.exists()


def test_map_of_another_disk(refused: Any, tmp_path: Path) -> None:
    write_map(tmp_path / "map", "+" * (SECTORS + 1))
    refused("is the map of another disk")


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("0 ? 1\n0 512 +\n1024 512 -\n", "line 3: its block starts at 0x400, not at 0x200"),
        ("0 ? 1\n0 1024 +\n512 512 -\n", "line 3: its block starts at 0x200, not at 0x400"),
        ("0 ? 1\n0 512 x\n", "line 2: not a block"),
        ("0 ? 1\n0 0 +\n", "line 2: a block of no bytes"),
        ("0 ? 1\n0 -512 +\n", "line 2: not a number of bytes: -512"),
        ("0 ? 1\n0 0xFFFFFFFFFFFFFFFFFF +\n", "line 2: not a number of bytes"),
        ("0 ? 1\n0 08 +\n", "line 2: not a number of bytes: 08"),
        ("0 512 +\n", "line 1: not a status line"),
        ("# nothing\n", "no status line"),
        ("\0" * 5000, "not a status line"),
    ],
)
def test_broken_map(refused: Any, tmp_path: Path, content: str, text: str) -> None:
    (tmp_path / "map").write_text(content)
    refused(text)


def test_map_is_a_directory(refused: Any, tmp_path: Path) -> None:
    (tmp_path / "map").mkdir()
    refused("map: Is a directory")


def test_target_is_a_pipe(refused: Any, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "target")
    refused("needs a regular file or a block device")


@pytest.mark.parametrize("phase", "?+F")
def test_forms_of_a_map(rescue: Any, compare: Any, image: Path, tmp_path: Path, phase: str) -> None:
    """Decimal, octal, comments, no pass, a beginning and an end that aren't in it."""
    (tmp_path / "map").write_text(
        f"# made by hand\n\n  010 {phase} # the status\n"
        "512 01000 + # one\n0x400 512 -\n#@ 0 512 +\n"
    )
    with (tmp_path / "target").open("wb") as file, image.open("rb") as source:
        file.write(source.read(1024))
    with failing(image, "+" * SECTORS, tmp_path) as server:
        rescue("nbd", server.uri, status=1)
        assert server.good() == [1, 0, 0] + [1] * (SECTORS - 3)
    compare(image, "++-" + "+" * (SECTORS - 3))


def test_second_run(
    rescue: Any, nbdtool: Any, command: list[str], image: Path, tmp_path: Path
) -> None:
    """It is told who has the target, or the map file, and does nothing."""
    with failing(image, "+" * SECTORS, tmp_path, "--filter=delay", "rdelay=30") as source:
        places = ["--to-file", tmp_path / "target", "--rescue", tmp_path / "map"]
        process = subprocess.Popen([*command, "nbd", source.uri, *map(str, places)])
        try:
            while not (tmp_path / "target").exists():
                assert process.poll() is None
            found = rescue("file", image, status=1).stderr
            assert f"map: in use by another run (process {process.pid}, python" in found
            other = ["--to-file", tmp_path / "target", "--rescue", tmp_path / "other"]
            found = nbdtool("file", image, *other, status=1).stderr
            assert f"target: in use by another run (process {process.pid}, python" in found
            assert not (tmp_path / "other").exists()
        finally:
            process.send_signal(signal.SIGKILL)
            process.wait()
    rescue("file", image, status=0)
    assert (tmp_path / "target").read_bytes() == image.read_bytes()


def test_target_is_full(nbdtool: Any, run: Any, image: Path, tmp_path: Path) -> None:
    """What doesn't fit isn't bad, and the run goes on once there is room."""
    small = tmp_path / "small"
    small.mkdir()
    run("mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", small)
    try:
        words = ["file", image, "--to-file", small / "target", "--rescue", tmp_path / "map"]
        done = nbdtool(*words, status=1)
        assert "target: No space left on device; make room and run again" in done.stderr
        states = read_map(tmp_path / "map")
        assert set(states) == {"+", "?"}
        run("mount", "-o", "remount,size=20m", small)
        nbdtool(*words, status=0)
        assert (small / "target").read_bytes() == image.read_bytes()
    finally:
        run("umount", small)
