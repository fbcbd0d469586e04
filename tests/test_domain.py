"""incidents.py, and what it is made of: values and decisions without I/O."""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import incidents
import mcp_client
import sql_database
import state_store
from conftest import MINUTE, NOON, an_event, events_of, in_threads
from fair_queue import QueueLanes
from incidents import QUEUE_DELAYS, MalformedEvent, Severity, SubscribeMode
from incidents import IncidentStatus as S

# --- identifiers ------------------------------------------------------------------------------


def test_ids_are_version_7_uuids_as_rfc_9562_lays_them_out() -> None:
    before = sql_database.utc_now()
    text = sql_database.new_id()
    after = sql_database.utc_now()

    assert re.fullmatch(
        r"[0-9a-f]{8}-[0-9a-f]{4}-7[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}", text
    )
    value = uuid.UUID(text)
    assert value.version == 7
    assert value.variant == uuid.RFC_4122
    milliseconds = value.int >> 80
    assert int(before.timestamp() * 1000) <= milliseconds <= int(after.timestamp() * 1000) + 1


def test_ids_only_grow_and_never_repeat_in_many_threads() -> None:
    batches = in_threads(8, lambda _: [sql_database.new_id() for _ in range(2000)])

    assert all(batch == sorted(batch) for batch in batches)
    assert len({text for batch in batches for text in batch}) == 8 * 2000


def test_ids_grow_although_the_clock_stands_still_or_goes_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    make = sql_database._UUID7()
    times = iter([5_000_000_000, 5_000_000_000, 4_000_000_000, 5_000_001_000])
    monkeypatch.setattr("time.time_ns", lambda: next(times))

    made = [make() for _ in range(4)]

    assert made == sorted(made)
    assert len({text[:18] for text in made}) == 4


def test_the_floor_of_a_time_is_below_every_id_of_that_time_and_above_those_before() -> None:
    text = sql_database.new_id()
    moment = datetime.fromtimestamp((uuid.UUID(text).int >> 80) / 1000, UTC)

    assert sql_database.id_floor(moment) < text
    assert sql_database.id_floor(moment + timedelta(milliseconds=2)) > text
    assert sql_database.id_floor(datetime(1969, 1, 1, tzinfo=UTC)).startswith("00000000-0000-")


# --- times ------------------------------------------------------------------------------------

TIMES = st.datetimes(timezones=st.sampled_from([UTC, timezone(timedelta(hours=5, minutes=30))]))


@given(TIMES)
def test_a_formatted_time_is_read_back_as_the_same_time(moment: datetime) -> None:
    try:
        utc = moment.astimezone(UTC)
    except OverflowError:
        return
    text = sql_database.format_time(moment)

    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z", text)
    assert sql_database.parse_time(text) == utc


@given(TIMES, TIMES)
def test_formatted_times_sort_as_times(one: datetime, other: datetime) -> None:
    try:
        texts = sql_database.format_time(one), sql_database.format_time(other)
    except OverflowError:
        return
    assert (texts[0] < texts[1]) == (one < other)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("2025-12-19T22:11:10+01:00", datetime(2025, 12, 19, 21, 11, 10, tzinfo=UTC)),
        ("2025-12-19T22:11:10Z", datetime(2025, 12, 19, 22, 11, 10, tzinfo=UTC)),
        ("2025-12-19T22:11:10", datetime(2025, 12, 19, 22, 11, 10, tzinfo=UTC)),
        ("0001-01-01T00:00:00Z", datetime(1, 1, 1, tzinfo=UTC)),  # Go's zero time
        ("0001-01-01T00:00:00+14:00", None),
        ("9999-12-31T23:59:59-12:00", None),
        ("", None),
        ("yesterday", None),
        ("\ufffd", None),
        ("2025-13-01T00:00:00Z", None),
    ],
)
def test_times_are_read_with_any_offset_and_what_is_none_is_none(
    text: str, expected: datetime | None
) -> None:
    assert sql_database.parse_time(text) == expected


# --- text from outside ------------------------------------------------------------------------


@given(st.text(alphabet=st.characters(), max_size=50))
def test_clean_text_is_storable_and_cleaning_twice_changes_nothing(text: str) -> None:
    cleaned = sql_database.clean_text(text)

    cleaned.encode("utf-8")
    assert "\x00" not in cleaned
    assert len(cleaned) == len(text)
    assert sql_database.clean_text(cleaned) == cleaned


