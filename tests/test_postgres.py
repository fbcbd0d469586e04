"""sql_database.py: PostgreSQL when connections, servers and commits are lost.

That it keeps the contract of every store is in test_stores.py.
"""

from __future__ import annotations

import contextlib
import gc
import os
import resource
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pg8000.exceptions
import pytest

import incidents
import sql_database
import state_store
from conftest import (
    LEASE,
    a_schema,
    an_event,
    an_execution,
    claim_all,
    claim_one,
    events_of,
    finished,
    ids,
    in_threads,
    postgres_store,
    query,
    resolved,
    wait_until,
)
from incidents import IncidentFilter
from incidents import IncidentStatus as S
from postgres_servers import PostgresServer, Proxy, free_port, pgbouncer
from sql_database import CommitUnknown, RowRefused, StoreError, StoreUnavailable
from state_store import PostgresStore


@pytest.fixture
def schema(postgres_dsn: str) -> Iterator[str]:
    with a_schema(postgres_dsn) as dsn:
        yield dsn


@pytest.fixture
def store(schema: str) -> Iterator[PostgresStore]:
    with contextlib.closing(postgres_store(schema)) as store:
        yield store


@pytest.fixture
def own_store(own_postgres: PostgresServer) -> Iterator[PostgresStore]:
    """A store on a server that the test may stop."""
    with contextlib.closing(postgres_store(own_postgres.dsn())) as store:
        yield store


def count(store: Any) -> int:
    return int(query(store, "select count(*) from incidents")[0][0])


# --- connections that are lost --------------------------------------------------------------------


def use(store: Any, threads: int = 6) -> None:
    """Have many connections open at once."""
    together = threading.Barrier(threads, timeout=30)

    def hold(_: int) -> None:
        store._database.read(lambda tx: (tx.run("select 1"), together.wait()))

    in_threads(threads, hold)


def test_connections_that_were_killed_are_replaced_without_anybody_noticing(
    own_postgres: PostgresServer, own_store: PostgresStore
) -> None:
    use(own_store)
    killed = own_postgres.run(
        """select count(pg_terminate_backend(pid)) from pg_stat_activity
           where application_name = 'tests'"""
    )
    assert killed[0][0] >= 6
    own_store.create_incidents(events_of("a", 3))
    use(own_store)
    assert count(own_store) == 3


def test_closing_does_not_wait_for_a_server_that_does_not_answer(store: PostgresStore) -> None:
    failures: list[Exception] = []

    def hang() -> None:
        try:
            store._database.read(lambda tx: tx.run("select pg_sleep(25)"))
        except StoreUnavailable as error:
            failures.append(error)

    waiting = threading.Thread(target=hang)
    waiting.start()
    asleep = "select 1 from pg_stat_activity where wait_event = 'PgSleep'"
    wait_until(lambda: query(store, asleep))
    store.close()
    waiting.join(10)
    assert len(failures) == 1
    assert not isinstance(failures[0], CommitUnknown)
    store.close()


@pytest.mark.parametrize("mode", ["immediate", "fast"])
def test_a_server_that_was_restarted_is_used_again_and_what_was_stored_is_there(
    own_postgres: PostgresServer, own_store: PostgresStore, mode: str
) -> None:
    use(own_store)
    created = own_store.create_incidents(events_of("a", 3))
    own_postgres.restart(mode)
    assert sorted(ids(claim_all(own_store))) == sorted(ids(created))


def test_while_the_server_is_away_the_store_is_unavailable_and_says_where_it_was(
    own_postgres: PostgresServer, own_store: PostgresStore
) -> None:
    own_store.create_incidents([an_event()])
    own_postgres.stop("immediate")
    for _ in range(3):
        with pytest.raises(StoreUnavailable, match=f"127.0.0.1:{own_postgres.port}") as raised:
            own_store.create_incidents([an_event()])
        assert not isinstance(raised.value, CommitUnknown)
    own_postgres.start()
    own_store.create_incidents([an_event()])
    assert count(own_store) == 2


