"""TLS: certificates, pre-shared keys, and what a man in the middle may try before it begins."""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import shutil
import socket
import ssl
import struct
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Callable

import pytest

from nbdtool.errors import Error
from nbdtool.server import tls, transmission
from tests.server import wire
from tests.server.harness import Harness, MemoryDisk, harness
from tests.server.wire import MIB, Client, context_request, info_request, packed_option

Run = Callable[..., Any]

REVOKING = """
[ca]
default_ca = ours
[ours]
database = index
crlnumber = number
default_md = sha256
default_crl_days = 30
"""


class Authority:
    """A CA in a directory, which makes certificates."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        directory.mkdir(parents=True)
        options = "-x509 -days 30 -subj /CN=authority -keyout ca-key.pem -out ca-cert.pem"
        self.openssl(f"req -newkey rsa:2048 -nodes {options}")

    def openssl(self, words: str) -> None:
        subprocess.run(
            ["openssl", *words.split()], cwd=self.directory, check=True, capture_output=True
        )

    def issue(self, name: str) -> None:
        """NAME-cert.pem and NAME-key.pem, for localhost."""
        (self.directory / "extensions").write_text("subjectAltName=DNS:localhost,IP:127.0.0.1")
        files = f"-keyout {name}-key.pem -out {name}.csr"
        self.openssl(f"req -newkey rsa:2048 -nodes -subj /CN=localhost {files}")
        sign = f"-CA ca-cert.pem -CAkey ca-key.pem -CAcreateserial -days 30 -in {name}.csr"
        self.openssl(f"x509 -req {sign} -extfile extensions -out {name}-cert.pem")

    def folder(self, name: str, *files: str) -> Path:
        """A directory with copies of some files; "a=b" gives b the name a."""
        folder = self.directory / name
        for file in files:
            target, _, source = file.rpartition("=")
            (folder / (target or source)).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(self.directory / source, folder / (target or source))
        return folder


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    made = Authority(tmp_path_factory.mktemp("pki") / "ours")
    for name in "server", "client", "revoked":
        made.issue(name)
    made.folder("servers", "ca-cert.pem", "server-cert.pem", "server-key.pem")
    made.folder("clients", "ca-cert.pem", "client-cert.pem", "client-key.pem")
    made.folder("anonymous", "ca-cert.pem")
    return made


@pytest.fixture(scope="module")
def strangers(tmp_path_factory: pytest.TempPathFactory, authority: Authority) -> Path:
    """A client's certificates from a CA that nobody knows, who trusts ours."""
    made = Authority(tmp_path_factory.mktemp("pki") / "theirs")
    made.issue("client")
    shutil.copy(authority.directory / "ca-cert.pem", made.directory)
    return made.folder("clients", "ca-cert.pem", "client-cert.pem", "client-key.pem")


