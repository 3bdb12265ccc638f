"""Stopped guests: methods local and peek, against a real libvirtd."""

from __future__ import annotations

import contextlib
import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Callable

import libvirt  # type: ignore[import-untyped]
import pytest

from tests.libvirt.rig import Rig, backing, disk

pytestmark = pytest.mark.slow

MIB = 1 << 20


@pytest.fixture
def pool(rig: Rig) -> Iterator[str]:
    with rig.connection() as connection:
        pool = connection.storagePoolCreateXML(
            f"<pool type='dir'><name>p</name><target><path>{rig.images}</path></target></pool>"
        )
        pool.refresh()
        yield "p"
        pool.destroy()


@pytest.mark.parametrize("method", ["local", "peek", "auto"])
def test_raw(
    method: str, rig: Rig, raw_image: Path, tmp_path: Path, nbdtool: Any, compare: Any
) -> None:
    out = tmp_path / "out"
    with rig.guest("raw", disk(raw_image)):
        words = ("libvirt", "raw", f"connect={rig.uri}", f"method={method}")
        nbdtool(*words, "--to-file", out, status=0)
    compare(out, raw_image)
    assert out.stat().st_blocks * 512 < 5 * MIB  # the hole stays one


@pytest.mark.parametrize("method", ["local", "peek"])
def test_odd_size(method: str, rig: Rig, tmp_path: Path, nbdtool: Any, random_file: Any) -> None:
    image, out = random_file(rig.images / "odd", 3_000_001), tmp_path / "out"
    with rig.guest("odd", disk(image)):
        words = ("libvirt", "odd", f"connect={rig.uri}", f"method={method}")
        nbdtool(*words, "--to-file", out, status=0)
    assert out.read_bytes() == image.read_bytes()


def test_chain_of_three_as_the_guest_has_it(
    rig: Rig, chain: list[Path], backing_chain: str, tmp_path: Path, nbdtool: Any, compare: Any
) -> None:
    with rig.guest("chain", disk(chain[0], form="qcow2", chain=backing_chain)):
        nbdtool("libvirt", "chain", f"connect={rig.uri}", "--to-file", tmp_path / "out", status=0)
    compare(tmp_path / "out", chain[0], "qcow2")


def test_the_image_doesnt_say_what_is_read(
    rig: Rig, chain: list[Path], nbdtool: Any, tmp_path: Path, raw_image: Path, compare: Any
) -> None:
    words = ("libvirt", "chain", f"connect={rig.uri}", "--to-file", tmp_path / "out")
    with rig.guest("chain", disk(chain[0], form="qcow2")):
        done = nbdtool(*words, status=1)
        assert "libvirt doesn't say" in done.stderr and "backingStore" in done.stderr
    assert not (tmp_path / "out").exists()
    # where libvirt names another backing image than the image does, libvirt is right
    other = rig.images / "other"
    subprocess.run(["cp", raw_image, other], check=True)
    with rig.guest("chain", disk(chain[0], form="qcow2", chain=backing(other, "raw"))):
        nbdtool(*words, status=0)
    subprocess.run(
        ["qemu-img", "rebase", "-u", "-f", "qcow2", "-F", "raw", "-b", other, chain[0]], check=True
    )
    compare(tmp_path / "out", chain[0], "qcow2")
    subprocess.run(
        ["qemu-img", "rebase", "-u", "-f", "qcow2", "-F", "qcow2", "-b", chain[1], chain[0]],
        check=True,
    )


def test_a_pool_names_backing_images(
    pool: str, rig: Rig, chain: list[Path], tmp_path: Path, nbdtool: Any, compare: Any
) -> None:
    with rig.guest("chain", disk(chain[0], form="qcow2")):
        out = tmp_path / "out"
        nbdtool("libvirt", "chain", f"connect={rig.uri}", "--to-file", out, status=0)
    compare(tmp_path / "out", chain[0], "qcow2")


def test_a_chain_on_another_host_is_downloaded(
    pool: str, rig: Rig, chain: list[Path], tmp_path: Path, nbdtool: Any, compare: Any
) -> None:
    with rig.guest("chain", disk(chain[0], form="qcow2")):
        out = tmp_path / "out"
        words = ("libvirt", "chain", f"connect={rig.tcp_uri}", "--to-file", out)
        environment = {**os.environ, "TMPDIR": str(tmp_path)}
        nbdtool(*words, env=environment, status=0)
        assert list(tmp_path.iterdir()) == [out]
        compare(out, chain[0], "qcow2")
        environment["TMPDIR"] = "/nonexistent"
        assert "No such file" in nbdtool(*words, env=environment, status=1).stderr


