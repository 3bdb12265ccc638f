"""Manifests, indexes and configurations that are not what they should be, and hostile layers."""

from __future__ import annotations

import gzip
import json
import tarfile
from pathlib import Path
from typing import Any, Callable

import pytest

from nbdtool import zstd
from nbdtool.errors import Error
from nbdtool.registry import contents, decompress, fetch, finder, manifest, sources
from nbdtool.registry.manifest import Platform
from nbdtool.registry.spool import Spool
from tests.registry import rig

MIB = 1 << 20
TAR = rig.tar(("disk/vm", b"disk" * 1000))
GIB = 1 << 30
pytestmark = pytest.mark.usefixtures("own_files", "temporary")


@pytest.fixture
def layout(tmp_path: Path) -> rig.Layout:
    return rig.Layout(tmp_path / "oci")


def opened(layout: rig.Layout, platform: str = "linux/amd64") -> Any:
    name = f"oci:{layout.path}"
    return sources.open_image(name, Platform.parse(platform), sources.Options())


def disk(layout: rig.Layout, max_size: int | None = None) -> bytes:
    source, image = opened(layout)
    found = finder.find_disk(source, image, max_size)
    data = b"".join(
        bytes(piece) if isinstance(piece, (bytes, memoryview)) else piece.file.pread(*piece[1:])
        for piece in found.read(0, found.size)
    )
    found.close()
    return data


def why(action: Callable[..., object], *args: Any) -> str:
    with pytest.raises(Error) as caught:
        action(*args)
    return str(caught.value)


def test_good_image(layout: rig.Layout) -> None:
    layout.image(TAR, tag="v1")
    assert disk(layout) == b"disk" * 1000


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"manifests": []}, "is an index too"),
        ({"schemaVersion": 1}, "schema 1"),
        ({"schemaVersion": "2"}, "not the manifest"),
        ({"mediaType": f"{rig.OCI}index.v1+json"}, "is not the"),
        ({"layers": None}, "no list of layers"),
        ({"layers": [{}] * 5000}, "no list of layers"),
        ({"layers": ["x"]}, "no descriptor"),
        ({"layers": [{"digest": "sha256:../../../etc/passwd", "size": 1}]}, "digest"),
        ({"layers": [{"digest": "md5:" + "0" * 32, "size": 1}]}, "digest"),
        ({"layers": [{"digest": "sha256:" + "A" * 64, "size": 1}]}, "digest"),
        ({"layers": [{"digest": "sha256:" + "0" * 64, "size": -1}]}, "size -1"),
        ({"layers": [{"digest": "sha256:" + "0" * 64, "size": True}]}, "size True"),
        ({"layers": [{"digest": "sha256:" + "0" * 64, "size": 1e3}]}, "size 1000.0"),
        ({"layers": [{"digest": "sha256:" + "0" * 64}]}, "size None"),
        ({"layers": []}, "0 to -1|has 1 layers, the manifest has 0"),
        ({"config": None}, "no descriptor"),
    ],
)
def test_bad_manifests(changes: dict[str, Any], said: str, layout: rig.Layout) -> None:
    layout.image(TAR, tag="v1", **changes)
    assert any(word in why(opened, layout) for word in said.split("|"))


@pytest.mark.parametrize(
    "data", [b"", b"[]", b"nonsense", b"\xff\xfe", b"[" * 100_000, b'{"a":' * 100_000]
)
def test_documents_that_are_not_json(data: bytes, layout: rig.Layout) -> None:
    layout.name(layout.blob(data, f"{rig.OCI}manifest.v1+json"), "v1")
    assert "not a JSON object" in why(opened, layout)


def test_altered_manifest(layout: rig.Layout) -> None:
    entry = layout.image(TAR, tag="v1")
    path = layout.path / "blobs/sha256" / entry["digest"][7:]
    path.write_bytes(path.read_bytes().replace(b"schemaVersion", b"schemaversion"))
    assert "altered" in why(opened, layout)


def test_manifest_of_another_size_than_its_index_says(layout: rig.Layout) -> None:
    entry = layout.image(TAR)
    layout.name({**entry, "size": entry["size"] + 1}, "v1")
    assert "its index says" in why(opened, layout)


def test_document_that_is_too_long(layout: rig.Layout) -> None:
    layout.image(TAR, tag="v1", annotations={"x": "x" * 5 * MIB})
    assert "too long" in why(opened, layout) or "4 MiB" in why(opened, layout)


def test_indexes_within_indexes_end(layout: rig.Layout) -> None:
    entry = layout.image(TAR)
    platform = entry["platform"]
    for _ in range(5):
        entry = {**layout.multi(entry, tag=""), "platform": platform}
    layout.name(entry, "v1")
    assert "indexes within indexes" in why(opened, layout)


