"""mcp_client.py, the client: the SSE parser by itself, then the client against a hostile fake."""

from __future__ import annotations

import asyncio
import asyncio.sslproto
import contextlib
import itertools
import json
import re
import shutil
import socket
import ssl
import subprocess
import traceback
import tracemalloc
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import mcp_client
from fake_mcp import (
    STREAM_HEAD,
    FakeMCP,
    Habit,
    a_fake,
    a_fault,
    a_log,
    answers,
    answers_json,
    hangs,
    refuses,
    resets,
    run,
    sends_headers_slowly,
    serving,
    streams,
    writes,
)
from mcp_client import (
    AuthRejected,
    CertificateRejected,
    ConnectionLost,
    EventStream,
    HTTPRequest,
    HTTPResponder,
    HTTPServer,
    InvalidURL,
    MCPEndpoint,
    MCPError,
    MCPSession,
    ModernOnly,
    NoAnswer,
    ProtocolViolation,
    Redirected,
    RequestRefused,
    ResumeFailed,
    ServerBusy,
    SessionGone,
    SSEEvent,
    SSEParser,
    StreamBusy,
    StreamUnsupported,
    ToolFailed,
    ToolHung,
    WrongPath,
    make_tls_context,
    simulated_clusters,
)

SECRET = "s3cr3t-k3y"


pytestmark = pytest.mark.usefixtures("leaks_are_found_in_the_test_that_made_them")


# ---- The SSE parser ----


def parse(*chunks: bytes, max_event_bytes: int = 1_572_864) -> list[SSEEvent]:
    parser = SSEParser(max_event_bytes)
    return [event for chunk in chunks for event in parser.feed(chunk)]


def data_of(*chunks: bytes) -> list[str]:
    return [event.data for event in parse(*chunks)]


def test_the_examples_of_the_html_standard_give_what_it_says() -> None:
    assert data_of(b"data: YHOO\ndata: +2\ndata: 10\n\n") == ["YHOO\n+2\n10"]
    stream = b": test stream\n\ndata: first event\nid: 1\n\ndata:second event\nid\n\ndata:  third\n"
    first, second = parse(stream)
    assert (first.data, first.id) == ("first event", "1")
    assert (second.data, second.id) == ("second event", "")
    assert data_of(b"data\n\ndata\ndata\n\ndata:") == ["", "\n"]
    assert data_of(b"data:test\n\ndata: test\n\n") == ["test", "test"]


@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\r"])
def test_every_line_end_of_the_standard_is_understood(end: bytes) -> None:
    stream = end.join([b"event: message", b"data: a", b"data: b", b"", b"data: c", b"", b""])
    for events in (parse(stream), parse(*(bytes([byte]) for byte in stream))):
        assert [event.data for event in events] == ["a\nb", "c"]


def test_a_carriage_return_and_its_line_feed_may_come_in_different_chunks() -> None:
    assert data_of(b"data: a\r", b"\ndata: b\r", b"\n\r", b"\n") == ["a\nb"]


def test_a_byte_order_mark_is_skipped_at_the_start_only() -> None:
    assert data_of(b"\xef", b"\xbb", b"\xbfdata: a\n\n") == ["a"]
    assert data_of(b"data: a\n\n\xef\xbb\xbfdata: b\n\n") == ["a"]


def test_an_event_does_not_inherit_the_id_of_the_one_before_it() -> None:
    assert [event.id for event in parse(b"id: 7\ndata: a\n\ndata: b\n\n")] == ["7", None]


def test_a_priming_event_without_data_keeps_its_id_and_retry_time() -> None:
    (event,) = parse(b"id: ev1\ndata: \nretry: 1500\n\n")
    assert (event.id, event.data, event.retry_ms) == ("ev1", "", 1500)


def test_ids_with_nul_and_retry_times_that_are_no_numbers_are_ignored() -> None:
    (event,) = parse("id: a\0b\nretry: 1.5\nretry: ٣\nretry:\ndata: x\n\n".encode())
    assert (event.id, event.retry_ms) == (None, None)
    assert parse(b"retry: " + b"9" * 5_000 + b"\ndata: x\n\n")[0].retry_ms is None


def test_comments_and_unknown_fields_are_ignored_however_long_they_are() -> None:
    endless = [b": ping " * 50] * 100
    assert parse(*endless, b"\n", b"nonsense: 1\ndata: x\n\n", max_event_bytes=1_000) == [
        SSEEvent(data="x")
    ]


def test_invalid_utf_8_is_replaced_and_reported() -> None:
    (event,) = parse(b"data: a\xff\xc3(b\n\n")
    assert event.data == "a\ufffd\ufffd(b"
    assert event.problem == "invalid UTF-8 was replaced"


def test_an_event_with_a_context_of_one_mebibyte_fits() -> None:
    data = json.dumps({"context": "x" * 1_048_576})
    assert data_of(b"data: ", data.encode(), b"\n\n") == [data]


@pytest.mark.parametrize("chunk", [1_000, 65_536, 3_000_000])
def test_a_line_of_two_megabytes_is_skipped_in_bounded_memory(chunk: int) -> None:
    stream = b"id: 1\ndata: " + b"x" * 2_000_000 + b"\ndata: y\n\ndata: next\n\n"
    chunks = [stream[start : start + chunk] for start in range(0, len(stream), chunk)]
    parser = SSEParser()
    tracemalloc.start()
    events = [event for piece in chunks for event in parser.feed(piece)]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert [(event.id, event.data) for event in events] == [("1", ""), (None, "next")]
    assert events[0].problem is not None
    assert "1572864" in events[0].problem
    assert peak < 2.5 * 1_572_864 + chunk


def test_an_event_of_endless_short_lines_is_skipped_too() -> None:
    first, second = parse(b"data: x\n" * 1_000, b"\ndata: next\n\n", max_event_bytes=500)
    assert first.problem is not None
    assert second == SSEEvent(data="next")


def test_a_huge_line_in_tiny_chunks_takes_linear_time() -> None:
    parser = SSEParser()
    for _ in range(200_000):  # seconds if this were quadratic: 7 bytes at a time, 1.4 MB at last
        assert parser.feed(b"data: x") == []
    assert len(parser.feed(b"\n\n")[0].data) == 1_400_000 - len("data: ")


def split(stream: bytes, cuts: list[int]) -> list[bytes]:
    edges = [0, *sorted(cut % (len(stream) + 1) for cut in cuts), len(stream)]
    return [stream[start:end] for start, end in itertools.pairwise(edges)]


STREAMS = st.lists(
    st.sampled_from(
        b"\n|\r|\r\n|\n\n|:|: ping|data|data:|data: x| |id: 1|id:|id: \0|retry: 5|event: e|"
        b"\xef\xbb\xbf|\xc3|\xa9|data: yyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyy|zzzzzzzzzzzzzzzzz".split(
            b"|"
        )
    ),
    max_size=40,
).map(b"".join)


