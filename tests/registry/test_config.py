"""Image names and registries.conf, as podman reads them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from nbdtool.errors import Error
from nbdtool.registry import config, reference
from nbdtool.registry.reference import parse
from tests.registry.rig import write

HEX = "0123456789abcdef" * 4


@pytest.fixture(autouse=True)
def home(own_files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home of the test's own, and no files of the system."""
    monkeypatch.setattr(config, "_SYSTEM", tmp_path / "etc/registries.conf")
    monkeypatch.setattr(config, "_cache", lambda: tmp_path / "cache/short-name-aliases.conf")
    return own_files


# Names


@pytest.mark.parametrize(
    ("text", "full"),
    [
        ("fedora", "docker.io/library/fedora:latest"),
        ("kubevirt/demo:v1", "docker.io/kubevirt/demo:v1"),
        ("docker.io/fedora", "docker.io/library/fedora:latest"),
        ("index.docker.io/a/b", "docker.io/a/b:latest"),
        ("localhost/a", "localhost/a:latest"),
        ("localhost:5000/a:5000", "localhost:5000/a:5000"),
        ("quay.io/a/b/c_d/e__f/g-.-h", None),
        ("quay.io/a/b/c_d/e__f/g--h", "quay.io/a/b/c_d/e__f/g--h:latest"),
        (f"quay.io/a@sha256:{HEX}", f"quay.io/a@sha256:{HEX}"),
        (f"quay.io/a:tag@sha256:{HEX}", f"quay.io/a@sha256:{HEX}"),
        ("[::1]:5000/a", "[::1]:5000/a:latest"),
        ("Quay.io/a", "Quay.io/a:latest"),
        ("quay.io/A", None),
        ("quay.io/../a", None),
        ("quay.io//a", None),
        ("quay.io/a:", None),
        ("quay.io/a:.x", None),
        (f"quay.io/a:{'x' * 129}", None),
        (f"quay.io/{'x' * 256}", None),
        (f"quay.io/a@sha256:{HEX[:-1]}", None),
        ("quay.io/a@md5:" + HEX[:32], None),
        ("quay.io/a b", None),
        ("quay.io/a\n", None),
        ("quay.io:x/a", None),
        ("-quay.io/a", None),
        ("", None),
    ],
)
def test_names(text: str, full: str | None) -> None:
    if full is None:
        with pytest.raises(Error):
            parse(text)
    else:
        assert str(parse(text)) == full


def test_long_names_are_read_quickly() -> None:
    for text in "a" * 100_000, "a-" * 50_000, "a/" * 50_000, "a" * 1000 + "!", "a." * 20_000:
        with pytest.raises(Error):
            reference.parse(text + "/b")


# registries.conf


def names(text: str) -> list[str]:
    return [str(found) for found in config.load().candidates(text)]


def places(text: str) -> list[tuple[str, bool]]:
    registries = config.load()
    (found,) = registries.candidates(text)
    return [(str(place.reference), place.insecure) for place in registries.endpoints(found)]


def test_short_names_without_any_file() -> None:
    assert names("demo:v1") == ["docker.io/library/demo:v1"]
    assert names("docker://demo") == ["docker.io/library/demo:latest"]


def test_search_list_and_aliases(tmp_path: Path) -> None:
    write(
        tmp_path / "etc/registries.conf",
        'unqualified-search-registries = ["one.test", "two.test"]\n'
        '[aliases]\n"demo" = "three.test/k/demo"\n"a/b" = "three.test/ab"\n',
    )
    assert names("other") == ["one.test/other:latest", "two.test/other:latest"]
    assert names("demo:v1") == ["three.test/k/demo:v1"]
    assert names(f"a/b@sha256:{HEX}") == [f"three.test/ab@sha256:{HEX}"]
    assert names("docker://demo") == ["docker.io/library/demo:latest"]
    assert names("four.test/demo") == ["four.test/demo:latest"]
    write(tmp_path / "cache/short-name-aliases.conf", '[aliases]\n"demo" = "five.test/demo"\n')
    assert names("demo") == ["five.test/demo:latest"]


def test_enforcing_asks_which(tmp_path: Path) -> None:
    path = tmp_path / "etc/registries.conf"
    text = 'short-name-mode = "enforcing"\nunqualified-search-registries = ["one.test"]\n'
    write(path, text)
    assert names("demo") == ["one.test/demo:latest"]
    write(path, text.replace("]", ', "two.test"]'))
    with pytest.raises(Error, match=r"one\.test/demo, two\.test/demo"):
        names("demo")


