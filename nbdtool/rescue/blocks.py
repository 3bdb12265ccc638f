"""What became of each byte of a disk in a rescue: blocks of one state, as GNU ddrescue has them."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator
from typing import NamedTuple, Optional

UNTRIED, UNTRIMMED, UNSCRAPED, BAD, DONE = STATES = "?*/-+"
FAILED = UNTRIMMED + UNSCRAPED + BAD  # tried, and not rescued


class Block(NamedTuple):
    """The bytes [start, end) and their state, one of STATES."""

    start: int
    end: int
    state: str


class Blocks:
    """The blocks of `size` bytes: contiguous, sorted, neighbours of different states.

    totals has the bytes of each state, and areas the number of separate runs of failed bytes.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.totals = dict.fromkeys(STATES, 0)
        self.totals[UNTRIED] = size
        self.areas = 0
        self._starts = [0] if size else []
        self._states = [UNTRIED] if size else []

    @classmethod
    def of(cls, size: int, blocks: Iterable[Block]) -> Blocks:
        """From contiguous blocks that cover all of it."""
        made = cls(0)
        made.size = size
        last = ""
        for start, end, state in blocks:
            made.totals[state] += end - start
            if state != last:
                made.areas += state in FAILED and (not last or last not in FAILED)
                made._starts.append(start)
                made._states.append(state)
                last = state
        return made

    def __len__(self) -> int:
        return len(self._starts)

    def __iter__(self) -> Iterator[Block]:
        ends = [*self._starts[1:], self.size]
        return map(Block, self._starts, ends, self._states)

    @property
    def failed(self) -> int:
        """Bytes that were tried, and not rescued."""
        return sum(self.totals[state] for state in FAILED)

    def _block(self, index: int) -> Block:
        following = index + 1
        end = self._starts[following] if following < len(self._starts) else self.size
        return Block(self._starts[index], end, self._states[index])

    def state(self, position: int) -> str:
        """The state of a byte."""
        return self._states[bisect_right(self._starts, position) - 1]

    def after(self, position: int, states: str) -> Optional[Block]:
        """What lies at or after a position of the first block of one of the states."""
        index = max(bisect_right(self._starts, position) - 1, 0)
        for at in range(index, len(self._starts)):
            if self._states[at] in states:
                block = self._block(at)
                if block.end > position:
                    return Block(max(block.start, position), block.end, block.state)
        return None

    def before(self, position: int, states: str) -> Optional[Block]:
        """What lies before a position of the last block of one of the states."""
        for at in range(bisect_left(self._starts, position) - 1, -1, -1):
            if self._states[at] in states:
                block = self._block(at)
                return Block(block.start, min(block.end, position), block.state)
        return None

    def within(self, start: int, end: int, states: str) -> Iterator[Block]:
        """The parts of [start, end) in one of the states; they may be marked meanwhile."""
        while start < end:
            block = self.after(start, states)
            if block is None or block.start >= end:
                return
            yield Block(block.start, min(block.end, end), block.state)
            start = block.end

    def mark(self, start: int, end: int, state: str) -> None:
        """Set the state of [start, end), which isn't empty."""
        starts, states = self._starts, self._states
        first = bisect_right(starts, start) - 1
        stop = bisect_left(starts, end)
        for at in range(first, stop):
            old_start, old_end, old = self._block(at)
            self.totals[old] -= min(old_end, end) - max(old_start, start)
        self.totals[state] += end - start
        made = [(start, state)]
        if starts[first] < start:
            made.insert(0, (starts[first], states[first]))
        if end < (starts[stop] if stop < len(starts) else self.size):
            made.append((end, states[stop - 1]))
        low, high = max(first - 1, 0), min(stop + 1, len(starts))
        made[:0] = zip(starts[low:first], states[low:first])
        made += zip(starts[stop:high], states[stop:high])
        merged = [made[0]]
        merged += [new for old, new in zip(made, made[1:]) if old[1] != new[1]]
        before = states[low - 1] if low else ""
        self.areas -= _areas(before, states[low:high])
        self.areas += _areas(before, [each for _, each in merged])
        starts[low:high] = [each for each, _ in merged]
        states[low:high] = [each for _, each in merged]


def _areas(before: str, states: list[str]) -> int:
    """How many runs of failed blocks start here."""
    count, inside = 0, bool(before) and before in FAILED
    for state in states:
        failed = state in FAILED
        count += failed and not inside
        inside = failed
    return count