def test_a_connection_that_is_lost_in_the_middle_of_a_transaction_is_no_loss(
    own_postgres: PostgresServer, own_store: PostgresStore
) -> None:
    """The job runs again, from its beginning, on another connection."""
    runs = []

    def job(tx: Any) -> int:
        runs.append(tx.run("select pg_backend_pid()")[0][0])
        tx.insert("holds", [a_hold()])
        if len(runs) == 1:
            own_postgres.run("select pg_terminate_backend(:pid)", pid=runs[0])
        return int(tx.run("select count(*) from holds")[0][0])

    assert own_store._database.write(job) == 1
    assert len(set(runs)) == 2
    assert query(own_store, "select count(*) from holds") == [(1,)]


@pytest.mark.parametrize("when", ["before it began", "before its commit"])
def test_a_server_that_ends_a_session_before_a_commit_leaves_no_doubt_about_it(
    own_postgres: PostgresServer, own_store: PostgresStore, when: str
) -> None:
    """All is sent at once, and the answer to the first of it is that the session has ended."""
    own_store._database.write(lambda tx: tx.insert("holds", [a_hold()]))
    kill = """select count(pg_terminate_backend(pid, 10000)) from pg_stat_activity
              where application_name = 'tests'"""
    runs = []

    def job(tx: Any) -> None:
        runs.append(1)
        if when == "before its commit":
            tx.run("select 1")
        tx.insert("holds", [a_hold()])
        if len(runs) == 1 and when == "before its commit":
            own_postgres.run(kill)

    if when == "before it began":
        own_postgres.run(kill)
    own_store._database.write(job)
    assert len(runs) == 2
    assert query(own_store, "select count(*) from holds") == [(2,)]


def a_hold(**fields: Any) -> dict[str, Any]:
    now = sql_database.format_time(sql_database.utc_now())
    return {
        "hold_id": sql_database.new_id(), "scope": "s", "cluster": None, "reason": "r",
        "since": now, "until": None, **fields,
    }  # fmt: skip


def test_what_fails_for_another_reason_is_rolled_back_and_the_connection_stays(
    store: PostgresStore,
) -> None:
    pids = []

    def job(tx: Any) -> None:
        pids.append(tx.run("select pg_backend_pid()"))
        tx.insert("holds", [a_hold()])
        raise KeyError("a mistake")

    for _ in range(2):
        with pytest.raises(KeyError):
            store._database.write(job)
    assert pids[0] == pids[1]
    assert query(store, "select * from holds") == []


@pytest.fixture
def quick_store(schema: str) -> Iterator[PostgresStore]:
    """On a server that looks for deadlocks at once."""
    options = "%20-c%20deadlock_timeout%3D10"
    with contextlib.closing(postgres_store(f"{schema}{options}")) as store:
        yield store


def test_transactions_that_cannot_be_put_in_an_order_are_repeated(
    quick_store: PostgresStore,
) -> None:
    """A deadlock, made for real: each holds what the other wants."""
    store = quick_store
    first, second = a_hold(), a_hold()
    store._database.write(lambda tx: tx.insert("holds", [first, second]))
    met = threading.Barrier(2, timeout=10)
    runs = [0, 0]

    def work(number: int) -> None:
        mine, other = (first, second) if number else (second, first)

        def job(tx: Any) -> None:
            runs[number] += 1
            tx.update("holds", "hold_id", [{"hold_id": mine["hold_id"], "scope": str(number)}])
            tx.run("select 1")  # what is asked for is sent at the latest now
            if sum(runs) <= 2:
                met.wait()
            tx.update("holds", "hold_id", [{"hold_id": other["hold_id"], "scope": str(number)}])

        store._database.write(job)

    in_threads(2, work)
    assert sum(runs) >= 3
    assert len({scope for (scope,) in query(store, "select scope from holds")}) == 1