# --- reading a fault --------------------------------------------------------------------------

FAULT: dict[str, Any] = {  # as a real server sends it
    "subscriptionId": "sub-a49bdae2",
    "cluster": "kind-events-test",
    "faultId": "cfb0dbaa9741da48",
    "faultType": "CrashLoop",
    "severity": "critical",
    "resource": {
        "apiVersion": "v1",
        "kind": "Pod",
        "name": "crash-test-pod",
        "namespace": "default",
        "uid": "2c0f0a33-6c1c-4d1a-9d2a-1f3f0b1e7a11",
    },
    "context": "Container entered CrashLoopBackOff state, restart count: 3",
    "timestamp": "2025-12-19T22:11:10+01:00",
}

KUBERNETES_EVENT: dict[str, Any] = {
    "subscriptionId": "sub-1",
    "cluster": "",
    "event": {
        "namespace": "kube-system",
        "timestamp": "2025-01-15T12:34:56Z",
        "type": "Warning",
        "reason": "BackOff",
        "message": "Back-off restarting failed container",
        "involvedObject": {"apiVersion": "v1", "kind": "Pod", "name": "dns-1"},
        "count": 4,
    },
}


def parse(data: object, mode: SubscribeMode = SubscribeMode.FAULTS, **fields: Any) -> Any:
    return incidents.parse_event(data, mode=mode, cluster="prod", received_at=NOON, **fields)


def test_a_fault_is_read_as_the_server_sends_it() -> None:
    event = parse(FAULT, session_id="s-1", delivery_id="7")

    assert event.cluster == "prod"
    assert event.reported_cluster == "kind-events-test"
    assert (event.session_id, event.delivery_id) == ("s-1", "7")
    assert event.subscription_id == "sub-a49bdae2"
    assert event.fault_fingerprint == "cfb0dbaa9741da48"
    assert (event.fault_type, event.severity) == ("CrashLoop", Severity.CRITICAL)
    assert event.context == FAULT["context"]
    assert event.occurred_at == datetime(2025, 12, 19, 21, 11, 10, tzinfo=UTC)
    assert event.received_at == NOON
    assert event.resource == "Pod/default/crash-test-pod"
    assert event.resource_api_version == "v1"
    assert event.resource_uid == FAULT["resource"]["uid"]
    assert json.loads(event.payload) == FAULT


def test_two_readings_of_one_fault_are_two_events() -> None:
    assert parse(FAULT).event_id != parse(FAULT).event_id


@pytest.mark.parametrize("field", sorted(FAULT))
@pytest.mark.parametrize("value", ["missing", None, 7, 7.5, True, [], {}, ["x"], {"kind": 7}])
def test_a_field_that_is_missing_or_of_a_wrong_type_is_as_good_as_empty(
    field: str, value: object
) -> None:
    data = {name: given for name, given in FAULT.items() if name != field}
    if value != "missing":
        data[field] = value

    event = parse(data)

    assert event.fault_type == ("Unknown" if field == "faultType" else "CrashLoop")
    assert event.severity == (Severity.UNKNOWN if field == "severity" else Severity.CRITICAL)
    assert event.resource_name == ("" if field == "resource" else "crash-test-pod")
    assert json.loads(event.payload) == data


@pytest.mark.parametrize("field", sorted(FAULT["resource"]))
@pytest.mark.parametrize("value", [None, 7, [], {}])
def test_a_resource_may_lack_anything(field: str, value: object) -> None:
    event = parse({**FAULT, "resource": {**FAULT["resource"], field: value}})

    name = {"apiVersion": "api_version"}.get(field, field)
    assert getattr(event, f"resource_{name}") == ""


def test_a_fault_without_any_field_is_still_an_incident() -> None:
    event = parse({})

    assert (event.fault_type, event.severity) == ("Unknown", Severity.UNKNOWN)
    assert (event.resource, event.context, event.occurred_at) == ("?", "", None)


@pytest.mark.parametrize("data", [None, "text", 7, 7.5, True, [], [FAULT]])
def test_what_is_no_object_is_malformed_and_the_message_names_its_type(data: object) -> None:
    with pytest.raises(MalformedEvent, match=type(data).__name__):
        parse(data)


