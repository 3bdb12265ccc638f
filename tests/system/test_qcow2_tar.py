"""The layers qcow2 and tar in whole runs: served to real clients, and written to files."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import nbd
import pytest

MIB = 1 << 20
SIZE = 24 * MIB
START = MIB  # of the partition


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory, run: Any, random_file: Any) -> Path:
    """A disk with one partition, in which there is a filesystem with two files."""
    top = tmp_path_factory.mktemp("raw")
    (top / "tree").mkdir()
    random_file(top / "tree" / "random", 3 * MIB)
    (top / "tree" / "text").write_text("compressible " * 300_000)
    path: Path = top / "raw"
    with path.open("wb") as file:
        file.truncate(SIZE)
    run("sfdisk", "-q", path, input=f"label: gpt\nstart={START // 512}, type=linux\n")
    run("mke2fs", "-q", "-t", "ext4", "-d", top / "tree", "-E", f"offset={START}", path, "20M")
    return path


IMAGES = {
    "plain": [],
    "zlib": ["-c"],
    "zstd": ["-c", "-o", "compression_type=zstd"],
    "small clusters": ["-o", "cluster_size=512"],
    "extended": ["-o", "extended_l2=on"],
}


@pytest.fixture(scope="module", params=IMAGES)
def image(raw: Path, tmp_path_factory: pytest.TempPathFactory, run: Any, request: Any) -> Path:
    path: Path = tmp_path_factory.mktemp("image") / "image.qcow2"
    run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", *IMAGES[request.param], raw, path)
    return path


@pytest.fixture(scope="module")
def layer(raw: Path, tmp_path_factory: pytest.TempPathFactory, run: Any) -> Path:
    """A layer of a container image, as containerDisks are: a qcow2 image in a tar archive."""
    top = tmp_path_factory.mktemp("layer")
    (top / "disk").mkdir()
    image = top / "disk" / "downloaded"
    run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", "-c", raw, image)
    run("tar", "-cf", top / "layer.tar", "./disk", cwd=top)
    return top / "layer.tar"


class TestQcow2:
    def test_over_nbd(self, image: Path, raw: Path, serve: Any, run: Any, tmp_path: Path) -> None:
        with serve("file", image, "--qcow2", "-r") as server:
            run("qemu-img", "compare", "-f", "raw", "-F", "raw", server.uri, raw)
            run("nbdcopy", "--connections=4", server.uri, tmp_path / "copy")
            info = json.loads(run("nbdinfo", "--json", server.uri))["exports"][0]
            assert info["export-size"] == SIZE and info["is_read_only"]
            assert info["can_multi_conn"]
            assert f"{image} (qcow2)" in server.log()
            holes = json.loads(run("nbdinfo", "--map=base:allocation", "--json", server.uri))
            assert sum(entry["length"] for entry in holes if entry["type"] == 3) > 12 * MIB
        assert (tmp_path / "copy").read_bytes() == raw.read_bytes()

    def test_random_reads_in_flight(self, image: Path, raw: Path, serve: Any) -> None:
        data = raw.read_bytes()
        generator = random.Random(5)
        with serve("file", image, "--qcow2", "-r") as server:
            client = nbd.NBD()
            client.connect_uri(server.uri)
            waiting: list[tuple[int, Any, int]] = []
            for n in range(500):
                offset = generator.randrange(SIZE)
                length = min(generator.choice([1, 512, 4096, 70000, MIB]), SIZE - offset)
                buffer = nbd.Buffer(length)
                waiting.append((client.aio_pread(buffer, offset), buffer, offset))
                while len(waiting) > 16 or (waiting and n == 499):
                    cookie, buffer, offset = waiting.pop(0)
                    while not client.aio_command_completed(cookie):
                        client.poll(-1)
                    got = bytes(buffer.to_bytearray())
                    assert got == data[offset : offset + len(got)]
            client.shutdown()

    def test_to_file(self, image: Path, raw: Path, nbdtool: Any, tmp_path: Path) -> None:
        nbdtool("file", image, "--qcow2", "--to-file", tmp_path / "out", status=0)
        assert (tmp_path / "out").read_bytes() == raw.read_bytes()
        assert (tmp_path / "out").stat().st_blocks * 512 < 14 * MIB

    def test_a_snapshot(self, tmp_path: Path, raw: Path, nbdtool: Any, run: Any) -> None:
        image = tmp_path / "image"
        run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", raw, image)
        run("qemu-img", "snapshot", "-c", "before", image)
        run("qemu-io", "-f", "qcow2", "-c", "write -P 9 0 9M", image)
        words = ["qcow2-snapshot=before", "--to-file", tmp_path / "out"]
        nbdtool("file", image, "--qcow2", *words, status=0)
        assert (tmp_path / "out").read_bytes() == raw.read_bytes()
        told = nbdtool("file", image, "--qcow2", "--qcow2-snapshot=x", status=1).stderr
        assert told.startswith("nbdtool: error: ") and "it has before (ID 1)" in told

    def test_a_backing_file(self, tmp_path: Path, raw: Path, nbdtool: Any, run: Any) -> None:
        image = tmp_path / "image"
        run("qemu-img", "create", "-q", "-f", "qcow2", "-b", raw, "-F", "raw", image)
        run("qemu-io", "-f", "qcow2", "-c", "write -P 9 2M 64k", image)
        target = tmp_path / "out"
        told = nbdtool("file", image, "--qcow2", "--to-file", target, status=1).stderr
        assert str(raw) in told and "--backing" in told and not target.exists()
        nbdtool("file", image, "--qcow2", "--backing", raw, "--to-file", target, status=0)
        run("qemu-img", "compare", "-f", "raw", "-F", "qcow2", target, image)

    def test_a_failure_while_it_is_served(self, tmp_path: Path, serve: Any, run: Any) -> None:
        """Damage that is met late is an error with a text, and the server lives on."""
        image = tmp_path / "image"
        run("qemu-img", "create", "-q", "-f", "qcow2", image, "8M")
        run("qemu-io", "-f", "qcow2", "-c", "write -P 9 0 64k", "-c", "write -P 9 4M 64k", image)
        with image.open("r+b") as file:
            file.truncate(image.stat().st_size - 65536)
        with serve("file", image, "--qcow2", "-r") as server:
            client = nbd.NBD()
            client.connect_uri(server.uri)
            with pytest.raises(nbd.Error) as caught:
                client.pread(4096, 4 * MIB)
            assert caught.value.errno == "EIO"
            assert bytes(client.pread(4, 0)) == b"\x09" * 4
            client.shutdown()
            assert "the qcow2 image is damaged: a cluster lies outside" in server.log()

    def test_what_is_none(self, raw: Path, nbdtool: Any) -> None:
        told = nbdtool("file", raw, "--qcow2", status=1).stderr
        assert told.startswith(f"nbdtool: error: {raw}: not a qcow2 image")
        assert told.count("\n") == 1


class TestStack:
    FILTERS = ("--filter=qcow2dec", "--filter=tar", "tar-entry=./disk/downloaded")

    def test_as_nbdkit_spells_it(self, layer: Path, raw: Path, serve: Any, run: Any) -> None:
        with serve("file", layer, *self.FILTERS, "-r") as server:
            run("qemu-img", "compare", "-f", "raw", "-F", "raw", server.uri, raw)
            assert "content: DOS/MBR boot sector" in run("nbdinfo", "--content", server.uri)

    def test_as_we_spell_it(
        self, layer: Path, raw: Path, nbdtool: Any, tmp_path: Path, e2fsck: Any
    ) -> None:
        words = ["--tar-entry=disk/*", "--qcow2", "--partition=1"]
        nbdtool("file", layer, *words, "--to-file", tmp_path / "out", status=0)
        got = (tmp_path / "out").read_bytes()
        assert got == raw.read_bytes()[START : START + len(got)]
        e2fsck(tmp_path / "out")

    def test_the_order_matters(self, layer: Path, nbdtool: Any) -> None:
        told = nbdtool("file", layer, "--qcow2", "--tar-entry=disk/downloaded", status=1).stderr
        assert "not a qcow2 image" in told

    def test_without_its_file(self, layer: Path, nbdtool: Any) -> None:
        told = nbdtool("file", layer, "--tar-entry=disk/download", status=1).stderr
        assert told == (
            f"nbdtool: error: {layer}: there is no disk/download; the nearest: ./disk/downloaded\n"
        )

    def test_a_raw_disk_in_a_sparse_archive(
        self, raw: Path, tmp_path: Path, serve: Any, run: Any
    ) -> None:
        run("tar", "-Scf", tmp_path / "a.tar", "-C", raw.parent, raw.name)
        with serve("file", tmp_path / "a.tar", "--tar-entry=raw", "-r") as server:
            run("qemu-img", "compare", "-f", "raw", "-F", "raw", server.uri, raw)
            holes = json.loads(run("nbdinfo", "--map", "--json", server.uri))
            assert sum(entry["length"] for entry in holes if entry["type"] == 3) > 12 * MIB

    def test_a_truncated_archive_is_refused(
        self, layer: Path, tmp_path: Path, nbdtool: Any
    ) -> None:
        path = tmp_path / "cut.tar"
        path.write_bytes(layer.read_bytes()[:MIB])
        told = nbdtool("file", path, *self.FILTERS, status=1).stderr
        assert "cut off in './disk/downloaded'" in told and told.count("\n") == 1
