"""The writer, with disks made of spans, against files, devices and filesystems of the kernel."""

from __future__ import annotations

import contextlib
import errno
import os
import random
import stat
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Callable

import pytest

from nbdtool import writer
from nbdtool.disk import (
    Extent,
    FileSpan,
    Span,
    ZeroSpan,
)
from nbdtool.errors import Error
from tests.span_disk import SpanDisk, mixed_disk, span_file

MIB = 1 << 20


class FailingDisk(SpanDisk):
    """A disk whose last megabyte can't be read."""

    def read(self, offset: int, length: int) -> list[Span]:
        if offset + length > self.size - MIB:
            raise OSError(errno.EIO, "the source broke")
        return super().read(offset, length)


@pytest.fixture
def disk(tmp_path: Path) -> SpanDisk:
    source = tmp_path / "source"
    source.mkdir()
    return mixed_disk(source, 1)


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """Where a target goes; whatever happens, nothing may be beside it afterwards."""
    folder = tmp_path / "folder"
    folder.mkdir()
    yield folder
    assert {path.name for path in folder.iterdir()} <= {"target", "link", "there"}


@pytest.fixture
def mounted(run: Callable[..., Any], tmp_path: Path) -> Callable[..., Any]:
    """with mounted("-t", "tmpfs", "none") as directory: ..., writable."""

    @contextlib.contextmanager
    def mounted(*words: Any) -> Iterator[Path]:
        directory = tmp_path / "mounted"
        directory.mkdir()
        run("mount", *words, directory)
        try:
            yield directory
        finally:
            run("umount", directory)

    return mounted


@pytest.mark.parametrize("seed", range(8))
def test_target_has_the_bytes_of_the_disk(tmp_path: Path, folder: Path, seed: int) -> None:
    disk = mixed_disk(tmp_path, seed)
    writer.write_disk(disk, str(folder / "target"))
    assert (folder / "target").read_bytes() == disk.content()


def test_empty_disk(folder: Path) -> None:
    writer.write_disk(SpanDisk([]), str(folder / "target"))
    assert (folder / "target").read_bytes() == b""


def test_thousands_of_small_spans(tmp_path: Path, folder: Path) -> None:
    file = span_file(tmp_path / "source", bytes(range(256)) * 64)
    generator = random.Random(3)
    spans: list[Span] = []
    for number in range(5000):
        spans += [FileSpan(file, generator.randrange(9000), 5), b"%04d" % number, b"x"]
    disk = SpanDisk(spans)
    writer.write_disk(disk, str(folder / "target"))
    assert (folder / "target").read_bytes() == disk.content()


def test_holes_are_neither_read_nor_written(folder: Path) -> None:
    disk = SpanDisk([b"a" * 4096, ZeroSpan(1 << 40), b"b" * 4096, ZeroSpan(1 << 40)])
    writer.write_disk(disk, str(folder / "target"))
    st = (folder / "target").stat()
    assert st.st_size == disk.size
    assert st.st_blocks * 512 <= 64 << 10
    assert sum(length for what, _, length in disk.asked if what == "read") == 8192


def test_what_may_be_a_hole_of_anything_is_read(folder: Path) -> None:
    """Unallocated doesn't say zero."""

    class Unallocated(SpanDisk):
        def extents(self, offset: int, length: int) -> Iterator[Extent]:
            yield Extent(length, 1)

    writer.write_disk(Unallocated([b"z" * 8192]), str(folder / "target"))
    assert (folder / "target").read_bytes() == b"z" * 8192


def test_slow_sources_are_told_before_they_are_asked(folder: Path) -> None:
    disk = SpanDisk([b"d" * (40 * MIB), ZeroSpan(MIB), b"e" * 100_000])
    writer.write_disk(disk, str(folder / "target"))
    told, asked = [], []
    for what, *where in disk.asked:
        if what == "prefetch":
            told.append(where)
        else:
            asked.append(where)
            assert where in told
            assert len(told) - len(asked) <= 16, "too far ahead for a bounded cache"
            assert len(told) > len(asked) or len(asked) > 32, "nothing is under way meanwhile"
    assert told == asked


