"""The schema on both engines: the same migrations make the same schema."""

from __future__ import annotations

import random
import re
import secrets
import tomllib
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import apsw
import pg8000.native
import pytest

import sql_database

ROOT = Path(__file__).parents[1]
DIALECTS = ("sqlite", "postgres")

# A type of SQLite, and what it may be in PostgreSQL.
TYPES = {
    "integer": {"integer", "bigint", "boolean"},
    "real": {"double precision"},
    "text": {"text", "uuid", "timestamp with time zone", "jsonb"},
}
IDS = {"event_id", "incident_id", "execution_id", "report_id", "notification_id", "hold_id"}
JSON = {"payload", "labels", "permissions", "usage", "log_paths"}
PROSE = {"context", "reason", "failure_reason", "error_message", "last_error"}
PROSE |= {"root_cause", "report_markdown", "report_html"}


@dataclass(frozen=True)
class Engine:
    dialect: str
    run: Callable[[str], list[tuple[Any, ...]]]

    def up(self) -> None:
        for migration in sql_database.load_migrations(self.dialect):
            self.run(migration.up)

    def down(self) -> None:
        for migration in reversed(sql_database.load_migrations(self.dialect)):
            self.run(migration.down)


def connect(dsn: str) -> pg8000.native.Connection:
    url = urlsplit(dsn)
    return pg8000.native.Connection(
        unquote(url.username or "postgres"),
        host=url.hostname or "localhost",
        port=url.port or 5432,
        password=unquote(url.password or "") or None,
        database=unquote(url.path[1:]) or "postgres",
        ssl_context=False,
    )


@pytest.fixture
def on_sqlite(tmp_path: Path) -> Iterator[Engine]:
    connection = apsw.Connection(str(tmp_path / "nightcrier.db"))
    connection.execute("pragma foreign_keys = on")
    engine = Engine("sqlite", lambda sql: [tuple(row) for row in connection.execute(sql)])
    engine.up()
    yield engine
    connection.close()


@pytest.fixture
def on_postgres(postgres_dsn: str) -> Iterator[Engine]:
    connection = connect(postgres_dsn)
    schema = f"test_{secrets.token_hex(8)}"
    connection.run(f"create schema {schema}; set search_path to {schema}")
    engine = Engine("postgres", lambda sql: [tuple(row) for row in connection.run(sql) or ()])
    engine.up()
    yield engine
    connection.run(f"drop schema {schema} cascade")
    connection.close()


@pytest.fixture(params=DIALECTS)
def engine(request: pytest.FixtureRequest) -> Engine:
    found: Engine = request.getfixturevalue(f"on_{request.param}")
    return found


# --- the files ------------------------------------------------------------------------------------


def test_every_dialect_has_the_same_migrations() -> None:
    assert sorted(folder.name for folder in (ROOT / "schema").iterdir()) == sorted(DIALECTS)
    sqlite, postgres = (
        [(migration.version, migration.name) for migration in sql_database.load_migrations(dialect)]
        for dialect in DIALECTS
    )
    assert sqlite == postgres


def test_an_installation_carries_every_dialect() -> None:
    tools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    packages = {f"nightcrier_schema.{dialect}": f"schema/{dialect}" for dialect in DIALECTS}

    assert set(tools["packages"]) == set(packages)
    assert tools["package-dir"] == packages
    assert tools["package-data"] == {package: ["*.sql"] for package in packages}


def checks(sql: str) -> list[str]:
    """What stands in the parentheses of each `check`."""
    sql = " ".join(re.sub(r"--.*", "", sql).split())
    found = []
    for start in (match.end() for match in re.finditer(r"\bcheck \(", sql)):
        end, depth = start, 1
        while depth:
            depth += {"(": 1, ")": -1}.get(sql[end], 0)
            end += 1
        found.append(sql[start : end - 1])
    return found


