"""The progress line, on a pseudo-terminal and elsewhere."""

from __future__ import annotations

import io
import json
import os
import select
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, Callable

import pytest

from nbdtool import errors, progress
from nbdtool.progress import Progress, RescueProgress, human


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """Standard error is a terminal of 60 columns; what it shows is read from the descriptor."""
    controller, name = os.openpty()
    monkeypatch.setenv("COLUMNS", "60")
    with os.fdopen(name, "w") as stream:
        monkeypatch.setattr(progress, "sys", SimpleNamespace(stderr=stream))
        yield controller
    os.close(controller)


class Clock:
    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr(progress.time, "monotonic", lambda: self.now)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def shown(terminal: int) -> str:
    """What the terminal got; the kernel takes a moment to hand it over."""
    text = b""
    while select.select([terminal], [], [], 0.2)[0]:
        text += os.read(terminal, 1 << 16)
    return text.decode()


def test_bytes_rate_and_time_left(terminal: int, clock: Clock) -> None:
    with Progress("writing", 4 << 30) as line:
        clock.now += 2
        line.update(1 << 30)
        assert shown(terminal) == "\rwriting: 1.0 GiB of 4.0 GiB, 25%, 512.0 MiB/s, 0:06 left\x1b[K"
    assert shown(terminal) == "\r\x1b[K"


def test_unknown_total(terminal: int, clock: Clock) -> None:
    with Progress("reading the tree", unit="files") as line:
        clock.now += 4
        line.update(80_000)
        assert shown(terminal) == "\rreading the tree: 80,000 files, 20,000 files/s\x1b[K"


def test_a_few_lines_a_second(terminal: int, clock: Clock) -> None:
    with Progress("writing", 1 << 30) as line:
        for done in range(10_000):
            clock.now += 0.001
            line.update(done << 10)
    assert 40 <= shown(terminal).count("writing:") <= 50


def test_quick_work_shows_nothing(terminal: int, clock: Clock) -> None:
    with Progress("writing", 1 << 30) as line:
        clock.now += 0.3
        line.update(1 << 30)
    assert shown(terminal) == ""


def test_line_fits(terminal: int, clock: Clock) -> None:
    with Progress("x" * 100, 1 << 30) as line:
        clock.now += 2
        line.update(1)
        assert shown(terminal) == "\r" + "x" * 59 + "\x1b[K"


def test_wiped_after_a_failure(terminal: int, clock: Clock) -> None:
    with pytest.raises(ValueError), Progress("writing", 100) as line:
        clock.now += 2
        line.update(50)
        raise ValueError
    assert shown(terminal).endswith("\r\x1b[K")


@pytest.mark.parametrize("closed", [False, True])
def test_nothing_without_a_terminal(
    monkeypatch: pytest.MonkeyPatch, clock: Clock, closed: bool
) -> None:
    stream = io.StringIO()
    stderr = None if closed else stream
    monkeypatch.setattr(progress, "sys", SimpleNamespace(stderr=stderr))
    with Progress("writing", 100) as line:
        clock.now += 5
        line.update(50)
    assert stream.getvalue() == ""


