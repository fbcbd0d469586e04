"""The outbox: what stores promise of it, and the notifier that empties it."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Callable, Sequence
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

import nightcrier
import sql_database
from conftest import (
    EXPIRED,
    LEASE,
    NOON,
    Opener,
    a_config,
    agent_failed,
    an_event,
    an_execution,
    claim_all,
    claim_one,
    dump,
    events_of,
    finished,
    in_threads,
    query,
    resolved,
    wait_until,
)
from incidents import Completion, Incident, LeaseLost, Message, Outcome
from incidents import IncidentStatus as S
from nightcrier import Notifier, sinks_of
from receiver import ACCEPTED, Answer, Received, Receiver, answering
from sql_database import StoreError
from state_store import AsyncStore

NOW = timedelta(0)
MINUTE = timedelta(minutes=1)


@pytest.fixture
def outbox(store: Any) -> Any:
    """A store that tells two sinks of what is resolved."""
    store.sinks = ("slack", "webhook")
    return store


def ended(store: Any, *completions: Callable[..., Completion], **fields: Any) -> list[Incident]:
    """Incidents that ended one after the other, as said."""
    store.create_incidents(events_of("prod", len(completions)))
    claimed = claim_all(store)
    for incident, completion in zip(claimed, completions, strict=True):
        store.complete_incident(incident, completion(incident, **fields))
    return claimed


def messages(store: Any, columns: str = "kind, sink, status, attempt") -> list[tuple[Any, ...]]:
    return query(store, f"select {columns} from notifications order by notification_id")


def claim(store: Any, sink: str = "slack", worker: str = "w1") -> Message:
    found: Message | None = store.claim_message(worker, sink, LEASE)
    assert found is not None
    return found


def failed_to_run(incident: Incident) -> Completion:
    """It was not the agent that failed, but we."""
    execution = finished(an_execution(incident), Outcome.NOT_STARTED, error_message="no disk")
    return Completion(status=S.FAILED, execution=execution, failure_reason="no disk")


# --- what is resolved -----------------------------------------------------------------------------


def test_what_is_resolved_is_put_into_the_outbox_once_for_each_sink(outbox: Any) -> None:
    (incident,) = ended(outbox, resolved)
    assert sorted(messages(outbox)) == [
        ("incident", "slack", "PENDING", 0),
        ("incident", "webhook", "PENDING", 0),
    ]
    message = claim(outbox)
    assert message.incident_id == incident.incident_id
    assert (message.kind, message.sink, message.attempt) == ("incident", "slack", 1)
    told = json.loads(message.payload)
    assert (told["cluster"], told["resource_name"], told["status"]) == ("prod", "web-1", "RESOLVED")
    assert (told["root_cause"], told["confidence"]) == ("The disk is full.", "HIGH")
    with pytest.raises(LeaseLost):
        outbox.complete_incident(incident, resolved(incident))
    assert len(messages(outbox)) == 2


def test_failures_and_retries_are_not_told_one_by_one(outbox: Any) -> None:
    ended(outbox, agent_failed, failed_to_run)
    outbox.create_incidents([an_event()])
    outbox.release_incident(claim_one(outbox), "released")
    assert messages(outbox) == []


def test_without_sinks_nobody_is_told(store: Any) -> None:
    ended(store, resolved)
    assert messages(store) == []
    assert store.next_due("slack") is None


def test_an_outcome_that_is_not_written_is_not_told_either(outbox: Any) -> None:
    outbox.create_incidents([an_event()])
    incident = claim_one(outbox)
    before = dump(outbox)
    bad = resolved(incident, status=S.SKIPPED)
    with pytest.raises(StoreError):
        outbox.complete_incident(incident, bad)
    assert dump(outbox) == before


def test_many_outcomes_at_once_are_told_each(outbox: Any) -> None:
    outbox.create_incidents(events_of("prod", 5))
    claimed = claim_all(outbox)
    outbox.complete_incidents([(incident, resolved(incident)) for incident in claimed])
    told = [message[0] for message in messages(outbox, "incident_id") if message[0]]
    assert sorted(told) == sorted([incident.incident_id for incident in claimed] * 2)


def test_an_outcome_wakes_whoever_tells(outbox: Any) -> None:
    ends = []
    outbox.on_ended = lambda: ends.append(messages(outbox))
    ended(outbox, resolved)
    assert len(ends[0]) == 2, "called when they can be read"


# --- claims ---------------------------------------------------------------------------------------


def test_a_message_is_given_to_one_at_a_time_and_only_for_its_sink(outbox: Any) -> None:
    ended(outbox, resolved)
    assert outbox.claim_message("w1", "pager", LEASE) is None
    assert outbox.next_due("slack") <= NOW
    claim(outbox)
    assert outbox.claim_message("w2", "slack", LEASE) is None
    assert NOW < outbox.next_due("slack") <= LEASE
    assert claim(outbox, "webhook").sink == "webhook"


def test_threads_never_get_the_same_message(outbox: Any) -> None:
    ended(outbox, *[resolved] * 12)

    def work(number: int) -> list[str]:
        found = []
        while message := outbox.claim_message(f"w{number}", "slack", LEASE):
            found.append(message.notification_id)
        return found

    taken = [name for names in in_threads(4, work) for name in names]
    assert len(taken) == len(set(taken)) == 12


def test_what_was_sent_is_not_sent_again(outbox: Any) -> None:
    ended(outbox, resolved)
    outbox.message_sent(claim(outbox))
    assert outbox.claim_message("w1", "slack", LEASE) is None
    assert outbox.next_due("slack") is None
    ((status, sent_at, claimed_by, lease),) = query(
        outbox,
        """select status, sent_at, claimed_by, lease_expires_at from notifications
           where sink = 'slack'""",
    )
    assert (status, claimed_by, lease) == ("SENT", None, None)
    assert sent_at is not None


def test_what_failed_is_due_again_after_its_time(outbox: Any) -> None:
    ended(outbox, resolved)
    outbox.message_failed(claim(outbox), "HTTP 503", MINUTE)
    assert outbox.claim_message("w1", "slack", LEASE) is None
    assert NOW < outbox.next_due("slack") <= MINUTE
    outbox.message_failed(claim(outbox, "webhook"), "HTTP 503", NOW)
    assert claim(outbox, "webhook").attempt == 2
    assert ("HTTP 503",) in messages(outbox, "last_error")


def test_what_was_given_up_stays_visible_and_can_be_revived(outbox: Any) -> None:
    ended(outbox, resolved)
    outbox.message_failed(claim(outbox), "HTTP 404: no_service", None)
    assert outbox.next_due("slack") is None
    found = messages(outbox, "sink, status, last_error")
    assert ("slack", "DEAD", "HTTP 404: no_service") in found
    outbox._database.write(
        lambda tx: tx.run(
            "update notifications set status = 'PENDING', attempt = 0 where status = 'DEAD'"
        )
    )
    assert claim(outbox).attempt == 1


def test_after_its_lease_a_message_is_another_workers_alone(outbox: Any) -> None:
    ended(outbox, resolved)
    lost = outbox.claim_message("killed", "slack", EXPIRED)
    message = claim(outbox, worker="heir")
    assert message.attempt == 2
    outbox.message_sent(lost)
    outbox.message_failed(lost, "too late", None)
    assert ("slack", "PENDING", "heir") in messages(outbox, "sink, status, claimed_by")
    outbox.message_sent(message)
    assert ("slack", "SENT", None) in messages(outbox, "sink, status, claimed_by")


def test_what_waits_survives_a_restart(open_again: Opener) -> None:
    store = open_again()
    store.sinks = ("slack", "webhook")
    ended(store, resolved)
    store.message_sent(claim(store))
    store.close()
    again = open_again()
    assert again.next_due("slack") is None
    assert claim(again, "webhook").kind == "incident"


# --- failures in a row ----------------------------------------------------------------------------


def alert(store: Any, sink: str = "slack", threshold: int = 3) -> str | None:
    """What a sink is told of failures, and that it got it."""
    kind: str | None = store.tell_of_failures(sink, threshold)
    if kind is not None:
        message = claim(store, sink)
        assert message.kind == kind
        store.message_sent(message)
    return kind


def test_failures_in_a_row_are_told_once_and_the_next_success_too(store: Any) -> None:
    ended(store, agent_failed, failed_to_run)
    assert alert(store) is None
    ended(store, resolved, agent_failed, failed_to_run)
    assert alert(store) is None, "a success begins the count anew"
    ended(store, agent_failed)
    assert alert(store) == "degraded"
    ended(store, agent_failed)
    assert alert(store) is None, "it is known"
    ended(store, resolved)
    assert alert(store) == "recovered"
    assert alert(store) is None
    ended(store, agent_failed, agent_failed, agent_failed)
    assert alert(store) == "degraded"
    assert [kind for (kind,) in messages(store, "kind")] == ["degraded", "recovered", "degraded"]


def test_an_alert_says_how_many_since_when_and_why(store: Any) -> None:
    def at(minute: int) -> Callable[..., Completion]:
        def completion(incident: Incident) -> Completion:
            execution = an_execution(incident)
            moment = NOON + minute * MINUTE
            if minute in (0, 9):
                done = finished(execution, completed_at=moment)
                return resolved(incident, execution=done)
            reason = {"completed_at": moment, "error_message": f"reason {minute}"}
            return agent_failed(incident, execution=finished(execution, Outcome.FAILED, **reason))

        return completion

    def told(kind: str) -> dict[str, Any]:
        ((payload,),) = query(store, f"select payload from notifications where kind = '{kind}'")
        found: dict[str, Any] = json.loads(payload)
        return found

    def minute(text: str) -> float:
        return (datetime.fromisoformat(text) - NOON) / MINUTE

    ended(store, *map(at, (0, 1, 2, 3, 4)))
    assert alert(store) == "degraded"
    values = told("degraded")
    assert (values["failures"], minute(values["first_failure_at"])) == (4, 1)
    assert minute(values["last_failure_at"]) == 4
    assert values["reasons"] == ["reason 4", "reason 3", "reason 2"]
    ended(store, *map(at, (5, 9)))
    assert alert(store) == "recovered"
    values = told("recovered")
    assert (values["failures"], minute(values["first_failure_at"])) == (5, 1)
    assert (minute(values["last_failure_at"]), minute(values["recovered_at"])) == (5, 9)


def test_a_worker_that_was_killed_is_no_failure_until_its_incident_is_one(store: Any) -> None:
    store.create_incidents(events_of("prod", 3))
    for attempts in (1, 2):
        for incident in store.claim_incidents("killed", 3, EXPIRED):
            store.start_execution(an_execution(incident))
        store.release_expired(2)
        assert alert(store) == (None if attempts == 1 else "degraded")


def test_an_agent_that_is_tried_again_has_not_failed_yet(store: Any) -> None:
    ended(store, agent_failed, agent_failed, agent_failed, agent_retries=1)
    assert alert(store) is None


def test_each_sink_is_told_by_itself_and_nothing_new_before_the_last_arrived(store: Any) -> None:
    ended(store, agent_failed, agent_failed, agent_failed)
    assert store.tell_of_failures("slack", 3) == "degraded"
    assert alert(store, "webhook") == "degraded"
    ended(store, resolved)
    assert store.tell_of_failures("slack", 3) is None, "it does not know of the failures yet"
    assert alert(store, "webhook") == "recovered"
    store.message_sent(claim(store))
    assert alert(store) == "recovered"


def test_a_recovery_of_what_nobody_was_told_is_not_told(store: Any) -> None:
    ended(store, agent_failed, agent_failed, agent_failed)
    assert store.tell_of_failures("slack", 3) == "degraded"
    store.message_failed(claim(store), "HTTP 404", None)
    assert store.tell_of_failures("slack", 3) is None, "said once, although in vain"
    ended(store, resolved)
    assert store.tell_of_failures("slack", 3) is None
    ended(store, agent_failed, agent_failed, agent_failed)
    assert alert(store) == "degraded"


def test_two_that_find_out_at_the_same_time_say_it_once(store: Any) -> None:
    ended(store, agent_failed, agent_failed, agent_failed)
    in_threads(4, lambda _: store.tell_of_failures("slack", 3))
    assert messages(store) == [("degraded", "slack", "PENDING", 0)]


def test_what_was_said_is_known_after_a_restart(open_again: Opener) -> None:
    store = open_again()
    ended(store, agent_failed, agent_failed, agent_failed)
    assert alert(store) == "degraded"
    store.close()
    again = open_again()
    assert alert(again) == (None if again.alerts_are_kept else "degraded")
    ended(again, resolved)
    assert alert(again) == "recovered"


def test_finding_out_reads_no_more_than_the_newest_endings(
    sqlite: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended(sqlite, agent_failed, agent_failed, agent_failed)
    explained = []
    run = sql_database.SQLiteTransaction.run

    def explaining(tx: Any, sql: str, **params: Any) -> Any:
        explained.extend(row[3] for row in run(tx, f"explain query plan {sql}", **params))
        return run(tx, sql, **params)

    monkeypatch.setattr(sql_database.SQLiteTransaction, "run", explaining)
    sqlite.next_due("slack")
    sqlite.tell_of_failures("slack", 3)
    plan = "\n".join(explained)
    for index in ("notifications_due", "agent_executions_completed", "autoindex_notifications"):
        assert index in plan
    assert not re.search("SCAN (?!notifications USING INDEX notifications_due)", plan)
    assert "TEMP B-TREE" not in plan


# --- the notifier ---------------------------------------------------------------------------------


class Telling:
    """A notifier at work for one sink, the webhook, until the block ends."""

    def __init__(self, store: Any, root: Path, receiver: Receiver, **flags: Any) -> None:
        self.config = a_config(root, webhook_url=receiver.url(), **flags)
        self.store, self.receiver = store, receiver

    def until(self, condition: Callable[[], Any], *, drain: bool = True) -> Notifier:
        async def work() -> Notifier:
            calls = AsyncStore(self.store)
            notifier = Notifier(self.config, calls, sinks_of(self.config), "w1")
            task = asyncio.create_task(notifier.run())
            try:
                await asyncio.to_thread(wait_until, condition)
            finally:
                if drain:
                    await nightcrier.drain_notifier(task, notifier, 20.0)
                task.cancel()
                await asyncio.wait([task])
                calls._threads.shutdown()
            return notifier

        return asyncio.run(work())

    def statuses(self) -> list[str]:
        return [status for (status,) in messages(self.store, "status")]

    @property
    def told(self) -> Sequence[Any]:
        return [request.document for request in self.receiver.received]


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pauses after failures are as short as they can be."""
    monkeypatch.setattr(nightcrier, "backoff", lambda *_, **__: 0.01)


