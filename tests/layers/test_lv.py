"""Logical volumes that LVM's own commands make, and metadata that are damaged.

What is where is compared with what `lvs` says; tests/guestfs has the same with the kernel's bytes.
"""

from __future__ import annotations

import argparse
import contextlib
import random
import re
import struct
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Callable

import pytest

from nbdtool.disk import Disk, ZeroSpan, read_bytes
from nbdtool.disks.file import FileDisk
from nbdtool.errors import Error, Uncertain
from nbdtool.layers import lv
from nbdtool.layers.lv import Striped, find_volumes
from nbdtool.lvm import read_group
from tests.host_lvm import HostLvm, loop_device, run
from tests.span_disk import SpanDisk, mixed_disk

MIB = 1 << 20
SIZE = 24 * MIB  # of a physical volume


class Rig:
    """Three images, of which all bytes differ, as devices that LVM sees."""

    def __init__(self, directory: Path, stack: ExitStack, contents: Sequence[bytes]) -> None:
        self.paths = [directory / f"pv{number}" for number in range(3)]
        self.devices = []
        for path, data in zip(self.paths, contents):
            path.write_bytes(data)
            self.devices.append(stack.enter_context(loop_device(path)))
        self.lvm = HostLvm(directory / "lvm", self.devices)

    def disks(self) -> list[Disk]:
        return [FileDisk(str(path)) for path in self.paths]

    def expected(self) -> dict[str, bytes]:
        """The volumes by name, as the tables that LVM prints describe them."""
        starts = {}
        fields = "pv_name,pe_start,vg_extent_size"
        for line in self.lvm(f"pvs --noheadings --units b --nosuffix -o {fields}").splitlines():
            device, start, extent = line.split()
            starts[device] = int(start), int(extent or 0)
        contents = {device: path.read_bytes() for device, path in zip(self.devices, self.paths)}
        volumes: dict[str, bytes] = {}
        fields = "vg_name,lv_name,seg_start,stripe_size,seg_pe_ranges --sort seg_start"
        listed = self.lvm(f"lvs --noheadings --segments --units b --nosuffix -o {fields}")
        for line in listed.splitlines():
            group, volume, at, stripe, *ranges = line.split()
            legs = []
            for area in ranges:
                device, first, last = re.split("[:-]", area)
                start, extent = starts[device]
                legs.append(contents[device][start + int(first) * extent :]
                            [: (int(last) - int(first) + 1) * extent])  # fmt: skip
            step = int(stripe) or len(legs[0])
            data = b"".join(leg[n : n + step] for n in range(0, len(legs[0]), step) for leg in legs)
            name = f"{group}/{volume}"
            assert len(volumes.get(name, b"")) == int(at)
            volumes[name] = volumes.get(name, b"") + data
        return volumes


@pytest.fixture(scope="module")
def contents() -> list[bytes]:
    return [random.Random(number).randbytes(SIZE) for number in range(3)]


@pytest.fixture
def rig(tmp_path: Path, contents: list[bytes]) -> Iterator[Rig]:
    with ExitStack() as stack:
        yield Rig(tmp_path, stack, contents)


def content(disk: Disk) -> bytes:
    return read_bytes(disk, 0, disk.size)


def check(rig: Rig) -> None:
    volumes = find_volumes(rig.disks())
    expected = rig.expected()
    assert volumes.keys() == expected.keys()
    for name, data in expected.items():
        disk = volumes[name].open()
        assert disk.size == volumes[name].size == len(data)
        assert content(disk) == data, name


