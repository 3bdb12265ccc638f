"""A libvirtd of the tests' own: in its own mount namespace, with its own sockets, guests and pools.

Guests have no operating system, and run without KVM.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Callable
from xml.sax.saxutils import quoteattr

import libvirt
import pytest

MIB = 1 << 20

_PRIVATE = ("/run/libvirt", "/var/lib/libvirt", "/var/cache/libvirt", "/var/log/libvirt",
            "/etc/libvirt")  # fmt: skip


class Rig:
    """The daemon, and what it needs; uri is local, tcp_uri leads to the same by the loopback."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.images = directory / "images"
        with socket.create_server(("127.0.0.1", 0)) as listener:
            self.port = listener.getsockname()[1]
        self.uri = f"qemu:///system?socket={directory}/sockets/libvirt-sock"
        self.tcp_uri = f"qemu+tcp://127.0.0.1:{self.port}/system"
        self._process: subprocess.Popen[bytes] | None = None
        for path in _PRIVATE:
            (directory / "private" / path.replace("/", "-")).mkdir(parents=True)
        self.images.mkdir()
        self.small = directory / "small"  # a filesystem of 4 MiB
        (directory / "sockets").mkdir()
        self.small.mkdir()
        for path in (directory, directory / "private", self.images):
            path.chmod(0o755)
        (directory / "libvirtd.conf").write_text(
            f'unix_sock_dir = "{directory}/sockets"\nauth_unix_rw = "none"\nauth_unix_ro = "none"\n'
            f'listen_tls = 0\nlisten_tcp = 1\ntcp_port = "{self.port}"\nauth_tcp = "none"\n'
            'listen_addr = "127.0.0.1"\n'
        )
        (directory / "private" / "-etc-libvirt" / "qemu.conf").write_text(
            'stdio_handler = "file"\nsecurity_driver = "none"\nnamespaces = [ ]\n'
        )

    def start(self) -> None:
        private = self.directory / "private"
        mounts = [
            f"mkdir -p {path} && mount --bind {private / path.replace('/', '-')} {path}"
            for path in _PRIVATE
        ]
        daemon = f"exec libvirtd -f {self.directory}/libvirtd.conf -p {self.directory}/pid --listen"
        script = " && ".join([*mounts, daemon])
        with (self.directory / "log").open("ab") as log:
            self._process = subprocess.Popen(
                ["unshare", "--mount", "--propagation", "private", "sh", "-c", script],
                stdout=log, stderr=log, stdin=subprocess.DEVNULL,
            )  # fmt: skip
        deadline = time.monotonic() + 60
        while True:
            with contextlib.suppress(libvirt.libvirtError):
                libvirt.open(self.uri).close()
                return
            assert self._process.poll() is None, (self.directory / "log").read_text()
            assert time.monotonic() < deadline, "libvirtd doesn't answer"
            time.sleep(0.05)

    def stop(self, sig: int = signal.SIGTERM) -> None:
        """End the daemon, not its guests."""
        assert self._process is not None
        self._process.send_signal(sig)
        self._process.wait()

    @contextlib.contextmanager
    def connection(self) -> Iterator[Any]:
        connection = libvirt.open(self.uri)
        try:
            yield connection
        finally:
            connection.close()

    @contextlib.contextmanager
    def guest(self, name: str, *disks: str, start: bool = False) -> Iterator[str]:
        """A guest with these <disk> elements; its name."""
        text = f"""<domain type='qemu'><name>{name}</name><memory unit='MiB'>16</memory>
            <os><type arch='x86_64'>hvm</type></os><devices>{"".join(disks)}</devices></domain>"""
        with self.connection() as connection:
            connection.defineXML(text)
        try:
            if start:
                self.begin(name)
            yield name
        finally:
            with self.connection() as connection, contextlib.suppress(libvirt.libvirtError):
                domain = connection.lookupByName(name)
                if domain.isActive():
                    domain.destroy()
                domain.undefine()

    def begin(self, name: str) -> None:
        with self.connection() as connection:
            connection.lookupByName(name).create()

    def end(self, name: str) -> None:
        with self.connection() as connection:
            connection.lookupByName(name).destroy()

    def hmp(self, name: str, command: str) -> str:
        """A command for the monitor of a guest's qemu."""
        done = subprocess.run(
            ["virsh", "-q", "-c", self.uri, "qemu-monitor-command", "--hmp", name, command],
            check=True, capture_output=True, text=True,
        )  # fmt: skip
        return done.stdout


def disk(
    path: Path | str, target: str = "vda", form: str = "raw", chain: str = "", **kinds: str
) -> str:
    """A <disk>; chain is what stands behind its source."""
    device, bus = kinds.get("device", "disk"), "virtio" if target[0] == "v" else "sata"
    source = f"<source file={quoteattr(str(path))}/>" if path else ""
    return (
        f"<disk type='file' device='{device}'><driver name='qemu' type='{form}'/>{source}{chain}"
        f"<target dev='{target}' bus='{bus}'/></disk>"
    )


def backing(path: Path, form: str, rest: str = "<backingStore/>") -> str:
    return (
        f"<backingStore type='file'><format type='{form}'/><source file='{path}'/>{rest}"
        "</backingStore>"
    )


@pytest.fixture(scope="session")
def rig() -> Iterator[Rig]:
    libvirt.registerErrorHandler(lambda *_: None, None)
    directory = Path(tempfile.mkdtemp(prefix="nbdtool-libvirt-", dir="/var/tmp"))
    made = Rig(directory)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4M", "none", made.small], check=True)
    try:
        made.start()
        yield made
        made.stop()
    finally:
        subprocess.run(["umount", made.small], check=True)
        shutil.rmtree(directory)


@pytest.fixture(scope="session")
def raw_image(rig: Rig, random_file: Callable[..., Path]) -> Path:
    """8 MiB: data, a hole, data."""
    path = random_file(rig.images / "raw", 3 * MIB)
    with path.open("r+b") as file:
        file.truncate(8 * MIB)
        file.seek(7 * MIB)
        file.write(os.urandom(MIB))
    path.chmod(0o666)
    return path


@pytest.fixture(scope="session")
def chain(rig: Rig, raw_image: Path, run: Callable[..., Any]) -> list[Path]:
    """Three qcow2 images, the top one first."""
    base, middle, top = (rig.images / name for name in ("base", "middle", "top"))
    run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", raw_image, base)
    for path, below, write in (
        (middle, base, "write -P 3 1M 1M"),
        (top, middle, "write -P 4 5M 9k"),
    ):
        run("qemu-img", "create", "-q", "-f", "qcow2", "-b", below, "-F", "qcow2", path)
        run("qemu-io", "-f", "qcow2", "-c", write, path)
    for path in (base, middle, top):
        path.chmod(0o666)
    return [top, middle, base]


@pytest.fixture(scope="session")
def backing_chain(chain: list[Path]) -> str:
    """The <backingStore> of the top image."""
    return backing(chain[1], "qcow2", backing(chain[2], "qcow2"))


@pytest.fixture(scope="session")
def compare(run: Callable[..., Any]) -> Callable[..., None]:
    """compare(raw, image, format): qemu-img finds the same in both."""

    def compare(one: Path | str, other: Path, form: str = "raw") -> None:
        run("qemu-img", "compare", "-f", "raw", "-F", form, one, other)

    return compare