def test_the_checks_are_the_same_text() -> None:
    sqlite, postgres = (
        [check for known in sql_database.load_migrations(dialect) for check in checks(known.up)]
        for dialect in DIALECTS
    )
    sqlite.remove("triage_enabled in (0, 1)")  # PostgreSQL has a type for that
    assert sqlite == postgres
    assert len(sqlite) > 10


def test_the_schema_of_postgres_uses_nothing_that_engines_like_it_lack() -> None:
    """CockroachDB, YugabyteDB: no sequences, triggers, extensions, types of one's own …"""
    ours = re.compile(
        r"\b(serial|bigserial|identity|sequence|trigger|function|extension|domain|create type"
        r"|unlogged|inherits|using|include|set schema|search_path|pg_\w+)\b|\bcreate \w+ \w+\.\w+"
    )
    for migration in sql_database.load_migrations("postgres"):
        for text in (migration.up, migration.down):
            assert ours.findall(re.sub(r"--.*", "", text)) == []


# --- what they make -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Column:
    name: str
    type: str
    not_null: bool
    default: str | None
    collation: str | None = None


@dataclass(frozen=True)
class Index:
    table: str
    name: str | None  # None: made by a constraint
    columns: tuple[str, ...]
    unique: bool
    condition: tuple[str, ...]  # its column and its words


def relations(engine: Engine, kind: str) -> list[str]:
    """The names of the tables or of the views."""
    if engine.dialect == "sqlite":
        rows = engine.run(f"select name from sqlite_master where type = '{kind}'")
    else:
        kinds = {"table": "BASE TABLE", "view": "VIEW"}
        rows = engine.run(
            f"""select table_name from information_schema.tables
                where table_schema = current_schema() and table_type = '{kinds[kind]}'"""
        )
    return sorted(name for (name,) in rows)


def columns(engine: Engine, relation: str) -> list[Column]:
    if engine.dialect == "sqlite":
        rows = engine.run(
            f"""select name, lower(type), "notnull" = 1, dflt_value
                from pragma_table_info('{relation}') order by cid"""
        )
        return [Column(name, kind, bool(strict), default) for name, kind, strict, default in rows]
    rows = engine.run(
        f"""select column_name, data_type, is_nullable = 'NO', column_default, collation_name
            from information_schema.columns
            where table_schema = current_schema() and table_name = '{relation}'
            order by ordinal_position"""
    )
    plain = {"true": "1"}  # and without the type: ''::text
    return [
        Column(
            name, kind, strict, default and plain.get(default, default.split("::")[0]), collation
        )
        for name, kind, strict, default, collation in rows
    ]


def condition(sql: str | None) -> tuple[str, ...]:
    """`status = 'PENDING'`, `(status = 'PENDING'::text)`: the column, and the words."""
    found = re.search(r"[a-z_]+", sql or "")
    return (found[0], *sorted(re.findall(r"'(\w+)'", sql or ""))) if found else ()


def sqlite_indexes(engine: Engine) -> set[Index]:
    found = set()
    for table in relations(engine, "table"):
        rows = engine.run(
            f"""select l.name, l.origin, l."unique", m.sql
                from pragma_index_list('{table}') l left join sqlite_master m on m.name = l.name"""
        )
        for name, origin, unique, sql in rows:
            keys = engine.run(
                f"""select name from pragma_index_xinfo('{name}') where key order by seqno"""
            )
            found.add(
                Index(
                    table=table,
                    name=name if origin == "c" else None,
                    columns=tuple(key for (key,) in keys),
                    unique=bool(unique),
                    condition=condition(" ".join((sql or "").split()).partition(" where ")[2]),
                )
            )
    return found


def postgres_indexes(engine: Engine) -> set[Index]:
    rows = engine.run(
        """select t.relname, i.relname, c.oid is not null, x.indisunique,
                  pg_get_expr(x.indpred, x.indrelid),
                  array(select a.attname::text from unnest(x.indkey::int[]) with ordinality k (n, o)
                        join pg_attribute a on a.attrelid = x.indrelid and a.attnum = k.n
                        order by k.o)
           from pg_index x
           join pg_class i on i.oid = x.indexrelid
           join pg_class t on t.oid = x.indrelid
           left join pg_constraint c on c.conindid = x.indexrelid and c.contype in ('p', 'u')
           where t.relnamespace = current_schema()::regnamespace"""
    )
    return {
        Index(
            table=table,
            name=None if of_constraint else name,
            columns=tuple(keys),
            unique=unique,
            condition=condition(where),
        )
        for table, name, of_constraint, unique, where, keys in rows
    }


