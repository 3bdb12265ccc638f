"""Where an NBD export is, as an NBD URI says it (doc/uri.md of NetworkBlockDevice/nbd)."""

from __future__ import annotations

import socket
from dataclasses import dataclass
from urllib.parse import parse_qsl, unquote, urlsplit

from nbdtool import protocol as p
from nbdtool.errors import Error

_SCHEMES = ("nbd", "nbds", "nbd+unix", "nbds+unix")


@dataclass(frozen=True)
class Address:
    """An export: on the Unix socket `path`, or on `host` and `port` if that is empty."""

    export: str = ""
    path: str = ""
    host: str = "localhost"
    port: int = p.DEFAULT_PORT
    tls: bool = False
    tls_certificates: str = ""  # a directory with ca-cert.pem, client-cert.pem and client-key.pem
    tls_hostname: str = ""
    tls_verify_peer: bool = True

    @classmethod
    def parse(cls, uri: str) -> Address:
        """The address that a URI gives; raises Error if it is none."""
        try:
            parts = urlsplit(uri)
            port = parts.port
        except ValueError as exc:
            raise Error(f"{uri}: not an NBD URI: {exc}") from None
        if parts.scheme not in _SCHEMES:
            raise Error(f"{uri}: not an NBD URI (nbd://HOST[:PORT]/EXPORT, nbd+unix:///EXPORT?socket=PATH,"
                        " nbds:// and nbds+unix:// for TLS)")  # fmt: skip
        query = dict(parse_qsl(parts.query, keep_blank_values=True))
        known = {"socket", "tls-certificates", "tls-hostname", "tls-verify-peer"}
        if query.keys() - known:
            unknown = ", ".join(sorted(query.keys() - known))
            raise Error(f"{uri}: the parameter {unknown} is unknown here")
        path = query.get("socket", "")
        if parts.scheme.endswith("+unix") and not path:
            raise Error(f"{uri}: which socket? Add ?socket=PATH")
        export = unquote(parts.path[1:])
        if len(export.encode(errors="surrogateescape")) > p.MAX_STRING or "\0" in export:
            raise Error(f"{uri}: the export's name is longer than can be, or has a NUL byte")
        return cls(
            export=export,
            path=path,
            host=parts.hostname or "localhost",
            port=p.DEFAULT_PORT if port is None else port,
            tls=parts.scheme.startswith("nbds"),
            tls_certificates=query.get("tls-certificates", ""),
            tls_hostname=query.get("tls-hostname", ""),
            tls_verify_peer=query.get("tls-verify-peer", "true").lower() not in ("false", "0"),
        )

    def __str__(self) -> str:
        if self.path:
            place = f"the NBD server on {self.path}"
        else:
            host = f"[{self.host}]" if ":" in self.host else self.host
            place = f"the NBD server {host}:{self.port}"
        return f"{self.export} of {place}" if self.export else place

    def connect(self, timeout: float) -> socket.socket:
        """A connected socket; raises OSError."""
        if not self.path:
            sock = socket.create_connection((self.host, self.port), timeout)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            return sock
        sock = socket.socket(socket.AF_UNIX)
        try:
            sock.settimeout(timeout)
            sock.connect(self.path)
        except BaseException:
            sock.close()
            raise
        return sock
