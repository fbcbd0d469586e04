"""Telling people, by the whole program: what is killed, what is stopped, and what is secret."""

from __future__ import annotations

import contextlib
import itertools
import json
import sqlite3
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from built_files import ROOT
from fake_mcp import a_fault
from receiver import ACCEPTED, Answer, Received, Receiver, answering
from running_program import (
    Clusters,
    Program,
    an_agent,
    eventually,
    nightcrier,
    rows,
    statuses,
)
from test_notifications import checked, verifier

AGENT = ("--agent-cli", "command", "--agent-command", an_agent())
ANY_PORT = ("--health-listen", "127.0.0.1:0")
CANARY = "canary-of-a-webhook-T00000000-B00000000"
SECRET = "canary-that-signs-what-is-sent"


def sinks(receiver: Receiver) -> dict[str, str]:
    return {
        "NIGHTCRIER_SLACK_WEBHOOK_URL": receiver.url(f"/services/{CANARY}"),
        "NIGHTCRIER_WEBHOOK_URL": receiver.url(f"/hook?token={CANARY}"),
        "NIGHTCRIER_WEBHOOK_SECRET": SECRET,
    }


def outbox(folder: Path, columns: str = "sink, status") -> Counter[Any]:
    return Counter(rows(folder / "nightcrier.db", f"select {columns} from notifications"))


def documents(receiver: Receiver, kind: str = "incident") -> list[Any]:
    """What the webhook, not Slack, was sent."""
    hooks = [request.document for request in receiver.received if "/hook" in request.target]
    return [document for document in hooks if document["kind"] == kind]


def test_what_is_resolved_is_told_and_no_secret_is_anywhere(tmp_path: Path) -> None:
    def answer(request: Received) -> Answer:
        """Refuses the first of Slack's, and repeats what it was sent."""
        if CANARY in request.target and "services" in request.target and not refused:
            refused.append(request)
            return answering(400, f"bad {request.target} {SECRET} {request.target}".encode())
        return ACCEPTED

    refused: list[Received] = []
    with Clusters("alpha") as clusters, Receiver(answer) as receiver:
        options = [*clusters.flags(), *AGENT, *ANY_PORT, "--log-level", "debug"]
        with Program(*options, cwd=tmp_path, environment=sinks(receiver)) as program:
            clusters.await_watch()
            hostile = "<!channel> *x* `y` <https://evil.example|z>\u202e"
            clusters.emit("alpha", "pod-1", context=f"{hostile} {SECRET} {CANARY}")
            eventually(lambda: len(receiver.received) == 2)
            clusters.emit("alpha", "pod-2")
            eventually(lambda: len(receiver.received) == 4)
            program.wait_for("given up")
            eventually(lambda: outbox(tmp_path)[("slack", "SENT")] == 1)
            assert program.stop() == 0
    assert outbox(tmp_path) == {
        ("slack", "DEAD"): 1, ("slack", "SENT"): 1, ("webhook", "SENT"): 2,
    }  # fmt: skip
    is_genuine = verifier()
    for request in receiver.received:
        if "/hook" in request.target:
            headers = {f"X-Nightcrier-{n}": request.headers[f"x-nightcrier-{n.lower()}"]
                       for n in ("Timestamp", "Signature")}  # fmt: skip
            assert is_genuine(SECRET, headers, request.body)
        else:
            assert any("The disk is full" in text for text in checked(request.document))
    said = "\n".join([*program.out, *program.err])
    ((error,),) = rows(
        tmp_path / "nightcrier.db", "select last_error from notifications where status = 'DEAD'"
    )
    assert "bad /services/[redacted] [redacted]" in error
    assert "given up" in said
    for canary in (CANARY, SECRET):
        assert canary not in said
        assert canary not in error
        for path in tmp_path.rglob("*"):
            # What the cluster itself reported is data, wherever it stands.
            if path.is_file() and path.name not in ("incident.json", "prompt-sent.md"):
                text = path.read_bytes()
                ours = text.replace(f"{SECRET} {CANARY}".encode(), b"")
                assert canary.encode() not in ours, path


