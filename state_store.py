"""Where incidents are kept: the contract of a store, and SQLite, PostgreSQL and files behind it.

1. Rows: values of incidents.py as rows of tables, and back.
2. Outbox: what people are to be told, until they have been told.
3. Queue: incidents are created, claimed, renewed, completed, released and expired.
4. Lists: looking incidents up.
5. Clusters: their gaps, the workers that watch them, and who watches which.
6. Stores: all of these queries, for each kind of database.
7. Calls: from async code, and events that wait for a database that is away.

Every statement is written once, in the classes of queries; a database below them (sql_database.py)
holds the connection and the transaction. Whoever lost a lease writes nothing: each statement that
ends or moves an incident names the holder and the attempt.

nightcrier.py opens the store that its configuration names; nothing here imports it.
"""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import itertools
import json
import operator
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from fair_queue import QueueLanes
from incidents import (
    QUEUE_DELAYS,
    TERMINAL,
    TRANSITIONS,
    AgentExecution,
    ClusterGap,
    ClusterRecord,
    Completion,
    ConnectionState,
    FaultEvent,
    Incident,
    IncidentFilter,
    IncidentPage,
    IncidentStatus,
    LeaseLost,
    Message,
    Outcome,
    Severity,
    Transition,
    TriageReport,
    WorkerRecord,
    incident_document,
    lane_of,
    microseconds,
)
from sql_database import (
    Database,
    MirroredDatabase,
    PostgresDatabase,
    PostgresSettings,
    RowSpool,
    SQLiteDatabase,
    StoreError,
    StoreUnavailable,
    Transaction,
    format_time,
    id_floor,
    new_id,
    parse_time,
    utc_now,
)
from watch_leases import ClusterTurn, WatchLease, WatchView

T = TypeVar("T")

# ============================================================================
# 1. Rows
# A field of the domain and its column have the same name.
# ============================================================================


EVENT_FIELDS = tuple(f.name for f in dataclasses.fields(FaultEvent))
EXECUTION_FIELDS = tuple(f.name for f in dataclasses.fields(AgentExecution))
REPORT_FIELDS = tuple(f.name for f in dataclasses.fields(TriageReport))
_STATE_FIELDS = tuple(f.name for f in dataclasses.fields(Incident))[1:]  # all but the event
_INCIDENT_COLUMNS = ", ".join(
    [f"e.{name}" for name in EVENT_FIELDS] + [f"i.{name}" for name in _STATE_FIELDS]
)
# Every incident has its event; `left join` keeps planners from going through the events first.
SELECT_INCIDENT = f"""
    select {_INCIDENT_COLUMNS}
    from incidents i left join fault_events e on e.event_id = i.incident_id"""


def on_conflict(key: Sequence[str], fields: Sequence[str]) -> str:
    """Of a row whose key is there already, change the other fields."""
    changes = ", ".join(f"{name} = excluded.{name}" for name in fields if name not in key)
    return f"on conflict ({', '.join(key)}) do update set {changes}"


def as_stored(value: object) -> object:
    """A value of the domain as a parameter of SQL."""
    return format_time(value) if isinstance(value, datetime) else value


def params_of(item: Any, fields: Sequence[str]) -> dict[str, Any]:
    return {name: as_stored(getattr(item, name)) for name in fields}


_ENUMS: Mapping[str, Callable[[Any], Any]] = {
    "status": IncidentStatus,
    "from_status": IncidentStatus,
    "to_status": IncidentStatus,
    "severity": Severity,
    "outcome": Outcome,
    "connection_state": ConnectionState,
    "triage_enabled": bool,
}


def value_of(name: str, stored: Any) -> Any:
    """A column's value as the domain has it; the name of a column tells what it holds."""
    if stored is None:
        return None
    if name in _ENUMS:
        return _ENUMS[name](stored)
    if (name.endswith("_at") or name == "at") and isinstance(stored, str):
        if (moment := parse_time(stored)) is None:
            raise StoreError(f"the database holds {stored[:40]!r} where a time belongs ({name})")
        return moment
    return stored


def values_of(names: Sequence[str], row: Sequence[Any]) -> dict[str, Any]:
    return {name: value_of(name, stored) for name, stored in zip(names, row, strict=True)}


def fetch(
    database: Database, kind: Callable[..., T], fields: Sequence[str], tail: str, **params: Any
) -> list[T]:
    """The rows of `select <fields> <tail>` as values of the domain."""
    statement = f"select {', '.join(fields)} {tail}"
    rows = database.read(lambda tx: tx.run(statement, **params))
    return [kind(**values_of(fields, row)) for row in rows]


def incident_from(row: Sequence[Any]) -> Incident:
    split = len(EVENT_FIELDS)
    event = FaultEvent(**values_of(EVENT_FIELDS, row[:split]))
    return Incident(event=event, **values_of(_STATE_FIELDS, row[split:]))


# ============================================================================
# 2. Outbox
# Rows hold plain values: where they are sent, and with which secrets, is not for the database.
# ============================================================================


_MESSAGE_FIELDS = tuple(f.name for f in dataclasses.fields(Message))
_ALWAYS = datetime.min.replace(tzinfo=UTC)
# How incidents ended, newest first; where an agent is tried again, its last run counts.
_ENDINGS = """
    select x.completed_at, x.outcome, x.error_message
    from agent_executions x join incidents i on i.incident_id = x.incident_id
    where x.completed_at >= :since and (x.outcome = 'succeeded' or
          (i.status in ('AGENT_FAILED', 'FAILED') and x.attempt = i.attempt))
    order by x.completed_at desc limit :limit"""


