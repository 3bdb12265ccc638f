"""Images that name files of the host: none of their bytes are ever served."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

MIB = 1 << 20
MARK = b"only the host may know this: 7c4b90aa."

BACKING = {
    "absolute": "{secret}",
    "relative": "secret",
    "upwards": "../{directory}/secret",
    "json": 'json:{{"driver":"raw","file":{{"driver":"file","filename":"{secret}"}}}}',
    "file": "file:{secret}",
    "nbd": "nbd+unix:///?socket={secret}",
}

KINDS = [*BACKING, "data", "data-relative"]


@pytest.fixture(scope="module")
def secret(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("hostile") / "secret"
    path.write_bytes((MARK + b"\n") * (MIB // (len(MARK) + 1)) + b"\n" * 40)
    return path


@pytest.fixture(scope="module")
def hostile(secret: Path, run: Callable[..., Any]) -> dict[str, Path]:
    """Images by what is wrong with them; qemu serves the secret for some."""
    made = {}
    for kind, name in BACKING.items():
        made[kind] = path = secret.parent / f"{kind}.img"
        name = name.format(secret=secret, directory=secret.parent.name)
        run("qemu-img", "create", "-q", "-f", "qcow2", "-u", "-b", name, "-F", "raw", path, "1M")
    for kind, name in (("data", str(secret)), ("data-relative", "secret")):
        made[kind] = path = secret.parent / f"{kind}.img"
        other = secret.parent / "other"
        options = f"data_file={other},data_file_raw=on"
        run("qemu-img", "create", "-q", "-f", "qcow2", "-o", options, path, "1M")
        run("qemu-img", "amend", "-f", "qcow2", "-o", f"data_file={name}", path)
    return made


def test_qemu_would_serve_it(hostile: dict[str, Path], run: Any, tmp_path: Path) -> None:
    for kind in hostile.keys() - {"nbd"}:
        out = tmp_path / "out"
        words = ("qemu-img", "convert", "-f", "qcow2", "-O", "raw")
        run(*words, hostile[kind], out, cwd=hostile[kind].parent)
        assert MARK in out.read_bytes(), kind


@pytest.mark.parametrize(
    ("kind", "way"),
    [*((kind, "auto") for kind in KINDS), ("absolute", "only"), ("data", "only"),
     ("absolute", "never"), ("data", "never")],
)  # fmt: skip
def test_refused_without_a_format(
    kind: str, way: str, hostile: dict[str, Path], nbdtool: Any, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    words = ["guestfs", "-r", f"disk={hostile[kind]}", "export=/dev/sda", f"--direct={way}"]
    done = nbdtool(*words, "--to-file", out, status=1)
    assert done.stderr.count("\n") == 1
    assert "format=raw" in done.stderr and "format=qcow2" in done.stderr
    assert not out.exists()


@pytest.mark.parametrize("kind", ["json", "file", "nbd", "data-relative"])
def test_refused_even_if_trusted(
    kind: str, hostile: dict[str, Path], nbdtool: Any, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    words = ["guestfs", "-r", "format=qcow2", f"disk={hostile[kind]}", "export=/dev/sda"]
    done = nbdtool(*words, "--to-file", out, status=1)
    assert "only files are opened" in done.stderr or "only an absolute" in done.stderr
    assert not out.exists()


@pytest.mark.parametrize("kind", KINDS)
def test_raw_is_the_image_itself(
    kind: str, hostile: dict[str, Path], nbdtool: Any, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    words = ["guestfs", "-r", "format=raw", f"disk={hostile[kind]}", "export=/dev/sda"]
    nbdtool(*words, "--direct=only", "--to-file", out, status=0)
    assert out.read_bytes() == padded(hostile[kind])
    assert MARK not in out.read_bytes()


def padded(image: Path) -> bytes:
    data = image.read_bytes()
    return data + bytes(-len(data) % 512)


@pytest.mark.slow
def test_raw_is_the_image_itself_in_the_appliance(
    hostile: dict[str, Path], serve: Any, run: Any, tmp_path: Path
) -> None:
    environment = os.environ | {
        "LIBGUESTFS_BACKEND": "direct",
        "LIBGUESTFS_BACKEND_SETTINGS": "force_tcg",
    }
    words = ["guestfs", "-r", "--direct=never", "format=raw"]
    words += [f"disk={path}" for path in hostile.values()]
    with serve(*words, env=environment) as server:
        for letter, path in zip("abcdefghij", hostile.values()):
            out = tmp_path / "out"
            uri = server.uri.replace("nbd+unix:///", f"nbd+unix:////dev/sd{letter}")
            run("nbdcopy", uri, out)
            assert out.read_bytes() == padded(path)
            out.unlink()


def test_links_in_an_image_lead_nowhere_else(
    secret: Path, nbdtool: Any, run: Any, tmp_path: Path
) -> None:
    tree, image, out = tmp_path / "tree", tmp_path / "image", tmp_path / "out"
    tree.mkdir()
    (tree / "link").symlink_to(secret)
    (tree / "up").symlink_to("../" * 20 + str(secret)[1:])
    image.write_bytes(bytes(8 * MIB))
    run("mke2fs", "-q", "-t", "ext4", "-d", tree, image)
    for name in "link", "up", f"../../../../../..{secret}":
        words = ["guestfs", "-r", f"disk={image}", "mount=/dev/sda", f"export=/{name}"]
        nbdtool(*words, "--direct=only", "--to-file", out, status=1)
        assert not out.exists()
