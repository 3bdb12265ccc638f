"""Command lines as they stand in nbdkit's and libnbd's manuals, with nbdtool in nbdkit's place."""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from typing import Any, Callable

import pytest

Run = Callable[..., Any]
MIB = 1 << 20


@pytest.fixture
def sh(run: Run, command: list[str], tmp_path: Path, random_file: Callable[..., Path]) -> Run:
    """sh(LINE) -> what it prints, in a folder with disk.img and directory/, nbdtool on the PATH."""
    programs, folder = tmp_path / "programs", tmp_path / "folder"
    for directory in programs, folder / "directory" / "sub":
        directory.mkdir(parents=True)
    random_file(folder / "disk.img", MIB)
    (folder / "directory" / "sub" / "file").write_text("content\n")
    (programs / "nbdtool").write_text(f'#!/bin/sh\nexec {shlex.join(command)} "$@"\n')
    (programs / "nbdtool").chmod(0o755)
    for name in "qemu-kvm", "qemu", "guestfish":  # what they are called with
        (programs / name).write_text('#!/bin/sh\necho "$@"\n')
        (programs / name).chmod(0o755)
    path = f"{programs}:/usr/bin:{os.environ['PATH']}"

    def sh(line: str, status: int = 0) -> str:
        output: str = run(
            "bash", "-c", line, status=status, cwd=folder, env={**os.environ, "PATH": path}
        )
        return output

    return sh


def test_serving_a_file(sh: Run) -> None:
    """nbdkit(1)"""
    assert sh("nbdtool file file=disk.img --run 'nbdinfo --size $uri'") == f"{MIB}\n"
    assert "file" in sh("nbdtool --help file")
    assert "version=" in sh("nbdtool --dump-config")
    background = "nbdtool -P pid -U socket -n --fork file file=disk.img && nbdinfo --size"
    assert sh(f"{background} 'nbd+unix:///?socket=socket'; kill $(cat pid)") == f"{MIB}\n"
    numbered = "nbdtool -fvr -p 0 -i 127.0.0.1 -e name file disk.img --run"
    assert sh(f"{numbered} 'nbdinfo --size $uri; echo $exportname'") == f"{MIB}\nname\n"


def test_captive(sh: Run) -> None:
    """nbdkit(1), "CAPTIVE NBDKIT" """
    words = sh("nbdtool file file=disk.img --run 'qemu -drive file=$nbd,if=virtio'").split()
    assert words[0] == "-drive"
    assert words[1].startswith("file=nbd:unix:/") and words[1].endswith("/socket,if=virtio")
    words = sh("nbdtool file file=disk.img --run 'guestfish --format=raw -a $nbd -i'").split()
    assert words[2].startswith("nbd://?socket=/")
    private = 'nbdtool -U - file disk.img --run \'test -S "$unixsocket" && echo "<$port>"\''
    assert sh(private) == "<>\n"
    assert sh("nbdtool -p 0 file disk.img --run 'echo $port $unixsocket'").strip().isdecimal()


def test_a_directory(sh: Run, run: Run, partition: Run, mount: Run, tmp_path: Path) -> None:
    """nbdkit-linuxdisk-plugin(1)"""
    image = tmp_path / "folder" / "ext2fs.img"

    def content() -> str:
        with mount(image, *partition(image)) as mounted:
            return Path(mounted, "sub", "file").read_text()

    sh("nbdtool -U - linuxdisk directory --run 'nbdcopy $uri ext2fs.img'")
    assert content() == "content\n"
    sh("nbdtool linuxdisk dir=directory label=ROOTFS type=ext4 --to-file ext2fs.img")
    start = partition(image)[0]
    assert sh(f"blkid -p -O {start} -o value -s LABEL ext2fs.img") == "ROOTFS\n"
    assert sh(f"blkid -p -O {start} -o value -s TYPE ext2fs.img") == "ext4\n"
    sh("nbdtool linuxdisk directory size=+100M --to-file ext2fs.img")
    with mount(image, *partition(image)) as mounted:
        free = os.statvfs(mounted)
        assert 100 * MIB <= free.f_bfree * free.f_frsize < 120 * MIB
    sh("nbdtool --filter=cow linuxdisk directory --run 'nbdinfo --can write $uri'")
    sh("nbdtool --filter=partition linuxdisk directory partition=1 --run 'nbdcopy $uri naked'")
    run("e2fsck", "-fn", tmp_path / "folder" / "naked")


def test_an_appliance(sh: Run) -> None:
    """The same: a command that begins with a new line, and spells the socket itself."""
    output = sh("""nbdtool linuxdisk directory --run '
        qemu-kvm -drive file=nbd:unix:$unixsocket,snapshot=on -append "root=/dev/sda1 rw"
    '""")
    assert output.startswith("-drive file=nbd:unix:/")


def test_what_libnbds_programs_start_themselves(sh: Run) -> None:
    """nbdinfo(1), nbdcopy(1): [ COMMAND ] is a server by socket activation"""
    assert "export-size: 1048576" in sh("nbdinfo -- [ nbdtool -r file disk.img ]")
    assert sh("nbdcopy -- [ nbdtool file disk.img ] - | cmp - disk.img") == ""
    sh("truncate -s 1M copy && nbdcopy disk.img [ nbdtool file copy ] && cmp disk.img copy")
    both = "nbdcopy -- [ nbdtool linuxdisk directory ] [ nbdtool file target ]"
    sh(f"truncate -s 8M target && {both} && sfdisk -l target")


def test_what_the_readme_says_of_nbdcopy(sh: Run, tmp_path: Path) -> None:
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    (line,) = [line for line in readme.splitlines() if line.startswith("    nbdcopy ")]
    sh(line.partition(" #")[0])
    assert sh("cmp disk.img copy.img") == ""