def foreign_keys(engine: Engine) -> set[tuple[str, ...]]:
    if engine.dialect == "sqlite":
        return {
            (table, *row)
            for table in relations(engine, "table")
            for row in engine.run(
                f"""select "from", "table", "to" from pragma_foreign_key_list('{table}')"""
            )
        }
    return set(
        engine.run(
            """select t.relname, a.attname, r.relname, b.attname
               from pg_constraint c
               join pg_class t on t.oid = c.conrelid
               join pg_class r on r.oid = c.confrelid
               join pg_attribute a on a.attrelid = t.oid and a.attnum = c.conkey[1]
               join pg_attribute b on b.attrelid = r.oid and b.attnum = c.confkey[1]
               where c.contype = 'f' and t.relnamespace = current_schema()::regnamespace"""
        )
    )


def test_tables_have_the_same_columns_in_the_same_order_with_the_same_defaults(
    on_sqlite: Engine, on_postgres: Engine
) -> None:
    assert relations(on_sqlite, "table") == relations(on_postgres, "table")
    assert "cluster_watches" in relations(on_sqlite, "table")
    for table in relations(on_sqlite, "table"):
        sqlite, postgres = (
            [(column.name, column.not_null, column.default) for column in columns(engine, table)]
            for engine in (on_sqlite, on_postgres)
        )
        assert sqlite == postgres, table


def test_views_have_the_same_columns_in_the_same_order(
    on_sqlite: Engine, on_postgres: Engine
) -> None:
    assert relations(on_sqlite, "view") == relations(on_postgres, "view") != []
    for view in relations(on_sqlite, "view"):
        sqlite, postgres = (
            [column.name for column in columns(engine, view)] for engine in (on_sqlite, on_postgres)
        )
        assert sqlite == postgres, view


def test_keys_and_indexes_are_the_same(on_sqlite: Engine, on_postgres: Engine) -> None:
    assert sqlite_indexes(on_sqlite) == postgres_indexes(on_postgres)
    assert foreign_keys(on_sqlite) == foreign_keys(on_postgres) != set()


def test_no_index_makes_a_heartbeat_move_rows_or_a_claim_sort(on_postgres: Engine) -> None:
    indexes = postgres_indexes(on_postgres)
    assert len(indexes) > 20
    for index in indexes:
        assert "lease_expires_at" not in index.columns
        assert index.columns[0] != "status" or "PENDING" not in index.condition != ()


def test_types_correspond(on_sqlite: Engine, on_postgres: Engine) -> None:
    for table in relations(on_sqlite, "table"):
        pairs = zip(columns(on_sqlite, table), columns(on_postgres, table), strict=True)
        for sqlite, postgres in pairs:
            assert postgres.type in TYPES[sqlite.type], (table, sqlite.name)


def test_times_ids_and_json_have_types_of_their_own_and_names_the_order_of_bytes(
    on_postgres: Engine,
) -> None:
    for table in relations(on_postgres, "table"):
        for column in columns(on_postgres, table):
            is_time = column.name.endswith("_at") or column.name in ("at", "since", "until")
            assert (column.type == "timestamp with time zone") == is_time, (table, column)
            assert (column.type == "uuid") == (column.name in IDS), (table, column)
            assert (column.type == "jsonb") == (column.name in JSON), (table, column)
            if column.type == "text":
                expected = None if column.name in PROSE else "C"
                assert column.collation == expected, (table, column)
    for index in postgres_indexes(on_postgres):
        assert PROSE.isdisjoint(index.columns)


