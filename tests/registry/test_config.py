"""Names, registries.conf, logins and policies, as podman reads them."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pytest

from nbdtool.errors import Error
from nbdtool.registry import config, credentials, policy, reference
from nbdtool.registry.credentials import Login
from nbdtool.registry.reference import parse

HEX = "0123456789abcdef" * 4


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home of the test's own, and no files of the system."""
    folder = tmp_path / "home"
    folder.mkdir()
    monkeypatch.setenv("HOME", str(folder))
    for name in (
        "XDG_RUNTIME_DIR", "XDG_CONFIG_HOME", "XDG_CACHE_HOME", "REGISTRY_AUTH_FILE",
        "DOCKER_CONFIG", "CONTAINERS_REGISTRIES_CONF",
    ):  # fmt: skip
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(config, "_SYSTEM", tmp_path / "etc/registries.conf")
    monkeypatch.setattr(config, "_cache", lambda: tmp_path / "cache/short-name-aliases.conf")
    monkeypatch.setattr(policy, "_FILES", (Path("~/policy.json"), tmp_path / "etc/policy.json"))
    return folder


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


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


# Logins


def auth(user: str, password: str = "secret") -> dict[str, str]:
    return {"auth": base64.b64encode(f"{user}:{password}".encode()).decode()}


def auths(path: Path, **entries: Any) -> Path:
    return write(path, json.dumps({"auths": entries}))


def find(text: str = "h.test/ns/img", authfile: Path | None = None) -> Login | None:
    name = str(authfile) if authfile else None
    return credentials.find(parse(text), name, ["containers-auth.json"])


def test_first_file_that_has_the_registry(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "run"))
    files = [
        auths(home / ".docker/config.json", **{"h.test": auth("docker")}),
        auths(home / ".config/containers/auth.json", **{"h.test": auth("config")}),
        auths(tmp_path / "run/containers/auth.json", **{"h.test": auth("run")}),
    ]
    legacy = write(home / ".dockercfg", json.dumps({"h.test": auth("legacy")}))
    for path in [*reversed(files), legacy]:
        login = find()
        assert login and login.source == str(path) and login.password == "secret"
        path.unlink()
    assert find() is None
    variable = auths(tmp_path / "variable.json", **{"other.test": auth("variable")})
    auths(home / ".docker/config.json", **{"h.test": auth("docker")})
    monkeypatch.setenv("REGISTRY_AUTH_FILE", str(variable))
    assert find() is None
    given = auths(tmp_path / "given.json", **{"h.test": auth("given")})
    login = find(authfile=given)
    assert login and login.user == "given"
    with pytest.raises(Error, match="--authfile"):
        find(authfile=tmp_path / "missing.json")


def test_most_specific_key(tmp_path: Path) -> None:
    path = auths(
        tmp_path / "auth.json",
        **{"h.test": auth("host"), "h.test/ns": auth("ns"), "h.test/ns/img": auth("img")},
    )
    for name, user in (("ns/img", "img"), ("ns/other", "ns"), ("nsx/img", "host")):
        login = find(f"h.test/{name}", path)
        assert login and login.user == user
    assert find("other.test/ns/img", path) is None


def test_keys_as_docker_writes_them(tmp_path: Path) -> None:
    path = auths(
        tmp_path / "auth.json",
        **{"https://index.docker.io/v1/": auth("hub"), "https://h.test/v2/": auth("h")},
    )
    hub, other = find("fedora", path), find(authfile=path)
    assert hub and hub.user == "hub" and other and other.user == "h"
    assert hub.basic == "Basic " + auth("hub")["auth"]


def test_password_with_colons(tmp_path: Path) -> None:
    login = find(authfile=auths(tmp_path / "a.json", **{"h.test": auth("u", "a:b:c")}))
    assert login and (login.user, login.password) == ("u", "a:b:c")