class OutboxQueries:
    """What is to be told: written with its cause, claimed under a lease, sent or given up."""

    _database: Database

    def add_messages(
        self, kind: str, payload: Mapping[str, Any], dedupe_keys: Mapping[str, str | None]
    ) -> None:
        """Have sinks told of something; a message whose key is there already is left out.

        `dedupe_keys` are those of the sinks, by their names.
        """

        def job(tx: Transaction) -> None:
            rows = [
                _message_row(tx.now, kind, sink, payload, dedupe_key=key)
                for sink, key in dedupe_keys.items()
            ]
            tx.insert("notifications", rows, _IF_SAID_BEFORE)

        self._database.write(job)

    def next_due(self, sink: str) -> timedelta | None:
        """In what time a message for a sink is due, not after 0 if one is; None without any."""

        def job(tx: Transaction) -> timedelta | None:
            # Not min(): it would read all that waits.
            rows = tx.run(
                """select next_attempt_at from notifications
                   where status = 'PENDING' and sink = :sink order by next_attempt_at limit 1""",
                sink=sink,
            )
            due: datetime | None = value_of("next_attempt_at", rows[0][0]) if rows else None
            return None if due is None else due - tx.now

        return self._database.read(job)

    def claim_message(self, worker_id: str, sink: str, lease: timedelta) -> Message | None:
        """Take the message of a sink that has been due for the longest; no other worker has it.

        If nothing is heard of it, it is due again when the lease ends.
        """

        def job(tx: Transaction) -> Message | None:
            rows = tx.run(
                f"""select {", ".join(_MESSAGE_FIELDS)} from notifications i
                    where status = 'PENDING' and sink = :sink and next_attempt_at <= :now
                    order by next_attempt_at limit 1 {tx.lock_free_rows}""",
                sink=sink,
            )
            if not rows:
                return None
            found = Message(**values_of(_MESSAGE_FIELDS, rows[0]))
            until = format_time(tx.now + lease)
            claimed = dataclasses.replace(found, attempt=found.attempt + 1, claimed_by=worker_id)
            row = params_of(claimed, ("notification_id", "incident_id", "attempt", "claimed_by"))
            row |= {"lease_expires_at": until, "next_attempt_at": until}
            tx.update("notifications", "notification_id", [row])
            return claimed

        return self._database.write(job)

    def message_sent(self, message: Message) -> None:
        """People have been told. If the lease was lost meanwhile, they are told again."""
        self._end_claim(message, status="SENT", error=None, retry_in=None)

    def message_failed(self, message: Message, error: str, retry_in: timedelta | None) -> None:
        """It could not be sent: to be tried again after a time, or (None) never, which is DEAD."""
        status = "DEAD" if retry_in is None else "PENDING"
        self._end_claim(message, status=status, error=error, retry_in=retry_in)

    def _end_claim(
        self, message: Message, *, status: str, error: str | None, retry_in: timedelta | None
    ) -> None:
        def job(tx: Transaction) -> None:
            tx.run(
                """update notifications
                   set status = :status, last_error = :error, claimed_by = null,
                       lease_expires_at = null, next_attempt_at = :next, sent_at = :sent_at
                   where notification_id = :notification_id
                     and incident_id is not distinct from :incident_id
                     and status = 'PENDING' and attempt = :attempt and claimed_by = :claimed_by""",
                **params_of(message, ("notification_id", "incident_id", "attempt", "claimed_by")),
                status=status,
                error=error,
                next=format_time(tx.now + (retry_in or timedelta(0))),
                sent_at=format_time(tx.now) if status == "SENT" else None,
            )

        self._database.write(job)

    def tell_of_failures(self, sink: str, threshold: int) -> str | None:
        """Have a sink told that `threshold` incidents in a row failed, or that one succeeded since.

        Returns the kind of the new message: `degraded`, then `recovered`, in turns. All of it is
        derived from what is stored, by whichever replica asks; the number in the key keeps two
        from saying the same. Nothing new is said before the last of them was sent or given up.
        """

        def look(tx: Transaction) -> tuple[int, str, dict[str, Any]] | None:
            number, degraded, unsent = _last_alert(tx, sink)
            if unsent:
                return None
            newest = _endings(tx, _ALWAYS, threshold)
            failed = [failed for _, failed, _ in newest]
            if degraded is not None and failed[:1] == [False]:
                return number + 1, "recovered", _recovery(tx, degraded)
            if degraded is None and failed == [True] * threshold:
                return number + 1, "degraded", _degradation(tx)
            return None

        if (found := self._database.read(look)) is None:
            return None
        number, kind, payload = found
        self.add_messages(kind, payload, {sink: f"alert:{sink}:{number:09}"})
        return kind


_IF_SAID_BEFORE = "on conflict (dedupe_key) do nothing"


def _message_row(
    now: datetime,
    kind: str,
    sink: str,
    payload: Mapping[str, Any],
    *,
    dedupe_key: str | None,
    incident_id: str | None = None,
) -> dict[str, Any]:
    return {
        "notification_id": new_id(),
        "incident_id": incident_id,
        "kind": kind,
        "sink": sink,
        "dedupe_key": dedupe_key,
        "payload": json.dumps(payload, ensure_ascii=False),
        "status": "PENDING",
        "created_at": format_time(now),
        "next_attempt_at": format_time(now),
    }


def announce(
    tx: Transaction, sinks: Sequence[str], resolved: Iterable[tuple[Incident, Completion]]
) -> None:
    """Have sinks told of incidents whose outcomes this transaction writes, each once."""
    rows = [
        _message_row(
            tx.now,
            "incident",
            sink,
            _announcement(incident, completion, tx.now),
            dedupe_key=f"incident:{incident.incident_id}:{sink}",
            incident_id=incident.incident_id,
        )
        for incident, completion in (resolved if sinks else ())
        for sink in sinks
    ]
    tx.insert("notifications", rows, _IF_SAID_BEFORE)


def _announcement(incident: Incident, completion: Completion, now: datetime) -> dict[str, Any]:
    event, report, execution = incident.event, completion.report, completion.execution
    return {
        "incident_id": incident.incident_id,
        "cluster": event.cluster,
        "severity": event.severity,
        "fault_type": event.fault_type,
        "resource_kind": event.resource_kind,
        "resource_namespace": event.resource_namespace,
        "resource_name": event.resource_name,
        "status": completion.status,
        "created_at": as_stored(incident.created_at),
        "started_at": as_stored(incident.started_at),
        "completed_at": format_time(now),
        "root_cause": report.root_cause if report else None,
        "confidence": report.confidence if report else None,
        "host": execution.host if execution else None,
        "workspace": execution.workspace if execution else None,
    }


# When, whether it failed, and why.
_Ending = tuple[datetime, bool, str | None]


def _endings(tx: Transaction, since: datetime, limit: int) -> list[_Ending]:
    rows = tx.run(_ENDINGS, since=format_time(since), limit=limit)
    return [
        (value_of("completed_at", at), outcome != Outcome.SUCCEEDED, reason)
        for at, outcome, reason in rows
    ]


def _last_alert(tx: Transaction, sink: str) -> tuple[int, dict[str, Any] | None, bool]:
    """Number of the last one; what was said if that was `degraded`; whether it is still unsent.

    One that was given up counts as said until an investigation succeeds: nobody needs to be told
    of the recovery then.
    """
    rows = tx.run(
        """select dedupe_key, kind, status, created_at, payload from notifications
           where dedupe_key >= :first and dedupe_key < :last order by dedupe_key desc limit 1""",
        first=f"alert:{sink}:",
        last=f"alert:{sink};",
    )
    if not rows:
        return 0, None, False
    key, kind, status, created_at, payload = rows[0]
    said = json.loads(payload) if kind == "degraded" else None
    if said is not None and status == "DEAD":
        endings = _endings(tx, value_of("created_at", created_at), 1_000)
        said = None if any(not failed for _, failed, _ in endings) else said
    return int(key.rpartition(":")[2]), said, status == "PENDING"


def _degradation(tx: Transaction) -> dict[str, Any]:
    """The failures since the last success, as far as they matter to people."""
    endings = _endings(tx, _ALWAYS, 1_000)
    streak = list(itertools.takewhile(operator.itemgetter(1), endings))
    return {
        "failures": len(streak),
        "first_failure_at": format_time(streak[-1][0]),
        "last_failure_at": format_time(streak[0][0]),
        "reasons": [reason or "" for _, _, reason in streak[:3]],
    }


def _recovery(tx: Transaction, degraded: Mapping[str, Any]) -> dict[str, Any]:
    first = parse_time(degraded["first_failure_at"]) or _ALWAYS
    endings = _endings(tx, first, 10_000)
    failures = [at for at, failed, _ in endings if failed] or [first]  # or deleted meanwhile
    successes = [at for at, failed, _ in endings if not failed and at > failures[0]]
    return {
        "failures": len(failures),
        "first_failure_at": format_time(first),
        "last_failure_at": format_time(failures[0]),
        "recovered_at": format_time(min(successes, default=failures[0])),
    }


# ============================================================================
# 3. Queue
# The table incidents is the queue. Rows of a claim are locked before they are changed.
# ============================================================================


# An execution is opened when its agent runs, and closed with the incident; one that never ran is
# inserted closed.
_EXECUTION_KEPT = ("execution_id", "incident_id", "attempt")
_IF_EXECUTION_IS_THERE = on_conflict(
    ("incident_id", "attempt"), [name for name in EXECUTION_FIELDS if name not in _EXECUTION_KEPT]
)