@pytest.mark.slow
def test_whatever_is_killed_every_resolved_incident_is_told(tmp_path: Path) -> None:
    """It is killed while it sends, and when it has just found out; the receiver fails, too."""
    killing: list[Callable[[], None]] = []
    numbers = itertools.count(1)
    told: Counter[str] = Counter()

    def answer(request: Received) -> Answer:
        if killing:
            killing.pop()()
            return []
        if next(numbers) % 7 == 0:
            return answering(503)
        told[request.document["data"]["incident_id"]] += 1
        return ACCEPTED

    # As it is, but whoever was killed is not waited for so long.
    program_file = tmp_path / "impatient.py"
    program_file.write_text(
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "import nightcrier, datetime\n"
        "nightcrier.Notifier.LEASE = datetime.timedelta(seconds=1)\n"
        "nightcrier.Notifier.POLL = (0.1, 0.2)\n"
        "nightcrier.console_main()\n"
    )
    database = tmp_path / "nightcrier.db"
    with Clusters("alpha") as clusters, Receiver(answer) as receiver:
        options = [*clusters.flags(), *AGENT, *ANY_PORT, "--lease-duration", "1"]
        options += ["--max-attempts", "20"]  # whatever was running when it was killed
        environment = {"NIGHTCRIER_WEBHOOK_URL": receiver.url()}
        start = {"cwd": tmp_path, "environment": environment, "program": program_file}
        for number in range(5):
            with Program(*options, **start) as program:  # type: ignore[arg-type]
                clusters.await_watch()
                if number % 2:
                    killing.append(program.process.kill)
                for fault in range(8):
                    clusters.emit("alpha", f"pod-{number}-{fault}")
                if not number % 2:
                    program.wait_for('"resolved"', 4)
                    program.process.kill()
                program.ends()
        with Program(*options, **start) as program:  # type: ignore[arg-type]
            eventually(lambda: set(statuses(database)) == {"RESOLVED"})
            eventually(lambda: {status for (_, status) in outbox(tmp_path)} == {"SENT"})
            assert program.stop() == 0
    found = {name for (name,) in rows(database, "select incident_id from incidents")}
    assert len(found) >= 4, "those of the first start; events die with whoever is killed"
    assert set(told) == found
    assert sum(outbox(tmp_path).values()) == len(found), "one row for each"


def test_at_a_stop_what_was_just_found_out_is_told(tmp_path: Path) -> None:
    agent = an_agent(f"until test -e {tmp_path}/go; do sleep 0.02; done; printf '%0200d' 1"
                     " > output/investigation.md")  # fmt: skip
    command = ("--agent-cli", "command", "--agent-command", agent)
    with Clusters("alpha") as clusters, Receiver() as receiver:
        options = [*clusters.flags(), *command, *ANY_PORT]
        with Program(*options, cwd=tmp_path, environment=sinks(receiver)) as program:
            clusters.await_watch()
            clusters.emit("alpha")
            eventually(lambda: statuses(tmp_path / "nightcrier.db") == {"RUNNING": 1})
            program.signal()
            program.wait_for("draining")
            (tmp_path / "go").touch()
            assert program.ends() == 0
    assert outbox(tmp_path) == {("slack", "SENT"): 1, ("webhook", "SENT"): 1}


@pytest.mark.slow
def test_a_stop_does_not_wait_for_a_receiver_that_hangs_and_a_start_tells_it(
    tmp_path: Path,
) -> None:
    hangs = [True]
    with Receiver(lambda _: [None] if hangs else ACCEPTED) as receiver:
        environment = {"NIGHTCRIER_WEBHOOK_URL": receiver.url()}
        (tmp_path / "fault.json").write_text(json.dumps(a_fault()))
        done = nightcrier("replay", "fault.json", *AGENT, cwd=tmp_path, **environment)
        assert done.returncode == 0, done.stderr
        assert outbox(tmp_path) == {("webhook", "PENDING"): 1}
        hangs.clear()
        with contextlib.closing(sqlite3.connect(tmp_path / "nightcrier.db")) as connection:
            # As if the lease of whoever was stopped had ended.
            connection.execute("update notifications set next_attempt_at = created_at")
            connection.commit()
        again = nightcrier("replay", "fault.json", *AGENT, cwd=tmp_path, **environment)
        assert again.returncode == 0
    assert outbox(tmp_path, "status, attempt") == {("SENT", 2): 1, ("SENT", 1): 1}