@given(stream=STREAMS, cuts=st.lists(st.integers(0, 2_000), max_size=20))
@settings(max_examples=400, deadline=None)
def test_however_the_bytes_are_cut_the_events_are_the_same(stream: bytes, cuts: list[int]) -> None:
    assert parse(*split(stream, cuts), max_event_bytes=64) == parse(stream, max_event_bytes=64)


def events_by_the_letter(stream: bytes) -> list[tuple[str, str, str | None]]:
    """The standard's algorithm written down naively: type, data, id of this block."""
    text = stream.decode(errors="replace").removeprefix("\ufeff")
    *lines, _ = re.split("\r\n|\r|\n", text)
    events: list[tuple[str, str, str | None]] = []
    data, kind, event_id = "", "", None
    for line in lines:
        if not line:
            if data:
                events.append((kind or "message", data.removesuffix("\n"), event_id))
            data, kind, event_id = "", "", None
            continue
        name, _, value = line.partition(":")
        value = value.removeprefix(" ")
        if name == "data":
            data += value + "\n"
        elif name == "event":
            kind = value
        elif name == "id" and "\0" not in value:
            event_id = value
    return events


@given(stream=STREAMS)
@settings(max_examples=400, deadline=None)
def test_the_parser_agrees_with_the_standard_written_down_naively(stream: bytes) -> None:
    ours = [(event.type, event.data, event.id) for event in parse(stream)]
    primers = [event for event in ours if not event[1]]  # reported by us, not by the standard
    theirs = events_by_the_letter(stream)
    assert [event for event in ours if event[1]] == [event for event in theirs if event[1]]
    assert len(primers) >= len([event for event in theirs if not event[1]])


@given(stream=st.binary(max_size=300))
@settings(max_examples=200, deadline=None)
def test_no_bytes_make_the_parser_fail(stream: bytes) -> None:
    parse(stream, max_event_bytes=100)


# ---- A whole conversation ----


@contextlib.asynccontextmanager
async def watching(
    endpoint: MCPEndpoint, *, subscribe: bool = True
) -> AsyncIterator[tuple[MCPSession, EventStream]]:
    session = await MCPSession.connect(endpoint)
    stream = await session.open_stream()
    try:
        if subscribe:
            await session.set_log_level()
            await session.subscribe("faults")
        yield session, stream
    finally:
        await stream.aclose()
        await session.close()


def test_a_fault_reaches_a_client_that_has_subscribed() -> None:
    async def scenario() -> None:
        async with a_fake() as (fake, endpoint):
            async with watching(endpoint) as (session, stream):
                assert fake.emit(a_fault("web-7"))
                message = await anext(stream)
                assert message.problem is None
                assert message.event_id is None
                assert message.params is not None
                assert message.params["logger"] == "kubernetes/faults"
                (subscription,) = await session.subscriptions()
                data = message.params["data"]
                assert isinstance(data, dict)
                expected = {"subscriptionId": subscription, **a_fault("web-7")}
                assert data == expected | {"timestamp": data["timestamp"]}
                assert session.session_id == fake.session.session_id
                assert session.server_name == "kubernetes-mcp-server simulated"
                await session.ping()
            assert not fake.sessions
            kinds = [seen.what for seen in fake.seen]
            assert kinds == [
                "initialize",
                "notifications/initialized",
                "GET",
                "logging/setLevel",
                "tools/call",
                "tools/call",
                "ping",
                "DELETE",
            ]

    run(scenario())


def test_every_request_carries_what_the_transport_asks_for() -> None:
    async def scenario() -> None:
        async with a_fake(initialize=answers_json({"protocolVersion": "2025-06-18"})) as (
            fake,
            where,
        ):
            fake.habits["initialize"] = _initialized("2025-06-18", "abc")
            endpoint = MCPEndpoint(url=where.url, api_key=lambda: SECRET)
            for habit in ("notifications/initialized", "GET", "DELETE", "ping"):
                fake.habits[habit] = answers(202)
            fake.habits["GET"] = streams(then="wait")
            fake.habits["ping"] = answers_json({})
            async with watching(endpoint, subscribe=False) as (session, _):
                await session.ping()
            first, *later = fake.seen
            assert "mcp-session-id" not in first.headers
            assert "mcp-protocol-version" not in first.headers
            assert len(later) == 4
            for seen in later:
                assert seen.headers["mcp-session-id"] == "abc"
                assert seen.headers["mcp-protocol-version"] == "2025-06-18"
            for seen in fake.seen:
                assert seen.headers["authorization"] == f"Bearer {SECRET}"
                assert seen.headers["host"] == where.url.split("/")[2]
                assert "origin" not in seen.headers
                if seen.what == "GET":
                    assert seen.headers["accept"] == "text/event-stream"
                elif seen.what != "DELETE":
                    assert seen.headers["accept"] == "application/json, text/event-stream"
                    assert seen.headers["content-type"] == "application/json"

    run(scenario())


def _initialized(version: str, session_id: str) -> Habit:
    async def habit(request: HTTPRequest, respond: HTTPResponder) -> None:
        result = {"protocolVersion": version, "capabilities": {}, "serverInfo": {"name": "x"}}
        reply = {"jsonrpc": "2.0", "id": json.loads(request.body)["id"], "result": result}
        headers = {"Mcp-Session-Id": session_id} if session_id else {}
        body = json.dumps(reply)
        await respond.send(200, body, content_type="application/json", headers=headers)

    return habit


@pytest.mark.parametrize("version", ["2025-11-25", "2025-06-18", "2025-03-26", "2024-11-05"])
def test_each_session_revision_is_accepted_and_sent_from_then_on(version: str) -> None:
    async def scenario() -> None:
        async with a_fake(initialize=_initialized(version, "s"), ping=answers_json({})) as (
            fake,
            to,
        ):
            fake.habits["notifications/initialized"] = answers(202)
            session = await MCPSession.connect(to)
            await session.ping()
            assert session.protocol_version == version
            assert fake.seen[-1].headers["mcp-protocol-version"] == version

    run(scenario())


def test_the_key_is_read_again_for_each_request() -> None:
    async def scenario() -> None:
        keys = iter(["one", "two\n", None])
        async with a_fake() as (fake, where):
            endpoint = MCPEndpoint(url=where.url, api_key=lambda: next(keys))
            session = await MCPSession.connect(endpoint)
            await session.close()
            sent = [seen.headers.get("authorization") for seen in fake.seen]
            assert sent == ["Bearer one", "Bearer two", None]

    run(scenario())


# ---- Answers to POST ----

GOOD = b'data: {"jsonrpc":"2.0","id":{id},"result":{}}\n\n'


