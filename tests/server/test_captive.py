"""--run: a command with the server to itself."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any, Callable

import pytest

from tests.server.wire import MIB

Run = Callable[..., Any]


def test_run_gives_the_command_the_server_and_its_variables(nbdtool: Run, image: Path) -> None:
    script = (
        'echo "$uri|$nbd|$port|$unixsocket|$exportname|$tls"; nbdinfo --size "$uri";'
        ' stat -c %a "$unixsocket" "${unixsocket%/*}"'
    )
    done = nbdtool("file", image, "--run", script, status=0)
    variables, size, *modes = done.stdout.splitlines()
    uri, nbd, port, unixsocket, exportname, tls = variables.split("|")
    assert uri == nbd == f"nbd+unix:///?socket={unixsocket}"
    assert (port, exportname, tls) == ("", "", "")
    assert int(size) == 4 * MIB
    assert modes == ["600", "700"]
    assert not Path(unixsocket).parent.exists()
    assert done.stderr == ""


def test_run_with_a_port_a_socket_and_a_name(nbdtool: Run, image: Path, tmp_path: Path) -> None:
    script = 'echo "$uri $nbd $port $exportname"; nbdinfo --size "$uri"'
    done = nbdtool("file", image, "-p", "0", "-e", "a b/c", "--run", script, status=0)
    first, size = done.stdout.splitlines()
    uri, nbd, port, name = first.split(" ", 3)
    assert uri == nbd == f"nbd://localhost:{port}/a%20b/c"
    assert (name, size) == ("a b/c", str(4 * MIB))
    done = nbdtool("file", image, "-U", tmp_path / "s", "--run", 'qemu-img info "$nbd"', status=0)
    assert "4 MiB" in done.stdout


@pytest.mark.parametrize("name", ["", "näme"])
def test_run_spells_nbd_as_qemu_and_guestfish_want_it(
    nbdtool: Run, image: Path, name: str, tmp_path: Path
) -> None:
    options = ["-e", name] if name else []
    for where in [], ["-p", "0"], ["-U", tmp_path / "s"]:
        script = 'qemu-img info --output=json "$nbd"'
        done = nbdtool("file", image, *options, *where, "--run", script, status=0)
        assert json.loads(done.stdout)["virtual-size"] == 4 * MIB
        # guestfish itself would be slow: it hands the URI's parts to qemu
        script = ': guestfish; echo "$nbd"'
        spelt = nbdtool("file", image, *options, *where, "--run", script, status=0).stdout
        assert re.match(r"nbd://(localhost:\d+)?(/n%C3%A4me)?(\?socket=/.*)?\n", spelt)
        assert ("?socket=" in spelt) == (where[:1] != ["-p"])
        assert ("n%C3%A4me" in spelt) == bool(name)


@pytest.mark.parametrize(
    ("script", "status"),
    [("exit 0", 0), ("exit 7", 7), ("false", 1), ("kill -9 $$", 137), ("no-such-command", 127)],
)
def test_run_ends_with_the_status_of_the_command(
    nbdtool: Run, image: Path, script: str, status: int
) -> None:
    nbdtool("file", image, "--run", script, status=status, stderr=subprocess.DEVNULL)


def test_run_ends_its_command_when_it_is_told_to_end(start: Run, image: Path) -> None:
    with start("file", image, "--run", "exec sleep 1000") as process:
        process.terminate()
        assert process.wait(20) == 143


def test_the_command_of_run_can_leave_connections_behind(nbdtool: Run, image: Path) -> None:
    script = (
        f"{shlex.quote(sys.executable)} -c 'import os,socket,time;s=socket.socket(1);"
        's.connect(os.environ["unixsocket"]);s.recv(18);os.fork() or time.sleep(30)\''
        " >/dev/null 2>&1; exit 3"
    )
    done = nbdtool("file", image, "--run", script, status=3)
    assert done.stderr == ""
