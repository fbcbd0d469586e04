"""Several replicas on one database: spool, forwarding, and who watches what."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import incidents
import nightcrier
import sql_database
from conftest import (
    LEASE,
    MINUTE,
    NOON,
    a_new_store,
    an_event,
    an_event_at,
    events_of,
    ids,
    query,
    wait_until,
)
from fake_mcp import run
from incidents import ClusterRecord, FaultEvent, Incident
from nightcrier import Forwarder, Inbox
from sql_database import RowRefused, StoreUnavailable
from state_store import AsyncStore, Spool
from watch_leases import (
    ClusterTurn,
    WatchLease,
    WatchView,
    plan_watches,
    received_by_another,
)

SECOND = timedelta(seconds=1)
ROOT = Path(__file__).parents[1]


def a_worker(name: str = "w1", **fields: Any) -> incidents.WorkerRecord:
    record = nightcrier.new_worker(incidents.Role.ALL)
    return dataclasses.replace(record, worker_id=name, **fields)


# --- the plan -------------------------------------------------------------------------------------


def a_lease(cluster: str, owner: str | None = None, **fields: Any) -> WatchLease:
    values: dict[str, Any] = {"lease_epoch": 1, "lease_expires_at": owner and NOON + MINUTE}
    return WatchLease(cluster=cluster, owner=owner, **{**values, **fields})


def a_view(*leases: WatchLease, replicas: Sequence[str] = ("a", "b")) -> WatchView:
    return WatchView(now=NOON, replicas=tuple(replicas), leases=leases)


CLUSTERS = [f"c{number}" for number in range(10)]


def test_a_free_cluster_is_taken() -> None:
    plan = plan_watches(a_view(a_lease("c0")), "a", CLUSTERS, may_take_over=False)
    assert [lease.cluster for lease in plan.take] == ["c0"]
    assert plan.give == ()


def test_a_cluster_of_the_database_that_is_not_configured_is_left_alone() -> None:
    plan = plan_watches(a_view(a_lease("other")), "a", CLUSTERS, may_take_over=True)
    assert plan.take == ()


def test_a_cluster_that_is_not_configured_any_more_is_given_back() -> None:
    plan = plan_watches(a_view(a_lease("other", "a")), "a", CLUSTERS, may_take_over=True)
    assert plan.give == ("other",)


def test_a_lease_that_has_not_run_out_is_never_taken() -> None:
    view = a_view(a_lease("c0", "b"), a_lease("c1", "gone"), replicas=["a", "b"])
    assert plan_watches(view, "a", CLUSTERS, may_take_over=True).take == ()


def test_an_expired_lease_is_taken_only_by_who_may_take_over() -> None:
    view = a_view(a_lease("c0", "b", lease_expires_at=NOON), replicas=["a"])
    assert plan_watches(view, "a", CLUSTERS, may_take_over=False).take == ()
    assert len(plan_watches(view, "a", CLUSTERS, may_take_over=True).take) == 1


@given(
    replicas=st.integers(1, 6),
    clusters=st.integers(0, 40),
    chance=st.randoms(use_true_random=False),
)
def test_whatever_the_beginning_all_clusters_end_up_shared_evenly(
    replicas: int, clusters: int, chance: Any
) -> None:
    """Plans that are carried out one after the other, each on what is true then."""
    names = [f"r{number}" for number in range(replicas)]
    owners: dict[str, str | None] = {
        f"c{number}": chance.choice([None, "gone", *names]) for number in range(clusters)
    }
    for _ in range(2 * replicas + 2):
        for me in chance.sample(names, len(names)):
            leases = (
                a_lease(cluster, owner, lease_expires_at=NOON - SECOND)
                if owner == "gone"
                else a_lease(cluster, owner)
                for cluster, owner in owners.items()
            )
            plan = plan_watches(
                a_view(*leases, replicas=names), me, owners.keys(), may_take_over=True
            )
            for cluster in plan.give:
                assert owners[cluster] == me, "only what is one's own can be given"
                owners[cluster] = None
            for lease in plan.take:
                assert owners[lease.cluster] in (None, "gone"), "never from one that lives"
                owners[lease.cluster] = me
    counts = Counter(owners.values())
    assert set(counts) <= set(names)
    shares = [counts[name] for name in names]
    assert max(shares) - min(shares) <= 1
    assert sum(shares) == clusters


# --- the seam between two replicas ----------------------------------------------------------------


def a_turn(connected: float | None, updated: float, ended: float | None = None) -> ClusterTurn:
    def at(seconds: float | None) -> Any:
        return None if seconds is None else NOON + timedelta(seconds=seconds)

    return ClusterTurn(
        cluster="c", lease_epoch=2, owner="b",
        connected_at=at(connected), updated_at=at(updated), ended_at=at(ended),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("turn", "received"),
    [
        (a_turn(-10, 5), True),  # connected before, alive after
        (a_turn(0, 5), True),
        (a_turn(1, 5), False),  # connected later
        (a_turn(None, 5), False),  # not connected as of later
        (a_turn(-10, -1), None),  # it may be dead
        (a_turn(None, -1), None),  # it may have been connected since
        (a_turn(-10, 5, ended=0), False),  # it had stopped
        (a_turn(-10, -1, ended=-1), False),
        (a_turn(-10, 5, ended=5), True),
        (a_turn(None, -1, ended=5), False),
    ],
)
def test_the_events_of_a_moment_are_kept_by_who_was_connected_with_the_lease(
    turn: ClusterTurn, received: bool | None
) -> None:
    assert received_by_another(NOON, [turn], []) is received
    assert received_by_another(NOON, [], []) is False


def test_what_another_lost_in_a_gap_is_not_left_out() -> None:
    turns = [a_turn(-10, 5)]
    gap = (NOON - SECOND, NOON + SECOND)
    assert received_by_another(NOON, turns, [gap]) is False
    assert received_by_another(NOON + SECOND, turns, [gap]) is True
    assert received_by_another(NOON, turns, [(NOON, NOON)]) is True


# --- leases in the database -----------------------------------------------------------------------


def registered(store: Any, *names: str) -> None:
    records = [ClusterRecord(cluster=name, endpoint="http://h/mcp") for name in names]
    store.register_clusters(records)


def lease_of(store: Any, cluster: str) -> WatchLease:
    (found,) = (lease for lease in store.watch_view(LEASE).leases if lease.cluster == cluster)
    return found


def take(store: Any, worker: str, *clusters: str, lease: timedelta = LEASE) -> list[str]:
    taken: list[str] = store.acquire_clusters(
        worker, [lease_of(store, cluster) for cluster in clusters], lease
    )
    return taken


def test_registering_a_cluster_again_changes_nothing(store: Any) -> None:
    registered(store, "a")
    take(store, "w1", "a")
    registered(store, "a", "b")
    assert lease_of(store, "a").owner == "w1"
    assert lease_of(store, "b") == WatchLease(
        cluster="b", owner=None, lease_epoch=0, lease_expires_at=None
    )


def test_a_lease_is_taken_by_one_of_those_who_saw_it_free(store: Any) -> None:
    registered(store, "a", "b")
    seen = [lease_of(store, "a"), lease_of(store, "b")]
    assert store.acquire_clusters("w1", seen[:1], LEASE) == ["a"]
    assert store.acquire_clusters("w2", seen, LEASE) == ["b"]
    assert [lease_of(store, name).owner for name in "ab"] == ["w1", "w2"]
    assert store.acquire_clusters("w3", [], LEASE) == []


def test_a_lease_that_was_renewed_since_it_was_seen_is_not_taken(store: Any) -> None:
    registered(store, "a")
    take(store, "w1", "a", lease=timedelta(0))
    seen = lease_of(store, "a")
    assert store.renew_clusters(a_worker("w1"), {}, LEASE) == {"a"}
    assert store.acquire_clusters("w2", [seen], LEASE) == []


def test_renewing_tells_what_is_still_held_even_if_it_had_run_out(store: Any) -> None:
    registered(store, "a", "b")
    take(store, "w1", "a", "b", lease=timedelta(0))
    take(store, "w2", "b")
    assert store.renew_clusters(a_worker("w1"), {}, LEASE) == {"a"}
    lease = lease_of(store, "a")
    assert lease.lease_expires_at is not None
    assert lease.lease_expires_at > sql_database.utc_now() + LEASE / 2


def test_what_is_given_back_is_free_at_once_and_only_ones_own(store: Any) -> None:
    registered(store, "a", "b")
    take(store, "w1", "a")
    take(store, "w2", "b")
    store.release_clusters(a_worker("w1", state="draining"), ["a", "b"])
    assert [lease_of(store, name).owner for name in "ab"] == [None, "w2"]
    assert take(store, "w2", "a") == ["a"]
    assert lease_of(store, "a").lease_epoch == 2


def test_every_turn_of_a_replica_is_a_row(store: Any) -> None:
    registered(store, "a")
    take(store, "w1", "a")
    store.renew_clusters(a_worker("w1"), {"a": NOON}, LEASE)
    store.renew_clusters(a_worker("w1"), {"a": NOON + MINUTE}, LEASE)
    store.release_clusters(a_worker("w1"), ["a"])
    take(store, "w2", "a", lease=timedelta(0))
    take(store, "w3", "a")
    turns, gaps = store.turns_of_others("a", NOON, {"w3"})
    assert gaps == []
    assert [(turn.lease_epoch, turn.owner) for turn in turns] == [(1, "w1"), (2, "w2")]
    first, second = turns
    assert first.connected_at == NOON, "the time of the first connection stays"
    assert first.ended_at is not None
    assert second.ended_at == second.updated_at, "it ended without a word after its last sign"
    assert second.connected_at is None
    assert store.turns_of_others("a", sql_database.utc_now() + MINUTE, set())[0] == [
        turn for turn in store.turns_of_others("a", NOON, set())[0] if turn.owner == "w3"
    ]


def test_replicas_that_watch_and_live_are_seen(store: Any) -> None:
    store.save_worker(a_worker("w1"))
    store.save_worker(a_worker("w2", role=incidents.Role.INGEST))
    store.save_worker(a_worker("w3", role=incidents.Role.WORKER))
    store.save_worker(a_worker("w4", state="draining"))
    assert sorted(store.watch_view(LEASE).replicas) == ["w1", "w2"]
    assert store.watch_view(timedelta(0)).replicas == ()
    assert sorted(store.live_workers(LEASE)) == ["w1", "w2", "w3", "w4"]
    assert store.live_workers(timedelta(0)) == []


def test_what_a_dead_replica_held_is_free(store: Any) -> None:
    registered(store, "a", "b")
    for worker in ("w1", "w2"):
        store.save_worker(a_worker(worker))
    take(store, "w1", "a")
    take(store, "w2", "b")
    store.create_incidents(events_of("a", 2))
    (theirs,) = store.claim_incidents("w1", 1, LEASE)
    store.claim_incidents("w2", 1, LEASE)
    store.bury_replicas(["w1", "unknown"])
    assert [lease_of(store, name).owner for name in "ab"] == [None, "w2"]
    assert store.watch_view(LEASE).replicas == ("w2",)
    assert ids(store.release_expired(3)) == [theirs.incident_id]
    (turn,) = store.turns_of_others("a", NOON, set())[0]
    assert turn.ended_at == turn.updated_at


def test_who_has_lost_a_cluster_does_not_write_over_what_its_successor_says(store: Any) -> None:
    registered(store, "a")
    take(store, "w1", "a", lease=timedelta(0))
    (mine,) = store.list_clusters()
    take(store, "w2", "a")
    (theirs,) = store.list_clusters()
    store.save_clusters([dataclasses.replace(theirs, last_error="new")])
    store.save_clusters([dataclasses.replace(mine, last_error="old")])
    (found,) = store.list_clusters()
    assert (found.owner, found.last_error) == ("w2", "new")


def test_when_a_stream_is_restored_no_earlier_gap_of_its_cluster_stays_open(store: Any) -> None:
    """A replica that was frozen writes one, and hears later that another has taken over."""

    def gap(cluster: str, minute: int, restored: int | None = None) -> incidents.ClusterGap:
        end = None if restored is None else NOON + restored * MINUTE
        lost_at = NOON + minute * MINUTE
        return incidents.ClusterGap(cluster=cluster, lost_at=lost_at, restored_at=end, reason="r")

    store.save_gaps([gap("a", 1), gap("a", 2), gap("b", 1), gap("a", 9)])
    store.save_gaps([gap("a", 2, 5)])
    assert {(g.cluster, g.lost_at) for g in store.open_gaps()} == {
        ("b", NOON + MINUTE),
        ("a", NOON + 9 * MINUTE),
    }


# --- the spool ------------------------------------------------------------------------------------


@contextlib.contextmanager
def a_spool(folder: Path, name: str = "w1", limit: int = 10_000_000) -> Iterator[Spool]:
    spool = Spool(folder, limit, a_worker(name))
    try:
        yield spool
    finally:
        spool.close()


def test_what_goes_into_the_spool_comes_out_whole_and_in_order(tmp_path: Path) -> None:
    events = [
        an_event_at(NOON + number * SECOND, f"c{number % 3}", context="x", occurred_at=NOON)
        for number in range(10)
    ]

    async def scenario() -> None:
        with a_spool(tmp_path) as spool:
            assert spool.emptied.is_set()
            await spool.add(events[5:])
            await spool.add(events[:5])
            await spool.add(events[:5])
            assert len(spool) == 10
            assert spool.filled.is_set()
            assert await spool.oldest(4, ()) == events[:4]
            assert await spool.oldest(100, {"c0", "c1"}) == [
                event for event in events if event.cluster == "c2"
            ]
            await spool.remove(events[:9])
            assert await spool.oldest(100, ()) == events[9:]
            await spool.remove(events[9:])
            assert spool.emptied.is_set()
            assert not spool.filled.is_set()

    run(scenario())


def test_the_spool_of_a_living_replica_is_left_alone(tmp_path: Path) -> None:
    with a_spool(tmp_path, "w1") as first, a_spool(tmp_path, "w2") as second:
        assert first.predecessors == second.predecessors == frozenset()
    assert sorted(path.name for path in tmp_path.glob("*.db")) == ["spool-1.db", "spool-2.db"]


def test_spools_that_dead_replicas_left_are_taken_over(tmp_path: Path) -> None:
    events = events_of("a", 3)

    async def fill() -> None:
        with a_spool(tmp_path, "w1") as first, a_spool(tmp_path, "w2") as second:
            await first.add(events[:1])
            await second.add(events[1:])

    async def empty() -> None:
        with a_spool(tmp_path, "w3") as spool:
            assert spool.predecessors == {"w1", "w2"}
            assert spool.workers == {"w1", "w2", "w3"}
            assert await spool.oldest(10, ()) == events
            await spool.remove(events)
        with a_spool(tmp_path, "w4") as spool:
            assert len(spool) == 0
            assert spool.predecessors == {"w1", "w2", "w3"}
        with a_spool(tmp_path, "w5") as spool:
            assert spool.predecessors == {"w4"}, "of an empty spool only the last is of use"

    run(fill())
    run(empty())
    assert [path.name for path in tmp_path.glob("*.db")] == ["spool-1.db"]


def test_a_full_spool_takes_nothing_more_until_there_is_room(tmp_path: Path) -> None:
    async def scenario() -> None:
        with a_spool(tmp_path, limit=1_000_000) as spool:
            added: list[FaultEvent] = []
            with contextlib.suppress(StoreUnavailable):
                for event in events_of("a", 1000, context="x" * 50_000):
                    await spool.add([event])
                    added.append(event)
            with pytest.raises(StoreUnavailable, match=r"spool-1\.db is full"):
                await spool.add([an_event()])
            assert 10 < len(added) < 40
            assert await spool.oldest(1000, ()) == added
            await spool.remove(added[:5])
            await spool.add([an_event()])

    run(scenario())


FILLER = """
import asyncio, os, signal
from pathlib import Path
from conftest import events_of
from test_sharing import a_worker
import state_store
spool = state_store.Spool(Path(sys.argv[1]), 10**9, a_worker("dead"))
async def fill():
    for _ in range(20):
        events = events_of("a", 10)
        await spool.add(events)
        print(*[event.event_id for event in events], flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
asyncio.run(fill())
"""


def test_what_a_killed_process_had_put_into_its_spool_is_there(tmp_path: Path) -> None:
    head = f"import sys; sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'tests')!r}]\n"
    filler = subprocess.run(
        [sys.executable, "-c", head + FILLER, str(tmp_path)],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert (filler.returncode, filler.stderr) == (-signal.SIGKILL, "")

    async def scenario() -> None:
        with a_spool(tmp_path) as spool:
            assert "dead" in spool.predecessors
            found = await spool.oldest(1000, ())
            assert [event.event_id for event in found] == filler.stdout.split()

    run(scenario())
    assert len(filler.stdout.split()) == 200


async def until(condition: Callable[[], Any]) -> None:
    """Wait for what other tasks and threads do."""
    await asyncio.to_thread(wait_until, condition)


# --- the configuration, read anew ----------------------------------------------------------------


class Slow(AsyncStore):
    """Answers only when it is let."""

    def __init__(self, store: Any) -> None:
        super().__init__(store)
        self.open = asyncio.Event()
        self.open.set()

    async def call(self, method: Callable[..., Any], *args: Any, **options: Any) -> Any:
        result = await super().call(method, *args, **options)
        await self.open.wait()
        return result


@contextlib.asynccontextmanager
async def a_watch(store: Any) -> AsyncIterator[tuple[Slow, nightcrier.ClusterWatch]]:
    calls = Slow(store)
    inbox = Inbox(calls, without_triage=tuple, on_stored=lambda _: None)
    watch = nightcrier.ClusterWatch(calls, inbox, incidents.SubscribeMode.FAULTS)
    try:
        yield calls, watch
    finally:
        calls.open.set()
        await watch.close()


def a_cluster(name: str, path: str = "mcp") -> nightcrier.ClusterConfig:
    return nightcrier.ClusterConfig(name=name, endpoint=f"http://127.0.0.1:1/{path}")


def watch_tasks(name: str) -> int:
    return sum(task.get_name() == f"watch {name}" for task in asyncio.all_tasks())


def test_a_cluster_that_is_started_and_reloaded_at_once_is_watched_once(store: Any) -> None:
    async def scenario() -> None:
        async with a_watch(store) as (calls, watch):
            await watch.start([a_cluster("a")])
            calls.open.clear()
            reloading = asyncio.create_task(watch.reload([a_cluster("a", "other")]))
            await asyncio.sleep(0.1)
            starting = asyncio.create_task(watch.start([a_cluster("a")]))
            dropping = asyncio.create_task(watch.drop(["b"]))
            await asyncio.sleep(0.1)
            calls.open.set()
            await asyncio.gather(reloading, starting, dropping)
            assert watch_tasks("a") == 1
            assert watch.watchers["a"].cluster == a_cluster("a", "other")

    run(scenario())


def test_a_cluster_that_is_dropped_and_reloaded_at_once_is_gone(store: Any) -> None:
    async def scenario() -> None:
        async with a_watch(store) as (_, watch):
            await watch.start([a_cluster("a")])
            await asyncio.gather(watch.drop(["a"]), watch.reload([]), watch.drop(["a"]))
            assert watch.watchers == {}
            assert watch_tasks("a") == 0

    run(scenario())


def test_a_cluster_that_is_removed_while_it_is_taken_is_not_watched(
    shared: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario() -> None:
        async with a_watch(shared) as (calls, watch):
            leases = nightcrier.WatchLeases(
                calls, watch, worker=a_worker, lease=LEASE, predecessors=()
            )
            leases.use([a_cluster("a"), a_cluster("b")])
            call = calls.call

            async def remove_then(method: Callable[..., Any], *args: Any) -> Any:
                result = await call(method, *args)
                if method == shared.acquire_clusters:
                    assert sorted(result) == ["a", "b"]
                    leases.use([a_cluster("a")])
                return result

            monkeypatch.setattr(calls, "call", remove_then)
            await leases._turn()
            assert set(watch.watchers) == {"a"}
            await leases._turn()
            assert lease_of(shared, "b").owner is None

    run(scenario())


# --- the inbox and the forwarder ------------------------------------------------------------------


class Away:
    """A store that can be away, or hang; otherwise a real one."""

    def __init__(self, store: Any) -> None:
        self._store = store
        self.problem: Exception | None = None
        self.after: Exception | None = None  # raised when it is done
        self.calls = 0

    def create_incidents(self, events: Sequence[FaultEvent], **options: Any) -> list[Incident]:
        self.calls += 1
        if self.problem is not None:
            raise self.problem
        created: list[Incident] = self._store.create_incidents(events, **options)
        if self.after is not None:
            raise self.after
        return created

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    def close(self) -> None:
        pass


class Replica:
    """Inbox, spool and forwarder of one replica."""

    def __init__(self, store: Any, folder: Path, name: str = "w1") -> None:
        self.store = Away(store)
        self.calls = AsyncStore(self.store)  # type: ignore[arg-type]
        self.spool = Spool(folder, 10_000_000, a_worker(name))
        self.told: list[Incident] = []
        self.lost: set[str] = set()  # clusters whose lease is not ours
        self.inbox = Inbox(self.calls, without_triage=tuple, on_stored=self.told.extend)
        self.inbox.use_spool(self.spool, lambda cluster: cluster not in self.lost)
        self.forwarder = Forwarder(
            self.calls, self.spool, without_triage=tuple, on_stored=self.told.extend
        )

    async def receive(self, *events: FaultEvent) -> None:
        """Hand events in, and wait until each is durable somewhere."""
        durable = asyncio.Semaphore(0)
        for event in events:
            await self.inbox.put(event, durable.release)
        for _ in events:
            await durable.acquire()


@contextlib.asynccontextmanager
async def a_replica(store: Any, folder: Path, name: str = "w1") -> AsyncIterator[Replica]:
    replica = Replica(store, folder, name)
    inbox = asyncio.create_task(replica.inbox.run())
    try:
        yield replica
    finally:
        replica.inbox.close()
        await inbox
        replica.calls.close()
        replica.spool.close()


@contextlib.asynccontextmanager
async def forwarding(replica: Replica) -> AsyncIterator[None]:
    task = asyncio.create_task(replica.forwarder.run())
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nightcrier, "backoff", lambda *_args, **_options: 0.01)


@pytest.fixture(params=["sqlite", "postgres"])
def shared(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Any]:
    with a_new_store(request.param, request, tmp_path) as store:
        yield store


def stored(store: Any) -> list[str]:
    return [row[0] for row in query(store, "select event_id from fault_events order by event_id")]


def test_while_the_database_is_there_nothing_goes_to_the_spool(shared: Any, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with a_replica(shared, tmp_path) as replica:
            events = events_of("a", 5)
            await replica.receive(*events)
            assert len(replica.spool) == 0
            assert stored(shared) == [event.event_id for event in events]
            assert sorted(ids(replica.told)) == stored(shared)

    run(scenario())


@pytest.mark.parametrize("hangs", [False, True])
def test_while_the_database_is_away_events_wait_in_the_spool_and_come_in_order_once(
    shared: Any, tmp_path: Path, hangs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Inbox, "SPOOL_AFTER", 0.2)

    async def scenario() -> None:
        async with a_replica(shared, tmp_path) as replica:
            replica.store.problem = StoreUnavailable("away")
            if hangs:
                replica.store.problem = None
                wait = asyncio.Event()
                call = replica.calls.call

                async def hang(method: Any, *args: Any, **options: Any) -> Any:
                    if method == replica.store.create_incidents:
                        await wait.wait()
                    return await call(method, *args, **options)

                monkeypatch.setattr(replica.calls, "call", hang)
            first = events_of("a", 3)
            await replica.receive(*first)
            assert len(replica.spool) == 3
            assert stored(shared) == []
            replica.store.problem = None
            if hangs:
                wait.set()
            later = an_event("a")
            await replica.receive(later)  # behind those that wait
            assert len(replica.spool) == 4
            async with forwarding(replica):
                await replica.spool.emptied.wait()
            assert stored(shared) == [event.event_id for event in [*first, later]]
            assert ids(replica.told) == stored(shared)
            await replica.receive(an_event("a"))
            assert len(replica.spool) == 0, "it is the direct way again"

    run(scenario())


def test_also_a_database_that_somebody_has_to_mend_is_no_reason_to_stop_reading(
    shared: Any, tmp_path: Path
) -> None:
    async def scenario() -> None:
        async with a_replica(shared, tmp_path) as replica:
            replica.store.problem = sql_database.StoreError("the password was not accepted")
            await replica.receive(an_event("a"))
            assert len(replica.spool) == 1

    run(scenario())


def test_a_spool_that_the_host_has_no_thread_for_loses_nothing(
    shared: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario() -> None:
        async with a_replica(shared, tmp_path) as replica:
            replica.store.problem = StoreUnavailable("away")
            add, failures = replica.spool._rows.add, iter([RuntimeError("can't start new thread")])

            def fail(rows: Sequence[Any]) -> None:
                for failure in failures:
                    raise failure
                add(rows)

            monkeypatch.setattr(replica.spool._rows, "add", fail)
            await replica.receive(an_event("a"))
            assert len(replica.spool) == 1

    run(scenario())


def test_what_the_database_has_not_answered_for_at_the_end_is_in_the_spool(
    shared: Any, tmp_path: Path
) -> None:
    async def scenario() -> None:
        spool = Spool(tmp_path, 10_000_000, a_worker())
        calls = Slow(shared)
        calls.open.clear()
        inbox = Inbox(calls, without_triage=tuple, on_stored=lambda _: None)
        inbox.use_spool(spool, lambda _cluster: True)
        task = asyncio.create_task(inbox.run())
        await inbox.put(an_event("a"))
        await asyncio.sleep(0.1)
        task.cancel()
        await asyncio.wait([task])
        await inbox.give_up()
        assert len(inbox) == 0
        assert len(spool) == 1
        spool.close()

    run(scenario())


def test_an_event_whose_commit_was_not_heard_of_is_not_stored_twice(
    shared: Any, tmp_path: Path
) -> None:
    async def scenario() -> None:
        async with a_replica(shared, tmp_path) as replica:
            replica.store.after = StoreUnavailable("the connection was lost")
            events = events_of("a", 3)
            await replica.receive(*events)
            assert len(replica.spool) == 3
            replica.store.after = None
            async with forwarding(replica):
                await replica.spool.emptied.wait()
            assert stored(shared) == [event.event_id for event in events]

    run(scenario())


def test_forwarding_waits_for_the_database_and_says_so(shared: Any, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with a_replica(shared, tmp_path) as replica:
            replica.store.problem = StoreUnavailable("away")
            await replica.receive(an_event("a"))
            async with forwarding(replica):
                await until(lambda: replica.store.calls >= 4)
                assert replica.forwarder.problem == "away; 1 events wait in the spool"
                replica.store.problem = None
                await until(lambda: replica.forwarder.problem is None)
                assert len(replica.spool) == 0

    run(scenario())


def test_an_event_that_the_database_refuses_does_not_hold_up_the_others(
    shared: Any, tmp_path: Path
) -> None:
    async def scenario() -> None:
        async with a_replica(shared, tmp_path) as replica:
            good, bad = events_of("a", 2), an_event("a", fault_type="")
            # A spool has the rules of the schema, too; a server may have more of them.
            monkey = replica.store.create_incidents

            def refuse(events: Sequence[FaultEvent], **options: Any) -> list[Incident]:
                if any(event.event_id == poison.event_id for event in events):
                    raise RowRefused("refused")
                return monkey(events, **options)

            poison = dataclasses.replace(bad, fault_type="Poison")
            replica.store.problem = StoreUnavailable("away")
            await replica.receive(good[0], poison, good[1])
            replica.store.problem = None
            replica.store.create_incidents = refuse  # type: ignore[method-assign]
            async with forwarding(replica):
                await replica.spool.emptied.wait()
            assert stored(shared) == sorted(event.event_id for event in good)

    run(scenario())


def turn_of_another(store: Any, cluster: str, connected_at: datetime | None) -> None:
    """Another replica takes the cluster over from w1 and connects."""
    registered(store, cluster)
    take(store, "w1", cluster, lease=timedelta(0))
    take(store, "w2", cluster)
    connected = {} if connected_at is None else {cluster: connected_at}
    store.renew_clusters(a_worker("w2"), connected, LEASE)


def test_what_a_successor_received_as_well_is_left_out_and_a_gap_says_so(
    shared: Any, tmp_path: Path
) -> None:
    now = sql_database.utc_now()

    async def scenario() -> None:
        async with a_replica(shared, tmp_path) as replica:
            replica.lost = {"a"}
            before = [an_event_at(now - number * SECOND, "a") for number in (30, 20)]
            after = [an_event_at(now - number * SECOND, "a") for number in (8, 5)]
            other = an_event_at(now - 5 * SECOND, "b")
            await replica.receive(*before, *after, other)
            assert len(replica.spool) == 5
            turn_of_another(shared, "a", now - 10 * SECOND)
            async with forwarding(replica):
                await replica.spool.emptied.wait()
            expected = {event.event_id for event in [*before, other]}
            assert set(stored(shared)) == expected
            gaps = query(shared, "select cluster, reason from cluster_gaps")
            assert len(gaps) == 1
            assert gaps[0][0] == "a"
            assert gaps[0][1].startswith("2 events that this replica received while")

    run(scenario())


def test_what_the_successor_does_not_receive_because_its_stream_is_lost_is_kept(
    shared: Any, tmp_path: Path
) -> None:
    now = sql_database.utc_now()

    async def scenario() -> None:
        async with a_replica(shared, tmp_path) as replica:
            replica.lost = {"a"}
            both, mine = (an_event_at(now - number * SECOND, "a") for number in (8, 3))
            await replica.receive(both, mine)
            turn_of_another(shared, "a", now - 10 * SECOND)
            # What somebody else left open says nothing.
            left = incidents.ClusterGap(
                cluster="a", lost_at=now - 9 * SECOND, restored_at=None, reason="left"
            )
            shared.save_gaps([left])
            (theirs,) = shared.list_clusters()
            shared.save_clusters([dataclasses.replace(theirs, stream_lost_at=now - 5 * SECOND)])
            async with forwarding(replica):
                await replica.spool.emptied.wait()
            assert stored(shared) == [mine.event_id]

    run(scenario())


def test_until_the_successor_says_whether_it_was_connected_its_clusters_events_wait(
    shared: Any, tmp_path: Path
) -> None:
    now = sql_database.utc_now()

    async def scenario() -> None:
        async with a_replica(shared, tmp_path) as replica:
            replica.lost = {"a"}
            turn_of_another(shared, "a", None)
            undecided = an_event_at(now + MINUTE, "a")  # later than the successor's last sign
            other = an_event_at(now + 2 * MINUTE, "b")
            await replica.receive(undecided, other)
            async with forwarding(replica):
                await until(lambda: len(replica.spool) == 1)
                assert stored(shared) == [other.event_id]
                # The successor stops: it cannot have received it.
                shared.release_clusters(a_worker("w2"), ["a"])
                await replica.spool.emptied.wait()
            assert set(stored(shared)) == {undecided.event_id, other.event_id}

    run(scenario())


def test_a_whole_batch_that_has_to_wait_does_not_hold_up_what_is_behind_it(
    shared: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Forwarder, "BATCH", 2)
    now = sql_database.utc_now()

    async def scenario() -> None:
        async with a_replica(shared, tmp_path) as replica:
            replica.lost = {"a", "b"}
            turn_of_another(shared, "a", None)
            undecided = [an_event_at(now + n * MINUTE, "a") for n in (1, 2, 3)]
            other = an_event_at(now + 4 * MINUTE, "b")
            await replica.receive(*undecided, other)
            async with forwarding(replica):
                await until(lambda: len(replica.spool) == 3)
                assert stored(shared) == [other.event_id]

    run(scenario())


def test_a_replica_that_was_away_for_less_than_a_lease_forwards_everything(
    shared: Any, tmp_path: Path
) -> None:
    async def scenario() -> None:
        registered(shared, "a")
        take(shared, "w1", "a", lease=timedelta(0))  # it ran out, and nobody took it
        async with a_replica(shared, tmp_path) as replica:
            replica.lost = {"a"}
            events = events_of("a", 3)
            await replica.receive(*events)
            async with forwarding(replica):
                await replica.spool.emptied.wait()
            assert stored(shared) == [event.event_id for event in events]
            assert query(shared, "select * from cluster_gaps") == []

    run(scenario())


def test_a_full_spool_pauses_the_inbox_and_nothing_is_lost(shared: Any, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with a_replica(shared, tmp_path) as replica:
            replica.spool._rows._limit = 0
            replica.store.problem = StoreUnavailable("away")
            event = an_event("a")
            durable = asyncio.Event()
            await replica.inbox.put(event, durable.set)
            await until(lambda: "a larger limit is set" in str(replica.inbox.problem))
            assert not durable.is_set()
            replica.store.problem = None
            await durable.wait()
            assert stored(shared) == [event.event_id]

    run(scenario())