@pytest.mark.parametrize(
    "habit",
    [
        pytest.param(answers_json({}), id="json"),
        pytest.param(streams(GOOD), id="sse"),
        pytest.param(streams(GOOD, then="wait"), id="sse that stays open"),
        pytest.param(streams(GOOD.replace(b"\n", b"\r\n")), id="sse with crlf"),
        pytest.param(
            streams(b": ok\n\nid: 1\ndata: \nretry: 1\n\n", GOOD), id="priming event first"
        ),
        pytest.param(
            streams(b'data: {"jsonrpc":"2.0","method":"notifications/progress"}\n\n', GOOD),
            id="notification first",
        ),
        pytest.param(
            writes(
                b"HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\n",
                STREAM_HEAD + b"\r\n" + GOOD,
            ),
            id="1xx first, close-delimited",
        ),
        pytest.param(
            writes(
                STREAM_HEAD + b"Transfer-Encoding: chunked\r\n\r\n",
                b'5;why="not"\r\ndata:\r\n',
                b'9\r\n {"id":2,\r\ne\r\n"result":{}}\n\n\r\n',
                b"0\r\nX-Trailer: 1\r\n\r\n",
            ),
            id="chunk extensions and trailers",
        ),
        pytest.param(
            writes(
                b'HTTP/1.0 200 OK\r\nContent-Type: application/json\r\n\r\n{"id":{id},"result":{}}'
            ),
            id="http 1.0",
        ),
    ],
)
def test_every_way_to_answer_a_request_is_understood(habit: Habit) -> None:
    async def scenario() -> None:
        async with a_fake() as (fake, endpoint):
            session = await MCPSession.connect(endpoint)
            fake.habits["ping"] = habit
            await session.ping(within=2.0)
            await session.close()

    run(scenario())


