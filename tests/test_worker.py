"""The worker: from a claim to an outcome, with a real store and real agents."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import hashlib
import json
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

import agent_process
import incidents
import nightcrier
import sql_database
from agent_process import Supervisor
from conftest import (
    EXPIRED,
    LEASE,
    a_config,
    an_event,
    an_execution,
    claim_one,
    dump,
    events_of,
    is_running,
    query,
    wait_until,
)
from incidents import Incident, IncidentStatus, Outcome
from nightcrier import ClusterConfig, Config, Worker
from sql_database import StoreUnavailable
from state_store import AsyncStore, SQLiteStore

linux = pytest.mark.skipif(sys.platform != "linux", reason="finds processes in /proc")

REPORT = """# Report

## Root Cause

The disk is full, and the container cannot write its pid file.

Confidence: HIGH

## Evidence

`df` says so.
"""
REPORTING = "cat > prompt; printf '%s' \"$REPORT\" > output/investigation.md"
WAITING = "echo $$ > ../$INCIDENT_ID.pid; until [ -e ../go ]; do sleep 0.02; done; " + REPORTING


def sh(script: str) -> list[str]:
    return ["/bin/sh", "-c", script]


class Bench:
    """A worker at work on a store, and what it has finished."""

    def __init__(self, store: SQLiteStore, config: Config, through: Any) -> None:
        self.store = store
        self.config = config
        self.asynchronous = AsyncStore(through)  # what the worker uses for the store
        self.worker = Worker(config, self.asynchronous, Supervisor())

    @property
    def ended(self) -> list[tuple[str, str]]:
        """What this worker has written of its incidents, in the order in which it did."""
        return [
            (incident_id, status)
            for incident_id, status in query(
                self.store,
                """select incident_id, to_status from incident_transitions
                   where from_status = 'RUNNING' and worker_id = :worker
                     and reason not like 'lease of %' order by at""",
                worker=self.worker.record.worker_id,
            )
        ]

    async def until(self, condition: Callable[[], Any], seconds: float = 30.0) -> None:
        """Wait for what the worker writes to the database, or an agent to a file."""
        await asyncio.to_thread(wait_until, condition, seconds)

    async def until_ended(self, count: int) -> None:
        await self.until(lambda: len(self.ended) >= count, 60)

    def status(self, incident: Incident) -> IncidentStatus:
        return self.incident(incident).status

    def incident(self, incident: Incident) -> Incident:
        found = self.store.get_incident(incident.incident_id)
        assert found is not None
        return found

    def go(self) -> None:
        """Let the agents that are WAITING write their reports."""
        self.config.workspace_root.mkdir(exist_ok=True)
        (self.config.workspace_root / "go").touch()

    def pids(self) -> list[int]:
        files = self.config.workspace_root.glob("*.pid")
        return [int(text) for file in files if (text := file.read_text().strip())]


class Benches:
    """Makes benches on one store; a test is a coroutine that is given one."""

    def __init__(self, store: SQLiteStore, root: Path) -> None:
        self.store = store
        self.root = root

    def config(self, script: str = REPORTING, **flags: Any) -> Config:
        flags = {"agent_command": sh(script), "agent_env": ["REPORT"], **flags}
        return a_config(self.root, **flags)

    @contextlib.asynccontextmanager
    async def working(self, config: Config, through: Any = None) -> AsyncIterator[Bench]:
        """A worker that is drained at the end."""
        bench = Bench(self.store, config, through or self.store)
        task = asyncio.create_task(bench.worker.run())
        try:
            yield bench
        finally:
            bench.worker.drain()
            async with asyncio.timeout(60):
                await task
            bench.asynchronous._threads.shutdown()

    def investigate(self, script: str = REPORTING, **flags: Any) -> tuple[Bench, Incident]:
        """Run one agent on one new incident, to its end."""
        (incident,) = self.store.create_incidents([an_event()])

        async def work() -> Bench:
            async with self.working(self.config(script, **flags)) as bench:
                await bench.until_ended(1)
            return bench

        bench = asyncio.run(work())
        return bench, bench.incident(incident)


@pytest.fixture
def benches(sqlite: SQLiteStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Benches:
    monkeypatch.setenv("REPORT", REPORT)
    return Benches(sqlite, tmp_path)


def only_execution(bench: Bench, incident: Incident) -> incidents.AgentExecution:
    (execution,) = bench.store.list_executions(incident.incident_id)
    return execution


# --- the ways an attempt ends ---------------------------------------------------------------------


def test_an_incident_becomes_a_report(benches: Benches) -> None:
    bench, incident = benches.investigate()

    assert bench.ended == [(incident.incident_id, IncidentStatus.RESOLVED)]
    assert incident.status is IncidentStatus.RESOLVED
    assert (incident.attempt, incident.attempts_charged, incident.exit_code) == (1, 1, 0)
    assert (incident.claimed_by, incident.lease_expires_at, incident.failure_reason) == (None,) * 3
    assert incident.started_at is not None
    assert incident.completed_at is not None
    assert incident.created_at <= incident.started_at <= incident.completed_at

    record = bench.worker.record
    execution = only_execution(bench, incident)
    workspace = bench.config.workspace_root.absolute() / incident.incident_id
    assert execution.outcome is Outcome.SUCCEEDED
    assert (execution.exit_code, execution.signal, execution.error_message) == (0, None, None)
    assert (execution.attempt, execution.worker_id, execution.host) == (
        *(1, record.worker_id, record.host),
    )
    assert (execution.agent, execution.runtime) == ("command", "host")
    assert execution.workspace == str(workspace)
    assert execution.pid is not None
    assert execution.completed_at is not None
    assert incident.started_at <= execution.started_at <= execution.completed_at
    assert all(Path(path).exists() for path in json.loads(execution.log_paths or ""))

    report = bench.store.get_report(incident.incident_id)
    assert report is not None
    assert report.report_markdown == REPORT
    assert report.root_cause == "The disk is full, and the container cannot write its pid file."
    assert report.confidence == "HIGH"
    page = workspace / "output" / "investigation.html"
    assert page.read_text() == report.report_html
    assert page.stat().st_mode & 0o777 == 0o600
    assert "<h2>Evidence</h2>" in page.read_text()

    transitions = bench.store.list_transitions(incident.incident_id)
    assert [(step.from_status, step.to_status, step.worker_id) for step in transitions] == [
        (IncidentStatus.PENDING, IncidentStatus.RUNNING, record.worker_id),
        (IncidentStatus.RUNNING, IncidentStatus.RESOLVED, record.worker_id),
    ]
    assert query(bench.store, "select worker_id, pid, role, state from workers") == [
        (record.worker_id, os.getpid(), "all", "stopped")
    ]


def test_the_prompt_that_was_sent_is_kept_and_its_digest_stored(benches: Benches) -> None:
    bench, incident = benches.investigate(additional_agent_prompt="Answer in verse.")
    execution = only_execution(bench, incident)
    workspace = Path(execution.workspace or "")

    prompt = (workspace / "prompt-sent.md").read_bytes()
    assert (workspace / "prompt").read_bytes() == prompt, "as it came on stdin"
    assert b"Answer in verse." in prompt
    assert incident.incident_id.encode() in prompt
    assert execution.prompt_sha256 == hashlib.sha256(prompt).hexdigest()


def test_a_long_prompt_arrives_as_it_is_whatever_it_begins_with(
    benches: Benches, tmp_path: Path
) -> None:
    """Longer than an argument may be, with what a shell, `echo -e` or getopt would change."""
    text = (
        "---\nfront: matter\n---\n-n --help \\n \\t \\0 $(id) %s \N{GRINNING FACE}\n"
        + "x" * 1_000_000
    )
    (tmp_path / "system.md").write_text(text, encoding="utf-8")
    bench, incident = benches.investigate(agent_system_prompt_file=str(tmp_path / "system.md"))

    workspace = Path(only_execution(bench, incident).workspace or "")
    prompt = (workspace / "prompt").read_bytes()
    assert prompt.startswith(text.encode())
    assert prompt == (workspace / "prompt-sent.md").read_bytes()


def test_a_cluster_has_its_own_settings_of_the_agent(
    benches: Benches, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = f'[ "$1" = --version ] && exit\necho "$@" > words\n{REPORTING}\n'
    (benches.root / "codex").write_text(f"#!/bin/sh\n{script}")
    (benches.root / "codex").chmod(0o755)
    monkeypatch.setenv("PATH", f"{benches.root}:{os.environ['PATH']}")
    general = benches.config(agent_cli="codex", agent_model="small", agent_args="--one")
    own = {"agent_model": "large", "agent_args": ("--two", "{incident_id}")}
    cluster = ClusterConfig(name="prod", endpoint="http://127.0.0.1:1/mcp", agent=own)
    config = dataclasses.replace(general, clusters=(cluster,))
    events = [an_event(cluster=name) for name in ("prod", "dev")]
    prod, dev = benches.store.create_incidents(events)

    async def work() -> None:
        async with benches.working(config) as bench:
            await bench.until_ended(2)
            for incident, model, words in (
                (prod, "large", f" --two {prod.incident_id} --model large"),
                (dev, "small", " --one --model small"),
            ):
                execution = only_execution(bench, incident)
                assert execution.model == model
                given = (Path(execution.workspace or "") / "words").read_text()
                assert given.rstrip().endswith(words)

    asyncio.run(work())


def test_the_archive_shows_the_outcome(benches: Benches) -> None:
    _, incident = benches.investigate("exit 3")
    workspace = benches.root / "incidents" / incident.incident_id
    document = json.loads((workspace / "incident.json").read_text())

    assert document["status"] == "agent_failed"
    assert document["exitCode"] == 3
    assert document["failureReason"] == "the agent exited with code 3"
    assert document["completedAt"]


@linux
def test_the_agent_of_a_worker_gets_no_variable_but_those_of_the_allow_list(
    benches: Benches, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("CANARY", "NIGHTCRIER_POSTGRES_DSN", "SLACK_WEBHOOK_URL", "ANTHROPIC_API_KEY"):
        monkeypatch.setenv(name, "secret")
    bench, incident = benches.investigate(f"{REPORTING}; cat /proc/$$/environ")

    workspace = Path(only_execution(bench, incident).workspace or "")
    words = (workspace / "logs" / "agent-stdout.log").read_text().split("\0")
    names = {word.partition("=")[0] for word in words if word}
    allowed = {
        *("PATH", "HOME", "USER", "LOGNAME", "LANG", "LC_ALL", "LC_CTYPE", "TZ", "TMPDIR", "TERM"),
        *("HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "http_proxy", "https_proxy", "no_proxy"),
        *("SSL_CERT_FILE", "SSL_CERT_DIR", "NODE_EXTRA_CA_CERTS"),
    }
    always = {"INCIDENT_ID", "SUPERVISED_RUN", "REPORT", "KUBECONFIG"}
    assert names - always == {name for name in allowed if name in os.environ}
    assert always <= names
    assert f"INCIDENT_ID={incident.incident_id}" in words


def test_the_agent_gets_the_kubeconfig_of_its_cluster(benches: Benches, tmp_path: Path) -> None:
    kubeconfig = tmp_path / "prod.kubeconfig"
    cluster = ClusterConfig(name="prod", endpoint="http://x/mcp", kubeconfig=kubeconfig)
    config = dataclasses.replace(
        benches.config(f"echo $KUBECONFIG; {REPORTING}"), clusters=(cluster,)
    )
    (incident,) = benches.store.create_incidents([an_event("prod")])

    async def work() -> None:
        async with benches.working(config) as bench:
            await bench.until_ended(1)

    asyncio.run(work())

    workspace = config.workspace_root / incident.incident_id
    assert (workspace / "logs" / "agent-stdout.log").read_text() == f"{kubeconfig}\n"
    permissions = json.loads((workspace / "incident_cluster_permissions.json").read_text())
    assert permissions["kubeconfig"] is True


@pytest.mark.parametrize(
    ("script", "outcome", "exit_code", "signal_name", "reason"),
    [
        ("exit 1", Outcome.FAILED, 1, None, "the agent exited with code 1"),
        ("kill -9 $$", Outcome.FAILED, None, "SIGKILL", "the agent was killed by SIGKILL"),
        (
            *("exit 0", Outcome.OUTPUT_INVALID, 0, None),
            "the agent left no output/investigation.md",
        ),
        (
            *("printf 0123456789 > output/investigation.md", Outcome.OUTPUT_INVALID, 0, None),
            "output/investigation.md has 10 bytes, less than 100",
        ),
        (
            *("mkdir output/investigation.md", Outcome.OUTPUT_INVALID, 0, None),
            "output/investigation.md is not a plain file",
        ),
        (
            *("mkfifo output/investigation.md", Outcome.OUTPUT_INVALID, 0, None),
            "output/investigation.md is not a plain file",
        ),
        (
            *("rm -r output logs incident.json; mkfifo .incident.json.unfinished",),
            *(Outcome.OUTPUT_INVALID, 0, None, "the agent left no output/investigation.md"),
        ),
    ],
)
def test_an_agent_that_fails_is_agent_failed(
    benches: Benches,
    script: str,
    outcome: Outcome,
    exit_code: int | None,
    signal_name: str | None,
    reason: str,
) -> None:
    bench, incident = benches.investigate(script)
    execution = only_execution(bench, incident)

    assert incident.status is IncidentStatus.AGENT_FAILED
    assert incident.failure_reason == reason
    assert execution.outcome is outcome
    assert (execution.exit_code, execution.signal) == (exit_code, signal_name)
    assert execution.error_message == reason
    assert bench.store.get_report(incident.incident_id) is None
    assert bench.store.list_transitions(incident.incident_id)[-1].reason == reason


@pytest.mark.parametrize(
    ("script", "shown"),
    [
        ("exit 3", "the agent left no output/investigation.md"),
        ("rm -r output; mkfifo output; exit 3", None),
        ("rm -r output; ln -s .. output; exit 3", None),
        (f"{REPORTING}; exit 3", "<h2>Evidence</h2>"),
        ("printf '# So far' > output/investigation.md", "<h1>So far</h1>"),
    ],
)
def test_what_an_agent_had_written_when_it_failed_is_on_a_page(
    benches: Benches, script: str, shown: str | None
) -> None:
    bench, incident = benches.investigate(script)
    page = Path(only_execution(bench, incident).workspace or "", "output", "investigation.html")

    assert incident.status is IncidentStatus.AGENT_FAILED
    assert bench.store.get_report(incident.incident_id) is None
    assert page.exists() == (shown is not None)
    if shown is not None:
        assert shown in page.read_text()
        assert f"<tr><th>Failed</th><td>{incident.failure_reason}</td></tr>" in page.read_text()


@pytest.mark.parametrize(
    "prepared",
    [
        "ln -s ../../secret output/investigation.html",
        "ln ../secret output/investigation.html",
        "mkfifo output/investigation.html",
        "echo '<script>' > output/investigation.html; chmod 500 output",
    ],
)
@pytest.mark.parametrize("code", [0, 3])
def test_the_page_is_ours_whatever_the_agent_left_in_its_place(
    benches: Benches, prepared: str, code: int
) -> None:
    secret = benches.config().workspace_root / "secret"
    secret.parent.mkdir(parents=True, exist_ok=True)
    secret.write_text("as it was")
    bench, incident = benches.investigate(f"{REPORTING}; {prepared}; exit {code}")
    output = Path(only_execution(bench, incident).workspace or "", "output")

    assert incident.exit_code == code
    assert secret.read_text() == "as it was"
    assert (output / "investigation.html").read_text().startswith("<!DOCTYPE html>\n<html>")
    assert not (output / "investigation.html").is_symlink()
    assert sorted(path.name for path in output.iterdir()) == [
        *("investigation.html", "investigation.md")
    ]


@pytest.mark.parametrize(
    ("name", "other"),
    [
        ("incident.json", "output/investigation.html"),
        ("output/investigation.html", "incident.json"),
    ],
)
def test_an_outcome_does_not_depend_on_its_copies(
    benches: Benches, name: str, other: str, caplog: pytest.LogCaptureFixture
) -> None:
    bench, incident = benches.investigate(f"{REPORTING}; rm -f {name}; mkdir {name}")
    workspace = Path(only_execution(bench, incident).workspace or "")
    report = bench.store.get_report(incident.incident_id)

    assert incident.status is IncidentStatus.RESOLVED
    assert report is not None
    assert "<h2>Evidence</h2>" in (report.report_html or "")
    assert f"{workspace} is incomplete: " in caplog.text
    expected = {"incident.json": '"resolved"', "output/investigation.html": "<h2>Evidence</h2>"}
    assert expected[other] in (workspace / other).read_text()
    assert sorted(path.name for path in (workspace / "output").iterdir()) == [
        *("investigation.html", "investigation.md")
    ]


def test_an_agent_that_takes_too_long_is_agent_failed(
    benches: Benches, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(agent_process, "_KILL_AFTER", 0.1)
    bench, incident = benches.investigate(f"trap '' TERM; {REPORTING}; sleep 1000", agent_timeout=1)

    assert incident.status is IncidentStatus.AGENT_FAILED
    assert incident.failure_reason == "the agent was killed by SIGKILL after its limit of 1 s"
    assert only_execution(bench, incident).outcome is Outcome.TIMED_OUT
    assert bench.store.get_report(incident.incident_id) is None, "it was not at its end"


def test_an_agent_that_is_not_there_is_failed_and_not_started(benches: Benches) -> None:
    bench, incident = benches.investigate(agent_command=["no-such-agent"])
    execution = only_execution(bench, incident)

    assert incident.status is IncidentStatus.FAILED
    assert (incident.failure_reason or "").startswith("the agent cannot be started: ")
    assert "no-such-agent" in (incident.failure_reason or "")
    assert execution.outcome is Outcome.NOT_STARTED
    assert (execution.pid, execution.exit_code) == (None, None)
    assert execution.workspace is not None


def test_a_workspace_that_cannot_be_made_is_failed_and_not_started(
    benches: Benches, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    bench, incident = benches.investigate(workspace_root=str(tmp_path / "file" / "incidents"))

    assert incident.status is IncidentStatus.FAILED
    assert (incident.failure_reason or "").startswith("the workspace cannot be made: ")
    assert only_execution(bench, incident).outcome is Outcome.NOT_STARTED


def test_a_mistake_of_ours_fails_the_incident_and_not_the_worker(benches: Benches) -> None:
    def broken(*_: object) -> None:
        raise KeyError("oops")

    events = events_of("prod", 2)

    async def work() -> None:
        async with benches.working(benches.config()) as bench:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(nightcrier, "make_report", broken)
                bad = bench.store.create_incidents(events)
                await bench.until(
                    lambda: all(bench.status(one) is IncidentStatus.FAILED for one in bad)
                )
            (good,) = bench.store.create_incidents([an_event()])
            await bench.until_ended(3)
            assert bench.status(good) is IncidentStatus.RESOLVED
            assert bench.incident(bad[0]).failure_reason == "internal error: KeyError('oops')"
            assert only_execution(bench, bad[0]).outcome is Outcome.FAILED

    asyncio.run(work())


def test_usage_and_cost_of_claude_are_stored(
    benches: Benches, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even where the agent reports numbers that no database can hold."""
    usage = {"input_tokens": 10**30, "cache_read_input_tokens": 5, "output_tokens": 7}
    result = json.dumps(
        {"type": "result", "usage": usage, "total_cost_usd": 0.25, "session_id": "a\0b"}
    )
    script = f"[ \"$1\" = --version ] && echo 9.9 && exit\n{REPORTING}\ncat <<'E'\n{result}\nE\n"
    (tmp_path / "claude").write_text("#!/bin/sh\n" + script)
    (tmp_path / "claude").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    bench, incident = benches.investigate(agent_cli="claude", agent_model="opus")
    execution = only_execution(bench, incident)

    assert incident.status is IncidentStatus.RESOLVED
    assert (execution.agent, execution.model) == ("claude", "opus")
    assert (execution.input_tokens, execution.output_tokens) == (5, 7)
    assert execution.cost_usd == 0.25
    assert json.loads(execution.usage or "")["total_cost_usd"] == 0.25


