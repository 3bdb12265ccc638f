"""HTTP requests: connections, TLS, proxies and redirects.

Specification: RFC 9110 and 9112; containers-certs.d(5) for certificates.
"""

from __future__ import annotations

import base64
import http.client
import socket
import ssl
import urllib.parse
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple, Optional

from nbdtool import __version__
from nbdtool.errors import Error, debug

TIMEOUT = 60  # seconds without a byte
_MAX_REDIRECTS = 10
_REDIRECTS = (301, 302, 303, 307, 308)
_CERTIFICATES = (
    Path("~/.config/containers/certs.d"),
    Path("/etc/containers/certs.d"),
    Path("/etc/docker/certs.d"),
)


class Broken(Exception):
    """The network or the server failed in a way that may pass.

    refused: nobody listens there; wait: the seconds that the server asks for.
    """

    def __init__(self, text: str, *, refused: bool = False, wait: int = 0) -> None:
        super().__init__(text)
        self.refused, self.wait = refused, wait


class PlainHttp(Error):
    """The server doesn't speak TLS."""


class Origin(NamedTuple):
    """What a connection goes to, and what credentials are for."""

    scheme: str
    host: str
    port: int

    @classmethod
    def of(cls, url: str) -> Origin:
        """The origin of a URL; Error if it has none that we could go to."""
        try:
            parts = urllib.parse.urlsplit(url)
            port = parts.port
        except ValueError:
            raise Error(f"{url!r}: not a URL") from None
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise Error(f"{url!r}: neither an http nor an https URL")
        return cls(parts.scheme, parts.hostname, port or (443 if parts.scheme == "https" else 80))

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        usual = (self.scheme, self.port) in (("https", 443), ("http", 80))
        return host if usual else f"{host}:{self.port}"


class Response:
    """An answer whose body is still to be read; close() when done with it."""

    def __init__(
        self, client: Client, origin: Origin, connection: _Connection, raw: http.client.HTTPResponse
    ) -> None:
        self.origin, self.status, self.headers = origin, raw.status, raw.headers
        self._client, self._connection, self._raw = client, connection, raw

    def read(self, size: int, /) -> bytes:
        """Up to `size` bytes, none at the end; raises Broken if the connection ends before."""
        try:
            data = self._raw.read(size)
        except (OSError, http.client.HTTPException) as exc:
            raise Broken(f"{self.origin}: {_reason(exc)}") from None
        if not data and self._raw.length:
            raise Broken(f"{self.origin}: the connection ended {self._raw.length} bytes too early")
        return data

    def read_all(self, limit: int, what: str) -> bytes:
        """The whole body, closed then; Error if it is longer than `limit` bytes."""
        data = b""
        try:
            while len(data) <= limit:
                piece = self.read(limit + 1 - len(data))
                if not piece:
                    return data
                data += piece
        finally:
            self.close()
        raise Error(f"{what}: longer than the {limit >> 20} MiB that are allowed")

    def close(self) -> None:
        if self._raw.isclosed() and not self._raw.will_close:
            self._client.keep(self.origin, self._connection)
        else:
            self._raw.close()
            self._connection.close()


_Connection = http.client.HTTPConnection


