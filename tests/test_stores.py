"""state_store.py: the contract that every StateStore keeps, and what each of them adds.

Tests with the fixture `store` or `open_again` run on every store. What a store cannot promise is a
capability that it declares (`shared_between_processes`, `batches_are_atomic`).
"""

from __future__ import annotations

import dataclasses
import fcntl
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import apsw
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)

import incidents
import nightcrier
import sql_database
import state_store
from conftest import (
    EXPIRED,
    LEASE,
    MINUTE,
    NOON,
    Opener,
    a_report,
    agent_failed,
    an_event,
    an_event_at,
    an_execution,
    claim_all,
    claim_one,
    dump,
    emptied,
    events_of,
    every_page,
    finished,
    ids,
    in_threads,
    query,
    resolved,
    sqlite_store,
)
from incidents import Incident, IncidentFilter, LeaseLost, Outcome, Severity
from incidents import IncidentStatus as S
from sql_database import StoreError, StoreUnavailable

ROOT = Path(__file__).parents[1]
FOREVER = timedelta(days=30)


def statuses(store: Any) -> Counter[S]:
    return Counter(
        incident.status for page in every_page(store, IncidentFilter()) for incident in page
    )


def reread(store: Any, incident: Incident) -> Incident:
    found: Incident | None = store.get_incident(incident.incident_id)
    assert found is not None
    return found


def refuses_to_be_copied(store: Any) -> bool:
    """A server is copied with its own tools, and says so."""
    if not store.can_be_copied:
        with pytest.raises(sql_database.InvalidRequest, match="pg_dump"):
            store.backup(Path("copy.db"))
    return not store.can_be_copied


def hold(store: Any, cluster: str | None, until: str | None = None) -> None:
    store._database.write(
        lambda tx: tx.run(
            """insert into holds (hold_id, scope, cluster, reason, since, until)
               values (:hold_id, 'budget', :cluster, 'used up', :now, :until)""",
            hold_id=sql_database.new_id(),
            cluster=cluster,
            now=sql_database.format_time(sql_database.utc_now()),
            until=until,
        )
    )


def program(source: str, *arguments: str) -> subprocess.Popen[str]:
    """Another process that uses nightcrier."""
    head = f"import sys; sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'tests')!r}]\n"
    return subprocess.Popen(
        [sys.executable, "-c", head + source, *arguments],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


# --- creating -------------------------------------------------------------------------------------


def test_an_event_becomes_a_pending_incident_with_the_same_id(store: Any) -> None:
    event = an_event(context="it burns")
    (created,) = store.create_incidents([event])

    assert created.incident_id == event.event_id
    assert created.status is S.PENDING
    assert (created.attempt, created.attempts_charged) == (0, 0)
    assert created.event == event
    assert store.get_incident(event.event_id) == created
    assert store.list_transitions(event.event_id) == []


def test_every_field_of_an_event_is_kept(store: Any) -> None:
    event = an_event(
        reported_cluster="kind", session_id="s", subscription_id="sub", delivery_id="9",
        fault_fingerprint="f" * 16, context="c", occurred_at=NOON, resource_api_version="v1",
        resource_uid="u", payload='{"a": 1}', severity=Severity.UNKNOWN,
    )  # fmt: skip
    store.create_incidents([event])
    assert store.get_incident(event.event_id).event == event


# Long, four bytes each, and not to be compressed: the worst for an index.
WIDE = "".join(random.Random(1).choices([chr(code) for code in range(0x10000, 0x1FFFF)], k=2_000))
TEXTS = st.text(max_size=20) | st.just(WIDE)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXTS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXTS, inner, max_size=4),
    max_leaves=20,
)
FIELDS = ("cluster", "subscriptionId", "faultType", "severity", "faultId", "context", "timestamp")
RESOURCE = st.dictionaries(
    st.sampled_from(["apiVersion", "kind", "namespace", "name", "uid"]), TEXTS | JSON
)
FAULTS = st.dictionaries(st.sampled_from(FIELDS), TEXTS | st.just("9999-12-31T23:59:59-01:00"))


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    FAULTS, RESOURCE, st.dictionaries(TEXTS, JSON, max_size=4), st.tuples(TEXTS, TEXTS | st.none())
)
def test_whatever_a_server_sends_is_kept_alone_and_among_others(
    store: Any, fault: Any, resource: Any, more: Any, numbers: tuple[str, str | None]
) -> None:
    for count in (1, 3):
        events = [
            incidents.parse_event(
                {**more, **fault, "resource": resource},
                mode=incidents.SubscribeMode.FAULTS, cluster="prod", received_at=NOON,
                session_id=numbers[0], delivery_id=numbers[1] and f"{numbers[1]}{count}{number}",
            )
            for number in range(count)
        ]  # fmt: skip
        absorbed = len(store.create_incidents(events)) < count
        assert not absorbed or numbers[1], "only a repeated delivery is"
        for event in events[:1] if not absorbed else ():
            found = store.get_incident(event.event_id).event
            assert dataclasses.replace(found, payload=event.payload) == event
            # PostgreSQL keeps decimal numbers, and writes them without an exponent.
            kept, sent = (json.loads(one.payload, parse_int=float) for one in (found, event))
            assert kept == sent


def test_the_zero_time_of_go_is_kept_and_does_not_stop_the_queue(store: Any) -> None:
    event = an_event(occurred_at=sql_database.parse_time("0001-01-01T00:00:00Z"))
    store.create_incidents([event])
    assert claim_one(store).event == event


def test_the_same_fault_twice_is_two_incidents(store: Any) -> None:
    created = store.create_incidents(events_of("prod", 2, fault_fingerprint="same"))
    created += store.create_incidents(events_of("prod", 1, fault_fingerprint="same"))
    assert len(set(ids(created))) == 3
    assert statuses(store) == {S.PENDING: 3}


def test_creating_nothing_is_fine(store: Any) -> None:
    assert store.create_incidents([]) == []


def test_clusters_without_triage_get_skipped_incidents_that_nobody_claims(store: Any) -> None:
    created = store.create_incidents(
        [an_event("quiet"), an_event("prod"), an_event("quiet")], without_triage=["quiet"]
    )
    assert [incident.status for incident in created] == [S.SKIPPED, S.PENDING, S.SKIPPED]
    assert created[0].completed_at is not None
    assert store.get_incident(created[0].incident_id) == created[0]
    assert ids(claim_all(store)) == [created[1].incident_id]


@pytest.mark.parametrize("without_triage", [[], ["prod"]])
def test_an_event_that_is_stored_again_is_left_out(store: Any, without_triage: list[str]) -> None:
    first, second = events_of("prod", 2)

    def create(*events: Any) -> list[str]:
        return ids(store.create_incidents(events, without_triage=without_triage))

    assert create(first, first) == [first.event_id]
    assert create(first) == []
    assert create(first, second) == [second.event_id]
    assert sum(statuses(store).values()) == 2


def test_an_event_that_is_stored_again_does_not_disturb_its_incident(store: Any) -> None:
    event = an_event()
    store.create_incidents([event])
    claimed = claim_one(store)
    assert store.create_incidents([event]) == []
    assert reread(store, claimed) == claimed


def test_a_repeated_delivery_is_absorbed_only_within_its_cluster_and_session(store: Any) -> None:
    def event(cluster: str, session: str, delivery: str | None) -> Any:
        return an_event(cluster, session_id=session, delivery_id=delivery)

    first = [event("a", "s", "1"), event("a", "s", "2")]
    assert len(store.create_incidents(first)) == 2

    again, next_one = event("a", "s", "2"), event("a", "s", "3")
    assert ids(store.create_incidents([again, next_one])) == [next_one.event_id]
    assert store.get_incident(again.event_id) is None
    others = [
        event("b", "s", "2"),
        event("a", "t", "2"),
        event("a", "s", None),
        event("a", "s", None),
    ]
    assert ids(store.create_incidents(others)) == [other.event_id for other in others]
    assert len(store.create_incidents([event("c", "s", "1"), event("c", "s", "1")])) == 1


def test_a_batch_is_stored_whole_or_not_at_all(store: Any) -> None:
    if not store.batches_are_atomic:
        pytest.skip("this store does not promise it")
    good, bad = an_event(), dataclasses.replace(an_event(), cluster="")
    before = dump(store)
    with pytest.raises(StoreError):
        store.create_incidents([good, bad])
    assert dump(store) == before
    assert len(store.create_incidents([good])) == 1


HOSTILE = "'; drop table incidents; --\"`\n\r\t\x1b[31m\u202e\ufffd\U0001f525\x7f :id ? %s {x} \\"
HOSTILE_JSON = json.dumps(HOSTILE, ensure_ascii=False)