def test_attestations_are_not_platforms(layout: rig.Layout) -> None:
    entry = layout.image(TAR)
    other = {**layout.image(rig.tar()), "platform": {"os": "unknown", "architecture": "unknown"}}
    layout.multi(other, entry, tag="v1")
    assert disk(layout) == b"disk" * 1000
    assert why(opened, layout, "linux/s390x").endswith(
        "but for linux/amd64; choose with --platform"
    )


def test_variants(layout: rig.Layout) -> None:
    entries = []
    for variant in "v6", "v7":
        entry = layout.image(rig.tar(("disk/x", variant.encode())))
        platform = {"os": "linux", "architecture": "arm", "variant": variant}
        entries.append({**entry, "platform": platform})
    layout.multi(*entries, tag="v1")
    assert opened(layout, "linux/arm/v7")[1].digest == entries[1]["digest"]
    assert opened(layout, "linux/arm")[1].digest == entries[0]["digest"]
    assert "linux/arm/v6, linux/arm/v7" in why(opened, layout, "linux/arm/v8")


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"rootfs": []},
        {"rootfs": {"diff_ids": ["sha256:x"]}},
        {"rootfs": {"diff_ids": []}},
        {"rootfs": {"diff_ids": [rig.digest(b"")] * 2}},
    ],
)
def test_bad_configurations(config: dict[str, Any], layout: rig.Layout) -> None:
    made = layout.document(config, f"{rig.OCI}config.v1+json")
    layout.image(TAR, tag="v1", config=made)
    assert "the configuration has" in why(opened, layout)


def test_unpacked_layer_must_have_its_diff_id(layout: rig.Layout) -> None:
    root = {"type": "layers", "diff_ids": [rig.digest(b"other")]}
    config = layout.document({"rootfs": root, "os": "linux"}, f"{rig.OCI}config.v1+json")
    layout.image(TAR, tag="v1", config=config)
    text = why(disk, layout)
    assert "unpacked" in text and "altered" in text


def test_artifact_without_an_image_configuration(layout: rig.Layout) -> None:
    config = layout.blob(b"{}", "application/vnd.oci.empty.v1+json")
    layout.image(TAR, tag="v1", config=config)
    assert disk(layout) == b"disk" * 1000


@pytest.mark.parametrize(
    "kind",
    [f"{rig.OCI}layer.nondistributable.v1.tar", f"{rig.DOCKER}image.rootfs.foreign.diff.tar"],
)
def test_layers_of_other_servers_are_not_fetched(kind: str, layout: rig.Layout) -> None:
    descriptor, _ = layout.layer(TAR)
    descriptor = {**descriptor, "mediaType": kind, "urls": ["http://127.0.0.1:1/x"]}
    layout.image(TAR, tag="v1", layers=[descriptor])
    assert "another server" in why(disk, layout)


# Layers


def packed(layout: rig.Layout, data: bytes, unpacked: bytes) -> rig.Layout:
    """An image whose layer is `data` as it is."""
    descriptor = layout.blob(data, f"{rig.OCI}layer.v1.tar+gzip")
    layout.image(unpacked, tag="v1", layers=[descriptor])
    return layout


def test_gzip_of_several_members(layout: rig.Layout) -> None:
    data = b"".join(gzip.compress(TAR[at : at + 700]) for at in range(0, len(TAR), 700))
    assert disk(packed(layout, data, TAR)) == b"disk" * 1000


@pytest.mark.parametrize("module", ["backports.zstd", "zstandard", "library", "program"])
def test_zstd_of_several_frames(
    module: str, layout: rig.Layout, monkeypatch: pytest.MonkeyPatch
) -> None:
    backends = {
        "backports.zstd": lambda: zstd._python("backports.zstd"),
        "zstandard": zstd._zstandard,
        "library": zstd._library,
        "program": zstd._program,
    }
    monkeypatch.setattr(zstd, "_BACKENDS", (backends[module],))
    zstd._find.cache_clear()
    try:
        ends = [0, 100, 700, 2000, len(TAR)]
        pieces = [TAR[start:end] for start, end in zip(ends, ends[1:])]
        data = b"".join(rig.compress(piece, "zstd") for piece in pieces)
        data += b"\x50\x2a\x4d\x18" + bytes((9, 0, 0, 0)) + b"skippable"
        assert disk(packed(layout, data, TAR)) == b"disk" * 1000
    finally:
        zstd._find.cache_clear()


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda data: data[:-1], "ends in the middle"),
        (lambda data: data[:20], "ends in the middle"),
        (lambda data: data + b"rubbish", "damaged"),
        (lambda data: data[:-8] + bytes(8), "damaged"),
        (lambda data: b"BZh9" + data, "bzip2"),
        (lambda data: b"\xfd7zXZ\0" + data, "xz"),
        (lambda data: b"", "altered"),
    ],
)
def test_damaged_gzip(spoil: Any, said: str, layout: rig.Layout) -> None:
    assert said in why(disk, packed(layout, spoil(gzip.compress(TAR)), TAR))


@pytest.mark.parametrize("cut", [1, 3, 100])
def test_damaged_zstd(cut: int, layout: rig.Layout) -> None:
    data = rig.compress(TAR, "zstd")[:-cut]
    assert "layer 0" in why(disk, packed(layout, data, TAR))