class Client:
    """Requests for one registry.

    cert_dir (None: the usual places) has certificates for `host`, the registry; with insecure any
    certificate will do.
    """

    def __init__(self, host: str, *, insecure: bool, cert_dir: str | None) -> None:
        self.host = host
        self.insecure = insecure
        self._certificates = _certificates(host, cert_dir)
        self._contexts: dict[bool, ssl.SSLContext] = {}
        self._idle: dict[Origin, _Connection] = {}

    def request(
        self,
        method: str,
        url: str,
        headers: Mapping[str, str],
        *,
        authorization: str = "",
        body: bytes | None = None,
    ) -> Response:
        """The answer to a request, redirects followed; Error or Broken if there is none.

        The authorization goes to the URL's own origin alone.
        """
        home = Origin.of(url)
        for _ in range(_MAX_REDIRECTS):
            origin = Origin.of(url)
            sent = {**headers, "User-Agent": f"nbdtool/{__version__}"}
            if authorization and origin == home:
                sent["Authorization"] = authorization
            response = self._exchange(origin, method, url, sent, body)
            if response.status not in _REDIRECTS:
                return response
            target = response.headers.get("Location", "")
            response.read_all(1 << 20, url)
            try:
                url = urllib.parse.urljoin(url, target)
            except ValueError:
                raise Error(f"{origin}: redirects to {target!r}, which is not a URL") from None
            if Origin.of(url).scheme == "http" and origin.scheme == "https":
                raise Error(f"{origin} redirects from https to {url!r}; that isn't followed")
            debug(f"redirected to {Origin.of(url)}")
            if response.status == 303:
                method, body = "GET", None
        raise Error(f"{home}: more than {_MAX_REDIRECTS} redirects")

    def keep(self, origin: Origin, connection: _Connection) -> None:
        """The connection can be used again."""
        self._idle.setdefault(origin, connection)
        if self._idle[origin] is not connection:
            connection.close()

    def close(self) -> None:
        while self._idle:
            self._idle.popitem()[1].close()

    def _exchange(
        self, origin: Origin, method: str, url: str, headers: dict[str, str], body: bytes | None
    ) -> Response:
        parts = urllib.parse.urlsplit(url)
        target = urllib.parse.urlunsplit(("", "", parts.path or "/", parts.query, ""))
        target = urllib.parse.quote(target, safe="/?&=%:@!$'()*+,;~-._[]")
        idle = self._idle.pop(origin, None)
        for connection in (idle, None) if idle else (None,):
            proxy = _proxy(origin)
            try:
                connection = connection or self._connect(origin, proxy)
                if proxy and origin.scheme == "http":
                    connection.request(
                        method,
                        f"http://{origin}{target}",
                        body,
                        {**headers, **_proxy_authorization(proxy)},
                    )
                else:
                    connection.request(method, target, body, headers)
                return Response(self, origin, connection, connection.getresponse())
            except (OSError, http.client.HTTPException, ValueError) as exc:
                if connection:
                    connection.close()
                if connection is not idle or idle is None:
                    self._raise(origin, proxy, exc)
        raise AssertionError  # the last round returns or raises

    def _raise(
        self, origin: Origin, proxy: Optional[urllib.parse.SplitResult], exc: Exception
    ) -> None:
        via = f" through the proxy {proxy.hostname}" if proxy else ""
        if isinstance(exc, ssl.SSLCertVerificationError):
            raise Error(
                f"{origin}: its certificate isn't trusted: {exc.verify_message}; put its CA's into"
                f" /etc/containers/certs.d/{self.host}/ca.crt, or use --tls-verify=false"
            ) from None
        if isinstance(exc, ssl.SSLError) and exc.reason in (
            "WRONG_VERSION_NUMBER", "HTTP_REQUEST", "RECORD_LAYER_FAILURE", "PACKET_LENGTH_TOO_LONG"
        ):  # fmt: skip
            raise PlainHttp(
                f"{origin}: it doesn't speak TLS; --tls-verify=false allows plain HTTP"
            ) from None
        ended = isinstance(exc, (ssl.SSLEOFError, ssl.SSLZeroReturnError))
        if isinstance(exc, ssl.SSLError) and not ended:
            text = f"{origin}: TLS failed: {exc.reason or exc}; does it want a client certificate?"
            raise Error(f"{text} (containers-certs.d(5))") from None
        if isinstance(exc, http.client.InvalidURL) or type(exc) is ValueError:
            raise Error(f"{origin}: {exc}") from None
        if isinstance(exc, socket.gaierror) and exc.errno == socket.EAI_NONAME:
            raise Error(f"{origin}{via}: there is no such host") from None
        refused = isinstance(exc, ConnectionRefusedError)
        raise Broken(f"{origin}{via}: {_reason(exc)}", refused=refused) from None

    def _connect(self, origin: Origin, proxy: Optional[urllib.parse.SplitResult]) -> _Connection:
        host, port = (proxy.hostname or "", proxy.port or 8080) if proxy else origin[1:]
        if origin.scheme == "http":
            return http.client.HTTPConnection(host, port, timeout=TIMEOUT)
        context = self._context(origin)
        connection = http.client.HTTPSConnection(host, port, timeout=TIMEOUT, context=context)
        if proxy:
            connection.set_tunnel(origin.host, origin.port, _proxy_authorization(proxy))
        return connection

    def _context(self, origin: Origin) -> ssl.SSLContext:
        """Our client certificate goes to the registry alone; its CA is trusted for its helpers."""
        own = str(origin) == self.host or f"{origin.host}:{origin.port}" == self.host
        if own not in self._contexts:
            context = ssl.create_default_context()
            if self.insecure:
                context.check_hostname = False
                context.verify_mode = ssl.CERT_NONE
            for path in self._certificates:
                try:
                    if path.suffix == ".crt":
                        context.load_verify_locations(path)
                    elif own:
                        context.load_cert_chain(path, path.with_suffix(".key"))
                except (OSError, ssl.SSLError) as exc:
                    raise Error(f"{path}: {exc.strerror or exc}") from None
            self._contexts[own] = context
        return self._contexts[own]


def _certificates(host: str, cert_dir: str | None) -> list[Path]:
    """CA certificates (.crt) and client certificates (.cert, each with a .key) for a registry."""
    folders = [Path(cert_dir)] if cert_dir else [p.expanduser() / host for p in _CERTIFICATES]
    if cert_dir and not folders[0].is_dir():
        raise Error(f"{cert_dir}: not a directory; --cert-dir names one with certificates")
    for folder in folders:
        if folder.is_dir():
            return sorted(p for p in folder.iterdir() if p.suffix in (".crt", ".cert"))
    return []


def _proxy(origin: Origin) -> Optional[urllib.parse.SplitResult]:
    """The proxy that the environment names for the origin."""
    from urllib import request

    if origin.host == "localhost" or origin.host.startswith("127.") or origin.host == "::1":
        return None  # as podman
    proxies = request.getproxies_environment()
    url = proxies.get(origin.scheme) or proxies.get("all")
    if not url or request.proxy_bypass_environment(f"{origin.host}:{origin.port}", proxies):  # type: ignore[attr-defined]
        return None
    if "://" not in url:
        url = f"http://{url}"
    parts = urllib.parse.urlsplit(url)
    if parts.scheme != "http" or not parts.hostname:
        raise Error(f"{origin.scheme}_proxy: only http:// proxies are known, not {parts.scheme}://")
    return parts


def _proxy_authorization(proxy: urllib.parse.SplitResult) -> dict[str, str]:
    if proxy.username is None:
        return {}
    unquote = urllib.parse.unquote
    pair = f"{unquote(proxy.username)}:{unquote(proxy.password or '')}"
    return {"Proxy-Authorization": "Basic " + base64.b64encode(pair.encode()).decode()}


def _reason(exc: Exception) -> str:
    if isinstance(exc, TimeoutError) or "timed out" in str(exc):
        return f"no answer for {TIMEOUT} seconds"
    if isinstance(exc, http.client.RemoteDisconnected):
        return "the connection was closed without an answer"
    if isinstance(exc, http.client.IncompleteRead):
        return "the connection ended too early"
    return getattr(exc, "strerror", None) or str(exc) or type(exc).__name__
