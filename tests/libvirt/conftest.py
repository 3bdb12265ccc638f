"""Images for the guests of the tests' own libvirtd (rig.py)."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Callable

import pytest

from tests.libvirt.rig import Rig, backing

MIB = 1 << 20


@pytest.fixture(scope="session")
def rig() -> Iterator[Rig]:
    directory = Path(tempfile.mkdtemp(prefix="nbdtool-libvirt-", dir="/var/tmp"))
    made = Rig(directory)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4M", "none", made.small], check=True)
    try:
        made.start()
        yield made
    finally:
        made.close()
        subprocess.run(["umount", made.small], check=True)
        shutil.rmtree(directory)


@pytest.fixture(scope="session")
def raw_image(rig: Rig, random_file: Callable[..., Path]) -> Path:
    """8 MiB: data, a hole, data."""
    path = random_file(rig.images / "raw", 3 * MIB)
    with path.open("r+b") as file:
        file.truncate(8 * MIB)
        file.seek(7 * MIB)
        file.write(os.urandom(MIB))
    path.chmod(0o666)
    return path


@pytest.fixture(scope="session")
def chain(rig: Rig, raw_image: Path, run: Callable[..., Any]) -> list[Path]:
    """Three qcow2 images, the top one first."""
    base, middle, top = (rig.images / name for name in ("base", "middle", "top"))
    run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", raw_image, base)
    for path, below, write in (
        (middle, base, "write -P 3 1M 1M"),
        (top, middle, "write -P 4 5M 9k"),
    ):
        run("qemu-img", "create", "-q", "-f", "qcow2", "-b", below, "-F", "qcow2", path)
        run("qemu-io", "-f", "qcow2", "-c", write, path)
    for path in (base, middle, top):
        path.chmod(0o666)
    return [top, middle, base]


@pytest.fixture(scope="session")
def backing_chain(chain: list[Path]) -> str:
    """The <backingStore> of the top image."""
    return backing(chain[1], "qcow2", backing(chain[2], "qcow2"))


@pytest.fixture(scope="session")
def compare(run: Callable[..., Any]) -> Callable[..., None]:
    """compare(raw, image, format): qemu-img finds the same in both."""

    def compare(one: Path | str, other: Path, form: str = "raw") -> None:
        run("qemu-img", "compare", "-f", "raw", "-F", form, one, other)

    return compare
