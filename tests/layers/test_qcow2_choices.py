"""Which qcow2 images are read: snapshots, backing files, and what is refused."""

from __future__ import annotations

import argparse
import json
import random
import struct
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from nbdtool import zstd
from nbdtool.disk import (
    read_bytes,
)
from nbdtool.disks.file import FileDisk
from nbdtool.errors import Error, UsageError
from nbdtool.layers import qcow2
from nbdtool.layers.qcow2.header import read_header
from nbdtool.layers.qcow2.image import Qcow2

KIB, MIB = 1 << 10, 1 << 20


def ranges(generator: random.Random, size: int, count: int) -> Iterator[tuple[int, int]]:
    for _ in range(count):
        offset = generator.randrange(size)
        longest = generator.choice([9, 5000, 200000, size])
        yield offset, min(generator.randint(1, longest), size - offset)


def zero_map(extents: Iterable[tuple[int, bool]]) -> bytes:
    """A byte for each sector: whether it is known to read as zeroes."""
    return b"".join(bytes([zero]) * (length // 512) for length, zero in extents)


class TestSnapshots:
    @pytest.fixture
    def image(self, tmp_path: Path, create: Any, write: Any, run: Any) -> Path:
        path: Path = create(tmp_path / "i", MIB, "", "write -P 1 0 64k")
        run("qemu-img", "snapshot", "-c", "one", path)
        write(path, "write -P 2 0 32k")
        run("qemu-img", "snapshot", "-c", "two", path)
        run("qemu-img", "snapshot", "-c", "1", path)
        write(path, "write -P 3 0 16k")
        run("qemu-img", "resize", "-q", path, "2M")
        return path

    @pytest.mark.parametrize(
        "name, byte, size",
        [("", 3, 2 * MIB), ("one", 1, MIB), ("two", 2, MIB), ("2", 2, MIB), ("1", 2, MIB)],
    )
    def test_by_name_or_id(self, image: Path, name: str, byte: int, size: int) -> None:
        """The name comes first; each has the size that the disk had then."""
        disk = Qcow2(FileDisk(str(image)), snapshot=name)
        assert disk.size == size
        assert read_bytes(disk, 0, 1) == bytes([byte])
        assert name in disk.description

    def test_a_missing_one(self, image: Path) -> None:
        with pytest.raises(Error, match=r"has no snapshot 'x'; it has one \(ID 1\), two \(ID 2\)"):
            Qcow2(FileDisk(str(image)), snapshot="x")

    def test_of_one_name(self, image: Path, run: Any) -> None:
        run("qemu-img", "snapshot", "-c", "three", image)
        data = image.read_bytes().replace(b"three", b"two\0\0").replace(b"4two\0\0", b"4twooo")
        at = int.from_bytes(data[64:72], "big")
        table = bytearray(data)
        for _ in range(3):  # to the fourth: its name becomes that of the second
            extra = int.from_bytes(table[at + 36 : at + 40], "big")
            lengths = struct.unpack(">HH", table[at + 12 : at + 16])
            at += -(-(40 + extra + sum(lengths)) // 8) * 8
        extra = int.from_bytes(table[at + 36 : at + 40], "big")
        table[at + 14 : at + 16] = struct.pack(">H", 3)
        assert table[at + 40 + extra : at + 44 + extra] == b"4two"
        image.write_bytes(table)
        with pytest.raises(Error, match="several snapshots 'two'; choose by ID: 2, 4"):
            Qcow2(FileDisk(str(image)), snapshot="two")


def parsed(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    qcow2.add_arguments(parser)
    return parser.parse_args(words)


class TestBackingFiles:
    @pytest.fixture(params=["extended_l2=on", "cluster_size=4k"])
    def chain(self, tmp_path: Path, write: Any, run: Any, request: Any) -> list[str]:
        """A raw disk, shorter than the two images over it."""
        base = tmp_path / "base.raw"
        base.write_bytes(b"base" * 50000)
        paths = [str(base)]
        for name, form in ("middle", "raw"), ("top", "qcow2"):
            path = tmp_path / name
            words = ["-b", paths[-1], "-F", form, path, "500k"]
            run("qemu-img", "create", "-q", "-f", "qcow2", "-o", request.param, *words)
            paths.append(str(path))
        write(Path(paths[1]), "write -P 1 64k 10k", "write -z 100k 10k", "write -P 1 300k 2k")
        write(Path(paths[2]), "write -P 2 66k 2k", "write -z 150k 4k", "write -P 2 400k 2k")
        return paths

    def test_are_opened_when_named(self, chain: list[str], raw: Any, run: Any) -> None:
        base, middle, top = chain
        disk = qcow2.open(FileDisk(top), True, parsed("--backing", middle, "--backing", base))
        data = raw(Path(top))
        assert read_bytes(disk, 0, disk.size) == data
        generator = random.Random(3)
        for offset, length in ranges(generator, disk.size, 100):
            disk.prefetch([(offset, length)])
            assert read_bytes(disk, offset, length) == data[offset : offset + length]
        theirs = json.loads(run("qemu-img", "map", "--output=json", "-f", "qcow2", top))
        ours = [(length, bool(state & 2)) for length, state in disk.extents(0, disk.size)]
        for zero, expected in zip(
            zero_map(ours), zero_map((entry["length"], entry["zero"]) for entry in theirs)
        ):
            # qemu doesn't tell that what lies beyond the end of the base is zeroes.
            assert zero >= expected

    def test_are_not_opened_because_an_image_says_so(self, chain: list[str]) -> None:
        _, middle, top = chain
        with pytest.raises(Error, match=r"has the backing file .*middle.*; give it .*--backing"):
            qcow2.open(FileDisk(top), True, parsed())
        with pytest.raises(Error, match=r"has the backing file .*base\.raw"):
            qcow2.open(FileDisk(top), True, parsed("--backing", middle))

    def test_that_are_too_many(self, chain: list[str]) -> None:
        base, middle, top = chain
        args = parsed("--backing", middle, "--backing", base, "--backing", base)
        with pytest.raises(UsageError, match=r"base\.raw: there is no image left"):
            qcow2.open(FileDisk(top), True, args)

    def test_that_are_not_there(self, chain: list[str]) -> None:
        with pytest.raises(Error, match="nowhere"):
            qcow2.open(FileDisk(chain[2]), True, parsed("--backing", "/nowhere"))

    def test_that_an_image_has_not(self, tmp_path: Path, create: Any) -> None:
        path = create(tmp_path / "i", MIB)
        with pytest.raises(Error, match="has no backing file"):
            Qcow2(FileDisk(str(path)), backing=FileDisk(str(path)))

    def test_of_another_format_than_said(self, chain: list[str]) -> None:
        """A raw base stays raw although a guest wrote a qcow2 header into it."""
        base, middle, _ = chain
        header = Path(middle).read_bytes()[:4096]
        with Path(base).open("r+b") as file:
            file.write(header)
        disk = qcow2.open(FileDisk(middle), True, parsed("--backing", base))
        assert read_bytes(disk, 0, 4096) == header

    def test_of_no_said_format(self, chain: list[str]) -> None:
        base, middle, top = chain
        for path in middle, top:
            data = Path(path).read_bytes()
            Path(path).write_bytes(data.replace(struct.pack(">I", 0xE2792ACA), b"none", 1))
        assert not read_header(FileDisk(top)).backing_format
        two = ["--backing", middle, "--backing", base]
        with pytest.raises(Error, match=r"looks like qcow2.*add --backing-format"):
            qcow2.open(FileDisk(top), True, parsed(*two))
        assert qcow2.open(FileDisk(middle), True, parsed("--backing", base)).size == 500 * KIB
        args = parsed("--backing", middle, "--backing-format", "raw")
        disk = qcow2.open(FileDisk(top), True, args)
        assert read_bytes(disk, 0, 4) == b"QFI\xfb"


class TestPolicy:
    def change(self, path: Path, bit: int) -> None:
        with path.open("r+b") as file:
            file.seek(72)
            features = int.from_bytes(file.read(8), "big") | bit
            file.seek(72)
            file.write(features.to_bytes(8, "big"))

    def test_dirty(self, tmp_path: Path, create: Any, capsys: Any) -> None:
        path = create(tmp_path / "i", MIB, "lazy_refcounts=on", "write -P 9 0 64k")
        self.change(path, 1)
        assert read_bytes(Qcow2(FileDisk(str(path))), 0, 9) == b"\x09" * 9
        assert "warning" in (told := capsys.readouterr().err) and "dirty" in told

    def test_corrupt(self, tmp_path: Path, create: Any) -> None:
        path = create(tmp_path / "i", MIB, "", "write -P 9 0 64k")
        self.change(path, 2)
        with pytest.raises(Error, match=r"marked corrupt.*--allow-corrupt"):
            qcow2.open(FileDisk(str(path)), True, parsed())
        disk = qcow2.open(FileDisk(str(path)), True, parsed("--allow-corrupt"))
        assert read_bytes(disk, 0, 9) == b"\x09" * 9

    def test_an_external_data_file(self, tmp_path: Path, run: Any) -> None:
        secret, path = tmp_path / "secret", tmp_path / "i"
        options = f"data_file={secret},data_file_raw=on"
        run("qemu-img", "create", "-q", "-f", "qcow2", "-o", options, path, "1M")
        header = read_header(FileDisk(str(path)))
        assert header.external_data and header.data_file == str(secret)
        with pytest.raises(Error, match=r"data is in another file .*secret"):
            Qcow2(FileDisk(str(path)))

    @pytest.mark.parametrize("how", ["aes", "luks"])
    def test_encryption(self, tmp_path: Path, run: Any, how: str) -> None:
        path = tmp_path / "i"
        options = f"encrypt.format={how},encrypt.key-secret=s"
        options += ",encrypt.iter-time=10" if how == "luks" else ""
        secret = ["--object", "secret,id=s,data=abc123"]
        run("qemu-img", "create", "-q", *secret, "-f", "qcow2", "-o", options, path, "1M")
        with pytest.raises(Error, match=f"is encrypted .{how.upper()}."):
            Qcow2(FileDisk(str(path)))

    def test_an_unknown_feature(self, tmp_path: Path, create: Any) -> None:
        """It is called by the name that the image gives it, or by its number."""
        path = create(tmp_path / "i", MIB)
        self.change(path, 1 << 60)
        with pytest.raises(Error, match="feature bit 60"):
            read_header(FileDisk(str(path)))
        data = path.read_bytes()
        at = data.index(struct.pack(">I", 0x6803F857)) + 8
        path.write_bytes(data[:at] + b"\0\x3cteleportation".ljust(48, b"\0") + data[at + 48 :])
        with pytest.raises(Error, match="teleportation"):
            read_header(FileDisk(str(path)))

    def test_zstd_without_a_decompressor(
        self, tmp_path: Path, create: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path = create(tmp_path / "i", MIB, "compression_type=zstd")

        def find() -> None:
            raise Error("it is compressed with zstd; install one")

        monkeypatch.setattr(zstd, "_find", find)
        with pytest.raises(Error, match="i: it is compressed with zstd; install"):
            Qcow2(FileDisk(str(path)))

    def test_what_is_not_qcow2(self, tmp_path: Path) -> None:
        for data in b"", b"QFI", b"x" * 1000, b"QFI\xfb\0\0\0\1" + bytes(500):
            (tmp_path / "i").write_bytes(data)
            with pytest.raises(Error, match=r"/i: "):
                Qcow2(FileDisk(str(tmp_path / "i")))
