"""What the world does to nbdtool: closed or full streams, too few descriptors, odd words."""

from __future__ import annotations

import contextlib
import os
import resource
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any, Callable

import pytest

Run = Callable[..., Any]

ROOT = Path(__file__).resolve().parents[2]
FULL = os.open("/dev/full", os.O_RDWR)  # a disk without room for another byte


@pytest.fixture
def image(tmp_path: Path) -> Path:
    image = tmp_path / "image"
    image.write_bytes(os.urandom(1 << 20))
    return image


def one_line(text: str) -> str:
    assert text.startswith("nbdtool: error: ")
    assert text.count("\n") == 1
    return text


@pytest.mark.parametrize("words", ["--version", "-V", "--help", "--help file", "--dump-config"])
def test_output_that_can_not_be_written(nbdtool: Run, words: str) -> None:
    done = nbdtool(*words.split(), status=1, stdout=FULL)
    assert "No space left" in one_line(done.stderr)
    reading, writing = os.pipe()
    os.close(reading)
    done = nbdtool(*words.split(), status=1, stdout=writing)
    os.close(writing)
    assert "Broken pipe" in one_line(done.stderr)


@pytest.mark.parametrize("stream", [0, 1, 2])
def test_no_file_takes_the_place_of_a_closed_stream(
    nbdtool: Run, image: Path, tmp_path: Path, stream: int
) -> None:
    def close() -> None:
        os.close(stream)

    before = image.read_bytes()
    script = "echo out; echo err >&2; cat"
    nbdtool("file", image, "--run", script, preexec_fn=close)
    assert image.read_bytes() == before
    nbdtool("file", image, "--to-file", tmp_path / "copy", status=0, preexec_fn=close)
    assert (tmp_path / "copy").read_bytes() == before
    done = nbdtool("file", image, "--to-file=-", preexec_fn=close, binary=True)
    assert (done.returncode, done.stdout) == ((1, b"") if stream == 1 else (0, before))


def test_a_message_that_finds_no_room_leaves_the_status_alone(nbdtool: Run, image: Path) -> None:
    for stderr in FULL, None:
        close = (lambda: os.close(2)) if stderr is None else None
        nbdtool("file", image / "none", status=1, stderr=stderr, preexec_fn=close)
        nbdtool("file", status=2, stderr=stderr, preexec_fn=close)
        script = "nbdinfo --size $uri"
        done = nbdtool("file", image, "-v", "--run", script, stderr=stderr, preexec_fn=close)
        assert (done.returncode, done.stdout) == (0, f"{1 << 20}\n")


def test_a_log_on_a_full_disk_stops_nothing(serve: Run, run: Run, image: Path) -> None:
    with serve("file", image, "-v", "--log=/dev/full") as server:
        assert run("nbdinfo", "--size", server.uri) == f"{1 << 20}\n"


@pytest.mark.parametrize("most", [9, 12, 16, 32])
def test_few_descriptors(
    nbdtool: Run, run: Run, image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))

    monkeypatch.setenv("TMPDIR", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    done = nbdtool("file", image, "--run", "nbdinfo --size $uri", preexec_fn=limit)
    if done.returncode:
        assert most < 32
        one_line(done.stderr)
    else:
        assert done.stdout == f"{1 << 20}\n"
    assert not list((tmp_path / "temporary").iterdir())


def test_a_tree_of_more_files_than_descriptors(
    nbdtool: Run, run: Run, tmp_path: Path, partition: Run, mount: Run
) -> None:
    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))

    tree, image = tmp_path / "tree", tmp_path / "image"
    tree.mkdir()
    for n in range(3000):
        (tree / f"{n}").write_bytes(b"%d" % n * 500)
    nbdtool("linuxdisk", tree, "--to-file", image, status=0, preexec_fn=limit)
    with mount(image, *partition(image)) as mounted:
        run("diff", "-r", "--exclude=lost+found", tree, mounted)
    script = "nbdcopy --request-size=33554432 $uri null:"
    done = nbdtool("linuxdisk", tree, "--run", script, status=0, preexec_fn=limit)
    assert done.stderr == ""