def test_a_sparse_volume(
    pool: str, rig: Rig, raw_image: Path, tmp_path: Path, nbdtool: Any
) -> None:
    with (
        rig.guest("sparse", disk(raw_image)),
        rig.guest(
            "volume",
            "<disk type='volume' device='disk'><driver name='qemu' type='raw'/>"
            "<source pool='p' volume='raw'/><target dev='vda' bus='virtio'/></disk>",
        ),
    ):
        for guest, method in ("sparse", "volume"), ("volume", "volume"), ("volume", "local"):
            out = tmp_path / "out"
            words = ("libvirt", guest, f"connect={rig.uri}", f"method={method}", "--to-file", out)
            nbdtool(*words, status=0)
            assert out.read_bytes() == raw_image.read_bytes()
            assert out.stat().st_blocks * 512 < 5 * MIB


def test_an_image_in_no_pool(rig: Rig, chain: list[Path], nbdtool: Any) -> None:
    with rig.guest("nowhere", disk(chain[2], form="qcow2")):
        words = ("libvirt", "nowhere", f"connect={rig.tcp_uri}", "--to-file", "-")
        assert "virsh pool-create-as" in nbdtool(*words, status=1).stderr


def test_every_disk_is_an_export(
    rig: Rig, raw_image: Path, chain: list[Path], backing_chain: str, serve: Any, compare: Any
) -> None:
    disks = (
        disk(raw_image, "vda"),
        disk(chain[0], "vdb", "qcow2", backing_chain),
        disk("", "sda", device="cdrom"),
    )
    with (
        rig.guest("several", *disks),
        serve("libvirt", "several", f"connect={rig.uri}", "-r") as server,
    ):
        compare(server.uri.replace("?", "vda?"), raw_image)
        compare(server.uri.replace("?", "vdb?"), chain[0], "qcow2")
        done = subprocess.run(["nbdinfo", "--list", server.uri], capture_output=True, text=True)
        assert done.stdout.count("export=") == 2
        for said in done.stdout, server.log():
            assert said.count("by method local") == 2 and "the guest is stopped" in said


def test_choosing(rig: Rig, raw_image: Path, nbdtool: Any, tmp_path: Path, run: Any) -> None:
    disks = disk(raw_image, "vda"), disk("", "sda", device="cdrom"), disk("/nonexistent/x", "vdb")
    with rig.guest("choosing", *disks), rig.connection() as connection:
        uuid = connection.lookupByName("choosing").UUIDString()

        def failing(*words: str, status: int = 1) -> str:
            done = nbdtool("libvirt", *words, f"connect={rig.uri}", "--to-file", "-", status=status)
            assert done.stderr.count("\n") == 1, done.stderr
            return str(done.stderr)

        out = tmp_path / "out"
        for guest, wanted in (uuid, "vda"), ("choosing", str(raw_image)):
            words = ("libvirt", guest, f"disk={wanted}", f"connect={rig.uri}")
            nbdtool(*words, "--to-file", out, status=0)
            assert out.read_bytes() == raw_image.read_bytes()
        assert "sda is a CD-ROM drive with nothing in it" in failing("choosing", "disk=sda")
        assert "there are vda, vdb, sda" in failing("choosing", "disk=vdz", status=2)
        assert "no such guest; there are" in failing("nobody")
        assert "which guest?" in failing(status=2)
        assert "/nonexistent/x: No such file" in failing("choosing", "disk=vdb", "method=local")


def test_network_disk(rig: Rig, nbdtool: Any) -> None:
    network = (
        "<disk type='network' device='disk'><driver name='qemu' type='raw'/><source protocol='nbd'"
        " name='x'><host name='localhost' port='1'/></source>"
        "<target dev='vda' bus='virtio'/></disk>"
    )
    words = ("libvirt", "network", f"connect={rig.uri}", "--to-file", "-")
    with rig.guest("network", network):
        for method in "auto", "local", "peek":
            done = nbdtool(*words, f"method={method}", status=1)
            assert "network" in done.stderr and done.stderr.count("\n") == 1, done.stderr


def test_peek_refuses_qcow2(rig: Rig, chain: list[Path], nbdtool: Any) -> None:
    with rig.guest("q", disk(chain[2], form="qcow2")):
        words = ("libvirt", "q", f"connect={rig.uri}", "method=peek")
        assert "only raw disks" in nbdtool(*words, "--to-file", "-", status=1).stderr


