"""mcp_client.py, the simulated cluster: it has the habits of the server that it stands for."""

from __future__ import annotations

import asyncio

import pytest

from fake_mcp import FakeMCP, a_fake, a_fault, run, serving
from mcp_client import (
    ConnectionLost,
    MCPEndpoint,
    MCPSession,
    SessionGone,
    SimulatedCluster,
    StreamBusy,
    ToolFailed,
    WrongPath,
    fault_id,
    simulated_fault,
)


def test_fault_ids_are_those_of_the_real_server() -> None:
    vector = fault_id("prod-cluster", "CrashLoop", "abc123-def456", "app-container")
    assert vector == "2b3f923456a81d1e"
    assert fault_id("", "NodeUnhealthy", "node-123", "") == "2e1be5096221076f"


def test_the_same_object_has_the_same_fault_id_each_time() -> None:
    assert a_fault("web-1")["faultId"] == a_fault("web-1")["faultId"]
    assert a_fault("web-1")["faultId"] != a_fault("web-2")["faultId"]


@pytest.mark.parametrize(
    ("kind", "version"), [("Pod", "v1"), ("Deployment", "apps/v1"), ("Job", "batch/v1")]
)
def test_a_fault_names_its_object_as_the_server_does(kind: str, version: str) -> None:
    resource = a_fault(kind=kind)["resource"]
    assert isinstance(resource, dict)
    assert list(resource) == ["apiVersion", "kind", "name", "namespace", "uid"]
    assert resource["apiVersion"] == version


def test_a_node_has_no_namespace() -> None:
    fault = simulated_fault(
        "",
        fault_type="NodeUnhealthy",
        kind="Node",
        namespace="",
        name="node-1",
        severity="critical",
        context="Ready=False",
        container="",
    )
    assert isinstance(fault["resource"], dict)
    assert "namespace" not in fault["resource"]


def test_a_session_id_looks_like_the_real_one() -> None:
    async def scenario() -> None:
        async with a_fake() as (_, endpoint):
            session = await MCPSession.connect(endpoint)
            assert session.session_id is not None
            assert len(session.session_id) == 26
            assert set(session.session_id) <= set("ABCDEFGHIJKLMNOPQRSTUVWXYZ234567")
            await session.close()

    run(scenario())


def test_nothing_is_delivered_before_the_log_level_is_set() -> None:
    async def scenario() -> None:
        async with a_fake() as (fake, endpoint):
            session = await MCPSession.connect(endpoint)
            stream = await session.open_stream()
            await session.subscribe("faults")
            assert not fake.emit(a_fault("unseen"))
            assert len(await session.subscriptions()) == 1
            await session.set_log_level()
            assert fake.emit(a_fault("seen"))
            message = await anext(stream)
            assert "unseen" not in str(message.params)
            await stream.aclose()
            await session.close()

    run(scenario())


def test_a_fault_without_a_stream_is_lost_and_its_subscription_unlisted_yet_it_goes_on() -> None:
    async def scenario() -> None:
        async with a_fake() as (fake, endpoint):
            session = await MCPSession.connect(endpoint)
            stream = await session.open_stream()
            await session.set_log_level()
            subscription = await session.subscribe("faults")
            fake.drop_streams()
            with pytest.raises(ConnectionLost):
                await anext(stream)
            assert not fake.emit(a_fault("lost"))
            assert await session.subscriptions() == []
            stream = await session.open_stream()
            assert fake.emit(a_fault("found"))
            message = await anext(stream)
            assert message.params is not None
            data = message.params["data"]
            assert isinstance(data, dict)
            assert (data["resource"]["name"], data["subscriptionId"]) == ("found", subscription)
            await stream.aclose()
            await session.close()

    run(scenario())


def test_subscribing_twice_sends_every_fault_twice() -> None:
    async def scenario() -> None:
        async with a_fake() as (fake, endpoint):
            session = await MCPSession.connect(endpoint)
            stream = await session.open_stream()
            await session.set_log_level()
            ids = {await session.subscribe("faults"), await session.subscribe("faults")}
            await session.subscribe("events")
            fake.emit(a_fault())
            got = [(await anext(stream)).params for _ in range(2)]
            assert {params["data"]["subscriptionId"] for params in got if params} == ids  # type: ignore[index]
            await stream.aclose()
            await session.close()

    run(scenario())


def test_unsubscribing_unlists_a_subscription() -> None:
    async def scenario() -> None:
        async with a_fake() as (_, endpoint):
            session = await MCPSession.connect(endpoint)
            subscription = await session.subscribe("faults")
            arguments = {"subscriptionId": subscription}
            text = await session.call_tool("events_unsubscribe", arguments)
            assert text.startswith("# Subscription Cancelled\n\n{")
            assert await session.subscriptions() == []
            with pytest.raises(ToolFailed, match="not found"):
                await session.call_tool("events_unsubscribe", arguments)
            await session.close()

    run(scenario())


def test_subscriptions_are_limited_per_session_and_per_server() -> None:
    async def scenario() -> None:
        async with a_fake() as (_, endpoint):
            sessions = [await MCPSession.connect(endpoint) for _ in range(11)]
            for session in sessions[:10]:
                await asyncio.gather(*(session.subscribe("faults") for _ in range(10)))
            with pytest.raises(ToolFailed, match=r"session has reached maximum .*\(10\)"):
                await sessions[0].subscribe("faults")
            with pytest.raises(ToolFailed, match=r"server has reached maximum .*\(100\)") as caught:
                await sessions[10].subscribe("faults")
            assert not caught.value.permanent
            for session in sessions:
                await session.close()

    run(scenario())


def test_an_unknown_mode_and_an_unknown_tool_fail_for_good() -> None:
    async def scenario() -> None:
        async with a_fake() as (_, endpoint):
            session = await MCPSession.connect(endpoint)
            for call in (session.subscribe("nonsense"), session.call_tool("nonsense", {})):
                with pytest.raises(ToolFailed) as caught:
                    await call
                assert caught.value.permanent
            await session.close()

    run(scenario())


def test_a_second_stream_is_refused_and_a_deleted_session_ends_its_stream() -> None:
    async def scenario() -> None:
        async with a_fake() as (_, endpoint):
            session = await MCPSession.connect(endpoint)
            again = MCPSession(endpoint, session_id=session.session_id)
            stream = await session.open_stream()
            with pytest.raises(StreamBusy):
                await session.open_stream()
            await session.close()
            with pytest.raises(ConnectionLost):
                await anext(stream)
            with pytest.raises(SessionGone):
                await again.ping()

    run(scenario())


def test_several_clusters_share_a_server_by_path() -> None:
    async def scenario() -> None:
        alpha, beta = FakeMCP("alpha"), SimulatedCluster("beta")
        async with serving(alpha, beta) as url:
            session = await MCPSession.connect(MCPEndpoint(url=f"{url}/beta/mcp"))
            assert (len(alpha.sessions), len(beta.sessions)) == (0, 1)
            await session.close()
            for path in ("/", "/gamma/mcp", "/alpha"):
                with pytest.raises(WrongPath):
                    await MCPSession.connect(MCPEndpoint(url=f"{url}{path}"))

    run(scenario())
