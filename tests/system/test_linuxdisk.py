"""linuxdisk as a user meets it: served to real clients, and written."""

from __future__ import annotations

import errno
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nbd
import pytest

from nbdtool.disk import read_bytes
from tests.ext import oracle

IDENTITY = "uuid=12345678-9abc-4def-8123-456789abcdef"


@pytest.fixture
def tree(tmp_path: Path, random_file: Callable[..., Path]) -> Path:
    tree = tmp_path / "tree"
    (tree / "sub").mkdir(parents=True)
    random_file(tree / "large", 9_000_000)
    for number in range(200):
        random_file(tree / "sub" / str(number), number * 57, seed=number)
    with (tree / "sparse").open("wb") as file:
        file.truncate(100 << 20)
        file.seek(50 << 20)
        file.write(b"data" * 5000)
    os.link(tree / "large", tree / "sub" / "link")
    return tree


@pytest.fixture
def epoch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two runs make the same disk."""
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")


@pytest.mark.usefixtures("epoch")
@pytest.mark.parametrize("kind", ["ext2", "ext3", "ext4"])
@pytest.mark.parametrize("tcp", [False, True])
def test_served_equals_written(
    tree: Path, kind: str, tcp: bool, tmp_path: Path,
    serve: Callable[..., Any], nbdtool: Callable[..., Any], run: Callable[..., Any],
) -> None:  # fmt: skip
    written = tmp_path / "written"
    nbdtool("linuxdisk", tree, f"type={kind}", IDENTITY, "--to-file", written, status=0)
    assert written.stat().st_blocks * 512 < 12 << 20
    with serve("linuxdisk", tree, f"type={kind}", IDENTITY, tcp=tcp) as server:
        (export,) = json.loads(run("nbdinfo", "--json", server.uri))["exports"]
        assert export["is_read_only"] and export["can_multi_conn"]
        assert export["export-size"] == written.stat().st_size
        mapped = json.loads(run("nbdinfo", "--map", "--json", server.uri))
        data = sum(extent["length"] for extent in mapped if extent["type"] == 0)
        assert 9_000_000 < data < 12 << 20
        for options in (["--connections=1"], ["--connections=4", "--request-size=65536"]):
            run("nbdcopy", *options, server.uri, tmp_path / "copy")
            assert (tmp_path / "copy").read_bytes() == written.read_bytes()
        run("qemu-img", "compare", "-f", "raw", "-F", "raw", server.uri, written)
        run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", server.uri, tmp_path / "qcow2")
        run("qemu-img", "compare", "-f", "qcow2", "-F", "raw", tmp_path / "qcow2", written)
        run("qemu-io", "-r", "-f", "raw", "-c", f"read 0 {written.stat().st_size}", server.uri)
        status = json.loads(run("qemu-img", "map", "--output=json", "-f", "raw", server.uri))
        assert sum(entry["length"] for entry in status if entry["data"]) == data


@pytest.mark.usefixtures("epoch")
def test_random_reads_over_connections(
    tree: Path, tmp_path: Path, serve: Callable[..., Any], nbdtool: Callable[..., Any]
) -> None:
    nbdtool("linuxdisk", tree, IDENTITY, "--to-file", tmp_path / "written", status=0)
    whole = (tmp_path / "written").read_bytes()
    generator = random.Random(5)
    with serve("linuxdisk", tree, IDENTITY) as server:
        handles = [nbd.NBD() for _ in range(4)]
        for handle in handles:
            handle.connect_uri(server.uri)
        for _ in range(1000):
            offset = generator.randrange(len(whole))
            length = min(generator.choice([1, 512, 4096, 100_000]), len(whole) - offset)
            expected = whole[offset : offset + length]
            assert generator.choice(handles).pread(length, offset) == expected


@pytest.mark.parametrize("how", ["changed", "truncated", "removed"])
def test_changed_file_is_an_error_that_names_it(
    tree: Path, how: str, serve: Callable[..., Any]
) -> None:
    """The client gets an I/O error, the server lives on, no other file is affected."""
    mark, other = b"this is the file " * 300, b"this is another one " * 300
    (tree / "touched").write_bytes(mark)
    (tree / "untouched").write_bytes(other)
    disk = oracle.open_disk(tree)  # the server's will have the same layout
    whole = read_bytes(disk, 0, disk.size)
    place, elsewhere = whole.index(mark), whole.index(other)
    with serve("linuxdisk", tree) as server:
        if how == "changed":
            (tree / "touched").write_bytes(mark[::-1])
        elif how == "truncated":
            os.truncate(tree / "touched", 10)
        else:
            (tree / "touched").unlink()
        handle = nbd.NBD()
        handle.connect_uri(server.uri)
        with pytest.raises(nbd.Error) as raised:
            handle.pread(4096, place)
        assert raised.value.errnum == errno.EIO
        assert "touched" in server.log()
        assert handle.pread(len(other), elsewhere) == other


def test_file_that_changes_while_it_is_written(
    tree: Path, tmp_path: Path, nbdtool: Callable[..., Any], command: list[str]
) -> None:
    """Never half of it and no old target hurt, whenever the change comes."""
    target = tmp_path / "out" / "target"
    target.parent.mkdir()
    with (tree / "growing").open("wb") as growing:
        growing.write(bytes(5 << 20))
        growing.flush()
        process = subprocess.Popen(
            [*command, "linuxdisk", str(tree), "--to-file", str(target)],
            stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        while process.poll() is None:
            growing.write(b"x" * 100_000)
            growing.flush()
            time.sleep(0.001)
    assert process.stderr
    error = process.stderr.read()
    if process.returncode:
        assert "growing" in error and error.count("\n") == 1
    assert list(target.parent.iterdir()) == ([] if process.returncode else [target])


def test_served_by_another_user(tree: Path, nbdtool: Callable[..., Any]) -> None:
    """What the user that serves can't read is refused at the start."""
    tree.parent.chmod(0o755)
    (tree / "sub" / "7").chmod(0o600)
    done = nbdtool("linuxdisk", tree, "-u", "nobody", "--run", "true")
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "Permission denied" in done.stderr


