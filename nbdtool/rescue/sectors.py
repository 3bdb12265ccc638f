"""The passes over what failed: trimming, scraping and retrying, down to the sector."""

from __future__ import annotations

import errno
from collections import deque
from typing import TYPE_CHECKING, Optional

from nbdtool.rescue.blocks import BAD, DONE, UNSCRAPED, UNTRIMMED
from nbdtool.rescue.reader import Outcome

if TYPE_CHECKING:
    from nbdtool.rescue.passes import Rescue


def trim(rescue: Rescue) -> None:
    """Read the edges of what failed, but for those beside a bad sector, up to the next one."""
    blocks, sector = rescue.blocks, rescue.sector
    for start, end, _ in blocks.within(0, rescue.size, UNTRIMMED):
        if rescue.quick:
            return  # halving does as well
        before, after = blocks.before(start, BAD), blocks.after(end, BAD)
        bad = before is not None and before.end == start
        size = sector
        # More than a cluster is what a hanging read has left, most of it good.
        most = rescue.cluster if end - start > rescue.cluster else sector
        while start < end and not bad:
            stop = min(end, (start // size + 1) * size)
            if _try(rescue, start, stop):
                start, size = stop, min(2 * size, most)
            elif size > sector:
                start, size = _rest(rescue, start, end), sector
                most = sector
            else:
                start, bad = stop, True
        bad = after is not None and after.start == end
        while start < end and not bad:
            stop = max(start, (end - 1) // sector * sector)
            bad = not _try(rescue, stop, end)
            end = stop
        if start < end:
            rescue.mark(start, end, UNSCRAPED)


def _try(rescue: Rescue, start: int, end: int) -> bool:
    """Read one sector, or several, of which none is bad for that."""

    def settle(outcome: Outcome) -> None:
        if outcome.error and end - start <= rescue.sector:
            rescue.mark(outcome.done, end, BAD)

    rescue.position = start
    rescue.reader.ask(start, end)
    rescue.settle(settle)
    return rescue.blocks.state(end - 1) == DONE


def _rest(rescue: Rescue, start: int, end: int) -> int:
    """Where what is still to be read of a range starts."""
    rest = rescue.blocks.after(start, UNTRIMMED)
    return min(rest.start, end) if rest else end


class Scraping:
    """The pass over what failed in larger reads."""

    def __init__(self, rescue: Rescue) -> None:
        self._rescue = rescue
        self._parts: deque[tuple[int, int]] = deque()  # of what failed, to be read next

    def run(self) -> None:
        self._rescue.piece = 4 * self._rescue.least
        self._rescue.drive(self._following, self._settle)

    def _following(self) -> Optional[tuple[int, int]]:
        if self._parts:
            return self._parts.popleft()
        rescue = self._rescue
        block = rescue.blocks.after(rescue.position, UNTRIMMED + UNSCRAPED)
        if block is None:
            return None
        size = rescue.piece if rescue.quick else rescue.sector
        start = block.start
        end = min(block.end, start - start % size + size)
        rescue.position = end
        return start, end

    def _settle(self, outcome: Outcome) -> None:
        rescue, sector = self._rescue, self._rescue.sector
        at, end = outcome.done, outcome.end
        if outcome.error is None:
            rescue.grow(rescue.cluster)
            return
        if outcome.error.errno == errno.ECANCELED:
            self._parts.append((at, end))
            return
        first, last = at // sector, (end - 1) // sector
        if outcome.ended or first == last:
            rescue.mark(at, end, BAD)
            return
        rescue.shrink()
        cuts = [(first + last + 1) // 2] if rescue.quick else range(first + 1, last + 1)
        edges = [at, *(cut * sector for cut in cuts), end]
        self._parts.extendleft(reversed(list(zip(edges, edges[1:]))))


class Retrying:
    """A pass over the bad sectors; larger reads where a file of the source has ended."""

    def __init__(self, rescue: Rescue, *, forwards: bool) -> None:
        self._rescue, self._forwards = rescue, forwards
        self._ended = False
        self._parts: deque[tuple[int, int]] = deque()

    def run(self) -> None:
        self._rescue.position = 0 if self._forwards else self._rescue.size
        self._rescue.drive(self._following, self._settle)

    def _following(self) -> Optional[tuple[int, int]]:
        if self._parts:
            return self._parts.popleft()
        rescue = self._rescue
        size = rescue.most if self._ended else rescue.sector
        if self._forwards:
            block = rescue.blocks.after(rescue.position, BAD)
            if block is None:
                return None
            start, end = block.start, min(block.end, block.start - block.start % size + size)
            rescue.position = end
        else:
            block = rescue.blocks.before(rescue.position, BAD)
            if block is None:
                return None
            start, end = max(block.start, (block.end - 1) // size * size), block.end
            rescue.position = start
        return start, end

    def _settle(self, outcome: Outcome) -> None:
        sector = self._rescue.sector
        at, end = outcome.done, outcome.end
        self._ended = outcome.ended and at == outcome.start
        if outcome.error is None or outcome.ended:
            return
        if outcome.error.errno == errno.ECANCELED:
            self._parts.append((at, end))
        elif end - outcome.start > sector:
            cuts = range(at // sector + 1, (end - 1) // sector + 1)
            edges = [at, *(cut * sector for cut in cuts), end]
            self._parts.extend(zip(edges, edges[1:]))
