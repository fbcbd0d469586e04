"""The inbox, and the watch of clusters on a real HTTP server with bad habits."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import logging
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

import incidents
import mcp_client
import nightcrier
import sql_database
import state_store
from conftest import an_event, events_of, query
from fake_mcp import (
    FakeMCP,
    Habit,
    a_fault,
    a_log,
    answers,
    answers_json,
    hangs,
    run,
    serving,
)
from incidents import ClusterRecord, FaultEvent, Incident, IncidentStatus, Severity, SubscribeMode
from mcp_client import HTTPRequest, HTTPResponder, SimulatedCluster, sse_message
from nightcrier import ClusterConfig, ClusterWatch, ClusterWatcher, Inbox
from sql_database import RowRefused, StoreUnavailable
from state_store import AsyncStore


class Log(logging.Handler):
    """What the program logged."""

    def __init__(self) -> None:
        super().__init__(logging.DEBUG)
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)

    def said(self, words: str) -> list[logging.LogRecord]:
        return [record for record in self.records if words in record.getMessage()]


@pytest.fixture
def log() -> Iterator[Log]:
    handler = Log()
    nightcrier.log.addHandler(handler)
    level = nightcrier.log.level
    nightcrier.log.setLevel(logging.DEBUG)
    yield handler
    nightcrier.log.setLevel(level)
    nightcrier.log.removeHandler(handler)


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Minutes become hundredths of a second."""
    monkeypatch.setattr(nightcrier, "backoff", lambda *_args, **_options: 0.01)
    monkeypatch.setattr(ClusterWatcher, "SLOW", 0.05)
    monkeypatch.setattr(ClusterWatch, "WRITE_INTERVAL", 0.01)
    monkeypatch.setattr(ClusterWatch, "COUNTER_INTERVAL", 0.02)


# ---- Inbox ----


class StubStore:
    """A store that does as it is told."""

    def __init__(self) -> None:
        self.batches: list[list[str]] = []
        self.called = threading.Event()
        self.open = threading.Event()
        self.open.set()
        self.failures: list[Exception] = []  # raised by the next calls
        self.poison: str | None = None  # the id of an event that it refuses

    def create_incidents(
        self, events: Sequence[FaultEvent], *, without_triage: Sequence[str] = ()
    ) -> list[Incident]:
        self.called.set()
        assert self.open.wait(10)
        if self.failures:
            raise self.failures.pop(0)
        ids = [event.event_id for event in events]
        if self.poison in ids:
            raise RowRefused("CHECK constraint failed")
        self.batches.append(ids)
        now = sql_database.utc_now()
        return [state_store.new_incident(event, now, 0) for event in events]

    @property
    def stored(self) -> list[str]:
        return [event_id for batch in self.batches for event_id in batch]

    def close(self) -> None:
        pass


@contextlib.asynccontextmanager
async def an_inbox(store: Any) -> AsyncIterator[tuple[Inbox, asyncio.Task[None], list[Incident]]]:
    told: list[Incident] = []
    async_store = AsyncStore(store)
    inbox = Inbox(async_store, without_triage=tuple, on_stored=told.extend)
    task = asyncio.create_task(inbox.run())
    try:
        yield inbox, task, told
    finally:
        inbox.close()
        await task
        async_store.close()


def test_many_events_share_few_transactions() -> None:
    async def scenario() -> None:
        store = StubStore()
        store.open.clear()
        events = events_of("prod", 900)
        async with an_inbox(store) as (inbox, task, told):
            for event in events:
                await inbox.put(event)
            store.open.set()
            inbox.close()
            await task
            assert store.stored == [event.event_id for event in events]
            assert len(store.batches) <= 3
            assert [incident.incident_id for incident in told] == store.stored

    run(scenario())


def test_put_waits_while_the_inbox_is_full_and_nothing_is_dropped(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Inbox, "MAX_EVENTS", 5)

    async def scenario() -> None:
        store = StubStore()
        store.open.clear()
        events = events_of("prod", 60)
        async with an_inbox(store) as (inbox, task, _):
            streams = [asyncio.create_task(inbox.put(event)) for event in events]
            done, waiting = await asyncio.wait(streams, timeout=0.05)
            assert len(done) == len(inbox) == 5  # however many wait, none slips in
            store.open.set()
            await asyncio.wait(waiting)
            inbox.close()
            await task
            assert sorted(store.stored) == sorted(event.event_id for event in events)
            assert max(map(len, store.batches)) <= 5, "not even when all who wait are woken"

    run(scenario())


def test_an_event_that_waits_for_room_goes_in_when_its_stream_is_ended(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Inbox, "MAX_EVENTS", 1)

    async def scenario() -> None:
        store = StubStore()
        store.open.clear()
        first, second = events_of("prod", 2)
        async with an_inbox(store) as (inbox, task, _):
            await inbox.put(first)
            stream = asyncio.create_task(inbox.put(second))
            await asyncio.sleep(0)  # it waits now
            stream.cancel()
            await asyncio.wait([stream])
            assert stream.cancelled()
            store.open.set()
            inbox.close()
            await task
            assert store.stored == [first.event_id, second.event_id]

    run(scenario())


def test_large_events_fill_the_inbox_sooner(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Inbox, "MAX_CHARACTERS", 1000)

    async def scenario() -> None:
        store = StubStore()
        store.open.clear()
        async with an_inbox(store) as (inbox, task, _):
            await inbox.put(an_event(context="x" * 1000))
            second = asyncio.create_task(inbox.put(an_event(context="x" * 1000)))
            done, _ = await asyncio.wait([second], timeout=0.05)
            assert not done
            store.open.set()
            await second
            inbox.close()
            await task
            assert len(store.stored) == 2

    run(scenario())


