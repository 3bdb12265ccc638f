"""An appliance of busybox boots from a directory, as nbdkit-linuxdisk-plugin(1) shows it."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import threading
from pathlib import Path

import pytest

BUSYBOX = Path("/bin/busybox")
INIT = """#!/bin/busybox sh
/bin/busybox mount -t devtmpfs none /dev
for module in /modules/*; do /bin/busybox insmod $module; done
while [ ! -b /dev/vda1 ]; do /bin/busybox sleep 0.1; done
/bin/busybox mount -t ext4 -o rw /dev/vda1 /root
exec /bin/busybox switch_root /root /sbin/init
"""


def modules(kernel: Path, wanted: list[str]) -> list[Path]:
    """The modules and what they depend on, in the order in which they load."""
    folder = Path("/lib/modules") / kernel.name.partition("-")[2]
    needs = {}
    for line in (folder / "modules.dep").read_text().splitlines():
        name, _, rest = line.partition(":")
        needs[Path(name).name.partition(".")[0]] = [name, *rest.split()]
    found: dict[str, None] = {}
    for module in wanted:
        for name in reversed(needs.get(module, [])):
            found[name] = None
    return [folder / name for name in found]


@pytest.fixture
def kernel() -> Path:
    return sorted(Path("/boot").glob("vmlinuz-*"))[-1]


@pytest.fixture
def initrd(tmp_path: Path, kernel: Path) -> Path:
    """Debian's cloud kernel has virtio and ext4 as modules."""
    root = tmp_path / "initrd"
    for name in ("bin", "dev", "modules", "root"):
        (root / name).mkdir(parents=True)
    shutil.copy(BUSYBOX, root / "bin")
    names = ["virtio_pci", "virtio_blk", "crc32c_generic", "ext4"]
    for number, module in enumerate(modules(kernel, names)):
        shutil.copy(module, root / "modules" / f"{number:02}-{module.name}")
    (root / "init").write_text(INIT)
    (root / "init").chmod(0o755)
    members = [path.relative_to(root) for path in root.rglob("*")]
    archive = subprocess.run(
        ["cpio", "--create", "--format=newc", "--quiet"], cwd=root, check=True, capture_output=True,
        input="\n".join(map(str, members)).encode(),
    ).stdout  # fmt: skip
    (tmp_path / "initrd.cpio").write_bytes(archive)
    return tmp_path / "initrd.cpio"


@pytest.fixture
def appliance(tmp_path: Path) -> Path:
    root = tmp_path / "appliance"
    for name in ("bin", "dev", "proc", "sbin", "sys", "usr/bin", "usr/sbin"):
        (root / name).mkdir(parents=True)
    os.mknod(root / "dev" / "console", stat.S_IFCHR | 0o600, os.makedev(5, 1))
    shutil.copy(BUSYBOX, root / "sbin")
    for name in ("sbin/init", "bin/ls", "bin/sh"):
        os.link(root / "sbin" / "busybox", root / name)
    return root


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "layer", "snapshot"), [("ext2", [], "on"), ("ext4", ["--cow"], "off")]
)
def test_boots_to_a_shell(
    kind: str, layer: list[str], snapshot: str, appliance: Path, initrd: Path, kernel: Path,
    command: list[str],
) -> None:  # fmt: skip
    run = (
        "qemu-system-x86_64 -machine pc,accel=tcg -m 256 -display none -no-reboot -serial stdio"
        f" -kernel {kernel} -initrd {initrd} -append 'console=ttyS0 panic=-1 quiet'"
        f" -drive file=nbd:unix:$unixsocket,format=raw,if=virtio,snapshot={snapshot}"
    )
    process = subprocess.Popen(
        [*command, "linuxdisk", str(appliance), f"type={kind}", "size=+20M", *layer, "--run", run],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    assert process.stdin and process.stdout
    watchdog = threading.Timer(240, process.terminate)
    watchdog.start()
    output = b""
    try:
        steps = [
            (b"activate this console", b"\n"),
            (b"# ", b"echo written > /file && /sbin/busybox cat /file && echo it is $((6 * 7))\n"),
            (b"it is 42", b"/sbin/busybox poweroff -f\n"),
        ]
        for wait, answer in steps:
            seen = len(output)
            while wait not in output[seen:]:
                piece = os.read(process.stdout.fileno(), 4096)
                assert piece, output.decode(errors="replace")
                output += piece
            process.stdin.write(answer)
            process.stdin.flush()
        output += process.stdout.read()
    finally:
        watchdog.cancel()
        process.stdin.close()
        process.terminate()
        process.wait()
    assert b"written" in output