def everything(engine: Engine) -> list[tuple[Any, ...]]:
    """Every object of the schema as PostgreSQL itself describes it."""
    return engine.run(
        """with ours as (select c.oid, c.relname::text as name, c.relkind, c.reloptions::text
                         from pg_class c where c.relnamespace = current_schema()::regnamespace)
           select name, relkind::text, reloptions,
                  case relkind when 'v' then pg_get_viewdef(oid)
                               when 'i' then pg_get_indexdef(oid) end
             from ours
           union all
           select c.conname::text, c.contype::text, o.name, pg_get_constraintdef(c.oid)
             from pg_constraint c join ours o on o.oid = c.conrelid
           union all
           select o.name, a.attname::text, a.attnum::text || a.attnotnull::text,
                  format_type(a.atttypid, a.atttypmod) || a.attcollation::regcollation::text
                  || coalesce(pg_get_expr(d.adbin, d.adrelid), '')
             from ours o join pg_attribute a on a.attrelid = o.oid
             left join pg_attrdef d on d.adrelid = o.oid and d.adnum = a.attnum
           order by 1, 2, 3, 4"""
    )


def test_up_down_up_gives_the_same_schema_on_postgres(on_postgres: Engine) -> None:
    first = everything(on_postgres)
    assert len(first) > 200
    on_postgres.down()
    assert everything(on_postgres) == []
    on_postgres.up()
    assert everything(on_postgres) == first


# --- what they accept -----------------------------------------------------------------------------


def id_of(number: int) -> str:
    return f"019ab000-0000-7000-8000-{number:012d}"


def at(minute: int) -> str:
    return f"2026-11-23T03:{minute:02d}:00.250000Z"


ONE, TWO, RUN = id_of(1), id_of(2), id_of(11)

# The same text for both engines. ONE is resolved, TWO is pending.
ROWS = (
    f"""insert into fault_events (event_id, cluster, session_id, delivery_id, fault_type, severity,
                                  received_at, payload)
        values ('{ONE}', 'a', 's', '1', 'CrashLoop', 'critical', '{at(0)}', '{{}}'),
               ('{TWO}', 'a', 's', '2', 'CrashLoop', 'unknown', '{at(1)}', '{{}}')""",
    f"""insert into incidents (incident_id, status, queue_key, cluster, severity, fault_type,
                               created_at, completed_at)
        values ('{ONE}', 'RESOLVED', 1, 'a', 'critical', 'CrashLoop', '{at(0)}', '{at(3)}'),
               ('{TWO}', 'PENDING', 2, 'a', 'unknown', 'CrashLoop', '{at(1)}', null)""",
    f"""insert into incident_transitions (incident_id, seq, from_status, to_status, at)
        values ('{ONE}', 1, 'PENDING', 'RUNNING', '{at(1)}')""",
    f"""insert into agent_executions (execution_id, incident_id, attempt, cluster, worker_id, host,
                                      runtime, agent, started_at, completed_at, outcome, cost_usd)
        values ('{RUN}', '{ONE}', 1, 'a', 'w', 'h', 'local', 'claude', '{at(1)}',
                '2026-11-23T03:01:01.000400Z', 'succeeded', 0.25)""",
    f"""insert into triage_reports (report_id, incident_id, execution_id, generated_at, root_cause,
                                    confidence, report_markdown)
        values ('{id_of(21)}', '{ONE}', '{RUN}', '{at(3)}', 'disk full', 'HIGH', '# Disk')""",
    f"""insert into notifications (notification_id, incident_id, kind, sink, dedupe_key, payload,
                                   status, created_at, next_attempt_at)
        values ('{id_of(31)}', '{ONE}', 'resolved', 'slack', 'k', '{{}}', 'PENDING', '{at(3)}',
                '{at(3)}')""",
    f"""insert into clusters (cluster, endpoint, updated_at, last_event_at)
        values ('a', 'http://a/mcp', '{at(0)}', '{at(1)}')""",
    f"""insert into cluster_gaps (cluster, lost_at, restored_at, reason)
        values ('a', '{at(1)}', '{at(2)}', 'closed'), ('a', '{at(3)}', '{at(5)}', 'closed')""",
    f"""insert into holds (hold_id, scope, cluster, reason, since, until)
        values ('{id_of(41)}', 'disk', 'a', 'over', '{at(0)}', '2001-01-01T00:00:00.000000Z'),
               ('{id_of(42)}', 'disk', 'b', 'elsewhere', '{at(1)}', null),
               ('{id_of(43)}', 'budget', null, 'used up', '{at(2)}',
                '2999-01-01T00:00:00.000000Z')""",
    f"""insert into workers (worker_id, host, pid, version, role, state, started_at, heartbeat_at)
        values ('w', 'h', 1, '1', 'all', 'running', '{at(0)}', '{at(0)}')""",
    f"""insert into cluster_watches (cluster, lease_epoch, owner, updated_at)
        values ('a', 1, 'w', '{at(0)}'), ('a', 2, 'v', '{at(0)}')""",
)  # fmt: skip