def test_nothing_is_lost_while_the_store_is_unavailable(log: Log) -> None:
    async def scenario() -> None:
        store = StubStore()
        full = StoreUnavailable("the disk is full: make room, work goes on by itself")
        store.failures = [full, full, full]
        stored: list[str] = []
        seen: list[str | None] = []
        async with an_inbox(store) as (inbox, task, _):
            events = events_of("prod", 3)
            for event in events:
                await inbox.put(event, lambda event=event: stored.append(event.event_id))
            while store.failures:
                seen.append(inbox.problem)
                await asyncio.sleep(0)
            inbox.close()
            await task
            assert str(full) in seen
            assert inbox.problem is None
            assert stored == store.stored == [event.event_id for event in events]
        assert len(log.said("reading pauses")) == 1
        assert len(log.said("stored again")) == 1

    run(scenario())


@pytest.mark.parametrize(
    "error", [OSError(37, "No locks"), RuntimeError("can't start new thread"), MemoryError()]
)
def test_nothing_is_lost_while_the_host_lacks_something(error: Exception) -> None:
    async def scenario() -> None:
        store = StubStore()
        store.failures = [error] * 3
        events = events_of("prod", 3)
        async with an_inbox(store) as (inbox, task, _):
            for event in events:
                await inbox.put(event)
            inbox.close()
            await task
        assert store.stored == [event.event_id for event in events]

    run(scenario())


@pytest.mark.parametrize("place", [0, 2, 4])
def test_an_event_that_the_store_refuses_is_left_out_and_logged_and_the_others_are_stored(
    place: int, log: Log
) -> None:
    async def scenario() -> None:
        store = StubStore()
        store.open.clear()
        events = events_of("prod", 5)
        store.poison = events[place].event_id
        confirmed: list[str] = []
        async with an_inbox(store) as (inbox, task, told):
            for event in events:
                await inbox.put(event, lambda event=event: confirmed.append(event.event_id))
            store.open.set()
            inbox.close()
            await task
            good = [event.event_id for event in events if event.event_id != store.poison]
            assert store.stored == good
            assert confirmed == good, "what is left out is not confirmed, the rest once"
            assert [incident.incident_id for incident in told] == good
        (record,) = log.said("left out")
        assert record.exc_info is not None

    run(scenario())


def test_a_store_that_becomes_unavailable_among_single_events_loses_and_confirms_none_twice() -> (
    None
):
    async def scenario() -> None:
        store = StubStore()
        events = events_of("prod", 4)
        confirmed: list[str] = []
        away = StoreUnavailable("away")
        store.open.clear()
        store.failures = [RowRefused("refused"), away, away]
        async with an_inbox(store) as (inbox, task, _):
            for event in events:
                await inbox.put(event, lambda event=event: confirmed.append(event.event_id))
            store.open.set()
            inbox.close()
            await task
            assert confirmed == store.stored == [event.event_id for event in events]

    run(scenario())


def test_an_event_is_confirmed_only_after_its_transaction() -> None:
    async def scenario() -> None:
        store = StubStore()
        store.open.clear()
        confirmed = asyncio.Event()
        async with an_inbox(store) as (inbox, _, _):
            await inbox.put(an_event(), confirmed.set)
            assert await asyncio.to_thread(store.called.wait, 10)
            assert not confirmed.is_set()
            assert len(inbox) == 1
            store.open.set()
            await confirmed.wait()
            assert len(store.stored) == 1

    run(scenario())


# ---- Watching ----


class Telling(AsyncStore):
    """Tells of each call that was carried out."""

    happened: asyncio.Event

    async def call(self, method: Callable[..., Any], *args: Any, **options: Any) -> Any:
        try:
            return await super().call(method, *args, **options)
        finally:
            self.happened.set()


class Watch(ClusterWatch):
    happened: asyncio.Event

    def _note(self, watcher: ClusterWatcher) -> None:
        super()._note(watcher)
        self.happened.set()


class Watched:
    """The watch as the daemon runs it, on a store, and a way to wait for what it does."""

    def __init__(self, store: nightcrier.StateStore, mode: SubscribeMode) -> None:
        self.happened = asyncio.Event()
        self.sync = store
        self.store = Telling(store)
        self.incidents: list[Incident] = []
        self.inbox = Inbox(
            self.store,
            without_triage=lambda: self.watch.without_triage(),  # noqa: PLW0108 (made below)
            on_stored=self.incidents.extend,
        )
        self.watch = Watch(self.store, self.inbox, mode)
        self.store.happened = self.watch.happened = self.happened

    async def until(self, condition: Callable[[], object]) -> None:
        """Wait until it holds; asked again whenever something has happened."""
        while not condition():
            self.happened.clear()
            await self.happened.wait()

    def record(self, cluster: str = "alpha") -> ClusterRecord:
        return self.watch.watchers[cluster].record

    async def state(self, wanted: str, cluster: str = "alpha") -> ClusterRecord:
        await self.until(lambda: self.record(cluster).connection_state == wanted)
        return self.record(cluster)

    async def stored(self, count: int) -> list[Incident]:
        await self.until(lambda: len(self.incidents) >= count)
        return self.incidents

    def rows(self, sql: str, **params: Any) -> list[tuple[Any, ...]]:
        return query(self.sync, sql, **params)


