"""What operators and their tools ask over HTTP."""

from __future__ import annotations

import asyncio
import dataclasses
import json
from collections.abc import Callable
from typing import Any

import pytest

import nightcrier
from conftest import NOON
from fake_mcp import run
from incidents import ClusterRecord, ConnectionState
from logs import Redactor
from nightcrier import HealthServer
from running_program import get

ALPHA = ClusterRecord(
    cluster="alpha",
    endpoint="http://alpha/mcp",
    labels='{"team": "shop"}',
    connection_state=ConnectionState.ACTIVE,
    connected_at=NOON,
    last_event_at=NOON,
    events_total=7,
    malformed_total=2,
)
BETA = dataclasses.replace(
    ALPHA,
    cluster="beta",
    labels="{}",
    triage_enabled=False,
    connection_state=ConnectionState.FAILED,
    last_event_at=None,
    last_error="HTTP 401: check api_key",
)


def ask(
    path: str,
    *,
    method: str = "GET",
    problems: Callable[[], list[str]] = list,
    records: Callable[[], list[ClusterRecord]] = lambda: [BETA, ALPHA],
    spooled: int = 0,
) -> tuple[int, str]:
    async def scenario() -> tuple[int, str]:
        server = HealthServer(problems=problems, clusters=records, spooled=lambda: spooled)
        address = await server.start("127.0.0.1:0")
        try:
            return await asyncio.to_thread(get, address, path, method)
        finally:
            await server.close()

    return run(scenario())


def test_healthz_says_that_the_program_answers() -> None:
    assert ask("/healthz") == (200, "ok\n")


def test_readyz_is_200_while_work_can_be_done() -> None:
    status, body = ask("/readyz")
    assert status == 200
    assert json.loads(body) == {"ready": True, "reasons": [], "spooled": 0}


def test_readyz_is_503_with_every_reason_why_work_cannot_be_done() -> None:
    problems = ["the disk is full", "draining"]
    status, body = ask("/readyz", problems=lambda: problems, spooled=7)
    assert status == 503
    assert json.loads(body) == {
        "ready": False, "reasons": ["the disk is full", "draining"], "spooled": 7
    }  # fmt: skip


def test_clusters_are_listed_by_name_with_their_state_and_a_summary() -> None:
    status, body = ask("/health/clusters")
    assert status == 200
    document = json.loads(body)
    assert document["summary"] == {"total": 2, "active": 1, "unhealthy": 1, "triage_enabled": 1}
    alpha, beta = document["clusters"]
    assert alpha == {
        "name": "alpha",
        "status": "active",
        "event_count": 7,
        "malformed_count": 2,
        "triage_enabled": True,
        "last_event": "2026-11-23T12:00:00.000000Z",
        "error": None,
        "labels": {"team": "shop"},
    }
    assert (beta["name"], beta["status"]) == ("beta", "failed")
    assert beta["last_event"] is None
    assert "401" in beta["error"]


def test_no_cluster_is_an_empty_list() -> None:
    document = json.loads(ask("/health/clusters", records=list)[1])
    assert document["clusters"] == []
    assert document["summary"]["total"] == 0


def test_a_secret_in_an_error_is_not_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nightcrier, "redact", Redactor(["sesame-open"]))
    leaking = dataclasses.replace(BETA, last_error="the server said sesame-open")
    _, body = ask("/health/clusters", records=lambda: [leaking])
    assert "sesame-open" not in body
    assert "[redacted]" in body


@pytest.mark.parametrize("path", ["/", "/metrics2", "/healthz/", "/health", "//healthz"])
def test_another_path_is_404_and_names_those_that_exist(path: str) -> None:
    status, body = ask(path)
    assert status == 404
    assert "/healthz" in body


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE"])
def test_nothing_can_be_changed_here(method: str) -> None:
    assert ask("/healthz", method=method)[0] == 405


def test_head_has_the_status_and_no_body() -> None:
    assert ask("/readyz", method="HEAD", problems=lambda: ["x"]) == (503, "")


def test_an_error_while_answering_is_500_and_not_the_end() -> None:
    def broken() -> Any:
        raise RuntimeError("a defect")

    async def scenario() -> list[int]:
        server = HealthServer(problems=broken, clusters=list)
        address = await server.start("127.0.0.1:0")
        try:
            return [
                (await asyncio.to_thread(get, address, path))[0] for path in ("/readyz", "/healthz")
            ]
        finally:
            await server.close()

    assert run(scenario()) == [500, 200]


def test_an_ipv6_address_is_written_with_brackets() -> None:
    async def scenario() -> None:
        server = HealthServer(problems=list, clusters=list)
        try:
            address = await server.start("[::1]:0")
        except OSError:
            pytest.skip("this machine has no IPv6")
        assert address.startswith("[::1]:")
        assert (await asyncio.to_thread(get, address, "/healthz"))[0] == 200
        await server.close()

    run(scenario())