def test_severity_is_read_in_any_case_and_an_unknown_word_is_unknown() -> None:
    assert parse({**FAULT, "severity": "WARNING"}).severity is Severity.WARNING
    assert parse({**FAULT, "severity": "apocalyptic"}).severity is Severity.UNKNOWN


def test_nul_and_lone_surrogates_become_replacement_characters_everywhere() -> None:
    hostile = "a\x00b\ud800c"
    event = parse(
        {
            **{name: hostile for name in FAULT if name != "resource"},
            "resource": dict.fromkeys(FAULT["resource"], hostile),
            hostile: {"deep": [hostile, {"er": hostile}]},
        },
        session_id=hostile,
    )

    texts = [getattr(event, name) for name in state_store.EVENT_FIELDS]
    for text in filter(lambda value: isinstance(value, str), texts):
        text.encode("utf-8")
        assert "\x00" not in text
        assert r"\u0000" not in text
    assert event.fault_type == event.resource_name == "a\ufffdb\ufffdc"
    assert json.loads(event.payload)["a\ufffdb\ufffdc"] == {
        "deep": ["a\ufffdb\ufffdc", {"er": "a\ufffdb\ufffdc"}]
    }


def test_numbers_that_json_does_not_know_do_not_make_the_payload_invalid() -> None:
    data = json.loads('{"faultType": "X", "load": [NaN, 1e999, -1e999, 1.5]}')

    def refuse(word: str) -> None:
        raise AssertionError(word)

    assert json.loads(parse(data).payload, parse_constant=refuse)["load"] == [None, None, None, 1.5]


def test_names_are_bounded_and_context_and_payload_are_kept_whole() -> None:
    context = "x" * 1_000_000
    event = parse({**FAULT, "faultType": "T" * 10_000, "context": context})

    assert len(event.fault_type) == incidents.NAME_LIMIT
    assert event.context == context
    assert len(event.payload) > 1_000_000


def test_ansi_sequences_are_kept_as_sent() -> None:
    assert parse({**FAULT, "context": "\x1b[31mred"}).context == "\x1b[31mred"


def test_nesting_too_deep_is_malformed_and_moderate_nesting_is_not() -> None:
    def nested(depth: int) -> dict[str, Any]:
        data: dict[str, Any] = {}
        for _ in range(depth):
            data = {"n": data}
        return data

    assert parse(nested(100)).fault_type == "Unknown"
    with pytest.raises(MalformedEvent, match="nested"):
        parse(nested(100_000))


def test_a_delivery_id_counts_only_where_it_can_tell_messages_apart() -> None:
    assert parse(FAULT, session_id="s", delivery_id="7").delivery_id == "7"
    assert parse(FAULT, session_id="s", delivery_id="").delivery_id is None
    assert parse(FAULT, session_id="s", delivery_id=None).delivery_id is None
    assert parse(FAULT, session_id="", delivery_id="7").delivery_id is None
    assert parse(FAULT, session_id="s", delivery_id="7" * 10_000).delivery_id is None
    assert parse(FAULT, session_id="s", delivery_id="7\x00").delivery_id is None


def test_a_kubernetes_event_is_read_as_the_server_sends_it() -> None:
    event = parse(KUBERNETES_EVENT, SubscribeMode.EVENTS)

    assert (event.fault_type, event.severity) == ("BackOff", Severity.WARNING)
    assert event.context == "Back-off restarting failed container"
    assert event.resource == "Pod/kube-system/dns-1"
    assert event.occurred_at == datetime(2025, 1, 15, 12, 34, 56, tzinfo=UTC)
    assert event.fault_fingerprint == ""


@pytest.mark.parametrize("event", ["missing", None, 7, "x", [], {}])
def test_an_events_notification_without_its_event_is_malformed(event: object) -> None:
    data = {"cluster": ""} if event == "missing" else {"event": event}
    with pytest.raises(MalformedEvent, match="event"):
        parse(data, SubscribeMode.EVENTS)


