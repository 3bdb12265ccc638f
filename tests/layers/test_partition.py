"""Partitions of tables that sgdisk, sfdisk and parted make, and of damaged ones."""

from __future__ import annotations

import argparse
import random
import struct
import subprocess
import uuid
import zlib
from pathlib import Path
from typing import Any, Callable

import pytest

from nbdtool import gpt
from nbdtool.disk import read_bytes
from nbdtool.disks.file import FileDisk
from nbdtool.errors import Error, UsageError
from nbdtool.layers import partition
from tests.span_disk import SpanDisk

MIB = 1 << 20
SIZE = 64 * MIB

SFDISK_GPT = """label: gpt
size=3MiB, type=L, name="first one"
start=10MiB, size=5MiB, type=U, name="ESP"
size=1MiB, type=S
start=40MiB, type=H, name="été"
"""
SFDISK_DOS = """label: dos
label-id: 0xdeadbeef
size=3MiB, type=L, bootable
size=5MiB, type=S
size=1MiB, type=ef
type=E
size=2MiB, type=L
size=3MiB, type=8e
size=4MiB, type=L
"""
PARTED_GPT = "mklabel gpt mkpart a ext4 1MiB 9MiB mkpart b 9MiB 20MiB mkpart c 20MiB 100%"
PARTED_DOS = (
    "mklabel msdos mkpart primary 1MiB 9MiB mkpart extended 9MiB 60MiB mkpart logical 10MiB 20MiB"
    " mkpart logical 25MiB 30MiB mkpart logical 31MiB 59MiB rm 6 mkpart primary 60MiB 63MiB"
)


def arguments(sector_size: int | None = None) -> argparse.Namespace:
    return argparse.Namespace(sector_size=sector_size)


def window(path: Path, value: str, sector_size: int | None = None) -> Any:
    return partition.open(FileDisk(str(path)), value, arguments(sector_size))


@pytest.fixture(scope="module")
def sectors() -> bytes:
    """A disk that bears the number of each sector."""
    rows = random.Random(1).randbytes(4096)
    return b"".join(
        struct.pack("<Q", number) + rows[number % 3072 :][:504] for number in range(SIZE // 512)
    )


@pytest.fixture
def image(tmp_path: Path, sectors: bytes) -> Path:
    """A disk for a table to be written over."""
    (tmp_path / "image").write_bytes(sectors)
    return tmp_path / "image"


def sfdisk(image: Path, script: str) -> None:
    subprocess.run(["sfdisk", "--quiet", "--wipe=always", image], input=script.encode(), check=True)


def make_sfdisk_gpt(image: Path, device: Path) -> None:
    sfdisk(device, SFDISK_GPT)


def make_sfdisk_dos(image: Path, device: Path) -> None:
    sfdisk(device, SFDISK_DOS)


def make_parted_gpt(image: Path, device: Path) -> None:
    subprocess.run(["parted", "--script", device, *PARTED_GPT.split()], check=True)


def make_parted_dos(image: Path, device: Path) -> None:
    subprocess.run(["parted", "--script", device, *PARTED_DOS.split()], check=True)


def make_sgdisk(image: Path, device: Path) -> None:
    words = [
        "--clear",
        "--resize-table=256",
        "--new=1:0:+3M",
        "--new=7:20M:+1M",
        "--new=128:30M:0",
        "--typecode=7:ef00",
    ]
    words += ["--change-name=128:the last", "--new=255:25M:+1M"]
    subprocess.run(["sgdisk", *words, device], check=True, stdout=subprocess.DEVNULL)


TABLES = [make_sfdisk_gpt, make_sfdisk_dos, make_parted_gpt, make_parted_dos, make_sgdisk]


@pytest.mark.slow
@pytest.mark.parametrize("sector", [512, 4096])
@pytest.mark.parametrize("make", TABLES, ids=lambda make: make.__name__[5:])
def test_as_others_see_it(
    make: Callable[[Path, Path], None],
    sector: int,
    image: Path,
    run: Callable[..., Any],
    loop_device: Callable[..., Any],
) -> None:
    """libblkid tells where the partitions are; the kernel's devices have the same bytes."""
    with loop_device(image, f"--sector-size={sector}") as device:
        make(image, device)
        listed = run("partx", "--raw", "--noheadings", "--output=NR,START,SECTORS,TYPE,"
                     "UUID,NAME", device).splitlines()  # fmt: skip
        hint = sector if "dos" in make.__name__ else None  # an MBR doesn't say
        disk = FileDisk(str(image))
        table = partition.read_table(disk, hint)
        expected = {}
        for line in listed:
            number, start, sectors, kind, identity, name = (line + " ").split(" ", 5)
            if kind not in ("0x5", "0xf"):
                kind = f"{int(kind, 16):02x}" if kind.startswith("0x") else kind
                name = name.strip().replace("\\x20", " ")
                name = name.encode().decode("unicode_escape").encode("latin-1").decode()
                where = int(start) * 512, int(sectors) * 512
                expected[int(number)] = (*where, kind, identity, name)
        assert {number: found[:5] for number, found in table.items()} == expected
        subprocess.run(["partx", "--add", device], stderr=subprocess.DEVNULL, check=False)
        try:
            for number in table:
                mine = partition.open(disk, str(number), arguments(hint))
                theirs = Path(f"{device}p{number}").read_bytes()
                assert mine.size == len(theirs)
                assert read_bytes(mine, 0, mine.size) == theirs
        finally:
            run("partx", "--delete", device)


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory, sectors: bytes) -> Path:
    image = tmp_path_factory.mktemp("choice") / "image"
    image.write_bytes(sectors)
    sfdisk(image, SFDISK_GPT)
    return image


