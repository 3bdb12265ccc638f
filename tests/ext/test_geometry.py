"""The division of a filesystem into groups: all of it has its place."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

from hypothesis import example, given
from hypothesis import strategies as st

from nbdtool.ext.geometry import fit, smallest
from tests.ext import oracle


@given(
    block_size=st.sampled_from([1024, 2048, 4096]),
    inodes=st.integers(12, 2_000_000),
    data=st.integers(1, 1_000_000),
    more=st.one_of(st.just(0), st.integers(1, 50_000)),
    flex=st.booleans(),
)
@example(block_size=1024, inodes=577_661, data=681, more=0, flex=True)
def test_what_fits_can_be_placed(
    block_size: int, inodes: int, data: int, more: int, flex: bool
) -> None:
    least = smallest(block_size, inodes, data, flex=flex)
    assert fit(block_size, least.blocks - 1, inodes, data, flex=flex) is None
    geometry = fit(block_size, least.blocks + more, inodes, data, flex=flex) if more else least
    if geometry is None:
        return  # another group, which costs more than there is
    geometry.place()
    assert geometry.inodes >= inodes and geometry.free >= data
    pieces = geometry.pieces(0, geometry.free)
    assert sum(piece.blocks for piece in pieces) == geometry.free
    assert pieces[-1].start + pieces[-1].blocks <= geometry.blocks
    metadata = sum(end - start for start, end in geometry.reserved)
    assert metadata + geometry.free + geometry.first_data_block == geometry.blocks


def test_inode_tables_around_a_late_superblock(
    tmp_path: Path, e2fsck: Callable[..., None], partition: Callable[..., tuple[int, int]]
) -> None:
    """Group 49 has a superblock where the tables of groups 48 to 63 would lie."""
    (tmp_path / "tree").mkdir()
    image = tmp_path / "image"
    options = ["type=ext4", "block-size=1K", "--no-journal", "inodes=577661"]
    oracle.write_disk(oracle.open_disk(tmp_path / "tree", *options), image)
    offset, _ = partition(image)
    e2fsck(image, offset)
    found = subprocess.run(
        ["dumpe2fs", "-o", "superblock=1", "-o", "blocksize=1024", f"{image}?offset={offset}"],
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    assert "Group 49: " in found and "Group 63: " in found