@pytest.mark.parametrize("field", sorted(KUBERNETES_EVENT["event"]))
def test_a_kubernetes_event_may_lack_anything(field: str) -> None:
    event = {name: value for name, value in KUBERNETES_EVENT["event"].items() if name != field}

    assert parse({"event": {**event, "x": 1}}, SubscribeMode.EVENTS).fault_type


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(alphabet=st.characters()),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
FIELDS = st.sampled_from([*FAULT, *KUBERNETES_EVENT, "other"])


@given(st.dictionaries(FIELDS, JSON, max_size=8) | JSON, st.sampled_from(SubscribeMode))
def test_whatever_a_server_sends_is_an_event_or_malformed(data: object, mode: Any) -> None:
    try:
        event = parse(data, mode)
    except MalformedEvent:
        return
    assert event.fault_type
    assert isinstance(json.loads(event.payload), dict)
    for name in state_store.EVENT_FIELDS:
        if isinstance(value := getattr(event, name), str):
            assert sql_database.clean_text(value) == value


# --- the states -------------------------------------------------------------------------------


def test_the_ways_between_states_are_those_of_the_design() -> None:
    assert {state: set(ways) for state, ways in incidents.TRANSITIONS.items()} == {
        S.PENDING: {S.RUNNING},
        S.RUNNING: {S.RESOLVED, S.AGENT_FAILED, S.FAILED, S.PENDING},
        S.RESOLVED: set(),
        S.AGENT_FAILED: set(),
        S.FAILED: set(),
        S.SKIPPED: set(),
    }
    assert {S.RESOLVED, S.AGENT_FAILED, S.FAILED, S.SKIPPED} == incidents.TERMINAL
    assert set(S) == set(incidents.TRANSITIONS)


# --- backoff ----------------------------------------------------------------------------------


@given(st.integers(0, 10_000), st.floats(0.01, 10), st.floats(10, 1000))
def test_backoff_stays_between_its_base_and_its_growing_bound(
    failures: int, base: float, ceiling: float
) -> None:
    wait = mcp_client.backoff(failures, base=base, ceiling=ceiling)

    assert base <= wait <= min(ceiling, base * 2.0 ** min(failures, 1000)) + 1e-9


def test_backoff_differs_between_clients() -> None:
    assert len({mcp_client.backoff(6) for _ in range(50)}) > 40


# --- the order of claims ----------------------------------------------------------------------


class Queue:
    """A queue in memory that orders by the keys of QueueLanes, as the stores do."""

    def __init__(self) -> None:
        self.lanes = QueueLanes(QUEUE_DELAYS)
        self.pending: list[tuple[int, str, Any]] = []
        self.now = NOON

    def add(self, *events: Any) -> None:
        keys = self.lanes.assign(
            [incidents.lane_of(event) for event in events],
            now=incidents.microseconds(self.now),
            head=min(self.pending)[0] if self.pending else None,
            newest_pending=self.newest,
        )
        self.pending += [(key, e.event_id, e) for key, e in zip(keys, events, strict=True)]

    def newest(self, clusters: Sequence[str]) -> dict[str, int]:
        ordered = sorted(self.pending, key=lambda pending: pending[:2])
        return {e.cluster: key for key, _, e in ordered if e.cluster in clusters}

    def claim(self, count: int = 1) -> list[Any]:
        self.pending.sort()
        taken, self.pending = self.pending[:count], self.pending[count:]
        return [event for _, _, event in taken]


def test_the_most_urgent_goes_first() -> None:
    queue = Queue()
    queue.add(*(an_event(f"c-{severity}", severity=severity) for severity in reversed(Severity)))

    order = [event.severity for event in queue.claim(4)]

    assert order[0] is Severity.CRITICAL
    assert order[3] is Severity.INFO


def test_within_a_cluster_and_severity_the_first_come_is_the_first_served() -> None:
    queue = Queue()
    events = events_of("a", 50)
    queue.add(*events[:20])
    queue.add(*events[20:])

    assert queue.claim(50) == events


def test_500_quiet_clusters_behind_10000_events_of_a_noisy_one_are_served_within_1000_claims() -> (
    None
):
    queue = Queue()
    queue.add(*events_of("noisy", 10_000))
    queue.add(*(an_event(f"quiet-{number}") for number in range(500)))

    served = {event.cluster for event in queue.claim(1000)}

    assert len(served - {"noisy"}) == 500