def test_large_blocks_are_respected(folder: Path) -> None:
    disk = SpanDisk([b"d" * 300_000])
    disk.block_size = (1, 4096, 65536)
    writer.write_disk(disk, str(folder / "target"))
    assert max(length for _, _, length in disk.asked) <= 65536
    assert (folder / "target").read_bytes() == disk.content()


@pytest.mark.parametrize("answer", [0, errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP])
def test_without_copy_file_range(
    disk: SpanDisk, folder: Path, monkeypatch: pytest.MonkeyPatch, answer: int
) -> None:
    def copy_file_range(*_: Any) -> int:
        if answer:
            raise OSError(answer, os.strerror(answer))
        return 0

    monkeypatch.setattr(os, "copy_file_range", copy_file_range)
    writer.write_disk(disk, str(folder / "target"))
    assert (folder / "target").read_bytes() == disk.content()


def test_short_counts(disk: SpanDisk, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pwritev, copy_file_range = os.pwritev, os.copy_file_range
    monkeypatch.setattr(
        os,
        "pwritev",
        lambda fd, parts, offset: pwritev(fd, [b"".join(parts)[:7001]], offset),
    )
    monkeypatch.setattr(
        os,
        "copy_file_range",
        lambda a, b, count, c, d: copy_file_range(a, b, min(count, 5003), c, d),
    )
    writer.write_disk(disk, str(folder / "target"))
    assert (folder / "target").read_bytes() == disk.content()


def test_between_filesystems(mounted: Callable[..., Any], folder: Path) -> None:
    with mounted("-t", "tmpfs", "none") as directory:
        disk = mixed_disk(directory, 5)
        writer.write_disk(disk, str(folder / "target"))
        assert (folder / "target").read_bytes() == disk.content()
        disk.spans.clear()


def test_reflinks_where_the_filesystem_has_them(
    tmp_path: Path, run: Callable[..., Any], mounted: Callable[..., Any]
) -> None:
    image = tmp_path / "image"
    with image.open("wb") as file:
        file.truncate(400 * MIB)
    run("mkfs.xfs", "-q", "-m", "reflink=1", image)
    with mounted("-o", "loop", image) as directory:
        size = 40 * MIB + 1234
        file_ = span_file(directory / "source", random.Random(1).randbytes(size))
        disk = SpanDisk([b"m" * 8192, FileSpan(file_, 0, size), ZeroSpan(4096 - 1234), b"end"])
        os.sync()
        before = os.statvfs(directory)
        writer.write_disk(disk, str(directory / "target"))
        assert (directory / "target").read_bytes() == disk.content()
        after = os.statvfs(directory)
        assert (before.f_bfree - after.f_bfree) * after.f_frsize < 2 * MIB
        disk.spans.clear()
        del file_


def test_new_file_has_the_mode_of_the_umask(disk: SpanDisk, folder: Path) -> None:
    old = os.umask(0o027)
    try:
        writer.write_disk(disk, str(folder / "target"))
    finally:
        os.umask(old)
    assert stat.S_IMODE((folder / "target").stat().st_mode) == 0o640


def test_old_file_keeps_its_mode_and_owner(disk: SpanDisk, folder: Path) -> None:
    target = folder / "target"
    target.write_bytes(b"old")
    os.chown(target, 1234, 5678)
    target.chmod(0o604)
    writer.write_disk(disk, str(target))
    st = target.stat()
    assert (st.st_uid, st.st_gid, stat.S_IMODE(st.st_mode)) == (1234, 5678, 0o604)
    assert target.read_bytes() == disk.content()


@pytest.mark.parametrize("exists", [False, True])
def test_links_are_followed(disk: SpanDisk, folder: Path, exists: bool) -> None:
    there = folder / "there"
    there.mkdir()
    (folder / "link").symlink_to("there/target")
    if exists:
        (there / "target").write_bytes(b"old")
    writer.write_disk(disk, str(folder / "link"))
    assert (folder / "link").is_symlink()
    assert (there / "target").read_bytes() == disk.content()
    assert [path.name for path in there.iterdir()] == ["target"]


@pytest.mark.parametrize("unnamed", [True, False], ids=["unnamed", "named"])
@pytest.mark.parametrize("old", [None, b"old"], ids=["new", "old"])
class TestAppearance:
    """With unnamed temporary files, and as on a filesystem that has none."""

    @pytest.fixture(autouse=True)
    def _temporary(self, unnamed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
        if not unnamed:
            os_open = os.open

            def without(path: Any, flags: int, *args: Any, **kwargs: Any) -> int:
                if flags & os.O_TMPFILE == os.O_TMPFILE:
                    raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))
                return os_open(path, flags, *args, **kwargs)

            monkeypatch.setattr(os, "open", without)

    @pytest.fixture
    def target(self, folder: Path, old: bytes | None) -> Path:
        target = folder / "target"
        if old is not None:
            target.write_bytes(old)
        return target

    def unharmed(self, target: Path, old: bytes | None) -> bool:
        left = [path.name for path in target.parent.iterdir()]
        return target.read_bytes() == old and left == ["target"] if old else left == []

    def test_success(self, disk: SpanDisk, target: Path, old: bytes | None) -> None:
        mode = 0o644
        if old:
            mode = 0o600
            target.chmod(mode)
        writer.write_disk(disk, str(target))
        assert target.read_bytes() == disk.content()
        assert stat.S_IMODE(target.stat().st_mode) == mode

    def test_longest_name(self, folder: Path, old: bytes | None) -> None:
        target = folder / ("\U0001f4be" * 63)
        if old:
            target.write_bytes(old)
        writer.write_disk(SpanDisk([b"new"]), str(target))
        assert target.read_bytes() == b"new"
        target.rename(folder / "target")

    def test_source_fails(self, target: Path, old: bytes | None) -> None:
        with pytest.raises(Error, match=r"^the source broke$"):
            writer.write_disk(FailingDisk([b"x" * (5 * MIB)]), str(target))
        assert self.unharmed(target, old)

    @pytest.mark.parametrize("change", ["append", "overwrite", "truncate"])
    def test_source_changes(
        self, tmp_path: Path, target: Path, old: bytes | None, change: str
    ) -> None:
        path = tmp_path / "source"
        disk = SpanDisk([FileSpan(span_file(path, b"s" * MIB), 0, MIB), b"more"])
        with path.open("r+b") as file:
            if change == "append":
                file.seek(0, os.SEEK_END)
            file.write(b"changed")
            if change == "truncate":
                file.truncate()
        with pytest.raises(Error, match=rf"^{path}: (changed|ends early)"):
            writer.write_disk(disk, str(target))
        assert self.unharmed(target, old)

    def test_interrupted(self, target: Path, old: bytes | None) -> None:
        class Interrupted(SpanDisk):
            def read(self, offset: int, length: int) -> list[Span]:
                if offset > 2 * MIB:
                    raise KeyboardInterrupt
                return super().read(offset, length)

        with pytest.raises(KeyboardInterrupt):
            writer.write_disk(Interrupted([b"x" * (5 * MIB)]), str(target))
        assert self.unharmed(target, old)

    def test_rename_fails(
        self, disk: SpanDisk, target: Path, old: bytes | None, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def fails(*_: Any, **__: Any) -> None:
            raise OSError(errno.EPERM, os.strerror(errno.EPERM))

        monkeypatch.setattr(os, "rename", fails)
        if old is None:
            monkeypatch.setattr(os, "link", fails)
        with pytest.raises(Error, match=rf"^{target}: Operation not permitted$"):
            writer.write_disk(disk, str(target))
        assert self.unharmed(target, old)


def test_full_filesystem(mounted: Callable[..., Any], tmp_path: Path) -> None:
    file = span_file(tmp_path / "source", b"s" * (8 * MIB))
    with mounted("-t", "tmpfs", "-o", "size=4m", "none") as directory:
        target = directory / "target"
        target.write_bytes(b"old")
        for disk in SpanDisk([FileSpan(file, 0, 8 * MIB)]), SpanDisk([b"m" * (8 * MIB)]):
            with pytest.raises(Error, match=rf"^{target}: No space left on device$"):
                writer.write_disk(disk, str(target))
            assert target.read_bytes() == b"old"
            assert os.listdir(directory) == ["target"]
            assert os.statvfs(directory).f_bfree * os.statvfs(directory).f_bsize > 3 * MIB


@pytest.mark.parametrize("what", ["folder", "file"])
def test_unwritable(what: str) -> None:
    with tempfile.TemporaryDirectory() as name:
        target = Path(name, "target")
        target.write_bytes(b"old")
        if what == "folder":
            Path(name).chmod(0o755)
            target.chmod(0o666)
        else:
            Path(name).chmod(0o777)
            target.chmod(0o644)
        os.seteuid(65534)
        try:
            with pytest.raises(Error, match=rf"^{target}: Permission denied$"):
                writer.write_disk(SpanDisk([b"new"]), str(target))
        finally:
            os.seteuid(0)
        assert target.read_bytes() == b"old"
        assert os.listdir(name) == ["target"]


def test_owner_that_can_not_be_kept() -> None:
    with tempfile.TemporaryDirectory() as name:
        target = Path(name, "target")
        target.write_bytes(b"old")
        target.chmod(0o666)
        Path(name).chmod(0o777)
        os.seteuid(65534)
        try:
            with pytest.raises(Error, match=rf"^{target}: it belongs to somebody else"):
                writer.write_disk(SpanDisk([b"new"]), str(target))
        finally:
            os.seteuid(0)
        assert target.read_bytes() == b"old"
        assert os.listdir(name) == ["target"]


def test_targets_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "file").touch()
    for name, why in [
        ("", "No such file or directory"),
        (str(tmp_path), "Is a directory"),
        (str(tmp_path / "missing/target"), "No such file or directory"),
        (f"{tmp_path}/missing/", "No such file or directory"),
        (str(tmp_path / "file/target"), "Not a directory"),
        (str(tmp_path / "loop"), "Too many levels of symbolic links"),
        (str(tmp_path / ("n" * 256)), "File name too long"),
    ]:
        with pytest.raises(Error) as error:
            writer.write_disk(SpanDisk([b"new"]), name)
        assert str(error.value) == f"{name}: {why}"
    assert sorted(os.listdir(tmp_path)) == ["file", "loop"]