@pytest.mark.parametrize("name", ["isal.isal_zlib", "zlib_ng.zlib_ng"])
def test_faster_modules_are_used_where_they_are(
    name: str, layout: rig.Layout, monkeypatch: pytest.MonkeyPatch
) -> None:
    import types
    import zlib

    used = []
    module = types.SimpleNamespace(
        decompressobj=lambda bits: used.append(1) or zlib.decompressobj(bits)
    )
    real = decompress.importlib.import_module

    def imported(wanted: str) -> Any:
        if wanted == name:
            return module
        if wanted in ("isal.isal_zlib", "zlib_ng.zlib_ng"):
            raise ImportError
        return real(wanted)

    monkeypatch.setattr(decompress.importlib, "import_module", imported)
    layout.image(TAR, tag="v1")
    assert disk(layout) == b"disk" * 1000 and used


def lying_tar(size: int) -> bytes:
    """A tar archive that ends where a member of `size` bytes should begin."""
    info = tarfile.TarInfo("disk/bomb")
    info.size = size
    return info.tobuf(tarfile.GNU_FORMAT) + bytes(1024)


@pytest.mark.parametrize("size", [1 << 50, 1 << 62])
def test_bigger_than_the_disk_is_refused_before_it_is_spooled(
    size: int, layout: rig.Layout, temporary: Path
) -> None:
    layout.image(lying_tar(size), tag="v1")
    text = why(disk, layout)
    assert "TMPDIR" in text and "free" in text


def test_archive_that_is_cut_off(layout: rig.Layout) -> None:
    layout.image(lying_tar(1 << 20), tag="v1")
    assert "cut off" in why(disk, layout)


def test_max_size(layout: rig.Layout) -> None:
    layout.image(TAR, tag="v1")
    assert disk(layout, 4000) == b"disk" * 1000
    assert "--max-size" in why(disk, layout, 3999)
    source, image = opened(layout)
    assert fetch.spool_layer(source, image, 0, len(TAR)).size == len(TAR)
    assert "--max-size" in why(fetch.spool_layer, source, image, 0, len(TAR) - 1)


@pytest.mark.slow
def test_gigabytes_of_zeroes_take_no_space(layout: rig.Layout) -> None:
    info = tarfile.TarInfo("disk/zeroes")
    info.size = GIB // 4
    layout.image(info.tobuf(tarfile.GNU_FORMAT) + bytes(info.size + 1024), tag="v1")
    source, image = opened(layout)
    for found in (
        finder.find_disk(source, image, None),
        fetch.spool_layer(source, image, 0, None),
    ):
        assert found.size >= info.size
        states = list(found.extents(0, found.size))
        assert sum(extent.length for extent in states if extent.state) >= info.size - MIB
        found.close()


def test_full_filesystem(layout: rig.Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", "/dev/full")
    layout.image(TAR, tag="v1")
    assert "TMPDIR" in why(disk, layout)


def test_names_cannot_talk_to_the_terminal(layout: rig.Layout) -> None:
    layout.image(rig.tar(("disk/\x1b[31mred\nx", b"x"), ("disk/b", b"b")), tag="v1")
    source, image = opened(layout)
    table = contents.listing(source, image, as_json=False)
    assert "\x1b" not in table and r"disk/\x1b[31mred\nx" in table
    content = json.loads(contents.listing(source, image, as_json=True))
    assert content["layers"][0]["files"][0]["name"] == "disk/\x1b[31mred\nx"


def test_listing_is_bounded(layout: rig.Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    layout.image(rig.tar(*((f"{n}", b"") for n in range(20))), tag="v1")
    source, image = opened(layout)
    monkeypatch.setattr(contents, "_MAX_ENTRIES", 19)
    assert "too many" in why(lambda: contents.listing(source, image, as_json=False))


def test_whiteouts_are_bounded(layout: rig.Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    layout.image(rig.tar(*((f"disk/.wh.{n}", b"") for n in range(20))), tag="v1")
    monkeypatch.setattr(finder, "_MAX_ENTRIES", 19)
    assert "too many" in why(disk, layout)


def test_spool_keeps_what_is_written(temporary: Path) -> None:
    spool = Spool("x")
    pieces = [(0, b"a" * 70000), (100_000, bytes(200_000) + b"b"), (1 << 33, b"\0" * 65536 + b"c")]
    for offset, data in pieces:
        spool.write(offset, data)
    found = spool.disk((1 << 33) + 100_000, "x")
    for offset, data in [*pieces, (70000, bytes(30000)), ((1 << 33) + 65537, bytes(10))]:
        (span,) = found.read(offset, len(data))
        assert span.file.pread(span.offset, span.length) == data  # type: ignore[union-attr]
    assert rig.left_behind(temporary) == []


def test_platform_of_this_machine() -> None:
    assert manifest.Platform.host().os == "linux" and manifest.Platform.host().architecture
