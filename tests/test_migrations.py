"""Migrations on SQLite: every database ends at the same schema, or is refused and left alone."""

from __future__ import annotations

import dataclasses
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import apsw
import pytest

import incidents
import sql_database
import state_store
from conftest import (
    a_report,
    agent_failed,
    an_event,
    an_execution,
    claim_one,
    dump,
    resolved,
    sqlite_store,
)
from sql_database import Migration, SchemaEdited, SchemaTooNew, SQLiteMigrationTarget

ROOT = Path(__file__).parents[1]
KNOWN = sql_database.load_migrations("sqlite")
EXTRA = Migration(
    version=len(KNOWN) + 1,
    name="extra",
    up="create table extra (id text primary key);\ncreate index extra_id on extra (id);",
    down="drop table extra;",
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "nightcrier.db"


@pytest.fixture
def open_target(path: Path) -> Iterator[Callable[[], SQLiteMigrationTarget]]:
    opened = []

    def open_target() -> SQLiteMigrationTarget:
        opened.append(SQLiteMigrationTarget(path))
        return opened[-1]

    yield open_target
    for target in opened:
        target.close()


@pytest.fixture
def target(open_target: Callable[[], SQLiteMigrationTarget]) -> SQLiteMigrationTarget:
    return open_target()


def up(target: Any, migrations: list[Migration] = KNOWN) -> list[int]:
    done = sql_database.migrate_up(target, migrations, applied_by="test")
    return [migration.version for migration in done]


def schema(target: Any) -> list[tuple[Any, ...]]:
    rows: list[tuple[Any, ...]] = target.run(
        "select type, name, tbl_name, sql from sqlite_master order by type, name"
    )
    return rows


def copies(path: Path) -> list[Path]:
    return sorted(path.parent.glob("*.backup"))


# --- the files ------------------------------------------------------------------------------------


def test_every_migration_has_a_number_a_name_and_a_way_back() -> None:
    assert [migration.version for migration in KNOWN] == list(range(1, len(KNOWN) + 1))
    assert all(migration.up and migration.down for migration in KNOWN)


def test_a_build_without_complete_schema_files_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sql_database, "__file__", str(tmp_path / "sql_database.py"))
    folder = tmp_path / "schema" / "sqlite"
    with pytest.raises(sql_database.SchemaError, match="build is broken"):
        sql_database.load_migrations("sqlite")
    folder.mkdir(parents=True)
    (folder / "0001_a.up.sql").write_text("select 1")
    with pytest.raises(sql_database.SchemaError, match="build is broken"):
        sql_database.load_migrations("sqlite")  # no way back
    (folder / "0001_a.down.sql").write_text("select 1")
    assert len(sql_database.load_migrations("sqlite")) == 1
    (folder / "0003_c.up.sql").write_text("select 1")
    (folder / "0003_c.down.sql").write_text("select 1")
    with pytest.raises(sql_database.SchemaError, match="build is broken"):
        sql_database.load_migrations("sqlite")  # 2 is missing


# --- up, down, up ---------------------------------------------------------------------------------


def test_up_down_up_gives_the_same_schema(target: Any) -> None:
    assert up(target) == [migration.version for migration in KNOWN]
    first = schema(target)
    undone = sql_database.migrate_down(target, KNOWN, to=0)

    assert [migration.version for migration in undone] == [m.version for m in reversed(KNOWN)]
    assert {row[1] for row in schema(target)} == {"schema_migrations"}
    assert up(target) == [migration.version for migration in KNOWN]
    assert schema(target) == first


def test_a_second_start_changes_nothing(target: Any, path: Path) -> None:
    up(target)
    before = target.run("select * from schema_migrations")

    assert up(target) == []
    assert target.run("select * from schema_migrations") == before
    assert copies(path) == []


def test_a_database_of_the_first_version_keeps_its_rows(target: Any, path: Path) -> None:
    up(target, KNOWN[:1])
    target.run(
        """insert into cluster_gaps (cluster, lost_at, reason)
           values ('a', '2026-11-23T03:00:00.000000Z', 'closed')"""
    )
    assert up(target) == [migration.version for migration in KNOWN[1:]]
    assert target.run("select cluster from cluster_gaps") == [("a",)]
    assert len(copies(path)) == 1