def test_an_execution_that_begins_while_its_lease_is_taken_back_is_not_left_open(
    own_postgres: PostgresServer, own_store: PostgresStore
) -> None:
    own_store.create_incidents([an_event()])
    claimed = claim_one(own_store)
    refused: list[BaseException] = []

    def start() -> None:
        try:
            own_store.start_execution(an_execution(claimed))
        except incidents.LeaseLost as error:
            refused.append(error)

    def take_back(tx: Any) -> None:
        end = state_store._End(claimed, S.PENDING, "its lease ran out")
        state_store._leave_running(tx, [end])
        tx.run("select 1")  # what was sent is done now
        starting.start()
        wait_until(lambda: not starting.is_alive() or own_postgres.run(waiting)[0][0])

    waiting = "select count(*) from pg_stat_activity where wait_event_type = 'Lock'"
    starting = threading.Thread(target=start)
    own_store._database.write(take_back)
    starting.join()
    assert refused
    assert own_store.list_executions(claimed.incident_id) == []


def test_a_claim_that_began_before_a_release_is_recorded_as_later(store: PostgresStore) -> None:
    """Both times are the server's, and the claim sees what was released after it had begun."""
    store.create_incidents([an_event()])
    claimed = claim_one(store)
    held = state_store._held_clusters

    def release_first(tx: Any) -> Any:
        assert tx.now
        store.release_incident(claimed, "drain")
        return held(tx)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(state_store, "_held_clusters", release_first)
        assert claim_one(store).attempt == 2
    times = [transition.at for transition in store.list_transitions(claimed.incident_id)]
    assert times == sorted(times)


def test_a_cluster_whose_row_somebody_deleted_is_watched_again(store: PostgresStore) -> None:
    record = incidents.ClusterRecord(cluster="prod", endpoint="http://prod/mcp")
    for _ in range(2):
        store.register_clusters([record])
        leases = store.watch_view(LEASE).leases
        assert store.acquire_clusters("w1", leases, LEASE) == ["prod"]
        store._database.write(lambda tx: tx.run("delete from clusters"))


# --- commits of which nobody hears ----------------------------------------------------------------


COMMIT = b"commit\0"  # as it is sent; "read committed" is something else


@pytest.fixture
def proxy(own_postgres: PostgresServer) -> Iterator[Proxy]:
    proxy = Proxy(own_postgres.port)
    yield proxy
    proxy.close()


@pytest.fixture
def cut_store(proxy: Proxy) -> Iterator[PostgresStore]:
    dsn = f"postgresql://postgres@127.0.0.1:{proxy.port}/postgres?sslmode=disable"
    with contextlib.closing(postgres_store(dsn)) as store:
        yield store


def cut_at_the_next_commit(proxy: Proxy, store: PostgresStore, *, arrives: bool = True) -> None:
    # The commit of what was only read is sent and not waited for: it must not be the one.
    store._database.write(lambda tx: tx.run("select 1"))
    proxy.arrives, proxy.cut = arrives, COMMIT


@pytest.mark.parametrize("arrives", [True, False])
def test_who_does_not_hear_of_a_commit_is_told_that_it_is_not_known(
    proxy: Proxy, cut_store: PostgresStore, arrives: bool
) -> None:
    cut_at_the_next_commit(proxy, cut_store, arrives=arrives)
    events = events_of("a", 2)
    with pytest.raises(CommitUnknown, match="not known"):
        cut_store.create_incidents(events)
    assert count(cut_store) == (2 if arrives else 0)
    again = cut_store.create_incidents(events)
    assert len(again) == (0 if arrives else 2)
    assert count(cut_store) == 2


@pytest.mark.parametrize("arrives", [True, False])
@pytest.mark.parametrize("retries", [0, 1])
def test_an_outcome_whose_commit_was_not_heard_of_is_written_again_and_counts_once(
    proxy: Proxy, cut_store: PostgresStore, arrives: bool, retries: int
) -> None:
    cut_store.create_incidents([an_event()])
    claimed = claim_one(cut_store)
    execution = an_execution(claimed)
    cut_store.start_execution(execution)
    ended = finished(execution, incidents.Outcome.FAILED)
    outcome = incidents.Completion(
        status=S.AGENT_FAILED, execution=ended, failure_reason="exit 1", agent_retries=retries
    )
    if retries == 0:
        outcome = resolved(claimed, execution=finished(execution))
    cut_at_the_next_commit(proxy, cut_store, arrives=arrives)
    with pytest.raises(CommitUnknown):
        cut_store.complete_incident(claimed, outcome)
    expected = S.PENDING if retries else S.RESOLVED
    assert cut_store.complete_incident(claimed, outcome) is expected
    assert cut_store.complete_incident(claimed, outcome) is expected, "as often as it is asked"
    found = cut_store.get_incident(claimed.incident_id)
    assert found is not None
    assert found.status is expected
    assert len(cut_store.list_transitions(claimed.incident_id)) == 2
    (only,) = cut_store.list_executions(claimed.incident_id)
    assert only.completed_at is not None
    reports = query(cut_store, "select count(*) from triage_reports")
    assert reports == [(0 if retries else 1,)]