def test_what_is_due_is_told_and_what_comes_is_told_at_once(sqlite: Any, tmp_path: Path) -> None:
    sqlite.sinks = ("webhook",)
    ended(sqlite, resolved, resolved)
    with Receiver() as receiver:
        telling = Telling(sqlite, tmp_path, receiver, webhook_secret="s3cret")
        later = iter([lambda: ended(sqlite, resolved)])

        def all_told() -> bool:
            if len(receiver.received) == 2:
                next(later, lambda: None)()
            return len(receiver.received) == 3

        telling.until(all_told)
    assert telling.statuses() == ["SENT"] * 3
    assert {document["kind"] for document in telling.told} == {"incident"}
    assert len({document["id"] for document in telling.told}) == 3
    assert telling.told[0]["data"]["root_cause"] == "The disk is full."
    assert "x-nightcrier-signature" in receiver.received[0].headers


@pytest.mark.usefixtures("quick")
def test_whoever_is_away_is_tried_until_he_is_back(sqlite: Any, tmp_path: Path) -> None:
    sqlite.sinks = ("webhook",)
    (incident,) = ended(sqlite, resolved)
    answers = iter([answering(503), answering(302, b"", "Location: /"), [], [b"garbage"], ACCEPTED])
    with Receiver(lambda _: next(answers)) as receiver:
        telling = Telling(sqlite, tmp_path, receiver)
        telling.until(lambda: telling.statuses() == ["SENT"])
    assert messages(sqlite, "attempt, last_error") == [(5, None)]
    assert {document["id"] for document in telling.told} == {telling.told[0]["id"]}
    assert telling.told[0]["data"]["incident_id"] == incident.incident_id


