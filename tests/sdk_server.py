"""A server made with the official MCP SDK, for test_mcp_sdk.py. Runs with SDK 1.x and 2.x.

`python sdk_server.py VARIANT` prints the port that it listens on, and serves /mcp. Variants:
stateful, stateless, json (JSON replies to POST), resumable (an event store; events have ids).
Tools: events_subscribe, events_list_subscriptions, and emit, which sends `count` faults on the
GET stream.
"""
# mypy: ignore-errors
# (Two SDKs, of which only one is installed at a time.)

import importlib.metadata
import json
import socket
import sys
from typing import Any

import uvicorn
from mcp import types
from mcp.server.streamable_http import EventMessage, EventStore

SUBSCRIBED = {
    "cluster": "sdk",
    "mode": "faults",
    "status": "active",
    "subscriptionId": "sub-0a0b0c0d",
}
LISTED = {"subscriptions": [{"subscriptionId": "sub-0a0b0c0d"}], "total": 1}


class MemoryEvents(EventStore):
    """Keeps every message of every stream, numbered."""

    def __init__(self) -> None:
        self.events: list[tuple[str, Any]] = []

    async def store_event(self, stream_id: str, message: Any) -> str:
        self.events.append((stream_id, message))
        return f"ev{len(self.events)}"

    async def replay_events_after(self, last_event_id: str, send_callback: Any) -> str | None:
        last = int(last_event_id.removeprefix("ev"))
        if not last:
            return None
        stream_id = self.events[last - 1][0]
        for number, (stream, message) in enumerate(self.events[last:], start=last + 1):
            if stream == stream_id and message is not None:
                await send_callback(EventMessage(message, f"ev{number}"))
        return stream_id


async def call(session: Any, name: str, arguments: dict[str, Any]) -> str:
    if name == "events_subscribe":
        return f"# Event Subscription Created\n\n{json.dumps(SUBSCRIBED, indent=2)}\n\nDone."
    if name == "events_list_subscriptions":
        return f"# Active Subscriptions\n\n{json.dumps(LISTED)}"
    if name == "emit":
        for n in range(arguments["count"]):
            data = {"subscriptionId": "sub-0a0b0c0d", "faultType": "CrashLoop", "n": n}
            # Without related_request_id it goes to the GET stream.
            await session.send_log_message("warning", data, logger="kubernetes/faults")
        return "emitted"
    raise ValueError(f"unknown tool {name!r}")


def app_of_sdk_1(variant: str) -> Any:
    from mcp.server.fastmcp import Context, FastMCP

    server = FastMCP(
        "sdk",
        stateless_http=variant == "stateless",
        json_response=variant == "json",
        event_store=MemoryEvents() if variant == "resumable" else None,
        retry_interval=1_500 if variant == "resumable" else None,
    )

    @server._mcp_server.set_logging_level()
    async def set_level(level: str) -> None:
        return None

    @server.tool(structured_output=False)
    async def events_subscribe(ctx: Context, mode: str = "events") -> str:
        return await call(ctx.session, "events_subscribe", {})

    @server.tool(structured_output=False)
    async def events_list_subscriptions(ctx: Context) -> str:
        return await call(ctx.session, "events_list_subscriptions", {})

    @server.tool(structured_output=False)
    async def emit(ctx: Context, count: int) -> str:
        return await call(ctx.session, "emit", {"count": count})

    return server.streamable_http_app()


def app_of_sdk_2(variant: str) -> Any:
    from mcp.server.lowlevel import Server

    async def list_tools(ctx: Any, params: Any) -> Any:
        schema = {"type": "object"}
        names = ("events_subscribe", "events_list_subscriptions", "emit")
        return types.ListToolsResult(
            tools=[types.Tool(name=name, input_schema=schema) for name in names]
        )

    async def call_tool(ctx: Any, params: Any) -> Any:
        text = await call(ctx.session, params.name, params.arguments or {})
        return types.CallToolResult(content=[types.TextContent(type="text", text=text)])

    async def set_level(ctx: Any, params: Any) -> Any:
        return types.EmptyResult()

    server: Any = Server(
        "sdk",
        on_list_tools=list_tools,
        on_call_tool=call_tool,
        on_set_logging_level=None if variant == "json" else set_level,
    )
    return server.streamable_http_app(
        stateless_http=variant == "stateless",
        json_response=variant == "json",
        event_store=MemoryEvents() if variant == "resumable" else None,
        retry_interval=1_500 if variant == "resumable" else None,
    )


def main() -> None:
    is_old = importlib.metadata.version("mcp").startswith("1.")
    app = (app_of_sdk_1 if is_old else app_of_sdk_2)(sys.argv[1])
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(100)
        print(listener.getsockname()[1], flush=True)
        config = uvicorn.Config(app, log_level="warning", lifespan="on", ws="none")
        uvicorn.Server(config).run(sockets=[listener])


if __name__ == "__main__":
    main()