def test_another_worker_that_ended_the_same_attempt_is_not_taken_for_ourselves(
    store: PostgresStore,
) -> None:
    store.create_incidents([an_event()])
    claimed = claim_one(store)
    store.complete_incident(claimed, resolved(claimed))
    with pytest.raises(incidents.LeaseLost):
        store.complete_incident(claimed, resolved(claimed))


def test_a_claim_whose_commit_was_not_heard_of_can_be_looked_up(
    proxy: Proxy, cut_store: PostgresStore
) -> None:
    created = cut_store.create_incidents(events_of("a", 3))
    cut_at_the_next_commit(proxy, cut_store)
    with pytest.raises(CommitUnknown):
        cut_store.claim_incidents("w1", 2, LEASE)
    held = cut_store.claimed_incidents("w1")
    assert ids(held) == ids(created[:2])
    assert cut_store.claimed_incidents("w2") == []
    for incident in held:
        cut_store.complete_incident(incident, resolved(incident))


# --- limits ---------------------------------------------------------------------------------------


def test_a_lock_that_somebody_else_holds_is_waited_for_only_so_long(schema: str) -> None:
    with contextlib.closing(postgres_store(f"{schema}%20-c%20lock_timeout%3D100")) as store:
        store.create_incidents([an_event()])
        claimed = claim_one(store)
        locked, go_on = threading.Event(), threading.Event()

        def lock(tx: Any) -> None:
            tx.run("select 1 from incidents i for update")
            locked.set()
            assert go_on.wait(10)

        holder = threading.Thread(target=store._database.write, args=(lock,))
        holder.start()
        assert locked.wait(10)
        with pytest.raises(StoreUnavailable):
            store.complete_incident(claimed, resolved(claimed))
        assert store.claim_incidents("w2", 5, LEASE) == [], "a claim passes locked rows by"
        go_on.set()
        holder.join()
        assert store.complete_incident(claimed, resolved(claimed)) is S.RESOLVED


def test_a_statement_that_takes_too_long_is_ended(schema: str) -> None:
    with contextlib.closing(postgres_store(f"{schema}%20-c%20statement_timeout%3D50")) as store:
        with pytest.raises(StoreUnavailable):
            store._database.read(lambda tx: tx.run("select pg_sleep(10)"))
        assert query(store, "select 1") == [(1,)]


def test_every_session_has_its_limits_and_says_who_it_is(
    schema: str, own_postgres: PostgresServer
) -> None:
    with contextlib.closing(postgres_store(own_postgres.dsn(), "host-1-abc")) as store:
        names = ("statement_timeout", "lock_timeout", "idle_in_transaction_session_timeout")
        found = {name: query(store, f"select current_setting('{name}')")[0][0] for name in names}
        assert found == dict(zip(names, ("30s", "10s", "1min"), strict=True))
        sessions = own_postgres.run(
            "select count(*) from pg_stat_activity where application_name = 'host-1-abc'"
        )
        assert sessions[0][0] >= 1