def test_hostile_text_in_every_column_comes_back_as_it_was(store: Any) -> None:
    texts = {
        f.name: HOSTILE
        for f in dataclasses.fields(nightcrier.FaultEvent)
        if f.type in ("str", "str | None") and f.name not in ("event_id", "cluster", "payload")
    }
    event = an_event(HOSTILE, **texts, payload=HOSTILE_JSON)
    store.create_incidents([event])
    claimed = claim_one(store, HOSTILE)
    execution = an_execution(
        claimed, host=HOSTILE, runtime=HOSTILE, agent=HOSTILE, agent_version=HOSTILE, model=HOSTILE,
        workspace=HOSTILE, signal=HOSTILE, error_message=HOSTILE, log_paths=HOSTILE_JSON,
        prompt_sha256=HOSTILE, usage=HOSTILE_JSON,
    )  # fmt: skip
    store.start_execution(execution)
    report = a_report(report_markdown=HOSTILE, root_cause=HOSTILE, report_html=HOSTILE)
    ended = finished(execution)
    store.complete_incident(claimed, resolved(claimed, execution=ended, report=report))
    cluster = incidents.ClusterRecord(
        cluster=HOSTILE, endpoint=HOSTILE, labels=HOSTILE_JSON, last_error=HOSTILE
    )
    store.save_clusters([cluster])
    gap = incidents.ClusterGap(cluster=HOSTILE, lost_at=NOON, restored_at=None, reason=HOSTILE)
    store.save_gaps([gap])

    found = reread(store, claimed)
    assert (found.status, found.event) == (S.RESOLVED, event)
    assert store.list_executions(claimed.incident_id) == [ended]
    assert store.get_report(claimed.incident_id) == report
    assert dataclasses.replace(store.list_clusters()[0], updated_at=None) == cluster
    assert store.open_gaps() == [gap]
    wanted = IncidentFilter(cluster=HOSTILE, resource_kind=HOSTILE, fault_type=HOSTILE)
    assert ids(store.list_incidents(wanted).incidents) == [event.event_id]
    assert store.get_incident(HOSTILE) is None


def test_a_megabyte_of_context_is_kept(store: Any) -> None:
    context = "\U0001f525x" * 500_000
    store.create_incidents([an_event(context=context, payload=json.dumps(context))])
    assert claim_one(store).event.context == context


# --- durability -----------------------------------------------------------------------------------

WRITER = """
import os, signal
from pathlib import Path
from conftest import Opener, an_event
store = Opener(sys.argv[1], sys.argv[2])()
for _ in range(5):
    created = store.create_incidents([an_event(f"c{n}") for n in range(10)])
    print(*[incident.incident_id for incident in created], flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("cap", [0, 5])
def test_an_agent_is_tried_again_after_its_delay_and_not_before(store: Any, cap: int) -> None:
    store.create_incidents([an_event(severity=Severity.INFO)])
    incident = claim_one(store)
    again = agent_failed(incident, agent_retries=2, retry_delay=timedelta(seconds=0.3))
    assert store.complete_incident(incident, again) is S.PENDING
    assert store.claim_incidents("w1", 1, LEASE, max_per_cluster=cap) == []
    time.sleep(0.3)
    (second,) = store.claim_incidents("w1", 1, LEASE, max_per_cluster=cap)
    assert second.attempt == 2
    store.release_incident(second, "released on shutdown")
    assert claim_one(store).attempt == 3


def test_what_a_killed_process_had_stored_is_there(open_again: Opener) -> None:
    writer = program(WRITER, open_again.kind, open_again.argument)
    out, errors = writer.communicate(timeout=60)
    assert (writer.returncode, errors) == (-signal.SIGKILL, "")
    promised = out.split()
    assert len(promised) == 50

    store = open_again()
    found = [incident for page in every_page(store, IncidentFilter(), 20) for incident in page]
    assert sorted(ids(found)) == sorted(promised)
    assert sorted(ids(claim_all(store))) == sorted(promised)


def test_everything_is_there_after_opening_again(open_again: Opener) -> None:
    store = open_again()
    store.create_incidents([*events_of("a", 4), an_event("quiet")], without_triage=["quiet"])
    store.complete_incident(one := claim_one(store), resolved(one))
    store.complete_incident(two := claim_one(store), agent_failed(two))
    store.start_execution(an_execution(running := claim_one(store)))
    tables = list(state_store._INCIDENT_TABLES)
    before = {table: rows for table, rows in dump(store).items() if table in tables}
    store.close()

    store = open_again()
    assert {table: rows for table, rows in dump(store).items() if table in tables} == before
    store.complete_incident(running, agent_failed(running))


def test_fairness_survives_opening_again(open_again: Opener) -> None:
    store = open_again()
    store.create_incidents(events_of("noisy", 50))
    store.close()
    store = open_again()
    late = store.create_incidents(events_of("noisy", 5))
    (quiet,) = store.create_incidents([an_event("quiet")])

    order = ids(claim_all(store))
    assert order.index(quiet.incident_id) <= 2
    assert order[-5:] == ids(late)


# --- claiming -------------------------------------------------------------------------------------


def test_a_claim_says_who_holds_the_incident_and_until_when(store: Any) -> None:
    store.create_incidents([an_event()])
    before = sql_database.utc_now()
    claimed = claim_one(store, "w1", LEASE)

    assert (claimed.status, claimed.claimed_by) == (S.RUNNING, "w1")
    assert (claimed.attempt, claimed.attempts_charged) == (1, 1)
    assert claimed.lease_expires_at is not None
    assert claimed.started_at is not None
    assert before + LEASE <= claimed.lease_expires_at <= sql_database.utc_now() + LEASE
    assert before <= claimed.started_at
    assert reread(store, claimed) == claimed


def test_the_first_start_stays_the_start(store: Any) -> None:
    store.create_incidents([an_event()])
    first = claim_one(store)
    store.release_incident(first, "drain")
    assert claim_one(store).started_at == first.started_at


@pytest.mark.parametrize("cap", [0, 100])
def test_no_more_is_claimed_than_asked_for(store: Any, cap: int) -> None:
    store.create_incidents(events_of("a", 10) + events_of("b", 10))

    def claim(limit: int) -> int:
        return len(store.claim_incidents("w", limit, LEASE, max_per_cluster=cap))

    assert [claim(limit) for limit in (0, -1, 3, 1, 100, 1)] == [0, 0, 3, 1, 16, 0]


def test_an_empty_queue_gives_nothing_and_says_so(store: Any) -> None:
    assert not store.has_pending()
    assert store.claim_incidents("w", 5, LEASE) == []
    store.create_incidents([an_event()])
    assert store.has_pending()
    claim_one(store)
    assert not store.has_pending()


def test_threads_never_get_the_same_incident(store: Any) -> None:
    created = store.create_incidents(events_of("a", 60) + events_of("b", 60))

    def work(number: int) -> list[Incident]:
        return claim_all(store, f"w{number}", step=1 + number % 3)

    claimed = [incident for batch in in_threads(6, work) for incident in batch]
    assert sorted(ids(claimed)) == sorted(ids(created))
    assert all(incident.attempt == 1 for incident in claimed)


CLAIMER = """
from datetime import timedelta
from conftest import Opener
store = Opener(sys.argv[1], sys.argv[2])()
print("ready", flush=True)
sys.stdin.readline()
while batch := store.claim_incidents(sys.argv[3], 3, timedelta(minutes=5)):
    for incident in batch:
        print(incident.incident_id)