@pytest.fixture(scope="module")
def image(random_file: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_file(tmp_path_factory.mktemp("image") / "image", 8 * MIB)


def nbds(uri: str, folder: Path) -> str:
    """The URI of a server as a client with the certificates in folder has it."""
    return f"{uri.replace('nbd', 'nbds', 1)}{'&' if '?' in uri else '?'}tls-certificates={folder}"


# Real clients


@pytest.mark.parametrize("tcp", [True, False])
@pytest.mark.parametrize("mode", ["on", "require"])
def test_libnbd(
    authority: Authority, serve: Run, run: Run, image: Path, tmp_path: Path, tcp: bool, mode: str
) -> None:
    options = [f"--tls={mode}", "--tls-certificates", authority.directory / "servers"]
    copied = tmp_path / "image"
    shutil.copy(image, copied)
    with serve("file", copied, *options, tcp=tcp) as server:
        uri = nbds(server.uri, authority.directory / "clients")
        info = json.loads(run("nbdinfo", "--json", uri))
        assert info["TLS"]
        assert info["exports"][0]["contexts"] == ["base:allocation"]
        run("nbdcopy", "--connections=4", uri, tmp_path / "copy")
        run("cmp", image, tmp_path / "copy")
        (tmp_path / "copy").write_bytes(bytes(2 * MIB) + os.urandom(6 * MIB))
        run("nbdcopy", tmp_path / "copy", uri)
        run("cmp", copied, tmp_path / "copy")
        plain = subprocess.run(["nbdinfo", "--size", server.uri], capture_output=True, text=True)
        assert plain.returncode == (mode == "require")
        assert "TLS" in plain.stderr or mode == "on"


def test_run_tells_the_command_that_tls_is_on(
    authority: Authority, nbdtool: Run, image: Path
) -> None:
    options = ["--tls-certificates", authority.directory / "servers", "--tls=require"]
    folder = authority.directory / "clients"
    script = f'echo $tls; nbdinfo --size "$uri&tls-certificates={folder}"'
    done = nbdtool("file", image, *options, "--run", script, status=0)
    assert done.stdout == f"on\n{8 * MIB}\n"


def test_qemu(authority: Authority, serve: Run, run: Run, image: Path) -> None:
    authority.folder("qemu", "ca-cert.pem", "client-cert.pem", "client-key.pem")
    options = ["--tls=require", "--tls-certificates", authority.directory / "servers"]
    with serve("file", image, "-r", *options, tcp=True) as server:
        folder = authority.directory / "qemu"
        credentials = f"tls-creds-x509,id=tls,endpoint=client,dir={folder}"
        target = f"driver=nbd,host=localhost,port={server.port},tls-creds=tls"
        run("qemu-img", "info", "--object", credentials, "--image-opts", target)
        copied = json.loads(
            run("qemu-img", "map", "--output=json", "--object", credentials, "--image-opts", target)
        )
        assert copied[0]["length"] == 8 * MIB


@pytest.mark.parametrize("tcp", [True, False])
def test_clients_have_to_show_a_certificate_of_the_authority(
    authority: Authority, strangers: Path, serve: Run, run: Run, image: Path, tcp: bool
) -> None:
    options = ["--tls=require", "--tls-verify-peer"]
    options += ["--tls-certificates", str(authority.directory / "servers")]
    with serve("file", image, "-r", *options, tcp=tcp) as server:
        known = nbds(server.uri, authority.directory / "clients")
        assert run("nbdinfo", "--size", known) == f"{8 * MIB}\n"
        for folder in strangers, authority.directory / "anonymous":
            run("nbdinfo", "--size", nbds(server.uri, folder), status=1)
        assert run("nbdinfo", "--size", known) == f"{8 * MIB}\n"


def test_revoked_certificates_are_refused(
    authority: Authority, serve: Run, run: Run, image: Path
) -> None:
    (authority.directory / "revoking").write_text(REVOKING)
    (authority.directory / "index").touch()
    (authority.directory / "number").write_text("01\n")
    keys = "-config revoking -keyfile ca-key.pem -cert ca-cert.pem"
    authority.openssl(f"ca {keys} -revoke revoked-cert.pem")
    authority.openssl(f"ca {keys} -gencrl -out ca-crl.pem")
    servers = authority.folder(
        "checking", "ca-cert.pem", "ca-crl.pem", "server-cert.pem", "server-key.pem"
    )
    revoked = authority.folder(
        "revoked",
        "ca-cert.pem",
        "client-cert.pem=revoked-cert.pem",
        "client-key.pem=revoked-key.pem",
    )
    options = ["--tls-verify-peer", "--tls-certificates", servers]
    with serve("file", image, "-r", *options) as server:
        good = nbds(server.uri, authority.directory / "clients")
        assert run("nbdinfo", "--size", good) == f"{8 * MIB}\n"
        run("nbdinfo", "--size", nbds(server.uri, revoked), status=1)


def test_the_names_of_libvirts_files_will_do(
    authority: Authority, serve: Run, run: Run, image: Path
) -> None:
    servers = authority.folder(
        "libvirt",
        "CA/cacert.pem=ca-cert.pem",
        "libvirt/servercert.pem=server-cert.pem",
        "libvirt/private/serverkey.pem=server-key.pem",
    )
    options = ["--tls=require", "--tls-verify-peer", "--tls-certificates", servers]
    with serve("file", image, "-r", *options) as server:
        uri = nbds(server.uri, authority.directory / "clients")
        assert run("nbdinfo", "--size", uri) == f"{8 * MIB}\n"


@pytest.mark.parametrize(
    "files",
    [
        [],
        ["server-cert.pem"],
        ["server-key.pem"],
        ["server-cert.pem=client-cert.pem", "server-key.pem"],
        ["server-cert.pem=server-key.pem", "server-key.pem"],
        ["server-cert.pem", "server-key.pem=server-cert.pem"],
        ["server-cert.pem", "server-key.pem=extensions"],
        ["server-cert.pem", "server-key.pem"],  # no CA, which --tls-verify-peer needs
    ],
)
def test_unusable_certificates_are_an_error_of_one_line(
    authority: Authority, nbdtool: Run, image: Path, tmp_path: Path, files: list[str]
) -> None:
    folder = tmp_path / "certificates"
    folder.mkdir()
    for file in files:
        target, _, source = file.rpartition("=")
        shutil.copy(authority.directory / source, folder / (target or source))
    options = ["--tls-verify-peer", "--tls-certificates", folder]
    done = nbdtool("file", image, "-U", "-", *options, status=1)
    assert re.fullmatch(r"nbdtool: error: [^\n]*certificates[^\n]*\n", done.stderr)


def test_no_certificates_anywhere(nbdtool: Run, image: Path, tmp_path: Path) -> None:
    done = nbdtool("file", image, "-U", "-", "--tls=require", status=1)
    assert "--tls-certificates" in done.stderr
    folder = tmp_path / "none"
    done = nbdtool("file", image, "-U", "-", "--tls-certificates", folder, status=1)
    assert str(folder) in done.stderr


# Pre-shared keys


@pytest.fixture(scope="module")
def python_with_psk() -> str:
    """Python 3.13, which can do TLS with pre-shared keys."""
    root = subprocess.run(["sh", "-c", "pyenv root"], capture_output=True, text=True).stdout.strip()
    candidates = [*Path(root or "/nonexistent").glob("versions/3.13*/bin/python3.13"), "python3.13"]
    return str(candidates[0])


def test_pre_shared_keys(
    python_with_psk: str, command: list[str], run: Run, image: Path, tmp_path: Path
) -> None:
    keys = tmp_path / "keys"
    keys.write_text("alice:0011223344556677\nbob:8899aabbccddeeff0011\n")
    (tmp_path / "wrong").write_text("alice:0011223344556678\n")
    (tmp_path / "unknown").write_text("eve:0011223344556677\n")
    path = tmp_path / "socket"
    words = [python_with_psk, "-m", "nbdtool", "file", image, "-U", path, "--tls-psk", keys]
    with (tmp_path / "log").open("w") as log:
        server = subprocess.Popen(words, stderr=log)
    try:
        deadline = time.monotonic() + 30
        while not path.exists():
            assert server.poll() is None, (tmp_path / "log").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.01)
        for user in "alice", "bob":
            uri = f"nbds+unix://{user}@/?socket={path}&tls-psk-file={keys}"
            assert json.loads(run("nbdinfo", "--json", uri))["TLS"]
        run("nbdcopy", uri, tmp_path / "copy")
        run("cmp", image, tmp_path / "copy")
        for user, file in [("alice", "wrong"), ("eve", "unknown")]:
            uri = f"nbds+unix://{user}@/?socket={path}&tls-psk-file={tmp_path / file}"
            run("nbdinfo", uri, status=1)
        run("nbdinfo", f"nbd+unix:///?socket={path}", status=1)
    finally:
        server.terminate()
        assert server.wait(20) == 0
    assert "Traceback" not in (tmp_path / "log").read_text()