@pytest.mark.parametrize("how", ["database", "options"])
@pytest.mark.parametrize(
    "setting", ["datestyle=German", "timezone=Asia/Kolkata", "client_encoding=LATIN1"]
)
def test_values_come_back_as_they_were_whatever_the_server_is_set_to(
    own_postgres: PostgresServer, setting: str, how: str
) -> None:
    """The last second of the year 9999 is in another year in Kolkata: Python has no such time."""
    options = {"options": f"-c {setting}"} if how == "options" else {}
    if not options:
        name, _, value = setting.partition("=")
        own_postgres.run(f"alter database postgres set {name} = '{value}'")
    last = sql_database.parse_time("9999-12-31T23:59:59Z")
    event = an_event(context="grün → 日本", payload='{"a": "grün → 日本"}', occurred_at=last)
    with contextlib.closing(postgres_store(own_postgres.dsn(**options))) as store:
        store.create_incidents([event])
        assert claim_one(store).event == event
    assert own_postgres.run("select octet_length(context) from fault_events") == [[16]]


@pytest.mark.parametrize("encoding", ["LATIN1", "SQL_ASCII"])
def test_a_database_that_cannot_keep_every_text_is_refused(
    own_postgres: PostgresServer, encoding: str
) -> None:
    own_postgres.run(f"create database old encoding '{encoding}' template template0 locale 'C'")
    with pytest.raises(StoreError, match=f"its encoding is {encoding}.*UTF8") as raised:
        postgres_store(own_postgres.dsn(database="old"))
    assert not isinstance(raised.value, StoreUnavailable)


def test_an_event_that_the_server_cannot_read_is_refused_for_good(store: PostgresStore) -> None:
    """Not as if the server were away: the events behind it would wait for ever."""
    with pytest.raises(RowRefused):
        store.create_incidents([an_event(payload=f"{'[' * 200_000}{']' * 200_000}")])
    store.create_incidents([an_event()])


def test_many_different_lists_do_not_fill_a_session_with_statements(
    store: PostgresStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sql_database._Session, "STATEMENTS", 5)
    for number in range(12):
        assert query(store, f"select {number}") == [(number,)]
    assert len(query(store, "select name from pg_prepared_statements")) <= 5


def test_the_tables_are_in_the_schema_of_the_search_path(store: PostgresStore, schema: str) -> None:
    name = schema.rpartition("%3D")[2]
    tables = query(
        store, "select table_schema from information_schema.tables where table_name = 'incidents'"
    )
    assert (name,) in tables


def test_a_claim_goes_through_the_index_of_the_queue(store: PostgresStore) -> None:
    for _ in range(4):
        store.create_incidents(events_of("a", 500))
    with contextlib.closing(postgres_store_connection(store)) as driver:
        driver.run("analyze incidents")
        plan = driver.run(
            """explain select incident_id from incidents i where i.status = 'PENDING'
               order by i.queue_key, i.incident_id limit 5 for update of i skip locked"""
        )
    text = "\n".join(line for (line,) in plan)
    assert "incidents_queue" in text
    assert "Sort" not in text


def postgres_store_connection(store: PostgresStore) -> Any:
    """A connection of its own to where the store is."""
    database: Any = store._database
    driver = sql_database.connect_postgres(database._settings, "tests").driver
    driver.run(f"set search_path = {database._settings.settings['search_path']}")
    return driver


# --- wake-ups -------------------------------------------------------------------------------------


def listening(store: Any) -> list[str]:
    heard: list[str] = []
    store.listen(heard.append)
    wait_until(lambda: store._database.hears)
    return heard


def test_who_shares_the_database_hears_of_new_incidents(schema: str) -> None:
    with (
        contextlib.closing(postgres_store(schema)) as one,
        contextlib.closing(postgres_store(schema)) as other,
    ):
        heard = listening(other)
        assert other.poll_interval() > one.poll_interval(), "who hears may look less often"
        one.create_incidents([an_event()])
        wait_until(lambda: heard)
        assert set(heard) == {state_store.INCIDENTS}


def test_many_things_at_once_are_told_of_once(schema: str) -> None:
    with contextlib.closing(postgres_store(schema)) as store:
        heard = listening(store)
        for _ in range(1000):
            store.tell("topic")
        store.tell("last")
        wait_until(lambda: "last" in heard)
        assert len(heard) < 100


def test_skipped_incidents_wake_nobody(schema: str) -> None:
    with contextlib.closing(postgres_store(schema)) as store:
        heard = listening(store)
        store.create_incidents([an_event("quiet")], without_triage=["quiet"])
        store.tell("last")
        wait_until(lambda: heard)
        assert heard == ["last"]


