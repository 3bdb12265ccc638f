"""Paired runs: each round runs every contestant once, and a figure is the median over the rounds
of what two runs side by side give, so that a machine that slows down slows all of them.
"""

from __future__ import annotations

import contextlib
import statistics
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Callable, Optional

Measure = Callable[[], float]

SECONDS, RATE, MEBIBYTES, BYTES = "s", "IOPS", "MiB", "bytes"


@dataclass(frozen=True)
class Race:
    """Contestants by name, the first of them ours; each measures one run, in `unit`."""

    unit: str
    contestants: dict[str, Measure]


@dataclass(frozen=True)
class Goal:
    """What our figure must be beside one peer's, as `faster` (a ratio), or `extra` seconds."""

    at_least: Optional[float] = None
    at_most: Optional[float] = None
    extra: bool = False

    def __str__(self) -> str:
        unit = " ms" if self.extra else "x"
        if self.at_least is not None:
            return f"at least {self.at_least:g}{unit}"
        if self.at_most is not None:
            return f"at most {self.at_most:g}{unit}"
        return "-"

    def met(self, value: float) -> bool:
        return (self.at_least is None or value >= self.at_least) and (
            self.at_most is None or value <= self.at_most
        )


def faster(ratio: float) -> Goal:
    return Goal(at_least=ratio)


def cost(ratio: float) -> Goal:
    return Goal(at_most=ratio)


def extra_ms(milliseconds: float) -> Goal:
    return Goal(at_most=milliseconds, extra=True)


Make = Callable[[Path], Iterator[Race]]


@dataclass(frozen=True)
class Row:
    """A comparison; `make` prepares it in a directory, yields the Race and clears up after it."""

    name: str
    what: str
    goals: dict[str, Goal]
    make: Make
    rounds: int


ROWS: dict[str, Row] = {}


def row(
    name: str, what: str, goals: Optional[dict[str, Goal]] = None, rounds: int = 7
) -> Callable[[Make], Make]:
    """Register the generator function below as a row."""

    def register(make: Make) -> Make:
        ROWS[name] = Row(name, what, goals or {}, make, rounds)
        return make

    return register


def compare(goal: Goal, unit: str, ours: float, theirs: float) -> float:
    """What a goal speaks of: milliseconds more, the ratio of costs, or how many times better."""
    if goal.extra:
        return (ours - theirs) * 1000
    if goal.at_most is not None or unit == RATE:
        return ours / theirs
    return theirs / ours


def show(value: float, unit: str) -> str:
    if unit == SECONDS:
        return f"{value * 1000:.0f} ms" if value < 1 else f"{value:.2f} s"
    if unit == RATE:
        return f"{value / 1000:.1f} k IOPS"
    return f"{value:,.0f} {unit}"


def run(chosen: Row, directory: Path, rounds: int) -> list[str]:
    """Run one row; the lines of the table, one for each peer."""
    figures: dict[str, list[float]] = {}
    with contextlib.contextmanager(chosen.make)(directory) as race:
        for number in range(rounds):
            names = list(race.contestants)
            for name in names if number % 2 else reversed(names):
                figures.setdefault(name, []).append(race.contestants[name]())
            print(".", end="", file=sys.stderr, flush=True)
        print(file=sys.stderr)
    first, *peers = race.contestants
    ours = figures[first]
    median = show(statistics.median(ours), race.unit)
    lines = []
    for peer in peers:
        goal = chosen.goals.get(peer, Goal())
        pairs = zip(ours, figures[peer])
        ratio = statistics.median(compare(goal, race.unit, *pair) for pair in pairs)
        text = f"{ratio:+.0f} ms" if goal.extra else f"{ratio:.2f}x"
        missed = "" if goal.met(ratio) else " (missed)"
        theirs = show(statistics.median(figures[peer]), race.unit)
        lines.append(
            f"| {chosen.what} | {median} | {peer} | {theirs} | **{text}** | {goal}{missed} |"
        )
    if not peers:
        lines.append(f"| {chosen.what} | {median} | - | - | - | - |")
    return lines