def test_what_was_applied_is_recorded_with_its_checksum_and_who_did_it(target: Any) -> None:
    up(target)
    (applied, *_) = sql_database.applied_migrations(target)

    assert (applied.version, applied.name) == (1, KNOWN[0].name)
    assert applied.checksum == KNOWN[0].checksum
    assert applied.applied_by == "test"
    assert sql_database.parse_time(applied.applied_at)
    assert str(applied) == str(KNOWN[0])


def test_a_migration_that_comes_later_is_applied_to_a_database_in_use(target: Any) -> None:
    up(target)
    assert up(target, [*KNOWN, EXTRA]) == [EXTRA.version]
    assert target.has_table("extra")


def test_down_goes_no_further_than_asked(target: Any) -> None:
    up(target, [*KNOWN, EXTRA])
    sql_database.migrate_down(target, [*KNOWN, EXTRA], to=len(KNOWN))

    assert not target.has_table("extra")
    assert target.has_table("incidents")
    assert sql_database.migrate_down(target, [*KNOWN, EXTRA], to=len(KNOWN)) == []


@pytest.mark.parametrize("to", [-1, len(KNOWN) + 1, 99])
def test_down_to_a_version_that_the_database_never_had_is_a_usage_error(
    to: int, target: Any
) -> None:
    up(target)
    with pytest.raises(sql_database.InvalidRequest, match=f"from 0 to {len(KNOWN)}"):
        sql_database.migrate_down(target, [*KNOWN, EXTRA], to=to)
    assert target.has_table("incidents")


def test_the_plan_is_the_sql_that_is_pending_and_changes_nothing(target: Any) -> None:
    everything = "\n".join(f"-- {migration}\n{migration.up}" for migration in KNOWN)
    assert sql_database.plan(target, KNOWN) == everything
    assert schema(target) == []
    up(target)
    assert sql_database.plan(target, KNOWN) == ""
    assert sql_database.plan(target, [*KNOWN, EXTRA]).endswith(EXTRA.up)


# --- databases that do not fit --------------------------------------------------------------------


def test_a_database_of_a_newer_program_is_refused_with_exit_code_4(target: Any, path: Path) -> None:
    up(target, [*KNOWN, EXTRA])
    with pytest.raises(
        SchemaTooNew, match=f"version {EXTRA.version}.*knows {len(KNOWN)}"
    ) as caught:
        up(target)
    assert caught.value.exit_code == 4
    with pytest.raises(SchemaTooNew):
        sql_database.migrate_down(target, KNOWN, to=0)
    assert target.has_table("extra")
    assert copies(path) == []


@pytest.mark.parametrize("change", ["up", "name"])
def test_an_edited_migration_is_refused_with_exit_code_4(change: str, target: Any) -> None:
    up(target)
    different: dict[str, Any] = {change: "other"}
    edited = dataclasses.replace(KNOWN[0], **different)
    with pytest.raises(SchemaEdited, match="0001_") as caught:
        up(target, [edited, *KNOWN[1:]])
    assert caught.value.exit_code == 4


def test_a_changed_way_back_is_no_edit_of_what_was_applied(target: Any) -> None:
    up(target)
    assert up(target, [dataclasses.replace(KNOWN[0], down="select 1"), *KNOWN[1:]]) == []


def test_a_failing_migration_leaves_nothing_behind(target: Any, path: Path) -> None:
    up(target)
    before = schema(target)
    broken = Migration(
        version=EXTRA.version,
        name="broken",
        up="create table half (id text); insert into half values ('x'); select * from absent;",
        down="drop table half;",
    )
    with pytest.raises(sql_database.StoreError, match="absent"):
        up(target, [*KNOWN, broken])

    assert schema(target) == before
    assert len(sql_database.applied_migrations(target)) == len(KNOWN)
    assert up(target, [*KNOWN, EXTRA]) == [EXTRA.version]


def test_a_failing_way_back_leaves_everything(target: Any) -> None:
    broken = dataclasses.replace(EXTRA, down="drop table extra; drop table absent;")
    up(target, [*KNOWN, broken])
    before = schema(target)
    with pytest.raises(sql_database.StoreError, match="absent"):
        sql_database.migrate_down(target, [*KNOWN, broken], to=0)

    assert schema(target) == before
    assert len(sql_database.applied_migrations(target)) == len(KNOWN) + 1


@pytest.mark.parametrize("content", [b"not a database" * 100, b"SQLite format 3\x00" + b"x" * 5000])
def test_a_file_that_is_no_database_is_refused_and_left_alone(content: bytes, path: Path) -> None:
    path.write_bytes(content)
    with pytest.raises(sql_database.StoreError) as caught:
        sqlite_store(path)
    assert caught.value.exit_code == 4
    assert path.read_bytes() == content