class IncidentQueries:
    """The queue: create, claim, renew, complete, release, expire."""

    _database: Database

    def __init__(self, database: Database) -> None:
        self._database = database
        self.sinks: tuple[str, ...] = ()  # who is told of every incident that is resolved
        self.on_ended: Callable[[], None] = lambda: None  # called in the thread that wrote it
        pending = database.read(
            lambda tx: tx.run("""
                select cluster, severity, max(queue_key) from incidents
                where status = 'PENDING' group by cluster, severity""")
        )
        self._lanes = QueueLanes(QUEUE_DELAYS, pending)

    def create_incidents(
        self, events: Sequence[FaultEvent], *, without_triage: Collection[str] = ()
    ) -> list[Incident]:
        """Store events and an incident for each: PENDING, or SKIPPED for clusters without triage.

        Returns what is new: an event whose id, or whose delivery in its session, is already
        stored is left out with its incident.
        """
        unique = {event.event_id: event for event in events}

        def job(tx: Transaction) -> list[Incident]:
            skipped = frozenset(without_triage)
            incidents = self._new_incidents(tx, list(unique.values()), skipped)
            rows = [params_of(incident.event, EVENT_FIELDS) for incident in incidents]
            whole = tx.insert_new("fault_events", rows) == len(rows)
            stored = incidents if whole else [new for new in incidents if _has_event(tx, new)]
            rows = [_incident_row(incident) for incident in stored]
            if tx.insert_new("incidents", rows) == len(incidents):
                return incidents
            return [new for new in stored if self._is_new(tx, new)]

        created = self._database.write(job) if events else []
        if any(incident.status is IncidentStatus.PENDING for incident in created):
            self._database.notify(INCIDENTS)
        return created

    def _new_incidents(
        self, tx: Transaction, events: Sequence[FaultEvent], skipped: Collection[str]
    ) -> list[Incident]:
        queued = [event for event in events if event.cluster not in skipped]
        head = tx.run("""
            select queue_key from incidents where status = 'PENDING'
            order by queue_key, incident_id limit 1""")

        def newest_pending(clusters: Sequence[str]) -> dict[str, int]:
            # One probe of the index for each: grouping would go through all that is pending.
            rows = tx.run(
                f"""select value, (select max(queue_key) from incidents
                                   where status = 'PENDING' and cluster = value)
                    from {tx.each_value} given""",
                values=json.dumps(clusters),
            )
            return {cluster: key for cluster, key in rows if key is not None}

        keys = iter(
            self._lanes.assign(
                [lane_of(event) for event in queued],
                now=microseconds(tx.now),
                head=head[0][0] if head else None,
                newest_pending=newest_pending,
            )
        )
        return [
            new_incident(event, tx.now, None if event.cluster in skipped else next(keys))
            for event in events
        ]

    def _is_new(self, tx: Transaction, incident: Incident) -> bool:
        """Whether the stored incident is the one just made, not one of an earlier call."""
        rows = tx.run(
            "select queue_key, attempt from incidents where incident_id = :incident_id",
            incident_id=incident.incident_id,
        )
        return rows == [(incident.queue_key, 0)]

    def has_pending(self) -> bool:
        """Whether a claim is worth trying; cheap, and may be out of date at once."""
        return self._database.read(
            lambda tx: bool(tx.run("select 1 from incidents where status = 'PENDING' limit 1"))
        )

    def claim_incidents(
        self,
        worker_id: str,
        limit: int,
        lease: timedelta,
        *,
        max_per_cluster: int = 0,
    ) -> list[Incident]:
        """Move at most `limit` incidents to RUNNING, most urgent first, fair between clusters.

        Each is handed to exactly one caller. No cluster gets more than `max_per_cluster` running
        incidents (0: no limit), and none is taken from a cluster on hold.
        """

        def job(tx: Transaction) -> list[Incident]:
            held = _held_clusters(tx)
            if max_per_cluster or held:
                wanted = _pick_around(tx, limit, held, max_per_cluster)
            else:
                wanted = _pick_head(tx, limit)
            claimed = [_claimed(found, worker_id, tx.now, lease) for found in wanted]
            rows = [params_of(incident, _CLAIM_FIELDS) for incident in claimed]
            tx.update("incidents", "incident_id", rows)
            _record_transitions(tx, claimed, IncidentStatus.PENDING, ["claimed"] * len(claimed))
            return claimed

        return self._database.write(job) if limit > 0 else []

    def claimed_incidents(self, worker_id: str) -> list[Incident]:
        """What a worker holds; a claim whose answer was lost with the connection is among it."""
        statement = f"{SELECT_INCIDENT} where i.status = 'RUNNING' and i.claimed_by = :worker_id"
        rows = self._database.read(lambda tx: tx.run(statement, worker_id=worker_id))
        return [incident_from(row) for row in rows]

    def renew_leases(self, incidents: Sequence[Incident], lease: timedelta) -> list[str]:
        """Extend the leases of claimed incidents; returns the ids of those that are lost."""

        def job(tx: Transaction) -> list[str]:
            held = _claims_held(tx, {incident.claimed_by for incident in incidents})
            ours = {incident.incident_id: _claim_of(incident) for incident in incidents}
            kept = [incident_id for incident_id, claim in ours.items() if claim in held]
            until = format_time(tx.now + lease)
            rows = [{"incident_id": kept_id, "lease_expires_at": until} for kept_id in kept]
            tx.update("incidents", "incident_id", rows)
            return [incident_id for incident_id in ours if incident_id not in kept]

        return self._database.write(job) if incidents else []

    def start_execution(self, execution: AgentExecution) -> None:
        """Record that the agent of a claimed incident runs; raises LeaseLost."""

        def job(tx: Transaction) -> None:
            # Locked: who takes the lease back at this moment would close no execution.
            claim = (execution.incident_id, execution.attempt, execution.worker_id)
            if claim not in _claims_held(tx, {execution.worker_id}):
                raise LeaseLost(execution.incident_id, execution.attempt)
            _save_executions(tx, [execution])

        self._database.write(job)

    def complete_incident(self, incident: Incident, completion: Completion) -> IncidentStatus:
        """As `complete_incidents`, for one; raises LeaseLost."""
        (status,) = self.complete_incidents([(incident, completion)])
        if isinstance(status, LeaseLost):
            raise status
        return status

    def complete_incidents(
        self, outcomes: Sequence[tuple[Incident, Completion]]
    ) -> list[IncidentStatus | LeaseLost]:
        """Write outcomes of claimed incidents: incident, transition, execution, report, messages.

        All in one transaction. For each it returns the new status, which is PENDING when the agent
        is to be tried again, or LeaseLost: then the lease is gone and nothing of it is written.
        Whoever does not know whether it was written (CommitUnknown) asks again: the same execution
        ends once.
        """

        def job(tx: Transaction) -> list[IncidentStatus | LeaseLost]:
            held = _claims_held(tx, {incident.claimed_by for incident, _ in outcomes})
            ends: list[_End] = []
            results: list[IncidentStatus | LeaseLost] = []
            for incident, completion in outcomes:
                if _claim_of(incident) in held:
                    ends.append(self._end_of(tx, incident, completion))
                    results.append(ends[-1].status)
                else:
                    results.append(_written_before(tx, incident, completion))
            _leave_running(tx, ends)
            written = [(e.completion.execution, e.completion.report) for e in ends if e.completion]
            _save_executions(tx, [execution for execution, _ in written if execution])
            _save_reports(tx, [(e, report) for e, report in written if e and report])
            resolved = [e for e in ends if e.status is IncidentStatus.RESOLVED]
            announce(tx, self.sinks, [(e.incident, e.completion) for e in resolved if e.completion])
            return results

        results = self._database.write(job)
        self.on_ended()
        return results

    @staticmethod
    def _end_of(tx: Transaction, incident: Incident, completion: Completion) -> _End:
        """What a completion makes of its incident; a failed agent may be tried again."""
        end = _End(incident, completion.status, completion.failure_reason or "", completion)
        if completion.status is IncidentStatus.AGENT_FAILED and completion.agent_retries:
            ((retries,),) = tx.run(
                """select count(*) from incident_transitions
                   where incident_id = :incident_id and reason = 'agent_retry'""",
                incident_id=incident.incident_id,
            )
            if retries < completion.agent_retries:
                due = microseconds(tx.now + completion.retry_delay)
                return _End(incident, IncidentStatus.PENDING, "agent_retry", completion, due)
        return end

    def release_incident(
        self, incident: Incident, reason: str, execution: AgentExecution | None = None
    ) -> None:
        """Back to PENDING, the attempt is not charged; raises LeaseLost."""

        def job(tx: Transaction) -> None:
            if _claim_of(incident) not in _claims_held(tx, {incident.claimed_by}):
                raise LeaseLost(incident.incident_id, incident.attempt)
            _leave_running(tx, [_End(incident, IncidentStatus.PENDING, reason, refund=1)])
            _save_executions(tx, [execution] if execution else [])

        self._database.write(job)

    def release_expired(self, max_attempts: int) -> list[Incident]:
        """Take back expired leases: PENDING, or FAILED when `max_attempts` were charged."""

        def job(tx: Transaction) -> list[Incident]:
            rows = tx.run(
                f"""select incident_id from incidents i
                    where status = 'RUNNING' and lease_expires_at <= :now {tx.lock_free_rows}"""
            )
            for (incident_id,) in rows:
                if incident := find_incident(tx, incident_id):
                    self._expire(tx, incident, max_attempts)
            found = (find_incident(tx, incident_id) for (incident_id,) in rows)
            return [incident for incident in found if incident is not None]

        if not self._database.read(self._any_expired):
            return []  # the common case costs no write transaction
        expired = self._database.write(job)
        if expired:
            self._database.notify(INCIDENTS)
            self.on_ended()
        return expired

    @staticmethod
    def _any_expired(tx: Transaction) -> bool:
        return bool(
            tx.run(
                """select 1 from incidents
                   where status = 'RUNNING' and lease_expires_at <= :now limit 1"""
            )
        )

    def _expire(self, tx: Transaction, incident: Incident, max_attempts: int) -> None:
        reason = f"lease of worker {incident.claimed_by} ran out"
        completion = None
        status = IncidentStatus.PENDING
        if incident.attempts_charged >= max_attempts:
            status = IncidentStatus.FAILED
            reason = f"{reason}, after {incident.attempts_charged} attempts"
            completion = Completion(status=status, execution=None, failure_reason=reason)
        _leave_running(tx, [_End(incident, status, reason, completion)])
        tx.send(
            """update agent_executions
               set completed_at = :now, outcome = 'lease_lost', error_message = :reason
               where incident_id = :incident_id and completed_at is null""",
            reason=reason,
            incident_id=incident.incident_id,
        )


