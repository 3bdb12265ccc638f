"""The way without an appliance: what it gives is what the appliance gives, or there is a doubt."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from nbdtool.commands.guestfs.direct import open_direct
from nbdtool.commands.guestfs.inputs import find_drives
from nbdtool.disk import Disk, read_bytes
from nbdtool.errors import Error, Uncertain
from tests.guestfs.images import Content, Images

MIB = 1 << 20


def direct(
    disks: Sequence[Path], export: str = "", *mounts: str, form: str = ""
) -> dict[str, Disk]:
    pairs = [(str(disk), form) for disk in disks]
    drives = find_drives(pairs, "", "", writable=False, allow_live=False)
    return open_direct(drives, mounts, export)


def content(opened: dict[str, Disk]) -> Content:
    (disk,) = opened.values()
    digest = hashlib.sha256()
    for at in range(0, disk.size, MIB):
        digest.update(read_bytes(disk, at, min(MIB, disk.size - at)))
    assert sum(extent.length for extent in disk.extents(0, disk.size)) == disk.size
    return Content(disk.size, digest.hexdigest())


def content_of(data: bytes) -> Content:
    return Content(len(data), hashlib.sha256(data).hexdigest())


# On disks of libguestfs' own making


@pytest.fixture(params=["raw", "qcow2"])
def paths(request: pytest.FixtureRequest, images: dict[str, Images]) -> Any:
    """paths(name) -> the disks of a set in the format."""
    return lambda name: images[name].qcow2() if request.param == "qcow2" else images[name].disks


@pytest.mark.slow
class TestImages:
    @pytest.mark.parametrize("name", ["plain", "vg", "guest", "mbr"])
    def test_all_devices_are_certain(
        self, name: str, images: dict[str, Images], paths: Any
    ) -> None:
        opened = direct(paths(name))
        devices = images[name].devices
        others = {"vg": {"/dev/sda"}, "mbr": {"/dev/sda4"}}  # without a table; extended
        assert opened.keys() == devices.keys() | others.get(name, set())
        for device, expected in devices.items():
            assert content({"": opened[device]}) == expected, device
            assert content(direct(paths(name), device)) == expected, device

    @pytest.mark.parametrize("name", ["odd", "crypt", "md"])
    def test_what_is_certain_is_right(
        self, name: str, images: dict[str, Images], paths: Any
    ) -> None:
        certain = set()
        for device, expected in images[name].devices.items():
            try:
                opened = direct(paths(name), device)
            except Uncertain:
                continue
            assert content(opened) == expected, device
            certain.add(device)
        volumes = {device for device in certain if not device.startswith("/dev/sd")}
        assert volumes <= {"/dev/vg1/lin", "/dev/vg1/origin"}
        partitions = {d for d in images[name].devices if d.startswith("/dev/sd")}
        assert certain - volumes == (set() if name == "md" else partitions)
        if name in ("odd", "md"):
            with pytest.raises(Uncertain):
                direct(paths(name))

    def test_files(self, images: dict[str, Images], paths: Any) -> None:
        certain = set()
        for name, found in images.items():
            for (device, path), expected in found.files.items():
                try:
                    opened = direct(paths(name), path, device)
                except Uncertain:
                    continue
                assert content(opened) == expected, (device, path)
                certain.add((name, device))
        assert certain | {("mbr", "/dev/sda1")} == {
            ("plain", "/dev/sda1"),
            ("vg", "/dev/vg0/small"),
            ("guest", "/dev/sda1"),
            ("guest", "/dev/vgguest/root"),
            ("mbr", "/dev/sda1"),
            ("mbr", "/dev/sda5"),
        }

    def test_several_mounts(self, images: dict[str, Images], paths: Any) -> None:
        disks, files = paths("guest"), images["guest"].files
        mounts = ("/dev/vgguest/root", "/dev/sda1:/boot")
        for device, path in files:
            if device == "/dev/vgguest/root":
                assert content(direct(disks, path, *mounts)) == files[device, path]
            elif device == "/dev/sda1":
                assert content(direct(disks, "/boot" + path, *mounts)) == files[device, path]
        for odd in (mounts[::-1], ("/dev/sda1:/boot",), (*mounts, "/dev/sda1"), ("inspect",)):
            with pytest.raises(Uncertain):
                direct(disks, "/boot/grub/grub.cfg", *odd)

    def test_a_group_without_one_of_its_disks(self, images: dict[str, Images]) -> None:
        first, second = images["vg"].disks
        for disks in [first], [second]:
            with pytest.raises(Uncertain):
                direct(disks)
        with pytest.raises(Uncertain):
            direct([first, second, second], "/dev/vg0/lin")
        names = {name: f"/dev/sd{'ba'[name[7] == 'b']}{name[8:]}" for name in images["vg"].devices
                 if name.startswith("/dev/sd")}  # fmt: skip
        assert (
            content(direct([second, first], "/dev/vg0/str"))
            == (images["vg"].devices["/dev/vg0/str"])
        )
        for name, swapped in names.items():
            assert content(direct([second, first], swapped)) == images["vg"].devices[name]

    def test_other_names_for_a_device(self, images: dict[str, Images]) -> None:
        disks, devices = images["vg"].disks, images["vg"].devices
        for name in "/dev/vdb1", "/dev/hdb1":
            assert content(direct(disks, name)) == devices["/dev/sdb1"]
        name = "/dev/mapper/vg0-two--h----"
        assert content(direct(disks, name)) == devices["/dev/vg0/two-h--"]
        for name in "/dev/disk/by-label/x", "/dev/dm-0", "/dev/md127", "/dev/mapper/luks":
            with pytest.raises(Uncertain):
                direct(disks, name)

    def test_what_may_be_in_what_is_encrypted(self, images: dict[str, Images]) -> None:
        for name in "/dev/vgcrypt/secret", "/dev/mapper/luks-x", "/dev/vgcrypt/none":
            with pytest.raises(Uncertain):
                direct(images["crypt"].disks, name)

    def test_wrong_names_tell_what_there_is(self, images: dict[str, Images]) -> None:
        for name in "/dev/sdb9", "/dev/sdc", "/dev/sdb01", "/dev/vg0/none", "/dev/sdb4294967297":
            with pytest.raises(Error, match=r"no such device; there are .*/dev/vg0/lin") as caught:
                direct(images["vg"].disks, name)
            assert not isinstance(caught.value, Uncertain)


# Without


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory, random_file: Any, run: Any) -> Path:
    """A GPT with an ext4 filesystem that has /images/disk.img, links to it, and 4 MiB of zeroes."""
    directory = tmp_path_factory.mktemp("disk")
    tree = directory / "tree" / "images"
    tree.mkdir(parents=True)
    random_file(tree / "disk.img", 3 * MIB)
    (tree.parent / "boot").mkdir()
    (tree / "link").symlink_to("disk.img")
    (tree / "boot").symlink_to("/boot")
    (tree / "up").symlink_to("../../images/disk.img")
    path = directory / "disk"
    path.write_bytes(bytes(40 * MIB))
    script = "label: gpt\nsize=24MiB\nsize=4MiB\n"
    run("sfdisk", "-q", path, input=script.encode(), binary=True, stdin=None)
    run("mke2fs", "-q", "-t", "ext4", "-d", tree.parent, "-E", f"offset={MIB}", path, "24M")
    return path


@pytest.fixture(scope="module")
def expected(disk: Path) -> Content:
    return content_of((disk.parent / "tree/images/disk.img").read_bytes())


@pytest.mark.parametrize("path", ["/images/disk.img", "/images/link", "//images/../images/./up"])
def test_links_are_followed(path: str, disk: Path, expected: Content) -> None:
    assert content(direct([disk], path, "/dev/sda1")) == expected


def test_no_such_file_tells_what_there_is(disk: Path) -> None:
    with pytest.raises(Error, match=r"disk\.img"):
        direct([disk], "/images/none", "/dev/sda1")
    with pytest.raises(Error, match="directory"):
        direct([disk], "/images", "/dev/sda1")


def test_a_way_into_another_filesystem(disk: Path) -> None:
    mounts = "/dev/sda1", "/dev/sda1:/boot"
    for path in "/images/boot/images/disk.img", "/boot/images/boot/x", "/images/../images/disk.img":
        with pytest.raises(Uncertain):
            direct([disk], path, *mounts)
    with pytest.raises(Uncertain):  # an absolute link is one of the tree
        direct([disk], "/boot/images/boot", *mounts)
    with pytest.raises(Uncertain):
        direct([disk], "/boot/images/disk.img", "/dev/sda1", "/dev/sda1://boot")


def test_what_is_no_ext_filesystem(disk: Path) -> None:
    for mount in "/dev/sda2", "/dev/sda", "btrfsvol:/dev/sda1/x":
        with pytest.raises(Uncertain):
            direct([disk], "/x", mount)
        with pytest.raises(Uncertain):  # it has to be mounted for a device as well
            direct([disk], "/dev/sda1", mount)


def test_a_backing_file_that_is_named(disk: Path, tmp_path: Path, run: Any) -> None:
    top = tmp_path / "top"
    run("qemu-img", "create", "-q", "-f", "qcow2", "-b", disk, "-F", "raw", top)
    run("qemu-io", "-f", "qcow2", "-c", f"write -P 7 {25 * MIB} 1M", top)
    assert content(direct([top], "/dev/sda2", form="qcow2")) == content_of(
        b"\7" * MIB + bytes(3 * MIB)
    )


def test_sizes_that_are_no_whole_sectors(disk: Path, tmp_path: Path) -> None:
    odd = tmp_path / "odd"
    odd.write_bytes(disk.read_bytes()[:-1] + b"!" + b"?" * 100)
    assert content(direct([odd], "/dev/sda")) == content_of(odd.read_bytes() + bytes(412))


def test_many_drives(disk: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.write_bytes(bytes(MIB))
    opened = direct([*[empty] * 27, disk])
    names = [f"/dev/sd{letter}" for letter in "abcdefghijklmnopqrstuvwxyz"]
    assert [*opened] == [*names, "/dev/sdaa", "/dev/sdab1", "/dev/sdab2"]
    assert opened["/dev/sdab2"].size == 4 * MIB


def test_the_disk_changes_while_it_is_served(disk: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    copy.write_bytes(disk.read_bytes())
    (served,) = direct([copy], "/images/disk.img", "/dev/sda1").values()
    read_bytes(served, 0, 4096)
    with copy.open("r+b") as file:
        file.seek(39 * MIB)
        file.write(b"x")
    with pytest.raises(OSError, match="changed"):
        read_bytes(served, 0, 4096)


def test_formats_that_are_not_read_here(disk: Path) -> None:
    with pytest.raises(Uncertain):
        direct([disk], "/dev/sda1", form="vmdk")


def test_one_of_several_devices_stays_when_another_is_closed(disk: Path) -> None:
    opened = direct([disk])
    for served in opened.values():
        assert read_bytes(served, 0, 512) is not None
    for served in opened.values():
        served.close()


def test_no_appliance_and_no_libguestfs(disk: Path, expected: Content, tmp_path: Path) -> None:
    """It isn't even imported."""
    script = (
        "import sys; sys.modules['guestfs'] = None; from nbdtool.__main__ import main;"
        "status = main(sys.argv[1:]); assert 'libguestfs' not in str(sys.modules.keys());"
        "sys.exit(status)"
    )
    out = tmp_path / "out"
    words = ["guestfs", "-r", f"disk={disk}", "mount=/dev/sda1", "export=/images/disk.img"]
    done = subprocess.run(
        [sys.executable, "-c", script, *words, "--direct=only", "--to-file", os.fspath(out)],
        stderr=subprocess.PIPE, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert content_of(out.read_bytes()) == expected


def test_the_start_up_line_says_the_way(disk: Path, serve: Any, run: Any) -> None:
    with serve("guestfs", "-r", f"disk={disk}", "export=/dev/sda2") as server:
        assert "read directly" in run("nbdinfo", server.uri)
        assert "read directly" in server.log()
    with serve("guestfs", "-r", f"disk={disk}") as server:
        assert "read directly" in server.log()
        listed = run("nbdinfo", "--list", server.uri)
        assert 'export="/dev/sda1"' in listed and 'export="/dev/sda2"' in listed


def test_only_directly(disk: Path, nbdtool: Any) -> None:
    words = ("guestfs", "-r", f"disk={disk}", "--direct=only", "--run", "true")
    done = nbdtool(*words, "mount=/dev/sda2", "export=/x", status=1)
    assert "--direct=only" in done.stderr and "ext" in done.stderr
