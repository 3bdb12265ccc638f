"""LVM2's own commands without device-mapper: volume groups are made, but never active."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def run(*words: Any, **kwargs: Any) -> str:
    """Standard output of a command that must succeed."""
    argv = [os.fspath(word) for word in words]
    done = subprocess.run(argv, capture_output=True, check=False, text=True, **kwargs)
    assert done.returncode == 0, f"{' '.join(argv)}: {done.stderr}{done.stdout}"
    return done.stdout


@contextlib.contextmanager
def loop_device(image: Path, start: int = 0, size: int = 0) -> Iterator[str]:
    """A device of `size` bytes of an image, or all of it; detached at the end."""
    window = ["-o", str(start), "--sizelimit", str(size)]
    device = run("losetup", "--find", "--show", *window, image).strip()
    try:
        yield device
    finally:
        run("losetup", "--detach", device)


class HostLvm:
    """LVM that sees only the devices given, and keeps what it must in a directory of its own."""

    def __init__(self, directory: Path, devices: list[str]) -> None:
        directory.mkdir(exist_ok=True)
        accept = ", ".join(f'"a|^{device}$|"' for device in devices)
        (directory / "lvm.conf").write_text(
            f"""devices {{ filter = [ {accept}, "r|.*|" ]
                use_devicesfile = 0
                hints = "none" }}
            backup {{ backup = 0
                archive = 0 }}
            global {{ locking_dir = "{directory}" }}
            activation {{ udev_sync = 0
                udev_rules = 0 }}"""
        )
        self._environment = {**os.environ, "LVM_SYSTEM_DIR": str(directory), "LC_ALL": "C"}

    def __call__(self, line: str) -> str:
        """lvm("vgcreate vg0 /dev/loop0") -> standard output."""
        command, *words = line.split()
        if command == "lvcreate":
            words += ["-an", "-Wn", "-Zn"]
        return run("lvm", command, "--driverloaded", "n", *words, env=self._environment)
