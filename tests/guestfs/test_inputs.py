"""Which drives are opened, in which format, and what is refused."""

from __future__ import annotations

import os
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nbdtool.commands.guestfs.inputs import Drive, Image, find_drives
from nbdtool.errors import Error, UsageError
from tests.libvirt import conftest
from tests.libvirt.rig import Rig, backing, disk

MIB = 1 << 20
rig = conftest.rig


def find(
    *given: tuple[Path, str] | Path,
    domain: str = "",
    rig: Rig | None = None,
    writable: bool = False,
    allow_live: bool = False,
) -> list[Drive]:
    pairs = [(item, "") if isinstance(item, Path) else item for item in given]
    return find_drives(
        [(os.fspath(path), form) for path, form in pairs],
        domain,
        rig.uri if rig else "",
        writable=writable,
        allow_live=allow_live,
    )


@pytest.fixture
def make(tmp_path: Path, run: Any) -> Any:
    """make(name, *options of qemu-img create) -> the path of a qcow2 image of 1 MiB."""

    def make(name: str, *options: Any) -> Path:
        path = tmp_path / name
        run("qemu-img", "create", "-q", "-f", "qcow2", *options, path, "1M")
        return path

    return make


@pytest.fixture
def raw(tmp_path: Path, random_file: Any) -> Path:
    path: Path = random_file(tmp_path / "raw", MIB)
    return path