@contextlib.asynccontextmanager
async def watching(
    store: nightcrier.StateStore,
    *clusters: ClusterConfig,
    mode: SubscribeMode = SubscribeMode.FAULTS,
) -> AsyncIterator[Watched]:
    watched = Watched(store, mode)
    await watched.watch.start(clusters)
    parts = [
        asyncio.create_task(watched.inbox.run()),
        asyncio.create_task(watched.watch.run()),
    ]
    try:
        yield watched
        assert not parts[1].done(), "writing the states ended"
    finally:
        parts[1].cancel()
        await watched.watch.close()
        watched.inbox.close()
        await asyncio.gather(*parts, return_exceptions=True)
        watched.store._threads.shutdown()  # the store itself is the fixture's


def a_cluster(url: str, name: str = "alpha", **fields: Any) -> ClusterConfig:
    return ClusterConfig(name=name, endpoint=f"{url}/{name}/mcp", **fields)


@contextlib.asynccontextmanager
async def one_cluster(
    store: nightcrier.StateStore,
    fake: FakeMCP | None = None,
    *,
    mode: SubscribeMode = SubscribeMode.FAULTS,
    **fields: Any,
) -> AsyncIterator[tuple[FakeMCP, Watched]]:
    """A fake cluster that is being watched, and whose stream is open."""
    fake = fake or FakeMCP()
    async with serving(fake) as url, watching(store, a_cluster(url, **fields), mode=mode) as w:
        await w.state("active")
        yield fake, w


def until_used(fake: FakeMCP, count: int, habit: Habit) -> Habit:
    """The habit for the first `count` requests; then as a sound server answers."""
    left = count

    async def limited(request: HTTPRequest, respond: HTTPResponder) -> None:
        nonlocal left
        left -= 1
        if left >= 0:
            await habit(request, respond)
        else:
            await SimulatedCluster.handle(fake, request, respond)

    return limited


Store = state_store.SQLiteStore


def test_a_fault_becomes_an_incident_with_everything_that_the_server_said(sqlite: Store) -> None:
    async def scenario() -> None:
        async with one_cluster(sqlite) as (fake, watched):
            fault = a_fault(context="exit code 137")
            assert fake.emit(fault)
            ((incident,),) = [await watched.stored(1)]
            event = incident.event
            assert incident.status is IncidentStatus.PENDING
            assert event.cluster == "alpha"
            assert event.fault_fingerprint == fault["faultId"]
            assert event.context == "exit code 137"
            assert event.resource == "Pod/default/web-1"
            assert event.session_id == fake.session.session_id
            assert event.subscription_id == watched.record().subscription_id
            assert sqlite.get_incident(incident.incident_id) == incident

    run(scenario())


@pytest.mark.parametrize("severity", ["critical", "warning", "info", "CRITICAL"])
def test_the_severity_is_the_servers(severity: str, sqlite: Store) -> None:
    async def scenario() -> None:
        async with one_cluster(sqlite) as (fake, watched):
            fake.emit(a_fault(severity=severity))
            (incident,) = await watched.stored(1)
            assert incident.event.severity is Severity(severity.lower())

    run(scenario())


@pytest.mark.parametrize(
    ("kind", "severity"), [("Warning", Severity.WARNING), ("Normal", Severity.INFO)]
)
def test_in_events_mode_the_reason_is_the_fault_type(
    kind: str, severity: Severity, sqlite: Store
) -> None:
    event = {
        "namespace": "kube-system",
        "timestamp": "2026-01-15T12:34:56Z",
        "type": kind,
        "reason": "BackOff",
        "message": "Back-off restarting failed container",
        "involvedObject": {"apiVersion": "v1", "kind": "Pod", "name": "dns-1"},
    }

    async def scenario() -> None:
        async with one_cluster(sqlite, mode=SubscribeMode.EVENTS) as (fake, watched):
            (subscribed,) = fake.all_seen("tools/call")
            assert subscribed.message["params"]["arguments"] == {"mode": "events"}
            message = a_log({"subscriptionId": "sub-1", "cluster": "", "event": event})
            message["params"]["logger"] = "kubernetes/events"  # type: ignore[index]
            fake.push(message)
            fake.push(a_log(a_fault()))  # not what was subscribed to
            fake.push(message)
            found = await watched.stored(2)
            assert [i.event.fault_type for i in found] == ["BackOff", "BackOff"]
            assert found[0].event.severity is severity
            assert found[0].event.resource == "Pod/kube-system/dns-1"

    run(scenario())


def test_a_cluster_without_triage_leaves_a_skipped_incident(sqlite: Store) -> None:
    async def scenario() -> None:
        async with one_cluster(sqlite, triage_enabled=False) as (fake, watched):
            fake.emit(a_fault())
            (incident,) = await watched.stored(1)
            assert incident.status is IncidentStatus.SKIPPED
            assert not sqlite.has_pending()

    run(scenario())


def test_events_without_triage_that_are_stored_after_the_watch_has_ended_are_skipped(
    sqlite: Store,
) -> None:
    """As at every stop, and while a reload replaces the watch."""

    async def scenario() -> None:
        async with one_cluster(sqlite, triage_enabled=False) as (_, watched):
            await watched.watch.close()
            await watched.inbox.put(an_event("alpha"))
            ((incident,),) = [await watched.stored(1)]
            assert incident.status is IncidentStatus.SKIPPED

    run(scenario())


def test_the_same_fault_twice_is_two_incidents(sqlite: Store) -> None:
    async def scenario() -> None:
        async with one_cluster(sqlite) as (fake, watched):
            fault = a_fault()
            fake.emit(fault)
            fake.emit(fault)
            first, second = await watched.stored(2)
            assert first.event.fault_fingerprint == second.event.fault_fingerprint
            assert first.incident_id != second.incident_id

    run(scenario())