class TestChoice:
    @pytest.mark.parametrize(
        "value, start",
        [
            ("1", 1),
            ("first one", 1),
            ("linux", 1),
            ("0fc63daf-8483-4772-8e79-3d69d8477de4", 1),
            ("ESP", 10),
            ("esp", 10),
            ("C12A7328-F81F-11D2-BA4B-00A0C93EC93B", 10),
            ("swap", 15),
            ("été", 40),
            ("home", 40),
        ],
    )
    def test_by_number_label_or_type(self, table: Path, value: str, start: int) -> None:
        disk = window(table, value)
        (first,) = struct.unpack("<Q", read_bytes(disk, 0, 8))
        assert first * 512 == start * MIB

    def test_by_uuid(self, table: Path) -> None:
        guid = partition.read_table(FileDisk(str(table)))[2].guid
        assert window(table, guid.upper()).size == 5 * MIB

    def test_missing(self, table: Path) -> None:
        with pytest.raises(Error) as error:
            window(table, "9")
        assert str(error.value) == (
            f"{table}: no partition '9'; there is 1 (linux-generic, 'first one', 3.0 MiB),"
            " 2 (esp, 'ESP', 5.0 MiB), 3 (swap, 1.0 MiB), 4 (home, 'été', 23.0 MiB)"
        )

    def test_ambiguous(self, image: Path) -> None:
        sfdisk(image, "label: gpt\nsize=1MiB, name=x\nsize=2MiB, name=x\n")
        for value in "x", "linux":
            with pytest.raises(Error, match=rf"several partitions are '{value}': 1 .* 2 "):
                window(image, value)

    def test_of_an_mbr(self, image: Path) -> None:
        sfdisk(image, SFDISK_DOS)
        assert window(image, "esp").size == MIB
        assert window(image, "lvm").size == 3 * MIB
        assert window(image, "DEADBEEF-05").size == 2 * MIB
        with pytest.raises(Error, match=r"no partition '4'; there is 1 .*, 5 .*, 6 .*, 7 "):
            window(image, "4")

    @pytest.mark.parametrize("value", ["", "0", "-1", "+1", "1.0", "linux-x"])
    def test_nonsense(self, table: Path, value: str) -> None:
        with pytest.raises(Error, match="no partition"):
            window(table, value)


