"""Tokens, logins, TLS and proxies."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import socket
import socketserver
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.registry import rig
from tests.registry.fetching import DATA, fetch, refused
from tests.registry.rig import Answer, Request

pytestmark = pytest.mark.usefixtures("own_files", "temporary", "pauses")


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
    secure: rig.Scripted, certificates: rig.Certificates, own_files: Path
) -> None:
    folder = own_files / ".config/containers/certs.d" / secure.host
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