@pytest.mark.parametrize(
    ("habit", "kind"),
    [
        pytest.param(answers(200), ConnectionLost, id="empty 200"),
        pytest.param(answers(202), ConnectionLost, id="202 to a request"),
        pytest.param(streams(), ConnectionLost, id="sse without a result"),
        pytest.param(streams(GOOD[:20], then="reset"), ConnectionLost, id="cut in mid-event"),
        pytest.param(resets, ConnectionLost, id="reset"),
        pytest.param(writes(b""), ConnectionLost, id="closed without an answer"),
        pytest.param(writes(b"HTTP/1.1 200 OK\r\nCont"), ConnectionLost, id="closed in the head"),
        pytest.param(
            writes(
                b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 99\r\n\r\n{"
            ),
            ConnectionLost,
            id="closed in the body",
        ),
        pytest.param(writes(b"SSH-2.0-OpenSSH_9.2\r\n\r\n"), ProtocolViolation, id="not http"),
        pytest.param(
            writes(STREAM_HEAD + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n", then="wait"),
            ProtocolViolation,
            id="bad chunk size",
        ),
        pytest.param(
            writes(b"HTTP/1.1 200 OK\r\nX-Long: " + b"x" * 200_000, then="wait"),
            ProtocolViolation,
            id="endless header",
        ),
        pytest.param(
            answers(200, "<html>", content_type="text/html"), ProtocolViolation, id="html"
        ),
        pytest.param(
            answers(200, "[1]", content_type="application/json"), ProtocolViolation, id="[1]"
        ),
        pytest.param(answers_json({}), None, id="control"),
        pytest.param(
            refuses(200, {"code": -32603, "message": "x"}), RequestRefused, id="rpc error"
        ),
        pytest.param(answers(200, "{}", Content_Encoding="gzip"), ProtocolViolation, id="gzip"),
    ],
)
def test_an_answer_that_is_none_fails_with_its_kind(
    habit: Habit, kind: type[MCPError] | None
) -> None:
    async def scenario() -> None:
        async with a_fake() as (fake, endpoint):
            session = await MCPSession.connect(endpoint)
            fake.habits["ping"] = habit
            with pytest.raises(kind) if kind else contextlib.nullcontext():
                await session.ping(within=5.0)
            await session.close()

    run(scenario())


def test_an_answer_that_is_too_large_is_not_read_to_its_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(mcp_client, "_MAX_REPLY_BYTES", 10_000)

    async def scenario() -> None:
        async with a_fake() as (fake, endpoint):
            session = await MCPSession.connect(endpoint)
            fake.habits["ping"] = answers_json({"x": "y" * 100_000})
            with pytest.raises(ProtocolViolation, match="too large"):
                await session.ping()
            fake.habits["ping"] = streams(b"data: " + b"x" * 100_000 + b"\n\n", GOOD)
            await session.ping()  # an event that is too large is skipped, and the result still read
            await session.close()

    run(scenario())


# ---- Statuses ----


@pytest.mark.parametrize(
    ("habit", "kind", "retry"),
    [
        (answers(404, "404 page not found\n"), WrongPath, "slow"),
        (answers(401, "no"), AuthRejected, "slow"),
        (answers(403, "no"), AuthRejected, "slow"),
        (answers(421, "Invalid Host header"), WrongPath, "slow"),
        (answers(400, "bad"), RequestRefused, "slow"),
        (answers(500, "oops"), RequestRefused, "backoff"),
        (answers(502, "bad gateway"), RequestRefused, "backoff"),
        (answers(429), ServerBusy, "backoff"),
        (answers(503), ServerBusy, "backoff"),
        (answers(307, Location="https://u:p@other/mcp?token=t"), Redirected, "slow"),
        (refuses(400, {"code": -32600, "message": "no"}), RequestRefused, "slow"),
    ],
)
def test_a_refused_initialize_says_how_to_go_on(
    habit: Habit, kind: type[MCPError], retry: str
) -> None:
    async def scenario() -> None:
        async with a_fake(initialize=habit) as (fake, endpoint):
            with pytest.raises(kind) as caught:
                await MCPSession.connect(endpoint)
            assert type(caught.value) is kind
            assert caught.value.retry == retry
            assert len(fake.seen) == 1

    run(scenario())


def test_a_redirect_is_reported_without_its_secrets_and_not_followed() -> None:
    async def scenario() -> None:
        habit = answers(308, Location="https://u:p@other.example/mcp?token=t0k3n")
        async with a_fake(initialize=habit) as (_, endpoint):
            with pytest.raises(Redirected, match=r"https://other\.example/mcp") as caught:
                await MCPSession.connect(endpoint)
            assert "t0k3n" not in str(caught.value)
            assert "u:p" not in str(caught.value)

    run(scenario())


@pytest.mark.parametrize(
    ("given", "low", "high"),
    [
        ("7", 7, 7),
        ("999999999999", 3_600, 3_600),
        (timedelta(seconds=100), 1, 100),
        (timedelta(seconds=-100), 0, 0),
    ],
    ids=str,
)
def test_retry_after_is_honoured_in_seconds_and_as_a_date(
    given: str | timedelta, low: int, high: int
) -> None:
    async def scenario() -> None:
        value = given
        if isinstance(given, timedelta):
            value = format_datetime(datetime.now(UTC) + given, usegmt=True)
        async with a_fake(initialize=answers(503, Retry_After=value)) as (_, endpoint):
            with pytest.raises(ServerBusy) as caught:
                await MCPSession.connect(endpoint)
            assert caught.value.retry_after is not None
            assert low <= caught.value.retry_after <= high

    run(scenario())


def test_a_retry_after_that_is_nonsense_is_none() -> None:
    async def scenario() -> None:
        async with a_fake(initialize=answers(429, Retry_After="soon")) as (_, endpoint):
            with pytest.raises(ServerBusy) as caught:
                await MCPSession.connect(endpoint)
            assert caught.value.retry_after is None

    run(scenario())


MODERN = {"supported": ["2026-07-28"], "requested": "2025-11-25"}


@pytest.mark.parametrize(
    "habit",
    [
        refuses(400, {"code": -32022, "message": "Unsupported protocol version", "data": MODERN}),
        refuses(200, {"code": -32022, "message": "Unsupported protocol version", "data": MODERN}),
        refuses(400, {"code": -32602, "message": "want 2026-07-28, not 2025-11-25"}),
        refuses(404, {"code": -32601, "message": "Method not found"}),
        answers_json({"protocolVersion": "2026-07-28"}),
    ],
)
def test_a_server_of_the_sessionless_revision_only_is_recognised(habit: Habit) -> None:
    async def scenario() -> None:
        async with a_fake(initialize=habit) as (_, endpoint):
            with pytest.raises(ModernOnly, match="cannot push events"):
                await MCPSession.connect(endpoint)

    run(scenario())


def test_an_older_revision_that_the_server_names_is_offered_next() -> None:
    async def scenario() -> None:
        data = {"supported": ["2025-03-26", "2026-07-28"], "requested": "2025-11-25"}
        error = {"code": -32602, "message": "Unsupported protocol version", "data": data}
        async with a_fake(initialize=refuses(400, error)) as (fake, endpoint):
            with pytest.raises(RequestRefused):
                await MCPSession.connect(endpoint)
            offered = [seen.message["params"]["protocolVersion"] for seen in fake.seen]
            assert offered == ["2025-11-25", "2025-03-26"]

    run(scenario())


def test_the_session_id_of_a_refusal_is_not_taken() -> None:
    async def scenario() -> None:
        habit = answers(400, "{}", Mcp_Session_Id="00c0ffee")
        async with a_fake(initialize=habit) as (fake, endpoint):
            with pytest.raises(RequestRefused):
                await MCPSession.connect(endpoint)
            assert [seen.what for seen in fake.seen] == ["initialize"]

    run(scenario())


def test_a_session_that_cannot_be_completed_is_ended_on_the_server() -> None:
    async def scenario() -> None:
        async with a_fake(notifications__initialized=answers(500)) as (fake, endpoint):
            with pytest.raises(RequestRefused):
                await MCPSession.connect(endpoint)
            assert fake.seen[-1].what == "DELETE"
            assert not fake.sessions

    run(scenario())


def test_a_session_that_the_server_forgot_is_gone_for_every_kind_of_request() -> None:
    async def scenario() -> None:
        async with a_fake() as (fake, endpoint):
            session = await MCPSession.connect(endpoint)
            fake.sessions.clear()
            for request in (session.ping(), session.open_stream(), session.subscribe("faults")):
                with pytest.raises(SessionGone) as caught:
                    await request
                assert caught.value.retry == "now"
            await session.close()  # which the server answers with 404

    run(scenario())


@pytest.mark.parametrize(
    ("habit", "kind"),
    [
        pytest.param(answers(405), StreamUnsupported, id="405"),
        pytest.param(answers(409), StreamBusy, id="409"),
        pytest.param(answers(401), AuthRejected, id="401"),
        pytest.param(answers(200), ConnectionLost, id="empty 200"),
        pytest.param(answers(202), ConnectionLost, id="202"),
        pytest.param(answers(200, "<html>"), ProtocolViolation, id="html"),
        pytest.param(answers(503, Retry_After="1"), ServerBusy, id="503"),
        pytest.param(answers(400), RequestRefused, id="400"),
    ],
)
def test_a_refused_stream_says_what_it_means(habit: Habit, kind: type[MCPError]) -> None:
    async def scenario() -> None:
        async with a_fake(GET=habit) as (_, endpoint):
            session = await MCPSession.connect(endpoint)
            with pytest.raises(kind):
                await session.open_stream()
            await session.close()

    run(scenario())


def test_a_server_that_gives_no_session_id_is_stateless_whatever_it_says_to_get() -> None:
    async def scenario() -> None:
        async with a_fake(initialize=_initialized("2025-11-25", "")) as (fake, endpoint):
            fake.habits["notifications/initialized"] = answers(202)
            fake.habits["GET"] = streams(then="wait")
            session = await MCPSession.connect(endpoint)
            assert session.session_id is None
            with pytest.raises(StreamUnsupported, match="stateless"):
                await session.open_stream()
            await session.close()
            assert [seen.what for seen in fake.seen] == ["initialize", "notifications/initialized"]

    run(scenario())


def test_a_resumed_stream_that_ends_at_once_is_told_apart() -> None:
    async def scenario() -> None:
        for event_id, raw, kind in (
            ("ev1", b"", ResumeFailed),
            (None, b"", ConnectionLost),
            ("ev1", b": ok\n\n", ConnectionLost),
        ):
            async with a_fake(GET=streams(*filter(None, [raw]))) as (_, endpoint):
                session = await MCPSession.connect(endpoint)
                stream = await session.open_stream(event_id)
                with pytest.raises(ConnectionLost) as caught:
                    await anext(stream)
                assert type(caught.value) is kind
                await session.close()

    run(scenario())


def test_a_busy_stream_can_be_had_once_the_old_one_is_gone() -> None:
    async def scenario() -> None:
        async with a_fake() as (fake, endpoint), watching(endpoint) as (session, stream):
            with pytest.raises(StreamBusy):
                await session.open_stream()
            fake.drop_streams()
            with pytest.raises(ConnectionLost):
                await anext(stream)
            again = await session.open_stream()
            fake.emit(a_fault())
            assert (await anext(again)).params is not None
            await again.aclose()

    run(scenario())


def test_a_server_that_refuses_to_resume_is_asked_again_without() -> None:
    async def scenario() -> None:
        async with a_fake() as (fake, endpoint):
            session = await MCPSession.connect(endpoint)
            stream = await session.open_stream("ev7")
            assert not stream.resumed
            assert stream.last_event_id is None
            gets = fake.all_seen("GET")
            assert [get.headers.get("last-event-id") for get in gets] == ["ev7", None]
            await stream.aclose()
            await session.close()

    run(scenario())


@pytest.mark.parametrize("event_id", ["", "a\x01b", " a "])
def test_an_event_id_that_fits_no_header_is_not_sent(event_id: str) -> None:
    async def scenario() -> None:
        async with a_fake() as (fake, endpoint):
            session = await MCPSession.connect(endpoint)
            stream = await session.open_stream(event_id)
            assert [get.headers.get("last-event-id") for get in fake.all_seen("GET")] == [None]
            await stream.aclose()
            await session.close()

    run(scenario())


def test_deleting_a_session_never_fails() -> None:
    async def scenario() -> None:
        for habit in (answers(404), answers(405), answers(500), resets, hangs):
            async with a_fake(DELETE=habit) as (fake, endpoint):
                session = await MCPSession.connect(endpoint)
                await session.close(within=0.2)
                await session.close()
                assert len(fake.all_seen("DELETE")) == 1
        await MCPSession(endpoint, session_id="x").close()  # nobody listens there any more

    run(scenario())


def test_the_session_of_an_earlier_run_can_be_ended() -> None:
    async def scenario() -> None:
        async with a_fake() as (fake, endpoint):
            old = await MCPSession.connect(endpoint)
            again = MCPSession(
                endpoint, session_id=old.session_id, protocol_version=old.protocol_version
            )
            await again.ping()
            await again.close()
            assert not fake.sessions

    run(scenario())


# ---- Tools ----


def test_a_server_without_the_event_tools_fails_for_good() -> None:
    async def scenario() -> None:
        error = {"code": -32602, "message": 'unknown tool "events_subscribe"'}
        async with a_fake(tools__call=refuses(200, error)) as (_, endpoint):
            session = await MCPSession.connect(endpoint)
            with pytest.raises(ToolFailed, match="unknown tool") as caught:
                await session.subscribe("faults")
            assert caught.value.permanent
            assert caught.value.retry == "slow"
            await session.close()

    run(scenario())


@pytest.mark.parametrize(
    ("text", "permanent"),
    [
        ("event subscriptions require an HTTP/SSE transport", True),
        ("invalid subscription filters: x", True),
        ("failed to create subscription: invalid mode: x", True),
        ("Unknown tool: events_subscribe", True),
        ("failed to create subscription: session has reached maximum subscriptions (10)", False),
        ("failed to create subscription: failed to start watcher: x", False),
        ("", False),
    ],
)
def test_a_tool_s_error_is_permanent_when_no_later_call_can_succeed(
    text: str, permanent: bool
) -> None:
    async def scenario() -> None:
        result = {"content": [{"type": "text", "text": text}], "isError": True}
        async with a_fake(tools__call=answers_json(result)) as (_, endpoint):
            session = await MCPSession.connect(endpoint)
            with pytest.raises(ToolFailed) as caught:
                await session.subscribe("faults")
            assert caught.value.permanent is permanent
            assert text in str(caught.value)
            await session.close()

    run(scenario())


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ('# Created\n\n{\n  "subscriptionId": "sub-a49bdae2"\n}\n\nYou will…', "sub-a49bdae2"),
        ("Subscribed as sub-0011aabb.", "sub-0011aabb"),
        ("{not json} sub-0011aabb", "sub-0011aabb"),
        ("ok", ""),
        ('{"subscriptionId": 5}', ""),
    ],
)
def test_the_subscription_id_is_found_in_whatever_the_tool_says(text: str, found: str) -> None:
    async def scenario() -> None:
        result = {"content": [{"type": "image"}, {"type": "text", "text": text}, 3]}
        async with a_fake(tools__call=answers_json(result)) as (fake, endpoint):
            session = await MCPSession.connect(endpoint)
            assert await session.subscribe("faults") == found
            call = fake.seen[-1].message["params"]
            assert call == {"name": "events_subscribe", "arguments": {"mode": "faults"}}
            await session.close()

    run(scenario())


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (
            '# Active\n\n{"subscriptions":[{"subscriptionId":"a"},{"subscriptionId":"b"}]}',
            ["a", "b"],
        ),
        ('{"subscriptions":[],"total":0}', []),
        ('{"subscriptions":null,"total":0}', []),
        ("You hold sub-0011aabb and sub-0011aacc", ["sub-0011aabb", "sub-0011aacc"]),
        ("No active subscriptions", []),
        ('{"subscriptions":[1,{"subscriptionId":2}]}', []),
    ],
)
def test_the_list_of_subscriptions_is_read(text: str, found: list[str]) -> None:
    async def scenario() -> None:
        result = {"content": [{"type": "text", "text": text}]}
        async with a_fake(tools__call=answers_json(result)) as (fake, endpoint):
            session = await MCPSession.connect(endpoint)
            assert await session.subscriptions() == found
            assert fake.seen[-1].message["params"]["arguments"] == {}
            await session.close()

    run(scenario())


