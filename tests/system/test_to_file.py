"""--to-file: the old file or the new one, one line and status 1 for a failure, no leftovers."""

from __future__ import annotations

import contextlib
import os
import random
import select
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Callable

import pytest

MIB = 1 << 20
OLD = b"old content"


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """Where targets go; nothing but them may be left in it."""
    folder = tmp_path / "folder"
    folder.mkdir()
    yield folder
    assert {path.name for path in folder.iterdir()} <= {"target"}


@pytest.fixture
def image(tmp_path: Path, random_file: Callable[..., Path]) -> Path:
    return random_file(tmp_path / "image", 8 * MIB)


@pytest.fixture
def tree(tmp_path: Path, random_file: Callable[..., Path]) -> Path:
    (tmp_path / "tree").mkdir()
    for number in range(8):
        random_file(tmp_path / "tree" / f"file{number}", 2 * MIB, seed=number)
    return tmp_path / "tree"


def failed_with(done: subprocess.CompletedProcess[str], text: str) -> bool:
    """Status 1 and one line that has `text`."""
    assert done.returncode == 1, done
    assert done.stderr.startswith("nbdtool: error: "), done.stderr
    assert done.stderr.count("\n") == 1, done.stderr
    assert text in done.stderr
    return True


def test_written_silently(nbdtool: Callable[..., Any], image: Path, folder: Path) -> None:
    done = nbdtool("file", image, "--to-file", folder / "target", status=0)
    assert (done.stdout, done.stderr) == ("", "")
    assert (folder / "target").read_bytes() == image.read_bytes()


def test_holes_stay_holes(nbdtool: Callable[..., Any], tmp_path: Path, folder: Path) -> None:
    with (tmp_path / "image").open("wb") as file:
        file.truncate(5 << 30)
        file.seek(3 << 30)
        file.write(b"x" * 4096)
    nbdtool("file", tmp_path / "image", "--to-file", folder / "target", status=0)
    st = (folder / "target").stat()
    assert st.st_size == 5 << 30
    assert st.st_blocks * 512 <= 65536
    with (folder / "target").open("rb") as file:
        file.seek((3 << 30) - 1)
        assert file.read(4098) == b"\0" + b"x" * 4096 + b"\0"


def test_link_is_followed(
    nbdtool: Callable[..., Any], image: Path, folder: Path, tmp_path: Path
) -> None:
    target = folder / "target"
    target.write_bytes(OLD)
    os.chown(target, 1234, 5678)
    target.chmod(0o604)
    (tmp_path / "link").symlink_to(target)
    nbdtool("file", image, "--to-file", tmp_path / "link", status=0)
    assert (tmp_path / "link").is_symlink()
    assert target.read_bytes() == image.read_bytes()
    st = target.stat()
    assert (st.st_mode & 0o7777, st.st_uid, st.st_gid) == (0o604, 1234, 5678)


@pytest.mark.parametrize("options, reason", [("size=4m", "No space left"), ("ro", "Read-only")])
def test_filesystem_that_is_full_or_read_only(
    nbdtool: Callable[..., Any],
    run: Callable[..., Any],
    image: Path,
    tmp_path: Path,
    options: str,
    reason: str,
) -> None:
    directory = tmp_path / "mounted"
    directory.mkdir()
    run("mount", "-t", "tmpfs", "none", directory)
    try:
        (directory / "target").write_bytes(OLD)
        run("mount", "-o", f"remount,{options}", directory)
        for name in "target", "new":
            done = nbdtool("file", image, "--to-file", directory / name)
            assert failed_with(done, f"{directory / name}: {reason}")
        assert os.listdir(directory) == ["target"]
        assert (directory / "target").read_bytes() == OLD
    finally:
        run("umount", directory)


def test_no_such_folder(nbdtool: Callable[..., Any], image: Path, tmp_path: Path) -> None:
    target = tmp_path / "missing" / "target"
    done = nbdtool("file", image, "--to-file", target)
    assert failed_with(done, f"{target}: No such file or directory")


def test_loop_device(
    nbdtool: Callable[..., Any], loop_device: Callable[..., Any], image: Path, tmp_path: Path
) -> None:
    os.truncate(image, 12 * MIB)
    (tmp_path / "device").write_bytes(b"\xff" * (16 * MIB))
    with loop_device(tmp_path / "device") as device:
        nbdtool("file", image, "--to-file", device, status=0)
    assert (tmp_path / "device").read_bytes() == image.read_bytes().ljust(16 * MIB, b"\xff")
    os.truncate(tmp_path / "device", MIB)
    with loop_device(tmp_path / "device") as device:
        done = nbdtool("file", image, "--to-file", device)
        assert failed_with(done, f"{device}: the device has {MIB} bytes, the disk {12 * MIB}")


def test_standard_output(nbdtool: Callable[..., Any], image: Path, tmp_path: Path) -> None:
    done = nbdtool("file", image, "--to-file", "-", binary=True, status=0)
    assert (done.stdout, done.stderr) == (image.read_bytes(), b"")
    with (tmp_path / "output").open("wb") as output:
        nbdtool("file", image, "--to-file", "-", stdout=output, status=0)
    assert (tmp_path / "output").read_bytes() == image.read_bytes()


