"""Whole runs with --verify, --sha256 and --json, and what SIGUSR1 prints."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any, Callable

import pytest

MIB = 1 << 20


@pytest.fixture
def image(tmp_path: Path, random_file: Callable[..., Path]) -> Path:
    return random_file(tmp_path / "image", 8 * MIB)


class Waiting:
    """A run that writes to a FIFO, of which it has filled the first part."""

    def __init__(self, command: list[str], image: Path, tmp_path: Path, *options: str) -> None:
        os.mkfifo(tmp_path / "fifo")
        words = [*command, "file", str(image), "--to-file", str(tmp_path / "fifo"), *options]
        self.process = subprocess.Popen(
            words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8"
        )
        self.stream = (tmp_path / "fifo").open("rb")
        self.content = self.stream.read(5 * MIB // 2)

    def finish(self) -> tuple[str, str]:
        """Standard output and standard error."""
        self.content += self.stream.read()
        self.stream.close()
        return self.process.communicate(timeout=60)


@pytest.mark.parametrize("options", [[], ["--sha256"]])
def test_signal_prints_the_line(
    command: list[str], image: Path, tmp_path: Path, options: list[str]
) -> None:
    run = Waiting(command, image, tmp_path, *options)
    for _ in range(3):
        run.process.send_signal(signal.SIGUSR1)
        time.sleep(0.1)
    stderr = run.finish()[1]
    assert run.process.returncode == 0
    assert run.content == image.read_bytes()
    lines = stderr.splitlines()
    assert 1 <= len(lines) <= 3  # two that come at once are one
    for line in lines:
        assert line.startswith("nbdtool: writing: ") and "MiB of 8.0 MiB, " in line


@pytest.mark.slow
def test_signal_prints_what_a_rescue_does(command: list[str], image: Path, tmp_path: Path) -> None:
    slow = ["nbdkit", "-f", "-U", tmp_path / "slow", "--filter=delay", "file", image, "rdelay=60"]
    uri = f"nbd+unix:///?socket={tmp_path}/slow"
    words = [*command, "nbd", uri, f"--to-file={tmp_path}/target", f"--rescue={tmp_path}/map"]
    with subprocess.Popen(slow, stderr=subprocess.DEVNULL) as source:
        wait_for(tmp_path / "slow")
        with subprocess.Popen(words, stderr=subprocess.PIPE, encoding="utf-8") as process:
            wait_for(tmp_path / "map")
            time.sleep(0.3)
            process.send_signal(signal.SIGUSR1)
            assert process.stderr
            line = process.stderr.readline()
            process.send_signal(signal.SIGTERM)
            assert process.wait(60) == 128 + signal.SIGTERM
        source.kill()
    assert line == (
        "nbdtool: rescuing: 0 B of 8.0 MiB, 0%, nothing bad, 0 B/s, average 0 B/s, copying\n"
    )


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.slow
def test_lines_of_a_run(command: list[str], image: Path, tmp_path: Path) -> None:
    run = Waiting(command, image, tmp_path, "--json", "--sha256")
    time.sleep(1.5)
    stdout, stderr = run.finish()
    assert stderr == ""
    *lines, last = map(json.loads, stdout.splitlines())
    assert 2 <= len(lines) <= 5
    assert {line["total"] for line in lines} == {8 * MIB}
    assert last == {
        "status": "done",
        "files": [
            {
                "export": "",
                "file": str(tmp_path / "fifo"),
                "size": 8 * MIB,
                "complete": True,
                "sha256": hashlib.sha256(image.read_bytes()).hexdigest(),
            }
        ],
    }


def test_script_that_goes_away(command: list[str], image: Path, tmp_path: Path) -> None:
    run = Waiting(command, image, tmp_path, "--json")
    assert run.process.stdout
    run.process.stdout.close()
    run.content += run.stream.read()
    assert run.process.wait(60) == 0
    assert run.content == image.read_bytes()


def test_interrupted_run_ends_with_a_line(command: list[str], image: Path, tmp_path: Path) -> None:
    run = Waiting(command, image, tmp_path, "--json", "--sha256")
    run.process.send_signal(signal.SIGTERM)
    stdout, stderr = run.process.communicate(timeout=60)
    run.stream.close()
    assert run.process.returncode == 128 + signal.SIGTERM
    assert stderr == ""
    last = json.loads(stdout.splitlines()[-1])
    assert (last["status"], last["error"]) == ("failed", "interrupted")
    assert last["files"][0]["complete"] is False


def test_source_that_cannot_be_opened(nbdtool: Callable[..., Any], tmp_path: Path) -> None:
    words = ["file", tmp_path / "missing", "--to-file", tmp_path / "target", "--json"]
    done = nbdtool(*words, status=1)
    (line,) = map(json.loads, done.stdout.splitlines())
    assert line["status"] == "failed" and line["files"] == []
    assert done.stderr == f"nbdtool: error: {line['error']}\n"


def test_standard_output_is_the_disk_alone(nbdtool: Callable[..., Any], image: Path) -> None:
    for options in ["--sha256"], ["--json"], ["--sha256", "--json"]:
        done = nbdtool("file", image, "--to-file", "-", *options, binary=True, status=0)
        assert done.stdout == image.read_bytes()
    sha256 = hashlib.sha256(done.stdout).hexdigest()
    assert json.loads(done.stderr.splitlines()[-1])["files"][0]["sha256"] == sha256
    done = nbdtool("file", image, "--to-file", "-", "--sha256", binary=True, status=0)
    assert done.stderr.decode() == f"{sha256}  -\n"


def test_digest_that_nobody_can_be_told(
    nbdtool: Callable[..., Any], image: Path, tmp_path: Path
) -> None:
    with open("/dev/full", "wb") as full:
        done = nbdtool("file", image, "--to-file", tmp_path / "x", "--sha256", stdout=full)
    assert done.returncode == 1
    assert "No space left on device" in done.stderr


@pytest.mark.parametrize(
    "words",
    [
        ["--verify"],
        ["--sha256", "-p", "0"],
        ["--json"],
        ["--rescue=map"],
        ["--to-file=x", "--to-dir=y"],
        ["--to-dir=x", "-p", "0"],
        ["--to-file=-", "--verify"],
        ["--to-file=/dev/null", "--verify"],
        ["--to-file=-", "--rescue=map"],
        ["--to-file=x", "--rescue=map", "--verify"],
        ["--to-file=x", "--retries=3"],
        ["--to-file=x", "--read-timeout=3"],
        ["--to-file=x", "--fill=0x00"],
        ["--to-file=x", "--rescue=map", "--fill=0x0"],
        ["--to-file=x", "--rescue=map", "--fill="],
        ["--to-file=x", "--rescue=map", "--retries=-2"],
        ["--to-file=x", "--rescue=map", "--read-timeout=0"],
        ["--to-dir=x", "--rescue=../map"],
        ["--to-dir=x", "--rescue=img"],
    ],
)
def test_wrong_usage(nbdtool: Callable[..., Any], tmp_path: Path, words: list[str]) -> None:
    done = nbdtool("file", tmp_path / "missing", *words, status=2, cwd=tmp_path)
    assert done.stderr.count("\n") == 1 and done.stdout == ""
    assert os.listdir(tmp_path) == []
