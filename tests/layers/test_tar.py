"""Files in tar archives that other programs make, as these programs extract them."""

from __future__ import annotations

import os
import random
import shutil
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Callable

import pytest

from nbdtool.disk import STATE_HOLE, FileSpan, ZeroSpan, read_bytes
from nbdtool.disks.file import FileDisk
from nbdtool.errors import Error
from nbdtool.layers import tar
from nbdtool.layers.window import Window

KIB, MIB = 1 << 10, 1 << 20
LONG = "d" * 90 + "/" + "e" * 80 + "/" + "f" * 120

GNU_FORMATS = {
    "v7": ["--format=v7"],
    "old GNU": ["--format=oldgnu"],
    "GNU": ["--format=gnu"],
    "ustar": ["--format=ustar"],
    "pax": ["--format=posix"],
    "old GNU sparse": ["--format=oldgnu", "-S"],
    "GNU sparse": ["--format=gnu", "-S"],
    "pax sparse 0.0": ["--format=posix", "-S", "--sparse-version=0.0"],
    "pax sparse 0.1": ["--format=posix", "-S", "--sparse-version=0.1"],
    "pax sparse 1.0": ["--format=posix", "-S", "--sparse-version=1.0"],
}
WRITERS: dict[str, list[str]] = {
    **{name: ["tar", *options, "-cf"] for name, options in GNU_FORMATS.items()},
    "bsdtar": ["bsdtar", "-cf"],
    "bsdtar without sparse": ["bsdtar", "--no-read-sparse", "-cf"],
    "bsdtar GNU": ["bsdtar", "--format=gnutar", "-cf"],
    "bsdtar ustar": ["bsdtar", "--format=ustar", "-cf"],
    "busybox": ["busybox", "tar", "-cf"],
}
WITHOUT_LONG_NAMES = ("v7", "ustar", "bsdtar ustar")


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory, random_file: Any) -> Path:
    """A directory `disk` with files whole, empty, sparse and odd, and names of all kinds."""
    top: Path = tmp_path_factory.mktemp("tree")
    disk = top / "disk"
    disk.mkdir()
    random_file(disk / "whole", 300001)
    (disk / "empty").touch()
    (disk / "one byte").write_bytes(b"x")
    for name, end in ("sparse", 12 * MIB + 777), ("ends in a hole", 9 * MIB):
        with (disk / name).open("wb") as file:
            for n in range(30):  # more segments than a header block has room for
                file.seek(n * 256 * KIB)
                file.write(bytes([n + 1]) * (8 * KIB if n % 3 else 4 * KIB))
            if end > 12 * MIB:
                file.seek(end - 1)
                file.write(b"x")
        os.truncate(disk / name, end)
    with (disk / "only a hole").open("wb") as file:
        file.truncate(5 * MIB)
    (disk / "größe ü").write_bytes(b"utf-8")
    return top


@pytest.fixture(scope="module")
def files(tree: Path) -> list[str]:
    return sorted(str(path.relative_to(tree)) for path in tree.rglob("*") if path.is_file())


def file_in(archive: Path, name: str) -> Any:
    return tar.open(FileDisk(str(archive)), name, None)


def check(archive: Path, name: str, content: bytes) -> None:
    disk = file_in(archive, name)
    assert disk.size == len(content)
    if not content:
        return
    assert read_bytes(disk, 0, disk.size) == content
    generator = random.Random(os.fsencode(name))
    for _ in range(20):
        offset = generator.randrange(len(content))
        length = min(generator.choice([1, 5000, MIB]), len(content) - offset)
        disk.prefetch([(offset, length)])
        assert read_bytes(disk, offset, length) == content[offset : offset + length]
        assert sum(extent.length for extent in disk.extents(offset, length)) == length
    at = 0
    for length, state in disk.extents(0, disk.size):
        if state:
            assert not content[at : at + length].strip(b"\0")
        at += length
    assert at == disk.size