def test_after_a_restart_of_the_server_notifications_are_heard_again(
    own_postgres: PostgresServer, own_store: PostgresStore
) -> None:
    heard = listening(own_store)
    own_postgres.stop("immediate")
    wait_until(lambda: not own_store._database.hears)
    own_postgres.start()
    wait_until(lambda: own_store._database.hears)
    own_store.tell("again")
    wait_until(lambda: "again" in heard)


def test_notifications_are_heard_by_a_process_with_thousands_of_streams(
    own_postgres: PostgresServer, own_store: PostgresStore
) -> None:
    heard = listening(own_store)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (4096, limits[1]))
    with contextlib.ExitStack() as stack:
        stack.callback(resource.setrlimit, resource.RLIMIT_NOFILE, limits)
        for _ in range(1100):
            stack.enter_context(open(os.devnull))
        own_postgres.stop("immediate")
        wait_until(lambda: not own_store._database.hears)
        own_postgres.start()
        own_store.tell("again")
        wait_until(lambda: "again" in heard)


def test_a_store_that_cannot_be_opened_leaves_no_connection_open(
    schema: str, recwarn: pytest.WarningsRecorder
) -> None:
    nowhere = sql_database.parse_dsn(f"postgresql://u@127.0.0.1:{free_port()}/d", {})
    with pytest.raises(StoreUnavailable):
        PostgresStore(nowhere, "tests")
    with pytest.raises(StoreError, match="a table is missing"):
        PostgresStore(sql_database.parse_dsn(schema, os.environ), "tests")
    gc.collect()
    assert [str(warning.message) for warning in recwarn] == []


# --- a pooler -------------------------------------------------------------------------------------


@pytest.fixture
def pooled_dsn(own_postgres: PostgresServer) -> Iterator[str]:
    with pgbouncer(own_postgres, pool_size=2) as bouncer:
        yield bouncer.dsn()


def test_through_a_pooler_everybody_gets_their_own_rows(pooled_dsn: str) -> None:
    """Eight clients on two connections: what is asked outside a transaction goes wrong there."""
    with contextlib.closing(postgres_store(pooled_dsn)) as store:
        wrong: list[tuple[int, Any]] = []

        def ask(number: int) -> None:
            for turn in range(100):
                value = number * 1000 + turn
                statement = f"select cast(:value as integer), {number}"
                rows = store._database.read(
                    lambda tx, sql=statement, value=value: tx.run(sql, value=value)
                )
                if rows != [(value, number)]:
                    wrong.append((value, rows))

        in_threads(8, ask)
        assert wrong == []


def test_the_pooler_of_these_tests_does_mix_up_what_is_asked_outside_a_transaction(
    pooled_dsn: str,
) -> None:
    """Else the test before would show nothing."""
    settings = sql_database.parse_dsn(pooled_dsn, os.environ)
    mixed_up = threading.Event()

    def ask(number: int) -> None:
        driver = sql_database.connect_postgres(settings, "tests").driver
        with contextlib.closing(driver):
            for turn in range(2000):
                value = number * 10_000 + turn
                statement = f"select cast(:value as integer), {number}"
                with contextlib.suppress(pg8000.exceptions.DatabaseError):  # and errors, too
                    if driver.run(statement, value=value) != [[value, number]]:
                        mixed_up.set()
                if mixed_up.is_set():
                    return

    in_threads(8, ask)
    assert mixed_up.is_set()


def test_through_a_pooler_the_queue_works_and_workers_poll(pooled_dsn: str) -> None:
    with contextlib.closing(postgres_store(pooled_dsn)) as store:
        created = store.create_incidents(events_of("a", 40) + events_of("b", 40))
        store.listen(lambda _topic: None)

        def work(number: int) -> list[Any]:
            claimed = claim_all(store, f"w{number}", step=3)
            for incident in claimed:
                store.renew_leases([incident], LEASE)
                store.complete_incident(incident, resolved(incident))
            return claimed

        claimed = [incident for batch in in_threads(8, work) for incident in batch]
        assert sorted(ids(claimed)) == sorted(ids(created))
        page = store.list_incidents(IncidentFilter(statuses=frozenset({S.RESOLVED})), limit=100)
        assert len(page.incidents) == 80
        assert not store._database.hears
        assert store.poll_interval() == PostgresStore.POLL