# --- how much at once -----------------------------------------------------------------------------


def test_no_more_agents_run_than_allowed_and_no_more_is_claimed_than_can_start(
    benches: Benches,
) -> None:
    benches.store.create_incidents(events_of("prod", 7))

    async def work() -> None:
        config = benches.config(WAITING, max_concurrent_agents=3)
        async with benches.working(config) as bench:
            running = "select count(*) from incidents where status = 'RUNNING'"
            await bench.until(lambda: len(bench.pids()) == 3)
            for _ in range(3):
                bench.worker.wake()
                await asyncio.sleep(0.05)
                assert query(bench.store, running) == [(3,)]
                assert len(bench.pids()) == 3
            bench.go()
            await bench.until_ended(7)
            most = query(bench.store, "select count(*) from incidents where status = 'RESOLVED'")
            assert most == [(7,)]

    asyncio.run(work())


def test_a_cluster_gets_no_more_agents_than_allowed(benches: Benches) -> None:
    benches.store.create_incidents(events_of("noisy", 5))
    benches.store.create_incidents(events_of("quiet", 1))

    async def work() -> None:
        config = benches.config(WAITING, max_concurrent_agents=5, max_agents_per_cluster=2)
        async with benches.working(config) as bench:
            await bench.until(lambda: len(bench.pids()) == 3)
            running = "select cluster, count(*) from incidents where status = 'RUNNING' group by 1"
            assert sorted(query(bench.store, running)) == [("noisy", 2), ("quiet", 1)]
            bench.go()
            await bench.until_ended(6)

    asyncio.run(work())