@pytest.mark.parametrize("writer", WRITERS)
def test_every_format(writer: str, tree: Path, files: list[str], tmp_path: Path, run: Any) -> None:
    """The bytes are those of the tree, which is what tar extracts from the archive."""
    archive = tmp_path / "a.tar"
    run(*WRITERS[writer], archive, "./disk", cwd=tree)
    run("tar", "-xf", archive, cwd=tmp_path)
    for name in files:
        content = (tree / name).read_bytes()
        assert (tmp_path / name).read_bytes() == content
        check(archive, name, content)
    if "sparse" in writer and "without" not in writer:
        assert archive.stat().st_size < 2 * MIB
        disk = file_in(archive, "disk/sparse")
        holes = sum(extent.length for extent in disk.extents(0, disk.size) if extent.state)
        assert holes > 11 * MIB


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_python(form: int, tree: Path, files: list[str], tmp_path: Path) -> None:
    archive = tmp_path / "a.tar"
    with tarfile.open(archive, "w", format=form) as writer:
        writer.add(tree / "disk", "disk")
    for name in files:
        check(archive, name, (tree / name).read_bytes())


@pytest.mark.parametrize("writer", [name for name in WRITERS if name not in WITHOUT_LONG_NAMES])
def test_long_names(writer: str, tmp_path: Path, run: Any) -> None:
    path = tmp_path / LONG
    path.parent.mkdir(parents=True)
    path.write_bytes(b"far away")
    link = tmp_path / ("l" * 150)
    link.symlink_to(LONG)
    archive = tmp_path / "a.tar"
    run(*WRITERS[writer], archive, "./" + "d" * 90, link.name, cwd=tmp_path)
    check(archive, LONG, b"far away")
    check(archive, link.name, b"far away")


def test_a_name_in_two_parts(tmp_path: Path, run: Any) -> None:
    """ustar's prefix."""
    name = "d" * 90 + "/" + "e" * 90
    (tmp_path / name).parent.mkdir()
    (tmp_path / name).write_bytes(b"prefixed")
    run("tar", "--format=ustar", "-cf", "a.tar", "d" * 90, cwd=tmp_path)
    check(tmp_path / "a.tar", "./" + name, b"prefixed")


def test_a_file_is_served_in_place(tree: Path, tmp_path: Path, run: Any) -> None:
    """Its spans are ranges of the archive itself, and block status comes through."""
    archive = tmp_path / "a.tar"
    run("tar", "--format=gnu", "-cf", archive, "disk/whole", cwd=tree)
    disk = file_in(archive, "disk/whole")
    assert isinstance(disk, Window)
    (span,) = disk.read(1000, 200000)
    assert isinstance(span, FileSpan) and span.file.name == str(archive)
    assert disk.description == f"{archive}: disk/whole"


def test_a_big_number(tmp_path: Path, run: Any) -> None:
    """Sizes over 8 GiB: in base 256 and in pax records; the archive itself is sparse."""
    for form in "gnu", "posix":
        big = tmp_path / "big"
        with big.open("wb") as file:
            file.truncate(9 << 30)
            file.seek((9 << 30) - 5)
            file.write(b"hello")
        archive = tmp_path / "a.tar"
        # GNU tar writes it whole: only its header is taken.
        header = run(
            "sh", "-c", f"tar --format={form} -cf - big 2>/dev/null | head -c 1536",
            cwd=tmp_path, binary=True,
        )  # fmt: skip
        length = 512 if form == "gnu" else 1536
        with archive.open("wb") as file:
            file.write(header[:length])
            file.seek(length + (9 << 30) - 5)
            file.write(b"hello")
            file.truncate(length + (9 << 30) + 1024)
        disk = file_in(archive, "big")
        assert disk.size == 9 << 30
        assert read_bytes(disk, disk.size - 6, 6) == b"\0hello"
        holes = sum(e.length for e in disk.extents(0, disk.size) if e.state & STATE_HOLE)
        assert holes > 8 << 30


@pytest.fixture
def archive(tmp_path: Path) -> Callable[..., Path]:
    """archive((name, content or tarfile.TarInfo attributes), ...) -> path, written by Python."""

    def archive(*members: tuple[str, Any]) -> Path:
        path = tmp_path / "made.tar"
        with tarfile.open(path, "w") as writer:
            for name, content in members:
                member = tarfile.TarInfo(name)
                if isinstance(content, bytes):
                    member.size = len(content)
                    import io

                    writer.addfile(member, io.BytesIO(content))
                else:
                    for key, value in content.items():
                        setattr(member, key, value)
                    writer.addfile(member)
        return path

    return archive


