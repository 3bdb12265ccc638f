"""The life of a server: whom it tells that it is there, as whom it runs, and how it ends."""

from __future__ import annotations

import os
import pwd
import re
import shlex
import signal
import socket
import subprocess
import tempfile
from pathlib import Path
from typing import Any, Callable

import pytest

from nbdtool import cli
from nbdtool.errors import UsageError
from nbdtool.server.lifecycle import Server
from tests.server import wire
from tests.server.harness import MemoryDisk, harness
from tests.server.wire import MIB, Client, wait_for

Run = Callable[..., Any]


# Who waits for it


def test_the_pid_file_is_overwritten_and_stays(
    start: Run, nbdtool: Run, image: Path, tmp_path: Path
) -> None:
    with start("file", image, "-U", "-", "-P", tmp_path / "first"):
        pass  # the last -P counts
    assert not (tmp_path / "first").exists()
    with start("file", image, "-U", "-") as process:
        assert (tmp_path / "pid").read_text() == f"{process.pid}\n"
    assert (tmp_path / "pid").read_text() == f"{process.pid}\n"
    (tmp_path / "pid").write_text("1234567890 and more")
    done = nbdtool("file", image, "-P", tmp_path / "pid", "--run", f"cat {tmp_path}/pid", status=0)
    assert re.fullmatch(r"\d+\n", done.stdout)
    assert done.stdout != f"{process.pid}\n"
    (tmp_path / "link").symlink_to("pid")
    nbdtool("file", image, "-P", tmp_path / "link", "--run", "true", status=0)
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "pid").read_text() != done.stdout


def test_a_pid_file_that_cannot_be_written(nbdtool: Run, image: Path, tmp_path: Path) -> None:
    done = nbdtool("file", image, "-U", "-", "-P", tmp_path / "none" / "pid", status=1)
    assert done.stderr.count("\n") == 1
    assert "pid" in done.stderr


@pytest.mark.parametrize("abstract", [False, True])
def test_the_service_manager_is_notified(
    start: Run, image: Path, tmp_path: Path, abstract: bool
) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.settimeout(20)
        name = f"@nbdtool-{os.getpid()}" if abstract else str(tmp_path / "notify")
        manager.bind("\0" + name[1:] if abstract else name)
        with start("file", image, "-U", "-", env={**os.environ, "NOTIFY_SOCKET": name}):
            assert manager.recv(100) == b"READY=1"
        assert manager.recv(100) == b"STOPPING=1"


def test_a_process_in_the_background_is_ready_when_its_parent_ends(
    nbdtool: Run, run: Run, image: Path, tmp_path: Path
) -> None:
    path, pid_file = tmp_path / "socket", tmp_path / "pid"
    # That standard output and error reach their end shows that the server has let go of them.
    done = nbdtool("--fork", "file", image.name, "-U", path, "-P", pid_file, cwd=image.parent,
                   status=0, timeout=30)  # fmt: skip
    pid = int(pid_file.read_text())
    try:
        assert "nbdinfo" in done.stderr
        assert run("nbdinfo", "--size", f"nbd+unix:///?socket={path}") == f"{4 * MIB}\n"
        assert Path(f"/proc/{pid}/cwd").readlink() == Path("/")
        assert os.getsid(pid) == pid
    finally:
        os.kill(pid, signal.SIGTERM)
    wait_for(lambda: not path.exists())


def test_what_fails_in_the_background_is_told_in_the_foreground(
    nbdtool: Run, image: Path, tmp_path: Path
) -> None:
    done = nbdtool("--fork", "file", tmp_path / "nothing", "-U", tmp_path / "socket", status=1)
    assert done.stderr.count("\n") == 1
    done = nbdtool("--fork", "file", image, "-U", tmp_path, status=1)
    assert done.stderr.count("\n") == 1


# As whom