CODES = {"CHECK": "23514", "NOT NULL": "23502", "FOREIGN KEY": "23503", "UNIQUE": "23505"}
REFUSED = (
    ("CHECK", "update fault_events set cluster = ''"),
    ("CHECK", "update fault_events set fault_type = ''"),
    ("CHECK", "update fault_events set severity = 'fatal'"),
    ("CHECK", "update incidents set severity = 'fatal'"),
    ("CHECK", f"update incidents set status = 'DONE' where incident_id = '{ONE}'"),
    ("CHECK", f"update incidents set status = 'RUNNING' where incident_id = '{TWO}'"),
    ("CHECK", f"update incidents set claimed_by = 'w' where incident_id = '{TWO}'"),
    ("CHECK", f"update incidents set lease_expires_at = '{at(9)}' where incident_id = '{TWO}'"),
    ("CHECK", f"update incidents set completed_at = '{at(9)}' where incident_id = '{TWO}'"),
    ("CHECK", f"update incidents set completed_at = null where incident_id = '{ONE}'"),
    ("CHECK", "update agent_executions set outcome = 'fine'"),
    ("CHECK", "update agent_executions set outcome = null"),
    ("CHECK", "update triage_reports set confidence = 'SURE'"),
    ("CHECK", "update notifications set status = 'SENDING'"),
    ("CHECK", "update clusters set cluster = ''"),
    ("CHECK", "update clusters set connection_state = 'up'"),
    ("CHECK", "update workers set role = 'boss'"),
    ("CHECK", "update workers set state = 'tired'"),
    ("NOT NULL", "update fault_events set payload = null"),
    ("NOT NULL", "update incident_transitions set incident_id = null"),
    ("NOT NULL", "update clusters set triage_enabled = null"),
    ("NOT NULL", "update cluster_watches set owner = null"),
    ("FOREIGN KEY", f"update incidents set incident_id = '{id_of(9)}' where incident_id = '{TWO}'"),
    ("FOREIGN KEY", f"delete from fault_events where event_id = '{TWO}'"),
    ("FOREIGN KEY", "delete from agent_executions"),
    ("UNIQUE", f"update fault_events set delivery_id = '1' where event_id = '{TWO}'"),
    (
        "UNIQUE",
        f"""insert into agent_executions (execution_id, incident_id, attempt, cluster, worker_id,
                                          host, runtime, agent, started_at)
            values ('{id_of(12)}', '{ONE}', 1, 'a', 'w', 'h', 'local', 'claude', '{at(1)}')""",
    ),
    (
        "UNIQUE",
        f"""insert into notifications (notification_id, kind, sink, dedupe_key, payload, status,
                                       created_at, next_attempt_at)
            values ('{id_of(32)}', 'x', 'slack', 'k', '{{}}', 'DEAD', '{at(3)}', '{at(3)}')""",
    ),
    ("UNIQUE", "update cluster_watches set lease_epoch = 1 where lease_epoch = 2"),
)


