"""A simulated cluster with every bad habit that a server, a proxy or a network may have."""

from __future__ import annotations

import asyncio
import contextlib
import json
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from mcp_client import (
    HTTPRequest,
    HTTPResponder,
    HTTPServer,
    MCPEndpoint,
    SimulatedCluster,
    SimulatedSession,
    simulated_clusters,
    simulated_fault,
    sse_message,
)

Habit = Callable[[HTTPRequest, HTTPResponder], Awaitable[None]]
T = TypeVar("T")

STREAM_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n"


def run(coroutine: Coroutine[Any, Any, T], *, seconds: float = 20.0) -> T:
    """Run a test's coroutine; a test that hangs fails instead."""

    async def limited() -> T:
        async with asyncio.timeout(seconds):
            return await coroutine

    return asyncio.run(limited())


def a_fault(name: str = "web-1", **changes: str) -> dict[str, object]:
    what = {
        "fault_type": "CrashLoop",
        "kind": "Pod",
        "namespace": "default",
        "severity": "critical",
        "context": "Container entered CrashLoopBackOff state",
    }
    return simulated_fault("alpha", name=name, **(what | changes))


def a_log(data: object, **changes: object) -> dict[str, object]:
    params = {"data": data, "level": "warning", "logger": "kubernetes/faults"}
    return {"jsonrpc": "2.0", "method": "notifications/message", "params": params, **changes}


# ---- Bad habits: each answers a request in place of the server ----


def answers(
    status: int, body: str = "", *, content_type: str = "text/plain", **headers: str
) -> Habit:
    async def habit(request: HTTPRequest, respond: HTTPResponder) -> None:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        await respond.send(status, body, content_type=content_type, headers=named)

    return habit


def answers_json(result: object) -> Habit:
    """The result as a JSON body instead of a stream, as servers may."""

    async def habit(request: HTTPRequest, respond: HTTPResponder) -> None:
        reply = {"jsonrpc": "2.0", "id": json.loads(request.body)["id"], "result": result}
        await respond.send(200, json.dumps(reply), content_type="application/json; charset=utf-8")

    return habit


def refuses(status: int, error: Mapping[str, object]) -> Habit:
    """A JSON-RPC error."""

    async def habit(request: HTTPRequest, respond: HTTPResponder) -> None:
        reply = {"jsonrpc": "2.0", "id": json.loads(request.body)["id"], "error": error}
        await respond.send(status, json.dumps(reply), content_type="application/json")

    return habit


def streams(*pieces: bytes, then: str = "end") -> Habit:
    """An SSE answer; `{id}` is the request's. `then`: end, reset, or wait for the client."""

    async def habit(request: HTTPRequest, respond: HTTPResponder) -> None:
        request_id = str(json.loads(request.body)["id"]).encode() if request.body else b""
        await respond.start(200, {"Content-Type": "text/event-stream; charset=utf-8"})
        for piece in pieces:
            respond.write(piece.replace(b"{id}", request_id))
        await respond.drain()
        if then == "end":
            await respond.finish()
        elif then == "wait":
            await respond.peer_closed()

    return habit


def writes(*pieces: bytes, then: str = "close") -> Habit:
    """Raw bytes past any HTTP; `{id}` is the request's. `then`: close, or wait for the client."""

    async def habit(request: HTTPRequest, respond: HTTPResponder) -> None:
        request_id = str(json.loads(request.body)["id"]).encode() if request.body else b""
        for piece in pieces:
            respond.transport.write(piece.replace(b"{id}", request_id))
            await asyncio.sleep(0.01)  # so that the pieces arrive as pieces
        if then == "wait":
            await respond.peer_closed()

    return habit


async def hangs(request: HTTPRequest, respond: HTTPResponder) -> None:
    """Takes the request and says nothing, until the client leaves."""
    await respond.peer_closed()


async def sends_headers_slowly(request: HTTPRequest, respond: HTTPResponder) -> None:
    respond.transport.write(b"HTTP/1.1 200 OK\r\n")
    while not respond.transport.is_closing():
        respond.transport.write(b"X-Wait: 1\r\n")
        await asyncio.sleep(0.02)


async def resets(request: HTTPRequest, respond: HTTPResponder) -> None:
    respond.abort()


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """A request as it came in."""

    what: str  # GET, DELETE, or the JSON-RPC method of a POST ("" for an answer)
    headers: Mapping[str, str]
    message: Mapping[str, Any]


class FakeMCP(SimulatedCluster):
    """`habits` replaces the answer to "GET", "DELETE" or a JSON-RPC method; `seen` has them all."""

    def __init__(self, name: str = "alpha") -> None:
        super().__init__(name)
        self.habits: dict[str, Habit] = {}
        self.seen: list[Seen] = []
        self.arrived = asyncio.Condition()

    async def handle(self, request: HTTPRequest, respond: HTTPResponder) -> None:
        message = json.loads(request.body) if request.body else {}
        what = message.get("method", "") if request.method == "POST" else request.method
        async with self.arrived:
            self.seen.append(Seen(what=what, headers=request.headers, message=message))
            self.arrived.notify_all()
        habit = self.habits.get(what)
        await (habit(request, respond) if habit else super().handle(request, respond))

    async def wait_for(self, what: str, count: int = 1) -> list[Seen]:
        """The first `count` requests of a kind, once they have come."""
        async with self.arrived:
            await self.arrived.wait_for(lambda: len(self.all_seen(what)) >= count)
        return self.all_seen(what)

    def all_seen(self, what: str) -> list[Seen]:
        return [seen for seen in self.seen if seen.what == what]

    @property
    def session(self) -> SimulatedSession:
        (only,) = self.sessions.values()
        return only

    def push(self, *events: bytes | Mapping[str, object]) -> None:
        """Write on the open stream: messages as events, bytes as they are."""
        assert self.session.stream is not None
        for event in events:
            data = event if isinstance(event, bytes) else sse_message(event)
            assert self.session.stream.write(data)


@contextlib.asynccontextmanager
async def serving(
    *clusters: SimulatedCluster,
    host: str = "127.0.0.1",
    port: int = 0,
    tls: ssl.SSLContext | None = None,
) -> AsyncIterator[str]:
    """Serve the clusters; their common URL prefix. Fails when a client leaves a connection open."""
    server = HTTPServer(simulated_clusters(clusters))
    host, port = await server.start(host, port, tls=tls)
    scheme, shown = ("https" if tls else "http"), (f"[{host}]" if ":" in host else host)
    try:
        yield f"{scheme}://{shown}:{port}"
        for _ in range(200):  # the client's FIN takes a moment
            if not server.open_connections:
                break
            await asyncio.sleep(0.01)
        assert server.open_connections == 0, "the client left a connection open"
    finally:
        await server.close()


@contextlib.asynccontextmanager
async def a_fake(**habits: Habit) -> AsyncIterator[tuple[FakeMCP, MCPEndpoint]]:
    """One fake cluster and how to reach it. Habits: `GET=`, `initialize=`, `tools__call=`, …"""
    fake = FakeMCP()
    fake.habits.update({name.replace("__", "/"): habit for name, habit in habits.items()})
    async with serving(fake) as url:
        yield fake, MCPEndpoint(url=f"{url}/alpha/mcp")