class TestAsLvmMakesThem:
    def test_volumes_that_grow_and_go(self, rig: Rig) -> None:
        """Random commands, after which LVM and we agree on what is where."""
        generator = random.Random(1)
        lvm, (a, b, c) = rig.lvm, rig.devices
        lvm(f"pvcreate -ff -y --dataalignment 3m {a}")
        lvm(f"pvcreate -ff -y --metadatacopies 2 {b}")
        lvm(f"pvcreate -ff -y --metadatacopies 0 {c}")
        lvm(f"vgcreate -s 512k vg-0 {a} {b} {c}")
        names: list[str] = []
        for number in range(24):
            choice = generator.random()
            try:
                if choice < 0.5 or not names:
                    count = generator.choice((1, 1, 2, 3))
                    stripe = generator.choice((4, 16, 64, 512))
                    striped = f"-i {count} -I {stripe}k" if count > 1 else ""
                    lvm(f"lvcreate -y {striped} -l {generator.randrange(1, 20)} -n l-{number} vg-0")
                    names.append(f"vg-0/l-{number}")
                elif choice < 0.85:
                    growth = generator.randrange(1, 9)
                    lvm(f"lvextend -l +{growth} -i 1 {generator.choice(names)}")
                else:
                    lvm(f"lvremove -y {names[-2]}")
                    del names[-2]
            except (AssertionError, IndexError):
                pass  # no more room
        assert len(names) > 4
        check(rig)

    def test_several_groups_and_none(self, rig: Rig) -> None:
        lvm, (a, b, c) = rig.lvm, rig.devices
        assert find_volumes(rig.disks()) == {}
        lvm(f"pvcreate -ff -y --labelsector 3 {a} {b} {c}")
        assert find_volumes(rig.disks()) == {}
        lvm(f"vgcreate one {a}")
        lvm(f"vgcreate two {c}")
        lvm("lvcreate -y -l 3 -n x one")
        lvm("lvcreate -y -l 2 -n x two")
        check(rig)
        lvm("vgrename one three")
        check(rig)

    def test_metadata_that_wrap(self, rig: Rig) -> None:
        """The text of a new version goes behind the last one, and around."""
        lvm, (a, _, c) = rig.lvm, rig.devices
        lvm(f"pvcreate -ff -y --metadatasize 40k --dataalignment 48k {a} {c}")
        lvm(f"vgcreate -s 128k vg {a} {c}")
        lvm("lvcreate -y -l 3 -n lv vg")
        for number in range(40):
            lvm(f"lvchange --addtag tag{number:0500} vg/lv")
            with rig.paths[0].open("rb") as file:
                file.seek(4096 + 32)
                size, offset, length = struct.unpack("<QQQ", file.read(24))
            if offset + length > size:
                break
        else:
            raise AssertionError("it never wraps")
        check(rig)

    def test_an_older_copy_is_left_alone(self, rig: Rig) -> None:
        """A physical volume that missed a change: the newest metadata count."""
        lvm, (a, b, _) = rig.lvm, rig.devices
        lvm(f"pvcreate -ff -y {a} {b}")
        lvm(f"vgcreate vg {a} {b}")
        lvm(f"lvcreate -y -l 1 -n one vg {a}")
        old = rig.paths[1].read_bytes()[:MIB]
        lvm(f"lvextend -l +1 vg/one {a}")
        expected = rig.expected()
        with rig.paths[1].open("r+b") as file:
            file.write(old)
        for disks in rig.disks(), rig.disks()[::-1]:
            assert content(find_volumes(disks)["vg/one"].open()) == expected["vg/one"]