@pytest.mark.parametrize("method", ["local", "peek"])
def test_a_guest_that_is_started_meanwhile(
    method: str, rig: Rig, serve: Any, run: Callable[..., str], random_file: Any
) -> None:
    image = random_file(rig.images / "started", 2 * MIB)
    image.chmod(0o666)
    words = ("libvirt", "started", f"connect={rig.uri}", f"method={method}")
    with rig.guest("started", disk(image)), serve(*words) as server:
        run("nbdcopy", server.uri, "null:")
        rig.begin("started")
        time.sleep(0.3)
        run("qemu-io", "-r", "-f", "raw", "-c", "read 0 4k", server.uri, status=1)
        assert "the guest was started meanwhile" in server.log()
        rig.end("started")
        run("qemu-io", "-r", "-f", "raw", "-c", "read 1M 4k", server.uri, status=1)


@pytest.mark.parametrize("method", ["local", "peek"])
@pytest.mark.parametrize("other", [True, False], ids=["another", "none"])
def test_a_guest_that_loses_its_disk_meanwhile(
    method: str, other: bool, rig: Rig, serve: Any, run: Callable[..., str], random_file: Any
) -> None:
    images = [random_file(rig.images / name, 2 * MIB) for name in ("kept", "lost", "new")]
    words = ("libvirt", "loser", f"connect={rig.uri}", f"method={method}", "disk=vdb")
    first = disk(images[0])
    with (
        rig.guest("loser", first, disk(images[1], "vdb")),
        serve(*words) as server,
    ):
        run("nbdcopy", server.uri, "null:")
        with rig.connection() as connection:
            domain = connection.lookupByName("loser")
            domain.detachDeviceFlags(disk(images[1], "vdb"), libvirt.VIR_DOMAIN_AFFECT_CONFIG)
            if other:
                domain.attachDeviceFlags(disk(images[2], "vdb"), libvirt.VIR_DOMAIN_AFFECT_CONFIG)
        time.sleep(0.3)
        run("qemu-io", "-r", "-f", "raw", "-c", "read 0 4k", server.uri, status=1)
        assert "vdb has another source now" in server.log()
        run("qemu-io", "-r", "-f", "raw", "-c", "read 1M 4k", server.uri, status=1)


@contextlib.contextmanager
def loop(image: Path, size: int) -> Iterator[Path]:
    """The image as a block device with sectors of `size` bytes."""
    done = subprocess.run(
        ["losetup", "-f", "--show", "-b", str(size), image],
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    device = Path(done.stdout.strip())
    try:
        yield device
    finally:
        subprocess.run(["losetup", "-d", device], check=True)


@pytest.mark.parametrize("sector", [512, 4096])
@pytest.mark.parametrize("method", ["local", "peek"])
def test_a_block_device(
    method: str, sector: int, rig: Rig, random_file: Any, nbdtool: Any, tmp_path: Path
) -> None:
    image = random_file(rig.images / "behind", 4 * MIB)
    with loop(image, sector) as device:
        text = disk(device).replace("type='file'", "type='block'").replace("file=", "dev=")
        with rig.guest("block", text):
            words = ("libvirt", "block", f"connect={rig.uri}", f"method={method}")
            nbdtool(*words, "--to-file", tmp_path / "out", status=0)
    assert (tmp_path / "out").read_bytes() == image.read_bytes()


def test_a_write_to_the_image_is_noticed_at_once(
    rig: Rig, serve: Any, run: Callable[..., str], random_file: Any
) -> None:
    image = random_file(rig.images / "written", MIB)
    with rig.guest("w", disk(image)), serve("libvirt", "w", f"connect={rig.uri}") as server:
        run("qemu-io", "-r", "-f", "raw", "-c", "read 0 4k", server.uri)
        with image.open("r+b") as file:
            file.write(b"x")
        run("qemu-io", "-r", "-f", "raw", "-c", "read 0 4k", server.uri, status=1)
        assert "changed while it was served" in server.log()


def test_local_refuses_a_running_guest_and_a_disk_elsewhere(
    rig: Rig, raw_image: Path, nbdtool: Any
) -> None:
    with rig.guest("running", disk(raw_image), start=True):
        words = ("libvirt", "running", "method=local", "--to-file", "-")
        done = nbdtool(*words, f"connect={rig.uri}", status=1)
        assert "is running" in done.stderr and "--method backup" in done.stderr
        assert "another host" in nbdtool(*words, f"connect={rig.tcp_uri}", status=1).stderr
        done = nbdtool(*words[:2], "method=peek", f"connect={rig.uri}", "--run", "true", status=0)
        assert "not a point in time" in done.stderr


@pytest.mark.parametrize(
    ("uri", "said"),
    [("bogus:///x", ""), ("test:///default", "not supported by the connection driver")],
)
def test_other_drivers(uri: str, said: str, nbdtool: Any) -> None:
    done = nbdtool("libvirt", "test", f"connect={uri}", "--to-file", "-", status=1)
    assert said in done.stderr and done.stderr.count("\n") == 1, done.stderr