def test_a_result_of_an_unexpected_shape_is_an_empty_text() -> None:
    async def scenario() -> None:
        for result in ({}, {"content": "x"}, [1], None):
            async with a_fake(tools__call=answers_json(result)) as (_, endpoint):
                session = await MCPSession.connect(endpoint)
                assert await session.call_tool("x", {}) == ""
                await session.close()

    run(scenario())


def test_a_server_without_log_levels_is_tolerated_and_other_errors_are_not() -> None:
    async def scenario() -> None:
        for code, tolerated in ((-32601, True), (-32603, False)):
            habit = refuses(200, {"code": code, "message": "Method not found"})
            async with a_fake(logging__setLevel=habit) as (_, endpoint):
                session = await MCPSession.connect(endpoint)
                with contextlib.nullcontext() if tolerated else pytest.raises(RequestRefused):
                    await session.set_log_level()
                await session.close()

    run(scenario())


# ---- The stream ----

BAD_EVENTS = [
    (b"data: {nonsense\n\n", "not JSON"),
    (b"data: [1, 2]\n\n", "batch"),
    (b"data: 5\n\n", "not a JSON-RPC message"),
    (b'data: {"jsonrpc": "2.0"}\n\n', "not a JSON-RPC message"),
    (b'data: {"method": "notifications/message", "params": 5}\n\n', "without params"),
    (b'data: {"method": "notifications/message"}\n\n', "without params"),
    (b"data: " + b"[" * 100_000 + b"\n\n", "nested too deeply"),
    (b"data: " + b'{"a":' * 500 + b"1" + b"}" * 500 + b"\n\n", "nested too deeply"),
    (b'data: {"a": 1' + b"0" * 5_000 + b"}\n\n", "number that is too long"),
    (b"data: " + b"x" * 2_000_000 + b"\n\n", "more than 1572864 bytes"),
    (b"id: 5\ndata: \xff\xfe\n\n", "not JSON"),
]


@pytest.mark.parametrize(("raw", "problem"), BAD_EVENTS)
def test_a_malformed_event_is_a_problem_and_not_the_end(raw: bytes, problem: str) -> None:
    async def scenario() -> None:
        async with a_fake() as (fake, endpoint), watching(endpoint) as (_, stream):
            fake.push(raw, a_log({"n": 1}))
            bad, good = await anext(stream), await anext(stream)
            assert bad.params is None
            assert problem in (bad.problem or "")
            assert good.params is not None

    run(scenario())


