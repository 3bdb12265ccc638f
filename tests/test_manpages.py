"""The manual pages: complete, and clean for man."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Callable

import pytest

from nbdtool import options

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("man")
    subprocess.run([sys.executable, ROOT / "tools/build_manpages.py", directory], check=True)
    return directory


def rendered(page: Path, warnings: bool = False) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "MANROFFSEQ": "", "MANWIDTH": "80", "LC_ALL": "C.UTF-8"}
    command = ["man", *(["--warnings"] if warnings else []), "-E", "UTF-8", "-l", str(page)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True)


def test_man_finds_nothing_to_warn_of(pages: Path) -> None:
    found = sorted(pages.glob("*.1"))
    assert len(found) == len(options.command_names()) + 1
    for page in found:
        assert rendered(page, warnings=True).stderr == ""


def test_mandoc_finds_no_fault(pages: Path) -> None:
    for page in pages.glob("*.1"):
        done = subprocess.run(
            ["mandoc", "-T", "lint", "-W", "warning", page], capture_output=True, text=True
        )
        assert done.stdout == ""


@pytest.mark.parametrize("command", [None, *options.command_names()])
def test_page_has_all_options_and_the_usual_sections(pages: Path, command: str | None) -> None:
    name = f"nbdtool-{command}" if command else "nbdtool"
    text = (pages / f"{name}.1").read_text().replace("\\-", "-")
    for heading in "NAME", "SYNOPSIS", "DESCRIPTION", "EXAMPLES", "SEE ALSO":
        assert re.search(f"^.SH {heading}$", text, re.MULTILINE), heading
    shared = set(options.build_parser()._option_string_actions)
    found = set(options.build_parser(command)._option_string_actions) if command else shared
    for option in found - shared if command else shared - {"--help"}:
        assert re.search(rf"^.*\\fB{re.escape(option)}\\fR", text, re.MULTILINE), option


def test_differences_from_nbdkit_are_told(pages: Path) -> None:
    text = rendered(pages / "nbdtool.1").stdout
    section = text.partition("DIFFERENCES FROM NBDKIT")[2].partition("SEE ALSO")[0]
    for word in "foreground", "newstyle", "loopback", "private Unix socket", "0600", "removed":
        assert word in section, word


def test_dangers_of_linuxdisk_are_told(pages: Path) -> None:
    text = " ".join(rendered(pages / "nbdtool-linuxdisk.1").stdout.split())
    for words in (
        "must not be mounted by two at once, even if both mount it read-only",
        "for one that others write to, add copy",
        "tar archive, as it is or compressed by gzip, xz, bzip2 or zstd",
    ):
        assert words in text, words


def test_each_source_has_its_page_and_prose(pages: Path, run: Callable[..., str]) -> None:
    text = rendered(pages / "nbdtool.1").stdout
    for command in options.command_names():
        assert f"nbdtool-{command}(1)" in text
        assert (ROOT / "man" / f"nbdtool-{command}.inc").exists()
