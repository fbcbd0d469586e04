"""Every command as its own process, as a person or a unit file starts it."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import yaml

from fake_mcp import a_fault, a_log
from running_program import (
    DEADLINE,
    GOOD_AGENT,
    PROGRAM,
    Clusters,
    Program,
    an_agent,
    clean_environment,
    eventually,
    get,
    nightcrier,
    processes_with,
    rows,
    statuses,
)

TRUE_AGENT = ("--agent-cli", "command", "--agent-command", "true")
AGENT = ("--agent-cli", "command", "--agent-command", an_agent())
ANY_PORT = ("--health-listen", "127.0.0.1:0")


@pytest.fixture
def clusters() -> Iterator[Clusters]:
    with Clusters("alpha", "beta") as running:
        yield running


def one_line(done: subprocess.CompletedProcess[str]) -> str:
    """The one line of an error: no traceback, nothing on stdout."""
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    lines = [line for line in done.stderr.splitlines() if not line.startswith("{")]  # the log
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("nightcrier: ")
    return lines[0]


# ---- Usage ----


def test_version_prints_the_version(tmp_path: Path) -> None:
    done = nightcrier("version", cwd=tmp_path)
    assert done.returncode == 0
    first = done.stdout.splitlines()[0]
    assert re.fullmatch(r"nightcrier \d+\.\d+\.\d+", first)
    assert nightcrier("--version", cwd=tmp_path).stdout == f"{first}\n"
    assert list(tmp_path.iterdir()) == []


def test_help_names_every_command_and_the_exit_codes(tmp_path: Path) -> None:
    done = nightcrier("--help", cwd=tmp_path)
    assert done.returncode == 0
    for word in ("run", "demo", "init", "check", "migrate", "replay", "version", "exit codes"):
        assert word in done.stdout


@pytest.mark.parametrize(
    "command", ["run", "demo", "init", "check", "migrate", "replay", "version"]
)
def test_every_command_has_help_with_an_example(command: str, tmp_path: Path) -> None:
    done = nightcrier(command, "--help", cwd=tmp_path)
    assert done.returncode == 0
    assert f"nightcrier {command}" in done.stdout
    assert "example:" in done.stdout


@pytest.mark.parametrize(
    "words",
    [
        ["investigate"],
        ["run", "--no-such-option"],
        ["--config"],
        ["migrate"],
        ["migrate", "sideways"],
        ["replay"],
        ["version", "now"],
        ["run", "--log", "debug"],  # no abbreviations
    ],
    ids=" ".join,
)
def test_a_command_line_that_makes_no_sense_is_exit_code_2(
    words: list[str], tmp_path: Path
) -> None:
    done = nightcrier(*words, cwd=tmp_path)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    assert list(tmp_path.iterdir()) == []


def test_the_program_runs_from_any_directory_and_without_an_installation(tmp_path: Path) -> None:
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    source = Path(__file__).parents[1] / "nightcrier.py"
    command = [sys.executable, str(source), "migrate", "up", "--sqlite", "here.db"]
    done = subprocess.run(command, cwd=folder, env=clean_environment(), check=False)
    assert done.returncode == 0
    assert (folder / "here.db").exists()


# ---- Configuration ----

TEN_MISTAKES = """\
clusters:
  - name: bad name
    mcp: {endpoint: "http://127.0.0.1:1/mcp"}
  - name: no-endpoint
  - name: wrong-scheme
    mcp: {endpoint: "ftp://host/mcp"}
  - name: typo
    mcp: {endpoint: "http://127.0.0.1:1/mcp", api_keyy: x}