def test_a_damaged_schema_is_an_error_of_ours(target: Any, path: Path) -> None:
    up(target)
    target.close()
    damaged = bytearray(path.read_bytes())
    damaged[100:4096] = b"\xff" * 3996
    path.write_bytes(damaged)
    for end in ("-wal", "-shm"):
        Path(f"{path}{end}").unlink(missing_ok=True)
    with pytest.raises(sql_database.StoreError) as caught:
        sqlite_store(path)
    assert caught.value.exit_code == 4


# --- safety copies --------------------------------------------------------------------------------


def test_a_database_that_holds_something_is_copied_before_it_is_migrated(
    target: Any, path: Path
) -> None:
    up(target)
    store = state_store.SQLiteStore(path)
    store.create_incidents([event := an_event()])
    store.close()

    up(target, [*KNOWN, EXTRA])

    assert copies(path) == target.safety_copies
    (copy,) = copies(path)
    assert f"before-{EXTRA.version:04d}" in copy.name
    assert copy.stat().st_mode & 0o777 == 0o640
    restored = sqlite_store(shutil.copy(copy, path.with_name("restored.db")))
    try:
        assert restored.get_incident(event.event_id) is not None
    finally:
        restored.close()


def test_a_copy_is_taken_before_going_down(target: Any, path: Path) -> None:
    up(target)
    sql_database.migrate_down(target, KNOWN, to=0)
    assert len(copies(path)) == 1


def test_no_copy_is_taken_of_an_empty_database(target: Any, path: Path) -> None:
    up(target)
    assert copies(path) == []


