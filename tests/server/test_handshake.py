"""The handshake, option by option, as a client that follows the specification sees it."""

from __future__ import annotations

import struct
from collections.abc import Iterator

import pytest

from tests.server import wire
from tests.server.harness import Harness, MemoryDisk, harness
from tests.server.wire import context_request, counted, info_request

# Transmission flags
HAS_FLAGS, READ_ONLY, SEND_FLUSH, SEND_FUA, _, SEND_TRIM, SEND_WRITE_ZEROES, SEND_DF = (
    1 << n for n in range(8)
)
CAN_MULTI_CONN, SEND_CACHE, SEND_FAST_ZERO = 1 << 8, 1 << 10, 1 << 11


def disk(size: int, description: str = "") -> MemoryDisk:
    made = MemoryDisk(size)
    made.description = description
    return made


@pytest.fixture
def one() -> Iterator[Harness]:
    """A server of one export."""
    with harness(disk(12345, "the only one")) as running:
        yield running


@pytest.fixture
def two() -> Iterator[Harness]:
    """A server of two exports."""
    with harness({"a": disk(1000, "first"), "b/ß": disk(2000, "second")}) as running:
        yield running


def infos(replies: list[tuple[int, bytes]]) -> dict[int, bytes]:
    """The information replies by type."""
    assert replies[-1][0] == wire.ACK
    assert all(type_ == wire.REP_INFO for type_, _ in replies[:-1])
    return {struct.unpack_from(">H", data)[0]: data[2:] for _, data in replies[:-1]}


def serves(running: Harness, name: str = "") -> bool:
    """Whether a new client is served."""
    client = running.client(name)
    assert client.read(0, 10) == bytes(10)
    client.send(client.packed(wire.DISC))
    return client.ended()


# The opening


def test_oldstyle() -> None:
    with harness(disk(12345), oldstyle=True, read_only=True) as running:
        client = running.connect()
        passwd, magic, size, _, flags, zeroes = struct.unpack(">8sQQHH124s", client.recv(152))
        assert (passwd, magic, size) == (b"NBDMAGIC", 0x420281861253, 12345)
        assert flags & (HAS_FLAGS | READ_ONLY | SEND_DF) == HAS_FLAGS | READ_ONLY
        assert not any(zeroes)
        assert client.read(0, 12345) == bytes(12345)


@pytest.mark.parametrize("flags", [4, 7, 1 << 31, 0xFFFFFFFF])
def test_unknown_client_flags_end_the_connection(one: Harness, flags: int) -> None:
    assert one.connect().hello(flags).ended()
    assert serves(one)


@pytest.mark.parametrize(("flags", "zeroes"), [(0, 124), (1, 124), (2, 0), (3, 0)])
def test_export_name_is_answered_with_zeroes_unless_told_not_to(
    one: Harness, flags: int, zeroes: int
) -> None:
    client = one.connect().hello(flags)
    client.option(wire.EXPORT_NAME)
    size, _ = struct.unpack(">QH", client.recv(10))
    assert size == 12345
    assert not any(client.recv(zeroes))
    assert client.read(5, 100) == bytes(100)


@pytest.mark.parametrize("option", [wire.ABORT, wire.LIST, wire.GO, wire.STARTTLS, 99])
def test_without_fixed_newstyle_there_is_only_export_name(one: Harness, option: int) -> None:
    client = one.connect().hello(2)
    client.option(option, info_request())
    assert client.ended()


def test_an_option_without_its_magic_ends_the_connection(one: Harness) -> None:
    client = one.connect().hello()
    client.send(b"IHAVEOPS" + bytes(8))
    assert client.ended()


def test_structured_replies_negotiated_before_export_name_hold(one: Harness) -> None:
    client = one.connect().hello()
    assert client.outcome(wire.STRUCTURED_REPLY) == wire.ACK
    client.option(wire.EXPORT_NAME, b"whatever")
    _, flags = struct.unpack(">QH", client.recv(10))
    assert flags & SEND_DF
    client.structured = True
    assert client.read(0, 10) == bytes(10)


# Options


@pytest.mark.parametrize("data", [b"", b"goodbye"])
def test_abort(one: Harness, data: bytes) -> None:
    client = one.connect().hello()
    assert client.ask(wire.ABORT, data) == [(wire.ACK, b"")]
    assert client.ended()


def test_abort_by_a_client_that_does_not_wait(one: Harness) -> None:
    client = one.connect().hello()
    client.option(wire.ABORT)
    client.close()
    assert serves(one)


def test_list_shows_all_exports_with_their_descriptions(two: Harness) -> None:
    client = two.connect().hello()
    assert client.ask(wire.LIST) == [
        (wire.SERVER, counted("a") + b"first"),
        (wire.SERVER, counted("b/ß") + b"second"),
        (wire.ACK, b""),
    ]


@pytest.mark.parametrize(
    "option", [wire.LIST, wire.STRUCTURED_REPLY, wire.EXTENDED_HEADERS, wire.STARTTLS]
)
def test_options_that_take_no_data_refuse_some(one: Harness, option: int) -> None:
    client = one.connect().hello()
    assert client.outcome(option, b"data") == wire.INVALID
    assert client.outcome(wire.LIST) == wire.ACK


