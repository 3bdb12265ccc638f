"""What the tests of container images share: images, registries that hold them, and bad ones."""

from __future__ import annotations

import base64
import contextlib
import gzip
import hashlib
import http.client
import http.server
import io
import json
import os
import socket
import subprocess
import tarfile
import threading
import time
import urllib.parse
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Callable, Optional

OCI = "application/vnd.oci.image."
DOCKER = "application/vnd.docker."
USER, PASSWORD = "ann", "se:cret"
# bcrypt of PASSWORD at the lowest cost
HTPASSWD = "ann:$2b$04$4yFVukO1p1TaLWDwd8zzieyZNiWhElHQ.Y/DHXqs1sFRyOrDFC8XG"

_KEY = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1")


def tar(*members: Any) -> bytes:
    """A tar archive of (name, bytes) pairs; a tarfile.TarInfo instead of a pair is taken as is."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.GNU_FORMAT) as archive:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                archive.addfile(member)
                continue
            name, data = member
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def digest(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def compress(data: bytes, how: str) -> bytes:
    if how == "gzip":
        return gzip.compress(data, 1, mtime=0)
    if how == "zstd":
        return subprocess.run(["zstd", "-cq1"], input=data, stdout=-1, check=True).stdout
    return data


@dataclass
class Layout:
    """An OCI image layout that is being made; what its methods return are descriptors."""

    path: Path
    index: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        (self.path / "blobs/sha256").mkdir(parents=True)
        (self.path / "oci-layout").write_text('{"imageLayoutVersion":"1.0.0"}')

    def blob(self, data: bytes, media_type: str) -> dict[str, Any]:
        (self.path / "blobs/sha256" / digest(data)[7:]).write_bytes(data)
        return {"mediaType": media_type, "digest": digest(data), "size": len(data)}

    def document(self, content: Any, media_type: str) -> dict[str, Any]:
        return self.blob(json.dumps(content).encode(), media_type)

    def layer(self, data: bytes, how: str = "gzip") -> tuple[dict[str, Any], str]:
        """The descriptor and the diff_id."""
        suffix = "" if how == "none" else f"+{how}"
        return self.blob(compress(data, how), f"{OCI}layer.v1.tar{suffix}"), digest(data)

    def image(
        self, *layers: bytes, how: str = "gzip", tag: str = "", arch: str = "amd64", **changes: Any
    ) -> dict[str, Any]:
        """An image of the layers, which are tar archives; changes are made to the manifest."""
        made = [self.layer(data, how) for data in layers]
        config = {
            "architecture": arch,
            "os": "linux",
            "rootfs": {"type": "layers", "diff_ids": [diff_id for _, diff_id in made]},
        }
        manifest = {
            "schemaVersion": 2,
            "mediaType": f"{OCI}manifest.v1+json",
            "config": self.document(config, f"{OCI}config.v1+json"),
            "layers": [descriptor for descriptor, _ in made],
            **changes,
        }
        descriptor = self.document(manifest, f"{OCI}manifest.v1+json")
        platform = {"os": "linux", "architecture": arch}
        self.name({**descriptor, "platform": platform}, tag)
        return {**descriptor, "platform": platform}

    def name(self, descriptor: dict[str, Any], tag: str) -> None:
        """Put an entry into the index of the layout, under a tag if there is one."""
        if tag:
            annotations = {"org.opencontainers.image.ref.name": tag}
            self.index.append({**descriptor, "annotations": annotations})
            content = {"schemaVersion": 2, "manifests": self.index}
            (self.path / "index.json").write_text(json.dumps(content))

    def multi(self, *manifests: dict[str, Any], tag: str) -> dict[str, Any]:
        """An index of images for several platforms."""
        content = {
            "schemaVersion": 2,
            "mediaType": f"{OCI}index.v1+json",
            "manifests": list(manifests),
        }
        descriptor = self.document(content, f"{OCI}index.v1+json")
        self.name(descriptor, tag)
        return descriptor


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


@dataclass
class Certificates:
    """A CA, a certificate for 127.0.0.1 and localhost, and one for a client."""

    directory: Path

    def __post_init__(self) -> None:
        self._openssl("req", "-x509", "-subj", "/CN=test CA", "-days", "2", "-nodes",
                      *_KEY, "-keyout", "ca.key", "-out", "ca.crt")  # fmt: skip
        (self.directory / "names").write_text("subjectAltName=IP:127.0.0.1,DNS:localhost\n")
        for name in "server", "client":
            self._openssl("req", "-subj", f"/CN={name}", "-nodes", *_KEY,
                          "-keyout", f"{name}.key", "-out", f"{name}.csr")  # fmt: skip
            self._openssl("x509", "-req", "-in", f"{name}.csr", "-CA", "ca.crt", "-CAkey",
                          "ca.key", "-CAcreateserial", "-days", "2", "-extfile", "names",
                          "-out", f"{name}.crt")  # fmt: skip

    def _openssl(self, *words: str) -> None:
        subprocess.run(["openssl", *words], cwd=self.directory, check=True, capture_output=True)


@contextlib.contextmanager
def registry(
    directory: Path,
    *,
    certificates: Optional[Certificates] = None,
    client_ca: bool = False,
    htpasswd: bool = False,
) -> Iterator[str]:
    """A real registry with its files in the directory; yields its HOST:PORT."""
    directory.mkdir(exist_ok=True)
    port = free_port()
    settings: dict[str, Any] = {
        "version": "0.1",
        "log": {"level": "error"},
        "storage": {"filesystem": {"rootdirectory": str(directory / "storage")}},
        "http": {"addr": f"127.0.0.1:{port}"},
    }
    if certificates:
        folder = certificates.directory
        settings["http"]["tls"] = {
            "certificate": str(folder / "server.crt"),
            "key": str(folder / "server.key"),
        }
        if client_ca:
            settings["http"]["tls"]["clientcas"] = [str(folder / "ca.crt")]
    if htpasswd:
        (directory / "htpasswd").write_text(f"{HTPASSWD}\n")
        settings["auth"] = {"htpasswd": {"realm": "test", "path": str(directory / "htpasswd")}}
    (directory / "config.yml").write_text(json.dumps(settings))
    with (directory / "log").open("wb") as log:
        process = subprocess.Popen(
            ["docker-registry", "serve", directory / "config.yml"], stdout=log, stderr=log
        )
    try:
        wait_for(port)
        yield f"127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait()


def wait_for(port: int) -> None:
    deadline = time.monotonic() + 30
    while True:
        try:
            socket.create_connection(("127.0.0.1", port)).close()
            return
        except OSError:
            assert time.monotonic() < deadline, "no server listens"
            time.sleep(0.02)


# A server that answers as a test wants it to


@dataclass
class Request:
    method: str
    path: str
    headers: dict[str, str]  # the names in lower case
    body: bytes

    @property
    def query(self) -> dict[str, str]:
        return dict(urllib.parse.parse_qsl(urllib.parse.urlsplit(self.path).query))

    @property
    def basic(self) -> str:
        """USER:PASSWORD of the Authorization header."""
        scheme, _, value = self.headers.get("authorization", "").partition(" ")
        return base64.b64decode(value).decode() if scheme == "Basic" else ""


@dataclass
class Answer:
    """cut: close the connection after so many bytes of the body; pieces and pause: send slowly."""

    status: int = 200
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)
    cut: Optional[int] = None
    pieces: int = 1
    pause: float = 0


@dataclass
class Scripted:
    """A running server: where it is, and the requests that it had."""

    host: str
    requests: list[Request]

    def paths(self) -> list[str]:
        return [request.path for request in self.requests]


@contextlib.contextmanager
def scripted(
    respond: Callable[[Request], Answer], certificates: Optional[Certificates] = None
) -> Iterator[Scripted]:
    """A server, of HTTPS with certificates, whose answers respond() gives."""
    requests: list[Request] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            length = int(self.headers.get("Content-Length", 0))
            headers = {name.lower(): value for name, value in self.headers.items()}
            request = Request(self.command, self.path, headers, self.rfile.read(length))
            requests.append(request)
            answer = respond(request)
            self.send_response(answer.status)
            for name, value in answer.headers.items():
                self.send_header(name, value)
            if "Content-Length" not in answer.headers:
                self.send_header("Content-Length", str(len(answer.body)))
            self.end_headers()
            body = answer.body if answer.cut is None else answer.body[: answer.cut]
            step = -(-len(body) // answer.pieces) or 1
            for at in range(0, len(body), step):
                self.wfile.write(body[at : at + step])
                time.sleep(answer.pause)
            if answer.cut is not None:
                self.close_connection = True

        do_POST = do_GET  # noqa: N815

        def log_message(self, *args: Any) -> None:
            pass

    class Server(http.server.ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, *args: Any) -> None:
            pass  # clients may go away

    server = Server(("127.0.0.1", 0), Handler)
    if certificates:
        import ssl

        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        folder = certificates.directory
        context.load_cert_chain(folder / "server.crt", folder / "server.key")
        server.socket = context.wrap_socket(
            server.socket, server_side=True, do_handshake_on_connect=False
        )
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield Scripted(f"127.0.0.1:{server.server_address[1]}", requests)
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def forward(host: str, request: Request) -> Answer:
    """What a real registry (of plain HTTP) answers to the request."""
    connection = http.client.HTTPConnection(host, timeout=30)
    skipped = ("host", "authorization", "connection")
    headers = {k: v for k, v in request.headers.items() if k not in skipped}
    connection.request(request.method, request.path, headers=headers)
    answer = connection.getresponse()
    kept = ("Content-Type", "Content-Range", "Docker-Content-Digest")
    sent = {name: answer.headers[name] for name in kept if name in answer.headers}
    body = answer.read()
    connection.close()
    return Answer(answer.status, body, sent)


def skopeo(*words: Any) -> None:
    """skopeo copy, without TLS verification."""
    subprocess.run(
        ["skopeo", "copy", "--quiet", "--src-tls-verify=false", "--dest-tls-verify=false"]
        + [os.fspath(word) for word in words],
        check=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )


def left_behind(directory: Path) -> list[str]:
    return sorted(entry.name for entry in directory.iterdir())


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path
