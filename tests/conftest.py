"""What several test files need: builders of values, and stores.

Builders give a valid value; a test names only the fields that it is about.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import os
import secrets
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

import nightcrier
import sql_database
import state_store
from built_files import host_only_pyz, pyz  # noqa: F401
from incidents import (
    AgentExecution,
    Completion,
    FaultEvent,
    Incident,
    Outcome,
    Severity,
    TriageReport,
)
from postgres_servers import (  # noqa: F401
    debian_postgres,
    lent_postgres,
    own_postgres,
    postgres_dsn,
)


def scratch() -> str:
    """Where the tests keep their files: in memory, if there is room and programs may run.

    Nothing is written there more slowly than elsewhere, and no test can tell a crash of the machine
    from one of a process. TMPDIR=/tmp puts everything on the disk.
    """
    memory = Path("/dev/shm")
    if "TMPDIR" not in os.environ and os.access(memory, os.W_OK):
        found = os.statvfs(memory)
        if found.f_bavail * found.f_frsize >= 2 << 30 and not found.f_flag & os.ST_NOEXEC:
            return str(memory)
    return tempfile.gettempdir()


tempfile.tempdir = scratch()  # of pytest's tmp_path as well


@pytest.fixture(scope="module")
def known_objects() -> Iterator[None]:
    """What is there before the tests of a module is not searched again after each of them."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture
def leaks_are_found_in_the_test_that_made_them(known_objects: None) -> Iterator[None]:
    yield
    gc.collect()


NOON = datetime(2026, 11, 23, 12, 0, tzinfo=UTC)
MINUTE = timedelta(minutes=1)
LEASE = timedelta(minutes=5)
EXPIRED = timedelta(0)  # a lease that has run out as soon as it is given


def an_event(cluster: str = "prod", **fields: Any) -> FaultEvent:
    """A fault that has just arrived."""
    values: dict[str, Any] = {
        "event_id": sql_database.new_id(),
        "received_at": sql_database.utc_now(),
        "fault_type": "CrashLoop",
        "severity": Severity.CRITICAL,
        "resource_kind": "Pod",
        "resource_namespace": "default",
        "resource_name": "web-1",
        "fault_fingerprint": "cfb0dbaa9741da48",
    }
    return FaultEvent(cluster=cluster, **{**values, **fields})


def an_event_at(moment: datetime, cluster: str = "prod", **fields: Any) -> FaultEvent:
    """A fault that arrived at a time: its id says so, too."""
    event_id = sql_database.id_floor(moment)[:14] + "7" + secrets.token_hex(2)[1:]
    event_id += "-8" + secrets.token_hex(2)[1:] + "-" + secrets.token_hex(6)
    return an_event(cluster, event_id=event_id, received_at=moment, **fields)


def events_of(cluster: str, count: int, **fields: Any) -> list[FaultEvent]:
    return [an_event(cluster, **fields) for _ in range(count)]


def an_execution(incident: Incident, **fields: Any) -> AgentExecution:
    """The agent of a claimed incident, running."""
    values: dict[str, Any] = {
        "execution_id": sql_database.new_id(),
        "incident_id": incident.incident_id,
        "attempt": incident.attempt,
        "cluster": incident.cluster,
        "worker_id": incident.claimed_by,
        "host": "night-host",
        "runtime": "host",
        "agent": "stub",
        "started_at": sql_database.utc_now(),
    }
    return AgentExecution(**{**values, **fields})


def finished(
    execution: AgentExecution,
    outcome: Outcome = Outcome.SUCCEEDED,
    **fields: Any,
) -> AgentExecution:
    return dataclasses.replace(
        execution, **{"completed_at": sql_database.utc_now(), "outcome": outcome, **fields}
    )


def a_report(**fields: Any) -> TriageReport:
    values: dict[str, Any] = {
        "report_id": sql_database.new_id(),
        "generated_at": sql_database.utc_now(),
        "report_markdown": "# Report\n\nThe disk is full.\n",
        "root_cause": "The disk is full.",
        "confidence": "HIGH",
    }
    return TriageReport(**{**values, **fields})


def resolved(incident: Incident, **fields: Any) -> Completion:
    """The agent of a claimed incident has left a report."""
    values: dict[str, Any] = {
        "status": nightcrier.IncidentStatus.RESOLVED,
        "execution": finished(an_execution(incident), exit_code=0),
        "report": a_report(),
        "exit_code": 0,
    }
    return Completion(**{**values, **fields})