def test_what_is_no_log_notification_is_ignored() -> None:
    async def scenario() -> None:
        async with a_fake() as (fake, endpoint), watching(endpoint) as (_, stream):
            fake.push(
                b": ok\n\n",
                b"id: 3\ndata: \nretry: 1500\n\n",
                b"event: endpoint\ndata: /messages\n\n",
                {"jsonrpc": "2.0", "method": "notifications/tools/list_changed"},
                {"jsonrpc": "2.0", "id": 1, "result": {}},
                {"jsonrpc": "2.0", "id": 1, "error": {"code": 1}},
                a_log({"n": 1}),
            )
            message = await anext(stream)
            assert message.problem is None
            assert message.params is not None
            assert message.params["data"] == {"n": 1}
            assert stream.retry_ms == 1500
            assert stream.last_event_id == "3"

    run(scenario())


def test_text_that_is_not_utf_8_is_delivered_and_flagged() -> None:
    async def scenario() -> None:
        async with a_fake() as (fake, endpoint), watching(endpoint) as (_, stream):
            fake.push(b'data: {"method":"notifications/message","params":{"data":"a\xffb"}}\n\n')
            message = await anext(stream)
            assert message.params == {"data": "a\ufffdb"}
            assert message.problem == "invalid UTF-8 was replaced"

    run(scenario())


def test_numbers_that_json_does_not_have_become_null() -> None:
    async def scenario() -> None:
        async with a_fake() as (fake, endpoint), watching(endpoint) as (_, stream):
            numbers = b"[NaN,Infinity,-Infinity,1e999,-1e999,1.5]"
            fake.push(
                b'data: {"method":"notifications/message","params":{"x":' + numbers + b"}}\n\n"
            )
            assert (await anext(stream)).params == {"x": [None, None, None, None, None, 1.5]}

    run(scenario())


def test_a_batch_is_taken_apart_where_the_revision_has_batches() -> None:
    async def scenario() -> None:
        batch = [a_log(1), {"method": "notifications/x"}, a_log(2)]
        event = b"id: 9\ndata: " + json.dumps(batch).encode() + b"\n\n"
        async with a_fake(initialize=_initialized("2025-03-26", "s")) as (fake, endpoint):
            fake.habits["notifications/initialized"] = answers(202)
            fake.habits["GET"] = streams(event, then="wait")
            fake.habits["DELETE"] = answers(200)
            async with watching(endpoint, subscribe=False) as (_, stream):
                first, second = await anext(stream), await anext(stream)
                assert [first.params["data"], second.params["data"]] == [1, 2]  # type: ignore[index]
                assert (first.event_id, second.event_id) == ("9", "9#2")
                assert stream.last_event_id == "9"

    run(scenario())


def test_the_last_event_id_is_of_what_was_handed_out_not_of_what_was_received() -> None:
    async def scenario() -> None:
        async with a_fake() as (fake, endpoint), watching(endpoint) as (_, stream):
            one, two = (json.dumps(a_log(n)).encode() for n in (1, 2))
            fake.push(b"id: a\ndata: " + one + b"\n\nid: b\ndata: " + two + b"\n\n")
            assert (await anext(stream)).event_id == "a"
            assert stream.last_event_id == "a"
            assert (await anext(stream)).event_id == "b"
            assert stream.last_event_id == "b"

    run(scenario())


def test_the_server_s_own_requests_are_answered() -> None:
    async def scenario() -> None:
        async with a_fake() as (fake, endpoint), watching(endpoint) as (_, stream):
            fake.push(
                {"jsonrpc": "2.0", "id": "p-1", "method": "ping"},
                {"jsonrpc": "2.0", "id": 8, "method": "sampling/createMessage", "params": {}},
                {"jsonrpc": "2.0", "id": None, "method": "ping"},
                a_log({"n": 1}),
            )
            await anext(stream)
            answers_seen = await fake.wait_for("", 2)
            bodies = sorted(
                (seen.message for seen in answers_seen), key=lambda body: str(body["id"])
            )
            assert bodies[0]["error"]["code"] == -32601
            assert bodies[1] == {"jsonrpc": "2.0", "id": "p-1", "result": {}}

    run(scenario())


def test_a_flood_of_requests_from_the_server_does_not_pile_up() -> None:
    async def scenario() -> None:
        async with a_fake() as (fake, endpoint), watching(endpoint) as (session, stream):
            fake.habits[""] = hangs
            pings = [{"jsonrpc": "2.0", "id": n, "method": "ping"} for n in range(1_000)]
            fake.push(*pings, a_log({"n": 1}))
            await anext(stream)
            await fake.wait_for("", 8)
            await session.ping()
            assert len(fake.all_seen("")) == 8

    run(scenario())


@pytest.mark.parametrize(
    "habit",
    [
        pytest.param(streams(), id="last chunk"),
        pytest.param(streams(then="reset"), id="end without the last chunk"),
        pytest.param(writes(STREAM_HEAD + b"Content-Length: 0\r\n\r\n"), id="content-length 0"),
        pytest.param(writes(STREAM_HEAD + b"\r\n"), id="close-delimited"),
        pytest.param(
            writes(STREAM_HEAD + b"Transfer-Encoding: chunked\r\n\r\nff\r\ndata: {"), id="mid-chunk"
        ),
    ],
)
def test_a_stream_that_ends_is_a_lost_connection_however_it_ends(habit: Habit) -> None:
    async def scenario() -> None:
        async with (
            a_fake(GET=habit) as (_, endpoint),
            watching(endpoint, subscribe=False) as (_, stream),
        ):
            for _ in range(2):  # and stays one
                with pytest.raises(ConnectionLost):
                    await anext(stream)

    run(scenario())


def test_events_before_a_cut_in_the_middle_of_a_chunk_are_delivered() -> None:
    async def scenario() -> None:
        event = b"data: " + json.dumps(a_log(1)).encode() + b"\n\n"
        chunk = b"%x\r\n%s\r\n" % (len(event), event)
        raw = STREAM_HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + chunk + b"ffff\r\ndata: {"
        async with (
            a_fake(GET=writes(raw)) as (_, endpoint),
            watching(endpoint, subscribe=False) as (_, stream),
        ):
            assert (await anext(stream)).params is not None
            with pytest.raises(ConnectionLost):
                await anext(stream)

    run(scenario())


def test_one_event_may_come_in_many_chunks_and_many_events_in_one() -> None:
    async def scenario() -> None:
        async with a_fake() as (fake, endpoint), watching(endpoint) as (_, stream):
            events = b"".join(
                b"event: message\r\ndata: " + json.dumps(a_log(n)).encode() + b"\r\n\r\n"
                for n in range(50)
            )
            for start in range(0, len(events), 37):
                fake.push(events[start : start + 37])
            got = [(await anext(stream)).params for _ in range(50)]
            assert [params["data"] for params in got if params] == list(range(50))

    run(scenario())