def test_drop_ins_come_later_and_a_users_file_replaces_the_systems(
    tmp_path: Path, home: Path
) -> None:
    search = 'unqualified-search-registries = ["{}"]\n'
    write(tmp_path / "etc/registries.conf", search.format("a.test"))
    assert names("x") == ["a.test/x:latest"]
    write(tmp_path / "etc/registries.conf.d/2.conf", search.format("c.test"))
    write(tmp_path / "etc/registries.conf.d/1.conf", search.format("b.test"))
    write(tmp_path / "etc/registries.conf.d/3.txt", "nonsense")
    assert names("x") == ["c.test/x:latest"]
    write(home / ".config/containers/registries.conf.d/0.conf", search.format("d.test"))
    assert names("x") == ["d.test/x:latest"]
    write(home / ".config/containers/registries.conf", search.format("e.test"))
    (home / ".config/containers/registries.conf.d/0.conf").unlink()
    assert names("x") == ["e.test/x:latest"]


def test_environment_names_another_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "my.conf", 'unqualified-search-registries = ["my.test"]')
    monkeypatch.setenv("CONTAINERS_REGISTRIES_CONF", str(path))
    assert names("x") == ["my.test/x:latest"]


REGISTRIES = """
[[registry]]
location = "one.test"
insecure = true

[[registry]]
prefix = "one.test/special"
location = "two.test:5000/deep"

[[registry]]
prefix = "*.wild.test"
insecure = true

[[registry]]
prefix = "bad.test/ns"
blocked = true

[[registry]]
location = "far.test"
[[registry.mirror]]
location = "near.test/copy"
insecure = true
[[registry.mirror]]
location = "digests.test"
pull-from-mirror = "digest-only"
[[registry.mirror]]
location = "tags.test"
pull-from-mirror = "tag-only"
"""


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("one.test/a", [("one.test/a:latest", True)]),
        ("one.test/special/a:v1", [("two.test:5000/deep/a:v1", False)]),
        ("one.test/specially", [("one.test/specially:latest", True)]),
        ("one.test.evil.test/a", [("one.test.evil.test/a:latest", False)]),
        ("a.wild.test/a", [("a.wild.test/a:latest", True)]),
        ("wild.test/a", [("wild.test/a:latest", False)]),
        ("bad.test/nsx/a", [("bad.test/nsx/a:latest", False)]),
        ("bad.test/ns/a", "blocks bad.test/ns"),
        (
            "far.test/a:v1",
            [("near.test/copy/a:v1", True), ("tags.test/a:v1", False), ("far.test/a:v1", False)],
        ),
        (
            f"far.test/a@sha256:{HEX}",
            [
                (f"near.test/copy/a@sha256:{HEX}", True),
                (f"digests.test/a@sha256:{HEX}", False),
                (f"far.test/a@sha256:{HEX}", False),
            ],
        ),
    ],
)
def test_where_a_registry_is(text: str, expected: Any, tmp_path: Path) -> None:
    write(tmp_path / "etc/registries.conf", REGISTRIES)
    if isinstance(expected, str):
        with pytest.raises(Error, match=expected):
            places(text)
    else:
        assert places(text) == expected


def test_a_later_file_replaces_the_table_of_a_prefix(tmp_path: Path) -> None:
    write(tmp_path / "etc/registries.conf", REGISTRIES)
    later = '[[registry]]\nlocation = "bad.test/ns"\n'
    write(tmp_path / "etc/registries.conf.d/x.conf", later)
    assert places("bad.test/ns/a") == [("bad.test/ns/a:latest", False)]


def test_mirror_by_digest_only(tmp_path: Path) -> None:
    text = '[[registry]]\nlocation="a.test"\nmirror-by-digest-only=true\n'
    write(tmp_path / "etc/registries.conf", text + '[[registry.mirror]]\nlocation="m.test"\n')
    assert places("a.test/x") == [("a.test/x:latest", False)]
    assert len(places(f"a.test/x@sha256:{HEX}")) == 2


@pytest.mark.parametrize(
    "text",
    [
        "= 1",
        "[[registry]]\ninsecure = true",
        '[[registry]]\nlocation = "a"\n[[registry.mirror]]\ninsecure = true',
        "unqualified-search-registries = 5",
        "unqualified-search-registries = [5]",
        "registry = 5",
        "[aliases]\na = 5",
        '[[registry]]\nlocation = "a"\nmirror = [5]',
    ],
)
def test_bad_files_are_named(text: str, tmp_path: Path) -> None:
    path = write(tmp_path / "etc/registries.conf", text)
    with pytest.raises(Error, match=str(path)):
        config.load()