def test_info_tells_the_export_and_its_block_sizes_always(one: Harness) -> None:
    client = one.connect().hello()
    told = infos(client.ask(wire.INFO, info_request()))
    assert sorted(told) == [0, 3]
    size, flags = struct.unpack(">QH", told[0])
    assert size == 12345
    assert flags == (
        HAS_FLAGS | SEND_FLUSH | SEND_FUA | SEND_TRIM | SEND_WRITE_ZEROES | CAN_MULTI_CONN
    ) | (SEND_CACHE | SEND_FAST_ZERO)
    assert struct.unpack(">III", told[3]) == (1, 4096, 32 << 20)
    assert infos(client.ask(wire.INFO, info_request())) == told
    assert infos(client.ask(wire.GO, info_request())) == told
    assert client.read(0, 10) == bytes(10)


def test_info_tells_name_and_description_on_request(two: Harness) -> None:
    client = two.connect().hello()
    told = infos(client.ask(wire.INFO, info_request("b/ß", (1, 2, 3, 0, 77, 65535))))
    assert told[1].decode() == "b/ß"
    assert told[2] == b"second"
    assert sorted(told) == [0, 1, 2, 3]


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\0\0\0",
        counted(""),
        counted("") + b"\0",
        counted("") + b"\0\1",  # one request, which is missing
        counted("") + b"\xff\xff\0\3",
        info_request() + b"\0",
        b"\0\0\0\7a\0\0",
        b"\xff\xff\xff\xff\0\0",
        info_request(b"nul\0"),
        info_request(b"\xff"),
        info_request("n" * 4097),
    ],
)
@pytest.mark.parametrize("option", [wire.INFO, wire.GO])
def test_info_and_go_refuse_malformed_data(one: Harness, option: int, data: bytes) -> None:
    client = one.connect().hello()
    assert client.ask(option, data)[0][0] == wire.INVALID
    assert infos(client.ask(wire.GO, info_request()))
    assert client.read(0, 10) == bytes(10)


def test_go_after_failures_in_any_order(two: Harness) -> None:
    client = two.connect().hello()
    for option, name in [(wire.GO, "x"), (wire.INFO, ""), (wire.GO, ""), (wire.INFO, "c")]:
        assert client.ask(option, info_request(name))[0][0] == wire.UNKNOWN
    assert infos(client.ask(wire.INFO, info_request("b/ß")))
    assert client.ask(wire.GO, info_request("c"))[0][0] == wire.UNKNOWN
    size, _ = client.go("a")
    assert size == 1000


def test_several_exports_have_no_default(two: Harness) -> None:
    client = two.connect().hello()
    ((type_, text),) = client.ask(wire.GO, info_request(""))
    assert type_ == wire.UNKNOWN
    assert b"nbdinfo --list" in text
    for name in b"", b"c":
        client = two.connect().hello()
        client.option(wire.EXPORT_NAME, name)
        assert client.ended()
    assert serves(two, "a")


def test_one_export_answers_to_any_name(one: Harness) -> None:
    for name in "", "x", "ä" * 2048:
        assert serves(one, name)


def test_a_named_export_answers_to_its_name_alone() -> None:
    with harness(disk(10), name="mine") as running:
        client = running.connect().hello()
        assert client.ask(wire.LIST)[0] == (wire.SERVER, counted("mine"))
        for name in "", "m", "mine2", "MINE":
            assert client.outcome(wire.INFO, info_request(name)) == wire.UNKNOWN
        assert serves(running, "mine")