class TestDoubts:
    @pytest.fixture
    def group(self, rig: Rig) -> Rig:
        """vg/left is on the first, vg/right on the second, vg/both on both."""
        lvm, (a, b, c) = rig.lvm, rig.devices
        lvm(f"pvcreate -ff -y {a} {b} {c}")
        lvm(f"vgcreate -s 1m vg {a} {b}")
        lvm(f"lvcreate -y -l 2 -n left vg {a}")
        lvm(f"lvcreate -y -l 2 -n right vg {b}")
        lvm("lvcreate -y -l 4 -i 2 -n both vg")
        return rig

    def doubt(self, disks: list[Disk], name: str) -> str:
        with pytest.raises(Uncertain) as error:
            find_volumes(disks)[name].open()
        return str(error.value)

    def test_missing(self, group: Rig) -> None:
        disks = group.disks()[:1]
        assert self.doubt(disks, "vg/right") == "vg/right: pv1 of vg is missing"
        assert "pv1 of vg is missing" in self.doubt(disks, "vg/both")
        assert content(find_volumes(disks)["vg/left"].open()) == group.expected()["vg/left"]

    def test_marked_as_missing(self, group: Rig) -> None:
        """It is there again, but what is on it is old."""
        gone = group.paths[1].read_bytes()[:MIB]
        with group.paths[1].open("r+b") as file:
            file.write(bytes(MIB))
        group.lvm("vgreduce --removemissing --force vg")
        with group.paths[1].open("r+b") as file:
            file.write(gone)
        assert [*find_volumes(group.disks())] == ["vg/left"]

    def test_exported(self, group: Rig) -> None:
        group.lvm("vgexport vg")
        assert "EXPORTED" in self.doubt(group.disks(), "vg/left")

    def test_twice(self, group: Rig, tmp_path: Path) -> None:
        (tmp_path / "copy").write_bytes(group.paths[0].read_bytes())
        disks = [*group.disks(), FileDisk(str(tmp_path / "copy"))]
        assert "is there twice" in self.doubt(disks, "vg/left")
        (tmp_path / "spare").write_bytes(group.paths[2].read_bytes())
        with pytest.raises(Uncertain, match="twice"):  # whose volumes might be anything
            find_volumes([*group.disks(), FileDisk(str(tmp_path / "spare"))])

    def test_cut_off(self, group: Rig) -> None:
        with group.paths[0].open("r+b") as file:
            file.truncate(3 * MIB + 512)
        disks = group.disks()
        assert (
            content(find_volumes(disks)["vg/left"].open()) == group.expected()["vg/left"][: 2 * MIB]
        )
        assert "smaller than what is used" in self.doubt(disks, "vg/both")

    def test_same_name(self, group: Rig, rig: Rig) -> None:
        lvm = HostLvm(group.paths[0].parent / "other", [rig.devices[2]])
        lvm(f"vgcreate vg {rig.devices[2]}")
        lvm("lvcreate -y -l 1 -n other vg")
        for name in "vg/left", "vg/other":
            assert "several volume groups are vg" in self.doubt(group.disks(), name)

    def test_member_of_raid(self, group: Rig) -> None:
        """The label is the array's, not that of its member."""
        with group.paths[0].open("r+b") as file:
            file.seek(SIZE - 65536)
            file.write(struct.pack("<I", 0xA92B4EFC))
        assert "pv0 of vg is missing" in self.doubt(group.disks(), "vg/left")

    @pytest.mark.parametrize("place", ["label", "header", "text"])
    def test_damage(self, group: Rig, place: str) -> None:
        """With wrong checksums they aren't read."""
        with group.paths[0].open("r+b") as file:
            file.seek(4096 + 40)
            (offset,) = struct.unpack("<Q", file.read(8))
            at = {"label": 512 + 40, "header": 4096 + 5, "text": 4096 + offset + 20}[place]
            file.seek(at)
            byte = file.read(1)[0]
            file.seek(at)
            file.write(bytes([byte ^ 1]))
        assert self.doubt(group.disks(), "vg/left")


TABLE = [*range(256)]
for _ in range(8):
    TABLE = [value >> 1 ^ (0xEDB88320 if value & 1 else 0) for value in TABLE]


def checksum(data: bytes) -> int:
    """LVM's: CRC-32 with another start and without the inversion at the end."""
    crc = 0xF597A6CF
    for byte in data:
        crc = crc >> 8 ^ TABLE[(crc ^ byte) & 0xFF]
    return crc


def with_text(start: bytes, text: bytes) -> bytes:
    """The first bytes of a physical volume with another text, and right checksums."""
    location = struct.pack("<QQII", 1024, len(text), checksum(text), 0)
    header = start[4096 + 4 : 4096 + 40] + location
    header = header.ljust(508, b"\0")
    header = struct.pack("<I", checksum(header)) + header
    return (
        start[:4096] + header + start[4096 + 512 : 4096 + 1024] + text + start[5120 + len(text) :]
    )


def mutate(text: bytes, generator: random.Random) -> bytes:
    """A text that LVM might have to read, and never wrote."""
    choice = generator.randrange(6)
    if choice == 0:  # another number
        numbers = [*re.finditer(rb"\d+", text)]
        match = generator.choice(numbers)
        other = generator.choice((0, 1, 2, 3, 4, 7, 8, 20, 2048, 1 << 31, 1 << 40, 1 << 63, -1))
        return text[: match.start()] + b"%d" % other + text[match.end() :]
    lines = text.split(b"\n")
    one, other = (generator.randrange(len(lines)) for _ in range(2))
    if choice == 1:
        lines[one], lines[other] = lines[other], lines[one]
    elif choice == 2:
        lines[one:one] = lines[other : other + generator.randrange(1, 20)]
    elif choice == 3:
        del lines[one : one + generator.randrange(1, 9)]
    elif choice == 4:  # words of elsewhere
        words = re.findall(rb"[\w-]+", text)
        lines[one] = re.sub(rb"[\w-]+", lambda _: generator.choice(words), lines[one])
    else:
        data = bytearray(text)
        for _ in range(generator.randrange(1, 5)):
            data[generator.randrange(len(data))] = generator.choice(b'{}[]",=# \n\0\xffa0-')
        return bytes(data)
    return b"\n".join(lines)


