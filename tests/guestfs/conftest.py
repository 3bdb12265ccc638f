"""The disks that all tests of guests share (images.py)."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.guestfs.images import Images, make_images


@pytest.fixture(scope="session")
def images() -> Iterator[dict[str, Images]]:
    """images["vg"].disks, .devices["/dev/vg0/lin"].sha256 ...; nobody writes to them."""
    directory = Path(tempfile.mkdtemp(prefix="nbdtool-guestfs-", dir="/var/tmp"))
    try:
        yield make_images(directory)
    finally:
        shutil.rmtree(directory)