def an_incident(event: FaultEvent | None = None, **fields: Any) -> Incident:
    """An incident that a worker has just claimed."""
    values: dict[str, Any] = {
        "event": event or an_event(),
        "status": nightcrier.IncidentStatus.RUNNING,
        "queue_key": 0,
        "created_at": sql_database.utc_now(),
        "started_at": sql_database.utc_now(),
        "attempt": 1,
        "attempts_charged": 1,
        "claimed_by": "w1",
    }
    return Incident(**{**values, **fields})


def a_config(root: Path, **flags: Any) -> nightcrier.Config:
    """A configuration without clusters; workspaces and database are below `root`."""
    given = {
        "sqlite": str(root / "nightcrier.db"),
        "workspace_root": str(root / "incidents"),
        "agent_cli": "command",
        "agent_command": ["true"],
    }
    return nightcrier.load_config({**given, **flags}, environment={}, need_clusters=False)


def wait_until(condition: Callable[[], Any], seconds: float = 20.0) -> None:
    """Wait for what another process does."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come to be"
        time.sleep(0.01)


def is_running(pid: int) -> bool:
    """Whether a process runs; one that is dead and not collected does not."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] not in "ZX"


def agent_failed(incident: Incident, **fields: Any) -> Completion:
    values: dict[str, Any] = {
        "status": nightcrier.IncidentStatus.AGENT_FAILED,
        "execution": finished(an_execution(incident), Outcome.FAILED, exit_code=2),
        "exit_code": 2,
        "failure_reason": "agent exited with non-zero code: 2",
    }
    return Completion(**{**values, **fields})


def in_threads(count: int, work: Callable[[int], Any]) -> list[Any]:
    """Run `work(0)` … `work(count - 1)` at once; raises what any of them raised."""
    start = threading.Barrier(count)
    results: list[Any] = [None] * count
    errors: list[BaseException] = []

    def body(number: int) -> None:
        start.wait()
        try:
            results[number] = work(number)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=body, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return results


def sqlite_store(path: Path | str) -> state_store.SQLiteStore:
    """A SQLite store, made and migrated as the program does it."""
    path = Path(path)
    target = sql_database.SQLiteMigrationTarget(path)
    try:
        sql_database.migrate_up(target, sql_database.load_migrations("sqlite"), applied_by="test")
    finally:
        target.close()
    return state_store.SQLiteStore(path)


@contextlib.contextmanager
def a_schema(server: str) -> Iterator[str]:
    """A connection string for an empty schema of its own on a server."""
    name = f"nc_{secrets.token_hex(6)}"
    settings = sql_database.parse_dsn(server, os.environ)
    driver = sql_database.connect_postgres(settings, "tests").driver
    try:
        driver.run(f"create schema {name}")
        joint = "&" if "?" in server else "?"
        yield f"{server}{joint}options=-c%20search_path%3D{name}"
        driver.run("set client_min_messages = warning")
        driver.run(f"drop schema {name} cascade")
    finally:
        driver.close()


def postgres_store(dsn: str, name: str = "tests") -> state_store.PostgresStore:
    """A PostgreSQL store, migrated as the program does it."""
    server = sql_database.parse_dsn(dsn, os.environ)
    with contextlib.closing(sql_database.PostgresMigrationTarget(server, name)) as target:
        migrations = sql_database.load_migrations("postgres")
        sql_database.migrate_up(target, migrations, applied_by="test")
    return state_store.PostgresStore(server, name)


class Opener:
    """Opens the stores of one test, again and again at the same place, and closes them.

    `place` is a folder, or the connection string of a schema.
    """

    def __init__(self, kind: str, place: str | Path, *, migrated: bool = False) -> None:
        self.kind = kind
        self.argument = str(place)
        self._migrated = migrated
        self._opened: list[Any] = []

    @property
    def place(self) -> Path:
        """The database file, or the folder of the filesystem store."""
        return Path(self.argument, "nightcrier.db" if self.kind == "sqlite" else "store")

    def __call__(self) -> Any:
        store: Any
        if self.kind == "sqlite":
            store = sqlite_store(self.place)
        elif self.kind == "postgres" and self._migrated:
            server = sql_database.parse_dsn(self.argument, os.environ)
            store = state_store.PostgresStore(server, "tests")
        elif self.kind == "postgres":
            store = postgres_store(self.argument)
        else:
            store = state_store.FilesystemStore(self.place)
        self._migrated = True
        self._opened.append(store)
        return store

    def close_all(self) -> None:
        for store in self._opened:
            store.close()