@pytest.mark.slow
class TestHostile:
    @pytest.fixture
    def start(self, rig: Rig) -> tuple[bytes, bytes]:
        """The first MiB of a physical volume with four volumes, and the text that is there."""
        lvm, a = rig.lvm, rig.devices[0]
        lvm(f"pvcreate -ff -y {a}")
        lvm(f"vgcreate -s 1m vg {a}")
        lvm("lvcreate -y -l 3 -n one vg")
        lvm("lvcreate -y -l 4 -n two vg")
        lvm("lvextend -l +2 vg/one")
        start = rig.paths[0].read_bytes()[:MIB]
        offset, length = struct.unpack_from("<QQ", start, 4096 + 40)
        return start, start[4096 + offset :][:length]

    def volumes(self, disk: SpanDisk) -> dict[str, bytes]:
        """Those that there are without a doubt."""
        try:
            found = find_volumes([disk])
        except Uncertain:
            return {}
        volumes = {}
        for name, volume in found.items():
            with contextlib.suppress(Uncertain):
                opened = volume.open()
                assert opened.size == volume.size <= disk.size
                disk.asked.clear()
                volumes[name] = content(opened) if opened.size else b""
                assert all(offset >= MIB for _, offset, _ in disk.asked)
        return volumes

    def test_texts(self, rig: Rig, start: tuple[bytes, bytes], contents: list[bytes]) -> None:
        """What LVM reads otherwise isn't served."""
        generator = random.Random(9)
        usual = self.volumes(SpanDisk([start[0], contents[0][MIB:]]))
        assert len(usual) == 2 and usual == rig.expected()
        compared = 0
        for _ in range(400):
            text = mutate(start[1], generator)
            head = with_text(start[0], text)
            volumes = self.volumes(SpanDisk([head, contents[0][MIB:]]))
            if not volumes or (volumes == usual and generator.random() < 0.95):
                continue
            compared += 1
            with rig.paths[0].open("r+b") as file:
                file.write(head)
            expected = rig.expected()
            for name, data in volumes.items():
                if expected:  # else LVM finds a fault in what doesn't matter to us
                    assert data == expected.get(name), text.decode(errors="replace")
        assert compared > 10

    def test_labels_and_headers(self, start: tuple[bytes, bytes], contents: list[bytes]) -> None:
        generator = random.Random(10)
        usual = self.volumes(SpanDisk([start[0], contents[0][MIB:]]))
        for number in range(400):
            head = bytearray(start[0])
            at = generator.randrange(512 + 20, 512 + 200) if number % 2 else 4096 + number // 2 % 72
            size = generator.choice((1, 4, 8))
            value = generator.choice(
                (0, 1, 512, MIB, 1 << 31, (1 << 64) - 1, generator.getrandbits(64))
            )
            head[at : at + size] = (value & (1 << 8 * size) - 1).to_bytes(size, "little")
            if number % 7:  # else the checksum is wrong
                head[512 + 16 : 512 + 20] = struct.pack("<I", checksum(head[512 + 20 : 1024]))
                head[4096:4100] = struct.pack("<I", checksum(head[4100:4608]))
            volumes = self.volumes(SpanDisk([bytes(head), contents[0][MIB:]]))
            assert volumes in ({}, usual)

    @pytest.mark.parametrize(
        "text",
        [
            b"a{" * 100_000,
            b"a=[" * 100_000,
            b'"' + b"\\" * 500_000,
            b" \n" * 400_000 + b'"',
            b"# #" * 300_000 + b'"',
            b"a=" + b"9" * 900_000,
            b"".join(b"a%d=1\n" % number for number in range(90_000)),
        ],
        ids=lambda text: text[:4].decode(),
    )
    def test_endless_texts(self, text: bytes) -> None:
        with pytest.raises(Error):
            read_group(text)


