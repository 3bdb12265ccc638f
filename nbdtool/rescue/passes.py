"""The passes of a rescue, in the manner of GNU ddrescue (its manual's chapter "Algorithm").

Copying reads what wasn't tried: forwards, skipping ahead behind an error, backwards up to the first
error in what was skipped, and then all that is left. Trimming reads the edges of what failed sector
by sector up to a bad one, scraping what lies between, and retrying all the bad sectors again.

Where an error takes no time, and so doesn't wear a drive out, sectors are found by halving what
failed instead.
"""

from __future__ import annotations

import errno
import time
from typing import Callable, Optional, Protocol

from nbdtool.disk import STATE_ZERO, Disk
from nbdtool.errors import debug
from nbdtool.rescue.blocks import BAD, DONE, FAILED, UNSCRAPED, UNTRIED, UNTRIMMED, Blocks
from nbdtool.rescue.mapfile import FINISHED, MapFile, Status
from nbdtool.rescue.reader import Outcome, Reader
from nbdtool.rescue.sectors import Retrying, Scraping, trim
from nbdtool.rescue.target import Target

_LARGE = 1 << 20  # bytes of a read while all goes well
_CLUSTER = 64 << 10  # bytes of a read after an error
_LEAST = 8  # sectors that a read has at least while copying
_DEPTH = 8  # reads under way
# Reads in a row that go well, or fail, before larger or smaller ones are tried. Each costs the same
# up to a point, so that most is rescued in a second if about half of them fail.
_GROWTH, _SHRINKING = 2, 4
_TRUST = 16  # reads of a cluster or more in a row that go well before larger ones are tried
_QUICK = 0.01  # seconds that an error takes which isn't worth avoiding
_WINDOW = 1 << 30  # bytes whose extents are asked for at once
_HOLE = 4096  # bytes that a hole has at least
_INTERVAL = 30.0  # seconds between two saves
_COST = 20  # times as long as a save takes at least
_JOURNAL = 16 << 20  # bytes of journal that are enough


class Progress(Protocol):
    """Who is told how far it is: bytes rescued, bytes and areas that failed, what is being done."""

    def update(self, done: int, *, bad: int, areas: int, phase: str) -> None: ...