class TestDamage:
    @pytest.fixture
    def table(self, tmp_path: Path) -> Path:
        image = tmp_path / "image"
        with image.open("wb") as file:
            file.truncate(SIZE)
        sfdisk(image, SFDISK_GPT)
        return image

    def patch(self, path: Path, *changes: tuple[int, bytes]) -> Path:
        with path.open("r+b") as file:
            for offset, data in changes:
                file.seek(offset, 2 if offset < 0 else 0)
                file.write(data)
        return path

    @pytest.mark.parametrize("where", [512, 512 + 16, 512 + 40, 1024 + 32, 1024 + 128 * 100])
    def test_backup_is_used_with_a_warning(
        self, table: Path, where: int, capsys: pytest.CaptureFixture[str]
    ) -> None:
        before = partition.read_table(FileDisk(str(table)))
        self.patch(table, (where, b"\xfe"))
        assert partition.read_table(FileDisk(str(table))) == before
        stderr = capsys.readouterr().err
        assert stderr.startswith(f"nbdtool: warning: {table}: ")
        assert stderr.endswith("; the backup at its end is used\n")

    def test_both_are_damaged(self, table: Path) -> None:
        self.patch(table, (512 + 16, b"\xfe"), (-512 + 16, b"\xfe"))
        with pytest.raises(Error, match=r"wrong checksum of its header .and in the backup: "):
            window(table, "1")

    def test_cut_off(self, table: Path) -> None:
        """What is still there is served, and what isn't is refused."""
        with table.open("r+b") as file:
            file.truncate(30 * MIB)
        assert window(table, "1").size == 3 * MIB
        with pytest.raises(Error, match=r"partition 4 ends at byte \d+, the disk at 31457280"):
            window(table, "4")

    def test_no_table(self, tmp_path: Path) -> None:
        for content in b"", b"x", bytes(4096), b"\xff" * 8192:
            (tmp_path / "image").write_bytes(content)
            with pytest.raises(Error, match="no partition table"):
                window(tmp_path / "image", "1")

    def test_filesystem_is_no_table(self, run: Callable[..., Any], tmp_path: Path) -> None:
        boot_sector = b"\xeb\x3c\x90MSDOS5.0".ljust(446, b"\x0f") + b"\x29" * 64 + b"\x55\xaa"
        (tmp_path / "image").write_bytes(boot_sector.ljust(MIB, b"\0"))
        with pytest.raises(Error, match="no partition table"):
            window(tmp_path / "image", "1")

    def test_relic_of_a_guid_table(self, table: Path) -> None:
        """A new MBR over an old GPT: the MBR is right."""
        entry = struct.pack("<B3xB3xII", 0x80, 0x83, 4096, 2048)
        self.patch(table, (446, entry + bytes(48) + b"\x55\xaa"))
        assert window(table, "1").size == MIB

    def test_protective_mbr_without_its_table(self, table: Path) -> None:
        self.patch(table, (512, bytes(512)), (-512, bytes(512)))
        with pytest.raises(Error, match="no GUID partition table"):
            window(table, "1")

    @pytest.mark.parametrize(
        "change, reason",
        [
            ({"size": 96}, "unusual"),
            ({"size": 129}, "unusual"),
            ({"size": 384}, "unusual"),
            ({"size": 1 << 31}, "unusual"),
            ({"count": 1 << 31}, "unusual"),
            ({"table": 1 << 63}, "outside the disk"),
            ({"table": 0}, "outside the disk"),
            ({"length": 91}, "bad header"),
            ({"length": 513}, "bad header"),
            ({"this": 5}, "bad header"),
            ({"first": 0}, "ends before it begins"),
            ({"first": 5000, "last": 4999}, "ends before it begins"),
        ],
    )
    def test_hostile_guid_table(self, tmp_path: Path, change: dict[str, int], reason: str) -> None:
        fields = {"first": 2048, "last": 4095, "size": 128, "count": 128, "table": 2, "length": 92}
        fields |= {"this": 1, **change}
        linux = uuid.UUID(gpt.TYPES["linux"]).bytes_le
        entries = struct.pack("<16s16sQQQ72s", linux, b"i" * 16, fields["first"], fields["last"],
                              0, b"").ljust(128 * 128, b"\0")  # fmt: skip
        header = struct.pack("<8sIIIIQQQQ16sQIII", b"EFI PART", 0x10000, fields["length"], 0, 0,
                             fields["this"], 8191, 34, 8000, b"d" * 16, fields["table"],
                             fields["count"], fields["size"], zlib.crc32(entries))  # fmt: skip
        sum_ = zlib.crc32(header.ljust(512, b"\0")[: fields["length"]])
        header = header[:16] + struct.pack("<I", sum_) + header[20:]
        mbr = bytes(446) + struct.pack("<B3xB3xII", 0, 0xEE, 1, 8191) + bytes(48) + b"\x55\xaa"
        (tmp_path / "image").write_bytes((mbr + header.ljust(512, b"\0") + entries).ljust(4 * MIB))
        with pytest.raises(Error, match=reason):
            window(tmp_path / "image", "1")