class TestLayer:
    def test_names(self, nbdtool: Callable[..., Any], rig: Rig, tmp_path: Path) -> None:
        lvm, a = rig.lvm, rig.devices[0]
        lvm(f"pvcreate -ff -y {a}")
        lvm(f"vgcreate v-g {a}")
        lvm("lvcreate -y -l 3 -n l-v v-g")
        expected = rig.expected()["v-g/l-v"]
        for name in "v-g/l-v", "/dev/v-g/l-v", "/dev/mapper/v--g-l--v":
            nbdtool("file", rig.paths[0], "--lv", name, "--to-file", tmp_path / "out", status=0)
            assert (tmp_path / "out").read_bytes() == expected
            (tmp_path / "out").unlink()
        done = nbdtool("file", rig.paths[0], "--lv", "v-g/no", "--to-file", tmp_path / "out")
        assert done.returncode == 1 and not (tmp_path / "out").exists()
        assert done.stderr == (
            f"nbdtool: error: {rig.paths[0]}: no logical volume 'v-g/no'; there is v-g/l-v\n"
        )
        done = nbdtool("file", rig.paths[1], "--lv", "x/y", "--to-file", tmp_path / "out", status=1)
        assert "there is none at all" in done.stderr

    def test_on_a_partition(
        self, nbdtool: Callable[..., Any], partition: Callable[..., Any], tmp_path: Path
    ) -> None:
        image = tmp_path / "image"
        image.write_bytes(random.Random(5).randbytes(40 * MIB))
        run("sfdisk", "-q", "-w", "always", image, input="label: gpt\nsize=4MiB\nsize=30MiB\n")
        with loop_device(image, *partition(image, 2)) as device:
            lvm = HostLvm(tmp_path / "lvm", [device])
            lvm(f"pvcreate -ff -y {device}")
            lvm(f"vgcreate vg {device}")
            lvm("lvcreate -y -l 2 -n lv vg")
        start = partition(image, 2)[0] + MIB
        for layers in ["--lv", "vg/lv"], ["--partition", "2", "--lv", "vg/lv"]:
            nbdtool("file", image, *layers, "--to-file", tmp_path / "out", status=0)
            data = (tmp_path / "out").read_bytes()
            assert data == image.read_bytes()[start : start + 8 * MIB]
            (tmp_path / "out").unlink()

    def test_closes_the_disk_once(self, rig: Rig) -> None:
        lvm, a = rig.lvm, rig.devices[0]
        lvm(f"pvcreate -ff -y {a}")
        lvm(f"vgcreate vg {a}")
        lvm("lvcreate -y -l 2 -n lv vg")
        disk, closed = rig.disks()[0], []
        disk.close = lambda: closed.append(1)  # type: ignore[method-assign]
        lv.open(disk, "vg/lv", argparse.Namespace()).close()
        assert closed == [1]


class TestStriped:
    @pytest.mark.parametrize("legs, chunk", [(2, 4096), (3, 512), (5, 65536)])
    def test_random_ranges(self, tmp_path: Path, legs: int, chunk: int) -> None:
        generator = random.Random(legs)
        disks = [mixed_disk(tmp_path, seed) for seed in range(legs)]
        share = min(disk.size for disk in disks) // chunk * chunk - chunk
        starts = [generator.randrange(chunk) for _ in disks]
        rows = range(0, share, chunk)
        whole = b"".join(
            data[start + row : start + row + chunk]
            for contents in [[(disk.content(), start) for disk, start in zip(disks, starts)]]
            for row in rows
            for data, start in contents
        )
        striped = Striped([*zip(disks, starts)], chunk, len(whole))
        assert content(striped) == whole
        at = 0
        states = bytearray()
        for extent in striped.extents(0, striped.size):
            states += bytes([extent.state]) * extent.length
            assert not extent.state or not any(whole[at : at + extent.length])
            at += extent.length
        assert at == striped.size and any(states)
        for _ in range(60):
            offset = generator.randrange(striped.size)
            length = generator.randrange(1, min(striped.size - offset, 100_000) + 1)
            assert read_bytes(striped, offset, length) == whole[offset : offset + length]
            found = list(striped.extents(offset, length))
            told = b"".join(bytes([extent.state]) * extent.length for extent in found)
            assert told == states[offset:][:length]

    def test_extents_of_much(self) -> None:
        """A terabyte that is one hole isn't walked chunk by chunk."""
        size = 1 << 40
        disks = [SpanDisk([ZeroSpan(size), b"x" * 4096]) for _ in range(2)]
        striped = Striped([(disk, 0) for disk in disks], 4096, 2 * size + 8192)
        assert [extent.length for extent in striped.extents(0, striped.size)] == [2 * size, 8192]
