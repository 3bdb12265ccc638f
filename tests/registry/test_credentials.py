"""Logins and policy.json, as podman reads them."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pytest

from nbdtool.errors import Error
from nbdtool.registry import credentials, policy
from nbdtool.registry.credentials import Login
from nbdtool.registry.reference import parse
from tests.registry.rig import write


@pytest.fixture(autouse=True)
def home(own_files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home of the test's own, and no policy of the system."""
    monkeypatch.setattr(policy, "_FILES", (Path("~/policy.json"), tmp_path / "etc/policy.json"))
    return own_files


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