def test_a_consumer_that_does_not_ask_makes_the_server_wait() -> None:
    async def scenario() -> None:
        async with a_fake() as (fake, endpoint), watching(endpoint) as (_, stream):
            respond = fake.session.stream
            assert respond is not None
            respond.write_seconds = 0.5
            sent = 0
            with contextlib.suppress(TimeoutError):
                while sent < 1_000:
                    fake.push(a_log("x" * 100_000))
                    sent += 1
                    await respond.drain()
            assert sent < 1_000
            buffered = len(stream._connection._reader._buffer)  # type: ignore[attr-defined]
            assert buffered < 1_000_000
            for _ in range(sent):
                assert (await anext(stream)).params is not None

    run(scenario())


def test_a_wait_that_is_cancelled_loses_no_event() -> None:
    async def scenario() -> None:
        async with a_fake() as (fake, endpoint), watching(endpoint) as (_, stream):
            for n in range(20):
                waiting = asyncio.ensure_future(anext(stream))
                await asyncio.sleep(0)
                waiting.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await waiting
                fake.push(a_log(n))
                message = await anext(stream)
                assert message.params is not None
                assert message.params["data"] == n

    run(scenario())


def test_closing_a_stream_ends_the_wait_for_its_next_message() -> None:
    async def scenario() -> None:
        async with a_fake() as (_, endpoint), watching(endpoint) as (_, stream):
            waiting = asyncio.ensure_future(anext(stream))
            await asyncio.sleep(0.01)
            await stream.aclose()
            with pytest.raises(ConnectionLost):
                await waiting

    run(scenario())


def test_a_restarted_server_ends_the_stream_and_then_the_session() -> None:
    async def scenario() -> None:
        server = HTTPServer(simulated_clusters([FakeMCP()]))
        host, port = await server.start("127.0.0.1", 0)
        session = await MCPSession.connect(MCPEndpoint(url=f"http://{host}:{port}/alpha/mcp"))
        stream = await session.open_stream()
        await server.close()
        with pytest.raises(ConnectionLost):
            await anext(stream)
        with pytest.raises(ConnectionLost, match="cannot connect"):
            await session.ping()
        server = HTTPServer(simulated_clusters([FakeMCP()]))
        await server.start(host, port)
        with pytest.raises(SessionGone):
            await session.open_stream()
        await session.close()
        await server.close()

    run(scenario())


# ---- Time limits, cancelling, and what must not leak ----


@pytest.mark.parametrize(
    "habit", [hangs, sends_headers_slowly, streams(b": wait\n\n", then="wait")]
)
def test_a_server_that_does_not_answer_in_time_is_given_up(habit: Habit) -> None:
    async def scenario() -> None:
        async with a_fake(initialize=habit) as (fake, endpoint):
            with pytest.raises(NoAnswer, match="initialize") as caught:
                await MCPSession.connect(endpoint, within=0.15)
            assert caught.value.retry == "backoff"
            fake.habits = {"tools/call": habit}
            session = await MCPSession.connect(endpoint)
            with pytest.raises(ToolHung, match="events_subscribe") as hung:
                await session.subscribe("faults", within=0.15)
            assert hung.value.retry == "slow"
            fake.habits = {"GET": habit}
            if habit is not hangs and habit is not sends_headers_slowly:
                await session.close()
                return
            with pytest.raises(NoAnswer, match="stream"):
                await session.open_stream(within=0.15)
            await session.close()

    run(scenario())


def test_a_server_that_does_not_even_accept_is_given_up() -> None:
    async def scenario() -> None:
        with socket.socket() as listener:  # its queue is full: the next SYN is not answered
            listener.bind(("127.0.0.1", 0))
            listener.listen(0)
            port = listener.getsockname()[1]
            fillers = [socket.socket() for _ in range(3)]
            for filler in fillers:
                filler.setblocking(False)
                filler.connect_ex(("127.0.0.1", port))
            with pytest.raises(NoAnswer):
                await MCPSession.connect(
                    MCPEndpoint(url=f"http://127.0.0.1:{port}/mcp"), within=0.2
                )
            for filler in fillers:
                filler.close()

    run(scenario())


@pytest.mark.parametrize("steps", range(0, 40, 3))
def test_cancelling_at_any_point_leaves_no_connection_behind(steps: int) -> None:
    async def whole_life(endpoint: MCPEndpoint) -> None:
        async with watching(endpoint) as (_, stream):
            await anext(stream)

    async def scenario() -> None:
        async with a_fake() as (_, endpoint):  # which checks for open connections at its end
            task = asyncio.create_task(whole_life(endpoint))
            for _ in range(steps):
                await asyncio.sleep(0)
            task.cancel()
            await asyncio.wait([task])

    run(scenario())


def test_a_name_that_does_not_resolve_is_a_lost_connection() -> None:
    async def scenario() -> None:
        for host in ("nowhere.invalid", "a" * 64 + ".invalid"):
            with pytest.raises((ConnectionLost, InvalidURL)):
                await MCPSession.connect(MCPEndpoint(url=f"http://{host}/mcp"))

    run(scenario())


def test_a_server_is_reached_by_name_and_by_ipv6() -> None:
    async def scenario() -> None:
        async with serving(FakeMCP(), host="127.0.0.1") as url:
            port = url.rpartition(":")[2]
            session = await MCPSession.connect(
                MCPEndpoint(url=f"http://localhost:{port}/alpha/mcp")
            )
            await session.close()
        fake = FakeMCP()
        async with serving(fake, host="::1") as url:
            session = await MCPSession.connect(MCPEndpoint(url=f"{url}/alpha/mcp"))
            await session.close()
            assert fake.seen[0].headers["host"].startswith("[::1]:")

    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
    except OSError:
        pytest.skip("no IPv6 here")
    run(scenario())


def test_a_quiet_stream_is_probed_by_the_kernel() -> None:
    async def scenario() -> None:
        async with a_fake() as (_, endpoint), watching(endpoint, subscribe=False) as (_, stream):
            sock = stream._connection._writer.get_extra_info("socket")
            assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
            assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
            if hasattr(socket, "TCP_USER_TIMEOUT"):
                assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 90_000

    run(scenario())


# ---- URLs and secrets ----


@pytest.mark.parametrize(
    "url",
    [
        "",
        "alpha",
        "ftp://alpha/mcp",
        "http:///mcp",
        "http://alpha:port/mcp",
        "http://alpha:99999/mcp",
        "http://[::1/mcp",
        f"http://user:{SECRET}@alpha/mcp",
        f"http://{SECRET}@alpha/mcp",
        f"http://user:{SECRET}/mcp",
        "http://alpha/m cp",
        "http://alpha/m\r\nX: y",
        "http://alpha/ü",
    ],
)
def test_a_url_that_cannot_be_used_is_refused_without_showing_its_secrets(url: str) -> None:
    with pytest.raises(InvalidURL) as caught:
        MCPEndpoint(url=url)
    assert SECRET not in str(caught.value)
    assert caught.value.retry == "slow"


