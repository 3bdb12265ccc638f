"""An image in a registry.

Specification: OCI distribution-spec, sections "Pulling manifests" and "Pulling blobs"; Docker's
token authentication for the Bearer scheme; RFC 7617 for Basic.
"""

from __future__ import annotations

import functools
import json
import re
import time
import urllib.parse
from collections.abc import Mapping
from typing import Any, Callable, Optional, TypeVar

from nbdtool.errors import Error, debug
from nbdtool.registry import manifest
from nbdtool.registry.config import Endpoint
from nbdtool.registry.credentials import Login
from nbdtool.registry.digest import Stream
from nbdtool.registry.http import Broken, Client, Origin, PlainHttp, Response
from nbdtool.registry.manifest import Descriptor, Document
from nbdtool.registry.reference import DOCKER_HUB

_DOCKER_HUB_API = "registry-1.docker.io"
_MAX_WAIT = 60  # seconds, whatever Retry-After says
_MAX_TOKEN = 1 << 20  # bytes of the answer that has it
_PROGRESS = 1 << 20  # bytes after which a broken download has all its retries again
_CHALLENGE = re.compile(r'([A-Za-z]+)=(?:"((?:[^"\\]|\\.)*)"|([^\s,"]+))')

T = TypeVar("T")


class NotFound(Error):
    """The registry doesn't have the image, or doesn't show it to us."""


class Registry:
    """An image by its endpoint, as a Source; login is None for anonymous access."""

    def __init__(
        self, endpoint: Endpoint, login: Optional[Login], *, cert_dir: str | None, retries: int
    ) -> None:
        self.reference = endpoint.reference
        self.description = str(self.reference)
        host = self.reference.host
        self._client = Client(host, insecure=endpoint.insecure, cert_dir=cert_dir)
        self._login, self._retries = login, retries
        self._host = _DOCKER_HUB_API if host == DOCKER_HUB else host
        self._scheme = "https"
        self._authorization = ""

    def manifest(self, digest: str = "") -> Document:
        """The manifest or index with this digest, or the one that the reference names."""
        version = digest or self.reference.version
        what = f"{self.reference.repository}{'@' if ':' in version else ':'}{version}"

        def get() -> Document:
            response = self._get(f"manifests/{version}", {"Accept": ", ".join(manifest.ACCEPT)})
            data = response.read_all(manifest.LIMIT, what)
            promised = response.headers.get("Docker-Content-Digest", "")
            kind = response.headers.get_content_type()
            return Document(data, kind, version if ":" in version else promised)

        return self._retrying(get)

    def blob(self, descriptor: Descriptor) -> Stream:
        """The bytes of a blob; a broken download is taken up again."""
        return _Blob(self, descriptor)

    def close(self) -> None:
        self._client.close()

    def open_blob(self, descriptor: Descriptor, start: int) -> Response:
        """The answer that has the blob from byte `start` on, or from its beginning."""
        headers = {"Accept-Encoding": "identity"}
        if start:
            headers["Range"] = f"bytes={start}-"
        response = self._get(f"blobs/{descriptor.digest}", headers)
        total = descriptor.size - start
        if response.status == 206 and start:
            expected = f"bytes {start}-{descriptor.size - 1}/{descriptor.size}"
            found = " ".join(response.headers.get("Content-Range", "").split())
            if found != expected:
                response.close()
                raise Error(f"{response.origin}: sent {found!r} where {expected!r} was asked for")
        elif response.status == 200:
            total = descriptor.size
        else:
            response.close()
            raise Error(f"{response.origin}: answers a GET with status {response.status}")
        length = response.headers.get("Content-Length")
        if length is not None and length != str(total):
            response.close()
            raise Error(
                f"{descriptor}: the registry has {length} bytes of it, the manifest says {total}"
            )
        return response

    def pause(self, attempt: int, failure: Broken) -> None:
        """Wait before attempt number 1, 2, ... or raise Error if there were enough."""
        if attempt > self._retries:
            tried = f" ({attempt} attempts)" if attempt > 1 and not failure.refused else ""
            raise Error(f"{self.reference}: {failure}{tried}")
        seconds = max(failure.wait, min(0.25 * 4 ** (attempt - 1), 16))
        debug(f"{failure}; trying again in {seconds:g} s")
        time.sleep(seconds)

    def _retrying(self, action: Callable[[], T]) -> T:
        attempt = 0
        while True:
            try:
                return action()
            except Broken as failure:
                attempt = self._retries + 1 if failure.refused else attempt + 1
                self.pause(attempt, failure)

    # Requests and their authentication

    def _get(self, path: str, headers: Mapping[str, str]) -> Response:
        """A successful answer; authenticates when the registry asks for it."""
        response = self._request(path, headers)
        if response.status == 401:
            challenge = response.headers.get_all("WWW-Authenticate") or []
            response.read_all(_MAX_TOKEN, str(response.origin))
            self._authenticate(response.origin, challenge)
            response = self._request(path, headers)
        if response.status >= 300:
            self._refuse(response)
        return response

    def _request(self, path: str, headers: Mapping[str, str]) -> Response:
        for scheme in (self._scheme, "http"):
            url = f"{scheme}://{self._host}/v2/{self.reference.path}/{path}"
            try:
                response = self._client.request(
                    "GET", url, headers, authorization=self._authorization
                )
            except (PlainHttp, Broken) as failure:
                plain = isinstance(failure, PlainHttp) or failure.refused
                if scheme == "http" or not self._client.insecure or not plain:
                    raise
            else:
                self._scheme = scheme
                return response
        raise AssertionError  # the last round returns or raises

    def _authenticate(self, origin: Origin, challenges: list[str]) -> None:
        """Get what the registry wants to see: sets the value of the Authorization header."""
        for challenge in challenges:
            scheme, _, rest = challenge.strip().partition(" ")
            # Another challenge may follow in the same header: the first realm is ours.
            values = {key.lower(): a or b for key, a, b in reversed(_CHALLENGE.findall(rest))}
            if scheme.lower() == "bearer":
                if not values.get("realm"):
                    raise Error(f"{origin}: asks for a token without saying from where")
                token = self._retrying(functools.partial(self._token, origin, values))
                self._authorization = f"Bearer {token}"
                return
            if scheme.lower() == "basic":
                if not self._login or self._login.identity_token:
                    raise self._denied(str(origin))
                if self._authorization:
                    raise self._denied(str(origin))
                self._authorization = self._login.basic
                return
        raise Error(f"{origin}: asks for an unknown kind of authentication")

    def _token(self, origin: Origin, challenge: dict[str, str]) -> str:
        realm = challenge["realm"]
        server = Origin.of(realm)
        if server.scheme == "http" and origin.scheme == "https":
            raise Error(f"{origin}: sends us for a token from https to {realm!r}; refused")
        scope = challenge.get("scope") or f"repository:{self.reference.path}:pull"
        query = {"service": challenge.get("service", ""), "scope": scope}
        if not query["service"]:
            del query["service"]
        authorization, body, headers = "", None, {"Accept": "application/json"}
        if self._login and self._login.identity_token:
            query |= {
                "grant_type": "refresh_token",
                "client_id": "nbdtool",
                "refresh_token": self._login.identity_token,
            }
            body = urllib.parse.urlencode(query).encode()
            headers["Content-Type"] = "application/x-www-form-urlencoded"
        else:
            if self._login:
                authorization = self._login.basic
                query["account"] = self._login.user
            realm += ("&" if "?" in realm else "?") + urllib.parse.urlencode(query)
        method = "POST" if body else "GET"
        response = self._client.request(
            method, realm, headers, authorization=authorization, body=body
        )
        if response.status in (400, 401, 403):
            response.read_all(_MAX_TOKEN, str(server))
            raise self._denied(f"{server}, which has the tokens for {origin},")
        if response.status >= 300:
            self._refuse(response)
        try:
            answer = json.loads(response.read_all(_MAX_TOKEN, f"{server}: the token"))
            token = answer.get("token") or answer["access_token"]
            if not isinstance(token, str) or not token.isascii() or not token.isprintable():
                raise ValueError
        except (ValueError, KeyError, AttributeError, RecursionError):
            raise Error(f"{server}: its answer has no token") from None
        return token

    def _denied(self, who: str) -> Error:
        login = self._login
        if login is None:
            return Error(
                f"{self.reference}: {who} wants a login; give --creds USER:PASSWORD, or"
                f" `podman login {self.reference.host}` (--authfile names another file)"
            )
        return Error(
            f"{self.reference}: {who} refuses the login of {login.user or 'the identity token'!r}"
            f" from {login.source}"
        )

    def _refuse(self, response: Response) -> None:
        """Raise what a status that isn't success means."""
        status, origin = response.status, response.origin
        retry_after = response.headers.get("Retry-After", "")
        text = _message(response)
        name = f"{self.reference}: {origin}"
        if status == 401:
            raise self._denied(str(origin))
        if status == 403:
            raise Error(f"{name} denies access{text}")
        if status == 404:
            hint = "" if self._login else "; if it is private, log in (--creds or `podman login`)"
            raise NotFound(f"{name} has no such image{text}{hint}")
        if status == 429:
            wait = int(retry_after) if re.fullmatch(r"\d{1,6}", retry_after) else 0
            if wait > _MAX_WAIT:
                raise Error(f"{name} wants us to wait {wait} seconds (429){text}; log in or wait")
            text = f"{origin}: too many requests (429){text}; log in, or try later"
            raise Broken(text, wait=wait)
        if status >= 500 or status == 408:
            raise Broken(f"{origin}: status {status}{text}")
        raise Error(f"{name} answers with status {status}{text}")


