"""An agent for guests without an operating system: it answers on the host's side of its channel.

libvirt speaks only to an agent that the guest has opened the channel for, so that open_channel()
does what the guest's virtio-serial driver would do, by way of qemu's qtest protocol.
Specification: virtio 1.2, sections 4.1.4.8 (legacy interface) and 5.3 (console device).
"""

from __future__ import annotations

import contextlib
import json
import socket
import struct
import threading
import time
from pathlib import Path

from tests.libvirt.rig import Rig

_VIRTIO_SERIAL = 0x1003_1AF4  # PCI device and vendor
_MULTIPORT = 1 << 1
_CONTROL = 3  # the queue for the driver's control messages
_PORT_OPEN = 6
_QUEUE, _MESSAGE = 0x100000, 0x110000  # addresses in the guest's memory


class Agent:
    """Answers each command; heard are those that came, but for guest-sync."""

    def __init__(self, directory: Path) -> None:
        self.heard: list[str] = []
        self.path, self._qtest = directory / "agent", directory / "qtest"
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(self.path))
        self._listener.listen()
        self.path.chmod(0o777)
        threading.Thread(target=self._accept, daemon=True).start()
        self.channel = (
            f"<channel type='unix'><source mode='connect' path='{self.path}'/>"
            "<target type='virtio' name='org.qemu.guest_agent.0'/></channel>"
        )
        self.qemu = ("-qtest", f"unix:{self._qtest},server=on,wait=off", "-qtest-log", "/dev/null")

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection = self._listener.accept()[0]
                threading.Thread(target=self._answer, args=(connection,), daemon=True).start()

    def _answer(self, connection: socket.socket) -> None:
        with connection, connection.makefile("rb") as lines, contextlib.suppress(OSError):
            for line in lines:
                command = json.loads(line.lstrip(b"\xff"))
                name = command["execute"]
                answer = 1  # filesystem
                if name.startswith("guest-sync"):
                    answer = command["arguments"]["id"]
                else:
                    self.heard.append(name)
                connection.sendall(json.dumps({"return": answer}).encode() + b"\n")

    def open_channel(self, rig: Rig, name: str) -> None:
        """Have libvirt see that the guest `name`, started but paused, has an agent."""
        with socket.socket(socket.AF_UNIX) as sock:
            sock.connect(str(self._qtest))
            with sock.makefile("rw") as stream:

                def ask(*words: str | int) -> int:
                    print(*words, file=stream, flush=True)
                    status, *value = stream.readline().split()
                    assert status == "OK", value
                    return int(value[0], 16) if value else 0

                def configuration(slot: int, register: int) -> int:
                    ask("outl", 0xCF8, 1 << 31 | slot << 11 | register)
                    return ask("inl", 0xCFC)

                slot = next(n for n in range(32) if configuration(n, 0) == _VIRTIO_SERIAL)
                port = 0xC000
                configuration(slot, 0x10)
                ask("outl", 0xCFC, port)
                configuration(slot, 4)
                ask("outl", 0xCFC, 7)  # it may use its ports and the memory
                ask("outb", port + 18, 3)  # status: a driver
                ask("outl", port + 4, _MULTIPORT)
                ask("outw", port + 14, _CONTROL)
                size = ask("inw", port + 12)
                ask("outl", port + 8, _QUEUE >> 12)
                ask("outb", port + 18, 7)  # status: the driver is ready
                message = struct.pack("<IHH", 1, _PORT_OPEN, 1)
                for address, data in (
                    (_MESSAGE, message),
                    (_QUEUE, struct.pack("<QIHH", _MESSAGE, len(message), 0, 0)),
                    (_QUEUE + 16 * size, struct.pack("<HHH", 0, 1, 0)),
                ):
                    ask("write", address, len(data), f"0x{data.hex()}")
                ask("outw", port + 16, _CONTROL)
        deadline = time.monotonic() + 30
        with rig.connection() as connection:
            while "state='connected'" not in connection.lookupByName(name).XMLDesc(0):
                assert time.monotonic() < deadline
                time.sleep(0.05)

    def close(self) -> None:
        self._listener.close()
