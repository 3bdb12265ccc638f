"""Which sectors are rescued: as many as can be read, each of them once, and the map says so."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.rescue.faults import MIB, SECTOR, failing, faults, mounted, read_map, scripted, write_map

SECTORS = 8 * MIB // SECTOR

SCATTERED = faults(SECTORS, scattered=0.01)
AREAS = faults(SECTORS, areas=[(0, 3), (1000, 1), (3001, 777), (SECTORS - 5, 5)])


def test_healthy(rescue: Any, compare: Any, image: Path, tmp_path: Path) -> None:
    done = rescue("file", image, status=0)
    compare(image, "+" * SECTORS)
    assert done.stderr == "nbdtool: rescued 8.0 MiB of 8.0 MiB in 0:00:00\n"
    with failing(image, "+" * SECTORS, tmp_path) as source:
        rescue("nbd", source.uri, status=0)
        assert source.reads() == []  # the map says that all is there


@pytest.mark.parametrize("states", [SCATTERED, AREAS], ids=["scattered", "areas"])
def test_as_injected(rescue: Any, compare: Any, image: Path, tmp_path: Path, states: str) -> None:
    with failing(image, states, tmp_path) as source:
        done = rescue("nbd", source.uri, status=1)
        compare(image, states)
        areas = len([area for area in states.split("+") if area])
        assert f" bad in {areas} area" in done.stderr
        assert source.good() == [int(state == "+") for state in states]
        again = len(source.reads())
        rescue("nbd", source.uri, status=1)
        assert len(source.reads()) == again  # nothing is read again, but with --retries


@pytest.mark.slow
def test_reads_are_of_whole_sectors(rescue: Any, compare: Any, image: Path, tmp_path: Path) -> None:
    """Also where more and more is skipped, up to a hundredth of the disk."""
    states = faults(SECTORS, areas=[(1000, 12000)])
    with failing(image, states, tmp_path) as source:
        rescue("nbd", source.uri, status=1)
        compare(image, states)
        assert not [read for read in source.reads() if (read.start | read.end) % SECTOR]


@pytest.mark.parametrize("states", [SCATTERED, AREAS], ids=["scattered", "areas"])
def test_as_ddrescue(
    rescue: Any, compare: Any, run: Any, image: Path, tmp_path: Path, states: str
) -> None:
    """The same faults, for ddrescue and for us in a file that fails."""
    with failing(image, states, tmp_path) as source, mounted(source.uri, tmp_path / "fuse") as file:
        rescue("file", file, status=1)
        compare(image, states)
        run("ddrescue", "-d", file, tmp_path / "theirs", tmp_path / "theirs.map")
    run("ddrescuelog", f"--compare-mapfile={tmp_path / 'theirs.map'}", tmp_path / "map")
    theirs = (tmp_path / "theirs").read_bytes()  # ends where nothing more could be read
    assert theirs.ljust(8 * MIB, b"\0") == (tmp_path / "target").read_bytes()


@pytest.mark.slow
def test_slow_errors(rescue: Any, compare: Any, random_file: Any, tmp_path: Path) -> None:
    """What wears a drive out is asked for as seldom as ddrescue does."""
    image = random_file(tmp_path / "image", MIB)
    areas = [(500, 1), (1100, 20)]
    fault = "\n".join(
        f"if [ $1 -lt {(first + count) * SECTOR} -a $2 -gt {first * SECTOR} ]; then"
        " sleep 0.1; fail $1 $2; fi"
        for first, count in areas
    )
    states = faults(MIB // SECTOR, areas=areas)
    with scripted(image, tmp_path, fault) as source:
        rescue("nbd", source.uri, status=1)
        compare(image, states)
        # In a large read, in one of 64 KiB, and alone.
        assert max(source.bad()) == 3
        assert source.good() == [int(state == "+") for state in states]
        assert sum(not read.good for read in source.reads()) == 1 + 2 + 21


def test_retries(rescue: Any, compare: Any, run: Any, image: Path, tmp_path: Path) -> None:
    states = faults(SECTORS, areas=[(100, 2), (9000, 40)])
    with failing(image, states, tmp_path) as source:
        rescue("nbd", source.uri, status=1)
        before = len(source.reads())
        done = rescue("nbd", source.uri, "--retries=3", status=1)
        assert [read.end - read.start for read in source.reads()[before:]] == [SECTOR] * 42 * 3
        assert "21.0 KiB bad in 2 areas" in done.stderr
    with failing(image, faults(SECTORS, areas=[(9000, 1)]), tmp_path) as source:
        before = len(source.reads())
        rescue("nbd", source.uri, "--retries=1", status=1)
        assert len(source.reads()) == before + 42
    compare(image, faults(SECTORS, areas=[(9000, 1)]))
    with failing(image, "+" * SECTORS, tmp_path) as source:
        rescue("nbd", source.uri, "--retries=5", status=0)
        assert source.good() == [1] * SECTORS
    compare(image, "+" * SECTORS)


def test_fill(rescue: Any, compare: Any, image: Path, tmp_path: Path) -> None:
    states = faults(SECTORS, areas=[(5, 1), (3000, 500)])
    with failing(image, states, tmp_path) as source:
        rescue("nbd", source.uri, "--fill=BAD!", status=1)
        compare(image, states, b"BAD!" * (SECTOR // 4))
    with failing(image, "+" * SECTORS, tmp_path) as source:
        rescue("nbd", source.uri, "--retries=1", status=0)
    compare(image, "+" * SECTORS)


def test_holes(rescue: Any, tmp_path: Path) -> None:
    """They are neither read nor written."""
    image = tmp_path / "image"
    with image.open("wb") as file:
        file.truncate(5 << 30)
        for place in (0, 1 << 30, (3 << 30) - 4096):
            file.seek(place)
            file.write(os.urandom(65536))
    states = list("+" * (5 << 21))
    states[1 << 21] = "-"
    with failing(image, "".join(states), tmp_path) as source:
        rescue("nbd", source.uri, status=1)
        assert sum(end - start for start, end, good in source.reads() if good) < 4 * 65536
    assert read_map(tmp_path / "map") == "".join(states)
    st = (tmp_path / "target").stat()
    assert st.st_size == 5 << 30
    assert st.st_blocks * 512 < 4 * 65536
    with image.open("rb") as one, (tmp_path / "target").open("rb") as other:
        for place in (0, (1 << 30) + 512, (3 << 30) - 4096):
            assert os.pread(one.fileno(), 60000, place) == os.pread(other.fileno(), 60000, place)


def test_source_on_the_same_filesystem(
    nbdtool: Any, run: Any, random_file: Any, tmp_path: Path
) -> None:
    """A target that shares the blocks of the source would be as bad as they are."""
    store, folder = tmp_path / "store", tmp_path / "folder"
    with store.open("wb") as file:
        file.truncate(400 * MIB)
    run("mkfs.xfs", "-q", "-m", "reflink=1", store)
    folder.mkdir()
    run("mount", "-o", "loop", store, folder)
    try:
        image = random_file(folder / "image", 8 * MIB)
        words = ["--to-file", folder / "target", "--rescue", folder / "map"]
        nbdtool("file", image, *words, status=0)
        assert (folder / "target").read_bytes() == image.read_bytes()
        assert "shared" not in run("filefrag", "-v", folder / "target")
    finally:
        run("umount", folder)


def test_block_device_as_target(
    nbdtool: Any, loop_device: Any, random_file: Any, image: Path, tmp_path: Path
) -> None:
    """What couldn't be read is zero, whatever was there."""
    store = random_file(tmp_path / "store", 9 * MIB, seed=1)
    last = store.read_bytes()[8 * MIB :]
    with failing(image, AREAS, tmp_path) as source, loop_device(store) as device:
        nbdtool("nbd", source.uri, "--to-file", device, "--rescue", tmp_path / "map", status=1)
        found = device.read_bytes()
    assert read_map(tmp_path / "map") == AREAS
    data = image.read_bytes()
    for sector, state in enumerate(AREAS):
        place = slice(sector * SECTOR, (sector + 1) * SECTOR)
        assert found[place] == (data[place] if state == "+" else bytes(SECTOR))
    assert found[8 * MIB :] == last