def test_a_url_s_query_is_sent_and_not_shown() -> None:
    async def scenario() -> None:
        async with serving() as url:
            with pytest.raises(WrongPath) as caught:
                await MCPSession.connect(MCPEndpoint(url=f"{url}/mcp?token={SECRET}"))
            assert SECRET not in str(caught.value)
        with pytest.raises(ConnectionLost) as lost:
            await MCPSession.connect(MCPEndpoint(url=f"{url}/mcp?token={SECRET}"))
        assert SECRET not in str(lost.value)
        assert url in str(lost.value)

    run(scenario())


async def echoes(request: HTTPRequest, respond: HTTPResponder) -> None:
    """An error page with everything that was sent, as debugging proxies make them."""
    await respond.send(500, str(dict(request.headers)))


async def echoes_an_error(request: HTTPRequest, respond: HTTPResponder) -> None:
    error = {"code": -32603, "message": f"denied: {request.headers['authorization']}"}
    await refuses(200, error)(request, respond)


async def breaks_http_with_what_it_got(request: HTTPRequest, respond: HTTPResponder) -> None:
    respond.transport.write(f"{request.headers['authorization']}\r\n\r\n".encode())


@pytest.mark.parametrize(
    "habit", [echoes, echoes_an_error, breaks_http_with_what_it_got, answers(401)]
)
def test_the_key_is_in_no_error_even_if_the_server_echoes_it(habit: Habit) -> None:
    async def scenario() -> None:
        async with a_fake(initialize=habit) as (_, where):
            endpoint = MCPEndpoint(url=where.url, api_key=lambda: SECRET)
            with pytest.raises(MCPError) as caught:
                await MCPSession.connect(endpoint)
            shown = "".join(traceback.format_exception(caught.value)) + repr(caught.value)
            assert SECRET not in shown
            assert SECRET not in repr(endpoint)

    run(scenario())


@pytest.mark.parametrize("key", [f"{SECRET}\r\nX-Evil: 1", f"{SECRET}ü", f"{SECRET} x"])
def test_a_key_that_fits_no_header_is_refused_without_being_shown(key: str) -> None:
    async def scenario() -> None:
        endpoint = MCPEndpoint(url="http://127.0.0.1:9/mcp", api_key=lambda: key)
        with pytest.raises(AuthRejected) as caught:
            await MCPSession.connect(endpoint)
        assert SECRET not in "".join(traceback.format_exception(caught.value))

    run(scenario())


def test_a_key_file_that_cannot_be_read_is_reported(tmp_path: Path) -> None:
    async def scenario() -> None:
        key_file = tmp_path / "key"
        endpoint = MCPEndpoint(url="http://127.0.0.1:9/mcp", api_key=key_file.read_text)
        with pytest.raises(AuthRejected, match="FileNotFoundError"):
            await MCPSession.connect(endpoint)

    run(scenario())


def test_what_a_server_says_reaches_an_error_short_and_on_one_line() -> None:
    async def scenario() -> None:
        async with a_fake(initialize=answers(500, "a\n\x1b[31mb\0" + "x" * 5_000)) as (_, endpoint):
            with pytest.raises(RequestRefused) as caught:
                await MCPSession.connect(endpoint)
            text = str(caught.value)
            assert text.isprintable()
            assert len(text) < 400
            assert "a [31mb" in text

    run(scenario())


# ---- TLS ----


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A certificate for 127.0.0.1 that signs itself, and its key."""
    if shutil.which("openssl") is None:
        pytest.skip("no openssl to make a certificate with")
    folder = tmp_path_factory.mktemp("tls")
    cert, key = folder / "cert.pem", folder / "key.pem"
    command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2"
    subprocess.run(
        [
            *command.split(),
            *("-keyout", key, "-out", cert, "-subj", "/CN=nightcrier test"),
            *("-addext", "subjectAltName=IP:127.0.0.1"),
            *("-addext", "keyUsage=digitalSignature,keyCertSign"),
        ],
        check=True,
        capture_output=True,
    )
    return cert, key


def a_server_context(certificate: tuple[Path, Path]) -> ssl.SSLContext:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(*certificate)
    return context


def test_a_server_whose_authority_is_in_ca_file_is_trusted(certificate: tuple[Path, Path]) -> None:
    async def scenario() -> None:
        fake = FakeMCP()
        async with serving(fake, tls=a_server_context(certificate)) as url:
            trust = make_tls_context(str(certificate[0]))
            endpoint = MCPEndpoint(url=f"{url}/alpha/mcp", tls=trust, api_key=lambda: SECRET)
            async with watching(endpoint) as (_, stream):
                fake.emit(a_fault(context="x" * 100_000))  # several TLS records
                message = await anext(stream)
                assert message.params is not None
                fake.drop_streams()
                with pytest.raises(ConnectionLost):
                    await anext(stream)

    run(scenario())


def test_a_server_that_is_not_trusted_is_refused_with_advice(
    certificate: tuple[Path, Path],
) -> None:
    async def scenario() -> None:
        fake = FakeMCP()
        async with serving(fake, tls=a_server_context(certificate)) as url:
            port = url.rpartition(":")[2]
            trust = make_tls_context(str(certificate[0]))
            for host, tls in (("127.0.0.1", None), ("localhost", trust)):
                with pytest.raises(CertificateRejected, match="ca_file"):
                    await MCPSession.connect(
                        MCPEndpoint(url=f"https://{host}:{port}/alpha/mcp", tls=tls)
                    )
            assert not fake.seen

    run(scenario())


def test_https_to_a_server_that_speaks_plain_http_fails(certificate: tuple[Path, Path]) -> None:
    async def scenario() -> None:
        async with serving(FakeMCP()) as url:
            endpoint = MCPEndpoint(url=url.replace("http:", "https:") + "/alpha/mcp")
            with pytest.raises(ConnectionLost):
                await MCPSession.connect(endpoint)

    run(scenario())


def test_one_context_is_shared_for_each_trust_setting(certificate: tuple[Path, Path]) -> None:
    assert make_tls_context(str(certificate[0])) is make_tls_context(str(certificate[0]))
    assert make_tls_context() is not make_tls_context(str(certificate[0]))
    assert asyncio.sslproto.SSLProtocol.max_size == 16_384


def test_a_ca_file_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    empty = tmp_path / "ca.pem"
    empty.touch()
    for path in (str(empty), str(tmp_path / "missing.pem")):
        with pytest.raises(CertificateRejected, match=re.escape(path)):
            make_tls_context(path)