@dataclass(frozen=True, slots=True)
class _End:
    """How a claimed incident leaves RUNNING."""

    incident: Incident
    status: IncidentStatus
    reason: str
    completion: Completion | None = None
    queue_key: int | None = None  # None: it keeps its place
    refund: int = 0

    def row(self, now: str) -> dict[str, Any]:
        """What is stored of it; nobody else has changed the incident since the claim."""
        incident, completion = self.incident, self.completion
        terminal = completion if self.status in TERMINAL else None
        return {
            "incident_id": incident.incident_id,
            "status": self.status,
            "claimed_by": None,
            "lease_expires_at": None,
            "completed_at": now if terminal else None,
            "exit_code": terminal.exit_code if terminal else None,
            "failure_reason": terminal.failure_reason if terminal else None,
            "attempts_charged": incident.attempts_charged - self.refund,
            "queue_key": incident.queue_key if self.queue_key is None else self.queue_key,
        }


def _claim_of(incident: Incident) -> tuple[str, int, str | None]:
    return incident.incident_id, incident.attempt, incident.claimed_by


def _claims_held(tx: Transaction, workers: Collection[str | None]) -> set[tuple[Any, ...]]:
    """Every claim of some workers; the rows are locked, by all in the same order."""
    return {
        claim
        for worker_id in sorted(map(str, workers))
        for claim in tx.run(
            f"""select incident_id, attempt, claimed_by from incidents i
                where status = 'RUNNING' and claimed_by = :worker_id
                order by incident_id {tx.lock_rows}""",
            worker_id=worker_id,
        )
    }


def _leave_running(tx: Transaction, ends: Sequence[_End]) -> None:
    """The one way out of RUNNING, of incidents whose rows are locked and whose claims hold."""
    for end in ends:
        if end.status not in TRANSITIONS[IncidentStatus.RUNNING]:
            raise StoreError(f"a running incident cannot become {end.status}")
    if ends:
        now = format_time(tx.now)
        tx.update("incidents", "incident_id", [end.row(now) for end in ends])
        moved = [dataclasses.replace(end.incident, status=end.status) for end in ends]
        reasons = [end.reason for end in ends]
        _record_transitions(tx, moved, IncidentStatus.RUNNING, reasons)


INCIDENTS = "incidents"  # the topic of notifications: there may be work


_CLAIM_FIELDS = (
    *("incident_id", "status", "attempt", "attempts_charged", "claimed_by"),
    *("lease_expires_at", "started_at"),
)


def _claimed(found: Incident, worker_id: str, now: datetime, lease: timedelta) -> Incident:
    return dataclasses.replace(
        found,
        status=IncidentStatus.RUNNING,
        attempt=found.attempt + 1,
        attempts_charged=found.attempts_charged + 1,
        claimed_by=worker_id,
        lease_expires_at=now + lease,
        started_at=found.started_at or now,
    )


def _written_before(
    tx: Transaction, incident: Incident, completion: Completion
) -> IncidentStatus | LeaseLost:
    """What an earlier, unanswered call made of the attempt."""
    written = completion.execution and tx.run(
        """select 1 from agent_executions
           where execution_id = :execution_id and outcome = :outcome""",
        execution_id=completion.execution.execution_id,
        outcome=completion.execution.outcome,
    )
    if not written:
        return LeaseLost(incident.incident_id, incident.attempt)
    ends = tx.run(
        """select to_status from incident_transitions
           where incident_id = :incident_id and from_status = 'RUNNING' order by seq""",
        incident_id=incident.incident_id,
    )
    return IncidentStatus(ends[incident.attempt - 1][0])  # every attempt ends once


# A queue key is a virtual time, and may lie ahead of the clock; only that of a retry is a date.
_DUE = """
    (attempt = 0 or queue_key <= :clock or 'agent_retry' <>
     (select reason from incident_transitions t where t.incident_id = i.incident_id
      order by seq desc limit 1))"""


