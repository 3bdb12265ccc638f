"""Build nbdtool as one executable file: build_zipapp.py TARGET.

shiv assembles the archive. Its own start-up code would unpack it into the user's home, so it is
replaced by bootstrap.py, which imports from the archive in place. What would differ from build to
build is left out or levelled: paths, dates, modes, the order of entries, and compression, which
depends on the zlib at hand (and slows the start: a module loads fastest when it is stored).

Our modules are there twice, as source and compiled by the Python that builds: that halves the start
under the same version of Python, and the others pass over what isn't theirs.
"""

from __future__ import annotations

import io
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

TOOLS = Path(__file__).resolve().parent
SOURCE = TOOLS.parent
SHEBANG = b"#!/usr/bin/python3 -I\n"
KEPT = re.compile(r"site-packages/(?!bin/)(.+\.py|[^/]+\.dist-info/(?:licenses/)?LICENSE)")
DATE = (1980, 1, 1, 0, 0, 0)


def assemble(directory: Path) -> Path:
    """What shiv makes of this tree and of what it carries, in a directory of its own.

    setuptools leaves files beside the source that it builds, and takes stale ones from there, so
    it gets a fresh copy.
    """
    source, archive = directory / "source", directory / "archive"
    shutil.copytree(
        SOURCE / "nbdtool", source / "nbdtool", ignore=shutil.ignore_patterns("__pycache__")
    )
    for name in "pyproject.toml", "README.md", "LICENSE":
        shutil.copy(SOURCE / name, source / name)
    shiv = [sys.executable, "-m", "shiv", "-o", str(archive), "-e", "nbdtool.__main__:main"]
    pip = ["--quiet", "--no-deps", "--no-build-isolation", "--no-compile", str(source)]
    carried = ["-r", str(TOOLS / "carried.txt")]
    subprocess.run([*shiv, *pip, *carried], check=True)
    return archive


def repack(archive: Path) -> bytes:
    """The same modules behind our own start-up code, as the bytes of an executable archive."""
    entries = {"__main__.py": (TOOLS / "bootstrap.py").read_bytes()}
    with zipfile.ZipFile(archive) as assembled:
        for name in assembled.namelist():
            if match := KEPT.fullmatch(name):
                entries[match[1]] = assembled.read(name)
    entries.update(compiled({n: d for n, d in entries.items() if n.startswith("nbdtool/")}))
    packed = io.BytesIO()
    packed.write(SHEBANG)
    with zipfile.ZipFile(packed, "a") as target:
        for name, data in sorted(entries.items()):
            info = zipfile.ZipInfo(name, DATE)
            info.create_system, info.external_attr = 3, 0o100644 << 16
            target.writestr(info, data)
    return packed.getvalue()


def compiled(sources: dict[str, bytes]) -> dict[str, bytes]:
    """Modules as zipimport takes them compiled: neither date nor source is looked at."""
    with tempfile.TemporaryDirectory(prefix="nbdtool-build-") as name:
        directory = Path(name)
        for source, data in sources.items():
            path = directory / source
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        options = ("-q", "-s", name, "--invalidation-mode", "unchecked-hash", name)
        level = {**os.environ, "PYTHONHASHSEED": "0"}  # the order of sets in the code
        subprocess.run([sys.executable, "-m", "compileall", *options], check=True, env=level)
        return {
            f"{path.parent.parent.relative_to(directory)}/{path.name.split('.')[0]}.pyc": (
                path.read_bytes()
            )
            for path in directory.rglob("*.pyc")
        }


def main() -> None:
    target = Path(sys.argv[1])
    with tempfile.TemporaryDirectory(prefix="nbdtool-build-") as name:
        packed = repack(assemble(Path(name)))
    target.parent.mkdir(parents=True, exist_ok=True)
    fresh = target.with_name(target.name + ".new")
    fresh.write_bytes(packed)
    fresh.chmod(0o755)
    os.replace(fresh, target)


if __name__ == "__main__":
    main()
