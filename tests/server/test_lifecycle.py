"""The life of a server: where it listens, whom it tells, as whom it runs, and how it ends."""

from __future__ import annotations

import contextlib
import json
import os
import pwd
import re
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Callable

import pytest

from tests.server import wire
from tests.server.wire import MIB, Client, MemoryDisk, harness

Run = Callable[..., Any]


@pytest.fixture(scope="module")
def image(random_file: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_file(tmp_path_factory.mktemp("image") / "image", 4 * MIB)


@pytest.fixture
def start(command: list[str], tmp_path: Path) -> Run:
    """with start("file", path, ...) as process: ... where it listens is the test's affair.

    process.log() is standard error, process.out() standard output; its exit status is left open.
    """

    @contextlib.contextmanager
    def start(*args: Any, **kwargs: Any) -> Iterator[Any]:
        pid_file = tmp_path / "pid"
        pid_file.unlink(missing_ok=True)
        words = [*command, *map(os.fspath, args), "-P", str(pid_file)]
        out, err = (tmp_path / "out").open("wb"), (tmp_path / "err").open("wb")
        kwargs = {"stdin": subprocess.DEVNULL, "stdout": out, "stderr": err, **kwargs}
        process: Any = subprocess.Popen(words, **kwargs)
        process.log = lambda: (tmp_path / "err").read_text()
        process.out = lambda: (tmp_path / "out").read_text()
        try:
            wait_for(lambda: pid_file.exists() or process.poll() is not None, process.log)
            assert pid_file.exists(), process.log()
            yield process
        finally:
            process.terminate()
            try:
                process.wait(20)
            finally:
                process.kill()
        assert "Traceback" not in process.log(), process.log()

    return start


def wait_for(condition: Callable[[], Any], what: Callable[[], str] = lambda: "") -> Any:
    deadline = time.monotonic() + 20
    while not (result := condition()):
        assert time.monotonic() < deadline, what()
        time.sleep(0.01)
    return result


def listeners(pid: int) -> set[tuple[str, int]]:
    """(address, port) of all TCP sockets that a process listens on."""
    lines = subprocess.check_output(["ss", "-Hltnp"], text=True).splitlines()
    addresses = [line.split()[3] for line in lines if f"pid={pid}," in line]
    return {(address.rpartition(":")[0], int(address.rpartition(":")[2])) for address in addresses}


# TCP


@pytest.mark.parametrize(
    ("options", "hosts"),
    [
        ([], {"127.0.0.1", "[::1]"}),
        (["-4"], {"127.0.0.1"}),
        (["-6"], {"[::1]"}),
        (["-i", "127.0.0.1"], {"127.0.0.1"}),
        (["-i", "::1"], {"[::1]"}),
        (["-i", "0.0.0.0"], {"0.0.0.0"}),
        (["-i", "::"], {"[::]"}),
        (["-i", "*"], {"0.0.0.0", "[::]"}),
        (["-i", "127.0.0.9"], {"127.0.0.9"}),
        (["-4", "--ipaddr=localhost"], {"127.0.0.1"}),
    ],
)
def test_listens_where_it_is_told_on_one_port(
    start: Run, run: Run, image: Path, options: list[str], hosts: set[str]
) -> None:
    with start("file", image, "-r", "-p", "0", "--print-uri", *options) as process:
        uri = wait_for(process.out).strip()
        port = int(uri.rpartition(":")[2].rstrip("/"))
        assert listeners(process.pid) == {(host, port) for host in hosts}
        for host in hosts:
            host = {"0.0.0.0": "127.0.0.1", "[::]": "[::1]"}.get(host, host)
            assert run("nbdinfo", "--size", f"nbd://{host}:{port}") == f"{4 * MIB}\n"
        assert run("nbdinfo", "--size", uri) == f"{4 * MIB}\n"


def test_the_start_line_says_who_can_reach_it_and_its_commands_work(
    start: Run, run: Run, image: Path
) -> None:
    with start("file", image, "-r", "-p", "0", "-e", "a b;c") as process:
        log = wait_for(lambda: process.log() if "guestfish" in process.log() else "")
        assert str(image) in log
        assert "4.0 MiB" in log
        assert "read-only" in log
        assert "to this machine" in log
        nbdinfo, guestfish = [line.strip() for line in log.splitlines() if line.startswith("    ")]
        assert f"export-size: {4 * MIB}" in run("sh", "-c", nbdinfo)
        assert guestfish.startswith("guestfish --ro --format=raw -a nbd://localhost:")
        assert guestfish.endswith("/a%20b%3Bc")
    with start("file", image, "-p", "0", "-i", "*") as process:
        log = wait_for(process.log)
        assert "to anyone who reaches this machine's port" in log
        assert "writable" in log


def test_a_port_in_use_is_an_error_of_one_line(nbdtool: Run, image: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        done = nbdtool("file", image, "-p", port.__str__(), status=1)
    assert re.fullmatch(f"nbdtool: error: .*{port}.*in use.*-p 0\n", done.stderr)


@pytest.mark.parametrize("address", ["192.0.2.1", "nowhere.invalid", "::ffff:1:2:3:4:5:6:7:8", ""])
def test_addresses_that_are_not_here(nbdtool: Run, image: Path, address: str) -> None:
    done = nbdtool("file", image, "-p", "0", "-i", address, status=1)
    assert done.stderr.startswith("nbdtool: error: ")
    assert done.stderr.count("\n") == 1


# Unix sockets


def test_a_unix_socket_is_for_its_owner_and_removed(
    start: Run, run: Run, image: Path, tmp_path: Path
) -> None:
    path = tmp_path / "a socket"
    with start("file", image, "-U", path, umask=0) as process:
        assert path.stat().st_mode & 0o7777 == 0o600
        line = next(line for line in wait_for(process.log).splitlines() if "nbdinfo" in line)
        assert "to this user" in process.log()
        assert "export-size" in run("sh", "-c", line)
    assert not path.exists()
    assert process.returncode == 0
    with start("file", image, "-U", path, "--unix-mode=666", umask=0o077) as process:
        assert path.stat().st_mode & 0o7777 == 0o666
        assert "to all users of this machine" in wait_for(process.log)


def test_a_private_socket_lies_in_a_private_directory(start: Run, run: Run, image: Path) -> None:
    with start("file", image, "-U", "-", "--print-uri") as process:
        uri = wait_for(process.out).strip()
        path = Path(uri.partition("?socket=")[2])
        assert path.parent.stat().st_mode & 0o7777 == 0o700
        assert run("nbdinfo", "--size", uri) == f"{4 * MIB}\n"
    assert not path.parent.exists()


def test_a_stale_socket_is_taken_over_and_a_live_one_is_not(
    start: Run, nbdtool: Run, run: Run, image: Path, tmp_path: Path
) -> None:
    path = tmp_path / "socket"
    with start("file", image, "-U", path) as process:
        process.kill()
        process.wait()
    assert path.is_socket()
    with start("file", image, "-r", "-U", path):
        done = nbdtool("file", image, "-r", "-U", path, status=1)
        assert "answers there already" in done.stderr
        assert run("nbdinfo", "--size", f"nbd+unix:///?socket={path}") == f"{4 * MIB}\n"
    assert not path.exists()


def test_other_files_are_never_taken_for_a_socket(
    nbdtool: Run, image: Path, tmp_path: Path
) -> None:
    precious = tmp_path / "precious"
    precious.write_text("data")
    for path in precious, tmp_path, tmp_path / "none" / "socket", tmp_path / ("n" * 200), "":
        done = nbdtool("file", image, "-U", path, status=1)
        assert done.stderr.startswith("nbdtool: error: ")
        assert done.stderr.count("\n") == 1
    assert precious.read_text() == "data"


def test_a_dangling_symlink_is_not_followed(nbdtool: Run, image: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "nothing")
    nbdtool("file", image, "-U", tmp_path / "link", status=1)
    assert not (tmp_path / "nothing").exists()


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


# --run


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


# Standard input and output


def test_one_client_over_a_socket_on_standard_input(command: list[str], image: Path) -> None:
    ours, theirs = socket.socketpair()
    process = subprocess.Popen([*command, "-s", "file", image], stdin=theirs, stdout=theirs)
    theirs.close()
    client = Client(ours).hello()
    client.go()
    assert client.read(0, 4 * MIB) == image.read_bytes()
    client.send(client.packed(wire.DISC))
    assert client.ended()
    assert process.wait(20) == 0


class Pipes:
    """Two pipes as if they were a socket."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        assert process.stdin and process.stdout
        self._in, self._out = process.stdout, process.stdin

    def settimeout(self, seconds: float) -> None:
        pass

    def sendall(self, data: bytes) -> None:
        self._out.write(data)
        self._out.flush()

    def recv(self, length: int) -> bytes:
        return os.read(self._in.fileno(), length)


def test_one_client_over_pipes(command: list[str], image: Path, tmp_path: Path) -> None:
    words = [*command, "-s", "-v", "file", image]
    with subprocess.Popen(
        words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as process:
        client = Client(Pipes(process)).hello()  # type: ignore[arg-type]
        assert client.outcome(wire.STARTTLS) in (wire.PLATFORM, wire.POLICY)
        client.go()
        assert client.read(0, 4 * MIB) == image.read_bytes()
        assert client.do(wire.READ, 4 * MIB, 1).error == wire.EINVAL
        for _ in range(20):
            client.request(wire.READ, 0, MIB)
        for _ in range(20):
            assert len(client.answer().data) == MIB
        assert process.stdin
        process.stdin.close()
        assert client.ended()
        assert process.wait(20) == 0


@pytest.mark.parametrize("pipes", [True, False])
@pytest.mark.parametrize("asked", [0, 1])
def test_a_signal_ends_the_one_client(
    command: list[str], image: Path, pipes: bool, asked: int
) -> None:
    ours, theirs = socket.socketpair()
    stdin: Any = subprocess.PIPE if pipes else theirs
    with subprocess.Popen([*command, "-s", "file", image], stdin=stdin, stdout=stdin) as process:
        theirs.close()
        client = Client(Pipes(process) if pipes else ours).hello()  # type: ignore[arg-type]
        client.go()
        client.read(0, 1)
        for _ in range(asked):
            client.request(wire.READ, 0, 4 * MIB)
        time.sleep(0.2)
        process.terminate()
        for _ in range(asked):
            assert client.answer().data == image.read_bytes()
        assert process.wait(4) == 0


def test_libnbd_starts_it_as_a_subprocess(command: list[str], run: Run, image: Path) -> None:
    nbd = pytest.importorskip("nbd")
    handle = nbd.NBD()
    handle.connect_command([*command, "-s", "file", str(image), "-r"])
    assert handle.pread(MIB, MIB) == image.read_bytes()[MIB : 2 * MIB]
    handle.shutdown()


# Sockets from a service manager


def test_libnbd_starts_it_by_socket_activation(
    command: list[str], run: Run, image: Path, tmp_path: Path
) -> None:
    run("nbdcopy", "--", "[", *command, "file", image, "-r", "]", tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == image.read_bytes()
    run("nbdcopy", "--", image, "[", *command, "file", tmp_path / "copy", "]")
    assert run("nbdinfo", "--size", "--", "[", *command, "file", image, "]") == f"{4 * MIB}\n"


@pytest.mark.parametrize("unix", [True, False])
def test_socket_activation(
    command: list[str], run: Run, image: Path, tmp_path: Path, unix: bool
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    where = str(tmp_path / "socket") if unix else f"127.0.0.1:{port}"
    uri = f"nbd+unix:///?socket={where}" if unix else f"nbd://{where}"
    words = ["systemd-socket-activate", "-l", where, "-E", "PYTHONPATH", *command, "file", image]
    process = subprocess.Popen(words, stderr=subprocess.DEVNULL)
    try:
        if unix:
            wait_for(lambda: Path(where).exists())
        else:
            wait_for(lambda: listeners(process.pid))
        assert run("nbdinfo", "--size", uri) == f"{4 * MIB}\n"
        assert run("nbdinfo", "--size", uri) == f"{4 * MIB}\n"
    finally:
        process.terminate()
        assert process.wait(20) == 0
    assert Path(where).exists() == unix  # the socket is the manager's


def test_socket_activation_of_another_process_is_not_ours(nbdtool: Run, image: Path) -> None:
    environment = {**os.environ, "LISTEN_PID": "1", "LISTEN_FDS": "1"}
    done = nbdtool("file", image, "--run", "echo $LISTEN_PID", env=environment, status=0)
    assert done.stdout == "1\n"


@pytest.mark.parametrize("count", ["0", "x", "-1", "99999999999999999999", "2"])
def test_bad_socket_activation(command: list[str], nbdtool: Run, image: Path, count: str) -> None:
    words = " ".join(map(shlex.quote, [*command, "file", str(image)]))
    script = f"export LISTEN_PID=$$ LISTEN_FDS={count}; exec {words} 3</dev/null"
    done = subprocess.run(["sh", "-c", script], capture_output=True, text=True, timeout=30)
    assert done.returncode == 1
    assert re.fullmatch("nbdtool: error: [^\n]*\n", done.stderr)


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
