"""policy.json: which images may be used.

Specification: containers-policy.json(5). Signatures aren't checked here, so that a scope which
demands them is refused.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nbdtool.errors import Error
from nbdtool.registry.reference import Reference

_FILES = (Path("~/.config/containers/policy.json"), Path("/etc/containers/policy.json"))


def check(transport: str, name: Reference | str, *, unsigned: bool) -> None:
    """Raise Error if the policy forbids the image, or demands signatures and not `unsigned`.

    name is a Reference for the transport "docker", else the path of a file or directory.
    """
    path, policy = _load()
    if path is None:
        return
    scopes = policy.get("transports", {})
    scopes = scopes.get(transport, {}) if isinstance(scopes, dict) else {}
    requirements = policy.get("default", [])
    for scope in (*_scopes(name), ""):
        if isinstance(scopes, dict) and scope in scopes:
            requirements = scopes[scope]
            break
    if not isinstance(requirements, list) or not requirements:
        raise Error(f"{path}: no requirements for {transport}:{name}")
    for requirement in requirements:
        kind = requirement.get("type") if isinstance(requirement, dict) else None
        if kind == "reject":
            raise Error(f"{name}: {path} rejects it")
        if kind != "insecureAcceptAnything" and not unsigned:
            raise Error(
                f"{name}: {path} demands signatures ({kind}), which aren't checked here; use"
                " --insecure-policy to do without"
            )


def _load() -> tuple[Path | None, dict[str, Any]]:
    for path in _FILES:
        path = path.expanduser()
        try:
            policy = json.loads(path.read_bytes())
        except FileNotFoundError:
            continue
        except OSError as exc:
            raise Error(f"{path}: {exc.strerror}") from None
        except (ValueError, RecursionError) as exc:
            raise Error(f"{path}: not JSON: {exc}") from None
        if not isinstance(policy, dict):
            raise Error(f"{path}: not a policy")
        return path, policy
    return None, {}


def _scopes(name: Reference | str) -> Iterator[str]:
    """The scopes that the name falls into, the most specific first."""
    text = str(name)
    yield text
    if isinstance(name, Reference):
        text = name.repository
        yield text
    while "/" in text.rstrip("/"):
        text = text.rpartition("/")[0]
        yield text or "/"
    if isinstance(name, Reference):
        labels = name.host.split(".")
        for at in range(1, len(labels)):
            yield "*." + ".".join(labels[at:])