@pytest.mark.parametrize("option", [0, 4, 12, 77, 1 << 31, 0xFFFFFFFF])
@pytest.mark.parametrize("length", [0, 1, 255, 4096, 4097, 60_000])
def test_unknown_options_are_unsupported_and_their_data_drained(
    one: Harness, option: int, length: int
) -> None:
    client = one.connect().hello()
    assert client.outcome(option, b"IHAVEOPT" * (length // 8) + b"x" * (length % 8)) == wire.UNSUP
    assert client.outcome(wire.LIST) == wire.ACK


def test_too_much_data_is_drained(one: Harness) -> None:
    client = one.connect().hello()
    for option in wire.LIST, wire.GO, wire.SET_META_CONTEXT, 77:
        assert client.outcome(option, bytes(1_000_000)) == wire.TOO_BIG
    assert client.outcome(wire.LIST) == wire.ACK


# Extensions


def test_structured_replies_can_be_turned_off() -> None:
    with harness(disk(10), structured=False) as running:
        client = running.connect().hello()
        assert client.outcome(wire.STRUCTURED_REPLY) == wire.UNSUP
        assert client.outcome(wire.EXTENDED_HEADERS) == wire.UNSUP
        assert client.outcome(wire.SET_META_CONTEXT, context_request()) == wire.INVALID
        _, flags = client.go(mode="simple")
        assert not flags & SEND_DF
        assert client.read(0, 10) == bytes(10)


def test_extended_headers_take_the_place_of_structured_replies(one: Harness) -> None:
    client = one.connect().hello()
    assert client.outcome(wire.STRUCTURED_REPLY) == wire.ACK
    assert client.outcome(wire.EXTENDED_HEADERS) == wire.ACK
    assert client.outcome(wire.EXTENDED_HEADERS) == wire.INVALID
    assert client.outcome(wire.STRUCTURED_REPLY) == wire.EXT_HEADER_REQD
    assert infos(client.ask(wire.GO, info_request()))
    client.structured = client.extended = True
    assert client.read(0, 10) == bytes(10)


@pytest.mark.parametrize(
    ("queries", "listed", "set_"),
    [
        ((), True, False),
        (("base:",), True, False),
        (("base:allocation",), True, True),
        (("base:allocation", "base:allocation", "base:"), True, True),
        (("qemu:dirty-bitmap:x", "base:other", "x-:", "base:allocations"), False, False),
    ],
)
def test_metadata_contexts(
    one: Harness, queries: tuple[str, ...], listed: bool, set_: bool
) -> None:
    client = one.connect().hello()
    assert client.outcome(wire.STRUCTURED_REPLY) == wire.ACK
    ack = (wire.ACK, b"")
    replies = client.ask(wire.LIST_META_CONTEXT, context_request("", *queries))
    context = (wire.META_CONTEXT, bytes(4) + b"base:allocation")
    assert replies == ([context, ack] if listed else [ack])
    replies = client.ask(wire.SET_META_CONTEXT, context_request("", *queries))
    assert [data[4:] for _, data in replies] == ([b"base:allocation", b""] if set_ else [b""])
    assert replies[-1] == ack
    client.structured = True
    infos(client.ask(wire.GO, info_request()))
    client.context = struct.unpack(">I", replies[0][1][:4])[0] if set_ else 0
    answer = client.do(wire.BLOCK_STATUS, 0, 10)
    assert (answer.error == 0) is set_
    assert set_ or (answer.error == wire.EINVAL and "context" in answer.text)


def test_setting_contexts_replaces_those_before_even_when_it_fails(two: Harness) -> None:
    def block_status(*steps: bytes) -> int:
        client = two.connect().hello()
        client.structured, client.context = True, 1
        assert client.outcome(wire.STRUCTURED_REPLY) == wire.ACK
        assert client.outcome(wire.SET_META_CONTEXT, context_request("a", "base:allocation")) == 1
        for step in steps:
            client.outcome(wire.SET_META_CONTEXT, step)
        infos(client.ask(wire.GO, info_request("a")))
        return client.do(wire.BLOCK_STATUS, 0, 1000).error

    assert block_status() == 0
    for step in (
        context_request("a"),
        context_request("b/ß", "base:allocation"),
        context_request("c", "base:allocation"),
        context_request("a", "base:allocation")[:-1],
        context_request("a", "base:allocation") + b"x",
    ):
        assert block_status(step) == wire.EINVAL
        assert block_status(step, context_request("a", "base:allocation")) == 0


@pytest.mark.parametrize(
    "data",
    [
        b"",
        counted(""),
        counted("") + b"\0\0\0",
        counted("") + struct.pack(">I", 0xFFFFFFFF),
        counted("") + struct.pack(">I", 2) + counted("base:allocation"),
        counted("") + struct.pack(">II", 1, 0xFFFFFFFF) + b"base:allocation",
        b"\xff\xff\xff\xff" + struct.pack(">I", 0),
    ],
)
@pytest.mark.parametrize("option", [wire.LIST_META_CONTEXT, wire.SET_META_CONTEXT])
def test_malformed_context_queries(one: Harness, option: int, data: bytes) -> None:
    client = one.connect().hello()
    assert client.outcome(wire.STRUCTURED_REPLY) == wire.ACK
    assert client.outcome(option, data) == wire.INVALID
    assert client.outcome(wire.LIST) == wire.ACK


def test_contexts_need_structured_replies_and_an_export_that_is(two: Harness) -> None:
    client = two.connect().hello()
    request = context_request("a", "base:allocation")
    assert client.outcome(wire.SET_META_CONTEXT, request) == wire.INVALID
    assert client.outcome(wire.STRUCTURED_REPLY) == wire.ACK
    assert client.outcome(wire.SET_META_CONTEXT, context_request("")) == wire.UNKNOWN
    assert client.outcome(wire.LIST_META_CONTEXT, context_request("")) == wire.UNKNOWN
    assert client.outcome(wire.SET_META_CONTEXT, request) == wire.ACK


def test_starttls_without_tls_is_refused_and_the_talk_goes_on(one: Harness) -> None:
    client = one.connect().hello()
    assert client.outcome(wire.STARTTLS) in (wire.POLICY, wire.UNSUP)
    client.go()
    assert client.read(0, 10) == bytes(10)


def test_a_stopping_server_says_so(one: Harness) -> None:
    client = one.connect().hello()
    assert client.outcome(wire.LIST) == wire.ACK
    one.service.stopping = True
    for option in wire.LIST, wire.GO, wire.INFO, 77:
        assert client.outcome(option) == wire.SHUTDOWN
    assert client.outcome(wire.ABORT) == wire.ACK
    assert client.ended()