def test_a_copy_that_cannot_be_written_stops_the_migration(
    target: Any, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    up(target)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(sql_database, "sync_file", full)
    with pytest.raises(sql_database.StoreUnavailable, match="No space left"):
        up(target, [*KNOWN, EXTRA])

    assert not target.has_table("extra")
    assert list(path.parent.glob("*backup*")) == []


# --- many at once ---------------------------------------------------------------------------------

STARTER = """
import sys
from pathlib import Path
import sql_database, state_store

print("ready", flush=True)
sys.stdin.readline()
target = sql_database.SQLiteMigrationTarget(Path(sys.argv[1]))
known = sql_database.load_migrations("sqlite")
done = sql_database.migrate_up(target, known, applied_by="one of many")
target.close()
store = state_store.SQLiteStore(Path(sys.argv[1]))
assert not store.has_pending()
store.close()
print(len(done))
"""


def test_eight_programs_that_start_at_once_all_come_up_and_apply_each_migration_once(
    path: Path,
) -> None:
    programs = [
        subprocess.Popen(
            [sys.executable, "-c", STARTER, str(path)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            text=True, cwd=ROOT,
        )
        for _ in range(8)
    ]  # fmt: skip
    for program in programs:
        assert program.stdout is not None
        assert program.stdout.readline() == "ready\n"
    for program in programs:
        assert program.stdin is not None
        program.stdin.write("go\n")
        program.stdin.flush()
    answers = [program.communicate(timeout=60) for program in programs]

    assert [errors for _, errors in answers if errors] == []
    assert [program.returncode for program in programs] == [0] * 8
    assert sum(int(out) for out, _ in answers) == len(KNOWN)


def test_who_finds_the_work_done_by_another_does_nothing(
    open_target: Callable[[], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other program migrates between our first look and our transaction."""
    slow, fast = open_target(), open_target()
    looked = False
    look = sql_database.pending_migrations

    def look_then_wait(target: Any, migrations: Any) -> list[Migration]:
        nonlocal looked
        pending = look(target, migrations)
        if target is slow and not looked:
            looked = True
            sql_database.migrate_up(fast, KNOWN, applied_by="fast")
        return pending

    monkeypatch.setattr(sql_database, "pending_migrations", look_then_wait)

    assert up(slow) == []
    applied = sql_database.applied_migrations(slow)
    assert [migration.applied_by for migration in applied] == ["fast"] * len(KNOWN)


# --- old versions of SQLite -----------------------------------------------------------------------


def test_the_schema_uses_nothing_that_sqlite_3_26_does_not_know() -> None:
    """3.26 (RHEL 8) has no generated columns, STRICT, RETURNING, upsert in views, `->`, iif …"""
    newer = re.compile(
        r"\b(strict|returning|generated\s+always|as\s*\(.*\)\s*(stored|virtual)|materialized|iif"
        r"|drop\s+column|nulls\s+(first|last)|unixepoch|timediff|concat(_ws)?|string_agg"
        r"|octet_length|format|is\s+(not\s+)?distinct|right\s+join|full\s+(outer\s+)?join"
        r"|json\w*)\b|->",
        re.IGNORECASE,
    )
    for migration in KNOWN:
        for text in (migration.up, migration.down):
            statements = re.sub(r"--.*", "", text)
            assert newer.findall(statements) == []


SHELLS = [
    shell
    for shell in (shutil.which("sqlite3"), os.environ.get("NIGHTCRIER_TEST_SQLITE3"))
    if shell is not None
]


def by_hand(shell: str, path: Path, sql: str, *options: str) -> list[str]:
    done = subprocess.run(
        [shell, *options, str(path)], input=sql, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, ""), sql
    return done.stdout.splitlines()


@pytest.fixture
def lived_in(path: Path) -> Path:
    """A database with an incident of each kind, as the program leaves it after a clean stop."""
    store = sqlite_store(path)
    store.create_incidents([an_event("a") for _ in range(4)])
    store.create_incidents([an_event("quiet")], without_triage=["quiet"])
    store.complete_incident(done := claim_one(store), resolved(done, report=a_report()))
    store.complete_incident(failed := claim_one(store), agent_failed(failed))
    store.start_execution(an_execution(claim_one(store)))
    store.save_clusters([incidents.ClusterRecord(cluster="a", endpoint="http://a/mcp")])
    now = sql_database.utc_now()
    store.save_gaps(
        [incidents.ClusterGap(cluster="a", lost_at=now, restored_at=now, reason="test")]
    )
    assert all(dump(store)[table] for table in ("incidents", "triage_reports", "cluster_gaps"))
    store.close()
    return path


@pytest.mark.skipif(not SHELLS, reason="no sqlite3 on this host; NIGHTCRIER_TEST_SQLITE3 names one")
@pytest.mark.parametrize("shell", SHELLS)
def test_the_file_can_be_inspected_with_the_sqlite3_of_the_host(shell: str, lived_in: Path) -> None:
    for options in ((), ("-readonly",)):
        assert by_hand(shell, lived_in, "pragma integrity_check;", *options) == ["ok"]
        for view, rows in (
            ("v_incidents", 5),
            ("v_queue", 1),
            ("v_executions", 3),
            ("v_clusters", 1),
        ):
            assert by_hand(shell, lived_in, f"select count(*) from {view};", *options) == [
                str(rows)
            ]
            assert by_hand(shell, lived_in, f"select * from {view};", *options)
        statuses = "select status, count(*) from incidents group by status order by status;"
        assert by_hand(shell, lived_in, statuses, *options) == [
            "AGENT_FAILED|1", "PENDING|1", "RESOLVED|1", "RUNNING|1", "SKIPPED|1",
        ]  # fmt: skip
    assert by_hand(shell, lived_in, "select root_cause from v_incidents where confidence='HIGH';")


@pytest.mark.skipif(not SHELLS, reason="no sqlite3 on this host; NIGHTCRIER_TEST_SQLITE3 names one")
@pytest.mark.parametrize("shell", SHELLS)
def test_the_migrations_run_in_the_sqlite3_of_the_host(shell: str, path: Path) -> None:
    for migration in KNOWN:
        by_hand(shell, path, migration.up)
    for migration in reversed(KNOWN):
        by_hand(shell, path, migration.down)
    assert by_hand(shell, path, "select count(*) from sqlite_master;") == ["0"]


def test_new_databases_give_freed_pages_back(path: Path) -> None:
    """auto_vacuum counts only when it is set before the first table."""
    sqlite_store(path).close()
    connection = apsw.Connection(str(path))
    assert connection.pragma("auto_vacuum") == 2
    assert connection.pragma("page_size") == 4096
    connection.close()


def test_a_database_of_another_program_is_refused_and_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "other.db"
    other = apsw.Connection(str(path))
    other.execute("create table x (y)")
    target = SQLiteMigrationTarget(path)
    try:
        with pytest.raises(sql_database.SchemaError, match="not nightcrier's"):
            sql_database.migrate_up(target, KNOWN, applied_by="test")
        assert [row[0] for row in target.run("select name from sqlite_master")] == ["x"]
    finally:
        target.close()
        other.close()