def test_pipe(disk: SpanDisk, tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    received: list[bytes] = []
    reader = threading.Thread(target=lambda: received.append(fifo.read_bytes()))
    reader.start()
    writer.write_disk(disk, str(fifo))
    reader.join()
    assert received == [disk.content()]
    assert stat.S_ISFIFO(fifo.stat().st_mode)


def test_character_devices(disk: SpanDisk) -> None:
    writer.write_disk(disk, "/dev/null")
    with pytest.raises(Error, match=r"^/dev/full: No space left on device$"):
        writer.write_disk(disk, "/dev/full")
    controller, terminal = os.openpty()
    with pytest.raises(Error, match=r"terminal"):
        writer.write_disk(disk, os.ttyname(terminal))
    os.close(controller)
    os.close(terminal)


class TestBlockDevice:
    @pytest.fixture
    def device(self, tmp_path: Path, loop_device: Callable[..., Any]) -> Iterator[Path]:
        (tmp_path / "device").write_bytes(b"\xff" * (16 * MIB))
        with loop_device(tmp_path / "device") as device:
            yield device

    @pytest.mark.parametrize("seed", range(3))
    def test_written_in_place(self, tmp_path: Path, device: Path, seed: int) -> None:
        disk = mixed_disk(tmp_path, seed)
        writer.write_disk(disk, str(device))
        expected = disk.content().ljust(16 * MIB, b"\xff")
        assert device.read_bytes() == expected
        assert (tmp_path / "device").read_bytes() == expected, "not on stable storage"

    def test_large_zeroes(self, device: Path) -> None:
        disk = SpanDisk([b"a" * 1000, ZeroSpan(15 * MIB), b"b"])
        writer.write_disk(disk, str(device))
        assert device.read_bytes() == disk.content().ljust(16 * MIB, b"\xff")

    def test_too_small(self, device: Path) -> None:
        with pytest.raises(Error, match=rf"^{device}: the device has {16 * MIB} bytes"):
            writer.write_disk(SpanDisk([b"a" * MIB, ZeroSpan(15 * MIB + 1)]), str(device))
        assert device.read_bytes() == b"\xff" * (16 * MIB)

    def test_in_use(self, device: Path) -> None:
        fd = os.open(device, os.O_RDONLY | os.O_EXCL)
        try:
            with pytest.raises(Error, match=rf"^{device}: Device or resource busy$"):
                writer.write_disk(SpanDisk([b"new"]), str(device))
        finally:
            os.close(fd)
        assert device.read_bytes() == b"\xff" * (16 * MIB)


WRITE_TO_STANDARD_OUTPUT = """
import os, sys
from nbdtool import errors, writer
from tests.span_disk import mixed_disk
from pathlib import Path
try:
    writer.write_disk(mixed_disk(Path(sys.argv[1]), 7), "-")
except errors.Error as error:
    sys.exit(str(error))
"""


class TestStandardOutput:
    @pytest.fixture
    def start(self, tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[bytes]]:
        def start(**kwargs: Any) -> subprocess.CompletedProcess[bytes]:
            words = [sys.executable, "-c", WRITE_TO_STANDARD_OUTPUT, str(tmp_path)]
            return subprocess.run(words, stderr=subprocess.PIPE, check=False, **kwargs)

        return start

    @pytest.fixture
    def content(self, tmp_path: Path) -> bytes:
        return mixed_disk(tmp_path, 7).content()

    def test_pipe(self, start: Callable[..., Any], content: bytes) -> None:
        done = start(stdout=subprocess.PIPE)
        assert (done.returncode, done.stdout, done.stderr) == (0, content, b"")

    def test_file_goes_on_where_it_is(
        self, start: Callable[..., Any], content: bytes, tmp_path: Path
    ) -> None:
        with (tmp_path / "output").open("wb", buffering=0) as output:
            output.write(b"before")
            assert start(stdout=output).returncode == 0
            output.write(b"after")
        assert (tmp_path / "output").read_bytes() == b"before" + content + b"after"

    def test_file_is_sparse(self, start: Callable[..., Any], tmp_path: Path) -> None:
        with (tmp_path / "output").open("wb") as output:
            assert start(stdout=output).returncode == 0
        st = (tmp_path / "output").stat()
        assert st.st_blocks * 512 < st.st_size - MIB

    @pytest.mark.parametrize("mode", ["ab", "r+b"])
    def test_file_with_content(
        self, start: Callable[..., Any], content: bytes, tmp_path: Path, mode: str
    ) -> None:
        path = tmp_path / "output"
        path.write_bytes(b"\xff" * 100)
        with path.open(mode, buffering=0) as output:
            assert start(stdout=output).returncode == 0
        head = b"\xff" * 100 if mode == "ab" else b""
        assert path.read_bytes() == head + content

    def test_terminal(self, start: Callable[..., Any]) -> None:
        controller, terminal = os.openpty()
        done = start(stdout=terminal)
        os.close(terminal)
        os.close(controller)
        assert done.returncode == 1
        assert done.stderr.startswith(b"standard output: a disk isn't written to a terminal")

    def test_closed(self, start: Callable[..., Any]) -> None:
        done = start(preexec_fn=lambda: os.close(1))
        assert done.returncode == 1
        assert done.stderr == b"standard output: Bad file descriptor\n"