def _pick_head(tx: Transaction, limit: int) -> list[Incident]:
    """One probe of the queue's index, however much is pending or finished."""
    rows = tx.run(
        f"""{SELECT_INCIDENT}
            where i.status = 'PENDING' and {_DUE}
            order by i.queue_key, i.incident_id limit :limit {tx.lock_free_rows}""",
        limit=limit,
        clock=microseconds(tx.now),
    )
    return [incident_from(row) for row in rows]


def _pick_around(
    tx: Transaction, limit: int, held: frozenset[str | None], max_per_cluster: int
) -> list[Incident]:
    """Through the clusters with pending work, never through the rows of an excluded one."""
    if None in held:
        return []
    running = dict(
        tx.run("""select cluster, count(*) from incidents
                  where status = 'RUNNING' group by cluster""")
    )
    found: list[tuple[int, str]] = []
    for cluster in _pending_clusters(tx):
        room = max_per_cluster - running.get(cluster, 0) if max_per_cluster else limit
        if cluster not in held and room > 0:
            found += tx.run(
                f"""select queue_key, incident_id from incidents i
                    where status = 'PENDING' and cluster = :cluster and {_DUE}
                    order by queue_key, incident_id limit :limit {tx.lock_free_rows}""",
                cluster=cluster,
                clock=microseconds(tx.now),
                limit=min(room, limit),
            )
    picked = (find_incident(tx, incident_id) for _, incident_id in sorted(found)[:limit])
    return [incident for incident in picked if incident is not None]


def _pending_clusters(tx: Transaction) -> list[str]:
    """Clusters with pending incidents, one probe of the index for each (a loose scan)."""
    rows = tx.run("""
        with recursive pending (cluster) as (
            select min(cluster) from incidents where status = 'PENDING'
            union all
            select (select min(cluster) from incidents
                     where status = 'PENDING' and cluster > pending.cluster)
            from pending where cluster is not null
        )
        select cluster from pending where cluster is not null""")
    return [row[0] for row in rows]


def find_incident(tx: Transaction, incident_id: str) -> Incident | None:
    rows = tx.run(f"{SELECT_INCIDENT} where i.incident_id = :incident_id", incident_id=incident_id)
    return incident_from(rows[0]) if rows else None


def new_incident(event: FaultEvent, now: datetime, queue_key: int | None) -> Incident:
    """The incident of a new event; without a place in the queue it is SKIPPED."""
    skipped = queue_key is None
    return Incident(
        event=event,
        status=IncidentStatus.SKIPPED if skipped else IncidentStatus.PENDING,
        queue_key=microseconds(now) if queue_key is None else queue_key,
        created_at=event.received_at,
        completed_at=now if skipped else None,
    )


def _held_clusters(tx: Transaction) -> frozenset[str | None]:
    """Clusters whose work is not to be started; None stands for all of them."""
    rows = tx.run("select cluster from holds where until is null or until > :now")
    return frozenset(row[0] for row in rows)


def _record_transitions(
    tx: Transaction,
    incidents: Sequence[Incident],
    from_status: IncidentStatus,
    reasons: Sequence[str],
) -> None:
    """Write down what the incidents have become. Their rows are locked: nobody else numbers.

    The time is not that of the transaction, which may have begun before the last one ended.
    """
    rows = [
        {
            "incident_id": incident.incident_id,
            "from_status": from_status,
            "to_status": incident.status,
            "worker_id": incident.claimed_by,
            "reason": reason,
        }
        for incident, reason in zip(incidents, reasons, strict=True)
    ]
    tx.insert_numbered("incident_transitions", rows, "seq", "incident_id", "at")


def _save_executions(tx: Transaction, executions: Sequence[AgentExecution]) -> None:
    rows = [params_of(execution, EXECUTION_FIELDS) for execution in executions]
    tx.insert("agent_executions", rows, _IF_EXECUTION_IS_THERE)


def _save_reports(tx: Transaction, reports: Sequence[tuple[AgentExecution, TriageReport]]) -> None:
    rows = [
        params_of(report, REPORT_FIELDS)
        | {"incident_id": execution.incident_id, "execution_id": execution.execution_id}
        for execution, report in reports
    ]
    tx.insert("triage_reports", rows)


def _has_event(tx: Transaction, incident: Incident) -> bool:
    """Not if its delivery was stored before, under another id."""
    return bool(tx.run("select 1 from fault_events where event_id = :id", id=incident.incident_id))


def _incident_row(incident: Incident) -> dict[str, Any]:
    """What is stored of a new incident."""
    event = incident.event
    return {
        "incident_id": event.event_id,
        "status": incident.status,
        "queue_key": incident.queue_key,
        "cluster": event.cluster,
        "severity": event.severity,
        "fault_type": event.fault_type,
        "resource_kind": event.resource_kind,
        "resource_namespace": event.resource_namespace,
        "resource_name": event.resource_name,
        "created_at": format_time(event.received_at),
        "completed_at": as_stored(incident.completed_at),
    }


# ============================================================================
# 4. Lists
# Ids are in the order in which they were made: they page, and bound a time.
# ============================================================================


_TRANSITION_FIELDS = tuple(f.name for f in dataclasses.fields(Transition))
_ID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")


class ListQueries:
    """Looking things up."""

    _database: Database

    def get_incident(self, incident_id: str) -> Incident | None:
        if not _ID.fullmatch(incident_id):
            return None  # PostgreSQL would not even compare it
        return self._database.read(lambda tx: find_incident(tx, incident_id))

    def list_incidents(
        self, wanted: IncidentFilter, *, cursor: str | None = None, limit: int = 50
    ) -> IncidentPage:
        """Newest first; pass a page's cursor to get the next."""
        conditions, params = _conditions(wanted)
        if cursor is not None:
            conditions.append("i.incident_id < :cursor")
            params["cursor"] = cursor
        rows = self._database.read(
            lambda tx: tx.run(
                f"""{SELECT_INCIDENT}
                    where {" and ".join(["1 = 1", *conditions])}
                    order by i.incident_id desc limit :limit""",
                **params,
                limit=limit + 1,
            )
        )
        incidents = tuple(incident_from(row) for row in rows[:limit])
        return IncidentPage(
            incidents=incidents, cursor=incidents[-1].incident_id if len(rows) > limit else None
        )

    def list_transitions(self, incident_id: str) -> list[Transition]:
        tail = "from incident_transitions where incident_id = :id order by seq"
        return fetch(self._database, Transition, _TRANSITION_FIELDS, tail, id=incident_id)

    def list_executions(self, incident_id: str) -> list[AgentExecution]:
        tail = "from agent_executions where incident_id = :id order by attempt"
        return fetch(self._database, AgentExecution, EXECUTION_FIELDS, tail, id=incident_id)

    def open_executions(self, host: str) -> list[AgentExecution]:
        """Executions on this host that nobody has closed."""
        # An open execution belongs to a running incident: the condition keeps this to a few rows.
        tail = """from agent_executions
            where host = :host and completed_at is null and incident_id in
                  (select incident_id from incidents where status = 'RUNNING')"""
        return fetch(self._database, AgentExecution, EXECUTION_FIELDS, tail, host=host)

    def get_report(self, incident_id: str) -> TriageReport | None:
        """The newest report of an incident."""
        tail = "from triage_reports where incident_id = :id order by report_id desc limit 1"
        found = fetch(self._database, TriageReport, REPORT_FIELDS, tail, id=incident_id)
        return found[0] if found else None