def test_what_a_file_has_lost_is_not_taken_for_zeroes(nbdtool: Run, image: Path) -> None:
    script = f"truncate -s 500000 {image}; nbdinfo --map $uri || nbdcopy --no-extents $uri null:"
    done = nbdtool("file", image, "-r", "--run", script, status=1)
    assert f"{image}: has become shorter" in done.stderr
    assert f"{image}: can't be read on" in done.stderr  # by sendfile, in the middle of a reply


def test_what_another_user_can_not_read_is_refused_with_the_way_out(
    nbdtool: Run, tmp_path: Path
) -> None:
    tree = tmp_path / "tree"
    tree.mkdir()
    (tree / "secret").write_text("x")
    (tree / "secret").chmod(0o600)
    words = ["linuxdisk", tree, "-u", "nobody", "--run", "nbdcopy $uri null:"]
    done = nbdtool(*words, status=1)
    assert f"{tree}/secret: Permission denied" in one_line(done.stderr)
    assert "--copy" in done.stderr
    nbdtool(*words, "--copy", status=0)


def test_bytes_that_are_not_utf_8_are_shown_as_bytes(nbdtool: Run) -> None:
    done = nbdtool("file", os.fsdecode(b"no\xff\n\x1b[31m"), status=1)
    assert one_line(done.stderr).startswith(r"nbdtool: error: no\xff\n\x1b[31m: No such file")


def test_what_stands_where_the_socket_should_is_named(nbdtool: Run, image: Path) -> None:
    done = nbdtool("file", image, "-r", "-U", image, status=1)
    assert f"{image}: is there, and is no socket" in one_line(done.stderr)
    with contextlib.suppress(FileNotFoundError):
        assert image.stat().st_size == 1 << 20


@pytest.mark.parametrize("words", ["-g 99999999999999999", "-u 4294967295", "-u 99999999999999999"])
def test_numbers_that_no_user_has(nbdtool: Run, image: Path, words: str) -> None:
    done = nbdtool("file", image, "--run", "true", *words.split(), status=1)
    assert "too large" in one_line(done.stderr)


def test_a_user_who_can_not_read_nbdtool_itself(run: Run) -> None:
    """All modules are there before the user is changed, those that are needed at the end too."""
    with tempfile.TemporaryDirectory() as name:
        folder, private = Path(name), Path(name, "private")
        folder.chmod(0o777)
        private.mkdir(mode=0o700)
        shutil.copytree(ROOT / "nbdtool", private / "nbdtool")
        for path in folder / "image", folder / "new":
            path.write_bytes(os.urandom(1 << 20))
        words = ["file", folder / "image", "-v", "--cow", "--cow-save", folder / "saved"]
        script = f"nbdcopy {folder}/new $uri; id -un"
        output = run(
            sys.executable, "-m", "nbdtool", *words, "-u", "nobody", "--run", script,
            cwd=folder, env={**os.environ, "PYTHONPATH": str(private)},
        )  # fmt: skip
        assert output == "nobody\n"
        assert (folder / "saved").read_bytes() == (folder / "new").read_bytes()


@pytest.mark.parametrize(
    "words",
    [
        "--tls-verify-peer",  # would check nothing
        "--tls=off --tls-verify-peer",
        "--tls-verify-peer --tls-psk=keys",
        "--tls-psk=keys --tls-certificates=directory",
    ],
)
def test_tls_options_that_would_be_ignored(nbdtool: Run, image: Path, words: str) -> None:
    one_line(nbdtool("file", image, "--run", "true", *words.split(), status=2).stderr)


def test_an_empty_command_is_none(nbdtool: Run, image: Path) -> None:
    for command in "", " \n":
        one_line(nbdtool("file", image, "--run", command, status=2).stderr)


def test_the_nearest_key_is_named_and_never_an_option(nbdtool: Run, image: Path) -> None:
    done = nbdtool("file", image, "allow-life=on", status=2)
    assert "did you mean allow-live=?" in one_line(done.stderr)
    done = nbdtool("file", image, "verbos=on", status=2)  # --verbose has no key=value
    assert "verbose" not in one_line(done.stderr)


def test_dashes_at_the_end_are_no_second_file(nbdtool: Run, image: Path) -> None:
    assert nbdtool("file", image, "--run", "echo ran", "--", status=0).stdout == "ran\n"
    done = nbdtool("file", image, "other", "--run", "true", status=2)
    assert "other: there is one file already" in one_line(done.stderr)
