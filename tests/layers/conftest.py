"""qcow2 images for the tests of layers."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Callable

import pytest


@pytest.fixture(scope="session")
def write(run: Callable[..., Any]) -> Callable[..., None]:
    """write(path, "write -P 1 0 64k", ...): change a qcow2 image with qemu-io."""

    def write(path: Path, *commands: str) -> None:
        if commands:
            words = [word for command in commands for word in ("-c", command)]
            run("qemu-io", "-f", "qcow2", path, *words)

    return write


@pytest.fixture(scope="session")
def create(run: Callable[..., Any], write: Any) -> Callable[..., Path]:
    """create(path, size, "compat=1.1,...", "write 0 64k", ...) -> path of a new qcow2 image."""

    def create(path: Path, size: int, options: str = "", *commands: str) -> Path:
        options = options or "compat=1.1"
        run("qemu-img", "create", "-q", "-f", "qcow2", "-o", options, path, str(size))
        write(path, *commands)
        return path

    return create


@pytest.fixture(scope="session")
def raw(run: Callable[..., Any]) -> Callable[..., bytes]:
    """raw(path) -> what qemu reads from a qcow2 image."""

    def raw(path: Path) -> bytes:
        target = path.with_suffix(".raw")
        run("qemu-img", "convert", "-f", "qcow2", "-O", "raw", path, target)
        data = target.read_bytes()
        target.unlink()
        return data

    return raw
