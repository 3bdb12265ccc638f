"""--partition: one partition of a disk as the disk."""

from __future__ import annotations

import argparse
from typing import Any

from nbdtool import gpt, mbr
from nbdtool.disk import Disk
from nbdtool.errors import Error, UsageError, listed
from nbdtool.gpt import Partition
from nbdtool.layers.window import Window
from nbdtool.progress import human
from nbdtool.values import size

OPTION = "--partition"
FILTER = "partition"
ARGUMENT: dict[str, Any] = {
    "metavar": "PARTITION",
    "help": "serve this partition: its number, label, UUID or type (such as esp)",
}


def add_arguments(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--sector-size",
        "--partition-sectorsize",
        type=size,
        metavar="SIZE",
        help="of the partition table: 512 or 4K (guessed)",
    )


def open(disk: Disk, value: str, args: argparse.Namespace) -> Disk:
    """The partition that value names; raises Error if there is none, or more than one."""
    if args.sector_size not in (None, 512, 4096):
        raise UsageError(f"--sector-size={args.sector_size}: 512 or 4K")
    partitions = read_table(disk, args.sector_size)
    number = _choose(disk, partitions, value)
    start, length = partitions[number][:2]
    if start + length > disk.size:
        raise Error(
            f"{disk.description}: partition {number} ends at byte {start + length}, the disk at"
            f" {disk.size}: the disk is cut off, or its sectors have another size (--sector-size)"
        )
    return Window(disk, start, length, f"{disk.description}, partition {number}")


def read_table(disk: Disk, sector: int | None = None) -> dict[int, Partition]:
    """The partitions of a disk by number, in bytes; they may end past its end.

    sector is 512 or 4096, or None to guess. Raises Error if there is no valid table.
    """
    counted = gpt.sector_size(disk)
    if sector is None:
        sector = counted or (4096 if disk.block_size[0] >= 4096 else 512)
    partitions = mbr.read(disk, sector)
    protective = partitions and any(p.type == mbr.PROTECTIVE for p in partitions.values())
    # Beside an MBR that doesn't protect it, a GUID partition table is a relic.
    if protective or (not partitions and counted):
        return gpt.read(disk, sector)
    if partitions is None:
        raise Error(f"{disk.description}: no partition table (GPT or MBR)")
    return partitions


def _choose(disk: Disk, partitions: dict[int, Partition], value: str) -> int:
    text = value.lower()
    kinds = {text, gpt.TYPES.get(text), mbr.TYPES.get(text)}
    for found in (
        [number for number in partitions if text == str(number)],
        [number for number, partition in partitions.items() if partition.guid == text],
        [number for number, partition in partitions.items() if partition.name == value != ""],
        [number for number, partition in partitions.items() if partition.type in kinds],
    ):
        if len(found) == 1:
            return found[0]
        if found:
            these = _listed({number: partitions[number] for number in found})
            raise Error(f"{disk.description}: several partitions are {value!r}: {these}")
    there = _listed(partitions) or "no partition at all"
    raise Error(f"{disk.description}: no partition {value!r}; there is {there}")


def _listed(partitions: dict[int, Partition]) -> str:
    names = {kind: name for types in (gpt.TYPES, mbr.TYPES) for name, kind in types.items()}
    return listed(
        f"{number} ({names.get(partition.type, 'type ' + partition.type)}"
        + (f", {partition.name!r}" if partition.name else "")
        + f", {human(partition.length)})"
        for number, partition in partitions.items()
    )