class Rescue:
    """A rescue of a disk: run(), and finish() unless that ended with an exception.

    Reads up to `depth` pieces of `piece` bytes at once; both follow how well it goes.
    """

    def __init__(
        self,
        disk: Disk,
        target: Target,
        mapfile: MapFile,
        progress: Progress,
        *,
        retries: int,
        read_timeout: float,
    ) -> None:
        self._target, self._mapfile, self._progress = target, mapfile, progress
        self._retries = retries
        self.blocks: Blocks = mapfile.blocks
        self.reader = Reader(disk, target, read_timeout, self._report)
        self.size = disk.size
        self.sector = max(disk.block_size[0], 512)
        self.least = _LEAST * self.sector
        self.most = max(min(_LARGE, disk.block_size[2]) // self.sector, 1) * self.sector
        self.cluster = min(max(_CLUSTER // self.sector, 1) * self.sector, self.most)
        self.piece = self.most
        self.depth = _DEPTH
        self.quick = False  # whether errors are
        self.position = 0
        self._phase, self._text, self._number = mapfile.status.phase, "copying", 1
        self._streak = 0  # reads in a row that went well; if negative, that failed
        self._error_cost: Optional[float] = None  # seconds, of late
        self._looked: set[int] = set()  # windows whose extents are known
        self._next_save = time.monotonic() + _INTERVAL

    def run(self) -> None:
        """All the passes; what is then left is bad."""
        self._copy()
        self._enter(UNTRIMMED, "trimming")
        trim(self)
        self._enter(UNSCRAPED, "scraping")
        Scraping(self).run()
        for number in range(1, self._retries + 1):
            if not self.blocks.totals[BAD]:
                break
            self._enter(BAD, f"retry {number}", number)
            Retrying(self, forwards=number % 2 == 1).run()

    def _copy(self) -> None:
        before = self._mapfile.status
        if before.phase != UNTRIED:
            before = Status()
        # ddrescue's passes 3 and 4 are for slow areas, which we don't leave.
        texts = {1: "copying", 2: "copying backwards", 5: "copying the rest"}
        for number, text in texts.items():
            if number < before.number or not self.blocks.totals[UNTRIED]:
                continue
            self._enter(UNTRIED, text, number)
            self.position = self.size if number == 2 else 0
            if number == before.number < 5 and before.position:
                self.position = before.position
            _Copying(self, number).run()

    def _enter(self, phase: str, text: str, number: int = 1) -> None:
        self._phase, self._text, self._number = phase, text, number
        self.position = 0
        debug(f"rescue: {text}")
        self._report()

    # What the passes share

    def mark(self, start: int, end: int, state: str) -> None:
        self._mapfile.append(start, end, state)
        self.blocks.mark(start, end, state)

    def drive(
        self,
        following: Callable[[], Optional[tuple[int, int]]],
        settle: Callable[[Outcome], None],
    ) -> None:
        """Read what following() gives, until that is None and nothing is under way."""
        while True:
            while len(self.reader) < self.depth:
                piece = following()
                if piece is None:
                    break
                self.reader.ask(*piece)
            if not len(self.reader):
                return
            self.settle(settle)

    def settle(self, settle: Callable[[Outcome], None]) -> None:
        """Mark what the oldest read under way has copied, and leave the rest to the pass."""
        outcome = self.reader.take()
        if outcome.done > outcome.start:
            self.mark(outcome.start, outcome.done, DONE)
        error = outcome.error
        if error is None:
            self._streak = max(self._streak, 0) + 1
            self.depth = min(2 * self.depth, _DEPTH)
        elif error.errno != errno.ECANCELED:
            debug(f"rescue: [{outcome.start}, {outcome.end}): {error.strerror}")
            self._streak = min(self._streak, 0) - 1
            known = outcome.seconds if self._error_cost is None else self._error_cost
            self._error_cost = 0.9 * known + 0.1 * outcome.seconds
            self.quick = self._error_cost < _QUICK
            if not self.quick:
                self.depth = 1
        settle(outcome)
        self._report()

    def grow(self, most: int) -> None:
        """Read more at once if that went well for a while."""
        wanted = _GROWTH if self.piece < _CLUSTER else _TRUST
        if self._streak >= wanted and self.piece < most:
            self.piece = min(2 * self.piece, most, self.most)
            self._streak = 0

    def shrink(self) -> None:
        """Read less at once, after an error."""
        if self.piece > _CLUSTER or not self.quick:
            self.piece = self.cluster
        elif self._streak <= -_SHRINKING:
            self.piece = max(self.piece // 2 // self.sector * self.sector, self.least)
            self._streak = 0

    def knows(self, position: int) -> bool:
        """Whether the extents around a position are known."""
        return position // _WINDOW in self._looked

    def look(self, position: int) -> None:
        """Find out, while nothing is under way, and mark what needn't be read."""
        window = position // _WINDOW
        self._looked.add(window)
        start, end = window * _WINDOW, min((window + 1) * _WINDOW, self.size)
        try:
            extents = self.reader.extents(start, end)
        except OSError as error:
            debug(f"rescue: extents of [{start}, {end}): {error.strerror}")
            return
        for length, state in extents:
            if state & STATE_ZERO and length >= _HOLE:
                for hole in list(self.blocks.within(start, start + length, UNTRIED)):
                    self._target.zero(hole.start, hole.end - hole.start)
                    self.mark(hole.start, hole.end, DONE)
            start += length

    def finish(self, fill: bytes) -> None:
        """Fill what couldn't be read, if it isn't a hole, and save."""
        self._enter(FINISHED, "finishing")
        sector = self.sector
        pattern = (fill * (sector // len(fill) + 1))[:sector] if fill else bytes(sector)
        if fill or not self._target.holes:
            data = memoryview(pattern * (_LARGE // sector + 1))
            for start, end, _ in self.blocks.within(0, self.size, UNTRIED + FAILED):
                while start < end:
                    skip = start % sector
                    part = data[skip : skip + min(end - start, _LARGE)]
                    self._target.write(start, [part])
                    start += len(part)
        self.save()
        self._report("finished")

    # What is told, and kept

    def _report(self, text: str = "") -> None:
        blocks = self.blocks
        self._progress.update(
            blocks.totals[DONE], bad=blocks.failed, areas=blocks.areas, phase=text or self._text
        )
        if time.monotonic() >= self._next_save or self._mapfile.journal > _JOURNAL:
            self.save()

    def save(self) -> None:
        """Have all that is rescued on stable storage, and then in the map file."""
        began = time.monotonic()
        self._target.sync()
        self._mapfile.save(self.blocks, Status(self.position, self._phase, self._number))
        now = time.monotonic()
        self._next_save = now + max(_INTERVAL, _COST * (now - began))


class _Copying:
    """A pass over what wasn't tried: 1 forwards and skipping, 2 backwards, 5 all that is left."""

    def __init__(self, rescue: Rescue, number: int) -> None:
        self._rescue, self._blocks = rescue, rescue.blocks
        self._backwards, self._skips = number == 2, number == 1
        self._least_skip, self._most_skip = (
            max(_CLUSTER, rescue.size // part // _CLUSTER * _CLUSTER) for part in (100_000, 100)
        )
        self._skip = self._least_skip
        self._again: Optional[int] = None  # where to go on once nothing is under way

    def run(self) -> None:
        self._rescue.drive(self._following, self._settle)

    def _following(self) -> Optional[tuple[int, int]]:
        rescue = self._rescue
        if self._again is not None:
            if len(rescue.reader):
                return None
            rescue.position, self._again = self._again, None
        find = self._blocks.before if self._backwards else self._blocks.after
        while True:
            block = find(rescue.position, UNTRIED)
            if block is None:
                return None
            edge = block.end - 1 if self._backwards else block.start
            if rescue.knows(edge):
                break
            if len(rescue.reader):
                return None
            rescue.look(edge)
        size = rescue.piece
        start = edge - edge % size
        end = min(block.end, start + size)
        start = max(block.start, start)
        rescue.position = start if self._backwards else end
        return start, end

    def _go_on(self, position: int) -> None:
        """Skip to a position, or return to it."""
        rescue = self._rescue
        if (position < rescue.position) == self._backwards:
            rescue.position = position
        elif position != rescue.position:
            choose = max if self._backwards else min
            self._again = position if self._again is None else choose(self._again, position)

    def _settle(self, outcome: Outcome) -> None:
        rescue = self._rescue
        start, end, at, error = outcome.start, outcome.end, outcome.done, outcome.error
        if error is None:
            self._skip = self._least_skip
            rescue.grow(_LARGE)
        elif error.errno == errno.ECANCELED:
            if not self._skips:
                self._go_on(end if self._backwards else start)
        elif outcome.ended:
            rescue.mark(at, end, BAD)
        elif end - at > _CLUSTER and not outcome.exact and error.errno != errno.ETIMEDOUT:
            rescue.shrink()  # somewhere in it
            self._go_on(end if self._backwards else at)
        else:
            stop = min(end, at + _CLUSTER) if outcome.exact else end
            rescue.mark(at, stop, UNTRIMMED)
            rescue.shrink()
            self._leave(start, stop)

    def _leave(self, start: int, stop: int) -> None:
        """Go on behind an error in [start, stop)."""
        if self._backwards:
            rest = self._blocks.before(start, UNTRIED)
            self._go_on(rest.start if rest and rest.end == start else start)
        elif self._skips:
            self._rescue.position = max(self._rescue.position, stop + self._skip)
            self._skip = min(2 * self._skip, self._most_skip)
        else:
            self._go_on(stop)