def test_user_and_group_are_changed_after_opening(
    start: Run, run: Run, random_file: Callable[..., Path]
) -> None:
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        image = random_file(directory / "image", MIB)
        image.chmod(0o600)
        path = directory / "socket"
        with start("file", image, "-U", path, "-u", "nobody", "-g", "daemon") as process:
            wait_for(process.log)
            uri = f"nbd+unix:///?socket={path}"
            assert run("nbdinfo", "--size", uri) == f"{MIB}\n"
            run("nbdcopy", image, uri)
            nobody, daemon = pwd.getpwnam("nobody").pw_uid, 1
            status = Path(f"/proc/{process.pid}/status").read_text()
            assert re.search(rf"Uid:\t{nobody}\t{nobody}\t{nobody}\t{nobody}\n", status)
            assert re.search(rf"Gid:\t{daemon}\t{daemon}\t{daemon}\t{daemon}\n", status)
            groups = re.search(r"Groups:\t(.*)\n", status)
            assert groups and "0" not in groups[1].split()
            assert path.stat().st_uid == nobody


@pytest.mark.parametrize(
    "options", [["-u", "65534"], ["-u", "nobody"], ["-u", "4242", "-g", "4243"]]
)
def test_root_leaves_nothing_of_itself(start: Run, image: Path, options: list[str]) -> None:
    with start("file", image, "-p", "0", *options, extra_groups=[0, 4]) as process:
        wait_for(process.log)
        status = Path(f"/proc/{process.pid}/status").read_text()
        for line in status.splitlines():
            name, _, values = line.partition(":")
            if name in ("Uid", "Gid", "Groups"):
                assert not {"0", "4"} & set(values.split()), line
            if name in ("CapPrm", "CapEff"):
                assert int(values, 16) == 0


@pytest.mark.parametrize(
    "options", [["-u", "no-such-user"], ["-g", "no-such-group"], ["-u", "4242"]]
)
def test_users_that_are_not_there(nbdtool: Run, image: Path, options: list[str]) -> None:
    done = nbdtool("file", image, "-U", "-", *options, status=1)
    assert options[1] in done.stderr
    assert done.stderr.count("\n") == 1


def test_who_may_not_change_the_user_is_told(zipapp: Path, image: Path) -> None:
    image.parent.chmod(0o755)
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        copy = Path(name, "image")
        copy.write_bytes(bytes(MIB))
        copy.chmod(0o644)
        program = Path(name, "nbdtool")
        program.write_bytes(zipapp.read_bytes())
        program.chmod(0o755)
        Path(name).chmod(0o1777)
        done = subprocess.run(
            [program, "file", copy, "-U", "-", "-u", "root"],
            env={"TMPDIR": name},
            user="nobody",
            group="nogroup",
            extra_groups=[],
            capture_output=True,
            text=True,
            timeout=30,
        )
        assert sorted(os.listdir(name)) == ["image", "nbdtool"]
    assert done.returncode == 1
    assert re.fullmatch("nbdtool: error: .*root.*\n", done.stderr)


def test_it_exits_with_its_parent(command: list[str], image: Path, tmp_path: Path) -> None:
    path = tmp_path / "socket"
    words = [*command, "file", image, "-U", path, "--exit-with-parent"]
    script = " ".join(map(shlex.quote, map(str, words))) + " & wait"
    with subprocess.Popen(["sh", "-c", script], stderr=subprocess.DEVNULL) as parent:
        wait_for(path.exists)
        parent.kill()
    wait_for(lambda: not path.exists())


def test_messages_can_go_to_a_file(start: Run, image: Path, tmp_path: Path) -> None:
    with start("file", image, "-U", "-", f"--log={tmp_path / 'log'}") as process:
        wait_for(lambda: "nbdinfo" in (tmp_path / "log").read_text())
    assert process.log() == ""