# The condition of the partial index is repeated where it applies: without it the index is not used.
_UNRESOLVED = TERMINAL - {IncidentStatus.RESOLVED}
_FILTER_COLUMNS = (
    "cluster",
    "resource_kind",
    "resource_namespace",
    "resource_name",
    "severity",
    "fault_type",
)


def status_in(statuses: Collection[IncidentStatus]) -> tuple[str, dict[str, str]]:
    """A condition on `i.status`, and its parameters."""
    names = {f"status_{number}": str(s) for number, s in enumerate(sorted(statuses))}
    return f"i.status in ({', '.join(f':{name}' for name in names)})", names


def _conditions(wanted: IncidentFilter) -> tuple[list[str], dict[str, Any]]:
    """The filter as SQL conditions and their parameters."""
    given = {name: getattr(wanted, name) for name in _FILTER_COLUMNS}
    params = {name: str(value) for name, value in given.items() if value is not None}
    conditions = [f"i.{name} = :{name}" for name in params]
    if wanted.statuses:
        condition, names = status_in(wanted.statuses)
        conditions.append(condition)
        params |= names
        if wanted.statuses <= _UNRESOLVED:
            conditions.append("i.status in ('AGENT_FAILED', 'FAILED', 'SKIPPED')")
        elif len(wanted.statuses) == 1:
            conditions += [
                f"i.status = '{status}'"
                for status in (IncidentStatus.PENDING, IncidentStatus.RUNNING)
                if status in wanted.statuses
            ]
    slack = timedelta(seconds=1)  # ids are made just after received_at is taken
    if wanted.created_from is not None:
        conditions += ["i.created_at >= :created_from", "i.incident_id >= :first_id"]
        params["created_from"] = format_time(wanted.created_from)
        params["first_id"] = id_floor(wanted.created_from - slack)
    if wanted.created_before is not None:
        conditions += ["i.created_at < :created_before", "i.incident_id < :last_id"]
        params["created_before"] = format_time(wanted.created_before)
        params["last_id"] = id_floor(wanted.created_before + slack)
    return conditions, params


# ============================================================================
# 5. Clusters
# What replicas tell each other is in these rows; a lease on a cluster is a condition on its row.
# ============================================================================


_CLUSTER_FIELDS = tuple(f.name for f in dataclasses.fields(ClusterRecord))
_GAP_FIELDS = tuple(f.name for f in dataclasses.fields(ClusterGap))
# Whoever lost the lease of a cluster does not write over what its successor says of it.
_IF_CLUSTER_IS_THERE = (
    on_conflict(("cluster", "owner"), _CLUSTER_FIELDS).replace("(cluster, owner)", "(cluster)")
    + " where clusters.owner is not distinct from excluded.owner"
)
_IF_GAP_IS_THERE = on_conflict(("cluster", "lost_at"), ("restored_at",))
_WORKER_FIELDS = tuple(f.name for f in dataclasses.fields(WorkerRecord))
# A worker's last words count, though a heartbeat that was under way may be written after them.
_IF_WORKER_IS_THERE = (
    on_conflict(("worker_id",), ("state", "heartbeat_at"))
    + " where workers.state = 'running' or excluded.state in (workers.state, 'stopped')"
)


class ClusterQueries:
    """Clusters, their gaps, and the workers that watch them."""

    _database: Database
    POLL: ClassVar[tuple[float, float]] = (0.25, 0.25)

    def save_clusters(self, records: Sequence[ClusterRecord]) -> None:
        """Store what is known of clusters, but not of one that another replica has taken over."""

        def job(tx: Transaction) -> None:
            now = format_time(tx.now)
            rows = [{**params_of(record, _CLUSTER_FIELDS), "updated_at": now} for record in ordered]
            tx.insert("clusters", rows, _IF_CLUSTER_IS_THERE)

        # in the same order everywhere: two that write the same rows cannot wait for each other
        ordered = sorted(records, key=lambda record: record.cluster)
        if ordered:
            self._database.write(job)

    def list_clusters(self) -> list[ClusterRecord]:
        tail = "from clusters order by cluster"
        return fetch(self._database, ClusterRecord, _CLUSTER_FIELDS, tail)

    def save_gaps(self, gaps: Sequence[ClusterGap]) -> None:
        """Store gaps; a gap that is already stored (same cluster and start) is updated."""
        # by their key, and each once: a statement can change a row only once
        rows = {(gap.cluster, gap.lost_at): params_of(gap, _GAP_FIELDS) for gap in gaps}
        ordered = [rows[key] for key in sorted(rows)]

        def job(tx: Transaction) -> None:
            tx.insert("cluster_gaps", ordered, _IF_GAP_IS_THERE)
            for row in (row for row in ordered if row["restored_at"]):
                # Also one that a replica wrote before it heard that another had taken over.
                tx.send(
                    """update cluster_gaps set restored_at = :restored_at where cluster = :cluster
                       and restored_at is null and lost_at < :restored_at""",
                    cluster=row["cluster"],
                    restored_at=row["restored_at"],
                )

        if ordered:
            self._database.write(job)

    def open_gaps(self) -> list[ClusterGap]:
        """Gaps that have not ended."""
        tail = "from cluster_gaps where restored_at is null"
        return fetch(self._database, ClusterGap, _GAP_FIELDS, tail)

    def tell(self, topic: str) -> None:
        """Let all who share the database know of something new; a hint that may get lost."""
        self._database.notify(topic)

    def listen(self, heard: Callable[[str], None]) -> None:
        """Have `heard` called, from another thread, with the topics that others tell of."""
        self._database.listen(heard)

    def poll_interval(self) -> tuple[float, float]:
        """Between how many and how many seconds to wait before looking for work again."""
        return (2.0, 4.0) if self._database.hears else self.POLL

    def save_worker(self, worker: WorkerRecord) -> None:
        """Register a worker, or renew its heartbeat and state."""
        self._database.write(lambda tx: _save_worker(tx, worker))


WATCHES = "watches"  # the topic of notifications: who watches what, or should, has changed
_LEASE_FIELDS = tuple(f.name for f in dataclasses.fields(WatchLease))
_TURN_FIELDS = tuple(f.name for f in dataclasses.fields(ClusterTurn))
# Somebody may have deleted the row of a cluster: then its epochs begin anew.
_IF_TURN_IS_THERE = on_conflict(
    ("cluster", "lease_epoch"), ("owner", "connected_at", "updated_at", "ended_at")
)
_END_TURN = """
    update cluster_watches set ended_at = coalesce(:ended_at, updated_at)
    where cluster = :cluster and ended_at is null"""


