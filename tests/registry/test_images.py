"""Which bytes come of an image, and each place that an image can be in."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Callable

import pytest

from tests.registry import rig

MIB = 1 << 20
Tool = Callable[..., Any]
pytestmark = pytest.mark.usefixtures("own_files")


@pytest.fixture(scope="module")
def pushed(
    host: str, qcow2: Path, raw: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, str]:
    """Images in the registry by what is special about them."""
    layout = rig.Layout(tmp_path_factory.mktemp("layout") / "oci")
    disk = rig.tar(("./disk/downloaded", qcow2.read_bytes()))
    noise = rig.tar(("etc/motd", b"hello\n"))
    for how in "gzip", "zstd", "none":
        layout.image(disk, how=how, tag=how)
    layout.image(rig.tar(("disk/vm.raw", raw.read_bytes())), tag="raw")
    layout.image(noise, disk, rig.tar(("usr/bin/x", b"x" * 5000)), tag="layers", how="none")
    layout.multi(
        layout.image(rig.tar(("disk/arm", b"arm" * 1000)), arch="arm64"),
        layout.image(rig.tar(("disk/intel", b"intel" * 1000)), arch="amd64"),
        tag="multi",
    )
    names = {}
    for tag in "gzip", "zstd", "none", "raw", "layers", "multi":
        names[tag] = f"{host}/k/{tag}:v1"
        rig.skopeo(
            "--all", "--preserve-digests", f"oci:{layout.path}:{tag}", f"docker://{names[tag]}"
        )
    names["docker"] = f"{host}/k/docker:v1"
    rig.skopeo("--format", "v2s2", f"docker://{names['gzip']}", f"docker://{names['docker']}")
    return names


# Which bytes


@pytest.mark.parametrize("image", ["gzip", "zstd", "none", "docker"])
def test_layer_is_the_tar_that_was_pushed(
    image: str, pushed: dict[str, str], written: Tool, qcow2: Path
) -> None:
    assert written(pushed[image]) == rig.tar(("./disk/downloaded", qcow2.read_bytes()))


@pytest.mark.parametrize("image", ["gzip", "zstd", "none", "docker", "layers"])
def test_find_disk_decodes_qcow2(
    image: str, pushed: dict[str, str], written: Tool, raw: Path
) -> None:
    assert written(pushed[image], "--find-disk") == raw.read_bytes()


def test_find_disk_keeps_the_holes_of_a_raw_disk(
    pushed: dict[str, str], cdi: Tool, raw: Path, tmp_path: Path
) -> None:
    cdi(pushed["raw"], "--find-disk", "--to-file", tmp_path / "disk", status=0)
    assert (tmp_path / "disk").read_bytes() == raw.read_bytes()
    assert (tmp_path / "disk").stat().st_blocks * 512 < 8 * MIB


def test_raw_leaves_qcow2_as_it_is(pushed: dict[str, str], written: Tool, qcow2: Path) -> None:
    assert written(pushed["gzip"], "--find-disk", "--raw") == qcow2.read_bytes()


def test_layers_are_counted_from_both_ends(pushed: dict[str, str], written: Tool) -> None:
    first, last = rig.tar(("etc/motd", b"hello\n")), rig.tar(("usr/bin/x", b"x" * 5000))
    assert written(pushed["layers"]) == written(pushed["layers"], "layer=-3") == first
    assert written(pushed["layers"], "layer=2") == written(pushed["layers"], "--layer=-1") == last


@pytest.mark.parametrize("number", ["3", "-4", "x"])
def test_there_is_no_such_layer(number: str, pushed: dict[str, str], cdi: Tool) -> None:
    done = cdi(pushed["layers"], f"layer={number}", "--to-file", "-", status=2)
    assert "layer" in done.stderr


def test_digest_pins_the_image(pushed: dict[str, str], written: Tool, raw: Path, run: Tool) -> None:
    inspected = run("skopeo", "inspect", "--tls-verify=false", f"docker://{pushed['gzip']}")
    digest = json.loads(inspected)["Digest"]
    name = pushed["gzip"].replace(":v1", "")
    assert written(f"{name}@{digest}", "--find-disk") == raw.read_bytes()
    assert written(f"docker://{name}:other@{digest}", "--find-disk") == raw.read_bytes()


@pytest.mark.parametrize(("platform", "word"), [("linux/arm64", b"arm"), ("linux/amd64", b"intel")])
def test_platform_chooses_of_an_index(
    platform: str, word: bytes, pushed: dict[str, str], written: Tool
) -> None:
    options = ("--find-disk", f"--platform={platform}")
    assert written(pushed["multi"], *options) == word * 1000


def test_missing_platform_lists_those_there_are(pushed: dict[str, str], cdi: Tool) -> None:
    done = cdi(pushed["multi"], "--platform=linux/s390x", "--to-file", "-", status=1)
    assert "linux/amd64, linux/arm64" in done.stderr


def test_seed_page_example(pushed: dict[str, str], cdi: Tool, raw: Path, tmp_path: Path) -> None:
    words = ["--filter=qcow2dec", "--filter=tar", "tar-entry=./disk/downloaded"]
    script = f'nbdcopy "$uri" {tmp_path}/copy; nbdinfo "$uri"'
    done = cdi(pushed["docker"], *words, "--run", script, status=0)
    assert "export-size: 16777216 (16M)" in done.stdout and "ext4 filesystem" in done.stdout
    assert (tmp_path / "copy").read_bytes() == raw.read_bytes()


def test_start_up_line_tells_what_is_served(pushed: dict[str, str], serve: Tool) -> None:
    name = pushed["gzip"]
    with serve("cdi", name, "--tls-verify=false") as server:
        assert f"{name}, layer 0 of 1" in server.log() and "--find-disk" in server.log()
    with serve("cdi", name, "--tls-verify=false", "--find-disk") as server:
        assert "disk/downloaded, qcow2" in server.log()
    with serve("cdi", pushed["raw"], "--tls-verify=false", "--find-disk") as server:
        assert "disk/vm.raw, raw" in server.log()


def test_list(pushed: dict[str, str], cdi: Tool) -> None:
    table = cdi(pushed["layers"], "--list", status=0).stdout
    assert "usr/bin/x" in table and "4.9 KiB" in table and "layer 2" in table
    content = json.loads(cdi(pushed["layers"], "--list", "--json", status=0).stdout)
    assert [layer["files"][0]["name"] for layer in content["layers"]] == [
        "etc/motd",
        "./disk/downloaded",
        "usr/bin/x",
    ]
    assert content["layers"][2]["files"] == [{"name": "usr/bin/x", "type": "file", "size": 5000}]
    assert content["platform"] == "linux/amd64"


@pytest.mark.parametrize(
    "words",
    [
        ("--find-disk", "layer=0"),
        ("--raw",),
        ("--platform=linux",),
        ("--retry=x",),
        ("--creds=ann",),
    ],
)
def test_wrong_usage(words: tuple[str, ...], pushed: dict[str, str], cdi: Tool) -> None:
    done = cdi(pushed["gzip"], *words, "--to-file", "-")
    assert done.returncode in (1, 2) and len(done.stderr.splitlines()) == 1
    assert done.stdout == ""


# Where images are


@pytest.mark.slow
def test_buildah_and_podman_agree(
    host: str, qcow2: Path, raw: Path, written: Tool, run: Tool, tmp_path: Path
) -> None:
    name = f"{host}/k/built:v1"
    container = run("buildah", "from", "scratch").strip()
    try:
        run("buildah", "copy", "-q", container, qcow2, "/disk/vm.qcow2")
        run("buildah", "commit", "-q", "--tls-verify=false", container, f"docker://{name}")
    finally:
        run("buildah", "rm", container)
    assert written(name, "--find-disk") == raw.read_bytes()
    run("podman", "pull", "-q", "--tls-verify=false", name)
    try:
        assert written(f"containers-storage:{name}", "--find-disk") == raw.read_bytes()
        run("podman", "save", "-q", "--format", "docker-dir", "-o", tmp_path / "saved", name)
        saved = json.loads((tmp_path / "saved/manifest.json").read_text())
        layer = tmp_path / "saved" / saved["layers"][0]["digest"][7:]
        assert written(name) == written(f"containers-storage:{name}") == layer.read_bytes()
    finally:
        run("podman", "rmi", "-f", name)


def test_zstd_image_in_podmans_storage(
    pushed: dict[str, str], raw: Path, written: Tool, run: Tool
) -> None:
    run("podman", "pull", "-q", "--tls-verify=false", pushed["zstd"])
    try:
        name = f"containers-storage:{pushed['zstd']}"
        assert written(name, "--find-disk") == raw.read_bytes()
    finally:
        run("podman", "rmi", "-f", pushed["zstd"])


@pytest.mark.parametrize("image", ["gzip", "zstd", "layers"])
@pytest.mark.parametrize("transport", ["oci", "oci-archive", "docker-archive", "dir"])
def test_transports(
    transport: str, image: str, pushed: dict[str, str], raw: Path, written: Tool, tmp_path: Path
) -> None:
    if (transport, image) == ("docker-archive", "zstd"):
        image = "docker"  # skopeo can't write the other
    suffix = {"oci": ":v1", "oci-archive": ":v1", "docker-archive": ":k/demo:v1"}.get(transport, "")
    rig.skopeo(f"docker://{pushed[image]}", f"{transport}:{tmp_path}/copy{suffix}")
    assert written(f"{transport}:{tmp_path}/copy", "--find-disk") == raw.read_bytes()
    assert written(f"{transport}:{tmp_path}/copy{suffix}", "layer=-1") == written(
        pushed[image], "layer=-1"
    )


def test_compressed_docker_archive(
    pushed: dict[str, str], raw: Path, written: Tool, run: Tool, tmp_path: Path
) -> None:
    rig.skopeo(f"docker://{pushed['gzip']}", f"docker-archive:{tmp_path}/image.tar")
    run("gzip", tmp_path / "image.tar")
    assert written(f"docker-archive:{tmp_path}/image.tar.gz", "--find-disk") == raw.read_bytes()


@pytest.mark.parametrize("how", ["none", "gzip", "zstd"])
def test_docker_archive_by_its_parts(how: str, written: Tool, cdi: Tool, tmp_path: Path) -> None:
    layer = rig.tar(("disk/vm", b"vm" * 1000))
    config = json.dumps({"os": "linux", "rootfs": {"diff_ids": [rig.digest(layer)]}}).encode()
    content = [{"Config": "c.json", "RepoTags": None, "Layers": ["x/layer.tar"]}]
    members = [("c.json", config), ("manifest.json", json.dumps(content).encode())]
    archive = tmp_path / "image.tar"
    archive.write_bytes(rig.tar(("x/layer.tar", rig.compress(layer, how)), *members))
    assert written(f"docker-archive:{archive}", "--find-disk") == b"vm" * 1000
    assert written(f"docker-archive:{archive}:@0") == layer
    altered = layer.replace(b"vmvm", b"vmwm", 1)
    archive.write_bytes(rig.tar(("x/layer.tar", rig.compress(altered, how)), *members))
    done = cdi(f"docker-archive:{archive}", "--find-disk", "--to-file", "-", status=1)
    assert "altered" in done.stderr and done.stdout == ""


def test_all_platforms_of_a_directory(
    pushed: dict[str, str], written: Tool, tmp_path: Path
) -> None:
    rig.skopeo("--all", f"docker://{pushed['multi']}", f"dir:{tmp_path}/copy")
    found = written(f"dir:{tmp_path}/copy", "--find-disk", "--platform=linux/arm64")
    assert found == b"arm" * 1000


def test_one_of_several_images(raw: Path, written: Tool, cdi: Tool, tmp_path: Path) -> None:
    layout = rig.Layout(tmp_path / "oci")
    layout.image(rig.tar(("disk/a", b"a")), tag="a")
    layout.image(rig.tar(("disk/b", b"b")), tag="b")
    assert written(f"oci:{layout.path}:b", "--find-disk") == b"b"
    for name in f"oci:{layout.path}", f"oci:{layout.path}:c":
        assert "there are a, b" in cdi(name, "--to-file", "-", status=1).stderr


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("oci:/nonexistent", "no such directory"),
        ("dir:/etc", "manifest.json"),
        ("docker-archive:/etc/passwd", "not a tar archive"),
        ("oci-archive:/nonexistent", "No such file"),
        ("containers-storage:no/such/image", "no/such/image"),
        ("docker-daemon:x", "isn't known"),
        ("Host.example/UPPER", "lower case"),
        ("host.example/a:b:c", "can't be part"),
        ("host.example/a@sha256:12", "not a digest"),
        ("127.0.0.1:1/x", "refused"),
    ],
)
def test_bad_names(name: str, said: str, nbdtool: Tool) -> None:
    done = nbdtool("cdi", name, "--retry=0", "--to-file", "-")
    assert done.returncode in (1, 2) and said in done.stderr and done.stdout == ""
