"""TLS of the server: X.509 from a directory of PEM files, or pre-shared keys."""

from __future__ import annotations

import argparse
import hmac
import os
import socket
import ssl
from collections.abc import Sequence
from pathlib import Path

from nbdtool.errors import Error
from nbdtool.protocol import Buffer
from nbdtool.server.stream import Dropped, Ended, SocketStream, Stalled, Stream, end

# nbdkit's names first, then libvirt's
_CA = ("ca-cert.pem", "cacert.pem", "CA/cacert.pem")
_CERTIFICATE = ("server-cert.pem", "servercert.pem", "libvirt/servercert.pem")
_KEY = (
    "server-key.pem",
    "private/serverkey.pem",
    "serverkey.pem",
    "libvirt/private/serverkey.pem",
)
_CRL = ("ca-crl.pem", "cacrl.pem", "CA/cacrl.pem")


def context(args: argparse.Namespace) -> ssl.SSLContext:
    """What --tls and its options ask for; Error if files are missing or unusable."""
    result = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    result.minimum_version = ssl.TLSVersion.TLSv1_2
    # The client's name is no matter of the server's; its certificate is, with --tls-verify-peer.
    result.check_hostname = False
    if args.tls_psk is not None:
        _add_psk(result, args.tls_psk)
    else:
        _add_certificates(result, args)
    return result


def _add_certificates(result: ssl.SSLContext, args: argparse.Namespace) -> None:
    folder = _folder(args.tls_certificates)
    certificate, key = _first(folder, _CERTIFICATE), _first(folder, _KEY)
    try:
        result.load_cert_chain(certificate, key, password=lambda: b"")
        if args.tls_verify_peer:
            result.load_verify_locations(_first(folder, _CA))
            result.verify_mode = ssl.CERT_REQUIRED
            for name in _CRL:
                if (folder / name).is_file():
                    result.load_verify_locations(folder / name)
                    result.verify_flags |= ssl.VerifyFlags.VERIFY_CRL_CHECK_LEAF
                    break
    except (OSError, ValueError) as exc:
        reason = getattr(exc, "reason", None) or getattr(exc, "strerror", None) or exc
        raise Error(f"{folder}: certificate or key can't be used: {reason}") from None


def _folder(given: str | None) -> Path:
    if given is not None:
        if not Path(given).is_dir():
            raise Error(f"{given}: not a directory of certificates; see --tls-certificates")
        return Path(given)
    places = [Path("/etc/pki/nbdtool"), Path("/etc/pki/nbdkit")]
    if os.geteuid() and "HOME" in os.environ:
        home = Path(os.environ["HOME"])
        places = [home / ".pki" / "nbdtool", home / ".pki" / "nbdkit", *places]
    for place in places:
        if any((place / name).is_file() for name in _CERTIFICATE):
            return place
    raise Error("--tls: no certificates found; name their directory with --tls-certificates")


def _first(folder: Path, names: tuple[str, ...]) -> Path:
    for name in names:
        if (folder / name).is_file():
            return folder / name
    raise Error(f"{folder}: has no {names[0]} (nor {' or '.join(names[1:])})")


def _add_psk(result: ssl.SSLContext, path: str) -> None:
    """Keys of a psktool(1) file: a line `user:hexadecimal key` each."""
    if not getattr(ssl, "HAS_PSK", False):
        raise Error("--tls-psk: this Python has none; run nbdtool with Python 3.13, or use X.509")
    keys: dict[str, bytes] = {}
    try:
        for line in Path(path).read_text().splitlines():
            user, colon, key = line.strip().rpartition(":")
            if colon:
                keys[user] = bytes.fromhex(key)
    except (OSError, ValueError) as exc:
        reason = getattr(exc, "strerror", None) or exc
        raise Error(f"{path}: {reason}; psktool(1) makes such a file") from None
    if not keys:
        raise Error(f"{path}: holds no key; psktool(1) makes one")
    refused = os.urandom(32)

    def key_of(identity: str | None) -> bytes:
        found = refused
        for user, key in keys.items():
            if hmac.compare_digest(user.encode(), (identity or "").encode()):
                found = key
        return found

    result.maximum_version = ssl.TLSVersion.TLSv1_2  # OpenSSL's callback knows no TLS 1.3
    result.set_ciphers("PSK")
    result.set_psk_server_callback(key_of)  # type: ignore[attr-defined]


class TLSStream(Stream):
    encrypted = True

    def __init__(self, stream: SocketStream, context: ssl.SSLContext) -> None:
        """Take the place of stream; handshake() comes next."""
        self.peer = stream.peer
        try:
            self.sock = context.wrap_socket(
                stream.sock, server_side=True, do_handshake_on_connect=False
            )
        except OSError as exc:
            raise Ended(str(exc)) from None

    def handshake(self, patience: float) -> None:
        """TLS' own handshake, which may take `patience` seconds; Dropped if it fails."""
        try:
            self.set_patience(patience)
            self.sock.do_handshake()
        except OSError as exc:
            raise Dropped(f"TLS: {getattr(exc, 'reason', None) or exc}") from None

    def set_patience(self, seconds: float) -> None:
        self.sock.settimeout(max(seconds, 0.001))

    def recv_into(self, view: memoryview, *, soon: bool = False, fully: bool = False) -> int:
        try:
            return self.sock.recv_into(view) or end()
        except socket.timeout:  # Python 3.9's is no TimeoutError
            raise Stalled("the client sends nothing") from None
        except OSError as exc:
            raise Ended(str(exc)) from None

    def send(self, buffers: Sequence[Buffer], length: int, *, more: bool = False) -> None:
        try:
            self.sock.sendall(buffers[0] if len(buffers) == 1 else b"".join(buffers))
        except socket.timeout:
            raise Stalled("the client takes no data") from None
        except OSError as exc:
            raise Ended(str(exc)) from None

    def shut(self, *, reading_only: bool = False) -> None:
        try:
            # Not SSLSocket.shutdown, which drops the TLS layer under its user
            socket.socket.shutdown(self.sock, socket.SHUT_RD if reading_only else socket.SHUT_RDWR)
        except OSError:
            pass

    def close(self) -> None:
        try:
            self.sock.settimeout(1)
            self.sock.unwrap()
        except (OSError, ValueError):
            pass
        self.sock.close()