def test_a_sink_that_asks_for_a_pause_gets_it_for_all_messages(sqlite: Any, tmp_path: Path) -> None:
    sqlite.sinks = ("webhook",)
    ended(sqlite, resolved, resolved)
    with Receiver(lambda _: answering(429, b"", "Retry-After: 3000")) as receiver:
        telling = Telling(sqlite, tmp_path, receiver)
        telling.until(lambda: ("HTTP 429",) in [
            (str(error).rpartition(": ")[2],) for (error,) in messages(sqlite, "last_error")
        ])  # fmt: skip
    assert len(receiver.received) == 1
    assert telling.statuses() == ["PENDING"] * 2
    due = query(sqlite, "select max(next_attempt_at) from notifications")[0][0]
    assert datetime.fromisoformat(due) - sql_database.utc_now() > timedelta(seconds=2900)


@pytest.mark.usefixtures("quick")
def test_what_is_refused_for_good_is_dead_and_said_once(
    sqlite: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    sqlite.sinks = ("webhook",)
    ended(sqlite, resolved, resolved)
    answers = iter([answering(400, b"invalid_payload"), ACCEPTED])
    with Receiver(lambda _: next(answers)) as receiver:
        telling = Telling(sqlite, tmp_path, receiver)
        telling.until(lambda: sorted(telling.statuses()) == ["DEAD", "SENT"])
    (line,) = [r for r in caplog.records if "given up" in r.getMessage()]
    assert "HTTP 400: invalid_payload" in line.getMessage()
    ((error,),) = query(sqlite, "select last_error from notifications where status = 'DEAD'")
    assert error == f"127.0.0.1:{receiver.port}: HTTP 400: invalid_payload"


@pytest.mark.usefixtures("quick")
def test_after_so_many_attempts_a_message_is_dead(
    sqlite: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Notifier, "ATTEMPTS", 3)
    sqlite.sinks = ("webhook",)
    ended(sqlite, resolved)
    with Receiver(lambda _: answering(500)) as receiver:
        telling = Telling(sqlite, tmp_path, receiver)
        telling.until(lambda: telling.statuses() == ["DEAD"])
    assert len(receiver.received) == 3


@pytest.mark.usefixtures("quick")
def test_a_message_that_cannot_be_made_does_not_stop_the_others(
    sqlite: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Notifier, "ATTEMPTS", 2)
    sqlite.sinks = ("webhook",)
    ended(sqlite, resolved, resolved)
    sqlite._database.write(
        lambda tx: tx.run(
            """update notifications set payload = '[]' where notification_id =
               (select min(notification_id) from notifications)"""
        )
    )
    with Receiver() as receiver:
        telling = Telling(sqlite, tmp_path, receiver, report_url="https://r/{incident_id}")
        telling.until(lambda: telling.statuses() == ["DEAD", "SENT"])
    assert telling.told[0]["data"]["report_url"].startswith("https://r/0")


def test_failures_in_a_row_reach_people(sqlite: Any, tmp_path: Path) -> None:
    with Receiver() as receiver:
        telling = Telling(sqlite, tmp_path, receiver, failure_threshold_for_alert=2)
        steps = iter([lambda: ended(sqlite, agent_failed, agent_failed), lambda: None])

        def step() -> bool:
            if not receiver.received:
                next(steps, lambda: None)()
            elif len(receiver.received) == 1 and telling.statuses() == ["SENT"]:
                ended(sqlite, resolved)
            return len(receiver.received) >= 3

        telling.until(step)
        quiet = Telling(sqlite, tmp_path, receiver, notify_on_agent_failure=False)
        ended(sqlite, agent_failed, agent_failed, agent_failed, resolved)
        before = len(receiver.received)
        quiet.until(lambda: len(receiver.received) == before + 1)
    assert sorted(d["kind"] for d in telling.told[:3]) == ["degraded", "incident", "recovered"]
    assert telling.told[-1]["kind"] == "incident"


def test_slack_gets_blocks_and_the_webhook_plain_values(sqlite: Any, tmp_path: Path) -> None:
    sqlite.sinks = ("slack", "webhook")
    ended(sqlite, resolved)
    with Receiver() as receiver:
        telling = Telling(sqlite, tmp_path, receiver, slack_webhook_url=receiver.url("/slack"))
        telling.until(lambda: telling.statuses() == ["SENT"] * 2)
    by_target = {request.target: request.document for request in receiver.received}
    assert by_target["/slack"]["blocks"][0]["type"] == "header"
    assert by_target["/hook"]["data"]["cluster"] == "prod"
    (slack,) = [request for request in receiver.received if request.target == "/slack"]
    assert not any(name.startswith("x-nightcrier") for name in slack.headers)


def test_one_sink_that_hangs_does_not_keep_the_other_waiting(sqlite: Any, tmp_path: Path) -> None:
    def answer(request: Received) -> Answer:
        return [None] if request.target == "/slack" else ACCEPTED

    sqlite.sinks = ("slack", "webhook")
    ended(sqlite, resolved, resolved)
    with Receiver(answer) as receiver:
        telling = Telling(sqlite, tmp_path, receiver, slack_webhook_url=receiver.url("/slack"))
        telling.until(lambda: telling.statuses().count("SENT") == 2, drain=False)
    assert telling.statuses().count("PENDING") == 2