def test_ours_to_ddrescue(rescue: Any, run: Any, image: Path, tmp_path: Path) -> None:
    """A rescue that we began goes on with ddrescue, which reads no more than what is left."""
    with failing(image, SCATTERED, tmp_path) as source:
        rescue("nbd", source.uri, status=1)
    shown = run("ddrescuelog", "-t", tmp_path / "map")
    assert "current status: finished" in shown
    assert f"bad-sector: {SCATTERED.count('-') * SECTOR:8} B," in shown
    listed = run("ddrescuelog", "-l-", tmp_path / "map").split()
    assert [int(sector) for sector in listed] == [
        sector for sector, state in enumerate(SCATTERED) if state == "-"
    ]
    # What ddrescue doesn't read can't come from here.
    other = tmp_path / "other"
    data = bytearray(image.read_bytes())
    for sector, state in enumerate(SCATTERED):
        if state == "+":
            data[sector * SECTOR : (sector + 1) * SECTOR] = bytes(SECTOR)
    other.write_bytes(data)
    run("ddrescue", "-r1", other, tmp_path / "target", tmp_path / "map")
    assert (tmp_path / "target").read_bytes() == image.read_bytes()
    run("ddrescuelog", "-d", tmp_path / "map")
    assert not (tmp_path / "map").exists()


