"""What a registry, a proxy or a token server may do to a download."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import random
import re
import socket
import socketserver
import threading
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Callable, Optional

import pytest

from nbdtool.commands import cdi
from nbdtool.disk import read_bytes
from nbdtool.errors import Error
from nbdtool.registry import client, http
from tests.registry import rig
from tests.registry.rig import Answer, Request

MIB = 1 << 20
DATA = random.Random(2).randbytes(3 * MIB) + bytes(MIB)
LAYER = rig.tar(("disk/vm", DATA))
BLOB = "/blobs/" + rig.digest(LAYER)
Respond = Callable[[Request], Answer]


@pytest.fixture(autouse=True)
def own_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No login of this machine's user is seen; a pause takes no time; TMPDIR is watched."""
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in "XDG_RUNTIME_DIR", "XDG_CONFIG_HOME", "REGISTRY_AUTH_FILE", "DOCKER_CONFIG":
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(client, "time", types.SimpleNamespace(sleep=lambda seconds: None))
    (tmp_path / "tmp").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A real registry with the image k/disk:v1, its layer not compressed."""
    layout = rig.Layout(tmp_path_factory.mktemp("layout") / "oci")
    layout.image(LAYER, tag="v1", how="none")
    with rig.registry(tmp_path_factory.mktemp("registry")) as host:
        rig.skopeo("--preserve-digests", f"oci:{layout.path}:v1", f"docker://{host}/k/disk:v1")
        yield host


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> rig.Certificates:
    return rig.Certificates(tmp_path_factory.mktemp("certificates"))


def fetch(name: str, *options: str) -> bytes:
    """The disk that `nbdtool cdi NAME --find-disk` serves."""
    parser = argparse.ArgumentParser()
    cdi.add_arguments(parser)
    words = [f"--name={name}", "--find-disk", *options]
    if not any(word.startswith("--tls-verify") for word in words):
        words.append("--tls-verify=off")
    (disk,) = cdi.open(parser.parse_args(words)).values()
    with contextlib.closing(disk):
        return read_bytes(disk, 0, disk.size)


def refused(name: str, *options: str) -> str:
    """Why there is no disk."""
    with pytest.raises(Error) as caught:
        fetch(name, *options)
    return str(caught.value)


def spoiled(host: str, spoil: Callable[[Request, Answer], Optional[Answer]]) -> Respond:
    """Forward to the registry; what comes of a layer is spoiled first."""

    def respond(request: Request) -> Answer:
        answer = rig.forward(host, request)
        if request.path.endswith(BLOB):
            return spoil(request, answer) or answer
        return answer

    return respond


def range_start(request: Request) -> int:
    match = re.fullmatch(r"bytes=(\d+)-", request.headers.get("range", "bytes=0-"))
    assert match
    return int(match[1])


# Broken downloads


def test_cut_connections_are_taken_up_where_they_broke(host: str) -> None:
    draw = random.Random(3)
    starts = []

    def cut(request: Request, answer: Answer) -> None:
        starts.append(range_start(request))
        answer.cut = draw.randrange(MIB, 2 * MIB) if len(answer.body) > 2 * MIB else None

    with rig.scripted(spoiled(host, cut)) as proxy:
        assert fetch(f"{proxy.host}/k/disk:v1", "--retry=1") == DATA
    assert len(starts) > 2 and starts == sorted(set(starts)) and starts[0] == 0


@pytest.mark.parametrize("at", [0, 1, 511, 512, 262143, 262144, 262145, len(LAYER) - 1])
def test_cut_anywhere(at: int, host: str) -> None:
    cuts = iter([at])

    def cut(request: Request, answer: Answer) -> None:
        answer.cut = next(cuts, None)

    with rig.scripted(spoiled(host, cut)) as proxy:
        assert fetch(f"{proxy.host}/k/disk:v1") == DATA


def test_too_many_breaks_end_it(host: str) -> None:
    def cut(request: Request, answer: Answer) -> None:
        answer.cut = 1000

    with rig.scripted(spoiled(host, cut)) as proxy:
        assert "3 attempts" in refused(f"{proxy.host}/k/disk:v1", "--retry=2")
        assert len([path for path in proxy.paths() if path.endswith(BLOB)]) == 3


def test_range_is_ignored(host: str) -> None:
    cuts = iter([2 * MIB, MIB])

    def ignore(request: Request, answer: Answer) -> Answer:
        del request.headers["range"]
        return Answer(200, LAYER, cut=next(cuts, None))

    def only_later(request: Request, answer: Answer) -> Optional[Answer]:
        if "range" in request.headers:
            return ignore(request, answer)
        answer.cut = next(cuts)
        return answer

    with rig.scripted(spoiled(host, only_later)) as proxy:
        assert fetch(f"{proxy.host}/k/disk:v1") == DATA


@pytest.mark.parametrize("found", ["bytes 0-9/10", "bytes 1000-1/2", "", "chunks 1-2/3"])
def test_wrong_range_is_refused(found: str, host: str) -> None:
    def lie(request: Request, answer: Answer) -> None:
        if "range" in request.headers:
            answer.headers["Content-Range"] = found
        else:
            answer.cut = 1000

    with rig.scripted(spoiled(host, lie)) as proxy:
        assert "was asked for" in refused(f"{proxy.host}/k/disk:v1")


def test_slow_answers_are_waited_for(host: str) -> None:
    def slow(request: Request, answer: Answer) -> None:
        answer.pieces, answer.pause = 20, 0.005

    with rig.scripted(spoiled(host, slow)) as proxy:
        assert fetch(f"{proxy.host}/k/disk:v1") == DATA


def test_silence_is_not_waited_for(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "TIMEOUT", 0.2)

    def silent(request: Request, answer: Answer) -> None:
        answer.pieces, answer.pause = 2, 1

    with rig.scripted(spoiled(host, silent)) as proxy:
        assert "no answer for" in refused(f"{proxy.host}/k/disk:v1", "--retry=0")


# Wrong bytes


@pytest.mark.parametrize("at", [0, 700, len(LAYER) // 2, len(LAYER) - 1])
def test_one_altered_byte_is_noticed(at: int, host: str, tmp_path: Path) -> None:
    def alter(request: Request, answer: Answer) -> None:
        body = bytearray(answer.body)
        body[at] ^= 1
        answer.body = bytes(body)

    with rig.scripted(spoiled(host, alter)) as proxy:
        assert re.search("digest|tar archive|no file", refused(f"{proxy.host}/k/disk:v1"))
    assert rig.left_behind(tmp_path / "tmp") == []


def test_other_manifest_than_the_digest_asked_for(host: str) -> None:
    def respond(request: Request) -> Answer:
        answer = rig.forward(host, request)
        if "/manifests/" in request.path:
            answer.body = answer.body.replace(b"schemaVersion", b"schemaversion")
        return answer

    with rig.scripted(respond) as proxy:
        answer = rig.forward(host, Request("GET", "/v2/k/disk/manifests/v1", ACCEPT, b""))
        assert "altered" in refused(f"{proxy.host}/k/disk@{rig.digest(answer.body)}")
        assert "altered" in refused(f"{proxy.host}/k/disk:v1")  # Docker-Content-Digest


ACCEPT = {"accept": f"{rig.OCI}manifest.v1+json"}


@pytest.mark.parametrize("size", [len(LAYER) - 1, len(LAYER) + 1, 0])
def test_other_length_than_the_manifest_says(size: int, host: str) -> None:
    def resize(request: Request, answer: Answer) -> None:
        answer.body = (LAYER + b"x")[:size]

    with rig.scripted(spoiled(host, resize)) as proxy:
        assert "the manifest says" in refused(f"{proxy.host}/k/disk:v1")


# Answers that are not success


def test_busy_registry_is_asked_again_when_it_says(
    host: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pauses: list[float] = []
    monkeypatch.setattr(client, "time", types.SimpleNamespace(sleep=pauses.append))
    answers = iter([Answer(429, headers={"Retry-After": "7"}), Answer(503)])
    with rig.scripted(spoiled(host, lambda *_: next(answers, None))) as proxy:
        assert fetch(f"{proxy.host}/k/disk:v1") == DATA
    assert pauses == [7, 1]


def test_hours_are_not_waited_for() -> None:
    answer = Answer(429, b'{"errors":[{"message":"pull limit"}]}', {"Retry-After": "7200"})
    with rig.scripted(lambda _: answer) as server:
        text = refused(f"{server.host}/k/disk")
    assert "7200 seconds" in text and "pull limit" in text and "log in" in text


@pytest.mark.parametrize(
    ("status", "word"), [(403, "denies"), (404, "no such image"), (418, "418"), (500, "500")]
)
def test_refusals_are_explained(status: int, word: str) -> None:
    answer = Answer(status, b'{"errors":[{"message":"because \\u001b[31m"}]}')
    with rig.scripted(lambda _: answer) as server:
        text = refused(f"{server.host}/k/disk")
    assert word in text and "because" in text


def test_documents_are_bounded() -> None:
    with rig.scripted(lambda _: Answer(200, b" " * (5 * MIB))) as server:
        assert "4 MiB" in refused(f"{server.host}/k/disk")


# Redirects


def test_redirect_to_another_host_keeps_the_login_at_home(host: str) -> None:
    with rig.scripted(lambda request: rig.forward(host, request)) as storage:

        def away(request: Request) -> Answer:
            if not request.basic:
                return Answer(401, headers={"WWW-Authenticate": 'Basic realm="x"'})
            if request.path.endswith(BLOB):
                return Answer(307, headers={"Location": f"http://{storage.host}{request.path}"})
            return rig.forward(host, request)

        with rig.scripted(away) as registry:
            assert fetch(f"{registry.host}/k/disk:v1", "--creds=ann:secret") == DATA
        assert storage.paths() == [f"/v2/k/disk{BLOB}"]
        assert "authorization" not in storage.requests[0].headers


@pytest.mark.parametrize(
    ("location", "word"),
    [
        ("file:///etc/passwd", "neither an http nor an https"),
        ("ftp://127.0.0.1/x", "neither an http nor an https"),
        ("http://[", "not a URL"),
        ("/v2/loop/blobs/x", "10 redirects"),
        ("", "10 redirects"),
    ],
)
def test_bad_redirects(location: str, word: str) -> None:
    with rig.scripted(lambda _: Answer(307, headers={"Location": location})) as server:
        assert word in refused(f"{server.host}/k/disk")


def test_redirect_from_https_to_http_is_refused(host: str, certificates: rig.Certificates) -> None:
    with rig.scripted(lambda request: rig.forward(host, request)) as plain:
        answer = Answer(307, headers={"Location": f"http://{plain.host}/x"})
        with rig.scripted(lambda _: answer, certificates) as server:
            text = refused(f"{server.host}/k/disk", "--tls-verify=off")
        assert "from https to" in text and plain.requests == []


# Tokens


class TokenServer:
    """A registry that wants tokens, and the server that has them, as one."""

    def __init__(self, host: str, realm: str = "", login: str = "", lifetime: int = 99) -> None:
        self.upstream, self.realm, self.login, self.lifetime = host, realm, login, lifetime
        self.tokens: dict[str, int] = {}  # how often each may still be used

    def __call__(self, request: Request) -> Answer:
        if request.path.startswith("/token"):
            if request.method == "POST":
                fields = dict(pair.split("=") for pair in request.body.decode().split("&"))
                if fields["refresh_token"] != "identity":
                    return Answer(401)
            elif request.basic != self.login:
                return Answer(401, b'{"details":"incorrect username or password"}')
            if request.method == "GET":
                assert request.query["scope"] == "repository:k/disk:pull", request.path
            token = f"token{len(self.tokens)}"
            self.tokens[token] = self.lifetime
            return Answer(200, json.dumps({"token": token}).encode())
        token = request.headers.get("authorization", "").partition("Bearer ")[2]
        if self.tokens.get(token, 0) <= 0:
            realm = self.realm or f"http://{request.headers['host']}/token"
            value = f'Bearer realm="{realm}",service="s",scope="repository:k/disk:pull"'
            return Answer(401, headers={"WWW-Authenticate": value})
        self.tokens[token] -= 1
        return rig.forward(self.upstream, request)


def test_anonymous_token(host: str) -> None:
    with rig.scripted(TokenServer(host)) as server:
        assert fetch(f"{server.host}/k/disk:v1") == DATA
        assert len([path for path in server.paths() if path.startswith("/token")]) == 1


def test_expired_token_is_replaced(host: str) -> None:
    tokens = TokenServer(host, lifetime=1)
    with rig.scripted(tokens) as server:
        assert fetch(f"{server.host}/k/disk:v1") == DATA
    assert len(tokens.tokens) == 3  # for manifest, configuration and layer


def test_token_for_a_login(host: str) -> None:
    with rig.scripted(TokenServer(host, login="ann:secret")) as server:
        name = f"{server.host}/k/disk:v1"
        assert fetch(name, "--creds=ann:secret") == DATA
        assert "refuses the login of 'ann' from --creds" in refused(name, "--creds=ann:wrong")
        assert "podman login" in refused(name)


def test_identity_token(host: str, tmp_path: Path) -> None:
    with rig.scripted(TokenServer(host, login="x")) as server:
        for token in "identity", "expired":
            auths = {"auths": {server.host: {"identitytoken": token}}}
            (tmp_path / "auth.json").write_text(json.dumps(auths))
            options = (f"{server.host}/k/disk:v1", f"--authfile={tmp_path}/auth.json")
            if token == "identity":
                assert fetch(*options) == DATA
            else:
                assert "refuses the login" in refused(*options)


def test_token_server_of_plain_http_is_refused_for_https(
    host: str, certificates: rig.Certificates
) -> None:
    with rig.scripted(TokenServer(host, login="ann:secret")) as plain:
        tokens = TokenServer(host, realm=f"http://{plain.host}/token")
        with rig.scripted(tokens, certificates) as server:
            text = refused(f"{server.host}/k/disk:v1", "--creds=ann:secret")
        assert "from https to" in text and plain.requests == []


@pytest.mark.parametrize("realm", ["file:///etc/passwd", "token", "ldap://x/"])
def test_realm_must_be_a_web_address(realm: str, host: str) -> None:
    with rig.scripted(TokenServer(host, realm=realm)) as server:
        assert "neither an http nor an https URL" in refused(f"{server.host}/k/disk:v1")


@pytest.mark.parametrize(
    "body", [b"", b"[]", b"{}", b'{"token": 5}', b'{"token": "a\\r\\nX: y"}', b"[" * 100000]
)
def test_answers_without_a_token(body: bytes, host: str) -> None:
    tokens = TokenServer(host)

    def respond(request: Request) -> Answer:
        return Answer(200, body) if request.path.startswith("/token") else tokens(request)

    with rig.scripted(respond) as server:
        assert "has no token" in refused(f"{server.host}/k/disk:v1")


@pytest.mark.parametrize("challenge", ["Negotiate", "Bearer", 'Bearer service="x"', ""])
def test_unknown_authentication(challenge: str) -> None:
    answer = Answer(401, headers={"WWW-Authenticate": challenge} if challenge else {})
    with rig.scripted(lambda _: answer) as server:
        assert "asks for" in refused(f"{server.host}/k/disk")


# TLS and proxies


@pytest.fixture
def secure(host: str, certificates: rig.Certificates) -> Iterator[rig.Scripted]:
    with rig.scripted(lambda request: rig.forward(host, request), certificates) as server:
        yield server


def test_unknown_certificate_is_refused(secure: rig.Scripted) -> None:
    text = refused(f"{secure.host}/k/disk:v1", "--tls-verify=on")
    assert "isn't trusted" in text and f"certs.d/{secure.host}/ca.crt" in text
    assert secure.requests == []
    assert fetch(f"{secure.host}/k/disk:v1", "--tls-verify=off") == DATA


def test_ca_of_certs_d(
    secure: rig.Scripted, certificates: rig.Certificates, tmp_path: Path
) -> None:
    folder = tmp_path / ".config/containers/certs.d" / secure.host
    folder.mkdir(parents=True)
    (folder / "ca.crt").write_bytes((certificates.directory / "ca.crt").read_bytes())
    assert fetch(f"{secure.host}/k/disk:v1", "--tls-verify=on") == DATA
    port = secure.host.partition(":")[2]
    assert "isn't trusted" in refused(f"localhost:{port}/k/disk:v1", "--tls-verify=on")


def test_plain_http_is_not_taken_for_https(host: str) -> None:
    assert "doesn't speak TLS" in refused(f"{host}/k/disk:v1", "--tls-verify=on")


def test_proxy_of_the_environment(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def respond(request: Request) -> Answer:
        assert request.headers["proxy-authorization"] == "Basic dTpw"
        path = request.path.replace("http://registry.test", "")
        return rig.forward(host, dataclasses.replace(request, path=path))

    with rig.scripted(respond) as proxy:
        monkeypatch.setenv("http_proxy", f"http://u:p@{proxy.host}")
        monkeypatch.setenv("https_proxy", "http://127.0.0.1:1")
        text = refused("registry.test/k/disk:v1", "--tls-verify=on")
        assert "through the proxy 127.0.0.1" in text
        assert fetch("registry.test/k/disk:v1", "--tls-verify=off") == DATA
        assert all(path.startswith("http://registry.test/v2/") for path in proxy.paths())
        monkeypatch.setenv("no_proxy", ".test")
        assert "registry.test" in refused("registry.test/k/disk:v1", "--retry=0")


def test_https_goes_through_a_proxy_in_a_tunnel(
    secure: rig.Scripted, monkeypatch: pytest.MonkeyPatch
) -> None:
    with tunnel(secure.host) as (proxy, asked):
        monkeypatch.setenv("HTTPS_PROXY", f"http://{proxy}")
        assert fetch("registry.test:5000/k/disk:v1") == DATA
    assert asked and set(asked) == {b"CONNECT registry.test:5000 HTTP/1.1"}


@contextlib.contextmanager
def tunnel(target: str) -> Iterator[tuple[str, list[bytes]]]:
    """A proxy that leads to target, whatever it is asked for; and what it was asked for."""
    asked = []
    host, _, port = target.partition(":")

    class Handler(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            asked.append(self.rfile.readline().strip().replace(b"HTTP/1.0", b"HTTP/1.1"))
            while self.rfile.readline().strip():
                pass
            self.wfile.write(b"HTTP/1.1 200 OK\r\n\r\n")
            with socket.create_connection((host, int(port))) as other:
                back = threading.Thread(target=self.copy, args=(other, self.connection))
                back.start()
                self.copy(self.connection, other)
                back.join()

        @staticmethod
        def copy(source: socket.socket, target: socket.socket) -> None:
            with contextlib.suppress(OSError):
                while data := source.recv(65536):
                    target.sendall(data)
                target.shutdown(socket.SHUT_WR)

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"127.0.0.1:{server.server_address[1]}", asked
        server.shutdown()


def test_connections_are_reused(secure: rig.Scripted, monkeypatch: pytest.MonkeyPatch) -> None:
    with tunnel(secure.host) as (proxy, asked):
        monkeypatch.setenv("HTTPS_PROXY", f"http://{proxy}")
        assert fetch("registry.test/k/disk:v1") == DATA
    assert len(secure.requests) == 3 and len(asked) == 1


def test_login_is_not_sent_unasked(host: str, tmp_path: Path) -> None:
    with rig.scripted(lambda request: rig.forward(host, request)) as server:
        auths = {"auths": {server.host: {"auth": "YW5uOnNlY3JldA=="}}}
        (tmp_path / "auth.json").write_text(json.dumps(auths))
        assert fetch(f"{server.host}/k/disk:v1", f"--authfile={tmp_path}/auth.json") == DATA
        assert all("authorization" not in request.headers for request in server.requests)