def test_through_a_pooler_settings_stay_with_the_transaction(pooled_dsn: str) -> None:
    with contextlib.closing(
        postgres_store(f"{pooled_dsn}?options=-c%20lock_timeout%3D77")
    ) as store:
        assert query(store, "select current_setting('lock_timeout')") == [("77ms",)]
        other = sql_database.connect_postgres(
            sql_database.parse_dsn(pooled_dsn, os.environ), "tests"
        )
        assert other.pooled
        with contextlib.closing(other.driver) as driver:
            assert driver.run("show lock_timeout") == [["0"]]
            assert driver.run("select count(*) from pg_prepared_statements") == [[0]]


# --- migrations -----------------------------------------------------------------------------------


@pytest.mark.parametrize("lock", [sql_database.PostgresMigrationTarget.LOCK, "select 1"])
def test_many_replicas_that_start_at_once_migrate_once(
    schema: str, lock: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the advisory lock, and where that is no lock: then the record's key decides."""
    monkeypatch.setattr(sql_database.PostgresMigrationTarget, "LOCK", lock)
    migrations = sql_database.load_migrations("postgres")
    settings = sql_database.parse_dsn(schema, os.environ)

    def start(number: int) -> int:
        target = sql_database.PostgresMigrationTarget(settings, f"r{number}")
        with contextlib.closing(target):
            return len(sql_database.migrate_up(target, migrations, applied_by=f"r{number}"))

    assert sum(in_threads(10, start)) == len(migrations)
    with contextlib.closing(PostgresStore(settings, "tests")) as store:
        rows = query(store, "select version from schema_migrations order by version")
        assert rows == [(migration.version,) for migration in migrations]
        store.create_incidents([an_event()])


def test_tables_of_others_are_not_touched(schema: str) -> None:
    settings = sql_database.parse_dsn(schema, os.environ)
    with contextlib.closing(sql_database.PostgresMigrationTarget(settings, "tests")) as target:
        target.run("create table theirs (id integer)")
        migrations = sql_database.load_migrations("postgres")
        with pytest.raises(sql_database.SchemaError, match=r"holds tables that are not nightcr"):
            sql_database.migrate_up(target, migrations, applied_by="test")
        assert not target.has_table("schema_migrations")


def test_a_schema_that_is_not_there_is_an_error_that_says_what_to_do(postgres_dsn: str) -> None:
    joint = "&" if "?" in postgres_dsn else "?"
    dsn = f"{postgres_dsn}{joint}options=-c%20search_path%3Dnot_there"
    with pytest.raises(StoreError, match="create it first"):
        postgres_store(dsn)


def test_a_migration_that_fails_leaves_nothing(schema: str) -> None:
    settings = sql_database.parse_dsn(schema, os.environ)
    broken = sql_database.Migration(
        version=1, name="broken", up="create table a (id integer); select nonsense", down="select 1"
    )
    with contextlib.closing(sql_database.PostgresMigrationTarget(settings, "tests")) as target:
        with pytest.raises(StoreError, match="nonsense"):
            sql_database.migrate_up(target, [broken], applied_by="test")
        assert target.is_empty()


def test_a_migration_may_take_longer_than_a_connection_may_be_silent(
    schema: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sql_database, "_LAST_RESORT", 0.2)
    settings = sql_database.parse_dsn(schema, os.environ)
    slow = sql_database.Migration(version=1, name="slow", up="select pg_sleep(0.5)", down=" ")
    with contextlib.closing(sql_database.PostgresMigrationTarget(settings, "tests")) as target:
        assert sql_database.migrate_up(target, [slow], applied_by="test") == [slow]


def test_a_server_is_not_copied_by_us(store: PostgresStore, tmp_path: Path) -> None:
    with pytest.raises(sql_database.InvalidRequest, match="pg_dump"):
        store.backup(tmp_path / "copy.db")