@pytest.fixture
def filled(engine: Engine) -> Engine:
    for statement in ROWS:
        engine.run(statement)
    return engine


def test_rows_of_every_table_are_accepted_and_rows_that_break_a_rule_are_not(
    filled: Engine,
) -> None:
    for table in relations(filled, "table"):
        assert filled.run(f"select * from {table}"), table
    for rule, statement in REFUSED:
        with pytest.raises((apsw.ConstraintError, pg8000.native.DatabaseError)) as caught:
            filled.run(statement)
        if isinstance(caught.value, apsw.ConstraintError):
            assert f"{rule} constraint failed" in str(caught.value), statement
        else:
            assert caught.value.args[0]["C"] == CODES[rule], (statement, caught.value)


def test_a_message_without_a_delivery_id_may_come_again(filled: Engine) -> None:
    filled.run("update fault_events set delivery_id = null")


def test_the_longest_names_fit_into_the_indexes_of_postgres(on_postgres: Engine) -> None:
    """2,704 bytes at most, after a compression that finds nothing here."""
    chosen = random.Random(1)
    cluster = "".join(chosen.choices("abcdefghijklmnopqrstuvwxyz0123456789", k=63))
    session = "".join(chr(chosen.randrange(0x21, 0x7F)) for _ in range(512)).replace("'", ".")
    name = "".join(chr(chosen.randrange(0x10000, 0x1FFFF)) for _ in range(512))
    on_postgres.run(
        f"""insert into fault_events (event_id, cluster, session_id, delivery_id, fault_fingerprint,
                                      fault_type, severity, received_at, payload)
            values ('{ONE}', '{cluster}', '{session}', '{name}', '{name}', 'x', 'info', '{at(0)}',
                    '{{}}')"""
    )
    on_postgres.run(
        f"""insert into incidents (incident_id, status, queue_key, cluster, severity, fault_type,
                                   resource_kind, created_at)
            values ('{ONE}', 'PENDING', 1, '{cluster}', 'info', 'x', '{name}', '{at(0)}')"""
    )


# --- what the views say ---------------------------------------------------------------------------


def as_sqlite_says(value: Any) -> Any:
    if isinstance(value, datetime):
        return sql_database.format_time(value)
    return str(value) if isinstance(value, uuid.UUID) else value


def test_the_views_say_the_same(on_sqlite: Engine, on_postgres: Engine) -> None:
    for statement in ROWS:
        on_sqlite.run(statement)
        on_postgres.run(statement)
    for view in relations(on_sqlite, "view"):
        # What counts up to now is looked at below.
        names = [column.name for column in columns(on_sqlite, view)]
        fixed = [n for n in names if n not in ("oldest_pending_seconds", "silent_seconds")]
        query = f"select {', '.join(fixed)} from {view} order by 1"
        said = [[as_sqlite_says(value) for value in row] for row in on_postgres.run(query)]
        assert said == [list(row) for row in on_sqlite.run(query)] != []


def test_the_views_count_in_seconds(filled: Engine) -> None:
    assert filled.run("select seconds_to_complete from v_incidents order by incident_id") == [
        (180.0,),
        (None,),
    ]
    assert filled.run("select seconds from v_executions") == [(0.75,)]
    assert filled.run("select gaps, gap_seconds from v_clusters") == [(2, 180.0)]
    assert filled.run("select pending, running, hold, hold_reason from v_queue") == [
        (1, 0, "budget", "used up")
    ]
    moment = sql_database.format_time(sql_database.utc_now())
    filled.run(f"update incidents set created_at = '{moment}'")
    filled.run(f"update clusters set last_event_at = '{moment}'")
    for query in (
        "select oldest_pending_seconds from v_queue",
        "select silent_seconds from v_clusters",
    ):
        ((seconds,),) = filled.run(query)
        assert isinstance(seconds, int)
        assert 0 <= seconds < 600
    assert {type(value) for (value,) in filled.run("select pending from v_queue")} == {int}
