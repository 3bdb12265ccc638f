"""Logical volumes and members of RAID arrays, compared with what libguestfs' appliance reads."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, Callable

import pytest

from nbdtool.disk import Disk, read_bytes
from nbdtool.disks.file import FileDisk
from nbdtool.errors import Uncertain
from nbdtool.layers.lv import find_volumes
from nbdtool.layers.qcow2.image import Qcow2
from nbdtool.layers.window import Window
from nbdtool.mdraid import is_raid_member
from tests.guestfs.images import Content, Images, partitions

pytestmark = pytest.mark.slow

WHOLE = [
    ("vg", ["vg0/lin", "vg0/small", "vg0/str", "vg0/two-h--"]),
    ("odd", ["vg1/lin", "vg1/origin"]),  # an origin is itself; its snapshot isn't
    ("guest", ["vgguest/root"]),
    ("mbr", ["vgmbr/logical"]),
]


def devices(path: Path, disk: Disk) -> list[Disk]:
    """The partitions of a disk, as sfdisk sees them, or the disk."""
    return [Window(disk, start, size) for _, start, size in partitions(path)] or [disk]


def of_disk(disk: Disk) -> Content:
    digest = hashlib.sha256()
    for at in range(0, disk.size, 1 << 20):
        digest.update(read_bytes(disk, at, min(1 << 20, disk.size - at)))
    return Content(disk.size, digest.hexdigest())


@pytest.mark.parametrize("form", ["raw", "qcow2"])
@pytest.mark.parametrize("name, volumes", WHOLE, ids=[name for name, _ in WHOLE])
def test_same_bytes(images: dict[str, Images], name: str, volumes: list[str], form: str) -> None:
    given = images[name]
    disks: list[Disk] = [FileDisk(str(path)) for path in given.disks]
    if form == "qcow2":
        disks = [Qcow2(FileDisk(str(path))) for path in given.qcow2()]
    pairs = zip(given.disks, disks)
    found = find_volumes([device for path, disk in pairs for device in devices(path, disk)])
    assert sorted(set(found) - {"vg1/pool", "vg1/raid1", "vg1/snap", "vg1/thin"}) == volumes
    for volume in volumes:
        assert of_disk(found[volume].open()) == given.devices[f"/dev/{volume}"]


def test_others_are_left_to_libguestfs(images: dict[str, Images]) -> None:
    found = find_volumes([
        device for path in images["odd"].disks for device in devices(path, FileDisk(str(path)))
    ])  # fmt: skip
    for name, reason in {
        "pool": "its type is thin-pool",
        "thin": "its type is thin",
        "raid1": "its type is raid1",
        "snap": "snapshot",
    }.items():
        with pytest.raises(Uncertain, match=f"vg1/{name}: .*{reason}"):
            found[f"vg1/{name}"].open()


def test_on_the_command_line(
    nbdtool: Callable[..., Any], images: dict[str, Images], tmp_path: Path
) -> None:
    """A volume, and a file in a volume's filesystem."""
    guest, out = images["guest"], tmp_path / "out"
    for layers, expected in [
        (["--lv", "vgguest/root"], guest.devices["/dev/vgguest/root"]),
        (["--partition", "2", "--lv", "/dev/vgguest/root"], guest.devices["/dev/vgguest/root"]),
        (
            ["--lv", "vgguest/root", "--path", "/etc/fstab"],
            guest.files["/dev/vgguest/root", "/etc/fstab"],
        ),
    ]:
        nbdtool("file", guest.disk, *layers, "--to-file", out, status=0)
        data = out.read_bytes()
        assert Content(len(data), hashlib.sha256(data).hexdigest()) == expected
        out.unlink()
    done = nbdtool("file", images["vg"].disks[0], "--lv", "vg0/lin", "--to-file", out, status=1)
    assert "pv1 of vg0 is missing" in done.stderr and not out.exists()


def test_members_of_raid(images: dict[str, Images]) -> None:
    """Superblocks of all versions, and nothing else."""
    for name, given in images.items():
        for path in given.disks:
            for device in devices(path, FileDisk(str(path))):
                assert is_raid_member(device) == (name == "md")
    disks = [device for path in images["md"].disks for device in devices(path, FileDisk(str(path)))]
    assert find_volumes(disks) == {}