store.close()
"""


def test_processes_never_get_the_same_incident(open_again: Opener) -> None:
    store = open_again()
    if not store.shared_between_processes:
        pytest.skip("this store serves one process")
    created = store.create_incidents(events_of("a", 90))
    where = (open_again.kind, open_again.argument)
    workers = [program(CLAIMER, *where, f"w{number}") for number in range(3)]
    for worker in workers:
        assert worker.stdout is not None
        assert worker.stdout.readline() == "ready\n"
    for worker in workers:
        assert worker.stdin is not None
        worker.stdin.write("go\n")
        worker.stdin.flush()
    answers = [worker.communicate(timeout=60) for worker in workers]

    assert [errors for _, errors in answers if errors] == []
    claimed = [line for out, _ in answers for line in out.split()]
    assert sorted(claimed) == sorted(ids(created))
    assert statuses(store) == {S.RUNNING: 90}


def test_the_most_urgent_is_claimed_first(store: Any) -> None:
    for severity in (Severity.INFO, Severity.WARNING, Severity.CRITICAL):
        store.create_incidents([an_event(severity=severity)])
    assert [incident.event.severity for incident in claim_all(store, step=1)] == [
        Severity.CRITICAL, Severity.WARNING, Severity.INFO,
    ]  # fmt: skip


@pytest.mark.parametrize("cap", [0, 1000])
def test_a_noisy_cluster_does_not_keep_the_others_waiting(store: Any, cap: int) -> None:
    store.create_incidents(events_of("noisy", 300))
    for number in range(20):
        store.create_incidents([an_event(f"quiet-{number}")])
    first = store.claim_incidents("w", 40, LEASE, max_per_cluster=cap)
    assert len({incident.cluster for incident in first}) == 21


def test_within_a_lane_the_first_come_is_the_first_served(store: Any) -> None:
    created = store.create_incidents(events_of("a", 30))
    created += store.create_incidents(events_of("a", 30))
    assert ids(claim_all(store, step=7)) == ids(created)


def test_no_cluster_runs_more_than_its_limit(store: Any) -> None:
    store.create_incidents(events_of("a", 10) + events_of("b", 1) + events_of("c", 10))

    def claim(limit: int, cap: int) -> Counter[str]:
        found = store.claim_incidents("w", limit, LEASE, max_per_cluster=cap)
        return Counter(incident.cluster for incident in found)

    assert claim(100, 2) == {"a": 2, "b": 1, "c": 2}
    assert claim(100, 2) == {}
    assert claim(100, 3) == {"a": 1, "c": 1}
    assert claim(1, 4).total() == 1
    assert claim(100, 0).total() == 13


def test_a_place_below_the_limit_is_given_to_the_next(store: Any) -> None:
    store.create_incidents(events_of("a", 3))
    (first,) = store.claim_incidents("w", 5, LEASE, max_per_cluster=1)
    store.complete_incident(first, resolved(first))
    assert len(store.claim_incidents("w", 5, LEASE, max_per_cluster=1)) == 1


@pytest.mark.parametrize("cap", [0, 5])
def test_a_held_cluster_gives_nothing_and_the_others_go_on(store: Any, cap: int) -> None:
    store.create_incidents(events_of("a", 2) + events_of("b", 2))
    hold(store, "a")
    found = store.claim_incidents("w", 10, LEASE, max_per_cluster=cap)
    assert {incident.cluster for incident in found} == {"b"}
    assert len(found) == 2


def test_a_hold_on_everything_stops_every_claim_until_it_ends(store: Any) -> None:
    store.create_incidents(events_of("a", 2))
    hold(store, None, sql_database.format_time(sql_database.utc_now() - MINUTE))
    assert len(store.claim_incidents("w", 1, LEASE)) == 1
    hold(store, None, sql_database.format_time(sql_database.utc_now() + 60 * MINUTE))
    assert store.claim_incidents("w", 1, LEASE) == []
    store._database.write(lambda tx: tx.run("delete from holds"))
    assert len(store.claim_incidents("w", 1, LEASE)) == 1


# --- leases ---------------------------------------------------------------------------------------


def test_an_expired_lease_can_be_claimed_by_another_worker(store: Any) -> None:
    store.create_incidents([an_event()])
    claim_one(store, "w1", EXPIRED)
    (back,) = store.release_expired(3)
    assert (back.status, back.claimed_by, back.attempts_charged) == (S.PENDING, None, 1)

    again = claim_one(store, "w2")
    assert (again.claimed_by, again.attempt, again.attempts_charged) == ("w2", 2, 2)


def test_an_expired_lease_is_not_claimed_before_it_was_taken_back(store: Any) -> None:
    store.create_incidents([an_event()])
    claim_one(store, "w1", EXPIRED)
    assert store.claim_incidents("w2", 1, LEASE) == []


def test_a_lease_that_has_not_expired_stays(store: Any) -> None:
    store.create_incidents([an_event()])
    claimed = claim_one(store)
    assert store.release_expired(3) == []
    assert reread(store, claimed) == claimed


def test_after_max_attempts_an_expired_lease_is_a_failure(store: Any) -> None:
    store.create_incidents([an_event()])
    for _ in range(2):
        claimed = claim_one(store, "w1", EXPIRED)
        (ended,) = store.release_expired(2)

    assert ended.status is S.FAILED
    assert ended.completed_at is not None
    assert "lease" in ended.failure_reason
    assert "2 attempts" in ended.failure_reason
    assert not store.has_pending()
    assert [t.to_status for t in store.list_transitions(claimed.incident_id)] == [
        S.RUNNING, S.PENDING, S.RUNNING, S.FAILED,
    ]  # fmt: skip


def test_the_execution_of_an_expired_lease_is_closed(store: Any) -> None:
    store.create_incidents([an_event()])
    claimed = claim_one(store, "w1", EXPIRED)
    store.start_execution(an_execution(claimed))
    assert len(store.open_executions("night-host")) == 1
    assert store.open_executions("other-host") == []
    store.release_expired(3)

    (execution,) = store.list_executions(claimed.incident_id)
    assert execution.outcome is Outcome.LEASE_LOST
    assert execution.completed_at is not None
    assert "w1" in execution.error_message
    assert store.open_executions("night-host") == []


def test_renewing_keeps_a_lease_and_names_those_that_are_lost(store: Any) -> None:
    store.create_incidents(events_of("a", 3))
    kept, lost, done = (claim_one(store, "w1", EXPIRED) for _ in range(3))
    store.complete_incident(done, resolved(done))
    assert store.renew_leases([kept], LEASE) == []
    store.release_expired(3)

    assert reread(store, kept).status is S.RUNNING
    assert store.renew_leases([kept, lost, done], LEASE) == [lost.incident_id, done.incident_id]
    assert store.renew_leases([], LEASE) == []
    unknown = dataclasses.replace(kept, event=an_event())
    assert store.renew_leases([unknown], LEASE) == [unknown.incident_id]


def expired(store: Any, held: Incident) -> None:
    store.release_expired(9)


def claimed_by_another(store: Any, held: Incident) -> None:
    store.release_expired(9)
    store.start_execution(an_execution(claim_one(store, "w2")))


def claimed_again_by_the_same(store: Any, held: Incident) -> None:
    store.release_expired(9)
    claim_one(store, "w1")


def completed(store: Any, held: Incident) -> None:
    store.complete_incident(held, resolved(held))


def released(store: Any, held: Incident) -> None:
    store.release_incident(held, "drain")


def pruned(store: Any, held: Incident) -> None:
    completed(store, held)
    store.prune({S.RESOLVED}, sql_database.utc_now() + MINUTE)


@pytest.mark.parametrize(
    "happened",
    [expired, claimed_by_another, claimed_again_by_the_same, completed, released, pruned],
    ids=lambda function: function.__name__,
)
def test_who_lost_the_lease_writes_nothing(
    store: Any, happened: Callable[[Any, Any], None]
) -> None:
    store.create_incidents([an_event()])
    held = claim_one(store, "w1", EXPIRED)
    happened(store, held)
    before = dump(store)

    execution = an_execution(held)
    acts: list[Callable[[], Any]] = [
        lambda: store.start_execution(execution),
        lambda: store.complete_incident(held, resolved(held)),
        lambda: store.complete_incident(held, agent_failed(held)),
        lambda: store.complete_incident(held, agent_failed(held, agent_retries=5)),
        lambda: store.release_incident(held, "drain"),
        lambda: store.release_incident(held, "drain", finished(execution, Outcome.CANCELLED)),
    ]
    for act in acts:
        with pytest.raises(LeaseLost, match=held.incident_id):
            act()
    assert store.renew_leases([held], FOREVER) == [held.incident_id]

    assert dump(store) == before


def test_a_stranger_who_knows_the_number_of_the_attempt_writes_nothing(store: Any) -> None:
    store.create_incidents([an_event()])
    stranger = dataclasses.replace(claim_one(store, "w1"), claimed_by="w2")
    before = dump(store)
    with pytest.raises(LeaseLost):
        store.start_execution(an_execution(stranger))
    with pytest.raises(LeaseLost):
        store.complete_incident(stranger, resolved(stranger))
    assert store.renew_leases([stranger], LEASE) == [stranger.incident_id]
    assert dump(store) == before


def test_one_of_many_that_complete_at_once_wins(store: Any) -> None:
    store.create_incidents([an_event()])
    held = claim_one(store)

    def complete(_: int) -> bool:
        try:
            store.complete_incident(held, resolved(held))
        except LeaseLost:
            return False
        return True

    assert sum(in_threads(6, complete)) == 1
    assert len(store.list_executions(held.incident_id)) == 1


# --- outcomes -------------------------------------------------------------------------------------


def test_completing_writes_the_outcome_the_execution_the_report_and_the_transition(
    store: Any,
) -> None:
    store.create_incidents([an_event()])
    claimed = claim_one(store, "w1")
    execution = an_execution(claimed, pid=77, model="opus", process_started_at=NOON)
    store.start_execution(execution)
    ended = finished(execution, exit_code=0, input_tokens=5, cost_usd=0.25, usage="{}")
    report = a_report()

    status = store.complete_incident(claimed, resolved(claimed, execution=ended, report=report))

    found = reread(store, claimed)
    assert status is found.status is S.RESOLVED
    assert (found.exit_code, found.failure_reason) == (0, None)
    assert (found.claimed_by, found.lease_expires_at) == (None, None)
    assert found.completed_at is not None
    assert store.list_executions(claimed.incident_id) == [ended]
    assert store.get_report(claimed.incident_id) == report
    first, second = store.list_transitions(claimed.incident_id)
    assert (first.seq, first.from_status, first.to_status) == (1, S.PENDING, S.RUNNING)
    assert (second.seq, second.from_status, second.to_status) == (2, S.RUNNING, S.RESOLVED)
    assert second.worker_id == "w1"
    assert first.at <= second.at


def test_outcomes_that_are_written_together_stand_each_for_itself(store: Any) -> None:
    store.create_incidents(events_of("a", 5))
    good, failed, again, lost, unknown = store.claim_incidents("w1", 5, LEASE)
    store.start_execution(started := an_execution(good))
    store.release_incident(lost, "drain")
    written = resolved(unknown)
    store.complete_incident(unknown, written)
    results = store.complete_incidents(
        [
            (lost, resolved(lost)),
            (good, resolved(good, execution=finished(started))),
            (unknown, written),  # nobody heard that it was written
            (again, agent_failed(again, agent_retries=1)),
            (failed, agent_failed(failed)),
        ]
    )
    assert isinstance(results[0], LeaseLost)
    assert results[1:] == [S.RESOLVED, S.RESOLVED, S.PENDING, S.AGENT_FAILED]
    assert statuses(store) == {S.RESOLVED: 2, S.PENDING: 2, S.AGENT_FAILED: 1}
    assert store.list_executions(lost.incident_id) == []
    assert store.list_executions(good.incident_id)[0].execution_id == started.execution_id
    assert store.get_report(good.incident_id) is not None
    assert store.get_report(failed.incident_id) is None
    steps = store.list_transitions(again.incident_id)
    assert [(step.seq, step.reason) for step in steps] == [(1, "claimed"), (2, "agent_retry")]
    assert store.complete_incidents([]) == []


def test_an_agent_failure_and_a_failure_to_run_it_are_told_apart(store: Any) -> None:
    store.create_incidents(events_of("a", 2))
    one, two = store.claim_incidents("w", 2, LEASE)
    store.complete_incident(one, agent_failed(one))
    not_started = agent_failed(two, status=S.FAILED, execution=None, exit_code=None)
    store.complete_incident(two, not_started)

    assert (reread(store, one).status, reread(store, one).exit_code) == (S.AGENT_FAILED, 2)
    assert (reread(store, two).status, reread(store, two).exit_code) == (S.FAILED, None)
    assert store.list_executions(two.incident_id) == []
    assert store.get_report(one.incident_id) is None


@pytest.mark.parametrize("status", [S.SKIPPED, S.RUNNING])
def test_a_way_that_the_design_does_not_know_is_refused(store: Any, status: S) -> None:
    store.create_incidents([an_event()])
    claimed = claim_one(store)
    before = dump(store)
    with pytest.raises(StoreError, match=status):
        store.complete_incident(claimed, resolved(claimed, status=status))
    assert dump(store) == before


def test_a_report_that_cannot_be_stored_undoes_the_whole_outcome(store: Any) -> None:
    store.create_incidents([an_event()])
    claimed = claim_one(store)
    before = dump(store)
    with pytest.raises(StoreError):
        store.complete_incident(claimed, resolved(claimed, report=a_report(confidence="MAYBE")))
    assert dump(store) == before
    store.complete_incident(claimed, resolved(claimed))


def test_releasing_gives_the_attempt_back_but_its_number_only_grows(store: Any) -> None:
    store.create_incidents([an_event()])
    for number in range(1, 5):
        claimed = claim_one(store)
        assert (claimed.attempt, claimed.attempts_charged) == (number, 1)
        execution = finished(an_execution(claimed), Outcome.CANCELLED)
        store.release_incident(claimed, "drain", execution)
        assert reread(store, claimed).attempts_charged == 0

    assert [e.attempt for e in store.list_executions(claimed.incident_id)] == [1, 2, 3, 4]
    assert [t.seq for t in store.list_transitions(claimed.incident_id)] == list(range(1, 9))
    assert {t.reason for t in store.list_transitions(claimed.incident_id)} == {"claimed", "drain"}
    claim_one(store, lease=EXPIRED)
    assert store.release_expired(1)[0].status is S.FAILED


def test_a_released_incident_keeps_its_place(store: Any) -> None:
    first, _ = store.create_incidents(events_of("a", 2))
    store.release_incident(claim_one(store), "drain")
    assert claim_one(store).incident_id == first.incident_id


def test_a_failed_agent_is_tried_again_as_often_as_allowed(store: Any) -> None:
    store.create_incidents([an_event()])
    ends = []
    for _ in range(3):
        claimed = claim_one(store)
        ends.append(store.complete_incident(claimed, agent_failed(claimed, agent_retries=2)))

    assert ends == [S.PENDING, S.PENDING, S.AGENT_FAILED]
    reasons = [t.reason for t in store.list_transitions(claimed.incident_id)]
    assert reasons.count("agent_retry") == 2
    assert len(store.list_executions(claimed.incident_id)) == 3
    assert reread(store, claimed).completed_at is not None


def test_an_incident_that_is_tried_again_waits_behind_what_came_meanwhile(store: Any) -> None:
    store.create_incidents([an_event("a")])
    claimed = claim_one(store)
    store.create_incidents(events_of("b", 3))
    again = agent_failed(claimed, agent_retries=1, retry_delay=10 * MINUTE)
    store.complete_incident(claimed, again)

    found = reread(store, claimed)
    assert (found.completed_at, found.exit_code, found.failure_reason) == (None, None, None)
    assert claimed.incident_id not in ids(claim_all(store, step=1))


# --- looking things up ----------------------------------------------------------------------------


@pytest.fixture
def varied(store: Any) -> list[Incident]:
    """Incidents that differ in everything that a filter asks for, newest first."""
    words = itertools.cycle(
        itertools.product(["a", "b"], ["Pod", "Node"], list(Severity)[:3], ["Crash", "Job"])
    )
    for number in range(48):
        cluster, kind, severity, fault = next(words)
        event = an_event_at(
            sql_database.utc_now() - (60 - number) * MINUTE, cluster, resource_kind=kind,
            severity=severity, fault_type=fault, resource_namespace=f"ns-{number % 3}",
            resource_name=f"name-{number % 5}",
        )  # fmt: skip
        store.create_incidents([event], without_triage=["b"] if number % 4 == 3 else [])
    for number, incident in enumerate(store.claim_incidents("w", 20, LEASE)):
        if number % 3 == 0:
            store.complete_incident(incident, resolved(incident))
        elif number % 3 == 1:
            store.complete_incident(incident, agent_failed(incident))
    return [incident for page in every_page(store, IncidentFilter(), 100) for incident in page]


FILTERS: dict[str, tuple[dict[str, Any], Callable[[Incident], bool]]] = {
    "all": ({}, lambda i: True),
    "cluster": ({"cluster": "a"}, lambda i: i.cluster == "a"),
    "kind": ({"resource_kind": "Node"}, lambda i: i.event.resource_kind == "Node"),
    "namespace": ({"resource_namespace": "ns-1"}, lambda i: i.event.resource_namespace == "ns-1"),
    "name": ({"resource_name": "name-2"}, lambda i: i.event.resource_name == "name-2"),
    "severity": ({"severity": Severity.INFO}, lambda i: i.event.severity is Severity.INFO),
    "fault": ({"fault_type": "Job"}, lambda i: i.event.fault_type == "Job"),
    "pending": ({"statuses": frozenset({S.PENDING})}, lambda i: i.status is S.PENDING),
    "running": ({"statuses": frozenset({S.RUNNING})}, lambda i: i.status is S.RUNNING),
    "resolved": ({"statuses": frozenset({S.RESOLVED})}, lambda i: i.status is S.RESOLVED),
    "unresolved": (
        {"statuses": frozenset({S.AGENT_FAILED, S.SKIPPED})},
        lambda i: i.status in (S.AGENT_FAILED, S.SKIPPED),
    ),
    "mixed": (
        {"statuses": frozenset({S.RUNNING, S.FAILED, S.RESOLVED})},
        lambda i: i.status in (S.RUNNING, S.FAILED, S.RESOLVED),
    ),
}


def test_every_filter_alone_and_with_every_other_finds_what_it_says(
    store: Any, varied: list[Incident]
) -> None:
    assert len(varied) == 48
    assert len({incident.status for incident in varied}) == 5
    for (one, first), (two, second) in itertools.combinations(FILTERS.values(), 2):
        if set(one) & set(two):
            continue
        expected = [incident for incident in varied if first(incident) and second(incident)]
        found = store.list_incidents(IncidentFilter(**one, **two), limit=100).incidents
        assert list(found) == expected, (one, two)


def test_pages_show_every_incident_once_while_new_ones_arrive(
    store: Any, varied: list[Incident]
) -> None:
    for wanted, fits in FILTERS.values():
        seen: list[Incident] = []
        cursor = None
        while True:
            page = store.list_incidents(IncidentFilter(**wanted), cursor=cursor, limit=5)
            seen += page.incidents
            assert len(page.incidents) <= 5
            store.create_incidents([an_event("a", resource_namespace="new")])
            if (cursor := page.cursor) is None:
                break
        old = [i for i in seen if i.event.resource_namespace != "new"]
        assert old == [incident for incident in varied if fits(incident)]
        assert len(set(ids(seen))) == len(seen)


def test_a_page_that_is_just_full_has_no_next_page(store: Any) -> None:
    store.create_incidents(events_of("a", 6))
    assert [len(page) for page in every_page(store, IncidentFilter(), 3)] == [3, 3]
    assert store.list_incidents(IncidentFilter(cluster="none")).cursor is None


def test_times_bound_a_list_from_inclusive_to_exclusive(store: Any) -> None:
    moments = [NOON + number * MINUTE for number in range(6)]
    made = [an_event_at(moment) for moment in moments]
    store.create_incidents(made)

    def found(start: int | None, end: int | None) -> list[int]:
        page = store.list_incidents(
            IncidentFilter(
                created_from=None if start is None else moments[start],
                created_before=None if end is None else moments[end],
            )
        )
        return sorted(made.index(incident.event) for incident in page.incidents)

    assert found(2, 4) == [2, 3]
    assert found(None, 2) == [0, 1]
    assert found(4, None) == [4, 5]
    assert found(3, 3) == []


def test_what_is_not_there_is_none_or_empty(store: Any) -> None:
    absent = sql_database.new_id()
    assert store.get_incident(absent) is None
    assert store.get_incident("no id at all") is None
    assert store.get_report(absent) is None
    assert store.list_transitions(absent) == []
    assert store.list_executions(absent) == []
    assert store.list_clusters() == []
    assert store.open_gaps() == []


# --- clusters and workers -------------------------------------------------------------------------


def test_clusters_gaps_and_workers_are_stored_and_updated(store: Any) -> None:
    record = incidents.ClusterRecord(cluster="a", endpoint="http://a/mcp", connected_at=NOON)
    store.save_clusters([record, dataclasses.replace(record, cluster="b")])
    store.save_clusters([changed := dataclasses.replace(record, events_total=5, last_error="gone",
                                                        triage_enabled=False)])  # fmt: skip
    first, second = store.list_clusters()
    assert dataclasses.replace(first, updated_at=None) == changed
    assert (second.cluster, second.events_total) == ("b", 0)

    gap = incidents.ClusterGap(cluster="a", lost_at=NOON, restored_at=None, reason="reset")
    store.save_gaps([gap, dataclasses.replace(gap, lost_at=NOON + MINUTE)])
    store.save_gaps([dataclasses.replace(gap, restored_at=NOON + MINUTE)])
    assert [open_.lost_at for open_ in store.open_gaps()] == [NOON + MINUTE]

    worker = incidents.WorkerRecord(
        worker_id="w", host="h", pid=1, role=incidents.Role.ALL, version="0.1.0", started_at=NOON
    )
    store.save_worker(worker)
    store.save_worker(dataclasses.replace(worker, state="stopped"))
    assert query(store, "select worker_id, state, role from workers") == [("w", "stopped", "all")]
    store.save_clusters([])
    store.save_gaps([])


def test_a_worker_that_has_stopped_does_not_run_again(store: Any) -> None:
    """Its heartbeat may have been under way in another thread, and is written last."""
    worker = incidents.WorkerRecord(
        worker_id="w", host="h", pid=1, role=incidents.Role.ALL, version="0.1.0", started_at=NOON
    )

    def state_after(*states: str) -> object:
        for state in states:
            store.save_worker(dataclasses.replace(worker, state=state))
        return query(store, "select state from workers")[0][0]

    assert state_after("running", "running") == "running"
    assert state_after("draining", "running") == "draining"
    assert state_after("stopped", "draining", "running") == "stopped"


def test_a_replica_that_has_left_or_died_has_no_cluster_and_takes_none(store: Any) -> None:
    def a_replica(name: str) -> incidents.WorkerRecord:
        return incidents.WorkerRecord(
            worker_id=name,
            host="h",
            pid=1,
            role=incidents.Role.INGEST,
            version="0.1.0",
            started_at=NOON,
        )

    def owners() -> list[Any]:
        return [lease.owner for lease in store.watch_view(LEASE).leases]

    def take(name: str) -> list[str]:
        taken: list[str] = store.acquire_clusters(name, store.watch_view(LEASE).leases, LEASE)
        return taken

    store.register_clusters([incidents.ClusterRecord(cluster="a", endpoint="http://a/mcp")])
    for name in ("leaver", "victim", "heir"):
        store.renew_clusters(a_replica(name), {}, LEASE)
    assert take("leaver") == ["a"]
    store.leave_clusters(dataclasses.replace(a_replica("leaver"), state="draining"))
    assert owners() == [None], "without its having to say what it had"
    assert take("leaver") == [], "as a call that was still under way would"
    assert take("victim") == ["a"]
    store.bury_replicas(["victim"])
    assert owners() == [None]
    assert store.watch_view(LEASE).replicas == ("heir",)
    assert take("heir") == ["a"]
    ended = query(store, "select owner from cluster_watches where ended_at is not null")
    assert {owner for (owner,) in ended} == {"leaver", "victim"}


# --- housekeeping ---------------------------------------------------------------------------------


def test_pruning_deletes_old_terminal_incidents_with_all_that_belongs_to_them(store: Any) -> None:
    store.create_incidents(events_of("a", 8))
    claimed = store.claim_incidents("w", 6, LEASE)
    for incident in claimed[:4]:
        store.complete_incident(incident, resolved(incident))
    store.complete_incident(claimed[4], agent_failed(claimed[4]))
    soon = sql_database.utc_now() + MINUTE

    assert store.prune({S.RESOLVED}, sql_database.utc_now() - MINUTE) == []
    assert store.prune(set(), soon) == []
    first = store.prune({S.RESOLVED}, soon, limit=3)
    assert len(first) == 3
    rest = store.prune({S.RESOLVED}, soon, limit=3)
    assert sorted(first + rest) == sorted(ids(claimed[:4]))
    assert statuses(store) == {S.AGENT_FAILED: 1, S.RUNNING: 1, S.PENDING: 2}
    assert store.get_incident(first[0]) is None
    kept = {table: {row[0] for row in query(store, f"select {key} from {table}")}
            for table, key in state_store._INCIDENT_TABLES.items()}  # fmt: skip
    assert not any(found & {*first, *rest} for found in kept.values())
    assert kept["agent_executions"] == {claimed[4].incident_id}


@pytest.mark.parametrize("status", [S.PENDING, S.RUNNING])
def test_open_incidents_are_never_pruned(store: Any, status: S) -> None:
    store.create_incidents([an_event()])
    with pytest.raises(StoreError, match="terminal"):
        store.prune({status, S.RESOLVED}, sql_database.utc_now() + MINUTE)
    assert statuses(store) == {S.PENDING: 1}


@contextmanager
def writing(store: Any) -> Iterator[threading.Event]:
    """Pairs of incidents are written all the time; the event says that it has begun."""
    begun, stop = threading.Event(), threading.Event()

    def write() -> None:
        while not stop.is_set():
            store.create_incidents(events_of("busy", 2))
            begun.set()

    writers = [threading.Thread(target=write) for _ in range(2)]
    for writer in writers:
        writer.start()
    try:
        yield begun
    finally:
        stop.set()
        for writer in writers:
            writer.join()


def test_a_backup_is_whole_although_others_write(store: Any, tmp_path: Path) -> None:
    if refuses_to_be_copied(store):
        return
    copy = tmp_path / "copy.db"
    store.create_incidents(events_of("first", 300, context="x" * 20_000))
    with writing(store) as begun:
        begun.wait()
        store.backup(copy)

    assert copy.stat().st_mode & 0o777 == 0o640
    connection = apsw.Connection(str(copy), flags=apsw.SQLITE_OPEN_READONLY)
    count = connection.execute("select count(*) from incidents").get
    assert count >= 302
    assert count % 2 == 0
    assert connection.pragma("integrity_check") == "ok"
    assert connection.execute("pragma foreign_key_check").fetchall() == []
    connection.close()
    assert sorted(path.name for path in tmp_path.glob("copy.db*")) == ["copy.db"]


def test_a_backup_never_overwrites(store: Any, tmp_path: Path) -> None:
    if refuses_to_be_copied(store):
        return
    (tmp_path / "copy.db").write_text("precious")
    (tmp_path / "link.db").symlink_to("absent")
    for name in ("copy.db", "link.db"):
        with pytest.raises(sql_database.InvalidRequest, match="already there"):
            store.backup(tmp_path / name)
    assert (tmp_path / "copy.db").read_text() == "precious"


@pytest.mark.parametrize("place", ["absent/copy.db", "file/copy.db"])
def test_a_backup_that_cannot_be_written_says_so(store: Any, tmp_path: Path, place: str) -> None:
    if refuses_to_be_copied(store):
        return
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreUnavailable, match="cannot be written"):
        store.backup(tmp_path / place)
    store.create_incidents([an_event()])


def test_a_closed_store_is_unavailable_and_closing_twice_is_fine(
    store: Any, tmp_path: Path
) -> None:
    store.create_incidents([an_event()])
    claimed = claim_one(store)
    store.close()
    store.close()
    for act in (
        lambda: store.create_incidents([an_event()]),
        lambda: store.claim_incidents("w", 1, LEASE),
        lambda: store.get_incident(claimed.incident_id),
        lambda: store.list_incidents(IncidentFilter()),
        lambda: store.release_expired(3),
        lambda: store.complete_incident(claimed, resolved(claimed)),
        *([lambda: store.backup(tmp_path / "copy.db")] if store.can_be_copied else []),
        store.has_pending,
    ):
        with pytest.raises(StoreUnavailable, match="closed"):
            act()


def test_readers_and_writers_that_meet_a_close_get_an_answer(open_again: Opener) -> None:
    """Nobody waits for ever for a connection that is gone."""
    store = open_again()

    def use(number: int) -> None:
        if number == 0:
            store.close()
            return
        try:
            while True:
                store.has_pending()
                store.create_incidents([an_event()])
        except StoreUnavailable:
            pass

    in_threads(8, use)


# --- the store against a model --------------------------------------------------------------------


class StoreMachine(RuleBasedStateMachine):
    """Whatever is done in whatever order, the store and a dictionary agree."""

    kind = ""
    schema = ""  # for PostgreSQL

    @initialize()
    def begin(self) -> None:
        self.place = ExitStack()
        where = emptied(self.schema) if self.schema else tempfile.TemporaryDirectory()
        place = self.place.enter_context(where)
        self.opener = Opener(self.kind, place, migrated=bool(self.schema))
        self.store = self.opener()
        self.model: dict[str, tuple[S, int, int]] = {}  # status, attempt, attempts_charged
        self.held: list[Incident] = []
        self.started: dict[tuple[str, int], Any] = {}
        self.written: set[str] = set()

    def teardown(self) -> None:
        if hasattr(self, "opener"):
            self.went_their_ways(self.model)
            self.opener.close_all()
            self.place.close()

    @rule(clusters=st.lists(st.sampled_from("abq"), max_size=4))
    def create(self, clusters: list[str]) -> None:
        events = [an_event(cluster) for cluster in clusters]
        for incident in self.store.create_incidents(events, without_triage=["q"]):
            skipped = incident.cluster == "q"
            self.model[incident.incident_id] = (S.SKIPPED if skipped else S.PENDING, 0, 0)

    @rule(
        limit=st.integers(0, 3), cap=st.integers(0, 2), dies=st.booleans(), w=st.sampled_from("xy")
    )
    def claim(self, limit: int, cap: int, dies: bool, w: str) -> None:
        pending = [key for key, (status, *_) in self.model.items() if status is S.PENDING]
        lease = EXPIRED if dies else LEASE
        claimed = self.store.claim_incidents(w, limit, lease, max_per_cluster=cap)
        if not cap:
            assert len(claimed) == min(limit, len(pending))
        for incident in claimed:
            status, attempt, charged = self.model[incident.incident_id]
            assert status is S.PENDING
            self.model[incident.incident_id] = (S.RUNNING, attempt + 1, charged + 1)
        self.held += claimed

    def is_held(self, incident: Incident) -> bool:
        status, attempt, _ = self.model.get(incident.incident_id, (None, 0, 0))
        return status is S.RUNNING and attempt == incident.attempt

    @rule(
        data=st.data(),
        how=st.sampled_from(["resolve", "fail", "retry", "release", "start", "renew"]),
    )
    def end(self, data: Any, how: str) -> None:
        if not self.held:
            return
        incident = data.draw(st.sampled_from(self.held))
        key = incident.incident_id
        _, attempt, charged = self.model.get(key, (None, 0, 0))
        execution = self.started.get((key, incident.attempt)) or an_execution(incident)
        acts: dict[str, tuple[Callable[[], Any], tuple[S, int, int]]] = {
            "resolve": (
                lambda: self.store.complete_incident(
                    incident, resolved(incident, execution=finished(execution, exit_code=0))
                ),
                (S.RESOLVED, attempt, charged),
            ),
            "fail": (
                lambda: self.store.complete_incident(incident, agent_failed(incident)),
                (S.AGENT_FAILED, attempt, charged),
            ),
            "retry": (
                lambda: self.store.complete_incident(
                    incident, agent_failed(incident, agent_retries=99)
                ),
                (S.PENDING, attempt, charged),
            ),
            "release": (
                lambda: self.store.release_incident(incident, "drain"),
                (S.PENDING, attempt, charged - 1),
            ),
            "start": (
                lambda: self.store.start_execution(execution),
                (S.RUNNING, attempt, charged),
            ),
            "renew": (
                lambda: self.store.renew_leases([incident], LEASE),
                (S.RUNNING, attempt, charged),
            ),
        }
        act, after = acts[how]
        if how == "renew":
            assert act() == ([] if self.is_held(incident) else [key])
        elif self.is_held(incident):
            act()
            self.model[key] = after
            if how == "start":
                self.started[key, incident.attempt] = execution
            elif how == "resolve":
                self.written.add(execution.execution_id)
        elif how == "resolve" and execution.execution_id in self.written:
            if key in self.model:  # else it was pruned since
                assert act() is S.RESOLVED, "who asks again hears what was written"
        else:
            with pytest.raises(LeaseLost):
                act()

    @rule()
    def sweep(self) -> None:
        for incident in self.store.release_expired(2):
            status, attempt, charged = self.model[incident.incident_id]
            assert status is S.RUNNING
            ended = S.FAILED if charged >= 2 else S.PENDING
            self.model[incident.incident_id] = (ended, attempt, charged)

    @rule(limit=st.integers(1, 2))
    def prune(self, limit: int) -> None:
        before = sql_database.utc_now() + MINUTE
        self.went_their_ways(self.model)
        gone = self.store.prune({S.RESOLVED, S.SKIPPED}, before, limit)
        fitting = [k for k, (s, *_) in self.model.items() if s in (S.RESOLVED, S.SKIPPED)]
        assert len(gone) == min(limit, len(fitting))
        for key in gone:
            assert key in fitting
            del self.model[key]

    @rule()
    def open_again(self) -> None:
        self.store.close()
        self.store = self.opener()

    @invariant()
    def agrees(self) -> None:
        if not hasattr(self, "model"):
            return
        found = self.store.list_incidents(IncidentFilter(), limit=1000).incidents
        assert {
            i.incident_id: (i.status, i.attempt, i.attempts_charged) for i in found
        } == self.model

    def went_their_ways(self, incident_ids: Iterable[str]) -> None:
        """Nothing takes a transition away, but pruning: it is enough to look at the end."""
        for incident_id in incident_ids:
            ways = self.store.list_transitions(incident_id)
            assert all(t.to_status in incidents.TRANSITIONS[t.from_status] for t in ways)
            assert [t.seq for t in ways] == list(range(1, len(ways) + 1))


@pytest.mark.parametrize("kind", ["sqlite", "filesystem", "postgres"])
def test_the_store_agrees_with_a_model_whatever_is_done(
    kind: str, request: pytest.FixtureRequest
) -> None:
    schema = request.getfixturevalue("kept_schema") if kind == "postgres" else ""
    machine = type(f"{kind}_machine", (StoreMachine,), {"kind": kind, "schema": schema})
    run = settings(max_examples=25, stateful_step_count=25, deadline=None)
    run_state_machine_as_test(machine, settings=run)


# --- SQLite ---------------------------------------------------------------------------------------


def test_the_file_is_ours_and_our_groups_only(tmp_path: Path) -> None:
    path = tmp_path / "state" / "nightcrier.db"
    umask = os.umask(0)
    try:
        store = sqlite_store(path)
        store.create_incidents([an_event()])
        modes = {file.name: file.stat().st_mode & 0o777 for file in path.parent.iterdir()}
        store.close()
    finally:
        os.umask(umask)
    names = ["nightcrier.db", "nightcrier.db-shm", "nightcrier.db-wal", "nightcrier.db.lock"]
    assert modes == dict.fromkeys(names, 0o640)
    assert path.parent.stat().st_mode & 0o777 == 0o750


def test_every_connection_has_the_settings_that_durability_needs(sqlite: Any) -> None:
    database = sqlite._database
    readers = [database._readers.get() for _ in range(database.READERS)]
    for connection in (database._connection, *readers):
        assert connection.pragma("journal_mode") == "wal"
        assert connection.pragma("synchronous") == 2
        assert connection.pragma("foreign_keys") == 1
        assert connection.pragma("busy_timeout") == 5000
    assert all(reader.pragma("query_only") == 1 for reader in readers)
    for reader in readers:
        database._readers.put(reader)
    with pytest.raises(StoreUnavailable, match="cannot be written"):
        database.read(lambda tx: tx.run("delete from incidents"))


@pytest.mark.parametrize("place", ["directory", "file/db", "read-only"])
def test_a_path_that_cannot_be_a_database_is_an_error_that_says_why(
    tmp_path: Path, place: str
) -> None:
    (tmp_path / "directory").mkdir()
    (tmp_path / "file").write_text("")
    path = Path("/proc/nightcrier.db") if place == "read-only" else tmp_path / place
    with pytest.raises(StoreUnavailable, match="cannot be opened") as caught:
        sqlite_store(path)
    assert caught.value.exit_code == 4


@contextmanager
def round_of(store: Any, jobs: list[Callable[[], Any]]) -> Iterator[None]:
    """Have the jobs wait together until the writer takes them all in one round."""
    entered, go = threading.Event(), threading.Event()

    def wait(tx: Any) -> None:
        entered.set()
        go.wait()

    def occupy() -> None:
        with suppress(StoreError):
            store._database.write(wait)

    threads = [threading.Thread(target=occupy)]
    threads[0].start()
    entered.wait()
    threads += [threading.Thread(target=job) for job in jobs]
    for thread in threads[1:]:
        thread.start()
    while store._database._jobs.qsize() < len(jobs):
        time.sleep(0.001)
    try:
        yield
    finally:
        go.set()
        for thread in threads:
            thread.join()


def test_what_waits_together_is_committed_together(sqlite: Any) -> None:
    commits = 0

    def committed() -> bool:
        nonlocal commits
        commits += 1
        return False

    sqlite._database._connection.set_commit_hook(committed)
    with round_of(sqlite, [lambda: sqlite.create_incidents(events_of("a", 3))] * 64):
        pass
    sqlite._database._connection.set_commit_hook(None)

    assert commits <= 2
    assert statuses(sqlite) == {S.PENDING: 192}


def test_a_failing_job_does_not_undo_its_neighbours(sqlite: Any) -> None:
    good, bad = events_of("a", 2), dataclasses.replace(an_event(), cluster="")
    errors: list[Exception] = []

    def fail(events: list[Any]) -> None:
        try:
            sqlite.create_incidents(events)
        except StoreError as error:
            errors.append(error)

    with round_of(
        sqlite,
        [
            lambda: sqlite.create_incidents([good[0]]),
            lambda: fail([an_event(), bad]),
            lambda: sqlite.create_incidents([good[1]]),
        ],
    ):
        pass
    assert len(errors) == 1
    assert isinstance(errors[0], StoreError)
    found = sqlite.list_incidents(IncidentFilter()).incidents
    assert set(ids(found)) == {event.event_id for event in good}


def test_an_answer_comes_only_after_the_commit(sqlite: Any) -> None:
    """Whoever was answered can be seen by another connection."""
    other = apsw.Connection(str(sqlite._database._path))

    def write_and_look(_: int) -> bool:
        (created,) = sqlite.create_incidents([an_event()])
        return bool(
            query(sqlite, "select 1 from incidents where incident_id = :i", i=created.incident_id)
        )

    assert all(in_threads(8, write_and_look))
    assert other.execute("select count(*) from incidents").get == 8
    other.close()


def test_a_foreign_writer_makes_the_store_unavailable_until_it_ends(sqlite: Any) -> None:
    sqlite._database._connection.set_busy_timeout(0)
    foreign = apsw.Connection(str(sqlite._database._path))
    foreign.execute("begin immediate")
    before = dump(sqlite)
    with pytest.raises(StoreUnavailable, match="another program holds the write lock"):
        sqlite.create_incidents([an_event()])
    assert dump(sqlite) == before
    foreign.execute("rollback")
    assert len(sqlite.create_incidents([an_event()])) == 1
    foreign.close()


def test_a_lock_that_the_host_refuses_makes_the_store_unavailable(
    sqlite: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_args: Any) -> None:
        raise OSError(37, "No locks available")

    with monkeypatch.context() as patch:
        patch.setattr(sql_database.fcntl, "flock", refuse)
        with pytest.raises(StoreUnavailable, match="No locks available"):
            sqlite.create_incidents([an_event()])
    assert len(sqlite.create_incidents([an_event()])) == 1


def test_a_file_that_was_deleted_or_replaced_is_not_written_any_more(sqlite: Any) -> None:
    path = sqlite._database._path
    away = path.with_name("away.db")
    path.rename(away)
    for replacement in (None, b""):
        if replacement is not None:
            path.write_bytes(replacement)
        with pytest.raises(StoreUnavailable, match="was deleted or replaced"):
            sqlite.create_incidents([an_event()])
    away.rename(path)
    assert len(sqlite.create_incidents([an_event()])) == 1, "put back: it goes on"


def test_a_process_waits_for_its_turn_instead_of_racing_for_the_write_lock(sqlite: Any) -> None:
    stored = threading.Event()

    def write() -> None:
        sqlite.create_incidents([an_event()])
        stored.set()

    with open(f"{sqlite._database._path}.lock", "a") as turn:
        fcntl.flock(turn, fcntl.LOCK_EX)
        writer = threading.Thread(target=write)
        writer.start()
        assert not stored.wait(0.1)
    writer.join()
    assert stored.is_set()


def test_a_process_that_is_frozen_in_its_turn_is_waited_for_a_while_only(
    sqlite: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sql_database.SQLiteDatabase, "PATIENCE", 0.2)
    late, event = an_event(), an_event()
    path = sqlite._database._path
    given_up = pytest.raises(StoreUnavailable, match="another nightcrier holds")
    with sql_database._turn(path), given_up:
        sqlite.create_incidents([late])
    assert ids(sqlite.create_incidents([event])) == [event.event_id]
    assert sqlite.get_incident(late.event_id) is None, "what was given up is not written later"
    with sql_database._turn(path):
        sqlite.close()  # does not hang either


def test_a_full_disk_refuses_every_job_of_the_round_and_work_goes_on_with_room(sqlite: Any) -> None:
    sqlite.create_incidents(events_of("a", 3))
    connection = sqlite._database._connection
    before = dump(sqlite)
    connection.pragma("max_page_count", connection.pragma("page_count"))
    errors: list[Exception] = []

    def write() -> None:
        try:
            sqlite.create_incidents(events_of("big", 3, context="x" * 100_000))
        except StoreUnavailable as error:
            errors.append(error)

    with round_of(sqlite, [write] * 3):
        pass
    assert len(errors) == 3
    assert all("disk is full" in str(error) for error in errors)
    assert dump(sqlite) == before

    connection.pragma("max_page_count", 1_000_000)
    sqlite.create_incidents(events_of("big", 3, context="x" * 100_000))
    assert statuses(sqlite) == {S.PENDING: 6}
    assert query(sqlite, "pragma integrity_check") == [("ok",)]


def test_a_commit_that_fails_is_told_to_everybody_and_nothing_stays(sqlite: Any) -> None:
    connection = sqlite._database._connection
    before = dump(sqlite)
    errors: list[Exception] = []

    def write() -> None:
        try:
            sqlite.create_incidents([an_event()])
        except StoreError as error:
            errors.append(error)

    with round_of(sqlite, [write] * 3):
        connection.set_commit_hook(lambda: True)  # turns the commit into a rollback
    connection.set_commit_hook(None)
    assert len(errors) == 3
    assert dump(sqlite) == before
    sqlite.create_incidents([an_event()])


# --- SQLite: plans --------------------------------------------------------------------------------


@contextmanager
def plans(store: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], list[str]]]:
    """Record statements; `plan(part)` explains the recorded ones that hold a text."""
    ran: list[tuple[str, dict[str, Any]]] = []
    run = sql_database.SQLiteTransaction.run

    def record(self: Any, sql: str, **params: Any) -> Any:
        ran.append((sql, params))
        return run(self, sql, **params)

    def plan(part: str) -> list[str]:
        found = [(sql, params) for sql, params in ran if part in sql]
        assert found, part
        lines = []
        for sql, params in found:
            lines += [str(row[3]) for row in query(store, "explain query plan " + sql, **params)]
        return lines

    with monkeypatch.context() as patch:
        patch.setattr(sql_database.SQLiteTransaction, "run", record)
        yield plan


@pytest.fixture(scope="module")
def full_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database with many incidents in every state."""
    path = tmp_path_factory.mktemp("full") / "full.db"
    store = sqlite_store(path)
    severities = list(Severity)
    store.create_incidents(
        [
            an_event(f"c{n % 20}", resource_kind=f"k{n % 7}", severity=severities[n % 4])
            for n in range(2000)
        ],
        without_triage=["c3"],
    )
    for n, incident in enumerate(store.claim_incidents("w", 900, LEASE)[:850]):
        done = resolved(incident) if n % 2 else agent_failed(incident)
        store.complete_incident(incident, done)
    store.backup(path.with_name("copy.db"))
    store.close()
    return path.with_name("copy.db")