class TestLogical:
    """Chains of extended boot records."""

    def image(self, path: Path, tables: dict[int, list[tuple[int, int, int]]]) -> Path:
        with path.open("wb") as file:
            file.truncate(SIZE)
            for sector, entries in tables.items():
                packed = b"".join(struct.pack("<B3xB3xII", 0, *entry) for entry in entries)
                file.seek(sector * 512 + 446)
                file.write(packed.ljust(64, b"\0") + b"\x55\xaa")
        return path

    def test_chain(self, tmp_path: Path) -> None:
        tables = {
            0: [(0x05, 100, 5000), (0x83, 6000, 10)],
            100: [(0x83, 1, 20), (0x05, 200, 30)],
            300: [(0, 0, 0), (0x0F, 1000, 30)],  # empty, as Linux allows
            1100: [(0x05, 50, 10), (0x82, 3, 40)],
            150: [(0x83, 7, 8)],
        }
        found = partition.read_table(FileDisk(str(self.image(tmp_path / "image", tables))))
        assert {number: (p.start // 512, p.length // 512) for number, p in found.items()} == {
            2: (6000, 10),
            5: (101, 20),
            6: (1103, 40),
            7: (157, 8),
        }

    @pytest.mark.parametrize(
        "tables, reason",
        [
            ({0: [(5, 100, 50)], 100: [(0x83, 1, 1), (5, 0, 1)]}, "loop"),
            ({0: [(5, 100, 50)], 100: [(5, 9, 1)], 109: [(5, 0, 1)]}, "loop"),
            ({0: [(5, 0, 50)]}, "loop"),
            ({0: [(5, 100, 50)], 100: [(5, 9, 1)]}, "sector 109, where none"),
            ({0: [(5, 0xFFFFFFFF, 50)]}, "sector 4294967295, where none"),
            (
                {0: [(5, 1, 50)], **{n: [(0x83, 1, 1), (5, n, 1)] for n in range(1, 400)}},
                "loop|more than 256",
            ),
        ],
    )
    def test_hostile_chain(
        self, tmp_path: Path, tables: dict[int, list[tuple[int, int, int]]], reason: str
    ) -> None:
        with pytest.raises(Error, match=reason):
            window(self.image(tmp_path / "image", tables), "5")

    def test_past_the_end(self, tmp_path: Path) -> None:
        path = self.image(tmp_path / "image", {0: [(0x83, 1, 0xFFFFFFFF), (0x83, 1, 10)]})
        with pytest.raises(Error, match="partition 1 ends at byte"):
            window(path, "1")
        assert window(path, "2").size == 5120


def test_random_damage(image: Path) -> None:
    """Whatever a table says, it is an Error or a window inside the disk."""
    generator = random.Random(5)
    for script in SFDISK_GPT, SFDISK_DOS:
        sfdisk(image, script)
        content = image.read_bytes()
        head, rest = content[:4096], content[4096:]
        for _ in range(300):
            damaged = bytearray(head)
            for _ in range(generator.randrange(1, 6)):
                at = generator.choice((0, 446, 512, 1024)) + generator.randrange(66)
                damaged[at] = generator.randrange(256)
            disk = SpanDisk([bytes(damaged), rest])
            for number in "1", "5":
                try:
                    found = partition.open(disk, number, arguments())
                except Error:
                    continue
                assert len(read_bytes(found, found.size - 1, 1)) == 1


def test_sector_size_is_one_of_two(image: Path) -> None:
    with pytest.raises(UsageError, match="512 or 4K"):
        window(image, "1", 2048)


def test_window_can_do_what_the_disk_can(image: Path) -> None:
    sfdisk(image, SFDISK_GPT)
    disk = partition.open(FileDisk(str(image), writable=True), "2", arguments())
    assert disk.writable and disk.can_trim
    disk.write(5, memoryview(b"hello"))
    disk.zero(1 << 20, 1 << 20, punch=True, fast=True)
    content = image.read_bytes()
    assert content[10 * MIB + 5 : 10 * MIB + 10] == b"hello"
    assert content[11 * MIB : 12 * MIB] == bytes(MIB)
    assert [extent[0] for extent in disk.extents(0, disk.size)] == [MIB, MIB, 3 * MIB]