# ---- Bad input ----


def without(key: str) -> Mapping[str, object]:
    return {k: v for k, v in a_fault().items() if k != key}


@pytest.mark.parametrize(
    "data",
    [
        *(without(key) for key in ("faultId", "resource", "timestamp", "severity", "faultType")),
        a_fault(severity="catastrophic"),
        {**a_fault(), "timestamp": "yesterday"},
        {**a_fault(), "resource": "web-1"},
        {**a_fault(), "resource": {"kind": 7}},
        {**a_fault(), "cluster": None},
        {**a_fault(), "context": "\x1b[31mred\x00\ud800"},
        {**a_fault(), "context": "x" * 1_000_000},
        {},
    ],
    ids=lambda data: ",".join(data)[:40] or "empty",
)
def test_a_fault_that_lacks_something_or_holds_odd_values_is_an_incident_all_the_same(
    data: Mapping[str, object], sqlite: Store
) -> None:
    async def scenario() -> None:
        async with one_cluster(sqlite) as (fake, watched):
            fake.push(a_log(data))
            (incident,) = await watched.stored(1)
            assert incident.status is IncidentStatus.PENDING
            assert watched.record().malformed_total == 0
            read_back = sqlite.get_incident(incident.incident_id)
            assert read_back == incident

    run(scenario())


GOOD = sse_message(a_log(a_fault()))