def helper(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    """docker-credential-test, which is told the registry on standard input."""
    program = write(tmp_path / "bin/docker-credential-test", f"#!/bin/sh\nread host\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:/usr/bin:/bin")


def test_credential_helpers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answer = """echo "{\\"Username\\": \\"$1\\", \\"Secret\\": \\"$host\\"}" """
    helper(tmp_path, monkeypatch, answer)
    by_host = {"auths": {"h.test": auth("file")}, "credHelpers": {"h.test": "test"}}
    path = write(tmp_path / "auth.json", json.dumps(by_host))
    assert find(authfile=path) == ("get", "h.test", "docker-credential-test", "")
    path = write(tmp_path / "auth.json", json.dumps({"credsStore": "test"}))
    found = find("fedora", path)
    assert found and found.password == "https://index.docker.io/v1/"
    login = credentials.find(parse("h.test/a"), None, ["test", "containers-auth.json"])
    assert login and login.user == "get"


@pytest.mark.parametrize(
    ("script", "said"),
    [
        ("echo credentials not found in native keychain; exit 1", None),
        ("echo it is locked; exit 1", "it is locked"),
        ("echo nonsense", "not JSON"),
        ("echo '{}'", "not JSON"),
        ("exit 3", "exit status 3"),
    ],
)
def test_helper_that_has_nothing(
    script: str, said: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    helper(tmp_path, monkeypatch, script)
    path = write(tmp_path / "auth.json", json.dumps({"credHelpers": {"h.test": "test"}}))
    if said is None:
        assert find(authfile=path) is None
    else:
        with pytest.raises(Error, match=said):
            find(authfile=path)


@pytest.mark.parametrize("name", ["../../bin/sh", "missing", "", "-x", 5, "a b"])
def test_bad_helper_names(name: Any, tmp_path: Path) -> None:
    path = write(tmp_path / "auth.json", json.dumps({"credHelpers": {"h.test": name}}))
    if name == "":
        assert find(authfile=path) is None
        return
    with pytest.raises(Error, match=r"helper|isn't installed"):
        find(authfile=path)


@pytest.mark.parametrize(
    "text", ["[]", "x", '{"auths": {"h.test": {"auth": "%%"}}}', "[" * 100_000]
)
def test_bad_authfiles(text: str, tmp_path: Path) -> None:
    path = write(tmp_path / "auth.json", text)
    with pytest.raises(Error, match=str(path)):
        find(authfile=path)


@pytest.mark.parametrize("text", ['{"auths": {"h.test": {}}}', '{"auths": []}', "{}"])
def test_authfiles_without_a_login(text: str, tmp_path: Path) -> None:
    assert find(authfile=write(tmp_path / "auth.json", text)) is None


# policy.json

ACCEPT, REJECT = [{"type": "insecureAcceptAnything"}], [{"type": "reject"}]
SIGNED = [{"type": "signedBy", "keyType": "GPGKeys", "keyPath": "/k"}]


def verdict(document: Any, name: str, transport: str = "docker", unsigned: bool = False) -> str:
    """ "" if the policy lets us use the image."""
    write(Path("~/policy.json").expanduser(), json.dumps(document))
    try:
        found = parse(name) if transport == "docker" else name
        policy.check(transport, found, unsigned=unsigned)
    except Error as exc:
        return str(exc)
    return ""


def test_policy_scopes() -> None:
    document = {
        "default": REJECT,
        "transports": {
            "docker": {
                "h.test": ACCEPT,
                "h.test/ns": REJECT,
                "h.test/ns/good": ACCEPT,
                "h.test/ns/good:bad": REJECT,
                "*.wild.test": ACCEPT,
            },
            "oci": {"": ACCEPT, "/srv": REJECT},
        },
    }
    for name in "h.test/a", "h.test/ns/good:v1", "a.b.wild.test/x":
        assert verdict(document, name) == "", name
    for name in "h.test/ns/a", "h.test/ns/good:bad", "wild.test/x", "other.test/a":
        assert "rejects it" in verdict(document, name), name
        assert "rejects it" in verdict(document, name, unsigned=True), name
    assert verdict(document, "/var/oci", "oci") == ""
    assert "rejects it" in verdict(document, "/srv/oci", "oci")
    assert "rejects it" in verdict(document, "/var/dir", "dir")


def test_signatures_are_not_ignored() -> None:
    for kind in SIGNED, [{"type": "sigstoreSigned"}], ACCEPT + SIGNED, [{}], ["x"]:
        assert "--insecure-policy" in verdict({"default": kind}, "h.test/a")
        assert verdict({"default": kind}, "h.test/a", unsigned=True) == ""


@pytest.mark.parametrize("document", [{}, [], {"default": []}, {"default": "x"}, 5])
def test_bad_policies(document: Any) -> None:
    assert "policy.json" in verdict(document, "h.test/a")


def test_no_policy(tmp_path: Path) -> None:
    policy.check("docker", parse("h.test/a"), unsigned=False)
    write(tmp_path / "etc/policy.json", json.dumps({"default": REJECT}))
    with pytest.raises(Error, match="rejects it"):
        policy.check("docker", parse("h.test/a"), unsigned=False)