class _Blob:
    """The bytes of a blob; reads on with another request when a connection breaks."""

    def __init__(self, registry: Registry, descriptor: Descriptor) -> None:
        self._registry, self._descriptor = registry, descriptor
        self._response: Optional[Response] = None
        self._at = 0  # bytes delivered
        self._attempt, self._broke_at = 0, 0

    def read(self, size: int, /) -> bytes:
        while True:
            try:
                data = self._read(size)
            except Broken as failure:
                self.close()
                if self._at - self._broke_at >= _PROGRESS:
                    self._attempt = 0
                self._attempt, self._broke_at = self._attempt + 1, self._at
                self._registry.pause(self._attempt, failure)
            else:
                self._at += len(data)
                return data

    def _read(self, size: int) -> bytes:
        if self._at == self._descriptor.size:
            return b""
        if self._response is None:
            response = self._registry.open_blob(self._descriptor, self._at)
            self._response = response
            left = self._at if response.status == 200 else 0  # Range was ignored
            while left:
                left -= len(self._some(min(left, size)))
        return self._some(min(size, self._descriptor.size - self._at))

    def _some(self, size: int) -> bytes:
        assert self._response
        data = self._response.read(size)
        if not data:
            raise Broken(f"{self._response.origin}: the connection ended too early")
        return data

    def close(self) -> None:
        if self._response is not None:
            self._response.close()
            self._response = None


def _message(response: Response) -> str:
    """What the registry says about its refusal, in brackets."""
    try:
        document: Any = json.loads(response.read_all(1 << 20, ""))
        text = document["errors"][0].get("message")
    except (Error, Broken, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return ""
    return f" ({text[:200]})" if isinstance(text, str) and text else ""