def test_without_psk_in_python_that_is_said(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(ssl, "HAS_PSK", False, raising=False)
    (tmp_path / "keys").write_text("alice:0011223344556677\n")
    with pytest.raises(Error, match=r"^--tls-psk: .*Python 3\.13"):
        tls.context(argparse.Namespace(tls_psk=str(tmp_path / "keys")))


@pytest.mark.parametrize("keys", ["", "alice\n", "alice:xyz\n", None])
def test_unusable_keys(
    python_with_psk: str, run: Run, image: Path, tmp_path: Path, keys: str | None
) -> None:
    if keys is not None:
        (tmp_path / "keys").write_text(keys)
    words = [python_with_psk, "-m", "nbdtool", "file", image, "--tls-psk", tmp_path / "keys"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=30)
    assert done.returncode == 1
    assert re.fullmatch(r"nbdtool: error: .*keys: .*\n", done.stderr)


# Raw clients


@pytest.fixture(scope="module")
def offered(authority: Authority) -> ssl.SSLContext:
    return tls.context(
        argparse.Namespace(
            tls_psk=None,
            tls_certificates=str(authority.directory / "servers"),
            tls_verify_peer=False,
        )
    )


@pytest.fixture(params=[False, True], ids=["on", "require"])
def running(request: pytest.FixtureRequest, offered: ssl.SSLContext) -> Iterator[Harness]:
    disk = MemoryDisk(64 * MIB)
    disk.content[: 40 * MIB] = os.urandom(MIB) * 40
    with harness(disk, tls=offered, tls_required=request.param, timeout=10) as running:
        yield running
        client = secured(running.connect().hello())
        client.go()
        assert client.read(0, 5 * MIB) == disk.content[: 5 * MIB]


def wrapped(sock: socket.socket, **attributes: Any) -> ssl.SSLSocket:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.set_ciphers("ALL:@SECLEVEL=0")
    for name, value in attributes.items():
        setattr(context, name, value)
    return context.wrap_socket(sock, suppress_ragged_eofs=False)


def secured(client: Client, **attributes: Any) -> Client:
    """The client after STARTTLS."""
    assert client.ask(wire.STARTTLS) == [(wire.ACK, b"")]
    client.sock = wrapped(client.sock, **attributes)
    return client


def test_what_was_negotiated_in_clear_is_forgotten(offered: ssl.SSLContext) -> None:
    """CVE-2021-3716."""
    with harness(MemoryDisk(), tls=offered) as running:
        client = running.connect().hello()
        assert client.outcome(wire.STRUCTURED_REPLY) == wire.ACK
        contexts = context_request("", "base:allocation")
        assert client.outcome(wire.SET_META_CONTEXT, contexts) == wire.ACK
        secured(client)
        assert client.outcome(wire.SET_META_CONTEXT, contexts) == wire.INVALID
        assert client.outcome(wire.GO, info_request()) == wire.ACK
        assert client.read(0, 100) == bytes(100)  # which fails if the reply isn't simple
        assert client.do(wire.BLOCK_STATUS, 0, 100).error == wire.EINVAL


@pytest.mark.parametrize("behind", [wire.LIST, wire.GO, wire.EXPORT_NAME, wire.ABORT])
def test_what_follows_starttls_in_clear_is_never_answered(running: Harness, behind: int) -> None:
    client = running.connect().hello()
    client.send(packed_option(wire.STARTTLS) + packed_option(behind, info_request()))
    got = b""
    while data := client.sock.recv(4096):
        got += data
    # At most STARTTLS' own acknowledgment, and TLS' alert
    assert got[20:21] in (b"", b"\x15")


def test_starttls_with_data_or_twice(running: Harness) -> None:
    client = running.connect().hello()
    assert client.outcome(wire.STARTTLS, b"x") == wire.INVALID
    secured(client)
    for _ in range(2):
        assert client.outcome(wire.STARTTLS) == wire.INVALID
    client.go()
    assert client.do(wire.READ, 0, 100).error == 0


def test_nothing_but_starttls_and_abort_in_clear(offered: ssl.SSLContext) -> None:
    generator = random.Random(2)
    with harness(MemoryDisk(), tls=offered, tls_required=True) as running:
        client = running.connect().hello()
        for option in [*range(3, 16), 255, 0xFFFFFFFF, *range(3, 12)]:
            if option == wire.STARTTLS:
                continue
            data = packed_option(wire.LIST) * generator.randrange(300)
            assert client.ask(option, data)[0][0] == wire.TLS_REQD
        assert client.outcome(wire.ABORT) == wire.ACK
        assert client.ended()
        for flags in 0, 1, 2, 3:
            client = running.connect().hello(flags)
            client.option(wire.EXPORT_NAME)
            assert client.ended()
        client = secured(running.connect().hello())
        assert client.outcome(wire.LIST) == wire.ACK


@pytest.mark.parametrize(
    "junk",
    [
        b"GET / HTTP/1.0\r\n\r\n",
        packed_option(wire.LIST),
        b"\x16\x03\x01\xff\xff" + bytes(70_000),
        b"\x16\x03\x01\x00\x05\x01\x00\x00\x01\x00",
        bytes(100_000),
    ],
)
def test_no_tls_after_starttls(running: Harness, junk: bytes) -> None:
    client = running.connect().hello()
    assert client.outcome(wire.STARTTLS) == wire.ACK
    try:
        client.send(junk)
        client.sock.shutdown(socket.SHUT_WR)
        while data := client.sock.recv(65536):
            assert data[:1] == b"\x15"  # an alert, nothing of ours
    except OSError:
        pass


@pytest.mark.filterwarnings("ignore:ssl.TLSVersion")
def test_old_versions_are_refused(running: Harness) -> None:
    for version in ssl.TLSVersion.TLSv1, ssl.TLSVersion.TLSv1_1:
        with pytest.raises((ssl.SSLError, ConnectionError)):
            secured(running.connect().hello(), maximum_version=version)
    for version in ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3:
        client = secured(
            running.connect().hello(), minimum_version=version, maximum_version=version
        )
        client.go()
        assert len(client.read(0, 100_000)) == 100_000


def test_a_silent_client_has_one_deadline_in_the_tls_handshake_too(
    offered: ssl.SSLContext,
) -> None:
    with harness(MemoryDisk(), tls=offered, timeout=0.5) as running:
        silent, dripping = running.connect().hello(), running.connect().hello()
        for client in silent, dripping:
            assert client.outcome(wire.STARTTLS) == wire.ACK
        with pytest.raises(OSError):
            for byte in b"\x16\x03\x01\x10\x00" + bytes(1000):
                dripping.send(bytes([byte]))
                time.sleep(0.05)
        assert silent.ended()


@pytest.mark.parametrize("mode", ["simple", "structured", "extended"])
def test_transmission_over_tls(running: Harness, mode: str) -> None:
    client = secured(running.connect().hello())
    client.go(mode=mode)
    content = running.service._policy.exports.all[0].disk.content  # type: ignore[attr-defined]
    assert client.read(100, 32 * MIB) == content[100 : 100 + 32 * MIB]
    data = os.urandom(MIB) * 32
    assert client.write(MIB, data) == 0
    assert content[MIB : 33 * MIB] == data
    assert client.write(0, bytes(33 * MIB)) == wire.EINVAL  # drained through TLS
    assert client.read(MIB, 10) == data[:10]
    for _ in range(30):
        client.request(wire.READ, 0, 4096)
    for _ in range(30):
        assert client.answer().data == content[:4096]


def test_disc_ends_tls_properly(running: Harness) -> None:
    client = secured(running.connect().hello())
    client.go()
    client.send(client.packed(wire.READ, 0, 10) + client.packed(wire.DISC))
    assert client.answer().error == 0
    assert client.ended()  # a ragged end of TLS would raise


def test_a_tls_client_that_rests_is_kept(running: Harness, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transmission, "PATIENCE", 0.1)
    client = secured(running.connect().hello())
    client.go()
    time.sleep(0.4)
    assert len(client.read(0, 10)) == 10
    client.request(wire.WRITE, 0, 1000, b"x" * 10)
    assert client.ended()  # a payload without progress isn't


def test_resets_in_the_tls_handshake(running: Harness) -> None:
    outgoing = ssl.MemoryBIO()
    with pytest.raises(ssl.SSLWantReadError):
        ssl.create_default_context().wrap_bio(
            ssl.MemoryBIO(), outgoing, server_hostname="localhost"
        ).do_handshake()
    hello = outgoing.read()
    start = struct.pack(">I", 3) + packed_option(wire.STARTTLS)
    for length in range(0, len(hello) + 1, 7):
        client = running.connect(tcp=True)
        client.send(start)
        client.recv(38)
        client.send(hello[:length])
        client.reset()
    assert not running.warnings


def test_the_server_ends_though_tls_handshakes_are_half_done(
    authority: Authority, serve: Run, image: Path
) -> None:
    options = ["--tls-certificates", authority.directory / "servers"]
    with serve("file", image, *options) as server:
        half = [Client(server.connect()).hello() for _ in range(3)]
        assert half[0].outcome(wire.STARTTLS) == wire.ACK
        secured(half[1])
        secured(half[2]).go()
        assert server.stop() == 0
        assert "cut" not in server.log()
