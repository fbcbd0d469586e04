"""What nightcrier knows of faults and of their incidents: values and decisions without I/O.

1. Errors: what is wrong with an incident, or a claim of one.
2. Incidents: a fault event, how far its investigation is, and what is kept of both.
3. Notifications: a fault event is read from what a server sent; its texts are storable.
4. Queue: which lane an event waits in, and how long at most.
5. Document: an incident as its agent gets it, in incident.json.

state_store.py keeps these values, and nightcrier.py acts on them; nothing here imports either.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum
from typing import Any, ClassVar

from fair_queue import MINUTE
from sql_database import clean_text, format_time, new_id, parse_time, storable_json

# ============================================================================
# 1. Errors
# Each kind has an exit code; each message says what to do next.
# ============================================================================


class NightcrierError(Exception):
    """Base of everything that nightcrier raises on purpose."""

    exit_code: ClassVar[int] = 1


class LeaseLost(NightcrierError):
    """Somebody else holds, or has finished, the incident: nothing was written."""

    def __init__(self, incident_id: str, attempt: int) -> None:
        super().__init__(f"incident {incident_id}: the lease of attempt {attempt} is gone")


# ============================================================================
# 2. Incidents
# Values that nobody changes. SQL has a table for most of them, with columns of the same names.
# ============================================================================


class IncidentStatus(StrEnum):
    PENDING = "PENDING"
    RUNNING = "RUNNING"
    RESOLVED = "RESOLVED"
    AGENT_FAILED = "AGENT_FAILED"
    FAILED = "FAILED"
    SKIPPED = "SKIPPED"


_S = IncidentStatus
TRANSITIONS: Mapping[IncidentStatus, frozenset[IncidentStatus]] = {
    _S.PENDING: frozenset({_S.RUNNING}),
    # back to PENDING: released on drain, lease ran out, or the agent is tried again
    _S.RUNNING: frozenset({_S.RESOLVED, _S.AGENT_FAILED, _S.FAILED, _S.PENDING}),
    _S.RESOLVED: frozenset(),
    _S.AGENT_FAILED: frozenset(),
    _S.FAILED: frozenset(),
    _S.SKIPPED: frozenset(),
}
TERMINAL = frozenset(status for status, ways_out in TRANSITIONS.items() if not ways_out)


class Severity(StrEnum):
    CRITICAL = "critical"
    WARNING = "warning"
    INFO = "info"
    UNKNOWN = "unknown"


class Outcome(StrEnum):
    """How one run of an agent ended."""

    SUCCEEDED = "succeeded"
    FAILED = "failed"
    TIMED_OUT = "timed_out"
    OUTPUT_INVALID = "output_invalid"
    NOT_STARTED = "not_started"
    LEASE_LOST = "lease_lost"
    CANCELLED = "cancelled"


class SubscribeMode(StrEnum):
    FAULTS = "faults"
    EVENTS = "events"


class Role(StrEnum):
    ALL = "all"
    INGEST = "ingest"
    WORKER = "worker"


@dataclass(frozen=True, slots=True, kw_only=True)
class FaultEvent:
    """What a cluster reported. Texts are storable: no NUL, no lone surrogates, names bounded."""

    event_id: str
    cluster: str
    received_at: datetime
    fault_type: str
    severity: Severity
    reported_cluster: str = ""
    session_id: str = ""
    subscription_id: str = ""
    delivery_id: str | None = None
    fault_fingerprint: str = ""
    context: str = ""
    occurred_at: datetime | None = None
    resource_api_version: str = ""
    resource_kind: str = ""
    resource_namespace: str = ""
    resource_name: str = ""
    resource_uid: str = ""
    payload: str = "{}"

    @property
    def resource(self) -> str:
        """`Kind/namespace/name`, with what is missing left out; for people."""
        parts = (self.resource_kind, self.resource_namespace, self.resource_name)
        return "/".join(part for part in parts if part) or "?"


@dataclass(frozen=True, slots=True, kw_only=True)
class Incident:
    """A fault event and how far its investigation is."""

    event: FaultEvent
    status: IncidentStatus
    queue_key: int
    created_at: datetime
    started_at: datetime | None = None
    completed_at: datetime | None = None
    attempt: int = 0
    attempts_charged: int = 0
    claimed_by: str | None = None
    lease_expires_at: datetime | None = None
    exit_code: int | None = None
    failure_reason: str | None = None

    @property
    def incident_id(self) -> str:
        """An incident has the id of its event: one event, one incident."""
        return self.event.event_id

    @property
    def cluster(self) -> str:
        return self.event.cluster


@dataclass(frozen=True, slots=True, kw_only=True)
class Transition:
    seq: int
    from_status: IncidentStatus
    to_status: IncidentStatus
    at: datetime
    worker_id: str | None
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class AgentExecution:
    """One run of an agent; `completed_at` and `outcome` come together."""

    execution_id: str
    incident_id: str
    attempt: int
    cluster: str
    worker_id: str
    host: str
    runtime: str
    agent: str
    started_at: datetime
    pid: int | None = None
    process_started_at: datetime | None = None
    agent_version: str | None = None
    model: str | None = None
    prompt_sha256: str | None = None
    workspace: str | None = None
    completed_at: datetime | None = None
    exit_code: int | None = None
    signal: str | None = None
    outcome: Outcome | None = None
    error_message: str | None = None
    log_paths: str | None = None
    input_tokens: int | None = None
    output_tokens: int | None = None
    cost_usd: float | None = None
    usage: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class TriageReport:
    report_id: str
    generated_at: datetime
    report_markdown: str
    root_cause: str | None = None
    confidence: str | None = None
    report_html: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """How an attempt ended, to be written in one transaction.

    An `AGENT_FAILED` goes back to the queue instead, after `retry_delay`, as long as fewer than
    `agent_retries` such retries have been made of the incident.
    """

    status: IncidentStatus
    execution: AgentExecution | None
    report: TriageReport | None = None
    exit_code: int | None = None
    failure_reason: str | None = None
    agent_retries: int = 0
    retry_delay: timedelta = timedelta(0)


@dataclass(frozen=True, slots=True, kw_only=True)
class IncidentFilter:
    """Which incidents to list; what is None or empty does not restrict."""

    cluster: str | None = None
    resource_kind: str | None = None
    resource_namespace: str | None = None
    resource_name: str | None = None
    severity: Severity | None = None
    fault_type: str | None = None
    statuses: frozenset[IncidentStatus] = frozenset()
    created_from: datetime | None = None  # inclusive
    created_before: datetime | None = None  # exclusive


@dataclass(frozen=True, slots=True, kw_only=True)
class IncidentPage:
    """Newest first. `cursor` continues behind the last one; None: there are no more."""

    incidents: tuple[Incident, ...]
    cursor: str | None


class ConnectionState(StrEnum):
    DISCONNECTED = "disconnected"
    CONNECTING = "connecting"
    SUBSCRIBING = "subscribing"
    ACTIVE = "active"
    DEGRADED = "degraded"
    FAILED = "failed"
    STANDBY = "standby"


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterRecord:
    """What is known of the watch of one cluster, as stored."""

    cluster: str
    endpoint: str
    labels: str = "{}"
    triage_enabled: bool = True
    connection_state: ConnectionState = ConnectionState.DISCONNECTED
    protocol_version: str | None = None
    session_id: str | None = None
    subscription_id: str | None = None
    connected_at: datetime | None = None
    stream_lost_at: datetime | None = None
    last_event_at: datetime | None = None
    events_total: int = 0
    malformed_total: int = 0
    last_error: str | None = None
    updated_at: datetime | None = None
    owner: str | None = None  # the replica that watches, where replicas share the clusters


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterGap:
    """A time in which the faults of a cluster could not be received."""

    cluster: str
    lost_at: datetime
    restored_at: datetime | None
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerRecord:
    """A running nightcrier, as other people see it in the database."""

    worker_id: str
    host: str
    pid: int
    role: Role
    version: str
    started_at: datetime
    state: str = "running"  # running | draining | stopped


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """Something to tell people, as it waits in the outbox for one sink (table `notifications`).

    `attempt` counts the claims, and is the fencing token of the one that holds it.
    """

    notification_id: str
    incident_id: str | None
    kind: str
    sink: str
    payload: str
    attempt: int
    created_at: datetime
    claimed_by: str | None = None


# ============================================================================
# 3. Notifications
# What a server sends is untrusted: what is missing is empty, and what is too long is cut off.
# ============================================================================


NAME_LIMIT = 512  # characters; names are indexed, and PostgreSQL bounds what it can index
_INDEXED_ID_LIMIT = 1_024  # bytes; two of them and a cluster's name fit in one row of an index


class MalformedEvent(NightcrierError):
    """A notification that cannot be an incident; the message says why."""


def _text_of(mapping: Mapping[str, Any], key: str, limit: int | None = NAME_LIMIT) -> str:
    """A text field; one that is missing or of another type is the same as empty."""
    value = mapping.get(key)
    return value[:limit] if isinstance(value, str) else ""


def as_mapping(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def parse_event(
    data: object,
    *,
    mode: SubscribeMode,
    cluster: str,
    received_at: datetime,
    session_id: str = "",
    delivery_id: str | None = None,
) -> FaultEvent:
    """Read `params.data` of a `kubernetes/faults` or `kubernetes/events` notification.

    A fault that lacks optional fields is still an event. Only what is no JSON object, or a
    Kubernetes event without its `event`, raises MalformedEvent. `cluster` is the configured name:
    the server's own may be empty, and is not unique.
    """
    if not isinstance(data, dict):
        raise MalformedEvent(f"params.data is {type(data).__name__}, not an object")
    try:
        data, payload = storable_json(data)
    except RecursionError:
        raise MalformedEvent("params.data is nested too deeply") from None
    common: dict[str, Any] = {
        "event_id": new_id(),
        "cluster": cluster,
        "received_at": received_at,
        "session_id": clean_text(session_id, _INDEXED_ID_LIMIT),
        "delivery_id": _delivery_id(session_id, delivery_id),
        "reported_cluster": _text_of(data, "cluster"),
        "subscription_id": _text_of(data, "subscriptionId"),
        "payload": payload,
    }
    if mode is SubscribeMode.EVENTS:
        return _parse_kubernetes_event(data, common)
    resource = as_mapping(data.get("resource"))
    severity = _text_of(data, "severity").lower()
    return FaultEvent(
        **common,
        fault_type=_text_of(data, "faultType") or "Unknown",
        severity=Severity(severity) if severity in set(Severity) else Severity.UNKNOWN,
        fault_fingerprint=_text_of(data, "faultId"),
        context=_text_of(data, "context", None),
        occurred_at=parse_time(_text_of(data, "timestamp")),
        **_resource_fields(resource),
    )


def _delivery_id(session_id: str, given: str | None) -> str | None:
    """An id tells messages apart only within a session, and only if nothing is cut off it."""
    if not given or not session_id or given != clean_text(given, NAME_LIMIT):
        return None
    whole = session_id == clean_text(session_id, _INDEXED_ID_LIMIT)
    return given if whole and len((session_id + given).encode()) <= 2 * _INDEXED_ID_LIMIT else None


def _parse_kubernetes_event(data: Mapping[str, Any], common: Mapping[str, Any]) -> FaultEvent:
    """Mode `events`: the reason of the Kubernetes event is the fault type."""
    event = as_mapping(data.get("event"))
    if not event:
        raise MalformedEvent("params.data.event is missing")
    involved = as_mapping(event.get("involvedObject"))
    resource = _resource_fields(involved)
    resource["resource_namespace"] = resource["resource_namespace"] or _text_of(event, "namespace")
    kinds = {"Warning": Severity.WARNING, "Normal": Severity.INFO}
    return FaultEvent(
        **common,
        fault_type=_text_of(event, "reason") or "Unknown",
        severity=kinds.get(_text_of(event, "type"), Severity.UNKNOWN),
        context=_text_of(event, "message", None),
        occurred_at=parse_time(_text_of(event, "timestamp")),
        **resource,
    )


def _resource_fields(resource: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "resource_api_version": _text_of(resource, "apiVersion"),
        "resource_kind": _text_of(resource, "kind"),
        "resource_namespace": _text_of(resource, "namespace"),
        "resource_name": _text_of(resource, "name"),
        "resource_uid": _text_of(resource, "uid"),
    }


# ============================================================================
# 4. Queue
# How long a fault waits at most behind more urgent ones, and the unit of the key.
# ============================================================================


QUEUE_DELAYS: Mapping[str, int] = {
    Severity.CRITICAL: 0,
    Severity.WARNING: 5 * MINUTE,
    Severity.UNKNOWN: 5 * MINUTE,  # might be anything: as urgent as a warning
    Severity.INFO: 30 * MINUTE,
}
lane_of = operator.attrgetter("cluster", "severity")  # of the queue, for an event


def microseconds(moment: datetime) -> int:
    """The unit of queue_key."""
    return int(moment.timestamp() * 1_000_000)


# ============================================================================
# 5. Document
# Agents and people's scripts read it: keys and words stay as they are.
# ============================================================================


def _shown(moment: datetime | None) -> str | None:
    return None if moment is None else format_time(moment)


def incident_document(incident: Incident) -> dict[str, Any]:
    """An incident as `incident.json` shows it: keys and status words of the existing nightcrier."""
    event = incident.event
    words = {IncidentStatus.RUNNING: "investigating"}
    return {
        "incidentId": incident.incident_id,
        "faultId": event.fault_fingerprint,
        "triggeringEventId": event.fault_fingerprint,
        "status": words.get(incident.status, incident.status.lower()),
        "createdAt": format_time(incident.created_at),
        "startedAt": _shown(incident.started_at),
        "completedAt": _shown(incident.completed_at),
        "exitCode": incident.exit_code,
        "failureReason": incident.failure_reason,
        "cluster": event.cluster,
        "namespace": event.resource_namespace,
        "resource": {
            "apiVersion": event.resource_api_version,
            "kind": event.resource_kind,
            "namespace": event.resource_namespace,
            "name": event.resource_name,
            "uid": event.resource_uid,
        },
        "faultType": event.fault_type,
        "severity": event.severity,
        "context": event.context,
        "timestamp": _shown(event.occurred_at),
    }