@contextlib.contextmanager
def an_opener(kind: str, request: pytest.FixtureRequest, folder: Path) -> Iterator[Opener]:
    with contextlib.ExitStack() as stack:
        place: str | Path = folder
        if kind == "postgres":
            place = stack.enter_context(a_schema(request.getfixturevalue("postgres_dsn")))
        opener = Opener(kind, place)
        stack.callback(opener.close_all)
        yield opener


KINDS = ["sqlite", "filesystem", "postgres"]


@pytest.fixture(params=KINDS)
def open_again(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Opener]:
    with an_opener(request.param, request, tmp_path) as opener:
        yield opener


@pytest.fixture(scope="session")
def kept_schema(request: pytest.FixtureRequest) -> Iterator[str]:
    """A schema with our tables, for one test after the other: to make them takes longer."""
    with a_schema(request.getfixturevalue("postgres_dsn")) as dsn:
        postgres_store(dsn).close()
        yield dsn


@contextlib.contextmanager
def emptied(kept_schema: str) -> Iterator[str]:
    """Its connection string. Nobody may write there at the end."""
    yield kept_schema
    driver = sql_database.connect_postgres(
        sql_database.parse_dsn(kept_schema, os.environ), "tests"
    ).driver
    with contextlib.closing(driver):
        driver.run("; ".join(f"delete from {table}" for table in reversed(TABLES)))


@contextlib.contextmanager
def a_new_store(kind: str, request: pytest.FixtureRequest, folder: Path) -> Iterator[Any]:
    with contextlib.ExitStack() as stack:
        place: str | Path = folder
        if kind == "postgres":
            place = stack.enter_context(emptied(request.getfixturevalue("kept_schema")))
        opener = Opener(kind, place, migrated=kind == "postgres")
        stack.callback(opener.close_all)
        yield opener()


@pytest.fixture(params=KINDS)
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Any]:
    """A new store of each kind: what a test with this fixture says holds for all of them."""
    with a_new_store(request.param, request, tmp_path) as store:
        yield store


@pytest.fixture
def sqlite(tmp_path: Path) -> Iterator[state_store.SQLiteStore]:
    opener = Opener("sqlite", tmp_path)
    yield opener()
    opener.close_all()


def query(store: Any, sql: str, **params: Any) -> list[tuple[Any, ...]]:
    """Ask the store's database directly."""
    rows: list[tuple[Any, ...]] = store._database.read(lambda tx: tx.run(sql, **params))
    return rows


TABLES = (
    "fault_events",
    "incidents",
    "incident_transitions",
    "agent_executions",
    "triage_reports",
    "notifications",
    "clusters",
    "cluster_gaps",
    "cluster_watches",
    "holds",
    "workers",
)


def dump(store: Any) -> dict[str, list[tuple[Any, ...]]]:
    """Every row of every table: what did not change anything leaves the same dump."""
    return {table: sorted(query(store, f"select * from {table}"), key=repr) for table in TABLES}


def ids(incidents: Iterable[Incident]) -> list[str]:
    return [incident.incident_id for incident in incidents]


def claim_one(store: Any, worker: str = "w1", lease: timedelta = LEASE) -> Incident:
    incident: Incident
    (incident,) = store.claim_incidents(worker, 1, lease)
    return incident


def claim_all(store: Any, worker: str = "w1", *, step: int = 100) -> list[Incident]:
    """Claim until nothing is left, in the order of the claims."""
    found: list[Incident] = []
    while batch := store.claim_incidents(worker, step, LEASE):
        found += batch
    return found


def every_page(store: Any, wanted: Any, limit: int = 3) -> list[Sequence[Incident]]:
    pages, cursor = [], None
    while True:
        page = store.list_incidents(wanted, cursor=cursor, limit=limit)
        pages.append(page.incidents)
        if (cursor := page.cursor) is None:
            return pages
