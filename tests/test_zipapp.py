"""The executable file: how it is built, and where it runs."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Callable

import pytest

ROOT = Path(__file__).resolve().parent.parent
PARTITION = b"EFI PART"


@pytest.fixture(scope="module")
def public(zipapp: Path) -> Iterator[Path]:
    """A directory that all may enter, with a space in its name, holding nbdtool and tree/."""
    with tempfile.TemporaryDirectory(prefix="nbdtool test ", dir="/var/tmp") as name:
        directory = Path(name)
        directory.chmod(0o755)
        shutil.copy(zipapp, directory)
        tree = directory / "tree"
        tree.mkdir()
        (tree / "hello").write_text("hello, disk\n")
        yield directory


def disk_of_tree(public: Path, **kwargs: object) -> bytes:
    """The disk that the executable makes of tree/, as it writes it to standard output."""
    done = subprocess.run(
        [public / "nbdtool", "linuxdisk", public / "tree", "--to-file", "-"],
        capture_output=True,
        cwd="/",
        timeout=60,
        **kwargs,  # type: ignore[call-overload]
    )
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout


@pytest.mark.slow
def test_two_folders_build_the_same_bytes(zipapp: Path, tmp_path: Path) -> None:
    for name in "nbdtool", "tools":
        shutil.copytree(
            ROOT / name,
            tmp_path / name,
            copy_function=shutil.copy,
            ignore=shutil.ignore_patterns("__pycache__"),
        )
    for name in "pyproject.toml", "README.md", "LICENSE":
        shutil.copy(ROOT / name, tmp_path)
    for path in tmp_path.rglob("*"):
        path.chmod(0o700)
    target = tmp_path / "out"
    build = tmp_path / "tools/build_zipapp.py"
    subprocess.run([sys.executable, build, target], check=True, umask=0o077, cwd="/")
    assert target.read_bytes() == zipapp.read_bytes()


def test_archive_holds_modules_and_licences_and_nothing_of_the_build(zipapp: Path) -> None:
    data = zipapp.read_bytes()
    assert data.startswith(b"#!/usr/bin/python3 -I\nPK")
    assert zipapp.stat().st_mode & 0o7777 == 0o755
    with zipfile.ZipFile(zipapp) as archive:
        assert archive.testzip() is None
        infos = archive.infolist()
    names = [info.filename for info in infos]
    assert names == sorted(names)
    assert {"__main__.py", "nbdtool/__main__.py", "nbdtool/disk.py"} <= set(names)
    assert all(name.endswith((".py", ".pyc", "/LICENSE")) for name in names)
    ours = {name for name in names if name.startswith("nbdtool/")}
    assert {name for name in ours if name.endswith(".pyc")} == {
        name + "c" for name in ours if name.endswith(".py")
    }
    lines = (ROOT / "tools/carried.txt").read_text().splitlines()
    carried = {line.partition("==")[0] for line in lines if not line.startswith("#")}
    packages = {name.partition("/")[0] for name in names if name.endswith(".py") and "/" in name}
    assert packages == {"nbdtool"} | carried
    for package in carried:
        assert any(re.match(rf"{package}-.*\.dist-info/LICENSE$", name) for name in names)
    assert {info.date_time for info in infos} == {(1980, 1, 1, 0, 0, 0)}
    for folder in ROOT, Path(tempfile.gettempdir()) / "nbdtool-build", Path.home():
        assert os.fsencode(folder) + b"/" not in data


def test_start_code_parses_under_python_3_6_and_says_what_is_needed(
    zipapp: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with zipfile.ZipFile(zipapp) as archive:
        source = archive.read("__main__.py").decode()
    code = compile(ast.parse(source, feature_version=(3, 6)), "__main__.py", "exec")
    monkeypatch.setattr(sys, "version_info", (3, 8, 10, "final", 0))
    monkeypatch.setattr(sys, "argv", ["/tmp/nbdtool"])
    with pytest.raises(SystemExit) as ended:
        exec(code, {"__name__": "__main__"})
    text = str(ended.value.code)  # sys.exit prints it to standard error and ends with status 1
    assert "Python 3.9 or newer is needed, and this is Python 3.8" in text
    assert "\n" not in text


def test_old_pythons_at_hand_print_the_line(zipapp: Path) -> None:
    pyenv = subprocess.run(["sh", "-c", "pyenv root"], capture_output=True, text=True)
    for python in Path(pyenv.stdout.strip() or "/nonexistent").glob(
        "versions/3.[678].*/bin/python"
    ):
        done = subprocess.run([python, "-I", zipapp, "--version"], capture_output=True, text=True)
        assert done.returncode == 1
        assert done.stdout == ""
        assert done.stderr.startswith("nbdtool: error: Python 3.9 or newer is needed, and this is")
        assert done.stderr.count("\n") == 1


def test_nothing_but_the_standard_library_is_needed_to_load_a_module() -> None:
    for path in (ROOT / "nbdtool").rglob("*.py"):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                modules = [node.module or ""]
            else:
                continue
            for module in modules:
                package = module.partition(".")[0]
                assert package in {"nbdtool"} | sys.stdlib_module_names, f"{path}: {module}"


def test_runs_without_environment_from_a_path_with_spaces(public: Path) -> None:
    assert PARTITION in disk_of_tree(public, env={})[:1024]


def test_runs_as_nobody(public: Path) -> None:
    disk = disk_of_tree(public, user="nobody", group="nogroup", extra_groups=[], env={})
    assert PARTITION in disk[:1024]


def test_runs_where_nothing_can_be_written(public: Path, run: Callable[..., str]) -> None:
    script = """
        findmnt -rno TARGET | while read -r target; do mount -o remount,bind,ro "$target"; done
        touch /var/tmp/nbdtool-probe 2>/dev/null && exit 99
        exec "$0/nbdtool" linuxdisk "$0/tree" --to-file -
    """
    disk = run("unshare", "--mount", "sh", "-c", script, public, binary=True)
    assert PARTITION in disk[:1024]


def test_runs_from_a_squashfs(public: Path, run: Callable[..., str], mount, tmp_path: Path) -> None:
    image = tmp_path / "image"
    run("mksquashfs", public, image, "-quiet", "-no-progress")
    with mount(image) as directory:
        assert PARTITION in disk_of_tree(directory)[:1024]


def test_runs_by_a_relative_path_and_a_symlink_and_another_directory(
    public: Path, run: Callable[..., str], tmp_path: Path
) -> None:
    (tmp_path / "nbdtool").symlink_to(public / "nbdtool")
    command = ["linuxdisk", public / "tree", "--to-file", "-"]
    outputs = [
        run("./nbdtool", *command, cwd=public, binary=True),
        run("python3", "nbdtool", *command, cwd=public, binary=True),
        run(tmp_path / "nbdtool", *command, cwd="/", binary=True),
        run("nbdtool", *command, env={"PATH": f"{tmp_path}:/usr/bin:/bin"}, binary=True),
    ]
    assert all(PARTITION in output[:1024] for output in outputs)


def test_leaves_the_environment_and_files_beside_it_alone(public: Path) -> None:
    (public / "argparse.py").write_text("raise SystemExit('the wrong argparse')\n")
    environment = {"PYTHONPATH": str(public), "PYTHONHOME": "/nonexistent"}
    assert PARTITION in disk_of_tree(public, env=environment)[:1024]
