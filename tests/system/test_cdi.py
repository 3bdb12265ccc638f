"""nbdtool cdi from its start to its end: logins, TLS, signals, full disks, terminals."""

from __future__ import annotations

import base64
import json
import os
import pty
import random
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Callable

import pytest

from tests.registry import rig
from tests.registry.rig import Answer, Request

MIB = 1 << 20
DATA = random.Random(4).randbytes(6 * MIB)
Tool = Callable[..., Any]


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> rig.Certificates:
    return rig.Certificates(tmp_path_factory.mktemp("certificates"))


@pytest.fixture(scope="module")
def layout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    layout = rig.Layout(tmp_path_factory.mktemp("layout") / "oci")
    layout.image(rig.tar(("disk/vm", DATA)), tag="v1")
    return layout.path


@pytest.fixture(scope="module")
def plain(layout: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A registry of plain HTTP that has NAME/k/disk:v1."""
    with rig.registry(tmp_path_factory.mktemp("plain")) as host:
        rig.skopeo(f"oci:{layout}:v1", f"docker://{host}/k/disk:v1")
        yield host


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in "XDG_RUNTIME_DIR", "XDG_CONFIG_HOME", "REGISTRY_AUTH_FILE", "DOCKER_CONFIG":
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "home").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def temporary(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """TMPDIR."""
    (tmp_path / "tmp").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    return tmp_path / "tmp"


# Logins and TLS, with a registry that wants both


@pytest.fixture(scope="module")
def guarded(
    layout: Path, certificates: rig.Certificates, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("guarded")
    with rig.registry(folder, certificates=certificates, htpasswd=True) as host:
        login = f"{rig.USER}:{rig.PASSWORD}"
        rig.skopeo("--dest-creds", login, f"oci:{layout}:v1", f"docker://{host}/k/disk:v1")
        yield host


@pytest.fixture
def image(guarded: str, certificates: rig.Certificates, home: Path) -> str:
    """The image in the guarded registry, whose CA is known."""
    folder = home / ".config/containers/certs.d" / guarded
    folder.mkdir(parents=True)
    (folder / "ca.crt").write_bytes((certificates.directory / "ca.crt").read_bytes())
    return f"{guarded}/k/disk:v1"


def test_login_of_the_command_line(image: str, nbdtool: Tool) -> None:
    words = ("cdi", image, "--find-disk", "--to-file", "-")
    creds = f"--creds={rig.USER}:{rig.PASSWORD}"
    assert nbdtool(*words, creds, binary=True, status=0).stdout == DATA
    assert "refuses the login of 'ann'" in nbdtool(*words, "--creds=ann:x", status=1).stderr
    assert "wants a login" in nbdtool(*words, status=1).stderr


def test_login_of_podman(image: str, guarded: str, home: Path, nbdtool: Tool, run: Tool) -> None:
    authfile = home / "auth.json"
    options = ("-u", rig.USER, "--password-stdin", f"--authfile={authfile}", guarded)
    folder = home / ".config/containers/certs.d" / guarded
    run("podman", "login", f"--cert-dir={folder}", *options, input=rig.PASSWORD)
    words = ("cdi", image, "--find-disk", "--to-file", "-")
    done = nbdtool(*words, f"--authfile={authfile}", binary=True, status=0)
    assert done.stdout == DATA


def test_password_is_asked_for_on_a_terminal(
    image: str, command: list[str], tmp_path: Path
) -> None:
    words = ["cdi", image, "--find-disk", "--creds=ann", "--to-file", str(tmp_path / "disk")]
    status, shown = on_terminal([*command, *words], f"{rig.PASSWORD}\n")
    assert status == 0 and (tmp_path / "disk").read_bytes() == DATA
    assert "Password of ann" in shown and rig.PASSWORD not in shown


def on_terminal(words: list[str], typed: str) -> tuple[int, str]:
    """Run a program on a terminal of its own, where `typed` is typed at its first question."""
    pid, terminal = pty.fork()
    if pid == 0:
        os.execvp(words[0], words)
    shown = b""
    try:
        while data := os.read(terminal, 1024):
            shown += data
            if typed and b": " in shown:
                os.write(terminal, typed.encode())
                typed = ""
    except OSError:
        pass  # the terminal ends with the program
    os.close(terminal)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), shown.decode()


def test_unknown_ca(guarded: str, home: Path, nbdtool: Tool) -> None:
    words = ("cdi", f"{guarded}/k/disk:v1", "--find-disk", "--to-file", "-")
    creds = f"--creds={rig.USER}:{rig.PASSWORD}"
    assert "isn't trusted" in nbdtool(*words, creds, status=1).stderr
    done = nbdtool(*words, creds, "--tls-verify=false", binary=True, status=0)
    assert done.stdout == DATA


def test_client_certificate(
    layout: Path, certificates: rig.Certificates, home: Path, nbdtool: Tool, tmp_path: Path
) -> None:
    folder = tmp_path / "certificates"
    folder.mkdir()
    source = certificates.directory
    for name, copy in (("ca.crt", "ca.crt"), ("client.crt", "a.cert"), ("client.key", "a.key")):
        (folder / copy).write_bytes((source / name).read_bytes())
    with rig.registry(tmp_path / "r", certificates=certificates, client_ca=True) as host:
        rig.skopeo("--dest-cert-dir", folder, f"oci:{layout}:v1", f"docker://{host}/k/disk:v1")
        words = ("cdi", f"{host}/k/disk:v1", "--find-disk", "--to-file", "-")
        done = nbdtool(*words, f"--cert-dir={folder}", binary=True, status=0)
        assert done.stdout == DATA
        (folder / "a.cert").unlink()
        done = nbdtool(*words, f"--cert-dir={folder}", "--retry=0", status=1)
        assert "certificate" in done.stderr


# Mirrors and search lists of the machine


def test_registries_conf(
    plain: str, home: Path, nbdtool: Tool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "registries.conf"
    path.write_text(f"""
        unqualified-search-registries = ["registry.invalid", "{plain}"]
        [aliases]
        "vm" = "far.invalid/k/disk"
        [[registry]]
        location = "far.invalid"
        [[registry.mirror]]
        location = "127.0.0.1:1"
        [[registry.mirror]]
        location = "{plain}"
        insecure = true
        [[registry]]
        location = "{plain}"
        insecure = true
    """)
    monkeypatch.setenv("CONTAINERS_REGISTRIES_CONF", str(path))
    for name in "vm:v1", "far.invalid/k/disk:v1", "k/disk:v1":
        done = nbdtool("cdi", name, "--find-disk", "--to-file", "-", binary=True, status=0)
        assert done.stdout == DATA
    done = nbdtool("cdi", "far.invalid/k/none:v1", "--to-file", "-", status=1)
    assert "no such host" in done.stderr and "no such image" in done.stderr
    path.write_text(f'[[registry]]\nlocation = "{plain}"\nblocked = true\n')
    assert "blocks" in nbdtool("cdi", f"{plain}/k/disk:v1", "--to-file", "-", status=1).stderr


def test_policy(plain: str, home: Path, nbdtool: Tool) -> None:
    folder = home / ".config/containers"
    folder.mkdir(parents=True)
    words = ("cdi", f"{plain}/k/disk:v1", "--tls-verify=false", "--find-disk", "--to-file", "-")
    for kind, said in (("reject", "rejects"), ("signedBy", "--insecure-policy")):
        document = {"default": [{"type": kind}]}
        (folder / "policy.json").write_text(json.dumps(document))
        assert said in nbdtool(*words, status=1).stderr
    done = nbdtool(*words, "--insecure-policy", binary=True, status=0)
    assert done.stdout == DATA


# Ends


@pytest.fixture
def slow(plain: str) -> Iterator[rig.Scripted]:
    """The registry behind a proxy that takes 20 seconds for the layer."""

    def respond(request: Request) -> Answer:
        answer = rig.forward(plain, request)
        if len(answer.body) > MIB:
            answer.pieces, answer.pause = 200, 0.1
        return answer

    with rig.scripted(respond) as server:
        yield server


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("how", ["--find-disk", "layer=0"])
def test_signal_in_the_middle_leaves_nothing(
    number: signal.Signals, how: str, slow: rig.Scripted, command: list[str], temporary: Path
) -> None:
    target = temporary.parent / "target"
    words = ["cdi", f"{slow.host}/k/disk:v1", "--tls-verify=false", how, "--to-file", str(target)]
    process = subprocess.Popen([*command, *words], stderr=subprocess.PIPE)
    wait_until(lambda: "(deleted)" in spooling(process.pid, temporary))
    process.send_signal(number)
    _, stderr = process.communicate(timeout=30)
    assert process.returncode != 0 and b"Traceback" not in stderr
    assert rig.left_behind(temporary) == [] and not target.exists()


def spooling(pid: int, folder: Path) -> str:
    """The name of the file below folder that the process has open and has written to."""
    for fd in Path(f"/proc/{pid}/fd").iterdir():
        try:
            name = os.readlink(fd)
            if name.startswith(f"{folder}/") and fd.stat().st_size:
                return name
        except OSError:
            pass
    return ""


def wait_until(done: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not done():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_nothing_is_left_of_a_served_disk(plain: str, serve: Tool, temporary: Path) -> None:
    with serve(
        "cdi", f"{plain}/k/disk:v1", "--tls-verify=false", "--find-disk", status=None
    ) as server:
        assert rig.left_behind(temporary) == []
        server.stop(signal.SIGKILL)
    assert rig.left_behind(temporary) == []


def test_wrong_bytes_make_no_file(
    plain: str, nbdtool: Tool, temporary: Path, tmp_path: Path
) -> None:
    def respond(request: Request) -> Answer:
        answer = rig.forward(plain, request)
        if len(answer.body) > MIB:
            answer.body = answer.body[:-9] + b"x" + answer.body[-8:]
        return answer

    target = tmp_path / "target"
    with rig.scripted(respond) as server:
        words = ("cdi", f"{server.host}/k/disk:v1", "--tls-verify=false", "--find-disk")
        for last in ("--to-file", target), ("--run", f"touch {target}"):
            done = nbdtool(*words, *last, status=1)
            assert "layer 0" in done.stderr and len(done.stderr.splitlines()) == 1
    assert rig.left_behind(temporary) == [] and not target.exists()


def test_full_filesystem(
    plain: str, nbdtool: Tool, run: Tool, home: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    small = tmp_path / "small"
    small.mkdir()
    run("mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", small)
    try:
        monkeypatch.setenv("TMPDIR", str(small))
        for how in "--find-disk", "layer=0":
            words = ("cdi", f"{plain}/k/disk:v1", "--tls-verify=false", how, "--to-file", "-")
            done = nbdtool(*words, status=1)
            assert "another folder in TMPDIR" in done.stderr and done.stdout == ""
        assert rig.left_behind(small) == []
    finally:
        run("umount", small)


@pytest.mark.slow
def test_progress_on_a_terminal(slow: rig.Scripted, command: list[str], tmp_path: Path) -> None:
    words = ["cdi", f"{slow.host}/k/disk:v1", "--tls-verify=false", "--find-disk"]
    pid, terminal = pty.fork()
    if pid == 0:
        os.execvp(command[0], [*command, *words, "--to-file", str(tmp_path / "disk")])
    shown = b""
    while b"KiB/s" not in shown:
        shown += os.read(terminal, 1024)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    os.close(terminal)
    assert b"layer 0" in shown and b" of 6.0 MiB" in shown


def test_secrets_are_not_shown(guarded: str, home: Path, command: list[str]) -> None:
    basic = base64.b64encode(f"{rig.USER}:{rig.PASSWORD}".encode()).decode()
    words = ["cdi", f"{guarded}/k/none:v1", "--tls-verify=false", "-v", "--to-file", "-"]
    words.append(f"--creds={rig.USER}:{rig.PASSWORD}")
    done = subprocess.run([*command, *words], check=False, capture_output=True, text=True)
    assert done.returncode == 1 and "no such image" in done.stderr
    assert rig.PASSWORD not in done.stderr and basic not in done.stderr