def test_pipe_that_closes_early(command: list[str], image: Path) -> None:
    process = subprocess.Popen(
        [*command, "file", image, "--to-file", "-"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="latin-1",
    )
    assert process.stdout
    process.stdout.read(1000)
    process.stdout.close()
    with process:
        assert process.stderr
        done = subprocess.CompletedProcess([], process.wait(60), "", process.stderr.read())
    assert failed_with(done, "standard output: Broken pipe")


def test_file_of_the_tree_changes_meanwhile(command: list[str], tree: Path) -> None:
    process = subprocess.Popen(
        [*command, "linuxdisk", tree, "--to-file", "-"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="latin-1",
    )
    with process:
        assert process.stdout and process.stderr
        process.stdout.read(1000)  # it has seen the tree, and waits for us
        for file in tree.iterdir():
            with file.open("r+b") as stream:
                stream.write(b"changed")
        rest = process.stdout.read()
        done = subprocess.CompletedProcess([], process.wait(60), rest, process.stderr.read())
    assert failed_with(done, f"{tree}/file")


class Killing:
    """Runs that are killed at a random moment, over an old target and without one in turn."""

    def __init__(self, command: list[str], image: Path, target: Path, seed: int) -> None:
        self.words = [*command, "file", os.fspath(image), "--to-file", os.fspath(target)]
        self.target = target
        self.content = image.read_bytes()
        self.generator = random.Random(seed)
        self.turns = 0
        self.complete = 0  # runs whose target was there in spite of it
        start = time.monotonic()
        subprocess.run(self.words, check=True)
        self.duration = time.monotonic() - start

    def kill(self, sig: signal.Signals, *, started: bool) -> tuple[int, str]:
        """The exit status and standard error of a run; wait for it to write if `started`."""
        old = OLD if self.turns % 2 else b""
        self.turns += 1
        self.target.unlink(missing_ok=True)
        if old:
            self.target.write_bytes(old)
        with subprocess.Popen(self.words, stderr=subprocess.PIPE, encoding="utf-8") as process:
            while started and process.poll() is None and not self.writes(process.pid):
                time.sleep(0.001)
            time.sleep(self.generator.uniform(0, self.duration * (0.5 if started else 1.1)))
            process.send_signal(sig)
            status = process.wait(60)
            assert process.stderr
            stderr = process.stderr.read()
        found = self.target.read_bytes() if self.target.exists() else b""
        assert found in (self.content, old), "a part of the file"
        assert os.listdir(self.target.parent) == (["target"] if found else []), "a leftover"
        assert status or found == self.content
        self.complete += found == self.content
        return status, stderr

    def writes(self, pid: int) -> bool:
        with contextlib.suppress(OSError):
            for link in Path(f"/proc/{pid}/fd").iterdir():
                if os.readlink(link) == os.fspath(self.target.parent):
                    return True
        return False


@pytest.fixture
def killing(
    command: list[str], random_file: Callable[..., Path], tmp_path: Path, folder: Path
) -> Killing:
    return Killing(command, random_file(tmp_path / "image", 64 * MIB), folder / "target", 1)


@pytest.mark.slow
def test_killed_at_any_moment(killing: Killing) -> None:
    for _ in range(30):
        status, _ = killing.kill(signal.SIGKILL, started=False)
        assert status in (0, -signal.SIGKILL)
    assert killing.complete < 30


@pytest.mark.slow
@pytest.mark.parametrize("sig", [signal.SIGTERM, signal.SIGINT])
def test_interrupted_at_any_moment(killing: Killing, sig: signal.Signals) -> None:
    for _ in range(10):
        before = killing.complete
        status, stderr = killing.kill(sig, started=True)
        if killing.complete == before:  # else it was on its way out
            assert status == 128 + sig
        assert stderr == ""
    assert killing.complete < 10


def test_progress_on_a_terminal(command: list[str], image: Path, tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    controller, terminal = os.openpty()
    environment = {**os.environ, "COLUMNS": "80"}
    words = [*command, "file", os.fspath(image), "--to-file", os.fspath(fifo)]
    process = subprocess.Popen(words, stderr=terminal, env=environment)
    os.close(terminal)
    with process, fifo.open("rb") as stream:
        content = stream.read(MIB)
        time.sleep(1)
        content += stream.read()
        assert process.wait(60) == 0
    assert content == image.read_bytes()
    shown = ""
    with contextlib.suppress(OSError):  # EIO at the end
        while select.select([controller], [], [], 10)[0]:
            shown += os.read(controller, 65536).decode()
    os.close(controller)
    assert "writing: " in shown and "MiB of 8.0 MiB, " in shown and "/s, 0:0" in shown
    assert shown.endswith("\r\x1b[K")
    assert "\n" not in shown


def test_not_while_serving(nbdtool: Callable[..., Any], image: Path, folder: Path) -> None:
    for option in ["-p", "12345"], ["-U", "-"], ["-s"], ["--run", "true"]:
        done = nbdtool("file", image, "--to-file", folder / "target", *option, status=2)
        assert done.stderr.count("\n") == 1
    assert not (folder / "target").exists()
