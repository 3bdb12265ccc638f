"""make and its helpers, as someone who builds and installs meets them."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Callable

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
NOBODY: dict[str, Any] = {"user": "nobody", "group": "nogroup", "extra_groups": []}


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of this tree in which make can build; it shares the virtual environment."""
    tree = tmp_path / "tree"
    tree.mkdir()
    for name in "nbdtool", "tools", "man":
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in "Makefile", "pyproject.toml", "README.md", "LICENSE":
        shutil.copy2(ROOT / name, tree)
    (tree / ".venv").symlink_to(ROOT / ".venv")
    return tree


@pytest.fixture
def public() -> Iterator[Path]:
    """tools/, and a directory for a fake PATH, where nobody may read them."""
    with tempfile.TemporaryDirectory(prefix="nbdtool-test-") as name:
        Path(name).chmod(0o755)
        shutil.copytree(ROOT / "tools", Path(name, "tools"))
        Path(name, "bin").mkdir()
        yield Path(name)


def script(path: Path, text: str) -> None:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


@pytest.mark.slow
def test_install_puts_the_program_and_its_pages_below_destdir_and_prefix(
    tree: Path, run: Callable[..., str], tmp_path: Path
) -> None:
    before = {path.relative_to(tree) for path in tree.rglob("*")}
    target = tmp_path / "root"
    run("make", "-C", tree, "install", f"DESTDIR={target}", "PREFIX=/usr")
    installed = sorted(str(path.relative_to(target)) for path in target.rglob("*.*"))
    assert "usr/share/man/man1/nbdtool.1" in installed
    assert "usr/share/man/man1/nbdtool-linuxdisk.1" in installed
    program = target / "usr/bin/nbdtool"
    assert program.stat().st_mode & 0o777 == 0o755
    assert run(program, "--version").startswith("nbdtool ")
    run("make", "-C", tree, "clean")
    assert {path.relative_to(tree) for path in tree.rglob("*")} == before - {Path(".venv")}


@pytest.mark.slow
def test_make_does_nothing_when_all_is_built(tree: Path, run: Callable[..., str]) -> None:
    run("make", "-C", tree)
    assert "Nothing to be done" in run("make", "-C", tree)
    (tree / "nbdtool/errors.py").touch()
    assert "build_zipapp" in run("make", "-C", tree)


def test_help_names_the_targets(tree: Path, run: Callable[..., str]) -> None:
    text = run("make", "-C", tree, "help")
    for target in "check", "check-quick", "check-pythons", "bench", "fuzz", "man", "install":
        assert f"make {target} " in text


def test_missing_venv_module_is_one_line_for_who_may_not_install(public: Path) -> None:
    script(public / "bin/python", "exit 1")
    script(public / "bin/dpkg-query", "exit 1")
    script(public / "bin/sudo", "exit 1")
    done = subprocess.run(
        [public / "tools/venv", public / "bin/python", public / "venv", "/dev/null"],
        env={"PATH": f"{public / 'bin'}:{os.environ['PATH']}"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        **NOBODY,
    )
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "as root, run: apt-get" in done.stderr
    assert done.stderr.endswith(" python3-venv\n")


def test_packages_that_are_there_are_not_installed_again(public: Path) -> None:
    script(public / "bin/apt-get", "echo apt-get was run; exit 1")
    done = subprocess.run(
        [public / "tools/packages", "coreutils", "e2fsprogs"],
        env={"PATH": f"{public / 'bin'}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_check_pythons_fails_for_a_python_that_is_missing() -> None:
    done = subprocess.run(
        [ROOT / "tools/check-pythons", "3.1"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert (done.stdout, done.stderr) == ("", "check-pythons: Python 3.1 is not here\n")
