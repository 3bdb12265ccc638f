"""Fetching a disk as nbdtool cdi does, in the process of the test."""

from __future__ import annotations

import argparse
import contextlib
import random

import pytest

from nbdtool.commands import cdi
from nbdtool.disk import read_bytes
from nbdtool.errors import Error
from tests.registry import rig

MIB = 1 << 20
DATA = random.Random(2).randbytes(3 * MIB) + bytes(MIB)
LAYER = rig.tar(("disk/vm", DATA))


def fetch(name: str, *options: str) -> bytes:
    """The disk that `nbdtool cdi NAME --find-disk` serves."""
    parser = argparse.ArgumentParser()
    cdi.add_arguments(parser)
    words = [f"--name={name}", "--find-disk", *options]
    if not any(word.startswith("--tls-verify") for word in words):
        words.append("--tls-verify=off")
    (disk,) = cdi.open(parser.parse_args(words)).values()
    with contextlib.closing(disk):
        return read_bytes(disk, 0, disk.size)


def refused(name: str, *options: str) -> str:
    """Why there is no disk."""
    with pytest.raises(Error) as caught:
        fetch(name, *options)
    return str(caught.value)
