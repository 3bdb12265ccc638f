"""The blocks of a map against a string of states."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from nbdtool.rescue.blocks import FAILED, STATES, Blocks

SIZE = 40
MARKS = st.tuples(st.integers(0, SIZE - 1), st.integers(1, SIZE), st.sampled_from(STATES))


@given(st.lists(MARKS, max_size=30), st.integers(0, SIZE), st.text(STATES, min_size=1))
def test_like_a_string(marks: list[tuple[int, int, str]], position: int, wanted: str) -> None:
    blocks, states = Blocks(SIZE), "?" * SIZE
    for start, length, state in marks:
        end = min(start + length, SIZE)
        blocks.mark(start, end, state)
        states = states[:start] + state * (end - start) + states[end:]
        assert blocks.areas == sum(failed for failed, _ in itertools.groupby(states, _failed))
    runs = [(state, len(list(group))) for state, group in itertools.groupby(states)]
    assert [(block.state, block.end - block.start) for block in blocks] == runs
    assert blocks.totals == {state: states.count(state) for state in STATES}
    assert "".join(blocks.state(at) for at in range(SIZE)) == states
    again = Blocks.of(SIZE, blocks)
    assert (list(again), again.totals, again.areas) == (
        list(blocks),
        blocks.totals,
        blocks.areas,
    )
    after = [at for at in range(position, SIZE) if states[at] in wanted]
    found = blocks.after(position, wanted)
    assert (found.start if found else None) == (after[0] if after else None)
    before = [at for at in range(position) if states[at] in wanted]
    found = blocks.before(position, wanted)
    assert (found.end - 1 if found else None) == (before[-1] if before else None)
    inside = [at for part in blocks.within(3, position, wanted) for at in range(part[0], part[1])]
    assert inside == [at for at in range(3, position) if states[at] in wanted]


def _failed(state: str) -> bool:
    return state in FAILED