def link(target: str) -> dict[str, Any]:
    return {"type": tarfile.SYMTYPE, "linkname": target}


def hard(target: str) -> dict[str, Any]:
    return {"type": tarfile.LNKTYPE, "linkname": target}


FOLDER = {"type": tarfile.DIRTYPE}


class TestNames:
    @pytest.mark.parametrize("stored", ["disk/x", "./disk/x", "/disk/x", ".//disk/./x"])
    @pytest.mark.parametrize("wanted", ["disk/x", "./disk/x", "/disk/x", "a/../disk//x"])
    def test_are_the_same(self, archive: Any, stored: str, wanted: str) -> None:
        check(archive(("disk/xx", b"no"), (stored, b"yes"), ("x", b"no")), wanted, b"yes")

    @pytest.mark.parametrize(
        "name", ["-rf", "--use-compress-program=sh", "a b", "x\ny", "\udcff", "*"]
    )
    def test_of_any_kind(self, archive: Any, name: str) -> None:
        check(archive(("other", b"no"), (name, b"yes")), name, b"yes")

    def test_the_last_of_two_wins(self, archive: Any) -> None:
        path = archive(("x", b"first"), ("y", b"other"), ("./x", b"last"))
        check(path, "x", b"last")

    def test_users_with_spaces(self, archive: Any) -> None:
        path = archive(("x", {"uname": "domain users", "gname": "a b"}), ("y", b"yes"))
        check(path, "y", b"yes")

    @pytest.mark.parametrize(
        "wanted, told",
        [
            ("disk/downloded", "there is no disk/downloded; the nearest: disk/downloaded"),
            ("downloaded", "the nearest: disk/downloaded$"),
            ("elsewhere", "there is no elsewhere; the nearest: disk/downloaded, etc/passwd"),
            ("disk", "disk is a directory; its files: disk/downloaded"),
            ("etc", "etc is a directory; its files: etc/passwd"),
            ("", "the archive itself is a directory; its files: none"),
            ("pipe", "pipe is not a regular file"),
            ("broken", "there is no broken, a link to nothing,"),
            ("up", "there is no up, a link to etc/shadow,"),
            ("nothing/*", "there is no nothing/\\*"),
        ],
    )
    def test_that_are_not_there(self, archive: Any, wanted: str, told: str) -> None:
        path = archive(
            ("disk/downloaded", b"old"),
            ("disk/downloaded", b""),
            ("etc", FOLDER),
            ("etc/passwd", b""),
            ("pipe", {"type": tarfile.FIFOTYPE}),
            ("broken", link("nothing")),
            ("up", link("../../../../etc/shadow")),
        )
        with pytest.raises(Error, match=told):
            file_in(path, wanted)


class TestLinks:
    def test_are_followed(self, archive: Any, tmp_path: Path, run: Any) -> None:
        path = archive(
            ("disk/real.img", b"content"),
            ("disk/hard", hard("./disk/real.img")),
            ("disk/soft", link("real.img")),
            ("disk/absolute", link("/disk/real.img")),
            ("disk/up", link("../disk/./soft")),
            ("folder", link("disk")),
            ("far", link("folder/up")),
            ("twice", hard("far")),
        )
        for name in "hard", "soft", "absolute", "up":
            check(path, f"disk/{name}", b"content")
        for name in "folder/real.img", "folder/up", "./far", "twice":
            check(path, name, b"content")

    def test_to_what_came_before(self, archive: Any, tmp_path: Path, run: Any) -> None:
        """A hard link keeps the file that it was made to; a symbolic one finds the last."""
        path = archive(
            ("x", b"old"), ("hard", hard("x")), ("soft", link("x")), ("x", b"new"), ("y", hard("x"))
        )
        run("tar", "-xf", path, cwd=tmp_path)
        for name in "x", "hard", "soft", "y":
            check(path, name, (tmp_path / name).read_bytes())
        check(path, "hard", b"old")

    @pytest.mark.parametrize("first, second", [(link, link), (hard, hard), (link, hard)])
    def test_in_a_circle(self, archive: Any, first: Any, second: Any) -> None:
        path = archive(("a", first("b")), ("b", second("a")), ("c", first("c")), ("d", link("d/d")))
        for name in "a", "b", "c", "d":
            with pytest.raises(Error, match=r"circles|there is no"):
                file_in(path, name)

    def test_in_a_long_chain(self, archive: Any) -> None:
        links = [(f"l{n}", link(f"l{n + 1}")) for n in range(60)]
        path = archive(*links, ("l60", b"end"))
        check(path, "l50", b"end")
        with pytest.raises(Error, match="too many"):
            file_in(path, "l0")