@pytest.fixture
def holding() -> Iterator[Any]:
    """holding(image, format): it is open in a qemu that writes to it."""
    children = []

    def holding(image: Path, form: str = "raw") -> None:
        child = subprocess.Popen(
            ["qemu-io", "-f", form, image],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        children.append(child)
        assert child.stdin and child.stdout
        child.stdin.write(b"read 0 512\n")
        child.stdin.flush()
        child.stdout.readline()

    yield holding
    for child in children:
        child.communicate()


# Formats


def test_a_disk_is_raw_unless_its_header_says_qcow2(raw: Path, make: Any) -> None:
    image = make("a")
    first, second = find(raw, image)
    assert (first.path, first.format, first.told) == (str(raw), "raw", False)
    assert (second.path, second.format, second.told) == (str(image), "qcow2", False)
    assert "qcow2 by its header" in str(second)


@pytest.mark.parametrize("form", ["vmdk", "vdi", "vpc", "vhdx", "qed", "LUKS"])
def test_other_formats_stay_raw(form: str, tmp_path: Path, run: Any) -> None:
    image = tmp_path / form
    if form == "LUKS":
        image.write_bytes(b"LUKS\xba\xbe\0\1".ljust(MIB, b"\0"))
    else:
        run("qemu-img", "create", "-q", "-f", form, image, "1M")
    assert find(image)[0].format == "raw"


def test_the_user_says_the_format(raw: Path, make: Any) -> None:
    drives = find((raw, "vmdk"), (make("a"), "raw"))
    assert [(drive.format, drive.told) for drive in drives] == [("vmdk", True), ("raw", True)]


def refused(*given: Any, **kwargs: Any) -> str:
    with pytest.raises(Error) as caught:
        find(*given, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_header_that_names_a_file_is_for_the_user_to_trust(raw: Path, make: Any) -> None:
    over, data = make("over", "-b", raw, "-F", "raw"), raw.parent / "data"
    external = make("external", "-o", f"data_file={data}")
    for image, name in ((over, raw), (external, data)):
        text = refused(image)
        assert "format=qcow2" in text and "format=raw" in text and str(name) in text
    assert find((over, "raw"))[0].backing == ()
    trusted = find((over, "qcow2"), (external, "qcow2"))
    assert trusted[0].backing == (Image(str(raw), "raw"),)
    assert trusted[1].data_file == str(data)
    assert str(raw) in str(trusted[0]) and str(data) in str(trusted[1])


def test_encrypted(make: Any) -> None:
    image = make("locked")
    with image.open("r+b") as file:
        file.seek(32)
        file.write(struct.pack(">I", 2))
    text = refused(image)
    assert "encrypted" in text and "format=qcow2" in text and "format=raw" in text
    assert "encrypted" in refused((image, "qcow2"))
    assert find((image, "raw"))[0].format == "raw"


def test_a_header_that_makes_no_sense(raw: Path, make: Any) -> None:
    image = make("odd")
    with image.open("r+b") as file:
        file.seek(4)
        file.write(struct.pack(">I", 1))  # QCOW 1, which has backing files too
    assert "format=raw" in refused(image)
    assert "not a qcow2 image" in refused((raw, "qcow2"))


@pytest.mark.parametrize(
    "name", ["json:{}", 'json:{"driver":"file","filename":"/etc/passwd"}', "nbd://localhost/x",
             "file:/etc/passwd", "fat:/etc"],
)  # fmt: skip
def test_what_is_no_file_is_never_opened(name: str, make: Any) -> None:
    image = make("over", "-u", "-b", name, "-F", "raw")
    assert name in refused(image)
    assert "only files" in refused((image, "qcow2"))


def test_names_are_relative_to_where_the_image_is(
    raw: Path, make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    over = make("over", "-b", "raw", "-F", "raw")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    link = elsewhere / "link"
    link.symlink_to(over)
    monkeypatch.chdir(elsewhere)
    (drive,) = find((Path("link"), "qcow2"))
    assert drive.path == str(over)
    assert drive.backing == (Image(str(raw), "raw"),)


def test_a_chain(raw: Path, make: Any) -> None:
    base = make("base", "-b", raw, "-F", "raw")
    top = make("top", "-b", base, "-F", "qcow2")
    (drive,) = find((top, "qcow2"))
    assert drive.backing == (Image(str(base), "qcow2"), Image(str(raw), "raw"))


def test_a_backing_file_of_no_said_format(raw: Path, make: Any) -> None:
    """qemu guesses what it is."""
    clean, over = make("clean"), make("over", "-b", raw, "-F", "raw")

    def over_unsaid(below: Path) -> Path:
        image: Path = make("top", "-u", "-b", below, "-F", "raw")
        data = image.read_bytes()
        extension = struct.pack(">II", 0xE2792ACA, 3)
        assert extension in data
        image.write_bytes(data.replace(extension, struct.pack(">II", 0x12345678, 3)))
        return image

    assert find((over_unsaid(clean), "qcow2"))[0].backing == (Image(str(clean), "qcow2"),)
    assert "format" in refused((over_unsaid(over), "qcow2"))
    top = over_unsaid(raw)
    assert find((top, "qcow2"))[0].backing == (Image(str(raw), "raw"),)
    for start in b"# Disk DescriptorFile\n", b"KDMV", b"QED\0":
        with raw.open("r+b") as file:
            file.write(start)
        assert "format" in refused((top, "qcow2"))


def test_a_backing_file_of_another_format(raw: Path, make: Any) -> None:
    assert "vmdk" in refused((make("top", "-u", "-b", raw, "-F", "vmdk"), "qcow2"))


def test_a_backing_file_with_its_data_elsewhere(make: Any, tmp_path: Path) -> None:
    base = make("base", "-o", f"data_file={tmp_path / 'data'}")
    assert "another file" in refused((make("top", "-b", base, "-F", "qcow2"), "qcow2"))


def test_a_chain_without_end(make: Any, run: Any) -> None:
    one, two = make("one"), make("two")
    for image, below in ((one, two), (two, one)):
        run("qemu-img", "rebase", "-u", "-b", below, "-F", "qcow2", image)
    assert "no end" in refused((one, "qcow2"))


# Paths


def test_what_is_no_disk(tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    for path in tmp_path, fifo, Path("/dev/null"), tmp_path / "none":
        assert str(path) in refused(path)
    with pytest.raises(UsageError):
        find()


def test_a_path_is_never_a_protocol(
    raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    odd = raw.rename(tmp_path / "nbd:a,b=c")
    assert find(Path(odd.name))[0].path == str(odd)


def test_a_block_device(raw: Path, loop_device: Any) -> None:
    with loop_device(raw) as device:
        assert find(device)[0].path == str(device)
        assert not find(device, writable=True)[0].read_only
    with loop_device(raw, "--read-only") as device:
        assert find(device, writable=True)[0].read_only


def test_written_twice(raw: Path, tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(raw)
    assert len(find(raw, link)) == 2
    assert "twice" in refused(raw, link, writable=True)


# Disks in use


def test_an_image_that_somebody_writes_to(raw: Path, holding: Any) -> None:
    assert not find(raw, writable=True)[0].live
    holding(raw)
    assert "in use" in refused(raw, writable=True)
    (drive,) = find(raw)
    assert drive.live and "point in time" in str(drive)
    assert find(raw, writable=True, allow_live=True)[0].live


def test_a_backing_file_that_somebody_writes_to(raw: Path, make: Any, holding: Any) -> None:
    top = make("top", "-b", raw, "-F", "raw")
    holding(raw)
    assert find((top, "qcow2"))[0].live


# Guests


@pytest.mark.slow
class TestGuests:
    @pytest.fixture
    def image(self, rig: Rig, random_file: Any) -> Iterator[Path]:
        path = random_file(rig.images / "inputs", MIB)
        path.chmod(0o666)
        yield path
        path.unlink()

    @pytest.fixture
    def top(self, rig: Rig, image: Path, run: Any) -> Iterator[Path]:
        path = rig.images / "inputs-top"
        run("qemu-img", "create", "-q", "-f", "qcow2", "-b", image, "-F", "raw", path)
        path.chmod(0o666)
        yield path
        path.unlink()

    def test_all_disks_in_their_order(self, rig: Rig, image: Path, raw: Path, make: Any) -> None:
        """What libguestfs adds too: CD-ROMs that have a medium, not those that have none."""
        qcow2 = make("a")
        sectors = disk(image, "vdb").replace(
            "<target", "<blockio logical_block_size='4096'/><target"
        )
        disks = [
            disk(qcow2, "vda", "qcow2"),
            disk("", "sdy", device="cdrom"),
            disk(raw, "sdz", device="cdrom"),
            sectors,
        ]
        with rig.guest("several", *disks), rig.connection() as connection:
            found = find(image, domain="several", rig=rig, writable=False)
            uuid = connection.lookupByName("several").UUIDString()
            assert find(domain=uuid, rig=rig) == found[1:]
            paths = [(Path(drive.path), drive.format, drive.sector) for drive in found]
            assert set(paths[1:]) == {
                (qcow2, "qcow2", 512),
                (raw, "raw", 512),
                (image, "raw", 4096),
            }
            assert paths[0] == (image, "raw", 512)
            assert all(drive.told and not drive.live for drive in found[1:])
            written = find(domain="several", rig=rig, writable=True)
            assert {Path(d.path) for d in written if d.read_only} == {raw}

    def test_a_running_guest(self, rig: Rig, image: Path) -> None:
        with rig.guest("runs", disk(image), start=True), rig.connection() as connection:
            text = refused(domain="runs", rig=rig, writable=True)
            assert "running" in text and "--allow-live" in text and "-r" in text
            number = str(connection.lookupByName("runs").ID())
            for name in "runs", number:
                (drive,) = find(domain=name, rig=rig)
                assert drive.live and drive.read_only
            (drive,) = find(domain="runs", rig=rig, writable=True, allow_live=True)
            assert drive.live and not drive.read_only
            assert "in use" in refused(image, writable=True)  # by qemu's locks

    def test_no_such_guest(self, rig: Rig, image: Path) -> None:
        with rig.guest("here", disk(image)):
            assert "here" in refused(domain="there", rig=rig)
        with rig.guest("bare"):
            assert "no disk" in refused(domain="bare", rig=rig)

    def test_a_network_disk(self, rig: Rig) -> None:
        source = (
            "<disk type='network' device='disk'><driver name='qemu' type='raw'/><source"
            " protocol='nbd' name='x'><host name='localhost' port='10809'/></source>"
            "<target dev='vda' bus='virtio'/></disk>"
        )
        with rig.guest("far", source):
            assert "vda" in refused(domain="far", rig=rig)

    def test_the_xml_says_what_is_below(self, rig: Rig, image: Path, top: Path, raw: Path) -> None:
        def chain(xml: str) -> Any:
            return rig.guest("chain", disk(top, form="qcow2", chain=xml))

        with chain(backing(image, "raw")):
            (drive,) = find(domain="chain", rig=rig)
            assert drive.backing == (Image(str(image), "raw"),)
        with chain(""):
            assert "backingStore" in refused(domain="chain", rig=rig)
        with chain(backing(raw, "raw")):
            assert str(raw) in refused(domain="chain", rig=rig)
        with chain(backing(image, "qcow2")):
            assert "qcow2" in refused(domain="chain", rig=rig)

    def test_a_running_guest_says_so_by_itself(self, rig: Rig, image: Path, top: Path) -> None:
        with rig.guest("chain", disk(top, form="qcow2"), start=True):
            (drive,) = find(domain="chain", rig=rig)
            assert drive.backing == (Image(str(image), "raw"),)

    def test_data_elsewhere(self, rig: Rig, make: Any, tmp_path: Path) -> None:
        image = make("external", "-o", f"data_file={tmp_path / 'data'}")
        with rig.guest("external", disk(image, form="qcow2")):
            assert "another file" in refused(domain="external", rig=rig)
