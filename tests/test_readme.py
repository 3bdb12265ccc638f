"""What README.md tells people to type."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any, Callable

import pytest

from nbdtool import cli, options

README = (Path(__file__).resolve().parent.parent / "README.md").read_text()


def command_lines() -> list[str]:
    """The command lines of nbdtool in the README, without what follows in a comment."""
    return re.findall(r"^    nbdtool (.*?)(?:  +#.*)?$", README, re.MULTILINE)


def test_two_commands_stand_at_the_top() -> None:
    first, second = re.findall(r"^    (.+?)  +#", README, re.MULTILINE)[:2]
    assert first == "make && ./dist/nbdtool linuxdisk nbdtool/ --to-file ext2fs.img"
    assert second == "make check"


@pytest.mark.parametrize("line", command_lines())
def test_command_lines_are_understood(line: str) -> None:
    words = [word.strip("'") for word in re.findall(r"'[^']*'|\S+", line)]
    command, _ = cli.parse(words)
    assert command in options.command_names()


def test_systemd_finds_no_fault_in_the_units(
    run: Callable[..., str], zipapp: Path, tmp_path: Path
) -> None:
    units = re.findall(r"`/etc/systemd/system/(\S+)`\n\n```ini\n(.*?)```", README, re.DOTALL)
    assert [name for name, _ in units] == ["nbd-data.socket", "nbd-data.service"]
    for name, text in units:
        (tmp_path / name).write_text(text.replace("/usr/local/bin/nbdtool", str(zipapp)))
    paths = [tmp_path / name for name, _ in units]
    output: Any = run("systemd-analyze", "verify", "--man=no", *paths, stderr=subprocess.STDOUT)
    assert "nbd-data" not in output