@pytest.fixture(params=["new", "analyzed"])
def full(request: pytest.FixtureRequest, full_file: Path, tmp_path: Path) -> Iterator[Any]:
    """That database, with and without what the planner learns from `analyze`."""
    store = sqlite_store(shutil.copy(full_file, tmp_path / "full.db"))
    if request.param == "analyzed":
        store._database.write(lambda tx: tx.run("analyze"))
    yield store
    store.close()


def test_a_claim_is_one_probe_of_the_queue_without_sorting(
    full: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with plans(full, monkeypatch) as plan:
        full.claim_incidents("w", 3, LEASE)
        lines = plan("order by i.queue_key")
    assert any("incidents_queue" in line for line in lines)
    assert not any("TEMP B-TREE" in line or line.startswith("SCAN e") for line in lines), lines


def test_a_claim_around_capped_clusters_goes_through_clusters(
    full: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with plans(full, monkeypatch) as plan:
        full.claim_incidents("w", 3, LEASE, max_per_cluster=1000)
        for part in ("min(cluster)", "status = 'PENDING' and cluster = :cluster"):
            lines = plan(part)
            assert any("incidents_queue_by_cluster" in line for line in lines), lines
            assert not any("TEMP B-TREE" in line for line in lines), lines
        assert any("incidents_running" in line for line in plan("count(*) from incidents"))


def test_storing_and_sweeping_use_the_partial_indexes(
    full: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with plans(full, monkeypatch) as plan:
        full.create_incidents(events_of("c1", 3, severity=Severity.WARNING))
        full.claim_incidents("w", 1, EXPIRED)
        full.release_expired(3)
        assert any("incidents_queue" in line for line in plan("select queue_key from incidents"))
        newest = [line for line in plan("select max(queue_key)") if "incidents" in line]
        assert newest
        assert all("incidents_queue_by_cluster" in line for line in newest), newest
        assert all("incidents_running" in line for line in plan("lease_expires_at <= :now"))


@pytest.mark.parametrize(
    ("wanted", "index"),
    [
        (IncidentFilter(), "PRIMARY KEY"),
        (IncidentFilter(cluster="c1"), "incidents_by_cluster"),
        (IncidentFilter(resource_kind="k1"), "incidents_by_kind"),
        (IncidentFilter(severity=Severity.INFO), "incidents_by_severity"),
        (IncidentFilter(statuses=frozenset({S.AGENT_FAILED})), "incidents_unresolved"),
        (IncidentFilter(statuses=frozenset({S.FAILED})), "incidents_unresolved"),
        (IncidentFilter(created_from=NOON), "PRIMARY KEY"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_lists_use_their_index_without_sorting(
    full: Any, monkeypatch: pytest.MonkeyPatch, wanted: IncidentFilter, index: str
) -> None:
    with plans(full, monkeypatch) as plan:
        page = full.list_incidents(wanted, limit=5)
        if page.cursor:
            full.list_incidents(wanted, limit=5, cursor=page.cursor)
        lines = plan("order by i.incident_id desc")
    assert any(index in line for line in lines if " i " in line) or index == "PRIMARY KEY", lines
    assert not any("TEMP B-TREE" in line for line in lines), lines
    assert not any(line.startswith("SCAN e") for line in lines), lines


def test_pruning_finds_children_by_their_indexes(full: Any) -> None:
    """A foreign key whose children are found by a scan would make each deletion linear."""
    for table, key in state_store._INCIDENT_TABLES.items():
        code = query(full, f"explain delete from {table} where {key} = :id", id="x")
        stored = {row[2] for row in code if row[1] in ("OpenRead", "OpenWrite")}
        assert stored
        assert [row for row in code if row[1] in ("Rewind", "Last") and row[2] in stored] == []


# --- SQLite: other processes ----------------------------------------------------------------------

READER = """
import sqlite3, sys
connection = sqlite3.connect(f"file:{sys.argv[1]}?mode=ro", uri=True)
print(connection.execute("select count(*) from v_incidents").fetchone()[0])
"""


def test_another_process_can_read_while_we_write(sqlite: Any) -> None:
    with writing(sqlite) as begun:
        begun.wait()
        reader = program(READER, str(sqlite._database._path))
        out, errors = reader.communicate(timeout=60)
    assert (reader.returncode, errors) == (0, "")
    assert int(out) >= 2


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become somebody else")
def test_another_user_of_the_group_can_read_the_file_after_a_clean_stop() -> None:
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        path = Path(folder) / "nightcrier.db"
        store = sqlite_store(path)
        store.create_incidents(events_of("a", 3))
        store.close()
        assert Path(f"{path}-wal").exists()
        become = f"import os; os.setgroups([]); os.setgid({os.getgid()}); os.setuid(65534)\n"
        reader = program("import sqlite3\n" + become + READER, str(path))
        assert reader.communicate(timeout=60) == ("3\n", "")


# --- filesystem -----------------------------------------------------------------------------------


@pytest.fixture
def files(tmp_path: Path) -> Iterator[state_store.FilesystemStore]:
    store = state_store.FilesystemStore(tmp_path / "store")
    yield store
    store.close()


def test_the_filesystem_store_says_what_it_cannot_promise() -> None:
    assert not state_store.FilesystemStore.shared_between_processes
    assert not state_store.FilesystemStore.batches_are_atomic
    assert "one process" in str(state_store.FilesystemStore.__doc__)


def test_a_second_process_is_refused_with_a_clear_error(files: Any, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"held by another nightcrier.*use SQLite"):
        state_store.FilesystemStore(tmp_path / "store")
    second = program(
        "from pathlib import Path; import sql_database, state_store\n"
        "try: state_store.FilesystemStore(Path(sys.argv[1]))\n"
        "except sql_database.StoreError as error: print(error)",
        str(tmp_path / "store"),
    )
    out, errors = second.communicate(timeout=60)
    assert errors == ""
    assert "held by another nightcrier" in out
    files.close()
    state_store.FilesystemStore(tmp_path / "store").close()


KEYS = set(
    "incidentId faultId status createdAt startedAt completedAt exitCode failureReason cluster "  # noqa: SIM905
    "namespace resource faultType severity context timestamp triggeringEventId".split()
)


def test_an_incident_is_a_readable_file_with_the_keys_and_words_of_the_existing_nightcrier(
    files: Any, tmp_path: Path
) -> None:
    (created,) = files.create_incidents([an_event("prod", context="bürnt", occurred_at=NOON)])
    file = tmp_path / "store" / created.incident_id / "incident.json"

    def content() -> dict[str, Any]:
        found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        return found

    assert set(content()) >= KEYS
    assert "bürnt" in file.read_text(encoding="utf-8")
    assert content()["status"] == "pending"
    assert content()["resource"]["kind"] == "Pod"
    assert content()["timestamp"] == sql_database.format_time(NOON)
    claimed = claim_one(files)
    assert content()["status"] == "investigating"
    files.complete_incident(claimed, agent_failed(claimed))
    assert content()["status"] == "agent_failed"
    assert content()["exitCode"] == 2
    assert file.stat().st_mode & 0o777 & ~0o640 == 0
    files.prune({S.AGENT_FAILED}, sql_database.utc_now() + MINUTE)
    assert not file.parent.exists()


def test_a_file_that_cannot_be_read_back_is_named(tmp_path: Path) -> None:
    store = state_store.FilesystemStore(tmp_path)
    (created,) = store.create_incidents([an_event()])
    store.close()
    (tmp_path / created.incident_id / "incident.json").write_text("{")
    with pytest.raises(StoreError, match=created.incident_id):
        state_store.FilesystemStore(tmp_path)
    (tmp_path / created.incident_id / "incident.json").unlink()
    state_store.FilesystemStore(tmp_path).close()  # and the lock was not kept


def test_a_disk_that_cannot_be_written_leaves_memory_and_files_as_they_were(
    files: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    files.create_incidents([an_event()])
    before = dump(files)

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(sql_database, "write_file", full)
        with pytest.raises(StoreUnavailable, match="No space left"):
            claim_one(files)
    assert dump(files) == before
    claim_one(files)


# --- opening --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["sqlite", "filesystem"])
def test_open_store_makes_what_the_configuration_names(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config = nightcrier.load_config(
        {"state_store": kind, "sqlite": str(tmp_path / "deep/er/a.db")},
        environment={},
        need_clusters=False,
    )
    for _ in range(2):
        store = nightcrier.open_store(config)
        store.create_incidents([an_event()])
        store.close()
    store = nightcrier.open_store(config)
    assert len(store.list_incidents(IncidentFilter()).incidents) == 2
    store.close()