def test_a_noisy_cluster_that_never_stops_starves_nobody() -> None:
    queue = Queue()
    queue.add(*events_of("noisy", 1000))
    queue.add(*events_of("quiet", 3))
    waits = 0
    while any(event.cluster == "quiet" for _, _, event in queue.pending):
        queue.claim()
        queue.now += timedelta(seconds=10)
        queue.add(*events_of("noisy", 2))
        waits += 1

    assert waits < 20


def test_a_low_severity_ages_until_it_is_served() -> None:
    """With one critical a minute and one claim a minute, an info waits for its delay only."""
    queue = Queue()
    low = an_event("a", severity=Severity.INFO)
    queue.add(low)
    for minute in range(120):
        queue.add(an_event(f"c{minute % 7}"))
        if low in queue.claim():
            break
        queue.now += MINUTE
    else:
        pytest.fail("the info was starved")
    assert minute <= 46  # its delay of 30 minutes, and the 15 by which others may overtake


def test_newcomers_overtake_what_waits_by_15_minutes_at_most() -> None:
    queue = Queue()
    old = events_of("old", 100)
    queue.add(*old)
    queue.now += 16 * MINUTE
    new = an_event("new")
    queue.add(new)

    order = queue.claim(101)

    # The head was 16 minutes old: what began more than 15 minutes ago is not overtaken.
    assert order.index(new) >= 2
    assert order.index(new) < 10


def test_a_lane_starts_afresh_when_its_backlog_was_drained() -> None:
    queue = Queue()
    queue.add(*events_of("noisy", 10_000))
    queue.add(*events_of("other", 50))
    queue.pending = [entry for entry in queue.pending if entry[2].cluster != "noisy"]

    queue.add(first := an_event("noisy"))

    assert first in queue.claim(3)


def test_everything_starts_afresh_when_the_queue_is_empty() -> None:
    queue = Queue()
    queue.add(*events_of("noisy", 10_000))
    queue.claim(10_000)
    queue.add(an_event("noisy"))

    assert queue.pending[0][0] == incidents.microseconds(queue.now)


def test_lanes_may_be_cleared_by_another_thread_at_any_moment() -> None:
    class ClearedOnceSeen(dict[Any, Any]):
        def __contains__(self, key: object) -> bool:
            found = super().__contains__(key)
            self.clear()
            return found

    lanes = QueueLanes(QUEUE_DELAYS)
    lanes._last = ClearedOnceSeen({("a", Severity.CRITICAL): 1})
    keys = lanes.assign(
        [("a", Severity.CRITICAL)] * 2, now=10, head=5, newest_pending=lambda _: {"a": 1}
    )
    assert keys[0] < keys[1]


def test_lanes_go_on_where_they_were_after_a_restart() -> None:
    queue = Queue()
    queue.add(*events_of("noisy", 100))
    newest = max(key for key, _, _ in queue.pending)
    queue.lanes = QueueLanes(QUEUE_DELAYS, [("noisy", Severity.CRITICAL, newest)])

    queue.add(an_event("noisy"))

    assert max(key for key, _, _ in queue.pending) > newest


STEPS = st.lists(
    st.tuples(
        st.integers(0, 3),  # claims before
        st.integers(0, 40),  # minutes that pass
        st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from(Severity)), max_size=6),
    ),
    max_size=12,
)


@settings(max_examples=60)
@given(STEPS)
def test_whatever_arrives_keys_are_unique_in_their_lane_grow_and_respect_the_overtaking_bound(
    steps: Any,
) -> None:
    queue = Queue()
    newest: dict[tuple[str, Severity], int] = {}
    for claims, minutes, arrivals in steps:
        queue.claim(claims)
        queue.now += minutes * MINUTE
        events = [an_event(cluster, severity=severity) for cluster, severity in arrivals]
        queue.add(*events)
        floor = incidents.microseconds(queue.now) - 15 * 60_000_000
        added = {event.event_id for event in events}
        newest = {}
        for key, event_id, event in queue.pending:
            lane = (event.cluster, event.severity)
            if event_id in added:
                assert key >= floor
                assert key > newest.get(lane, 0)  # in the order of their arrival
            newest[lane] = max(newest.get(lane, 0), key)