class WatchQueries:
    """Which replica watches which cluster: leases that are taken, renewed and given back."""

    _database: Database

    def register_clusters(self, records: Sequence[ClusterRecord]) -> None:
        """Make the rows of clusters that have none, so that somebody can take them."""
        rows = [params_of(record, _CLUSTER_FIELDS) for record in records]

        def job(tx: Transaction) -> None:
            now = {"updated_at": format_time(tx.now)}
            tx.insert("clusters", [row | now for row in rows], "on conflict do nothing")

        self._database.write(job)

    def watch_view(self, lease: timedelta) -> WatchView:
        """Who watches, and what is watched. A replica is alive for a lease's time after a sign."""

        def job(tx: Transaction) -> WatchView:
            replicas = tx.run(
                """select worker_id from workers
                   where state = 'running' and role <> 'worker' and heartbeat_at > :since""",
                since=format_time(tx.now - lease),
            )
            rows = tx.run(f"select {', '.join(_LEASE_FIELDS)} from clusters")
            leases = (WatchLease(**values_of(_LEASE_FIELDS, row)) for row in rows)
            return WatchView(
                now=tx.now, replicas=tuple(row[0] for row in replicas), leases=tuple(leases)
            )

        return self._database.read(job)

    def acquire_clusters(
        self, worker_id: str, wanted: Sequence[WatchLease], lease: timedelta
    ) -> list[str]:
        """Take the leases that are still as they were seen; returns the clusters that are ours.

        A worker that has given everything back (leave_clusters) takes nothing any more.
        """

        def job(tx: Transaction) -> list[str]:
            # Locked: this may still be under way in another thread when everything is given back.
            statement = f"select state from workers i where worker_id = :worker_id {tx.lock_rows}"
            if tx.run(statement, worker_id=worker_id) not in ([], [("running",)]):
                return []
            taken = [
                seen
                for seen in sorted(wanted, key=lambda seen: seen.cluster)
                if tx.run(
                    """update clusters
                       set owner = :worker_id, lease_epoch = lease_epoch + 1,
                           lease_expires_at = :until
                       where cluster = :cluster and owner is not distinct from :owner
                         and lease_epoch = :lease_epoch
                         and lease_expires_at is not distinct from :lease_expires_at
                       returning 1""",
                    **params_of(seen, _LEASE_FIELDS),
                    worker_id=worker_id,
                    until=format_time(tx.now + lease),
                )
            ]
            for seen in taken:
                # Who had it, and did not say when it stopped, was well at its last sign of life.
                tx.run(_END_TURN, cluster=seen.cluster, ended_at=None)
            now = format_time(tx.now)
            mine = {"owner": worker_id, "updated_at": now}
            rows = [{"cluster": s.cluster, "lease_epoch": s.lease_epoch + 1, **mine} for s in taken]
            tx.insert("cluster_watches", rows, _IF_TURN_IS_THERE)
            return [seen.cluster for seen in taken]

        return self._database.write(job) if wanted else []

    def renew_clusters(
        self, worker: WorkerRecord, connected: Mapping[str, datetime], lease: timedelta
    ) -> set[str]:
        """Give a sign of life and extend every lease of a replica; returns what it still holds.

        `connected` says since when it has had the streams of its clusters open.
        """

        def job(tx: Transaction) -> set[str]:
            _save_worker(tx, worker)
            now = format_time(tx.now)
            held = tx.run(
                # Without a watch there is no sign of its life: a gap begins at the last one.
                """update clusters
                   set lease_expires_at = :until,
                       updated_at = case when exists (
                           select 1 from cluster_watches w
                           where w.cluster = clusters.cluster
                             and w.lease_epoch = clusters.lease_epoch
                             and w.connected_at is not null) then :now else updated_at end
                   where owner = :worker_id returning cluster""",
                worker_id=worker.worker_id,
                until=format_time(tx.now + lease),
                now=now,
            )
            unknown = tx.run(
                """update cluster_watches set updated_at = :now
                   where owner = :worker_id and ended_at is null
                   returning cluster, lease_epoch, connected_at""",
                worker_id=worker.worker_id,
                now=now,
            )
            for cluster, epoch, connected_at in unknown:
                if connected_at is None and cluster in connected:
                    tx.run(
                        """update cluster_watches set connected_at = :connected_at
                           where cluster = :cluster and lease_epoch = :epoch""",
                        connected_at=format_time(connected[cluster]),
                        cluster=cluster,
                        epoch=epoch,
                    )
            return {cluster for (cluster,) in held}

        return self._database.write(job)

    def release_clusters(self, worker: WorkerRecord, clusters: Iterable[str]) -> None:
        """Give leases back, for others to take at once; tells the others."""

        def job(tx: Transaction) -> None:
            _save_worker(tx, worker)
            for cluster in sorted(clusters):
                released = tx.run(
                    """update clusters set owner = null, lease_expires_at = null
                       where cluster = :cluster and owner = :worker_id returning 1""",
                    cluster=cluster,
                    worker_id=worker.worker_id,
                )
                if released:
                    tx.run(_END_TURN, cluster=cluster, ended_at=format_time(tx.now))

        self._database.write(job)
        self._database.notify(WATCHES)

    def leave_clusters(self, worker: WorkerRecord) -> None:
        """Give every lease back, also one that the worker has not heard of; tells the others."""

        def job(tx: Transaction) -> None:
            _save_worker(tx, worker)
            _release_all(tx, worker.worker_id, format_time(tx.now))

        self._database.write(job)
        self._database.notify(WATCHES)

    def bury_replicas(self, dead: Iterable[str]) -> None:
        """Take the leases of replicas that are known to be dead, and count them no more.

        Their clusters are free at once, their incidents with the next `release_expired`.
        """

        def job(tx: Transaction) -> None:
            for worker_id in sorted(dead):
                tx.run(
                    "update workers set state = 'stopped' where worker_id = :worker_id",
                    worker_id=worker_id,
                )
                # What it did not say itself: it was well at its last sign of life.
                _release_all(tx, worker_id, None)
                tx.run(
                    """update incidents set lease_expires_at = :now
                       where status = 'RUNNING' and claimed_by = :worker_id""",
                    now=format_time(tx.now),
                    worker_id=worker_id,
                )

        self._database.write(job)
        self._database.notify(WATCHES)

    def turns_of_others(
        self, cluster: str, since: datetime, ours: Collection[str]
    ) -> tuple[list[ClusterTurn], list[tuple[datetime, datetime]]]:
        """What others watched of a cluster since a time, and from when until when its gaps were.

        One that has not ended counts if the owner itself says so: another's may be left over.
        """
        tail = "where cluster = :cluster and (ended_at is null or ended_at > :since)"
        moment = {"cluster": cluster, "since": format_time(since)}
        turns = fetch(
            self._database, ClusterTurn, _TURN_FIELDS, f"from cluster_watches {tail}", **moment
        )
        tail = "from cluster_gaps where cluster = :cluster and restored_at > :since"
        gaps = fetch(self._database, ClusterGap, _GAP_FIELDS, tail, **moment)
        others = [turn for turn in turns if turn.owner not in ours]
        ended = [(gap.lost_at, gap.restored_at) for gap in gaps if gap.restored_at]
        statement = """select stream_lost_at from clusters join cluster_watches w
                       using (cluster, lease_epoch)
                       where cluster = :cluster and w.connected_at <= stream_lost_at"""
        rows = self._database.read(lambda tx: tx.run(statement, cluster=cluster))
        for_ever = datetime.max.replace(tzinfo=UTC)
        return others, ended + [(value_of("stream_lost_at", lost), for_ever) for (lost,) in rows]

    def live_workers(self, within: timedelta) -> list[str]:
        """Workers of any role that gave a sign of life, and did not say good-bye, within a time."""

        def job(tx: Transaction) -> list[str]:
            rows = tx.run(
                """select worker_id from workers
                   where state <> 'stopped' and heartbeat_at > :since""",
                since=format_time(tx.now - within),
            )
            return [row[0] for row in rows]

        return self._database.read(job)


def _release_all(tx: Transaction, worker_id: str, ended_at: str | None) -> None:
    released = tx.run(
        """update clusters set owner = null, lease_expires_at = null
           where owner = :worker_id returning cluster""",
        worker_id=worker_id,
    )
    for (cluster,) in sorted(released):
        tx.run(_END_TURN, cluster=cluster, ended_at=ended_at)


def worker_row(worker: WorkerRecord, now: datetime) -> dict[str, Any]:
    return params_of(worker, _WORKER_FIELDS) | {"heartbeat_at": format_time(now)}


