"""Disks with all that guests have, made by one launch of libguestfs' appliance.

A set of disks comes with what libguestfs read from it in that launch, under the names that things
have when the disks of the set are the only ones, in their order: /dev/sda, /dev/sdb.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import guestfs  # type: ignore[import-untyped]

from tests.host_lvm import HostLvm, loop_device, run

MIB = 1 << 20
PASSPHRASE = "correct horse"
LUKS = "1d7cf1b6-9a43-4b8c-a1f5-0000000000"  # the UUIDs, but for the number of the partition

# Each disk: its size in MiB, and the partitions that sfdisk makes on it: sizes and types.
DISKS: dict[str, tuple[int, str]] = {
    # ext4, xfs, vfat, ntfs, swap, btrfs, and one that has nothing
    "plain": (192, "gpt 48 L 32 L 16 U 16 EBD0A0A2-B9E5-4433-87C0-68B6B72699C7 8 S 48 L 4 L"),
    "pva": (40, ""),
    "pvb": (56, "gpt 8 L 40 V"),
    "odda": (64, "gpt 60 V"),
    "oddb": (64, ""),
    "mda": (56, "gpt 24 R 8 R 8 R 8 R"),  # superblocks 1.2, 0.90, 1.0, 1.1
    "mdb": (56, "gpt 24 R 8 R 8 R 8 R"),
    "crypt": (64, "gpt 24 L 32 L"),  # ext4 in LUKS; a volume group in LUKS
    "guest": (72, "gpt 16 L 48 V"),  # /boot; the root directory in a logical volume
    "mbr": (32, "dos 4 83 1 83 1 83 20 E 6 83 8 8e"),  # logical ones: ext2, a volume group
}
# Full of random bytes, so that whoever reads the wrong ones of a volume group notices.
RANDOM = ("pva", "pvb", "odda", "oddb")
SETS: dict[str, tuple[list[str], list[str]]] = {  # disks, and what devices they hold
    "plain": (["plain"], []),
    "vg": (["pva", "pvb"], [f"/dev/vg0/{name}" for name in ("lin", "small", "str", "two-h--")]),
    "odd": (
        ["odda", "oddb"],
        [f"/dev/vg1/{name}" for name in ("lin", "origin", "raid1", "snap", "thin")],
    ),
    "md": (["mda", "mdb"], [f"/dev/md{number}" for number in range(1, 5)]),
    "crypt": (
        ["crypt"],
        [f"/dev/mapper/luks-{LUKS}01", f"/dev/mapper/luks-{LUKS}02", "/dev/vgcrypt/secret"],
    ),
    "guest": (["guest"], ["/dev/vgguest/root"]),
    "mbr": (["mbr"], ["/dev/vgmbr/logical"]),
}
HOST_LVM = """
pvcreate -ff -y {pva} {pvb2} {odda1} {oddb} {guest2} {mbr6}
vgcreate -s 1m vg0 {pva} {pvb2}
vgcreate -s 1m vg1 {odda1} {oddb}
vgcreate -s 1m vgguest {guest2}
vgcreate -s 1m vgmbr {mbr6}
lvcreate -l 8 -n small vg0 {pva}
lvcreate -i 2 -I 64k -l 12 -n str vg0
lvcreate -i 2 -I 4k -l 4 -n two-h-- vg0
lvcreate -l 40 -n lin vg0
lvextend -l +3 vg0/small
lvextend -i 1 -l +2 vg0/str
lvcreate -l 4 -n lin vg1
lvcreate -l 4 -n origin vg1
lvcreate -l 40 -n root vgguest
lvcreate -l 6 -n logical vgmbr
"""


class Content(NamedTuple):
    """The content of a device or file; size in bytes."""

    size: int
    sha256: str


@dataclass
class Images:
    """Disks that belong together; nobody writes to them.

    `devices` has partitions, logical volumes, RAID devices and what is in LUKS, by their names;
    `files` the files of their filesystems by both names, ("/dev/sda1", "/images/disk.img").
    """

    disks: list[Path]
    devices: dict[str, Content] = field(default_factory=dict)
    files: dict[tuple[str, str], Content] = field(default_factory=dict)

    @property
    def disk(self) -> Path:
        """The only one."""
        (disk,) = self.disks
        return disk

    def qcow2(self) -> list[Path]:
        """The disks in that format."""
        paths = [path.with_suffix(".qcow2") for path in self.disks]
        for disk, path in zip(self.disks, paths):
            if not path.exists():
                run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", disk, path)
        return paths

    def copy(self, directory: Path) -> list[Path]:
        """Copies of the disks, to be written to."""
        for disk in self.disks:
            run("cp", disk, directory)
        return [directory / disk.name for disk in self.disks]


def make_images(directory: Path) -> dict[str, Images]:
    """All sets by name, in a directory; takes a minute."""
    paths = {name: directory / f"{name}.img" for name in DISKS}
    sets = {name: Images([paths[disk] for disk in disks]) for name, (disks, _) in SETS.items()}
    _make_disks(paths, directory / "lvm")
    maker = _Maker(paths)
    try:
        for name in "plain", "vg", "odd", "md", "crypt", "guest", "mbr":
            getattr(maker, "fill_" + name)()
        maker.record(sets)
    finally:
        maker.close()
    for images in sets.values():
        for letter, path in zip("ab", images.disks):
            for number, start, size in partitions(path):
                with path.open("rb") as file:
                    file.seek(start)
                    digest = hashlib.sha256(file.read(size)).hexdigest()
                images.devices[f"/dev/sd{letter}{number}"] = Content(size, digest)
    return sets


def partitions(path: Path) -> Iterator[tuple[int, int, int]]:
    """(number, first byte, bytes) of each, as sfdisk reads them."""
    words = ["sfdisk", "--json", path]
    done = subprocess.run(words, capture_output=True, check=False)
    if done.returncode == 0:  # there is a table
        for entry in json.loads(done.stdout)["partitiontable"]["partitions"]:
            if entry["type"] != "5":  # an extended partition
                number = int(entry["node"][len(str(path)) :])
                yield number, entry["start"] * 512, entry["size"] * 512


def _make_disks(paths: dict[str, Path], scratch: Path) -> None:
    """The disks with their partitions, volume groups and LUKS headers, by the host's tools."""
    with contextlib.ExitStack() as stack:
        devices = {}
        for name, path in paths.items():
            size, table = DISKS[name]
            with path.open("wb") as file:
                if name in RANDOM:
                    file.write(random.Random(name).randbytes(size * MIB))
                file.truncate(size * MIB)
            if table:
                label, *words = table.split()
                entries = zip(words[::2], words[1::2])
                lines = [f"label: {label}", *(f"size={n}MiB, type={kind}" for n, kind in entries)]
                options = ["--quiet", "--wipe=always", "--wipe-partitions=never"]
                run("sfdisk", *options, path, input="\n".join(lines))
            devices[name] = stack.enter_context(loop_device(path))
            for number, start, length in partitions(path):
                part = stack.enter_context(loop_device(path, start, length))
                devices[f"{name}{number}"] = part
        lvm = HostLvm(scratch, list(devices.values()))
        for line in HOST_LVM.strip().splitlines():
            lvm(line.format(**devices))
        for number in "1", "2":  # LUKS 1: deriving the key of LUKS 2 takes long without KVM
            options = ["-q", "--type=luks1", "--pbkdf-force-iterations=1000"]
            options += [f"--uuid={LUKS}0{number}", devices["crypt" + number]]
            run("cryptsetup", "luksFormat", *options, "-", input=PASSPHRASE)