def test_exit_status_of_bad_sources(tmp_path: Path, nbdtool: Callable[..., Any]) -> None:
    for arguments, status, text in (
        ([tmp_path / "none"], 1, "No such file"),
        ([sys.executable], 1, "not a directory"),
        ([], 2, "which directory"),
        ([tmp_path, "type=xfs"], 2, "ext2"),
        ([tmp_path, "--to-file", tmp_path / "inside"], 1, "inside"),
        ([tmp_path, "size=1K"], 1, "too small"),
    ):
        done = nbdtool("linuxdisk", *arguments, *([] if "--to-file" in arguments else ["-U", "-"]))
        assert (done.returncode, done.stderr.count("\n")) == (status, 1), done.stderr
        assert text in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ext2", "ext4"])
def test_usr_share(
    kind: str, tmp_path: Path, nbdtool: Callable[..., Any], partition: Callable[..., Any],
    mount: Callable[..., Any], e2fsck: Callable[..., None],
) -> None:  # fmt: skip
    """Tens of thousands of entries of all sorts."""
    source, image = Path("/usr/share"), tmp_path / "image"
    nbdtool("linuxdisk", source, f"type={kind}", "--to-file", image, status=0)
    offset, size = partition(image)
    e2fsck(image, offset)
    with mount(image, offset, size) as mounted:
        found, expected = oracle.entries(mounted), oracle.entries(source)
        assert len(found) > 10_000
        assert found == expected


@pytest.mark.slow
def test_two_hundred_thousand_tiny_files(
    tmp_path: Path, nbdtool: Callable[..., Any], partition: Callable[..., Any],
    mount: Callable[..., Any], e2fsck: Callable[..., None],
) -> None:  # fmt: skip
    with tempfile.TemporaryDirectory(dir="/dev/shm") as tree:
        for number in range(200_000):
            if number % 1000 == 0:
                folder = os.path.join(tree, str(number))
                os.mkdir(folder)
            with open(os.path.join(folder, str(number)), "w") as file:
                file.write(str(number))
        image = tmp_path / "image"
        nbdtool("linuxdisk", tree, "type=ext4", "--to-file", image, status=0)
        offset, size = partition(image)
        e2fsck(image, offset)
        with mount(image, offset, size) as mounted:
            found = {
                name: Path(root, name) for root, _, names in os.walk(mounted) for name in names
            }
            assert len(found) == 200_000
            assert all(found[name].read_text() == name for name in list(found)[::1000])


@pytest.mark.slow
def test_reflinked_on_one_btrfs(
    tmp_path: Path, run: Callable[..., Any], nbdtool: Callable[..., Any], mount: Callable[..., Any],
    random_file: Callable[..., Path],
) -> None:  # fmt: skip
    volume = tmp_path / "btrfs"
    with volume.open("wb") as file:
        file.truncate(1 << 30)
    run("mkfs.btrfs", "--quiet", volume)
    with mount(volume, options="rw") as place:
        for number in range(20):
            (place / "tree").mkdir(exist_ok=True)
            random_file(place / "tree" / str(number), 10_000_000 + number, seed=number)
        run("sync", "-f", place)
        before = os.statvfs(place).f_bfree
        nbdtool("linuxdisk", place / "tree", "--to-file", place / "image", status=0)
        run("sync", "-f", place)
        assert (before - os.statvfs(place).f_bfree) * 4096 < 20_000_000


@pytest.mark.slow
def test_guestfish_inspects_it(tree: Path, run: Callable[..., Any], serve: Any) -> None:
    environment = {
        **os.environ, "LIBGUESTFS_BACKEND": "direct", "LIBGUESTFS_BACKEND_SETTINGS": "force_tcg"
    }  # fmt: skip
    script = "run : list-filesystems : mount-ro /dev/sda1 / : cat /hello : vfs-label /dev/sda1"
    (tree / "hello").write_text("hello from the tree\n")
    with serve("linuxdisk", tree, "label=mylabel", "type=ext4") as server:
        output = run(
            "guestfish", "--ro", "--format=raw", "-a", f"nbd://?socket={server.unix}",
            *script.split(), env=environment,
        )  # fmt: skip
    assert "/dev/sda1: ext4" in output
    assert "hello from the tree" in output
    assert "mylabel" in output


@pytest.mark.slow
def test_virt_filesystems_shows_it(tree: Path, nbdtool: Any, run: Any, tmp_path: Path) -> None:
    environment = {
        **os.environ, "LIBGUESTFS_BACKEND": "direct", "LIBGUESTFS_BACKEND_SETTINGS": "force_tcg"
    }  # fmt: skip
    image = tmp_path / "image"
    nbdtool("linuxdisk", tree, "label=mylabel", "--to-file", image, status=0)
    shown = run(
        *("virt-filesystems", "--format=raw", "-a", image, "--all", "--long", "--csv"),
        env=environment,
    ).splitlines()  # fmt: skip
    assert [line.split(",")[:4] for line in shown[1:]] == [
        ["/dev/sda1", "filesystem", "ext2", "mylabel"],
        ["/dev/sda1", "partition", "", ""],
        ["/dev/sda", "device", "", ""],
    ]