max_concurrent_agents: many
agent_timeout: -5
log_level: loud
rolle: ingest
health_listen: "8080"
agent_cli: clippy
"""


@pytest.mark.parametrize("command", ["run", "check"])
def test_ten_mistakes_are_ten_messages_and_nothing_is_started(command: str, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(TEN_MISTAKES)
    done = nightcrier(command, cwd=tmp_path)
    assert done.returncode == 3
    assert done.stdout == ""
    lines = done.stderr.splitlines()
    assert len(lines) == 10, done.stderr
    for number, word in [
        (2, "name: must be"),
        (4, "endpoint"),
        (6, "ftp://"),
        (8, "api_keyy"),
        (9, "max_concurrent_agents"),
        (10, "agent_timeout"),
        (11, "loud"),
        (12, "rolle"),
        (13, "health_listen"),
        (14, "clippy"),
    ]:
        assert any(f"config.yaml:{number}:" in line and word in line for line in lines), word
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"], "nothing was made"


def test_no_cluster_to_watch_is_a_mistake(tmp_path: Path) -> None:
    done = nightcrier("run", *TRUE_AGENT, cwd=tmp_path)
    assert done.returncode == 3
    assert "--cluster NAME=URL" in one_line(done)
    assert list(tmp_path.iterdir()) == []


def test_a_configuration_that_is_not_there_is_a_mistake(tmp_path: Path) -> None:
    done = nightcrier("run", "--config", "no.yaml", cwd=tmp_path)
    assert done.returncode == 3
    assert "no.yaml" in one_line(done)


def test_init_writes_a_file_that_check_accepts_and_never_overwrites(tmp_path: Path) -> None:
    done = nightcrier("init", cwd=tmp_path)
    assert done.returncode == 0
    text = (tmp_path / "config.yaml").read_text()
    assert yaml.safe_load(text)["clusters"][0]["name"] == "my-cluster"
    again = nightcrier("init", cwd=tmp_path)
    assert again.returncode == 2
    assert "already there" in one_line(again)
    assert (tmp_path / "config.yaml").read_text() == text
    checked = nightcrier("check", "--offline", *TRUE_AGENT, cwd=tmp_path)
    assert checked.returncode == 0, checked.stdout
    assert not (tmp_path / "nightcrier.db").exists()


def test_every_commented_default_of_init_can_be_uncommented(tmp_path: Path) -> None:
    assert nightcrier("init", "all.yaml", cwd=tmp_path).returncode == 0
    text = (tmp_path / "all.yaml").read_text()
    head, _, options = text.partition("kubeconfig:")
    lines = []
    for line in options.splitlines()[1:]:
        uncommented = re.sub(r"^# ([a-z_]+: .*)$", r"\1", line)
        empty = uncommented.endswith((": null", ": []"))
        lines.append(line if empty else uncommented)
    (tmp_path / "all.yaml").write_text(head + "x\n" + "\n".join(lines) + "\n")
    done = nightcrier("check", "--offline", "--config", "all.yaml", *TRUE_AGENT, cwd=tmp_path)
    assert done.returncode == 0, done.stderr + done.stdout


def test_init_where_no_file_can_be_made_is_exit_code_2(tmp_path: Path) -> None:
    done = nightcrier("init", "no/such/folder/config.yaml", cwd=tmp_path)
    assert done.returncode == 2
    one_line(done)


# ---- check ----


def test_check_has_a_line_for_each_thing_and_connects_to_the_clusters(
    clusters: Clusters, tmp_path: Path
) -> None:
    done = nightcrier("check", *clusters.flags(), *TRUE_AGENT, cwd=tmp_path)
    assert done.returncode == 0, done.stdout
    names = [line.partition(":")[0] for line in done.stdout.splitlines()]
    assert names == [
        "ok    configuration",
        "ok    sqlite",
        "ok    database",
        "ok    workspaces",
        "ok    agent",
        "ok    cluster alpha",
        "ok    cluster beta",
    ]
    assert "stream ok" in done.stdout
    assert clusters.do(lambda: clusters.fakes["alpha"].sessions) == {}, "nothing is left behind"


def test_check_shows_version_and_key_of_the_agent(clusters: Clusters, tmp_path: Path) -> None:
    (tmp_path / "codex").write_text("#!/bin/sh\necho codex-cli 9.9.9\n")
    (tmp_path / "codex").chmod(0o755)
    check = ("check", "--offline", *clusters.flags("alpha"), "--agent-cli", "codex")
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin"}

    done = nightcrier(*check, cwd=tmp_path, **environment)
    without = f"ok    agent: codex, {tmp_path}/codex, codex-cli 9.9.9, openai_api_key is not set"
    assert without in done.stdout.splitlines()

    done = nightcrier(*check, cwd=tmp_path, OPENAI_API_KEY="canary", **environment)
    assert without.replace("not set", "set") in done.stdout.splitlines()
    assert "canary" not in done.stdout + done.stderr

    done = nightcrier(*check, "--agent-system-prompt-file", "none.md", cwd=tmp_path, **environment)
    assert done.returncode == 3
    assert "FAIL  agent: agent_system_prompt_file none.md cannot be read" in done.stdout


def test_check_tells_of_everything_that_is_wrong(tmp_path: Path) -> None:
    (tmp_path / "not.db").write_text("this is not a database" * 100)
    done = nightcrier(
        *("check", "--cluster", "down=http://127.0.0.1:1/mcp", "--sqlite", "not.db"),
        *("--agent-cli", "command", "--agent-command", "no-such-agent"),
        cwd=tmp_path,
    )
    assert done.returncode == 4, "the first failure decides"
    failed = [line for line in done.stdout.splitlines() if line.startswith("FAIL")]
    assert [line.split()[1] for line in failed] == ["database:", "agent:", "cluster"]


def test_a_missing_agent_is_exit_code_5(clusters: Clusters, tmp_path: Path) -> None:
    agent = ("--agent-cli", "command", "--agent-command", "no-such-agent --fast")
    done = nightcrier("run", *clusters.flags("alpha"), *agent, cwd=tmp_path)
    assert done.returncode == 5
    assert "no-such-agent" in one_line(done)
    assert list(tmp_path.iterdir()) == []
    done = nightcrier("check", "--offline", *clusters.flags("alpha"), *agent, cwd=tmp_path)
    assert done.returncode == 5


STORES = [[], ["--state-store", "filesystem"]]


@pytest.mark.parametrize("store", STORES, ids=["SQLite", "files"])
def test_a_host_without_sqlite_is_exit_code_5(store: list[str], tmp_path: Path) -> None:
    (tmp_path / "apsw.py").write_text("raise ImportError('not for this host')\n")
    words = ["--cluster", "a=http://127.0.0.1:1/mcp", *TRUE_AGENT, *store]
    done = nightcrier("check", "--offline", *words, cwd=tmp_path, PYTHONPATH=str(tmp_path))
    assert done.returncode == 5
    assert "FAIL  sqlite: the package apsw cannot be loaded: not for this host\n" in done.stdout
    done = nightcrier("run", *words, cwd=tmp_path, PYTHONPATH=str(tmp_path))
    assert done.returncode == 5
    said = "nightcrier: the package apsw cannot be loaded: not for this host"
    assert done.stderr.splitlines()[-1] == said


# ---- Database ----


def test_migrate_up_status_plan_and_down(tmp_path: Path) -> None:
    def migrate(*words: str) -> str:
        done = nightcrier("migrate", *words, "--sqlite", "n.db", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert "applied 0001" in migrate("up")
    assert migrate("up") == "nothing to apply\n"
    assert re.search(r"^0001\S*\s+applied 20\d\d-\S+Z by nightcrier ", migrate("status"))
    assert migrate("plan") == ""
    undone = migrate("down", "--to", "0")
    assert "undone 0001" in undone
    copy = re.search(r"the database as it was: (\S+)", undone)
    assert copy is not None
    with sqlite3.connect(tmp_path / copy[1]) as connection:
        assert connection.execute("select count(*) from incidents").fetchone() == (0,)
    connection.close()
    assert "pending" in migrate("status")
    assert "create table incidents" in migrate("plan")
    assert "applied 0001" in migrate("up")


@pytest.mark.parametrize("action", ["status", "plan", "down"])
def test_migrating_a_database_that_is_not_there_makes_none(action: str, tmp_path: Path) -> None:
    words = ("--to", "0") if action == "down" else ()
    done = nightcrier("migrate", action, *words, "--sqlite", "n.db", cwd=tmp_path)
    assert done.returncode == 4
    one_line(done)
    assert list(tmp_path.iterdir()) == []


def test_migrate_down_without_a_version_is_a_usage_error(tmp_path: Path) -> None:
    nightcrier("migrate", "up", "--sqlite", "n.db", cwd=tmp_path)
    done = nightcrier("migrate", "down", "--sqlite", "n.db", cwd=tmp_path)
    assert done.returncode == 2
    assert "--to N" in one_line(done)


def newer(path: Path) -> None:
    with sqlite3.connect(path) as connection:
        connection.execute("insert into schema_migrations values (99, 'later', 'x', 'x', 'x')")
    connection.close()


def edited(path: Path) -> None:
    with sqlite3.connect(path) as connection:
        connection.execute("update schema_migrations set checksum = 'changed'")
    connection.close()


def garbage(path: Path) -> None:
    for file in path.parent.glob("n.db*"):
        file.unlink()
    path.write_bytes(b"not a database at all" * 1000)


def damaged(path: Path) -> None:
    with sqlite3.connect(path) as connection:
        connection.execute("pragma wal_checkpoint(truncate)")
    connection.close()
    content = bytearray(path.read_bytes())
    content[100:] = b"\xa5" * (len(content) - 100)
    path.write_bytes(content)


@pytest.mark.parametrize("harm", [newer, edited, garbage, damaged], ids=lambda f: f.__name__)
def test_a_database_that_cannot_be_used_is_exit_code_4_and_one_line(
    harm: Any, clusters: Clusters, tmp_path: Path
) -> None:
    assert nightcrier("migrate", "up", "--sqlite", "n.db", cwd=tmp_path).returncode == 0
    harm(tmp_path / "n.db")
    done = nightcrier(
        "run", *clusters.flags("alpha"), *TRUE_AGENT, "--sqlite", "n.db", cwd=tmp_path
    )
    assert done.returncode == 4
    said = one_line(done)
    assert any(words in said for words in ("n.db", "schema version 99", "other content"))
    checked = nightcrier(
        *("check", "--offline", *clusters.flags("alpha"), *TRUE_AGENT, "--sqlite", "n.db"),
        cwd=tmp_path,
    )
    assert checked.returncode == 4
    assert "Traceback" not in checked.stderr


@pytest.mark.parametrize("place", ["a-file/n.db", "a-file/sub/n.db", "a-folder"])
@pytest.mark.parametrize("command", ["run", "check", "migrate", "replay"])
def test_a_place_where_no_database_can_be_is_exit_code_4_and_one_line(
    place: str, command: str, tmp_path: Path
) -> None:
    (tmp_path / "a-file").write_text("a file")
    (tmp_path / "a-folder").mkdir()
    (tmp_path / "fault.json").write_text(json.dumps(a_fault()))
    words = {
        "run": ["run", "--cluster", "a=http://127.0.0.1:1/mcp", *TRUE_AGENT],
        "check": ["check", "--offline", "--cluster", "a=http://127.0.0.1:1/mcp", *TRUE_AGENT],
        "migrate": ["migrate", "up"],
        "replay": ["replay", "fault.json", *TRUE_AGENT],
    }[command]
    done = nightcrier(*words, "--sqlite", place, cwd=tmp_path)
    assert done.returncode == 4, done.stderr
    assert "Traceback" not in done.stderr
    if command != "check":  # which tells of it on stdout
        one_line(done)


# ---- replay ----


@pytest.mark.parametrize("form", ["notification", "params", "data"])
def test_a_recorded_fault_is_replayed_through_the_whole_pipeline(form: str, tmp_path: Path) -> None:
    notification = a_log(a_fault("recorded"))
    params: Any = notification["params"]
    document = {"notification": notification, "params": params, "data": params["data"]}[form]
    (tmp_path / "fault.json").write_text(json.dumps(document))
    done = nightcrier("replay", "fault.json", *AGENT, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = re.fullmatch(r"[0-9a-f-]{36}  RESOLVED\n(.*)\n", done.stdout)
    assert found
    assert (tmp_path / found[1]).is_file(), "the report"
    ((status, cluster, name, cause, confidence),) = rows(
        tmp_path / "nightcrier.db",
        "select status, cluster, resource_name, root_cause, confidence from v_incidents",
    )
    assert (status, cluster, name) == ("RESOLVED", "alpha", "recorded")
    assert (cause, confidence) == ("The disk is full.", "HIGH")
    (registered,) = rows(tmp_path / "nightcrier.db", "select role, state from workers")
    assert registered == ("worker", "stopped"), "else replicas would leave clusters to it"


def test_an_event_is_replayed_in_events_mode(tmp_path: Path) -> None:
    event = {"type": "Warning", "reason": "BackOff", "involvedObject": {"kind": "Pod", "name": "p"}}
    (tmp_path / "event.json").write_text(json.dumps({"cluster": "c", "event": event}))
    done = nightcrier("replay", "event.json", "--subscribe-mode", "events", *AGENT, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = rows(tmp_path / "nightcrier.db", "select fault_type, severity from incidents")
    assert found == [("BackOff", "warning")]


def test_a_replayed_fault_whose_agent_fails_is_exit_code_1(tmp_path: Path) -> None:
    (tmp_path / "fault.json").write_text(json.dumps(a_fault()))
    done = nightcrier(
        *("replay", "fault.json", "--cluster-name", "mine"),
        *("--agent-cli", "command", "--agent-command", "false"),
        cwd=tmp_path,
    )
    assert done.returncode == 1
    assert "AGENT_FAILED" in done.stdout
    assert rows(tmp_path / "nightcrier.db", "select cluster from incidents") == [("mine",)]


def test_a_replay_for_another_worker_only_stores_the_fault(tmp_path: Path) -> None:
    (tmp_path / "fault.json").write_text(json.dumps(a_fault()))
    done = nightcrier("replay", "fault.json", "--role", "ingest", cwd=tmp_path)
    assert done.returncode == 0
    assert "PENDING" in done.stdout
    assert not (tmp_path / "incidents").exists()


@pytest.mark.parametrize(
    "content",
    [b"", b"{broken", b"[1, 2]", b"7", b"null", b"\xff\xfe\x00", b"[" * 100_000],
    ids=["empty", "broken", "list", "number", "null", "binary", "deep"],
)
def test_what_is_not_a_fault_is_a_usage_error_and_makes_no_database(
    content: bytes, tmp_path: Path
) -> None:
    (tmp_path / "fault.json").write_bytes(content)
    done = nightcrier("replay", "fault.json", *TRUE_AGENT, cwd=tmp_path)
    assert done.returncode == 2
    assert "fault.json" in one_line(done)
    assert [path.name for path in tmp_path.iterdir()] == ["fault.json"]


def test_a_hostile_recording_is_an_incident(tmp_path: Path) -> None:
    text = '{"cluster": "a\\ud800\\u0000", "faultType": "\\u001b[31m", "context": "\\udfff"}'
    (tmp_path / "fault.json").write_text(text)
    done = nightcrier("replay", "fault.json", *AGENT, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "\x1b" not in done.stdout + done.stderr
    assert rows(tmp_path / "nightcrier.db", "select cluster from incidents") == [("a\ufffd\ufffd",)]


# ---- run ----


def test_flags_alone_are_enough_and_run_is_the_default_command(
    clusters: Clusters, tmp_path: Path
) -> None:
    with Program(*clusters.flags("alpha"), *AGENT, *ANY_PORT, cwd=tmp_path) as program:
        clusters.await_watch("alpha")
        assert clusters.emit("alpha", "by-flags")
        program.wait_for('"resolved"')
        assert program.stop() == 0
    assert statuses(tmp_path / "nightcrier.db") == {"RESOLVED": 1}
    entries = program.log()
    assert len(entries) == len(program.err), "without a terminal every line of the log is JSON"
    assert program.out == [], "stdout is for results"
    assert {"time", "level", "message"} <= set(entries[0])
    ((workspace,),) = rows(tmp_path / "nightcrier.db", "select workspace from agent_executions")
    assert Path(workspace, "output", "investigation.md").exists()
    assert rows(tmp_path / "nightcrier.db", "select connection_state from clusters") == [
        ("disconnected",)
    ]
    assert rows(tmp_path / "nightcrier.db", "select state from workers") == [("stopped",)]


def test_sigterm_lets_the_agents_finish_and_takes_nothing_new(
    clusters: Clusters, tmp_path: Path
) -> None:
    agent = an_agent(f"until test -e ../../go; do sleep 0.02; done; {GOOD_AGENT}")
    with Program(
        *clusters.flags("alpha"),
        *("--agent-cli", "command", "--agent-command", agent, *ANY_PORT),
        *("--max-concurrent-agents", "1"),
        cwd=tmp_path,
    ) as program:
        clusters.await_watch("alpha")
        clusters.emit("alpha", "first")
        clusters.emit("alpha", "second")
        eventually(lambda: rows(tmp_path / "nightcrier.db", "select 1 from agent_executions"))
        assert program.get("/readyz")[0] == 200
        program.signal()
        eventually(lambda: program.get("/readyz")[0] == 503)
        assert "draining" in program.get("/readyz")[1]
        eventually(lambda: not clusters.watched("alpha"), "the end of the watch")
        (tmp_path / "go").touch()
        assert program.ends() == 0
    assert statuses(tmp_path / "nightcrier.db") == {"RESOLVED": 1, "PENDING": 1}


def test_agents_that_outlast_the_drain_are_stopped_and_their_incidents_released_with_a_refund(
    clusters: Clusters, tmp_path: Path
) -> None:
    marker = f"sleep 98{time.monotonic_ns() % 10**9}"
    with Program(
        *clusters.flags("alpha"),
        *("--agent-cli", "command", "--agent-command", an_agent(f"{marker}; true"), *ANY_PORT),
        *("--shutdown-timeout", "0.2"),
        cwd=tmp_path,
    ) as program:
        clusters.await_watch("alpha")
        clusters.emit("alpha")
        eventually(lambda: list(processes_with(marker)), "the agent")
        eventually(lambda: rows(tmp_path / "nightcrier.db", "select 1 from agent_executions"))
        assert program.stop() == 0
        assert not list(processes_with(marker))
    database = tmp_path / "nightcrier.db"
    assert rows(
        database, "select status, attempt, attempts_charged, claimed_by from incidents"
    ) == [("PENDING", 1, 0, None)]
    assert rows(database, "select outcome, completed_at is not null from agent_executions") == [
        ("cancelled", 1)
    ]
    assert rows(database, "select to_status, reason from incident_transitions order by seq") == [
        ("RUNNING", "claimed"),
        ("PENDING", "released on shutdown"),
    ]


def test_a_second_signal_ends_at_once_and_its_agents_too(
    clusters: Clusters, tmp_path: Path
) -> None:
    marker = f"sleep 97{time.monotonic_ns() % 10**9}"
    with Program(
        *clusters.flags("alpha"),
        *("--agent-cli", "command", "--agent-command", an_agent(f"{marker}; true"), *ANY_PORT),
        cwd=tmp_path,
    ) as program:
        clusters.await_watch("alpha")
        clusters.emit("alpha")
        eventually(lambda: list(processes_with(marker)), "the agent")
        program.signal(signal.SIGINT)
        program.wait_for("once more ends at once")
        program.signal(signal.SIGTERM)
        assert program.ends(seconds=10) == 1
        eventually(lambda: not list(processes_with(marker)), "the end of the agent", 2.0)


def test_a_second_process_that_watches_is_refused_on_the_same_file(
    clusters: Clusters, tmp_path: Path
) -> None:
    with Program(*clusters.flags("alpha"), *AGENT, *ANY_PORT, cwd=tmp_path) as program:
        clusters.await_watch("alpha")
        for role in ("ingest", "all"):
            done = nightcrier(
                *("run", *clusters.flags("beta"), *AGENT, *ANY_PORT, "--role", role), cwd=tmp_path
            )
            assert done.returncode == 4
            assert "--role worker" in one_line(done)
        assert program.stop() == 0
    with Program(*clusters.flags("alpha"), *AGENT, *ANY_PORT, cwd=tmp_path) as program:
        clusters.await_watch("alpha")  # the lock went with the process
        assert program.stop() == 0


def test_one_process_may_watch_and_others_work_on_the_same_file(
    clusters: Clusters, tmp_path: Path
) -> None:
    worker = ("run", "--role", "worker", *AGENT, *ANY_PORT)
    with (
        Program(*("run", "--role", "ingest", *clusters.flags(), *ANY_PORT), cwd=tmp_path) as ingest,
        Program(*worker, cwd=tmp_path) as first,
        Program(*worker, cwd=tmp_path) as second,
    ):
        clusters.await_watch()
        for number in range(20):
            assert clusters.emit("alpha" if number % 2 else "beta", f"pod-{number}")
        database = tmp_path / "nightcrier.db"
        eventually(lambda: statuses(database).get("RESOLVED") == 20, "20 reports")
        assert "resolved" not in "".join(ingest.err)
        assert [first.stop(), second.stop(), ingest.stop()] == [0, 0, 0]
    assert rows(database, "select count(*), max(attempt) from agent_executions") == [(20, 1)]
    assert sorted(rows(database, "select role, state from workers")) == [
        ("worker", "stopped"),
        ("worker", "stopped"),
    ]
    assert not (tmp_path / "nightcrier.db.lock").stat().st_size


def test_the_health_endpoints_tell_of_the_running_program(
    clusters: Clusters, tmp_path: Path
) -> None:
    flags = [*clusters.flags("alpha"), "--cluster", "down=http://127.0.0.1:1/mcp"]
    with Program(*flags, *AGENT, *ANY_PORT, cwd=tmp_path) as program:
        clusters.await_watch("alpha")
        clusters.emit("alpha")
        program.wait_for('"resolved"')
        assert program.get("/healthz") == (200, "ok\n")
        assert program.get("/readyz")[0] == 200

        def states() -> dict[str, tuple[str, int]]:
            listed = json.loads(program.get("/health/clusters")[1])["clusters"]
            return {c["name"]: (c["status"], c["event_count"]) for c in listed}

        eventually(lambda: states()["down"][0] == "failed")
        assert states()["alpha"] == ("active", 1)
        assert program.stop() == 0


def test_a_taken_port_is_a_warning_for_the_default_and_an_error_for_one_that_was_given(
    clusters: Clusters, tmp_path: Path
) -> None:
    with socket.socket() as taken:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            taken.bind(("127.0.0.1", 8080))
            taken.listen()
        except OSError:
            pass  # somebody else has it: as good
        given = ("--health-listen", "127.0.0.1:8080")
        done = nightcrier("run", *clusters.flags("alpha"), *AGENT, *given, cwd=tmp_path)
        assert done.returncode == 1
        assert "health_listen" in one_line(done)
        assert not clusters.watched("alpha")
        with Program(*clusters.flags("alpha"), *AGENT, cwd=tmp_path) as program:
            program.wait_for("no health endpoint")
            clusters.await_watch("alpha")
            assert program.stop() == 0


def config_file(folder: Path, clusters: Clusters, *names: str, **settings: Any) -> None:
    listed = [{"name": n, "mcp": {"endpoint": f"{clusters.url}/{n}/mcp"}} for n in names]
    document = {
        "clusters": listed,
        "agent_cli": "command",
        "agent_command": ["sh", "-c", "printf '%0200d' 7 > output/investigation.md"],
        "health_listen": "127.0.0.1:0",
        **settings,
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(document))


def test_sighup_reads_the_clusters_anew_and_a_mistake_changes_nothing(
    clusters: Clusters, tmp_path: Path
) -> None:
    config_file(tmp_path, clusters, "alpha")
    with Program(cwd=tmp_path) as program:
        clusters.await_watch("alpha")
        session = clusters.do(lambda: clusters.fakes["alpha"].session.session_id)
        config_file(tmp_path, clusters, "alpha", "beta")
        program.signal(signal.SIGHUP)
        program.wait_for("clusters reloaded")
        clusters.await_watch("beta")
        (tmp_path / "config.yaml").write_text("clusters: 7\nlog_level: loud\n")
        program.signal(signal.SIGHUP)
        program.wait_for("not reloaded", 2)
        assert clusters.watched("alpha")
        assert clusters.watched("beta")
        config_file(tmp_path, clusters, "alpha")
        for _ in range(5):  # in a row: they must not get into each other's way
            program.signal(signal.SIGHUP)
        eventually(lambda: not clusters.watched("beta"), "the end of the watch of beta")
        clusters.emit("alpha")
        program.wait_for('"resolved"')
        assert clusters.do(lambda: clusters.fakes["alpha"].session.session_id) == session
        assert program.stop() == 0
    assert statuses(tmp_path / "nightcrier.db") == {"RESOLVED": 1}


def test_a_reload_with_an_agent_that_is_not_there_changes_nothing(
    clusters: Clusters, tmp_path: Path
) -> None:
    file = tmp_path / "config.yaml"

    def configure(agent: str) -> None:
        file.write_text(f"agent_cli: command\nagent_command: {json.dumps(agent)}\n")

    configure(an_agent())
    options = [*clusters.flags(), "--config", file, "--health-listen", "127.0.0.1:0"]
    with Program(*options, cwd=tmp_path) as program:
        clusters.await_watch()
        configure("/usr/local/bin/my-agnet")
        program.signal(signal.SIGHUP)
        assert "my-agnet" in program.wait_for("configuration not reloaded")
        clusters.emit("alpha")
        program.wait_for('"resolved"')
        assert program.stop() == 0


def test_a_signal_during_a_reload_stops_all_the_same(clusters: Clusters, tmp_path: Path) -> None:
    config_file(tmp_path, clusters, "alpha")
    with Program(cwd=tmp_path) as program:
        clusters.await_watch("alpha")
        config_file(tmp_path, clusters, "beta")
        program.signal(signal.SIGHUP)
        assert program.stop() == 0
    assert "Traceback" not in "".join(program.err)
    eventually(lambda: not clusters.watched("alpha") and not clusters.watched("beta"))


# ---- demo ----


@pytest.fixture(scope="module")
def demo(
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """A demo to its end, in a folder where its file is taken."""
    folder = tmp_path_factory.mktemp("demo")
    (folder / "nightcrier-demo.db").touch()
    return folder, nightcrier("demo", cwd=folder)


def test_the_demo_shows_the_whole_pipeline(
    demo: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    folder, done = demo
    assert done.returncode == 0, done.stdout + done.stderr
    assert "\x1b" not in done.stdout, "colours are for terminals"
    assert "Traceback" not in done.stderr
    announced = [line for line in done.stdout.splitlines() if re.match("--- .*: .* of ", line)]
    assert (folder / "nightcrier-demo.db").stat().st_size == 0
    database = folder / "nightcrier-demo-2.db"
    assert len(announced) >= 5
    assert statuses(database) == {"RESOLVED": len(announced)}
    assert done.stdout.count("RESOLVED") == len(announced), "the table has each of them"
    ((events, reports, executions, clusters, severities),) = rows(
        database,
        """select (select count(*) from fault_events), (select count(*) from triage_reports),
            (select count(*) from agent_executions), count(distinct cluster),
            count(distinct severity) from incidents""",
    )
    assert (events, reports, executions) == (len(announced),) * 3
    assert (clusters, severities) == (2, 3)
    gaps = rows(database, "select cluster from cluster_gaps where reason like '%closed%'")
    assert gaps == [("beta",)], "one lost its connection and returned"
    hints = re.findall(r"^ +(sqlite3 .*)$", done.stdout, re.MULTILINE)
    assert len(hints) == 3
    for hint in hints:
        *_, path, query = shlex.split(hint)
        with sqlite3.connect(folder / path) as connection:
            assert connection.execute(query).fetchall()
        connection.close()


def test_a_second_demo_goes_on_with_a_file_that_is_named_and_keeps_running_when_told(
    demo: tuple[Path, subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    folder = shutil.copytree(demo[0], tmp_path / "again")
    database = folder / "nightcrier-demo-2.db"
    first = sum(statuses(database).values())
    with Program("demo", "--keep-running", "--sqlite", database.name, cwd=folder) as program:
        eventually(lambda: [line for line in program.out if "still running" in line])
        assert sum(statuses(database).values()) == 2 * first
        (line,) = [line for line in program.out if "curl" in line]
        url = urlsplit(line.split()[-1])
        document = json.loads(get(url.netloc, url.path)[1])
        assert document["summary"]["active"] == 2
        assert program.stop() == 0
    assert list(processes_with(str(tmp_path))) == []


def test_a_demo_that_cannot_start_ends_and_says_why(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        done = nightcrier("demo", "--health-listen", address, cwd=tmp_path)
    assert done.returncode == 1
    assert "cannot listen" in done.stderr
    (tmp_path / "file").touch()
    assert nightcrier("demo", "--sqlite", "file/x.db", cwd=tmp_path).returncode == 4
    done = nightcrier("demo", "--postgres-dsn", "postgresql://h:x/d", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (3, "")
    assert "port" in one_line(done)


def test_a_demo_that_is_interrupted_ends_at_once(tmp_path: Path) -> None:
    with Program("demo", cwd=tmp_path) as program:
        eventually(lambda: [line for line in program.out if line.startswith("---")])
        program.signal(signal.SIGINT)
        assert program.ends(10) == 1
    assert "Traceback" not in "".join(program.err)
    assert (tmp_path / "nightcrier-demo.db").exists()


# ---- Secrets ----

CANARIES = ("canary-of-the-cluster", "canary-of-a-file", "canary-of-the-model", "canary-of-env")


def test_no_secret_is_in_any_log_argument_row_or_file(tmp_path: Path) -> None:
    """Also when the agent and the server repeat what they know, and after a reload."""
    secrets, work = tmp_path / "secrets", tmp_path / "work"
    secrets.mkdir()
    work.mkdir()
    (secrets / "token").write_text("canary-of-a-file\n")
    agent = (
        "env > output/environment; cat output/environment;"
        " printf '# Report\\n\\n## Root Cause\\n\\nIt was canary-of-the-cluster. %0200d\\n' 7"
        " > output/investigation.md"
    )
    with Clusters("alpha", "beta") as clusters:
        listed: list[dict[str, Any]] = [
            {"name": "alpha", "mcp": {"endpoint": f"{clusters.url}/alpha/mcp",
                                      "api_key": "canary-of-the-cluster"}},
            {"name": "beta", "mcp": {"endpoint": f"{clusters.url}/beta/mcp",
                                     "api_key_file": str(secrets / "token")}},
        ]  # fmt: skip
        settings: dict[str, Any] = {
            "clusters": listed,
            "agent_cli": "command",
            "agent_command": ["sh", "-c", agent],
            "anthropic_api_key": "canary-of-the-model",
            "log_level": "debug",
            "health_listen": "127.0.0.1:0",
        }
        (secrets / "config.yaml").write_text(yaml.safe_dump(settings))
        with Program(
            *("run", "--config", secrets / "config.yaml"),
            cwd=work,
            environment={"AWS_SECRET_ACCESS_KEY": "canary-of-env"},
        ) as program:
            clusters.await_watch()
            sent = clusters.do(lambda: clusters.fakes["alpha"].seen[-1].headers["authorization"])
            assert sent == "Bearer canary-of-the-cluster"
            clusters.emit("alpha", context="canary-of-the-cluster came from the cluster itself")
            program.wait_for('"resolved"')
            listed[0]["mcp"]["api_key"] = "canary-after-reload"
            settings["agent_command"] = [
                "sh",
                "-c",
                agent.replace("was canary", "was canary-after-reload canary"),
            ]
            (secrets / "config.yaml").write_text(yaml.safe_dump(settings))
            program.signal(signal.SIGHUP)
            program.wait_for("clusters reloaded")
            clusters.await_watch()
            clusters.emit("beta")
            program.wait_for('"resolved"', 2)
            command_line = Path(f"/proc/{program.process.pid}/cmdline").read_text()
            health = program.get("/health/clusters")[1]
            assert program.stop() == 0
    said = "\n".join([*program.out, *program.err, command_line, health])
    assert statuses(work / "nightcrier.db") == {"RESOLVED": 2}
    for canary in CANARIES:
        assert canary not in said
    tainted = {
        (canary, str(path.relative_to(work)))
        for path in work.rglob("*")
        if path.is_file()
        for canary in CANARIES
        if canary.encode() in path.read_bytes()
    }
    # What the cluster itself reported is data, and the agent's own file is the agent's.
    expected = {"nightcrier.db", "nightcrier.db-wal", "incident.json", "prompt-sent.md"}
    for canary, name in tainted:
        assert canary == "canary-of-the-cluster", (canary, name)
        assert Path(name).name in expected | {"investigation.md"}, name
    assert rows(work / "nightcrier.db", "select report_markdown from triage_reports")
    for (report,) in rows(work / "nightcrier.db", "select report_markdown from triage_reports"):
        assert "canary" not in report


def test_a_closed_stdout_is_no_traceback(tmp_path: Path) -> None:
    nightcrier("migrate", "up", cwd=tmp_path)
    nightcrier("migrate", "down", "--to", "0", cwd=tmp_path)
    plan = subprocess.Popen(
        [sys.executable, str(PROGRAM), "migrate", "plan"],
        cwd=tmp_path,
        env=clean_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert plan.stdout is not None
    assert plan.stderr is not None
    plan.stdout.close()
    with plan.stderr:
        said = plan.stderr.read().decode()
    plan.wait(DEADLINE)
    assert "Traceback" not in said
