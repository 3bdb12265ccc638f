"""What a registry or something on the way may do to a download."""

from __future__ import annotations

import random
import re
from pathlib import Path
from typing import Callable, Optional

import pytest

from nbdtool.registry import http
from tests.registry import rig
from tests.registry.fetching import DATA, LAYER, MIB, fetch, refused
from tests.registry.rig import Answer, Request

pytestmark = pytest.mark.usefixtures("own_files", "temporary", "pauses")

BLOB = "/blobs/" + rig.digest(LAYER)
Respond = Callable[[Request], Answer]


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
def test_one_altered_byte_is_noticed(at: int, host: str, temporary: Path) -> None:
    def alter(request: Request, answer: Answer) -> None:
        body = bytearray(answer.body)
        body[at] ^= 1
        answer.body = bytes(body)

    with rig.scripted(spoiled(host, alter)) as proxy:
        assert re.search("digest|tar archive|no file", refused(f"{proxy.host}/k/disk:v1"))
    assert rig.left_behind(temporary) == []


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


def test_busy_registry_is_asked_again_when_it_says(host: str, pauses: list[float]) -> None:
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
