"""What libguestfs' appliance finds on disks, in one launch of ours for all."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest

from nbdtool.commands.guestfs.inputs import Drive
from nbdtool.disk import read_bytes
from nbdtool.disks.guestfs.appliance import Appliance
from nbdtool.disks.guestfs.devices import devices, unlock
from nbdtool.disks.guestfs.disk import ApplianceDisk
from nbdtool.disks.guestfs.keys import parse_key
from nbdtool.disks.guestfs.listing import as_text, describe
from nbdtool.disks.guestfs.nodes import make_nodes
from nbdtool.disks.guestfs.tree import file_size, mount_all
from nbdtool.errors import Error
from tests.guestfs.images import PASSPHRASE, Images

pytestmark = pytest.mark.slow

LAST = ("plain", "guest", "crypt")  # sets, in the order of their drives


@pytest.fixture(scope="module")
def appliance(images: dict[str, Images]) -> Iterator[Appliance]:
    drives = [
        Drive(str(path), "raw", told=True, read_only=True)
        for name in LAST
        for path in images[name].disks
    ]
    made = Appliance(drives, writable=False)
    made.start()
    yield made
    made.close()


@pytest.fixture
def tree(appliance: Appliance) -> Iterator[Any]:
    """tree(mount, ...) mounts them; tree.size(path), tree.sha256(path) of a file there."""

    class Tree:
        def __call__(self, *mounts: str) -> None:
            appliance.call(partial(mount_all, texts=mounts, writable=False))

        def size(self, path: str) -> int:
            return appliance.call(partial(file_size, path=path))

        def sha256(self, path: str) -> str:
            size = self.size(path)
            disk = ApplianceDisk(appliance, path, size, writable=False)
            return hashlib.sha256(read_bytes(disk, 0, size)).hexdigest()

    yield Tree()
    appliance.call(lambda g: g.umount_all())


@pytest.mark.parametrize("number", [1, 2, 3, 4, 6])
def test_files_of_each_filesystem(number: int, tree: Any, images: dict[str, Images]) -> None:
    tree(f"/dev/sda{number}")
    known = {
        path: content
        for (device, path), content in images["plain"].files.items()
        if device == f"/dev/sda{number}"
    }
    assert len(known) > 2
    for path, content in known.items():
        assert tree.size(path) == content.size
        if content.size:
            assert tree.sha256(path) == content.sha256, path


def test_subvolume_by_its_name(tree: Any, images: dict[str, Images]) -> None:
    tree("btrfsvol:/dev/sda6/home", "/dev/sda3:/")
    tree.size("/images/disk.img")  # of the second one, which covers the first


def test_subvolume(tree: Any, images: dict[str, Images]) -> None:
    inside = [
        (path, content)
        for (device, path), content in images["plain"].files.items()
        if device == "btrfsvol:/dev/sda6/home" and content.size
    ]
    tree("btrfsvol:/dev/sda6/home")
    for path, content in inside:
        assert tree.sha256(path) == content.sha256
    assert inside


def test_mounts_below_one_another(tree: Any, images: dict[str, Images]) -> None:
    tree("/dev/sda1", "/dev/sda2:/images/deep")
    expected = images["plain"].files
    path = "/images/disk.img"
    assert tree.sha256(path) == expected["/dev/sda1", path].sha256
    assert tree.sha256("/images/deep" + path) == expected["/dev/sda2", path].sha256


def test_what_the_guest_mounts(tree: Any, images: dict[str, Images]) -> None:
    tree("inspect")
    for (device, path), content in images["guest"].files.items():
        if content.size:
            place = "/boot" + path if device == "/dev/sda1" else path
            assert tree.sha256(place) == content.sha256, place


@pytest.mark.parametrize(
    ("path", "says"),
    [
        ("/images/deep/no/such", "no such file; in /images/deep there is er"),
        ("/images", "is a directory, with"),
        ("/nothing", "no such file; in / there is images"),
    ],
)
def test_a_missing_file_says_what_there_is(path: str, says: str, tree: Any) -> None:
    tree("/dev/sda1")
    with pytest.raises(Error, match=says):
        tree.size(path)


@pytest.mark.parametrize("mount", ["/dev/sda5", "/dev/sdz1"])
def test_a_wrong_mount_says_what_there_is(mount: str, tree: Any) -> None:
    with pytest.raises(Error, match=r"mount=.*; there is .*/dev/sda1 \(ext4\)"):
        tree(mount)


@pytest.mark.parametrize("name", ["/dev/sda9", "/dev/sdb9", "/dev/sdd", "/dev/zero", "/dev/ram0"])
def test_no_such_device(name: str, appliance: Appliance) -> None:
    with pytest.raises(Error, match="no such device; there are /dev/sda1, /dev/sda2"):
        appliance.call(partial(make_nodes, names=[name]))


def test_names_of_devices_that_libguestfs_knows(appliance: Appliance) -> None:
    names = ["/dev/vda1", "/dev/mapper/vgguest-root", "/dev/sda"]
    nodes = appliance.call(partial(make_nodes, names=names))
    assert [node.device for node in nodes] == ["/dev/sda1", "/dev/vgguest/root", "/dev/sda"]
    assert all(node.path for node in nodes)


def test_a_device_that_has_no_node_of_use(appliance: Appliance, images: dict[str, Images]) -> None:
    content = images["plain"].devices["/dev/sda5"]
    disk = ApplianceDisk(appliance, "", content.size, writable=False, device="/dev/sda5")
    assert hashlib.sha256(read_bytes(disk, 0, content.size)).hexdigest() == content.sha256


def test_wrong_keys(appliance: Appliance) -> None:
    wrong = [parse_key("/dev/sdc1:key:not it")]
    with pytest.raises(Error, match="none of those for /dev/sdc1 opens it"):
        appliance.call(partial(unlock, keys=wrong, read_only=True))
    other = [parse_key("/dev/sda1:key:not it")]
    with pytest.raises(Error, match=r"no such encrypted device; there is .*/dev/sdc1"):
        appliance.call(partial(unlock, keys=other, read_only=True))


def test_listing(appliance: Appliance, images: dict[str, Images], tmp_path: Any) -> None:
    file = tmp_path / "passphrase"
    file.write_text(PASSPHRASE + "\nmore\n")
    appliance.call(partial(unlock, keys=[parse_key(f"all:file:{file}")], read_only=True))
    rows = appliance.call(describe)
    assert json.loads(as_text(rows, as_json=True)) == rows
    found = {row["name"]: row for row in rows}
    assert len(found) == len(rows)
    assert [row["name"] for row in rows][:3] == ["/dev/sda", "/dev/sda1", "/dev/sda2"]
    assert found["/dev/sda"]["content"] == "gpt"
    ext4 = found["/dev/sda1"]
    assert (ext4["content"], ext4["size"]) == ("ext4", images["plain"].devices["/dev/sda1"].size)
    assert ext4["uuid"] and found["/dev/sda5"]["content"] == "swap"
    assert found["btrfsvol:/dev/sda6/home"]["content"] == "btrfs subvolume"
    assert found["/dev/sdb2"]["content"] == "LVM2_member"
    assert found["/dev/sdc1"]["content"] == "crypto_LUKS"
    assert found["/dev/vgcrypt/secret"]["content"] == "ext4"
    assert set(appliance.call(devices)) <= set(found)
    text = as_text(rows, as_json=False)
    assert text.splitlines()[0].split() == ["NAME", "SIZE", "CONTENT", "LABEL", "UUID"]
    assert len(text.splitlines()) == len(rows) + 1
