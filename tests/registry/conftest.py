"""What the tests of container images share as fixtures."""

from __future__ import annotations

import random
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Callable

import pytest

from nbdtool.registry import client
from tests.registry import fetching, rig

MIB = 1 << 20
Tool = Callable[..., Any]


@pytest.fixture
def own_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home of the test's own: no login or configuration of this machine's user is seen."""
    for name in (
        "XDG_RUNTIME_DIR", "XDG_CONFIG_HOME", "XDG_CACHE_HOME", "REGISTRY_AUTH_FILE",
        "DOCKER_CONFIG", "CONTAINERS_REGISTRIES_CONF",
    ):  # fmt: skip
        monkeypatch.delenv(name, raising=False)
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    return home


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """TMPDIR."""
    folder = tmp_path / "tmp"
    folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))
    return folder


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """How long the client paused; it takes no time."""
    pauses: list[float] = []
    monkeypatch.setattr(client, "time", types.SimpleNamespace(sleep=pauses.append))
    return pauses


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A real registry of plain HTTP with the image k/disk:v1, its layer not compressed."""
    layout = rig.Layout(tmp_path_factory.mktemp("layout") / "oci")
    layout.image(fetching.LAYER, tag="v1", how="none")
    with rig.registry(tmp_path_factory.mktemp("registry")) as host:
        rig.skopeo("--preserve-digests", f"oci:{layout.path}:v1", f"docker://{host}/k/disk:v1")
        yield host


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> rig.Certificates:
    return rig.Certificates(tmp_path_factory.mktemp("certificates"))


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory, run: Tool) -> Path:
    """A raw disk with a filesystem and some holes."""
    folder = tmp_path_factory.mktemp("raw")
    (folder / "tree").mkdir()
    (folder / "tree/noise").write_bytes(random.Random(1).randbytes(3 * MIB))
    disk = folder / "disk.raw"
    run("mke2fs", "-q", "-F", "-t", "ext4", "-d", folder / "tree", disk, "16M")
    return disk


@pytest.fixture(scope="module")
def qcow2(raw: Path, run: Tool) -> Path:
    target = raw.with_suffix(".qcow2")
    run("qemu-img", "convert", "-O", "qcow2", raw, target)
    return target


@pytest.fixture(scope="module")
def cdi(nbdtool: Tool) -> Tool:
    """cdi(name, ...) -> the CompletedProcess, of an image in a registry without TLS."""

    def cdi(name: str, *args: Any, **kwargs: Any) -> Any:
        return nbdtool("cdi", name, "--tls-verify=false", *args, **kwargs)

    return cdi


@pytest.fixture
def written(cdi: Tool, tmp_path: Path) -> Callable[..., bytes]:
    """The bytes that --to-file writes."""

    def written(name: str, *args: Any, **kwargs: Any) -> bytes:
        target = tmp_path / "written"
        target.unlink(missing_ok=True)
        cdi(name, *args, "--to-file", target, status=0, **kwargs)
        return target.read_bytes()

    return written