def test_messages_stand_on_lines_of_their_own(
    terminal: int, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(errors, "sys", progress.sys)
    with Progress("writing", 100) as line:
        clock.now += 2
        line.update(50)
        errors.warn("look")
        clock.now += 2
        line.update(60)
    errors.warn("again")
    text = shown(terminal)
    wiped = "\r\x1b[K"
    assert f"left\x1b[K{wiped}nbdtool: warning: look\r\n\rwriting: 60 B" in text
    assert text.endswith(f"{wiped}nbdtool: warning: again\r\n")


# For scripts


@pytest.fixture
def status(monkeypatch: pytest.MonkeyPatch, clock: Clock) -> Iterator[Callable[[], Any]]:
    """The lines of JSON that came since it was called last."""
    monkeypatch.setattr(progress, "_status", None)
    reader, writer = os.pipe()
    progress.print_for_scripts(writer)
    with os.fdopen(reader, "rb", buffering=0) as stream:
        os.set_blocking(reader, False)
        yield lambda: [json.loads(line) for line in (stream.read(1 << 16) or b"").splitlines()]
    os.close(writer)


def test_a_line_each_second(status: Callable[[], Any], clock: Clock) -> None:
    with Progress("writing", 4000, file="/a\udcff\n") as line:
        for done in range(4000):
            line.update(done)
            clock.now += 0.002
        lines = status()
        assert len(lines) == 8
        assert lines[4] == {
            "status": "running",
            "task": "writing",
            "file": "/a\udcff\n",
            "unit": "bytes",
            "done": pytest.approx(2000, abs=10),
            "total": 4000,
            "rate": pytest.approx(500, abs=2),
            "average": pytest.approx(500, abs=2),
            "seconds": 4.0,
            "eta": 4.0,
        }
        line.update(4000)
    (last,) = status()
    assert (last["done"], last["eta"]) == (4000, 0.0)


def test_what_is_not_known_is_null(status: Callable[[], Any], clock: Clock) -> None:
    with Progress("reading the tree", unit="files") as line:
        line.update(0)
    first = status()[0]
    assert (first["total"], first["eta"], first["unit"], first["rate"]) == (None, None, "files", 0)
    assert "file" not in first


def test_the_rate_is_that_of_the_last_seconds(status: Callable[[], Any], clock: Clock) -> None:
    with Progress("writing", 10000) as line:
        for done in [*range(0, 1000, 100), *range(1000, 1100, 10)]:
            line.update(done)
            clock.now += 1
    last = status()[-1]
    assert last["rate"] == pytest.approx(10, abs=2)
    assert last["average"] == pytest.approx(55, abs=2)


def test_nobody_reads_them(monkeypatch: pytest.MonkeyPatch, clock: Clock) -> None:
    monkeypatch.setattr(progress, "_status", None)
    reader, writer = os.pipe()
    os.close(reader)
    line = progress.print_for_scripts(writer)
    line({"status": "running"})
    os.close(writer)
    line({"status": "done"})  # to whatever the descriptor is now: nothing


def test_a_terminal_gets_no_line_then(
    status: Callable[[], Any], terminal: int, clock: Clock
) -> None:
    with Progress("writing", 100) as line:
        clock.now += 2
        line.update(50)
    assert status()
    assert shown(terminal) == ""


# Rescue


def test_rescue_says_what_is_bad_and_what_it_does(
    terminal: int, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    with RescueProgress(4 << 30) as line:
        line.update(2 << 30, phase="copying")  # of an earlier run
        clock.now += 10
        line.update(3 << 30, bad=1 << 20, areas=1, phase="trimming")
        clock.now += 1
        line.update((3 << 30) + (8 << 20), bad=1536, areas=2, phase="scraping")
        lines = shown(terminal).split("\r")
    assert lines[-2] == (
        "rescuing: 3.0 GiB of 4.0 GiB, 75%, 1.0 MiB bad in 1 area, 102.4 MiB/s, average"
        " 102.4 MiB/s, trimming, 0:10 left\x1b[K"
    )
    assert lines[-1] == (
        "rescuing: 3.0 GiB of 4.0 GiB, 75%, 1.5 KiB bad in 2 areas, 8.0 MiB/s, average"
        " 93.8 MiB/s, scraping, 2:07 left\x1b[K"
    )


def test_rescue_of_nothing(status: Callable[[], Any]) -> None:
    with RescueProgress(0, file="x") as line:
        line.update(0, phase="finished")
        assert line._line(200.0).startswith("rescuing: 0 B, nothing bad, ")
    last = status()[-1]
    assert (last["phase"], last["bad"], last["bad_areas"], last["file"]) == ("finished", 0, 0, "x")


def test_human() -> None:
    sizes = [0, 1023, 1024, 1536, 1 << 20, 1 << 30, 1 << 40, 1 << 50, 1 << 60]
    expected = "0 B,1023 B,1.0 KiB,1.5 KiB,1.0 MiB,1.0 GiB,1.0 TiB,1.0 PiB,1024.0 PiB"
    assert ",".join(map(human, sizes)) == expected
