"""A table of regions, as `Regions` in disks/regions takes it."""

from __future__ import annotations

from array import array

HOLE = 0  # the owner of what isn't allocated
PADDING = 1  # the owner of what is allocated and zero: an empty piece of memory


class Table:
    """Regions in any order: bytes from the start of the filesystem, owners, places in those."""

    def __init__(self) -> None:
        self.starts = array("Q")
        self.lengths = array("Q")
        self.owners = array("i")
        self.places = array("Q")

    def add(self, start: int, length: int, owner: int, place: int = 0) -> None:
        """Add a region of `length` bytes, at least 1."""
        self.starts.append(start)
        self.lengths.append(length)
        self.owners.append(owner)
        self.places.append(place)

    def sorted(self, size: int) -> tuple[array[int], array[int], array[int]]:
        """starts, owners and places in order, the gaps up to `size` filled with holes."""
        starts, owners, places = array("Q"), array("i"), array("Q")
        end = 0
        for index in sorted(range(len(self.starts)), key=self.starts.__getitem__):
            start = self.starts[index]
            if start != end:
                assert start > end, "regions overlap"
                starts.append(end)
                owners.append(HOLE)
                places.append(0)
            starts.append(start)
            owners.append(self.owners[index])
            places.append(self.places[index])
            end = start + self.lengths[index]
        assert end <= size, "regions past the end"
        if end < size:
            starts.append(end)
            owners.append(HOLE)
            places.append(0)
        return starts, owners, places
