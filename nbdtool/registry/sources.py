"""From what a user calls an image to the image: the transports of containers-transports(5)."""

from __future__ import annotations

import getpass
import sys
from pathlib import Path
from typing import NamedTuple, Optional

from nbdtool.errors import Error, UsageError, debug
from nbdtool.registry import config, credentials, layouts, manifest, policy
from nbdtool.registry.client import Registry
from nbdtool.registry.credentials import Login
from nbdtool.registry.manifest import Image, Platform, Source
from nbdtool.registry.reference import Reference

_OTHERS = ("docker-daemon", "ostree", "sif", "tarball", "atomic")


class Options(NamedTuple):
    """How to get at an image; tls_verify is None where the user leaves it to the files."""

    creds: Optional[str] = None
    authfile: Optional[str] = None
    cert_dir: Optional[str] = None
    tls_verify: Optional[bool] = None
    insecure_policy: bool = False
    retries: int = 3


def open_image(name: str, platform: Platform | None, options: Options) -> tuple[Source, Image]:
    """The image and where its layers come from; raises Error."""
    transport, colon, rest = name.partition(":")
    if colon and transport in layouts.TRANSPORTS:
        if transport != "containers-storage":
            path = layouts.split(rest)[0]
            policy.check(transport, str(Path(path).resolve()), unsigned=options.insecure_policy)
        source = layouts.TRANSPORTS[transport](rest)
        return _load(source, platform)
    if colon and transport in _OTHERS:
        known = ", ".join(("docker://", *(f"{t}:" for t in layouts.TRANSPORTS)))
        raise UsageError(f"{name}: {transport}: isn't known; there are {known}")
    return _from_registry(name, platform, options)


def _from_registry(name: str, platform: Platform | None, options: Options) -> tuple[Source, Image]:
    """The image of the first registry and mirror that has it."""
    registries = config.load()
    failures: list[Error] = []
    for reference in registries.candidates(name):
        policy.check("docker", reference, unsigned=options.insecure_policy)
        for endpoint in registries.endpoints(reference):
            if options.tls_verify is not None:
                endpoint = endpoint._replace(insecure=not options.tls_verify)
            login = _login(endpoint.reference, options, registries.helpers)
            source = Registry(endpoint, login, cert_dir=options.cert_dir, retries=options.retries)
            source.description = str(reference)
            try:
                return _load(source, platform)
            except Error as exc:
                debug(str(exc))
                failures.append(exc)
    if len(failures) == 1:
        raise failures[0]
    raise Error(f"{name}: " + "; ".join(map(str, failures)))


def _load(source: Source, platform: Platform | None) -> tuple[Source, Image]:
    try:
        return source, manifest.load(source, platform)
    except BaseException:
        source.close()
        raise


def _login(reference: Reference, options: Options, helpers: list[str]) -> Login | None:
    if options.creds is None:
        return credentials.find(reference, options.authfile, helpers)
    user, colon, password = options.creds.partition(":")
    if not colon:
        if not sys.stdin.isatty():
            raise UsageError("--creds=USER asks for the password, but nobody is at a terminal")
        password = getpass.getpass(f"Password of {user} at {reference.host}: ")
    return Login(user, password, "--creds")