def _save_worker(tx: Transaction, worker: WorkerRecord) -> None:
    tx.insert("workers", [worker_row(worker, tx.now)], _IF_WORKER_IS_THERE)


# ============================================================================
# 6. Stores
# What differs between stores is their Database.
# ============================================================================


# The tables that hold an incident, parents first, and the column with its id.
_INCIDENT_TABLES = {
    "fault_events": "event_id",
    "incidents": "incident_id",
    "incident_transitions": "incident_id",
    "agent_executions": "incident_id",
    "triage_reports": "incident_id",
    "notifications": "incident_id",
}


class _Housekeeping:
    """Deleting what is old, copying what is there."""

    _database: Database

    def prune(
        self, statuses: Collection[IncidentStatus], before: datetime, limit: int = 500
    ) -> list[str]:
        """Delete at most `limit` terminal incidents completed before a time; returns their ids."""
        if not TERMINAL.issuperset(statuses):
            raise StoreError("only incidents in a terminal status can be pruned")
        condition, names = status_in(statuses)

        def job(tx: Transaction) -> list[str]:
            rows = tx.run(
                f"""select incident_id from incidents i
                    where {condition}
                      and incident_id < :last_id and completed_at < :before
                    order by incident_id limit :limit""",
                **names,
                last_id=id_floor(before + timedelta(seconds=1)),
                before=format_time(before),
                limit=limit,
            )
            old = [incident_id for (incident_id,) in rows]
            for table, key in reversed(_INCIDENT_TABLES.items()):
                tx.delete(table, key, old)
            return old

        return self._database.write(job) if statuses else []

    def backup(self, path: Path) -> None:
        """Write a consistent copy to a path that must not exist."""
        self._database.backup(path)

    def close(self) -> None:
        self._database.close()


class StateStore(
    IncidentQueries, OutboxQueries, ListQueries, ClusterQueries, WatchQueries, _Housekeeping
):
    """Where events, incidents and what became of them are kept; incidents are the queue.

    What differs between stores is their Database; the statements are these for all of them.
    Methods are synchronous and may be called from any thread. What they wrote is durable when
    they return. StoreUnavailable means that nothing was written and that trying again may work;
    of CommitUnknown, a kind of it, only the second is certain.

    The program does not call all of them yet: `list_transitions`, `list_executions`, `prune` and
    `backup` are parts of the contract that only tests use.
    """

    shared_between_processes: ClassVar[bool] = True  # several processes may use it at once
    shared_between_replicas: ClassVar[bool] = False  # on several hosts: clusters are leased
    can_be_copied: ClassVar[bool] = True  # by `backup`
    batches_are_atomic: ClassVar[bool] = True  # create_incidents stores all or nothing
    alerts_are_kept: ClassVar[bool] = True  # what was said of failures in a row, over a restart


class SQLiteStore(StateStore):
    """A StateStore in one SQLite file. Several processes on this host may share the file."""

    def __init__(self, path: Path) -> None:
        super().__init__(SQLiteDatabase(path))


class PostgresStore(StateStore):
    """A StateStore on a PostgreSQL server, for any number of replicas on any hosts."""

    POLL = (0.5, 1.0)
    shared_between_replicas = True
    can_be_copied = False

    def __init__(self, server: PostgresSettings, name: str) -> None:
        """`name` is what the server's list of connections shows (application_name)."""
        database = PostgresDatabase(server, name)
        try:
            super().__init__(database)
        except BaseException:
            database.close()
            raise


def _document_of(tx: Transaction, incident_id: str) -> dict[str, Any] | None:
    incident = find_incident(tx, incident_id)
    return None if incident is None else incident_document(incident)


class FilesystemStore(StateStore):
    """The earlier layout behind the same interface: a file `<root>/<id>/incident.json` each.

    The files are read once, at the start; the queue and the claims are in memory. So one process
    only may use it (a lock file refuses a second), what happens to several incidents at once is
    not written all or nothing, and each event costs an fsync of its own. States of clusters and
    workers are not kept, nor what was said of failures in a row: after a restart it is said again.
    Use SQLite for anything that matters.
    """

    shared_between_processes: ClassVar[bool] = False
    batches_are_atomic: ClassVar[bool] = False
    alerts_are_kept: ClassVar[bool] = False

    def __init__(self, root: Path) -> None:
        advice = "a filesystem store serves one process; use SQLite"
        super().__init__(
            MirroredDatabase(root, "incident.json", _INCIDENT_TABLES, _document_of, advice=advice)
        )


# ============================================================================
# 7. Calls
# The calls of a store wait for a disk or a server: they are made on threads.
# ============================================================================


async def _on_thread(threads: ThreadPoolExecutor, work: Callable[[], T]) -> T:
    """What the host runs out of (threads, memory, locks) is as bad for a store as a full disk."""
    try:
        return await asyncio.get_running_loop().run_in_executor(threads, work)
    except (OSError, RuntimeError, MemoryError) as error:
        raise StoreUnavailable(f"the database cannot be asked now: {error!r}") from error


class AsyncStore:
    """Calls a StateStore from async code, on a few threads of its own.

    A call that has begun is carried out even if nobody waits for it any more.
    """

    def __init__(self, store: StateStore, threads: int = 8) -> None:
        self.sync = store
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix="store")

    async def call(self, method: Callable[..., T], *args: Any, **options: Any) -> T:
        return await _on_thread(self._threads, functools.partial(method, *args, **options))

    def close(self) -> None:
        self._threads.shutdown()
        self.sync.close()


class Spool:
    """Events that were accepted while the database was away, in a file of this replica's own."""

    def __init__(self, folder: Path, limit: int, worker: WorkerRecord) -> None:
        """Open a file in `folder` for at most `limit` bytes; raises StoreUnavailable.

        A file that a dead replica left is taken over: the workers that it names are dead.
        """
        owner = worker_row(worker, utc_now())
        self._rows = RowSpool(folder, limit, "fault_events", key="event_id", owner=owner)
        self._threads = ThreadPoolExecutor(1, thread_name_prefix="spool")
        self.predecessors = frozenset(str(row["worker_id"]) for row in self._rows.earlier_owners)
        self.workers = self.predecessors | {worker.worker_id}
        self.filled, self.emptied = asyncio.Event(), asyncio.Event()
        self._look()

    def __len__(self) -> int:
        return self._rows.count

    def _look(self) -> None:
        now, no_more = self.filled, self.emptied
        if not self._rows.count:
            now, no_more = no_more, now
        now.set()
        no_more.clear()

    async def _run(self, method: Callable[..., T], *args: Any) -> T:
        result = await _on_thread(self._threads, functools.partial(method, *args))
        self._look()
        return result

    async def add(self, events: Sequence[FaultEvent]) -> None:
        """Make events durable; raises StoreUnavailable when the spool is full."""
        await self._run(self._rows.add, [params_of(event, EVENT_FIELDS) for event in events])

    async def oldest(self, limit: int, without: Collection[str]) -> list[FaultEvent]:
        """The next events in their order, but none of some clusters."""
        rows = await self._run(self._rows.oldest, limit, EVENT_FIELDS, "cluster", without)
        return [FaultEvent(**values_of(EVENT_FIELDS, row)) for row in rows]

    async def remove(self, events: Sequence[FaultEvent]) -> None:
        await self._run(self._rows.remove, [event.event_id for event in events])

    def close(self) -> None:
        self._threads.shutdown()
        self._rows.close()
