"""The commands on a PostgreSQL database, as a user runs them."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from conftest import a_schema, postgres_store, query
from fake_mcp import a_fault
from incidents import Role
from nightcrier import new_worker
from postgres_servers import DebianPostgres
from running_program import Clusters, an_agent, nightcrier


@pytest.fixture
def schema(postgres_dsn: str) -> Iterator[str]:
    with a_schema(postgres_dsn) as dsn:
        yield dsn


AGENT = ("--agent-cli", "command", "--agent-command", an_agent())


def test_the_demo_runs_on_a_server_and_leaves_nothing_else(schema: str, tmp_path: Path) -> None:
    done = nightcrier("demo", "--postgres-dsn", schema, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "7 faults, 7 incidents: each fault is one finished incident" in done.stdout
    assert "psql postgresql://" in done.stdout
    assert "sqlite3" not in done.stdout
    with contextlib.closing(postgres_store(schema)) as store:
        assert query(store, "select status, count(*) from v_incidents group by status") == [
            ("RESOLVED", 7)
        ]
        assert query(store, "select distinct state from workers") == [("stopped",)]
        assert query(store, "select count(*) from clusters where owner is not null") == [(0,)]
    assert not list(tmp_path.glob("*.db"))


def test_a_fault_can_be_replayed_on_a_server(schema: str, tmp_path: Path) -> None:
    (tmp_path / "fault.json").write_text(json.dumps(a_fault()))
    done = nightcrier("replay", "fault.json", *AGENT, "--postgres-dsn", schema, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "RESOLVED" in done.stdout


def test_the_schema_of_a_server_goes_up_and_down(schema: str, tmp_path: Path) -> None:
    def migrate(*words: str) -> tuple[int, str]:
        done = nightcrier("migrate", *words, "--postgres-dsn", schema, cwd=tmp_path)
        return done.returncode, done.stdout + done.stderr

    assert migrate("status") == (0, "0001_initial  pending\n0002_cluster_watches  pending\n")
    assert "create table incidents" in migrate("plan")[1]
    assert migrate("up") == (0, "applied 0001_initial\napplied 0002_cluster_watches\n")
    assert migrate("up") == (0, "nothing to apply\n")
    assert migrate("status")[1].count("applied 20") == 2
    assert migrate("down", "--to", "1") == (0, "undone 0002_cluster_watches\n")
    assert migrate("up")[0] == 0
    assert migrate("down", "--to", "0")[0] == 0
    assert migrate("status")[1].count("pending") == 2


def test_tables_are_not_taken_away_from_below_a_replica(schema: str, tmp_path: Path) -> None:
    with contextlib.closing(postgres_store(schema)) as store:
        worker = new_worker(Role.WORKER)
        store.save_worker(worker)
        done = nightcrier("migrate", "down", "--to", "0", "--postgres-dsn", schema, cwd=tmp_path)
        assert done.returncode == 4
        assert f"in use by {worker.worker_id}: stop them first" in done.stderr


def test_check_says_what_the_database_is(schema: str, tmp_path: Path) -> None:
    with Clusters("alpha") as clusters:
        words = ["check", *clusters.flags(), *AGENT, "--postgres-dsn", schema]
        done = nightcrier(*words, cwd=tmp_path)
        assert done.returncode == 0, done.stdout + done.stderr
        (line,) = (line for line in done.stdout.splitlines() if "database:" in line)
        assert line.startswith("ok    database: postgresql://")
        assert "PostgreSQL 1" in line
        assert line.endswith("2 migrations pending")
        assert "ok    spool: " in done.stdout
        nightcrier("migrate", "up", "--postgres-dsn", schema, cwd=tmp_path)
        assert "schema ok" in nightcrier(*words, cwd=tmp_path).stdout


PASSWORD = "canary-77-word"


@pytest.fixture(scope="module")
def guarded() -> Iterator[DebianPostgres]:
    """A server that wants a password."""
    rules = "local all all trust\nhost all all 127.0.0.1/32 scram-sha-256\n"
    with DebianPostgres(hba=rules) as server:
        server.run(f"alter role postgres password '{PASSWORD}'")
        yield server


@pytest.mark.parametrize("how", ["flag", "variable", "PGPASSWORD", "PGPASSFILE", "file"])
def test_a_password_is_used_wherever_it_comes_from_and_never_shown(
    guarded: DebianPostgres, tmp_path: Path, how: str
) -> None:
    secret, plain = guarded.dsn(password=PASSWORD), guarded.dsn()
    environment: dict[str, str] = {}
    words = ["check", "--offline", "--cluster", "a=http://127.0.0.1:1/mcp", *AGENT]
    words += ["--log-level", "debug"]
    if how == "flag":
        words += ["--postgres-dsn", secret]
    elif how == "variable":
        environment["NIGHTCRIER_POSTGRES_DSN"] = secret
    elif how == "file":
        (tmp_path / "dsn").write_text(secret)
        environment["NIGHTCRIER_POSTGRES_DSN_FILE"] = str(tmp_path / "dsn")
    else:
        words += ["--postgres-dsn", plain]
        passfile = tmp_path / "pgpass"
        passfile.write_text(f"127.0.0.1:{guarded.port}:*:postgres:{PASSWORD}\n")
        passfile.chmod(0o600)
        environment[how] = PASSWORD if how == "PGPASSWORD" else str(passfile)
    done = nightcrier(*words, cwd=tmp_path, **environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert PASSWORD not in done.stdout + done.stderr
    assert ("`ps` shows it" in done.stderr) == (how == "flag")


@pytest.mark.parametrize("command", ["check", "run", "migrate", "demo", "replay"])
def test_a_wrong_password_is_one_clear_line_and_the_exit_code_of_the_database(
    guarded: DebianPostgres, tmp_path: Path, command: str
) -> None:
    (tmp_path / "fault.json").write_text(json.dumps(a_fault()))
    words = {
        "check": ["--offline", "--cluster", "a=http://127.0.0.1:1/mcp", *AGENT],
        "run": ["--cluster", "a=http://127.0.0.1:1/mcp", *AGENT],
        "migrate": ["status"],
        "demo": [],
        "replay": ["fault.json", *AGENT],
    }
    dsn = guarded.dsn(password="wrong-one-77")
    done = nightcrier(
        command, *words[command], cwd=tmp_path,
        **({} if command == "demo" else {"NIGHTCRIER_POSTGRES_DSN": dsn}),
    ) if command != "demo" else nightcrier("demo", "--postgres-dsn", dsn, cwd=tmp_path)  # fmt: skip
    said = done.stdout + done.stderr
    assert done.returncode == 4, said
    assert "the password was not accepted" in said
    assert "wrong-one" not in said
    assert "Traceback" not in said


def test_a_server_that_is_not_there_is_one_clear_line(tmp_path: Path) -> None:
    dsn = "postgresql://night@127.0.0.1:1/crier"
    done = nightcrier("migrate", "status", "--postgres-dsn", dsn, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (4, "")
    assert done.stderr == (
        "nightcrier: database 127.0.0.1:1: nothing listens there: start PostgreSQL, or correct "
        "host and port\n"
    )


def test_a_connection_string_that_makes_no_sense_is_a_mistake_of_the_configuration(
    tmp_path: Path,
) -> None:
    done = nightcrier("migrate", "status", "--postgres-dsn", "mysql://h/d", cwd=tmp_path)
    assert done.returncode == 3
    assert "--postgres-dsn" in done.stderr