def test_ddrescues_to_ours(
    rescue: Any, compare: Any, run: Any, image: Path, tmp_path: Path
) -> None:
    """Whatever it was at: copying, or done but for what is bad."""
    target, mapfile = tmp_path / "target", tmp_path / "map"
    halted = "+" * 4000 + "?" * 96 + "*" * 128 + "?" * (SECTORS - 4224)
    run("ddrescue", f"--size={4000 * SECTOR}", image, target, mapfile)
    write_map(mapfile, halted)
    with failing(image, AREAS, tmp_path) as source:
        rescue("nbd", source.uri, status=1)
        assert source.good()[4000:] == [int(state == "+") for state in AREAS][4000:]
        assert not any(source.good()[:4000])
    compare(image, "+" * 4000 + AREAS[4000:])


@pytest.mark.parametrize("arguments", [[], ["--retries=1"]], ids=["", "retried"])
def test_truncated_under_us(
    nbdtool: Any, image: Path, tmp_path: Path, arguments: list[str]
) -> None:
    """A file that has become shorter: what it has no more is bad. ddrescue calls it finished."""
    process = subprocess.run(
        ["python3", "-c", _TRUNCATE, image, tmp_path / "target", tmp_path / "map", *arguments],
        check=False,
        capture_output=True,
        text=True,
    )
    assert process.stdout == "False\n", process.stderr
    assert read_map(tmp_path / "map") == "+" * 10001 + "-" * (SECTORS - 10001)
    whole = (tmp_path / "target").read_bytes()
    assert whole == image.read_bytes() + bytes(8 * MIB - 10001 * SECTOR)


_TRUNCATE = """
import os, sys
from nbdtool.disks.file import FileDisk
from nbdtool.progress import RescueProgress
from nbdtool.rescue import rescue_disk
image, target, mapfile, *retries = sys.argv[1:]
disk = FileDisk(image)
os.truncate(image, 10001 * 512)
print(rescue_disk(disk, target, mapfile, retries=len(retries), read_timeout=10, fill=b"",
                  progress=RescueProgress(disk.size)))
"""
