"""Rescues that are killed, whose source hangs or goes away, and that are run again."""

from __future__ import annotations

import contextlib
import random
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.rescue.faults import (
    MIB,
    SECTOR,
    failing,
    faults,
    read_map,
    scripted,
    write_map,
)

SECTORS = 8 * MIB // SECTOR
UNDER_WAY = 8 * MIB  # bytes that are asked for at a time


@contextlib.contextmanager
def running(command: list[str], folder: Path, *words: Any) -> Iterator[subprocess.Popen[str]]:
    places = ["--to-file", folder / "target", "--rescue", folder / "map"]
    process = subprocess.Popen(
        [*command, *map(str, (*words, *places))], stderr=subprocess.PIPE, text=True
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        assert process.stderr
        process.stderr.close()


def wait_for(condition: Any) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def journalled(mapfile: Path, sectors: int) -> list[str]:
    """The states by a map file, with what is noted in its comments."""
    states = list(read_map(mapfile)) if mapfile.exists() else ["?"] * sectors
    for line in mapfile.read_text().splitlines() if mapfile.exists() else ():
        if line.startswith("#@ "):
            start, length, state = line[3:].split()
            first = int(start, 0) // SECTOR
            count = int(length, 0) // SECTOR
            states[first : first + count] = state * count
    return states


@pytest.mark.slow
def test_killed_fifty_times(
    rescue: Any, compare: Any, command: list[str], random_file: Any, tmp_path: Path
) -> None:
    """What the map has at the time of the kill is never read again; it lacks what is under way."""
    image = random_file(tmp_path / "image", 24 * MIB)
    sectors = 24 * MIB // SECTOR
    states = faults(sectors, scattered=0.0005, areas=[(30000, 300)])
    generator = random.Random(1)
    before, known, kills = [0] * sectors, ["?"] * sectors, 0
    while kills < 50:
        with contextlib.ExitStack() as stack:
            # nbdkit doesn't outlive many clients that are killed: each has its own.
            slow = ["--filter=delay", "rdelay=20ms"]
            source = stack.enter_context(failing(image, states, tmp_path, *slow))
            size = source.log.stat().st_size
            process = stack.enter_context(running(command, tmp_path, "nbd", source.uri))
            wait_for(partial(lambda log, size: log.stat().st_size > size, source.log, size + 1000))
            time.sleep(generator.random() / 8)
            kills += process.poll() is None
            process.send_signal(signal.SIGKILL)
            process.wait()
        after, now = source.good(), journalled(tmp_path / "map", sectors)
        read = [sector for sector in range(sectors) if after[sector] > before[sector]]
        assert not [sector for sector in read if known[sector] == "+"]
        assert sum(now[sector] != "+" for sector in read) * SECTOR <= UNDER_WAY
        before, known = after, now
        if process.returncode == 1:  # it came to its end: once more
            compare(image, states)
            (tmp_path / "map").unlink()
            (tmp_path / "target").unlink()
            known = ["?"] * sectors
    with failing(image, states, tmp_path) as source:
        rescue("nbd", source.uri, status=1)
    compare(image, states)


@pytest.mark.slow
def test_terminated(
    rescue: Any, compare: Any, command: list[str], image: Path, tmp_path: Path
) -> None:
    """A signal leaves a map that ddrescue reads as it is, and one line."""
    states = faults(SECTORS, areas=[(40, 1)])
    with failing(image, states, tmp_path, "--filter=delay", "rdelay=20ms") as source:
        for number in (signal.SIGTERM, signal.SIGINT):
            with running(command, tmp_path, "nbd", source.uri) as process:
                count = len(source.reads())
                wait_for(lambda count=count: len(source.reads()) > count + 20)
                process.send_signal(number)
                _, stderr = process.communicate()
                assert process.returncode in (128 + number, -number)
            assert stderr.startswith("nbdtool: rescued ")
            assert stderr.count("\n") == 1
            assert list(read_map(tmp_path / "map")) == journalled(tmp_path / "map", SECTORS)
            assert "+" in read_map(tmp_path / "map")
        rescue("nbd", source.uri, status=1)
        compare(image, states)


def test_power_cut(rescue: Any, compare: Any, run: Any, image: Path, tmp_path: Path) -> None:
    """What was done since the map was saved doesn't count after another boot."""
    shutil.copy(image, tmp_path / "target")
    mapfile = write_map(tmp_path / "map", "+" * 8 + "?" * (SECTORS - 8))
    (boot,) = Path("/proc/sys/kernel/random/boot_id").read_text().split()
    entries = "#@ 0x1000 0x1000 +\n#@ 0x4000 0x1000 -\n#@ 0x8000 0x10"
    saved = mapfile.read_text()
    for name, expected in {boot: [16, SECTORS], "another": [8, SECTORS]}.items():
        mapfile.write_text(
            f"{saved}# Done since, and of use until the next boot of {name}\n{entries}"
        )
        assert "bad areas" not in run("ddrescuelog", "-t", mapfile)
        with failing(image, "+" * SECTORS, tmp_path) as source:
            source.log.write_text("")
            rescue("nbd", source.uri, "--retries=1", status=0)
            good = source.good()
            assert [good.index(1), len(good)] == expected
        compare(image, "+" * SECTORS)


@pytest.mark.slow
def test_hanging_read(rescue: Any, compare: Any, random_file: Any, tmp_path: Path) -> None:
    """It is an error like others, and all around it is rescued."""
    image = random_file(tmp_path / "image", MIB)
    fault = f"if [ $1 -le {700 * SECTOR} -a $2 -gt {700 * SECTOR} ]; then sleep 1000; fi"
    with scripted(image, tmp_path, fault) as source:
        done = rescue("nbd", source.uri, "--read-timeout=2", "--retries=1", status=1)
    assert "1 area" in done.stderr
    compare(image, faults(MIB // SECTOR, areas=[(700, 1)]))


def test_server_that_hangs_once(
    rescue: Any, compare: Any, random_file: Any, tmp_path: Path
) -> None:
    """What it owed then isn't asked for sector by sector."""
    image = random_file(tmp_path / "image", MIB)
    with scripted(image, tmp_path, "mkdir $TMP/once && sleep 1000") as source:
        rescue("nbd", source.uri, "--read-timeout=1", status=0)
        assert len(source.reads()) < 60
    compare(image, "+" * (MIB // SECTOR))


@pytest.mark.slow
def test_all_reads_hang(rescue: Any, image: Path, tmp_path: Path) -> None:
    with scripted(image, tmp_path, "sleep 1000") as source:
        done = rescue("nbd", source.uri, "--read-timeout=0.1", status=1)
    assert "reads hang: the source doesn't answer" in done.stderr
    assert "+" not in read_map(tmp_path / "map")


def test_read_that_works_later(rescue: Any, compare: Any, random_file: Any, tmp_path: Path) -> None:
    image = random_file(tmp_path / "image", MIB)
    fault = f"""if [ $1 -le {9 * SECTOR} -a $2 -gt {9 * SECTOR} ]; then
        echo >> $TMP/tried; [ $(wc -l < $TMP/tried) -gt 12 ] || fail $1 $2
    fi"""
    with scripted(image, tmp_path, fault) as source:
        rescue("nbd", source.uri, "--retries=20", status=0)
        assert source.good() == [1] * (MIB // SECTOR)
    compare(image, "+" * (MIB // SECTOR))


@pytest.mark.slow
def test_server_comes_back(compare: Any, command: list[str], image: Path, tmp_path: Path) -> None:
    """Within --reconnect nothing is bad for that, and nothing told."""
    states = faults(SECTORS, areas=[(9000, 3)])
    slow = ("--filter=delay", "rdelay=20ms")
    with contextlib.ExitStack() as stack:
        first = stack.enter_context(contextlib.ExitStack())
        source = first.enter_context(failing(image, states, tmp_path, *slow))
        process = stack.enter_context(running(command, tmp_path, "nbd", source.uri))
        wait_for(lambda: len(source.reads()) > 4)
        first.close()
        time.sleep(0.5)
        stack.enter_context(failing(image, states, tmp_path, *slow))
        _, stderr = process.communicate(timeout=60)
        assert process.returncode == 1
    summary = r"nbdtool: rescued 8.0 MiB of 8.0 MiB in \d:\d\d:\d\d; 1.5 KiB bad in 1 area\n"
    assert re.fullmatch(summary, stderr), stderr
    compare(image, states)


@pytest.mark.slow
def test_server_is_gone(rescue: Any, compare: Any, image: Path, tmp_path: Path) -> None:
    """What isn't read for that isn't bad, and the next run goes on."""
    fault = "[ $1 -lt 3000000 ] || { sleep 1; kill -9 $PPID; }"
    with scripted(image, tmp_path, fault) as source:
        done = rescue("nbd", source.uri, "--reconnect=0.5", status=1)
    assert "the source is gone" in done.stderr
    states = read_map(tmp_path / "map")
    assert set(states) == {"+", "?"}
    with failing(image, "+" * SECTORS, tmp_path) as source:
        source.log.write_text("")
        rescue("nbd", source.uri, status=0)
        assert source.good() == [int(state == "?") for state in states]
    compare(image, "+" * SECTORS)
