"""A libvirtd of the tests' own: in its own mount namespace, with its own sockets, guests and pools.

Guests have no operating system, and run without KVM.
"""

from __future__ import annotations

import contextlib
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any
from xml.sax.saxutils import quoteattr

import libvirt  # type: ignore[import-untyped]

_PRIVATE = ("/run/libvirt", "/var/lib/libvirt", "/var/cache/libvirt", "/var/log/libvirt",
            "/etc/libvirt")  # fmt: skip

# Starts the daemon whenever a byte comes, and tells its process ID. It takes in the guests, whose
# ends libvirtd waits for: the first process of a container may take seconds to notice them.
_KEEPER = """
import ctypes, os, select, sys
ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER
while True:
    if select.select([0], [], [], 0.02)[0]:
        if not os.read(0, 1):
            break
        print(os.posix_spawnp(sys.argv[1], sys.argv[1:], os.environ), flush=True)
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        pass
"""


class Rig:
    """The daemon, and what it needs; uri is local, tcp_uri leads to the same by the loopback."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.images = directory / "images"
        with socket.create_server(("127.0.0.1", 0)) as listener:
            self.port = listener.getsockname()[1]
        self.uri = f"qemu:///system?socket={directory}/sockets/libvirt-sock"
        self.tcp_uri = f"qemu+tcp://127.0.0.1:{self.port}/system"
        self._keeper: subprocess.Popen[bytes] | None = None
        self._daemon = 0  # its process ID
        for path in _PRIVATE:
            (directory / "private" / path.replace("/", "-")).mkdir(parents=True)
        self.images.mkdir(parents=True)
        self.small = directory / "small"  # a filesystem of 4 MiB
        (directory / "sockets").mkdir()
        self.small.mkdir()
        for folder in (directory, directory / "private", self.images):
            folder.chmod(0o755)
        (directory / "libvirtd.conf").write_text(
            f'unix_sock_dir = "{directory}/sockets"\nauth_unix_rw = "none"\nauth_unix_ro = "none"\n'
            f'listen_tls = 0\nlisten_tcp = 1\ntcp_port = "{self.port}"\nauth_tcp = "none"\n'
            'listen_addr = "127.0.0.1"\n'
        )
        (directory / "private" / "-etc-libvirt" / "qemu.conf").write_text(
            'stdio_handler = "file"\nsecurity_driver = "none"\nnamespaces = [ ]\n'
        )

    def start(self) -> None:
        libvirt.registerErrorHandler(lambda *_: None, None)
        private = self.directory / "private"
        mounts = [
            f"mkdir -p {path} && mount --bind {private / path.replace('/', '-')} {path}"
            for path in _PRIVATE
        ]
        daemon = (
            f"exec libvirtd -f {self.directory}/libvirtd.conf -p {self.directory}/pid --listen"
            f" </dev/null >>{self.directory}/log 2>&1"
        )
        script = " && ".join([*mounts, daemon])
        if self._keeper is None:
            words = ["unshare", "--mount", "--propagation", "private", "sh", "-c", script]
            self._keeper = subprocess.Popen(
                [sys.executable, "-c", _KEEPER, *words],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0,
            )  # fmt: skip
        assert self._keeper.stdin is not None and self._keeper.stdout is not None
        self._keeper.stdin.write(b"+")
        self._daemon = int(self._keeper.stdout.readline())
        deadline = time.monotonic() + 60
        while True:
            with contextlib.suppress(libvirt.libvirtError):
                libvirt.open(self.uri).close()
                return
            assert self._runs(), (self.directory / "log").read_text()
            assert time.monotonic() < deadline, "libvirtd doesn't answer"
            time.sleep(0.05)

    def stop(self, sig: int = signal.SIGTERM) -> None:
        """End the daemon, not its guests."""
        os.kill(self._daemon, sig)
        while self._runs():
            time.sleep(0.01)

    def signal(self, sig: int) -> None:
        os.kill(self._daemon, sig)

    def _runs(self) -> bool:
        return Path(f"/proc/{self._daemon}").exists()

    def close(self) -> None:
        """End the daemon, and what was needed for it."""
        if self._keeper is not None:
            if self._runs():
                self.stop()
            assert self._keeper.stdin is not None
            self._keeper.stdin.close()
            self._keeper.wait()

    @contextlib.contextmanager
    def connection(self) -> Iterator[Any]:
        connection = libvirt.open(self.uri)
        try:
            yield connection
        finally:
            connection.close()

    @contextlib.contextmanager
    def guest(
        self, name: str, *disks: str, start: bool = False, qemu: Iterable[str] = ()
    ) -> Iterator[str]:
        """A guest with these <disk> elements, or other devices, and options of qemu; its name."""
        options = "".join(f"<qemu:arg value={quoteattr(option)}/>" for option in qemu)
        text = f"""<domain type='qemu' xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'>
            <name>{name}</name><memory unit='MiB'>16</memory>
            <os><type arch='x86_64'>hvm</type></os><devices>{"".join(disks)}</devices>
            <qemu:commandline>{options}</qemu:commandline></domain>"""
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


class Proxy:
    """A way to a TCP port of this host that takes `delay` seconds, each way, however much goes."""

    def __init__(self, port: int, delay: float = 0.0) -> None:
        self.delay = delay
        self._frozen = threading.Event()
        self._port = port
        self.connections = 0  # that were made so far
        self._sockets: list[socket.socket] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self.uri = f"qemu+tcp://127.0.0.1:{self.port}/system"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                ours = self._listener.accept()[0]
                try:
                    theirs = socket.create_connection(("127.0.0.1", self._port))
                except OSError:
                    ours.close()
                    continue
                for sock in ours, theirs:
                    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                self._sockets += ours, theirs
                self.connections += 1
                self._join(ours, theirs, self._frozen)
                self._join(theirs, ours, self._frozen)

    def _join(self, source: socket.socket, target: socket.socket, frozen: threading.Event) -> None:
        passing: queue.Queue[tuple[float, bytes]] = queue.Queue(256)

        def receive() -> None:
            data = b"?"
            while data:
                try:
                    data = source.recv(1 << 20)
                except OSError:
                    data = b""
                passing.put((time.monotonic() + self.delay, data))

        def send() -> None:
            with contextlib.suppress(OSError):
                while True:
                    due, data = passing.get()
                    time.sleep(max(due - time.monotonic(), 0))
                    if not data:
                        break
                    if frozen.is_set():
                        continue
                    target.sendall(data)
            with contextlib.suppress(OSError):
                target.shutdown(socket.SHUT_RDWR)
            while passing.get()[1]:
                pass

        for work in receive, send:
            threading.Thread(target=work, daemon=True).start()

    def freeze(self) -> None:
        """Let nothing pass on the connections that there are, and tell nobody."""
        frozen, self._frozen = self._frozen, threading.Event()
        frozen.set()

    def drop(self) -> None:
        """End all connections."""
        sockets, self._sockets = self._sockets, []
        for sock in sockets:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._listener.close()
        self.drop()
