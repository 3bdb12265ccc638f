"""What the tests share: running nbdtool and real clients, serving over NBD, mounting images.

The fixtures are functions, and they live as long as the session, so that fixtures of any scope and
hypothesis' tests can use them. With NBDTOOL in the environment its words are run instead of the
package in this tree: `NBDTOOL="/usr/bin/python3.9 -I dist/nbdtool" pytest tests/system`.

hypothesis draws the same examples in each run; with FUZZ_EXAMPLES=N in the environment it draws N
new ones for each test, except where a test sets max_examples itself.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable

import hypothesis
import pytest

ROOT = Path(__file__).resolve().parent.parent
MIB = 1 << 20

hypothesis.settings.register_profile("same", derandomize=True, deadline=None, database=None)
if "FUZZ_EXAMPLES" in os.environ:
    hypothesis.settings.register_profile(
        "fuzz", max_examples=int(os.environ["FUZZ_EXAMPLES"]), deadline=None
    )
hypothesis.settings.load_profile("fuzz" if "FUZZ_EXAMPLES" in os.environ else "same")


@pytest.fixture(scope="session")
def command() -> list[str]:
    """The words that start nbdtool."""
    return shlex.split(os.environ.get("NBDTOOL", "")) or [sys.executable, "-m", "nbdtool"]


@pytest.fixture(scope="session")
def zipapp(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The executable, built from this tree."""
    target = tmp_path_factory.mktemp("zipapp") / "nbdtool"
    subprocess.run([sys.executable, ROOT / "tools/build_zipapp.py", target], check=True)
    return target


@pytest.fixture(scope="session", autouse=True)
def environment() -> None:
    """Children find the package in this tree; messages are in English."""
    os.environ["PYTHONPATH"] = str(ROOT)
    os.environ["LC_ALL"] = "C.UTF-8"


def start_and_wait(argv: list[Any], **kwargs: Any) -> subprocess.CompletedProcess[Any]:
    kwargs.setdefault("timeout", 300)
    if not kwargs.pop("binary", False):
        kwargs |= {"encoding": "utf-8", "errors": "surrogateescape"}
    for stream in "stdout", "stderr":
        kwargs.setdefault(stream, subprocess.PIPE)
    if "input" not in kwargs:
        kwargs.setdefault("stdin", subprocess.DEVNULL)
    return subprocess.run([os.fspath(word) for word in argv], check=False, **kwargs)


@pytest.fixture(scope="session")
def run() -> Callable[..., Any]:
    """run("nbdinfo", "--json", uri) -> standard output; anything but `status` fails the test.

    With binary=True the output is bytes; other keywords are subprocess.run's.
    """

    def run(*argv: Any, status: int = 0, **kwargs: Any) -> Any:
        done = start_and_wait(list(argv), **kwargs)
        assert done.returncode == status, (
            f"{shlex.join(map(os.fspath, argv))}: exit status {done.returncode}\n"
            f"{done.stderr}\n{str(done.stdout)[-2000:]}"
        )
        return done.stdout

    return run


@pytest.fixture(scope="session")
def nbdtool(command: list[str]) -> Callable[..., subprocess.CompletedProcess[Any]]:
    """nbdtool("file", path, ...) -> CompletedProcess (returncode, stdout, stderr).

    No run of nbdtool may end in a traceback; if `status` is given, it must end with that.
    """

    def nbdtool(
        *args: Any, status: int | None = None, **kwargs: Any
    ) -> subprocess.CompletedProcess[Any]:
        done = start_and_wait([*command, *args], **kwargs)
        stderr = done.stderr or ""
        text = stderr.decode(errors="replace") if isinstance(stderr, bytes) else stderr
        assert "Traceback" not in text and "a fault in nbdtool" not in text, text
        assert status is None or done.returncode == status, text
        return done

    return nbdtool


@dataclass
class Server:
    """A running nbdtool; uri names the default export."""

    process: subprocess.Popen[bytes]
    directory: Path
    uri: str
    unix: Path | None = None
    port: int | None = None

    def log(self) -> str:
        """What it has written to standard error."""
        return (self.directory / "stderr").read_text(errors="replace")

    def connect(self) -> socket.socket:
        """A raw connection for tests that speak the protocol themselves."""
        if self.unix is None:
            return socket.create_connection(("localhost", self.port), timeout=30)
        connection = socket.socket(socket.AF_UNIX)
        connection.settimeout(30)
        connection.connect(str(self.unix))
        return connection

    def wait_until_ready(self, timeout: float = 60) -> None:
        deadline = time.monotonic() + timeout
        pid_file = self.directory / "pid"
        while not (pid_file.exists() and pid_file.read_text()):
            assert self.process.poll() is None, f"nbdtool ended: {self.log()}"
            assert time.monotonic() < deadline, f"nbdtool is not ready: {self.log()}"
            time.sleep(0.01)

    def stop(self, sig: int = signal.SIGTERM, timeout: float = 30) -> int:
        """End it, if it still runs, and return its exit status."""
        if self.process.poll() is None:
            self.process.send_signal(sig)
        try:
            return self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            raise AssertionError(f"nbdtool did not end: {self.log()}") from None


