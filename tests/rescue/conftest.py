"""Running a rescue, and what it must have come to."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any, Callable

import pytest

from tests.rescue.faults import SECTOR, read_map


@pytest.fixture
def image(tmp_path: Path, random_file: Callable[..., Path]) -> Path:
    """8 MiB that are all different."""
    return random_file(tmp_path / "image", 8 << 20)


@pytest.fixture
def rescue(nbdtool: Callable[..., Any], tmp_path: Path) -> Callable[..., Any]:
    """rescue("nbd", uri, ...) -> the end of a run that writes `target`, with its `map`."""

    def rescue(*words: Any, status: int) -> subprocess.CompletedProcess[str]:
        places = ["--to-file", tmp_path / "target", "--rescue", tmp_path / "map"]
        done: subprocess.CompletedProcess[str] = nbdtool(*words, *places, status=status)
        return done

    return rescue


@pytest.fixture
def compare(tmp_path: Path) -> Callable[..., None]:
    """compare(image, states): the map says so, and the target has just what could be read."""

    def compare(image: Path, states: str, filling: bytes = bytes(SECTOR)) -> None:
        assert read_map(tmp_path / "map") == states
        wanted, found = image.read_bytes(), (tmp_path / "target").read_bytes()
        assert len(wanted) == len(found)
        for sector, state in enumerate(states):
            place = slice(sector * SECTOR, (sector + 1) * SECTOR)
            assert found[place] == (wanted[place] if state == "+" else filling), sector

    return compare