@pytest.mark.parametrize(
    ("bad", "cause"),
    [
        (b"data: {broken\n\n", "not JSON"),
        (b"data: [1, 2]\n\n", "batch"),
        (b"data: 7\n\n", "not a JSON-RPC message"),
        (b'data: {"jsonrpc":"2.0","method":"notifications/message"}\n\n', "without params"),
        (sse_message(a_log("a text")), "params.data is str"),
        (sse_message(a_log(None)), "params.data is NoneType"),
        (b"data: " + b"x" * 2_000_000 + b"\n\n", "was skipped"),
        (b"data: " + b"[" * 100_000 + b"\n\n", "nested too deeply"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_bad_message_is_counted_and_logged_with_its_cause_and_the_stream_goes_on(
    bad: bytes, cause: str, sqlite: Store, log: Log
) -> None:
    async def scenario() -> None:
        async with one_cluster(sqlite) as (fake, watched):
            session = fake.session
            fake.push(GOOD, bad, bad, GOOD)
            await watched.stored(2)
            assert watched.record().malformed_total == 2
            assert fake.session is session, "the connection went on"
            assert len(fake.all_seen("GET")) == 1
        (record,) = log.said("malformed message")
        assert cause in record.getMessage()
        assert vars(record)["cluster"] == "alpha"

    run(scenario())


def test_invalid_utf8_is_replaced_counted_and_an_incident(sqlite: Store) -> None:
    async def scenario() -> None:
        async with one_cluster(sqlite) as (fake, watched):
            fake.push(sse_message(a_log(a_fault(context="caf#"))).replace(b"#", b"\xe9"))
            (incident,) = await watched.stored(1)
            assert incident.event.context == "caf\ufffd"
            assert watched.record().malformed_total == 1

    run(scenario())


def test_ten_thousand_faults_in_one_burst_are_ten_thousand_incidents(sqlite: Store) -> None:
    async def scenario() -> None:
        async with one_cluster(sqlite) as (fake, watched):
            for number in range(10_000):
                fake.push(a_log(a_fault(f"web-{number}")))
            await watched.stored(10_000)
            ((rows, names),) = watched.rows(
                "select count(*), count(distinct resource_name) from incidents"
            )
            assert rows == names == 10_000
            assert watched.record().events_total == 10_000

    run(scenario(), seconds=60)


def test_a_connection_that_is_closed_in_the_middle_of_a_chunk_is_opened_again(
    sqlite: Store,
) -> None:
    async def scenario() -> None:
        async with one_cluster(sqlite) as (fake, watched):
            stream = fake.session.stream
            assert stream is not None
            fake.push(GOOD)
            stream.transport.write(b"1000\r\n" + GOOD + b"data: {half")
            stream.transport.close()
            await fake.wait_for("GET", 2)
            await watched.state("active")
            await watched.until(lambda: fake.session.stream not in (None, stream))
            fake.push(GOOD)
            await watched.stored(3)
            assert watched.record().malformed_total == 0

    run(scenario())


def test_a_flood_of_bad_messages_is_one_line_of_log(sqlite: Store, log: Log) -> None:
    async def scenario() -> None:
        async with one_cluster(sqlite) as (fake, watched):
            fake.push(*[b"data: {broken\n\n"] * 500, GOOD)
            await watched.stored(1)
            assert watched.record().malformed_total == 500
        assert len(log.said("malformed message")) == 1

    run(scenario())


def test_an_odd_subscription_id_neither_ends_the_watch_nor_its_rows(sqlite: Store) -> None:
    async def scenario() -> None:
        fake = FakeMCP()
        text = json.dumps({"subscriptionId": "sub-\ud800\x00" + "x" * 10_000})
        fake.habits["tools/call"] = answers_json({"content": [{"type": "text", "text": text}]})
        async with one_cluster(sqlite, fake) as (_, watched):
            await watched.until(
                lambda: watched.rows("select 1 from clusters where connection_state = 'active'")
            )
            ((stored,),) = watched.rows("select subscription_id from clusters")
            assert stored.startswith("sub-\ufffd\ufffdxxx")
            assert len(stored) <= incidents.NAME_LIMIT

    run(scenario())


# ---- Streams, sessions, servers ----


def gaps(watched: Watched) -> list[tuple[Any, ...]]:
    return watched.rows("select cluster, lost_at, restored_at, reason from cluster_gaps")


def test_a_dropped_stream_is_opened_again_in_its_session_without_a_second_subscription(
    sqlite: Store,
) -> None:
    async def scenario() -> None:
        async with one_cluster(sqlite) as (fake, watched):
            before = watched.record()
            fake.drop_streams()
            await fake.wait_for("GET", 2)
            await watched.until(lambda: watched.watch.watchers["alpha"].finished_gaps == [])
            await watched.until(lambda: gaps(watched) and gaps(watched)[0][2])
            assert fake.emit(a_fault())
            await watched.stored(1)
            after = watched.record()
            assert len(fake.all_seen("initialize")) == 1
            calls = [seen.message["params"]["name"] for seen in fake.all_seen("tools/call")]
            assert calls == ["events_subscribe", "events_list_subscriptions"]
            assert (after.session_id, after.subscription_id) == (
                before.session_id,
                before.subscription_id,
            )
            ((cluster, lost_at, restored_at, reason),) = gaps(watched)
            assert cluster == "alpha"
            assert before.updated_at is None or lost_at >= before.updated_at
            assert lost_at <= restored_at
            assert "closed the connection" in reason

    run(scenario())


def test_a_cancelled_subscription_means_a_new_session_and_nothing_arrives_twice(
    sqlite: Store,
) -> None:
    async def scenario() -> None:
        fake = FakeMCP()
        fake.habits["DELETE"] = answers(405, "Method Not Allowed")  # the old session stays, too
        async with one_cluster(sqlite, fake) as (_, watched):
            old = fake.session
            fake.drop_streams()
            assert not fake.emit(a_fault("lost"))  # reaches nobody, and cancels the subscription
            assert old.sending, "the fake goes on sending under the old id"
            assert not old.listed
            await fake.wait_for("initialize", 2)
            await watched.until(lambda: watched.record().session_id not in (None, old.session_id))
            await watched.state("active")
            assert fake.emit(a_fault("told"))
            await watched.stored(1)
            assert fake.emit(a_fault("told again"))
            names = [i.event.resource_name for i in await watched.stored(2)]
            assert names == ["told", "told again"]
            await watched.until(lambda: [gap[2] is not None for gap in gaps(watched)] == [True])

    run(scenario())


def test_a_server_that_was_restarted_gets_a_new_session(sqlite: Store) -> None:
    async def scenario() -> None:
        async with one_cluster(sqlite) as (fake, watched):
            old = watched.record().session_id
            fake.drop_streams()
            fake.sessions.clear()
            await watched.until(lambda: watched.record().session_id not in (None, old))
            await watched.state("active")
            fake.emit(a_fault())
            (incident,) = await watched.stored(1)
            assert incident.event.session_id == fake.session.session_id != old

    run(scenario())


def test_a_server_that_went_away_and_stays_away_is_seen_to_have_failed(
    sqlite: Store, log: Log
) -> None:
    async def refuse(*_args: object) -> mcp_client.EventStream:
        raise mcp_client.ConnectionLost("Connection refused")

    async def scenario() -> None:
        async with one_cluster(sqlite) as (fake, watched):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(mcp_client.MCPSession, "open_stream", refuse)
                fake.drop_streams()
                record = await watched.state("failed")
                assert record.last_error == "Connection refused"
                document = nightcrier.clusters_document([record])
                assert document["summary"]["unhealthy"] == 1
                assert log.said("Connection refused")
            await watched.state("active")
            assert len(watched.rows("select 1 from cluster_gaps")) <= 1, "one gap, not many"

    run(scenario())


def test_a_session_that_ends_while_the_stream_is_quiet_is_found_by_a_ping(
    sqlite: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ClusterWatcher, "PING", (0.02, 0.02))

    async def scenario() -> None:
        async with one_cluster(sqlite) as (fake, watched):
            await fake.wait_for("ping", 2)
            old = watched.record().session_id
            fake.habits["ping"] = until_used(fake, 1, answers(404, "session not found"))
            await watched.until(lambda: watched.record().session_id not in (None, old))
            await watched.state("active")

    run(scenario())


def test_a_stream_that_is_still_held_is_asked_for_until_it_is_free(sqlite: Store) -> None:
    async def scenario() -> None:
        async with one_cluster(sqlite) as (fake, watched):
            session = fake.session
            fake.habits["GET"] = until_used(fake, 3, answers(409, "conflict"))
            fake.drop_streams()
            await fake.wait_for("GET", 5)
            await watched.state("active")
            assert fake.session is session
            fake.emit(a_fault())
            await watched.stored(1)

    run(scenario())


def test_a_stream_that_is_never_freed_ends_in_a_new_session(
    sqlite: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ClusterWatcher, "BUSY", 0.05)

    async def scenario() -> None:
        async with one_cluster(sqlite) as (fake, watched):
            old = fake.session
            old_id = old.session_id

            async def busy_for_the_old(request: HTTPRequest, respond: HTTPResponder) -> None:
                if request.headers.get("mcp-session-id") == old_id:
                    await respond.send(409, "conflict")
                else:
                    await SimulatedCluster.handle(fake, request, respond)

            fake.habits["GET"] = busy_for_the_old
            fake.drop_streams()
            await watched.until(lambda: watched.record().session_id not in (None, old_id))
            await watched.state("active")
            assert old_id not in fake.sessions, "the old session was deleted"

    run(scenario())


def test_streams_that_end_at_once_again_and_again_are_not_asked_for_in_a_hot_loop(
    sqlite: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    delays: list[int] = []

    def counted(failures: int, **_options: float) -> float:
        delays.append(failures)
        return 0.01

    monkeypatch.setattr(nightcrier, "backoff", counted)

    async def scenario() -> None:
        async with one_cluster(sqlite) as (fake, _):

            async def ends(request: HTTPRequest, respond: HTTPResponder) -> None:
                await respond.start(200, {"Content-Type": "text/event-stream"})
                await respond.finish()

            fake.habits["GET"] = ends
            fake.drop_streams()
            await fake.wait_for("GET", 6)
            assert len(delays) >= 3
            assert delays == sorted(delays), "the delay grows"

    run(scenario())


class Guarded(FakeMCP):
    key = ""

    async def handle(self, request: HTTPRequest, respond: HTTPResponder) -> None:
        if request.headers.get("authorization") == f"Bearer {self.key}":
            await super().handle(request, respond)
        else:
            await respond.send(401, "invalid token")


def test_a_rotated_token_file_lets_the_watch_in_again(sqlite: Store, tmp_path: Path) -> None:
    async def scenario() -> None:
        fake = Guarded()
        fake.key = "first-token"
        file = tmp_path / "token"
        file.write_text("first-token\n")
        async with one_cluster(sqlite, fake, api_key_file=file) as (_, watched):
            fake.key = "second-token"
            fake.drop_streams()
            refused = await watched.state("failed")
            assert "check api_key" in str(refused.last_error)
            file.write_text("second-token\n")
            await watched.state("active")
            fake.emit(a_fault())
            await watched.stored(1)

    run(scenario())


def test_a_token_file_that_is_gone_is_a_visible_failure_and_no_end(
    sqlite: Store, tmp_path: Path
) -> None:
    async def scenario() -> None:
        fake = Guarded()
        fake.key = "the-token"
        file = tmp_path / "token"
        async with (
            serving(fake) as url,
            watching(sqlite, a_cluster(url, api_key_file=file)) as watched,
        ):
            refused = await watched.state("failed")
            assert "cannot read the API key" in str(refused.last_error)
            file.write_text("the-token")
            await watched.state("active")

    run(scenario())


def test_a_stateless_server_is_reported_retried_slowly_and_no_trouble_for_others(
    sqlite: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ClusterWatcher, "SLOW", 1000.0)

    async def scenario() -> None:
        stateless, sound = FakeMCP("stateless"), FakeMCP("sound")
        stateless.habits["GET"] = answers(405, "Method Not Allowed")
        async with (
            serving(stateless, sound) as url,
            watching(sqlite, a_cluster(url, "stateless"), a_cluster(url, "sound")) as watched,
        ):
            failed = await watched.state("failed", "stateless")
            assert "--stateless" in str(failed.last_error)
            await watched.state("active", "sound")
            sound.emit(a_fault())
            await watched.stored(1)
            await watched.until(
                lambda: watched.rows("""select last_error from v_clusters
                    where cluster = 'stateless' and connection_state = 'failed'""")
            )
            assert len(stateless.all_seen("initialize")) == 1
            assert stateless.sessions == {}, "the session was given back"

    run(scenario())


def test_a_cluster_that_is_down_stops_neither_the_start_nor_the_others(sqlite: Store) -> None:
    async def scenario() -> None:
        sound = FakeMCP("sound")
        async with serving() as nobody:
            pass  # its port is closed now
        async with (
            serving(sound) as url,
            watching(sqlite, a_cluster(nobody, "down"), a_cluster(url, "sound")) as watched,
        ):
            await watched.state("active", "sound")
            down = await watched.state("failed", "down")
            assert "cannot connect" in str(down.last_error)
            assert down.connected_at is None
            assert gaps(watched) == [], "what never was open has no gap"

    run(scenario())


def test_a_server_that_hangs_in_initialize_holds_one_slot_and_nobody_else(
    sqlite: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ClusterWatch, "CONNECTS", 2)

    async def scenario() -> None:
        hung, sound = FakeMCP("hung"), FakeMCP("sound")
        hung.habits["initialize"] = hangs
        async with (
            serving(hung, sound) as url,
            watching(sqlite, a_cluster(url, "hung"), a_cluster(url, "sound")) as watched,
        ):
            await hung.wait_for("initialize")
            await watched.state("active", "sound")
            assert watched.record("hung").connection_state == "connecting"

    run(scenario())


def test_a_list_of_subscriptions_that_hangs_does_not_end_a_sound_stream(
    sqlite: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another client's hanging subscribe blocks the server's list for everybody."""
    monkeypatch.setattr(ClusterWatcher, "PING", (0.02, 0.02))
    monkeypatch.setattr(ClusterWatcher, "VERIFY", 0.01)

    async def hung(*_args: object, **_options: object) -> list[str]:
        raise mcp_client.ToolHung("tool events_list_subscriptions: no answer")

    monkeypatch.setattr(mcp_client.MCPSession, "subscriptions", hung)

    async def scenario() -> None:
        async with one_cluster(sqlite) as (fake, watched):
            await watched.until(lambda: "no answer" in str(watched.record().last_error))
            fake.emit(a_fault())
            await watched.stored(1)
            assert len(fake.all_seen("GET")) == 1

    run(scenario())


def test_a_degraded_watch_of_the_server_is_a_visible_state(sqlite: Store, log: Log) -> None:
    data = {"subscriptionId": "sub-1", "cluster": "", "error": "Watch failed", "degraded": True}

    async def scenario() -> None:
        async with one_cluster(sqlite, mode=SubscribeMode.EVENTS) as (fake, watched):
            message = a_log(data)
            message["params"]["logger"] = "kubernetes/subscription_error"  # type: ignore[index]
            fake.push(message)
            record = await watched.state("degraded")
            assert "Watch failed" in str(record.last_error)
            await watched.until(
                lambda: watched.rows("select 1 from v_clusters where connection_state = 'degraded'")
            )
        assert log.said("degraded")

    run(scenario())


class Replaying(FakeMCP):
    """Numbers its events, and after a reconnect sends all from the last one on, it included."""

    def __init__(self) -> None:
        super().__init__()
        self.sent: list[bytes] = []

    def send(self, message: Mapping[str, object], *, told: bool = True) -> None:
        event = f"id: {len(self.sent)}\n".encode() + sse_message(message)
        self.sent.append(event)
        if told:
            self.push(event)

    async def handle_get(self, request: HTTPRequest, respond: HTTPResponder) -> None:
        last = request.headers.get("last-event-id")
        session = self.sessions[request.headers["mcp-session-id"]]
        await respond.start(200, {"Content-Type": "text/event-stream"})
        for event in self.sent[int(last) :] if last else ():
            respond.write(event)
        session.stream = respond
        await respond.peer_closed()
        if session.stream is respond:
            session.stream = None


def test_what_a_resumed_stream_delivers_again_is_absorbed_and_what_was_missed_is_not(
    sqlite: Store,
) -> None:
    async def scenario() -> None:
        fake = Replaying()
        async with one_cluster(sqlite, fake) as (_, watched):
            fake.send(a_log(a_fault("first")))
            fake.send(a_log(a_fault("second")))
            await watched.stored(2)
            fake.drop_streams()
            fake.send(a_log(a_fault("missed")), told=False)
            await watched.stored(3)
            fake.send(a_log(a_fault("second")))  # the same fault as before: a new event
            await watched.stored(4)
            resumed = fake.all_seen("GET")[1]
            assert resumed.headers["last-event-id"] == "1"
            names = watched.rows("select resource_name from fault_events order by event_id")
            assert [name for (name,) in names] == ["first", "second", "missed", "second"]

    run(scenario())


# ---- Rows, restarts, reload ----


def test_the_states_of_clusters_are_rows_that_people_can_read(sqlite: Store) -> None:
    async def scenario() -> None:
        async with one_cluster(sqlite, labels={"team": "shop"}) as (fake, watched):
            fake.push(GOOD, b"data: {broken\n\n", GOOD)
            await watched.until(
                lambda: watched.rows("select 1 from v_clusters where events_total = 2")
            )
            row = watched.rows("""select connection_state, triage_enabled, malformed_total,
                silent_seconds >= 0, connected_at is not null, stream_lost_at, gaps, last_error
                from v_clusters""")
            assert row == [("active", 1, 1, 1, 1, None, 0, None)]
            labels = watched.rows("select labels, protocol_version, session_id from clusters")
            assert labels == [('{"team": "shop"}', "2025-11-25", fake.session.session_id)]

    run(scenario())
    ((state, session),) = query(sqlite, "select connection_state, session_id from clusters")
    assert (state, session) == ("disconnected", None)
    ((lost, restored, reason),) = query(
        sqlite, "select lost_at, restored_at, reason from cluster_gaps"
    )
    assert lost is not None
    assert restored is None
    assert reason == "nightcrier stopped watching"


def test_the_time_between_two_runs_is_one_gap(sqlite: Store) -> None:
    async def scenario() -> None:
        fake = FakeMCP()
        async with serving(fake) as url:
            for _ in range(2):
                async with watching(sqlite, a_cluster(url)) as watched:
                    await watched.state("active")
        assert fake.sessions == {}, "every session was ended"

    run(scenario())
    rows = query(
        sqlite, "select reason, restored_at is not null from cluster_gaps order by lost_at"
    )
    assert rows == [("nightcrier stopped watching", 1), ("nightcrier stopped watching", 0)]


def test_after_a_kill_the_time_without_nightcrier_is_a_gap_and_the_left_session_is_ended(
    sqlite: Store,
) -> None:
    async def scenario() -> None:
        fake = FakeMCP()
        async with serving(fake) as url:
            cluster = a_cluster(url)
            left = await mcp_client.MCPSession.connect(nightcrier.mcp_endpoint(cluster))
            before = sql_database.utc_now() - timedelta(hours=2)
            killed = ClusterRecord(
                cluster="alpha",
                endpoint=cluster.endpoint,
                connection_state=incidents.ConnectionState.ACTIVE,
                protocol_version=left.protocol_version,
                session_id=left.session_id,
                connected_at=before,
                events_total=41,
            )
            sqlite.save_clusters([killed])
            ((written,),) = query(sqlite, "select updated_at from clusters")
            async with watching(sqlite, cluster) as watched:
                (deleted,) = await fake.wait_for("DELETE")
                assert deleted.headers["mcp-session-id"] == left.session_id
                await watched.state("active")
                await watched.until(lambda: gaps(watched) and gaps(watched)[0][2])
                ((_, lost_at, restored_at, reason),) = gaps(watched)
                assert reason == "nightcrier was not running"
                assert lost_at == written, "the last sign of life"
                assert restored_at > lost_at
                fake.emit(a_fault())
                await watched.until(lambda: watched.record().events_total == 42)

    run(scenario())


def test_a_quiet_watch_leaves_signs_of_life(sqlite: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that the gap after a kill begins when the watch ended, not when the last event came."""
    monkeypatch.setattr(ClusterWatcher, "PING", (0.02, 0.02))

    async def scenario() -> None:
        async with one_cluster(sqlite) as (_, watched):
            await watched.until(
                lambda: watched.rows("select 1 from clusters where connection_state = 'active'")
            )
            ((first,),) = watched.rows("select updated_at from clusters")
            await watched.until(
                lambda: watched.rows("select 1 from clusters where updated_at > :t", t=first)
            )
            assert watched.record().events_total == 0

    run(scenario())


def test_reload_adds_removes_and_changes_clusters_and_leaves_the_others_alone(
    sqlite: Store,
) -> None:
    async def scenario() -> None:
        fakes = {name: FakeMCP(name) for name in ("kept", "gone", "changed", "new")}
        async with serving(*fakes.values()) as url:
            before = [a_cluster(url, name) for name in ("kept", "gone", "changed")]
            async with watching(sqlite, *before) as watched:
                for cluster in before:
                    await watched.state("active", cluster.name)
                kept = fakes["kept"].session
                changed = dataclasses.replace(before[2], triage_enabled=False)
                await watched.watch.reload([before[0], changed, a_cluster(url, "new")])
                for name in ("kept", "changed", "new"):
                    await watched.state("active", name)
                assert set(watched.watch.watchers) == {"kept", "changed", "new"}
                assert fakes["gone"].sessions == {}
                assert fakes["kept"].session is kept
                assert len(fakes["kept"].all_seen("initialize")) == 1
                assert len(fakes["changed"].all_seen("initialize")) == 2
                for name in ("new", "changed", "kept"):
                    assert fakes[name].emit(a_fault(name))
                statuses = {i.event.resource_name: i.status for i in await watched.stored(3)}
                assert statuses["changed"] is IncidentStatus.SKIPPED
                assert statuses["kept"] is statuses["new"] is IncidentStatus.PENDING
                states = dict(watched.rows("select cluster, connection_state from clusters"))
                assert states["gone"] == "disconnected"

    run(scenario())


def test_what_was_written_to_a_stream_before_its_watch_ended_is_an_incident(sqlite: Store) -> None:
    class Talkative(FakeMCP):
        """Writes faults up to the moment in which it hears that the session ends."""

        async def handle_delete(self, request: HTTPRequest, respond: HTTPResponder) -> None:
            for number in range(1000):
                assert self.emit(a_fault(f"pod-{number}"))
            await super().handle_delete(request, respond)

    async def scenario() -> None:
        async with one_cluster(sqlite, Talkative()) as (_, watched):
            await watched.watch.drop(["alpha"])
            assert len(await watched.stored(1000)) == 1000

    run(scenario())


def test_a_server_that_does_not_end_its_streams_is_left_all_the_same(sqlite: Store) -> None:
    async def scenario() -> None:
        async with one_cluster(sqlite) as (fake, watched):
            fake.habits["DELETE"] = answers(405)
            await watched.watch.drop(["alpha"])
            assert watched.watch.watchers == {}

    run(scenario())


def test_a_reload_that_cannot_write_changes_nothing(
    sqlite: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario() -> None:
        async with one_cluster(sqlite) as (fake, watched):

            def full(_records: object) -> None:
                raise StoreUnavailable("the disk is full")

            with monkeypatch.context() as patch:
                patch.setattr(sqlite, "save_clusters", full)
                patch.setattr(sqlite, "save_gaps", full)
                with pytest.raises(StoreUnavailable):
                    await watched.watch.reload([])
            fake.emit(a_fault())
            await watched.stored(1)

    run(scenario())


def test_states_that_cannot_be_written_are_written_later(
    sqlite: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario() -> None:
        failures = 3

        def sometimes(records: object, save: Any = sqlite.save_clusters) -> None:
            nonlocal failures
            failures -= 1
            if failures >= 0:
                raise StoreUnavailable("the disk is full")
            save(records)

        monkeypatch.setattr(sqlite, "save_clusters", sometimes)
        async with one_cluster(sqlite) as (_, watched):
            await watched.until(
                lambda: watched.rows("select 1 from clusters where connection_state = 'active'")
            )
            assert failures < 0

    run(scenario())


def test_many_clusters_at_once_use_a_bounded_number_of_connects(
    sqlite: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ClusterWatch, "CONNECTS", 5)
    busy = most = 0

    def counting(handle: Callable[..., Awaitable[None]]) -> Habit:
        async def counted(request: HTTPRequest, respond: HTTPResponder) -> None:
            nonlocal busy, most
            busy += 1
            most = max(most, busy)
            await asyncio.sleep(0)
            await handle(request, respond)
            busy -= 1

        return counted

    async def scenario() -> None:
        fakes = [FakeMCP(f"c{number}") for number in range(100)]
        for fake in fakes:
            fake.habits["initialize"] = counting(
                lambda request, respond, fake=fake: SimulatedCluster.handle(fake, request, respond)
            )
        async with (
            serving(*fakes) as url,
            watching(sqlite, *(a_cluster(url, fake.name) for fake in fakes)) as watched,
        ):
            for fake in fakes:
                await watched.state("active", fake.name)
            for fake in fakes:
                assert fake.emit(a_fault())
            await watched.stored(100)
            assert most <= 5

    run(scenario(), seconds=40)