def free_port() -> int:
    with socket.create_server(("localhost", 0)) as listener:
        return int(listener.getsockname()[1])


@pytest.fixture(scope="session")
def serve(command: list[str]) -> Callable[..., contextlib.AbstractContextManager[Server]]:
    """with serve("file", path) as server: ... server.uri, ready for clients.

    On a Unix socket, or with tcp=True on a TCP port of this host, within `ready` seconds;
    status=None leaves it open how the server ends (0 is expected otherwise). Other keywords are
    subprocess.Popen's.
    """

    @contextlib.contextmanager
    def serve(
        *args: Any, tcp: bool = False, status: int | None = 0, ready: float = 60, **kwargs: Any
    ) -> Iterator[Server]:
        with tempfile.TemporaryDirectory(prefix="nbdtool-test-") as name:
            directory = Path(name)
            words = [*command, *map(os.fspath, args), "-P", str(directory / "pid")]
            unix = port = None
            if tcp:
                port = free_port()
                words += ["-p", str(port)]
                uri = f"nbd://localhost:{port}"
            else:
                unix = directory / "socket"
                words += ["-U", str(unix)]
                uri = f"nbd+unix:///?socket={unix}"
            kwargs.setdefault("stdin", subprocess.DEVNULL)
            kwargs.setdefault("stdout", subprocess.DEVNULL)
            with (directory / "stderr").open("wb") as stderr:
                process = subprocess.Popen(words, stderr=stderr, **kwargs)
            server = Server(process, directory, uri, unix, port)
            try:
                server.wait_until_ready(ready)
                yield server
            finally:
                ended = server.stop()
            log = server.log()
            assert "Traceback" not in log and "a fault in nbdtool" not in log, log
            assert status is None or ended == status, f"exit status {ended}: {server.log()}"

    return serve


@pytest.fixture(scope="session")
def random_file() -> Callable[..., Path]:
    """random_file(path, size, seed=0) -> path, filled with the same random bytes each time."""

    def random_file(path: Path, size: int, seed: int = 0) -> Path:
        generator = random.Random(seed)
        with path.open("wb") as file:
            while size:
                piece = min(size, MIB)
                file.write(generator.randbytes(piece))
                size -= piece
        return path

    return random_file


@pytest.fixture(scope="session")
def partition(run: Callable[..., Any]) -> Callable[..., tuple[int, int]]:
    """partition(image, number=1) -> (offset, size) in bytes, as sfdisk reads them."""

    def partition(image: Path, number: int = 1) -> tuple[int, int]:
        table = json.loads(run("sfdisk", "--json", image))["partitiontable"]
        entry, sector = table["partitions"][number - 1], table.get("sectorsize", 512)
        return entry["start"] * sector, entry["size"] * sector

    return partition


@pytest.fixture(scope="session")
def e2fsck(run: Callable[..., Any]) -> Callable[..., None]:
    """e2fsck(image, offset=0): the kernel's checker finds nothing to say about the filesystem."""

    def e2fsck(image: Path, offset: int = 0) -> None:
        target = f"{image}?offset={offset}" if offset else image
        output = run("e2fsck", "-fn", target, stderr=subprocess.STDOUT)
        assert "Fix" not in output and "WARNING" not in output, output

    return e2fsck


@pytest.fixture(scope="session")
def loop_device(run: Callable[..., Any]) -> Callable[..., contextlib.AbstractContextManager[Path]]:
    """with loop_device(image, "--read-only") as device: ... detached at the end."""

    @contextlib.contextmanager
    def loop_device(image: Path, *options: str) -> Iterator[Path]:
        device = run("losetup", "--find", "--show", *options, image).strip()
        try:
            yield Path(device)
        finally:
            run("losetup", "--detach", device)

    return loop_device


@pytest.fixture(scope="session")
def mount(
    run: Callable[..., Any], loop_device: Callable[..., Any]
) -> Callable[..., contextlib.AbstractContextManager[Path]]:
    """with mount(image, offset, size) as directory: ... by the kernel, read-only.

    offset and size in bytes say where the filesystem is (all of the image by default); options are
    mount's -o. Unmounted, and the loop device detached, at the end.
    """

    @contextlib.contextmanager
    def mount(image: Path, offset: int = 0, size: int = 0, options: str = "ro") -> Iterator[Path]:
        window = [f"--offset={offset}"] + ([f"--sizelimit={size}"] if size else [])
        if "ro" in options.split(","):
            window.append("--read-only")
        with contextlib.ExitStack() as stack:
            name = stack.enter_context(tempfile.TemporaryDirectory(prefix="nbdtool-mount-"))
            device = stack.enter_context(loop_device(image, *window))
            run("mount", "-o", options, device, name)
            stack.callback(run, "umount", name)
            yield Path(name)

    return mount