def test_a_failed_agent_is_tried_again_as_often_as_configured(
    benches: Benches, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Worker, "RETRY_DELAY", timedelta(0))
    (incident,) = benches.store.create_incidents([an_event()])

    async def work() -> Bench:
        async with benches.working(benches.config("echo x > mine; exit 1", agent_retries=2)) as b:
            await b.until_ended(3)
        return b

    bench = asyncio.run(work())

    assert [status for _, status in bench.ended] == ["PENDING", "PENDING", "AGENT_FAILED"]
    executions = bench.store.list_executions(incident.incident_id)
    assert [execution.attempt for execution in executions] == [1, 2, 3]
    assert {execution.outcome for execution in executions} == {Outcome.FAILED}
    workspace = bench.config.workspace_root / incident.incident_id
    assert all((workspace / f"attempt-{n}" / "mine").exists() for n in (1, 2))
    reasons = [step.reason for step in bench.store.list_transitions(incident.incident_id)]
    assert reasons.count("agent_retry") == 2


def test_new_work_is_found_without_being_told_of_it_and_at_once_when_told(
    benches: Benches, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def work() -> None:
        async with benches.working(benches.config()) as bench:
            await bench.until(lambda: query(bench.store, "select 1 from workers"))
            bench.store.create_incidents([an_event()])
            await bench.until_ended(1)  # another process wrote it: POLL finds it
            monkeypatch.setattr(type(bench.store), "POLL", (3600.0, 3600.0))
            bench.worker.wake()
            await asyncio.sleep(0.1)  # it waits for an hour now
            bench.store.create_incidents([an_event()])
            bench.worker.wake()
            await bench.until_ended(2)

    asyncio.run(work())


# --- draining -------------------------------------------------------------------------------------


def test_draining_lets_agents_finish_and_claims_nothing_more(benches: Benches) -> None:
    benches.store.create_incidents(events_of("prod", 3))

    async def work() -> Bench:
        async with benches.working(benches.config(WAITING, max_concurrent_agents=2)) as bench:
            await bench.until(lambda: len(bench.pids()) == 2)
            bench.worker.drain()
            states = "select state from workers"
            await bench.until(lambda: query(bench.store, states) == [("draining",)])
            bench.go()
        return bench

    bench = asyncio.run(work())

    assert [status for _, status in bench.ended] == ["RESOLVED"] * 2
    assert sorted(query(bench.store, "select status from incidents")) == [
        *[("PENDING",), ("RESOLVED",), ("RESOLVED",)],
    ]
    assert query(bench.store, "select state from workers") == [("stopped",)]


@linux
def test_draining_stops_agents_after_a_while_and_gives_their_incidents_back(
    benches: Benches,
) -> None:
    (incident,) = benches.store.create_incidents([an_event()])

    async def stop_and_start() -> Bench:
        config = benches.config(f"trap '' TERM; {WAITING}", shutdown_timeout=0)
        async with benches.working(config) as bench:
            await bench.until(bench.pids)
            pids = bench.pids()
        assert not any(is_running(pid) for pid in pids)
        return bench

    for attempt in (1, 2, 3, 4):  # more often than max_attempts
        bench = asyncio.run(stop_and_start())
        released = bench.incident(incident)
        assert released.status is IncidentStatus.PENDING
        assert (released.attempt, released.attempts_charged) == (attempt, 0)
        execution = bench.store.list_executions(incident.incident_id)[-1]
        assert execution.outcome is Outcome.CANCELLED
        assert execution.error_message == "nightcrier was stopped"
        assert execution.pid is not None
        last = bench.store.list_transitions(incident.incident_id)[-1]
        assert (last.to_status, last.reason) == (IncidentStatus.PENDING, "released on shutdown")
        (bench.config.workspace_root / f"{incident.incident_id}.pid").unlink()

    bench.go()

    async def at_last() -> None:
        async with benches.working(benches.config(WAITING)) as bench:
            await bench.until_ended(1)
            assert bench.status(incident) is IncidentStatus.RESOLVED

    asyncio.run(at_last())


def test_draining_an_idle_worker_ends_it(benches: Benches) -> None:
    async def work() -> None:
        async with benches.working(benches.config()):
            pass

    asyncio.run(work())
    assert query(benches.store, "select state from workers") == [("stopped",)]


# --- leases ---------------------------------------------------------------------------------------

STEAL = """update incidents set claimed_by = 'thief', attempt = attempt + 1
           where status = 'RUNNING' and claimed_by <> 'thief'"""


@linux
def test_a_worker_that_lost_its_lease_stops_its_agent_and_writes_nothing(benches: Benches) -> None:
    (incident,) = benches.store.create_incidents([an_event()])

    async def work() -> None:
        config = benches.config(f"trap '' TERM; {WAITING}", lease_duration=1)
        async with benches.working(config) as bench:
            await bench.until(
                lambda: bench.pids() and bench.store.list_executions(incident.incident_id)
            )
            query_write(bench.store, STEAL)
            thief = dataclasses.replace(
                bench.incident(incident), claimed_by="thief", lease_expires_at=None
            )
            assert bench.store.renew_leases([thief], LEASE) == []
            before = rows_of_incidents(bench.store)

            await bench.until(lambda: not any(is_running(pid) for pid in bench.pids()))
            await bench.until(lambda: not bench.worker._runs)
            assert rows_of_incidents(bench.store) == before
            assert bench.ended == []
            assert bench.incident(incident).claimed_by == "thief"

    asyncio.run(work())


def test_the_outcome_of_an_agent_that_ended_after_its_lease_was_lost_is_not_written(
    benches: Benches,
) -> None:
    (incident,) = benches.store.create_incidents([an_event()])

    async def work() -> None:
        async with benches.working(benches.config(WAITING)) as bench:  # a heartbeat in 15 s
            await bench.until(
                lambda: bench.pids() and bench.store.list_executions(incident.incident_id)
            )
            query_write(bench.store, STEAL)
            before = rows_of_incidents(bench.store)
            bench.go()
            await bench.until(lambda: not bench.worker._runs)
            assert rows_of_incidents(bench.store) == before
            assert bench.ended == []

    asyncio.run(work())


def query_write(store: SQLiteStore, sql: str) -> None:
    store._database.write(lambda tx: tx.run(sql))


def rows_of_incidents(store: SQLiteStore) -> dict[str, list[tuple[Any, ...]]]:
    return {table: rows for table, rows in dump(store).items() if table != "workers"}


def test_heartbeats_keep_the_lease_of_an_agent_that_outlasts_it(
    benches: Benches, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Worker, "SWEEP", 0.1)
    (incident,) = benches.store.create_incidents([an_event()])

    async def work() -> None:
        config = benches.config(f"sleep 1.8; {REPORTING}", lease_duration=1)
        async with benches.working(config) as bench:
            await bench.until_ended(1)
            assert bench.incident(incident).attempt == 1
            assert bench.status(incident) is IncidentStatus.RESOLVED

    asyncio.run(work())


def test_the_incident_of_a_worker_that_died_is_investigated_again(
    benches: Benches, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Worker, "SWEEP", 0.05)
    (incident,) = benches.store.create_incidents([an_event()])
    dead = claim_one(benches.store, "dead", EXPIRED)
    benches.store.start_execution(an_execution(dead))

    async def work() -> None:
        async with benches.working(benches.config()) as bench:
            await bench.until_ended(1)
        outcomes = [e.outcome for e in bench.store.list_executions(incident.incident_id)]
        assert outcomes == [Outcome.LEASE_LOST, Outcome.SUCCEEDED]
        assert bench.incident(incident).attempts_charged == 2

    asyncio.run(work())


def test_an_incident_whose_workers_keep_dying_is_failed(
    benches: Benches, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Worker, "SWEEP", 0.05)
    (incident,) = benches.store.create_incidents([an_event()])
    claim_one(benches.store, "dead", EXPIRED)

    async def work() -> None:
        async with benches.working(benches.config(max_attempts=1)) as bench:
            await bench.until(lambda: bench.status(incident) is IncidentStatus.FAILED)

    asyncio.run(work())


@linux
def test_a_worker_that_claims_its_own_lost_incident_stops_the_first_agent_before_the_second(
    benches: Benches, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process swept its lease: the claim comes before the heartbeat."""
    monkeypatch.setattr(Worker, "SWEEP", 0.05)
    monkeypatch.setattr(nightcrier.StateStore, "renew_leases", lambda *_: [])
    (incident,) = benches.store.create_incidents([an_event()])
    script = "echo $$ > ../$INCIDENT_ID.$(ls .. | wc -l).pid; trap '' TERM; "
    script += f"until [ -e ../go ]; do sleep 0.02; done; {REPORTING}"

    async def work() -> None:
        async with benches.working(benches.config(script)) as bench:  # a heartbeat in 15 s
            await bench.until(bench.pids)
            (first,) = bench.pids()
            await bench.until(lambda: bench.store.list_executions(incident.incident_id))
            past = "update incidents set lease_expires_at = '2020-01-01T00:00:00.000000Z'"
            query_write(bench.store, past)
            await bench.until(lambda: len(bench.pids()) == 2)
            assert not is_running(first)
            bench.go()
            await bench.until_ended(1)
            assert bench.status(incident) is IncidentStatus.RESOLVED
            assert len(bench.worker._runs) == 0
        outcomes = [e.outcome for e in bench.store.list_executions(incident.incident_id)]
        assert outcomes == [Outcome.LEASE_LOST, Outcome.SUCCEEDED]

    asyncio.run(work())


def test_the_loss_of_an_earlier_attempt_does_not_stop_the_one_that_holds_the_lease(
    benches: Benches,
) -> None:
    async def work() -> None:
        store = AsyncStore(benches.store)
        worker = Worker(benches.config(lease_duration=1), store, Supervisor())
        benches.store.create_incidents([an_event()])
        runs = []
        for lease in (EXPIRED, LEASE):
            benches.store.release_expired(9)
            incident = claim_one(benches.store, worker.record.worker_id, lease)
            runs.append(nightcrier._Run(incident, worker.config))
            runs[-1].task = asyncio.create_task(asyncio.sleep(60))
        worker._runs |= set(runs)
        beat = asyncio.create_task(worker._beat())
        await asyncio.sleep(0.6)  # two heartbeats
        assert not runs[1].lost
        for task in (beat, *(run.task for run in runs)):
            assert task is not None
            task.cancel()
        store._threads.shutdown()

    asyncio.run(work())


def test_a_machine_that_slept_does_not_take_its_own_incidents_away(
    benches: Benches, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Worker, "SWEEP", 0.05)
    (incident,) = benches.store.create_incidents([an_event()])
    now, slept = sql_database.utc_now, [timedelta(0)]
    monkeypatch.setattr(nightcrier, "utc_now", lambda: now() + slept[0])

    async def work() -> None:
        async with benches.working(benches.config(WAITING)) as bench:  # a heartbeat in 15 s
            await bench.until(bench.pids)
            slept[0] = timedelta(hours=1)
            swept = [bench.incident(incident).lease_expires_at]
            await bench.until(lambda: bench.incident(incident).lease_expires_at != swept[0])
            bench.go()
            await bench.until_ended(1)
            found = bench.incident(incident)
            assert (found.status, found.attempt) == (IncidentStatus.RESOLVED, 1)

    asyncio.run(work())


# --- when the database is away --------------------------------------------------------------------


class Failing:
    """A store, some of whose methods fail for a while; everything else is the real one's."""

    def __init__(self, store: SQLiteStore) -> None:
        self._store = store
        self.failures: dict[str, float] = {}  # how many calls of a method are still to fail
        self.error: Exception = StoreUnavailable("the database is away")  # and how
        self.hanging: dict[str, Any] = {}  # what a method waits for
        self.slow: dict[str, Any] = {}  # what its answer waits for
        self.calls: list[str] = []

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._store, name)

        def call(*args: Any, **options: Any) -> Any:
            self.calls.append(name)
            if name in self.hanging:
                self.hanging[name].wait()
            if self.failures.get(name, 0) > 0:
                self.failures[name] -= 1
                raise self.error
            result = method(*args, **options)
            if name in self.slow:
                self.slow[name].wait()
            return result

        return call


def test_an_outcome_waits_for_the_database_and_is_written_once(benches: Benches) -> None:
    failing = Failing(benches.store)
    failing.failures = {"complete_incidents": 3, "start_execution": 1}
    (incident,) = benches.store.create_incidents([an_event()])

    async def work() -> None:
        async with benches.working(benches.config(), failing) as bench:
            await bench.until_ended(1)

    asyncio.run(work())

    assert failing.calls.count("complete_incidents") == 4
    assert failing.calls.count("start_execution") == 2
    (report,) = query(benches.store, "select incident_id from triage_reports")
    assert report == (incident.incident_id,)
    assert len(benches.store.list_executions(incident.incident_id)) == 1


def test_a_heartbeat_while_the_outcome_is_written_is_no_lost_lease(
    benches: Benches, caplog: pytest.LogCaptureFixture
) -> None:
    failing = Failing(benches.store)
    failing.slow["complete_incidents"] = answered = threading.Event()
    benches.store.create_incidents([an_event()])
    caplog.set_level("INFO", "nightcrier")

    async def work() -> None:
        async with benches.working(benches.config(lease_duration=1), failing) as bench:
            await bench.until_ended(1)
            before = failing.calls.count("renew_leases")
            await bench.until(lambda: failing.calls.count("renew_leases") > before + 1)
            answered.set()
            await bench.until(lambda: not bench.worker._runs)

    asyncio.run(work())
    assert "resolved" in caplog.messages
    assert not any("lost" in message for message in caplog.messages)


def test_claiming_goes_on_when_the_database_is_back(benches: Benches) -> None:
    failing = Failing(benches.store)
    failing.failures = {"claim_incidents": 1, "has_pending": 2, "release_expired": 1}
    benches.store.create_incidents([an_event()])

    async def work() -> None:
        async with benches.working(benches.config(), failing) as bench:
            await bench.until(lambda: bench.worker.problem)
            assert bench.worker.problem == "the database is away"
            await bench.until_ended(1)
            await bench.until(lambda: bench.worker.problem is None)

    asyncio.run(work())


def test_a_heartbeat_that_the_host_refuses_is_not_the_last_one(benches: Benches) -> None:
    failing = Failing(benches.store)
    (incident,) = benches.store.create_incidents([an_event()])

    async def work() -> None:
        config = benches.config(WAITING, lease_duration=2)
        async with benches.working(config, failing) as bench:
            await bench.until(bench.pids)
            failing.error = OSError(37, "No locks available")
            failing.failures["renew_leases"] = 1
            await bench.until(lambda: failing.calls.count("renew_leases") >= 3)
            bench.go()
            await bench.until_ended(1)
            assert bench.incident(incident).attempt == 1

    asyncio.run(work())


def test_a_worker_that_breaks_gives_its_incidents_back_and_calls_no_agent_failed(
    benches: Benches,
) -> None:
    failing = Failing(benches.store)
    (incident,) = benches.store.create_incidents([an_event()])

    async def work() -> None:
        config = benches.config(WAITING, shutdown_timeout=0)
        async with benches.working(config, failing) as bench:
            await bench.until(bench.pids)
            failing.error = ValueError("a defect")
            failing.failures["has_pending"] = 1
            await bench.until(lambda: bench.status(incident) is not IncidentStatus.RUNNING)

    with pytest.raises(ValueError, match="a defect"):
        asyncio.run(work())
    found = benches.store.get_incident(incident.incident_id)
    assert found is not None
    assert (found.status, found.attempts_charged) == (IncidentStatus.PENDING, 0)


@linux
@pytest.mark.parametrize("how", ["fails", "hangs"])
def test_agents_are_stopped_before_leases_end_that_cannot_be_renewed(
    benches: Benches, how: str
) -> None:
    failing = Failing(benches.store)
    free = threading.Event()
    (incident,) = benches.store.create_incidents([an_event()])

    async def work() -> None:
        config = benches.config(f"trap '' TERM; {WAITING}", lease_duration=2)
        async with benches.working(config, failing) as bench:
            await bench.until(bench.pids)
            if how == "fails":
                failing.failures["renew_leases"] = float("inf")
            else:
                failing.hanging["renew_leases"] = free
            try:
                await bench.until(lambda: not any(is_running(pid) for pid in bench.pids()))
                held = bench.incident(incident)
                assert held.status is IncidentStatus.RUNNING, "nobody has taken it over yet"
                assert held.lease_expires_at is not None
            finally:
                failing.failures.clear()
                failing.hanging.clear()
                free.set()

    asyncio.run(work())
    (execution,) = benches.store.list_executions(incident.incident_id)
    assert execution.outcome is None, "nothing was written"


def test_one_heartbeat_that_fails_costs_nothing(benches: Benches) -> None:
    failing = Failing(benches.store)
    (incident,) = benches.store.create_incidents([an_event()])

    async def work() -> None:
        config = benches.config(WAITING, lease_duration=2)
        async with benches.working(config, failing) as bench:
            await bench.until(bench.pids)
            failing.failures["renew_leases"] = 1
            await bench.until(lambda: failing.calls.count("renew_leases") >= 3)
            bench.go()
            await bench.until_ended(1)
            assert bench.incident(incident).attempt == 1

    asyncio.run(work())


def test_draining_ends_although_an_outcome_cannot_be_written(benches: Benches) -> None:
    """The lease runs out, and the incident is investigated again."""
    failing = Failing(benches.store)
    failing.failures = {"complete_incidents": float("inf"), "release_incident": float("inf")}
    (incident,) = benches.store.create_incidents([an_event()])

    async def work() -> None:
        config = benches.config(shutdown_timeout=0)
        async with benches.working(config, failing) as bench:
            await bench.until(lambda: "complete_incidents" in failing.calls)

    asyncio.run(work())
    found = benches.store.get_incident(incident.incident_id)
    assert found is not None
    assert found.status is IncidentStatus.RUNNING


# --- several workers ------------------------------------------------------------------------------


def test_several_workers_on_one_database_share_the_work(benches: Benches) -> None:
    benches.store.create_incidents(events_of("prod", 20))

    async def work() -> Sequence[Bench]:
        config = benches.config(max_concurrent_agents=2)
        async with contextlib.AsyncExitStack() as stack:
            workers = [await stack.enter_async_context(benches.working(config)) for _ in range(3)]
            await workers[0].until(lambda: sum(len(bench.ended) for bench in workers) == 20)
        return workers

    workers = asyncio.run(work())

    ended = [incident_id for bench in workers for incident_id, _ in bench.ended]
    assert len(set(ended)) == 20
    assert query(benches.store, "select count(*), max(attempt) from agent_executions") == [(20, 1)]


@linux
def test_a_worker_that_starts_leaves_the_agents_of_the_others_on_its_host_alone(
    benches: Benches,
) -> None:
    (incident,) = benches.store.create_incidents([an_event()])

    async def work() -> None:
        config = benches.config(WAITING)
        async with benches.working(config) as first:
            await first.until(
                lambda: first.pids() and first.store.list_executions(incident.incident_id)
            )
            async with benches.working(config) as second:
                await second.until(lambda: len(query(second.store, "select 1 from workers")) == 2)
                (new,) = second.store.create_incidents([an_event()])
                await second.until(lambda: second.status(new) is IncidentStatus.RUNNING)
                assert all(is_running(pid) for pid in first.pids())
                first.go()
                await first.until(lambda: first.status(incident) is IncidentStatus.RESOLVED)

    asyncio.run(work())


@linux
def test_a_worker_that_starts_kills_what_a_dead_one_left_on_its_host(benches: Benches) -> None:
    benches.store.create_incidents([an_event()])
    dead = claim_one(benches.store, "dead", LEASE)
    agent = subprocess.Popen(["sleep", "1000"], start_new_session=True)
    try:
        host = socket.gethostname()
        started = agent_process.process_start_time(agent.pid)
        execution = an_execution(dead, host=host, pid=agent.pid, process_started_at=started)
        benches.store.start_execution(execution)

        async def work() -> None:
            async with benches.working(benches.config()) as bench:
                await bench.until(lambda: not is_running(agent.pid))

        asyncio.run(work())
        assert agent.wait() == -signal.SIGKILL
    finally:
        agent.kill()
        agent.wait()


# --- settings that change -------------------------------------------------------------------------


def test_a_system_prompt_that_cannot_be_read_is_a_mistake_of_the_configuration(
    benches: Benches, tmp_path: Path
) -> None:
    config = benches.config(agent_system_prompt_file=str(tmp_path / "none.md"))

    async def work() -> None:
        with pytest.raises(nightcrier.ConfigError, match=r"none\.md cannot be read"):
            Worker(config, AsyncStore(benches.store), Supervisor())
        worker = Worker(benches.config(), AsyncStore(benches.store), Supervisor())
        before = worker.config
        with pytest.raises(nightcrier.ConfigError):
            worker.use(config)
        assert worker.config is before, "all of the old, or all of the new"

    asyncio.run(work())


def test_a_reload_is_for_the_next_agents(benches: Benches, tmp_path: Path) -> None:
    (tmp_path / "system.md").write_text("You are another.")

    async def work() -> None:
        async with benches.working(benches.config("exit 1")) as bench:
            bench.store.create_incidents([an_event()])
            await bench.until_ended(1)
            bench.worker.use(benches.config(agent_system_prompt_file=str(tmp_path / "system.md")))
            (incident,) = bench.store.create_incidents([an_event()])
            await bench.until_ended(2)
            assert bench.status(incident) is IncidentStatus.RESOLVED
            sent = bench.config.workspace_root / incident.incident_id / "prompt-sent.md"
            assert sent.read_text().startswith("You are another.\n")

    asyncio.run(work())


# --- much, and hostile ----------------------------------------------------------------------------


@pytest.mark.slow
def test_a_thousand_incidents_are_all_resolved_once(benches: Benches) -> None:
    benches.store.create_incidents(events_of("prod", 1000))

    async def work() -> None:
        async with benches.working(benches.config(max_concurrent_agents=8)) as bench:
            await bench.until(lambda: len(bench.ended) == 1000, 300)

    asyncio.run(work())
    assert query(benches.store, "select status, count(*), max(attempt) from incidents") == [
        ("RESOLVED", 1000, 1)
    ]


@pytest.mark.parametrize(
    "text", ["\x1b[31mred\x1b[0m", "```\n---\n", "\u202eevil", "x" * 1_000_000]
)
def test_a_hostile_event_is_investigated_like_any_other(benches: Benches, text: str) -> None:
    fields = ("context", "fault_type", "resource_name", "resource_kind")
    event = an_event(**{name: text if name == "context" else text[:512] for name in fields})
    (incident,) = benches.store.create_incidents([event])

    async def work() -> None:
        async with benches.working(benches.config()) as bench:
            await bench.until_ended(1)
            assert bench.status(incident) is IncidentStatus.RESOLVED

    asyncio.run(work())
    workspace = benches.root / "incidents" / incident.incident_id
    assert json.loads((workspace / "incident.json").read_text())["context"] == text
    with sqlite3.connect(benches.root / "nightcrier.db") as connection:
        assert connection.execute("select context from fault_events").fetchone() == (text,)
    connection.close()