def test_it_serves_without_standard_streams(start: Run, run: Run, tmp_path: Path) -> None:
    path = tmp_path / "socket"

    def close() -> None:
        os.closerange(0, 3)

    odd = tmp_path / "odd"
    odd.write_bytes(b"x" * 1000)  # of which is warned
    for options in [], ["--fork"]:
        with start("file", odd, "-U", path, *options, preexec_fn=close):
            copy = run("nbdcopy", f"nbd+unix:///?socket={path}", "-")
            assert copy == "x" * 1000
            os.kill(int((tmp_path / "pid").read_text()), signal.SIGTERM)
        wait_for(lambda: not path.exists())


def test_a_size_that_the_kernel_would_cut_is_warned_of(start: Run, tmp_path: Path) -> None:
    odd = tmp_path / "odd"
    odd.write_bytes(bytes(1000))
    with start("file", odd, "-U", "-") as process:
        assert "nbdtool: warning: " in wait_for(process.log)
        assert "1000 bytes are no multiple of 512" in process.log()


# The end


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGQUIT, signal.SIGTERM])
def test_signals_end_it_in_good_order(start: Run, image: Path, tmp_path: Path, number: int) -> None:
    path = tmp_path / "socket"
    with start("file", image, "-U", path) as process:
        idle = [connect(path) for _ in range(3)]
        for client in idle:
            client.go()
            client.read(0, 100)
        half_open = [connect(path) for _ in range(20)]
        process.send_signal(number)
        assert process.wait(20) == 0
        assert "cut" not in process.log()
        for client in [*idle, *half_open]:
            assert client.ended()
    assert not path.exists()


def connect(path: Path) -> Client:
    sock = socket.socket(socket.AF_UNIX)
    sock.connect(str(path))
    return Client(sock).hello()


def test_requests_in_flight_are_finished(start: Run, image: Path, tmp_path: Path) -> None:
    path = tmp_path / "socket"
    with start("file", image, "-U", path) as process:
        client = connect(path)
        client.go()
        in_flight(client)
        process.terminate()
        wait_for(lambda: refused(path))
        assert client.answer().data == image.read_bytes()
        assert client.ended()
        assert process.wait(20) == 0
        assert "cut" not in process.log()


def in_flight(client: Client) -> None:
    """Send a request whose answer has begun, and waits for us to take it."""
    client.request(wire.READ, 0, 4 * MIB)
    client.sock.recv(1, socket.MSG_PEEK)


def refused(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as probe:
        return probe.connect_ex(str(path)) != 0


def test_a_second_signal_ends_it_at_once(start: Run, image: Path, tmp_path: Path) -> None:
    path = tmp_path / "socket"
    with start("file", image, "-U", path) as process:
        client = connect(path)
        client.go()
        in_flight(client)
        process.terminate()
        wait_for(lambda: refused(path))
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 130
    assert not path.exists()


@pytest.mark.slow
def test_a_client_that_takes_nothing_is_cut_off_at_the_end(
    start: Run, image: Path, tmp_path: Path
) -> None:
    path = tmp_path / "socket"
    with start("file", image, "-U", path) as process:
        client = connect(path)
        client.go()
        in_flight(client)
        process.terminate()
        assert process.wait(20) == 0
        assert "warning: cut 1 connection(s) off" in process.log()
    assert not path.exists()


def test_what_clients_have_written_is_flushed_at_the_end() -> None:
    """The disk is flushed and closed by the program, whatever ends the service."""
    disk = MemoryDisk()
    with harness(disk) as running:
        client = running.client()
        assert client.write(0, b"data") == 0
        running.service.finish()
        assert client.ended()
    assert disk.done == [("write", 0, 4)]


@pytest.mark.parametrize("option", [["-e", "name"], ["-o"]])
def test_what_names_or_knows_one_export_refuses_several(option: list[str]) -> None:
    _, args = cli.parse(["file", "image", "-U", "-", *option])
    with pytest.raises(UsageError, match="here are 2"):
        Server(args).run({"a": MemoryDisk(), "b": MemoryDisk()})