def test_failures_in_a_row_are_told_and_the_recovery(tmp_path: Path) -> None:
    agent = an_agent(f"test -e {tmp_path}/good && printf '%0200d' 1 > output/investigation.md")
    command = ("--agent-cli", "command", "--agent-command", agent)
    with Clusters("alpha") as clusters, Receiver() as receiver:
        options = [*clusters.flags(), *command, *ANY_PORT]
        with Program(*options, cwd=tmp_path, environment=sinks(receiver)) as program:
            clusters.await_watch()
            for number in range(4):
                clusters.emit("alpha", f"pod-{number}")
            eventually(lambda: documents(receiver, "degraded"))
            eventually(lambda: statuses(tmp_path / "nightcrier.db") == {"AGENT_FAILED": 4})
            (tmp_path / "good").touch()
            clusters.emit("alpha", "pod-4")
            eventually(lambda: documents(receiver, "recovered"))
            assert program.stop() == 0
    assert len(documents(receiver, "degraded")) == 1
    (told,) = documents(receiver, "degraded")
    assert told["data"]["failures"] >= 3
    assert "exited with code 1" in told["data"]["reasons"][0]
    assert len(documents(receiver)) == 1


# --- check ----------------------------------------------------------------------------------------


def check(*words: str, cwd: Path, **environment: str) -> tuple[int, list[str], str]:
    cluster = ("--cluster", "a=http://127.0.0.1:1/mcp")
    done = nightcrier("check", "--offline", *cluster, *AGENT, *words, cwd=cwd, **environment)
    lines = [line for line in done.stdout.splitlines() if " sink " in line]
    assert CANARY not in done.stdout + done.stderr
    assert SECRET not in done.stdout + done.stderr
    return done.returncode, lines, done.stderr


def test_check_names_the_sinks_and_sends_a_test_when_asked(tmp_path: Path) -> None:
    with Receiver() as receiver:
        host = f"127.0.0.1:{receiver.port}"
        code, lines, _ = check(cwd=tmp_path, **sinks(receiver))
        assert (code, lines) == (0, [f"ok    sink slack: {host}",
                                     f"ok    sink webhook: {host}, signed"])  # fmt: skip
        assert receiver.received == []
        code, lines, _ = check("--send-test", cwd=tmp_path, **sinks(receiver))
        assert code == 0
        assert all(line.endswith("test message accepted") for line in lines)
        slack, hook = (request.document for request in receiver.received)
    assert any("This is a test message" in text for text in checked(slack))
    assert hook["kind"] == "test"


def test_check_says_why_a_test_message_was_not_accepted(tmp_path: Path) -> None:
    with Receiver(lambda r: answering(404, f"no {r.target}".encode())) as receiver:
        code, lines, _ = check("--send-test", cwd=tmp_path, **sinks(receiver))
        assert code == 1
        assert all(line.startswith("FAIL  sink") and "HTTP 404: no /" in line for line in lines)
    environment = {"NIGHTCRIER_WEBHOOK_URL": f"http://169.254.169.254/{CANARY}"}
    code, (line,), _ = check("--send-test", cwd=tmp_path, **environment)
    assert "notify_allow_link_local" in line


@pytest.mark.parametrize("url", ["hooks", "ftp://h/{}", "https://u:{}@h/", "https://h/{} x", "{}"])
def test_a_mistake_in_a_secret_address_does_not_show_it(url: str, tmp_path: Path) -> None:
    environment = {"NIGHTCRIER_WEBHOOK_URL": url.format(CANARY)}
    code, _, said = check(cwd=tmp_path, **environment)
    assert code == 3
    assert "NIGHTCRIER_WEBHOOK_URL: must be a URL such as" in said
