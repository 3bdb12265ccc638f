"""NBD servers for the tests of the client."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Callable

import pytest


@pytest.fixture(scope="session")
def nbd_server() -> Callable[..., contextlib.AbstractContextManager[str]]:
    """with nbd_server("qemu-nbd", "-f", "raw", image) as uri: ...

    Any server that takes a socket with -k or -U; `path` says where it is to be.
    """

    @contextlib.contextmanager
    def nbd_server(program: str, *args: Any, path: Path | None = None) -> Iterator[str]:
        with tempfile.TemporaryDirectory(prefix="nbdtool-test-") as name:
            where = path or Path(name) / "socket"
            where.unlink(missing_ok=True)
            own = {"qemu-nbd": ["-t", "-e", "16", "-k"], "nbdkit": ["-f", "-U"]}[program]
            process = subprocess.Popen([program, *own, str(where), *map(str, args)])
            try:
                wait_until_accepting(process, where)
                yield f"nbd+unix:///?socket={where}"
            finally:
                process.kill()
                process.wait()

    return nbd_server


def wait_until_accepting(process: subprocess.Popen[Any], path: Path) -> None:
    deadline = time.monotonic() + 30
    while True:
        assert process.poll() is None, "the server ended"
        assert time.monotonic() < deadline, "the server doesn't listen"
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as probe:
            probe.connect(str(path))
            return
        time.sleep(0.01)
