"""Who may: libvirt's questions, drivers without a daemon, and the example of nbdkit's page."""

from __future__ import annotations

import os
import pty
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from tests.libvirt.rig import Rig, disk

pytestmark = pytest.mark.slow

MIB = 1 << 20


@pytest.fixture
def asking(tmp_path: Path) -> str:
    """libvirt's test driver, which wants a user's name and password."""
    path = tmp_path / "node.xml"
    path.write_text(
        "<node><auth><user password='secret'>robert</user></auth><domain type='test'>"
        "<name>locked</name><memory>8192</memory><os><type>hvm</type></os></domain></node>"
    )
    return f"connect=test://{path}"


def test_a_password_file(asking: str, tmp_path: Path, nbdtool: Any) -> None:
    known = tmp_path / "auth.conf"
    known.write_text(
        "[credentials-test]\nusername=robert\n[auth-test-localhost]\ncredentials=test\n"
    )
    environment = {**os.environ, "LIBVIRT_AUTH_FILE": str(known)}
    password = tmp_path / "password"
    words = ("libvirt", "--list", asking, f"--password-file={password}")
    options = {"env": environment, "start_new_session": True}
    assert "No such file" in nbdtool(*words, status=1, **options).stderr
    password.write_text("secret\n")
    assert "locked" in nbdtool(*words, status=0, **options).stdout
    password.write_text("wrong\n")
    done = nbdtool(*words, status=1, **options)
    assert "authentication failed" in done.stderr and done.stderr.count("\n") == 1
    done = nbdtool(*words[:3], status=1, **options)
    assert "--password-file" in done.stderr and done.stderr.count("\n") == 1


def test_questions_at_the_terminal(asking: str, command: list[str]) -> None:
    pid, terminal = pty.fork()
    if pid == 0:
        os.execvp(command[0], [*command, "libvirt", "--list", asking])
    said = b""
    answers = [b"robert\n", b"secret\n"]
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        try:
            said += os.read(terminal, 4096)
        except OSError:
            break
        if answers and said.rstrip(b" ").endswith(b":"):
            os.write(terminal, answers.pop(0))
            said += b"|"
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0, said
    os.close(terminal)
    assert b"locked" in said and b"secret" not in said


def test_without_a_daemon(
    tmp_path: Path, nbdtool: Any, random_file: Any, compare: Any, run: Any
) -> None:
    """libvirt's embedded driver, which needs an event loop."""
    root, image, out = tmp_path / "root", random_file(tmp_path / "image", 3 * MIB), tmp_path / "out"
    (root / "etc").mkdir(parents=True)
    (root / "etc" / "qemu.conf").write_text(
        'stdio_handler = "file"\nsecurity_driver = "none"\nuser = "root"\ngroup = "root"\n'
    )
    uri = f"qemu:///embed?root={root}"
    qcow2 = tmp_path / "image.qcow2"
    run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", image, qcow2)
    text = f"""<domain type='qemu'><name>e</name><memory unit='MiB'>16</memory><os>
        <type arch='x86_64'>hvm</type></os><devices>{disk(image)}{disk(qcow2, "vdb", "qcow2")}
        </devices></domain>"""
    define = f"import libvirt; libvirt.virEventRegisterDefaultImpl(); libvirt.open({uri!r})"
    subprocess.run(["/usr/bin/python3", "-c", f"{define}.defineXML({text!r})"], check=True)
    for words in ["vda", "method=local"], ["vda", "method=peek"], ["vdb", "method=auto"]:
        disk_, method = words
        words = ["libvirt", "e", f"connect={uri}", f"disk={disk_}", method]
        nbdtool(*words, "--to-file", out, status=0)
        compare(out, image)


def test_a_read_only_connection_is_enough(
    rig: Rig, raw_image: Path, nbdtool: Any, tmp_path: Path
) -> None:
    """For --list and local; peeking is refused on one."""
    readable = rig.uri.replace("libvirt-sock", "libvirt-sock-ro")
    with rig.guest("ro", disk(raw_image)):
        assert "ro" in nbdtool("libvirt", "--list", f"connect={readable}", status=0).stdout
        words = ("libvirt", "ro", f"connect={readable}", "--to-file", tmp_path / "out")
        nbdtool(*words, "method=local", status=0)
        assert nbdtool(*words, "method=peek", status=1).stderr.count("\n") == 1


def test_the_example_of_nbdkits_page(
    rig: Rig, command: list[str], run: Any, tmp_path: Path, nbdtool: Any
) -> None:
    """nbdkit libvirt domain=MyGuest disk=sda; guestfish from a second terminal."""
    image, pid_file, socket = rig.images / "filesystem", tmp_path / "pid", tmp_path / "socket"
    tree = tmp_path / "tree"
    tree.mkdir()
    (tree / "hello").write_text("from the guest\n")
    nbdtool("linuxdisk", tree, "--to-file", image, status=0)
    with rig.guest("MyGuest", disk(image, "sda")):
        words = [*command, "libvirt", f"connect={rig.uri}", "domain=MyGuest", "disk=sda"]
        run(*words, "--fork", "-P", pid_file, "-U", socket)
        try:
            fish = ["guestfish", "--ro", "--format=raw", "-a", f"nbd://?socket={socket}"]
            environment = {
                **os.environ,
                "LIBGUESTFS_BACKEND": "direct",
                "LIBGUESTFS_BACKEND_SETTINGS": "force_tcg",
            }
            said = run(*fish, "-m", "/dev/sda1", "cat", "/hello", env=environment)
            assert said.strip() == "from the guest"
        finally:
            os.kill(int(pid_file.read_text()), 15)
