"""mcp_client.py against servers made with the official MCP SDK, 2.x and 1.x, as processes."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest

from fake_mcp import FakeMCP, a_fault, run, serving
from mcp_client import (
    ConnectionLost,
    EventStream,
    MCPEndpoint,
    MCPSession,
    ResumeFailed,
    SessionGone,
    StreamBusy,
    StreamUnsupported,
    WrongPath,
)

SERVER = Path(__file__).with_name("sdk_server.py")
NEWEST_1 = "mcp==1.30.0"

StartSDK = Callable[[str], str]


@pytest.fixture(scope="session")
def python_of_sdk_1(request: pytest.FixtureRequest) -> str:
    """The interpreter of an environment with the newest 1.x SDK, made once and then kept."""
    cache = request.config.cache
    assert cache is not None
    folder = cache.mkdir(NEWEST_1.replace("==", "-") + f"-py{sys.version_info.minor}")
    home, complete = folder / "venv", folder / "complete"
    python = home / "bin" / "python"
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # pytest-xdist has several of these sessions
        if not complete.exists():
            for command in (
                [sys.executable, "-m", "venv", "--clear", str(home)],
                [str(python), "-m", "pip", "install", "-q", NEWEST_1, "uvicorn"],
            ):
                done = subprocess.run(command, capture_output=True, text=True, check=False)
                if done.returncode:
                    pytest.skip(f"cannot install {NEWEST_1}: {done.stderr.strip()[-300:]}")
            complete.touch()
    return str(python)


@pytest.fixture(
    scope="session", params=[pytest.param("2.x"), pytest.param("1.x", marks=pytest.mark.slow)]
)
def start_sdk(request: pytest.FixtureRequest) -> Iterator[StartSDK]:
    """Starts one server for each variant that is asked for; its URL."""
    is_old = request.param == "1.x"
    python = request.getfixturevalue("python_of_sdk_1") if is_old else sys.executable
    urls: dict[str, str] = {}
    with contextlib.ExitStack() as servers:

        def start(variant: str) -> str:
            if variant not in urls:
                server = servers.enter_context(
                    subprocess.Popen(
                        [python, "-W", "ignore", str(SERVER), variant],
                        stdout=subprocess.PIPE,
                        text=True,
                    )
                )
                servers.callback(server.kill)
                assert server.stdout is not None
                urls[variant] = f"http://127.0.0.1:{int(server.stdout.readline())}/mcp"
            return urls[variant]

        yield start


@contextlib.asynccontextmanager
async def watching(url: str) -> AsyncIterator[tuple[MCPSession, EventStream]]:
    session = await MCPSession.connect(MCPEndpoint(url=url))
    stream = await session.open_stream()
    try:
        await session.set_log_level()
        assert await session.subscribe("faults") == "sub-0a0b0c0d"
        yield session, stream
    finally:
        await stream.aclose()
        await session.close()


async def numbers(stream: EventStream, count: int) -> list[int]:
    """The numbers of the next faults."""
    got = []
    for _ in range(count):
        message = await anext(stream)
        assert message.problem is None
        assert message.params is not None
        assert message.params["logger"] == "kubernetes/faults"
        data = message.params["data"]
        assert isinstance(data, dict)
        got.append(data["n"])
    return got


@pytest.mark.parametrize("variant", ["stateful", "json", "resumable"])
def test_a_whole_session_with_the_sdk_s_server(start_sdk: StartSDK, variant: str) -> None:
    async def scenario() -> None:
        async with watching(start_sdk(variant)) as (session, stream):
            assert session.protocol_version == "2025-11-25"
            assert session.server_name.startswith("sdk")
            await session.ping()
            assert await session.subscriptions() == ["sub-0a0b0c0d"]
            assert await session.call_tool("emit", {"count": 50}) == "emitted"
            assert await numbers(stream, 50) == list(range(50))

    run(scenario())


def test_the_sdk_refuses_a_second_stream_until_the_first_is_gone(start_sdk: StartSDK) -> None:
    async def scenario() -> None:
        async with watching(start_sdk("stateful")) as (session, stream):
            with pytest.raises(StreamBusy):
                await session.open_stream()
            await stream.aclose()
            again = await reopened(session)
            await session.call_tool("emit", {"count": 2})
            assert await numbers(again, 2) == [0, 1]
            await again.aclose()

    run(scenario())


async def reopened(session: MCPSession, last_event_id: str | None = None) -> EventStream:
    """The stream, once the server has noticed that the last one is closed."""
    while True:
        try:
            return await session.open_stream(last_event_id)
        except StreamBusy:
            await asyncio.sleep(0.02)


def test_a_session_that_the_sdk_has_ended_is_gone(start_sdk: StartSDK) -> None:
    async def scenario() -> None:
        url = start_sdk("stateful")
        session = await MCPSession.connect(MCPEndpoint(url=url))
        stream = await session.open_stream()
        again = MCPSession(MCPEndpoint(url=url), session_id=session.session_id)
        again.protocol_version = session.protocol_version
        await session.close()
        with pytest.raises(ConnectionLost):
            await anext(stream)
        for request in (again.ping(), again.open_stream()):
            with pytest.raises(SessionGone):
                await request

    run(scenario())


def test_a_stateless_sdk_server_cannot_push_events(start_sdk: StartSDK) -> None:
    async def scenario() -> None:
        session = await MCPSession.connect(MCPEndpoint(url=start_sdk("stateless")))
        assert session.session_id is None
        assert await session.subscribe("faults") == "sub-0a0b0c0d"  # which proves nothing
        with pytest.raises(StreamUnsupported):
            await session.open_stream()
        await session.close()

    run(scenario())


def test_what_was_missed_is_replayed_by_a_server_that_keeps_events(start_sdk: StartSDK) -> None:
    async def scenario() -> None:
        async with watching(start_sdk("resumable")) as (session, stream):
            await session.call_tool("emit", {"count": 3})
            assert await numbers(stream, 2) == [0, 1]  # the third has arrived, but is not taken
            last = stream.last_event_id
            assert last is not None
            await stream.aclose()
            await session.call_tool("emit", {"count": 2})  # while nobody listens
            again = await reopened(session, last)
            assert again.resumed
            assert await numbers(again, 3) == [2, 0, 1]
            await session.call_tool("emit", {"count": 1})
            assert await numbers(again, 1) == [0]
            assert again.retry_ms == 1_500
            assert again.last_event_id != last
            await again.aclose()

    run(scenario())


def test_an_event_id_that_the_server_does_not_know_ends_the_stream(start_sdk: StartSDK) -> None:
    async def scenario() -> None:
        async with watching(start_sdk("resumable")) as (session, stream):
            await stream.aclose()
            resumed = await reopened(session, "ev0")
            with pytest.raises(ResumeFailed):
                await anext(resumed)
            again = await reopened(session)
            await session.call_tool("emit", {"count": 1})
            assert await numbers(again, 1) == [0]
            await again.aclose()

    run(scenario())


def test_each_event_of_a_server_that_keeps_them_has_an_id_of_its_own(start_sdk: StartSDK) -> None:
    async def scenario() -> None:
        async with watching(start_sdk("resumable")) as (session, stream):
            await session.call_tool("emit", {"count": 5})
            ids = [(await anext(stream)).event_id for _ in range(5)]
            assert None not in ids
            assert len(set(ids)) == 5

    run(scenario())


def test_another_path_of_the_sdk_s_server_is_the_wrong_path(start_sdk: StartSDK) -> None:
    async def scenario() -> None:
        url = start_sdk("stateful").replace("/mcp", "/sse")
        with pytest.raises(WrongPath):
            await MCPSession.connect(MCPEndpoint(url=url))

    run(scenario())


@pytest.mark.filterwarnings("ignore:The logging capability is deprecated")
def test_the_sdk_s_own_client_is_served_by_the_simulated_cluster() -> None:
    """Otherwise our client could be right about nothing but our own fake."""
    from mcp import ClientSession
    from mcp.client.streamable_http import streamable_http_client

    async def scenario() -> None:
        got: asyncio.Queue[object] = asyncio.Queue()

        async def on_log(params: object) -> None:
            await got.put(params)

        fake = FakeMCP()
        async with (
            serving(fake) as url,
            streamable_http_client(f"{url}/alpha/mcp") as streams,
            ClientSession(streams[0], streams[1], logging_callback=on_log) as client,
        ):
            await client.initialize()
            await fake.wait_for("GET")
            await client.set_logging_level("info")
            result = await client.call_tool("events_subscribe", {"mode": "faults"})
            assert not result.is_error
            assert fake.emit(a_fault("web-9"))
            assert "web-9" in str(await got.get())

    run(scenario())
