"""A server that a test starts in its own way; no traceback in a thread goes unseen."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Callable

import pytest

pytest.register_assert_rewrite("tests.server.wire", "tests.server.harness")

from nbdtool.disk import Disk  # noqa: E402
from tests.server.wire import MIB, wait_for  # noqa: E402

Run = Callable[..., Any]


@pytest.fixture(scope="module")
def image(random_file: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_file(tmp_path_factory.mktemp("image") / "image", 4 * MIB)


@pytest.fixture(params=[1, 8])
def threads(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """How many threads may answer one client, whatever its disk is."""
    monkeypatch.setattr(Disk, "parallel", request.param)
    return int(request.param)


@pytest.fixture
def start(command: list[str], tmp_path: Path) -> Run:
    """with start("file", path, ...) as process: ... where it listens is the test's affair.

    process.log() is standard error, process.out() standard output; its exit status is left open.
    """

    @contextlib.contextmanager
    def start(*args: Any, **kwargs: Any) -> Iterator[Any]:
        pid_file = tmp_path / "pid"
        pid_file.unlink(missing_ok=True)
        words = [*command, *map(os.fspath, args), "-P", str(pid_file)]
        out, err = (tmp_path / "out").open("wb"), (tmp_path / "err").open("wb")
        kwargs = {"stdin": subprocess.DEVNULL, "stdout": out, "stderr": err, **kwargs}
        process: Any = subprocess.Popen(words, **kwargs)
        process.log = lambda: (tmp_path / "err").read_text()
        process.out = lambda: (tmp_path / "out").read_text()
        try:
            wait_for(lambda: pid_file.exists() or process.poll() is not None, process.log)
            assert pid_file.exists(), process.log()
            yield process
        finally:
            process.terminate()
            try:
                process.wait(20)
            finally:
                process.kill()
        assert "Traceback" not in process.log(), process.log()

    return start


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A traceback in one of the server's threads fails the test that it served."""
    for item in items:
        if "/server/" in str(item.path):
            item.add_marker(
                pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")
            )