_LABELS = "/dev/disk/guestfs/"  # where the appliance has each disk under its name


class _Maker:
    """The appliance, which has all disks."""

    def __init__(self, paths: dict[str, Path]) -> None:
        os.environ.setdefault("LIBGUESTFS_BACKEND", "direct")
        os.environ.setdefault("LIBGUESTFS_BACKEND_SETTINGS", "force_tcg")
        self.g: Any = guestfs.GuestFS(python_return_dict=True)
        for name, path in paths.items():
            self.g.add_drive_opts(os.fspath(path), format="raw", cachemode="unsafe", label=name)
        self.g.launch()
        self.mountables: list[str] = []

    def close(self) -> None:
        self.g.shutdown()
        self.g.close()

    def sh(self, *lines: str) -> None:
        """For what libguestfs has no call for."""
        self.g.debug("sh", [f"set -e; exec 2>&1; cd {_LABELS}; " + "; ".join(lines)])

    def write_files(self, device: str) -> None:
        """Fill a filesystem: three files, of which one is sparse, and a link."""
        self.mountables.append(device)
        g, generator = self.g, random.Random(device)
        g.mount_options("", device, "/")
        g.mkdir_p("/images/deep/er")
        g.write("/images/deep/er/note.txt", f"a file of {device}\n".encode())
        for _ in range(3):
            g.write_append("/images/disk.img", generator.randbytes(MIB))
        g.touch("/images/sparse.img")
        g.truncate_size("/images/sparse.img", 5 * MIB + 123)
        g.pwrite("/images/sparse.img", generator.randbytes(70000), MIB + 4000)
        with contextlib.suppress(RuntimeError):  # vfat
            g.ln_s("disk.img", "/images/link.img")
        g.umount_all()

    def write_note(self, device: str) -> None:
        """One file, where it is about the device."""
        self.mountables.append(device)
        self.g.mount_options("", device, "/")
        self.g.write("/note.txt", f"on {device}\n".encode() * 1000)
        self.g.umount_all()

    def fill_plain(self) -> None:
        g, disk = self.g, _LABELS + "plain"
        g.mkfs("ext4", disk + "1", label="data")
        self.write_files(disk + "1")
        self.sh("mkfs.xfs -q --unsupported -L xdata plain2")
        self.write_files(disk + "2")
        g.mkfs("vfat", disk + "3", label="FAT")
        self.write_files(disk + "3")
        g.mkfs("ntfs", disk + "4", label="windows")
        self.write_files(disk + "4")
        g.mkswap(disk + "5", label="swap")
        self.sh("mkfs.btrfs -q -f --mixed -L tree plain6")
        self.write_files(disk + "6")
        g.mount_options("", disk + "6", "/")
        g.btrfs_subvolume_create("/home")
        g.write("/home/inside.txt", b"in the subvolume home\n")
        g.umount_all()
        self.mountables.append(f"btrfsvol:{disk}6/home")

    def fill_vg(self) -> None:
        self.g.mkfs("ext4", "/dev/vg0/small")
        self.write_files("/dev/vg0/small")

    def fill_odd(self) -> None:
        """Volumes that the kernel makes up from others."""
        self.sh(
            "lvm lvcreate -q -y -s -l 4 -n snap vg1/origin",
            "lvm lvcreate -q -y -Wn -m 1 --type raid1 --nosync -l 4 -n raid1 vg1",
            "lvm lvcreate -q -y -l 8 -V 16m -T vg1/pool -n thin",
            "dd if=/dev/urandom of=/dev/vg1/thin bs=64k seek=9 count=7 conv=fsync",
        )

    def fill_md(self) -> None:
        create = "mdadm --create --quiet --run --assume-clean --homehost=any --level=1"
        versions = enumerate(("1.2", "0.90", "1.0", "1.1"), 1)
        self.sh(
            *(
                f"{create} --metadata={version} --raid-devices=2 /dev/md{n} mda{n} mdb{n}"
                for n, version in versions
            ),
            "udevadm settle",
        )
        self.g.mkfs("ext4", "/dev/md1")
        self.write_note("/dev/md1")

    def fill_crypt(self) -> None:
        for number in "1", "2":
            device, name = f"{_LABELS}crypt{number}", f"luks-{LUKS}0{number}"
            self.g.cryptsetup_open(device, PASSPHRASE, name, crypttype="luks")
        self.g.mkfs("ext4", f"/dev/mapper/luks-{LUKS}01")
        self.write_note(f"/dev/mapper/luks-{LUKS}01")
        self.g.pvcreate(f"/dev/mapper/luks-{LUKS}02")
        self.g.vgcreate("vgcrypt", [f"/dev/mapper/luks-{LUKS}02"])
        self.g.lvcreate("secret", "vgcrypt", 20)
        self.g.mkfs("ext4", "/dev/vgcrypt/secret")
        self.write_note("/dev/vgcrypt/secret")

    def fill_guest(self) -> None:
        """What libguestfs' inspection takes for a Debian."""
        g, root, boot = self.g, "/dev/vgguest/root", _LABELS + "guest1"
        g.mkfs("ext4", boot, label="BOOT")
        g.mkfs("ext4", root, label="ROOT")
        self.mountables.append(root)
        g.mount_options("", root, "/")
        for directory in "/bin", "/boot", "/etc", "/usr/bin", "/var/lib/dpkg":
            g.mkdir_p(directory)
        g.mount_options("", boot, "/boot")
        g.write("/boot/grub.cfg", b"# nothing to boot\n")
        fstab = f"LABEL=BOOT /boot ext4 defaults 0 0\n{root} / ext4 defaults 0 0\n"
        g.write("/etc/fstab", fstab.encode())
        g.write("/etc/debian_version", b"12.5\n")
        g.write("/etc/hostname", b"guest.example\n")
        g.write("/etc/os-release", b'NAME="Debian GNU/Linux"\nVERSION_ID="12"\nID=debian\n')
        g.write("/var/lib/dpkg/status", b"")
        g.upload("/bin/true", "/bin/ls")  # tells the architecture
        g.umount_all()
        self.mountables.append(boot)

    def fill_mbr(self) -> None:
        self.g.mkfs("ext2", _LABELS + "mbr5", blocksize=1024)
        self.write_note(_LABELS + "mbr5")

    def record(self, sets: dict[str, Images]) -> None:
        """What libguestfs reads from all files, volumes, and RAID and LUKS devices."""
        g = self.g
        for mountable in self.mountables:
            images, name = _owner(mountable, sets)
            g.mount_options("ro", mountable, "/")
            for path in ["/" + path for path in g.find("/")]:
                if g.is_file(path):
                    content = Content(g.filesize(path), g.checksum("sha256", path))
                    images.files[name, path] = content
            g.umount_all()
        for name, images in sets.items():
            for device in SETS[name][1]:
                digest = g.checksum_device("sha256", device)
                images.devices[device] = Content(g.blockdev_getsize64(device), digest)


def _owner(mountable: str, sets: dict[str, Images]) -> tuple[Images, str]:
    """The set that a filesystem is in, and its name there."""
    for name, (disks, devices) in SETS.items():
        if mountable in devices:
            return sets[name], mountable
        for letter, disk in zip("ab", disks):
            if _LABELS + disk in mountable:
                return sets[name], mountable.replace(_LABELS + disk, f"/dev/sd{letter}")
    raise AssertionError(f"{mountable} is in no set")
