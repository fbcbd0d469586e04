"""mcp_client.py, the HTTP server by itself, driven with raw bytes."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator

import pytest

from fake_mcp import run
from mcp_client import (
    HTTPRequest,
    HTTPResponder,
    HTTPServer,
)

pytestmark = pytest.mark.usefixtures("leaks_are_found_in_the_test_that_made_them")


async def demo(request: HTTPRequest, respond: HTTPResponder) -> None:
    if request.path == "/fails":
        raise ZeroDivisionError("on purpose")
    if request.path == "/fails-with-os-error":
        raise FileNotFoundError("on purpose")
    if request.path == "/fails-late":
        await respond.start(200, {})
        respond.write(b"half")
        raise ZeroDivisionError("on purpose")
    if request.path == "/stream":
        await respond.start(200, {"Content-Type": "text/plain"})
        respond.write(b"one")
        await respond.peer_closed()
        return
    if request.path == "/silent":
        return
    text = f"{request.method} {request.path} ?{request.query} {request.body.decode()}"
    await respond.send(200, text, headers={"X-Seen": request.headers.get("x-a", "")})


@contextlib.asynccontextmanager
async def talking(
    server: HTTPServer,
) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    host, port = await server.start("127.0.0.1", 0)
    reader, writer = await asyncio.open_connection(host, port)
    try:
        yield reader, writer
    finally:
        writer.transport.abort()
        await server.close()
        assert server.open_connections == 0


def conversation(*pieces: bytes, server: HTTPServer | None = None) -> bytes:
    """What the server says to these bytes, until it closes the connection."""

    async def scenario() -> bytes:
        async with talking(server or HTTPServer(demo)) as (reader, writer):
            for piece in pieces:
                writer.write(piece)
                await asyncio.sleep(0)
            return await reader.read()

    return run(scenario())


CLOSE = b"Host: x\r\nConnection: close\r\n\r\n"


def test_a_request_is_answered_with_its_length() -> None:
    said = conversation(b"GET /a%20b?q=1 HTTP/1.1\r\nX-A: 1\r\nX-A: 2\r\n" + CLOSE)
    assert said.startswith(b"HTTP/1.1 200 OK\r\n")
    assert b"Content-Length: 14" in said
    assert b"X-Seen: 1, 2" in said
    assert said.endswith(b"\r\n\r\nGET /a b ?q=1 ")


def test_several_requests_share_a_connection_pipelined_or_not() -> None:
    first = b"POST /1 HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\n\r\nabc"
    said = conversation(first + first, b"GET /2 HTTP/1.1\r\n" + CLOSE)
    assert said.count(b"HTTP/1.1 200") == 3
    assert said.endswith(b"GET /2 ? ")


def test_a_head_request_gets_the_length_and_no_body() -> None:
    said = conversation(b"HEAD / HTTP/1.1\r\n" + CLOSE)
    assert b"Content-Length: 9" in said
    assert said.endswith(b"\r\n\r\n")


def test_a_client_that_waits_for_100_continue_gets_it() -> None:
    async def scenario() -> None:
        async with talking(HTTPServer(demo)) as (reader, writer):
            writer.write(
                b"POST / HTTP/1.1\r\nExpect: 100-continue\r\nContent-Length: 2\r\n" + CLOSE
            )
            assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 100")
            writer.write(b"ok")
            assert (await reader.read()).endswith(b"POST / ? ok")

    run(scenario())


@pytest.mark.parametrize(
    ("raw", "status"),
    [
        (b"nonsense\r\n\r\n", b"400"),
        (b"GET / HTTP/1.1\r\n\r\n", b"400"),  # no Host
        (b"GET / HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n", b"400"),
        (b"GET / HTTP/1.1\r\nHost: x\r\nX-Long: " + b"x" * 100_000, b"431"),
        (b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 100000\r\n\r\n" + b"x" * 100_000, b"413"),
    ],
)
def test_a_bad_request_is_answered_and_the_connection_closed(raw: bytes, status: bytes) -> None:
    assert conversation(raw).startswith(b"HTTP/1.1 " + status)


def test_a_client_that_is_too_slow_is_told_and_dropped() -> None:
    said = conversation(b"GET / HT", server=HTTPServer(demo, receive_seconds=0.05))
    assert said.startswith(b"HTTP/1.1 408")


def test_a_client_that_leaves_in_the_middle_of_a_request_is_no_error() -> None:
    async def scenario() -> None:
        for raw in (b"", b"GET / HT", b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\nx"):
            async with talking(HTTPServer(demo)) as (_, writer):
                writer.write(raw)
                await asyncio.sleep(0.01)

    run(scenario())


@pytest.mark.parametrize("path", [b"/fails", b"/fails-with-os-error"])
def test_a_handler_that_fails_is_logged_and_answers_500(
    path: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.ERROR):
        said = conversation(b"GET " + path + b" HTTP/1.1\r\n" + CLOSE)
    assert said.startswith(b"HTTP/1.1 500")
    assert "on purpose" in caplog.text


def test_a_handler_that_fails_late_leaves_a_body_that_is_visibly_cut(
    caplog: pytest.LogCaptureFixture,
) -> None:
    said = conversation(b"GET /fails-late HTTP/1.1\r\n" + CLOSE)
    assert b"half" in said
    assert b"0\r\n\r\n" not in said
    assert "on purpose" in caplog.text


def test_a_handler_that_says_nothing_closes_the_connection() -> None:
    assert conversation(b"GET /silent HTTP/1.1\r\nHost: x\r\n\r\n") == b""


def test_closing_the_server_ends_a_stream() -> None:
    async def scenario() -> None:
        server = HTTPServer(demo)
        async with talking(server) as (reader, writer):
            writer.write(b"GET /stream HTTP/1.1\r\nHost: x\r\n\r\n")
            assert b"chunked" in await reader.readuntil(b"\r\n\r\n")
            assert await reader.readexactly(8) == b"3\r\none\r\n"
            await server.close()
            assert await reader.read() == b""

    run(scenario())


def test_a_client_that_reads_nothing_does_not_hold_the_server() -> None:
    started = asyncio.Event()

    async def flood(request: HTTPRequest, respond: HTTPResponder) -> None:
        started.set()
        respond.write_seconds = 0.05
        await respond.start(200, {})
        while respond.write(b"x" * 100_000):
            await respond.drain()

    async def scenario() -> None:
        server = HTTPServer(flood)
        async with talking(server) as (_, writer):
            writer.write(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
            await started.wait()
            await asyncio.wait(server._connections)
            assert server.open_connections == 0

    run(scenario())


def test_an_address_that_is_taken_is_an_error() -> None:
    async def scenario() -> None:
        first, second = HTTPServer(demo), HTTPServer(demo)
        host, port = await first.start("127.0.0.1", 0)
        with pytest.raises(OSError, match="in use"):
            await second.start(host, port)
        await second.close()
        await first.close()

    run(scenario())