class TestGlobs:
    def test_match_one_file(self, archive: Any) -> None:
        path = archive(
            ("disk", FOLDER),
            ("disk/vm.img", b"yes"),
            ("disk/latest", link("vm.img")),
            ("disk/sub/vm.img", b"no"),
            ("disk/folder.img", FOLDER),
        )
        for pattern in "disk/*.img", "disk/*", "./d[i]sk/v?.img", "*/vm.img":
            check(path, pattern, b"yes")

    def test_of_duplicates_the_last_counts(self, archive: Any) -> None:
        path = archive(
            ("disk/a", b"old"), ("disk/b", b"no"), ("disk/a", b"new"), ("disk/b", FOLDER)
        )
        check(path, "disk/*", b"new")

    def test_match_several(self, archive: Any) -> None:
        path = archive(*[(f"disk/{n}", b"x") for n in range(8)])
        told = r"disk/\* matches 8 files: disk/0, .*disk/4 and 3 more"
        with pytest.raises(Error, match=told):
            file_in(path, "disk/*")

    def test_a_file_with_that_very_name(self, archive: Any) -> None:
        check(archive(("disk/[1]", b"yes"), ("disk/1", b"no")), "disk/[1]", b"yes")

    def test_a_hard_link(self, archive: Any) -> None:
        check(archive(("a/x", b"yes"), ("b/y", hard("a/x"))), "b/*", b"yes")


def test_a_writable_archive_is_written_in_place(archive: Any, tmp_path: Path) -> None:
    path = archive(("a", b"aaa"), ("b", b"bbbbb"), ("c", b"ccc"))
    disk = tar.open(FileDisk(str(path), writable=True), "b", None)
    assert disk.writable
    disk.write(1, memoryview(b"XY"))
    disk.flush()
    disk.close()
    for name, content in ("a", b"aaa"), ("b", b"bXYbb"), ("c", b"ccc"):
        check(path, name, content)


def test_no_end_marker(archive: Any, capsys: Any) -> None:
    """Some writers leave it out; a complete file before it is served, with a warning."""
    path = archive(("a", b"aaa"))
    os.truncate(path, 1024)
    check(path, "a", b"aaa")
    assert "no end marker" in capsys.readouterr().err
    os.truncate(path, 512 + 3)
    check(path, "a", b"aaa")


def test_an_archive_behind_an_archive(archive: Any, tmp_path: Path) -> None:
    """What follows the end marker is not the archive's."""
    path = archive(("a", b"first"))
    data = path.read_bytes()
    path = archive(("a", b"second"), ("b", b"no"))
    whole = tmp_path / "two.tar"
    whole.write_bytes(data + path.read_bytes())
    check(whole, "a", b"first")
    with pytest.raises(Error, match="there is no b"):
        file_in(whole, "b")


@pytest.mark.parametrize("program", ["gzip", "xz", "zstd", "bzip2"])
def test_compressed_archives(program: str, archive: Any, run: Any, tmp_path: Path) -> None:
    if not shutil.which(program):
        run("apt-get", "-q", "install", "-y", program)
    path = archive(("a", b"aaa"))
    (tmp_path / "c").write_bytes(run(program, "-c", path, binary=True))
    with pytest.raises(Error, match=f"compressed with {program}; decompress it first"):
        file_in(tmp_path / "c", "a")


def spans_of(disk: Any) -> Iterator[type]:
    return (type(span) for span in disk.read(0, disk.size))


def test_a_sparse_file_has_zero_spans(tree: Path, tmp_path: Path, run: Any) -> None:
    run("tar", "-Scf", tmp_path / "a.tar", "disk/sparse", cwd=tree)
    kinds = list(spans_of(file_in(tmp_path / "a.tar", "disk/sparse")))
    assert kinds[:4] == [FileSpan, ZeroSpan, FileSpan, ZeroSpan]
