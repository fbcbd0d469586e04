"""SQL databases: migrations and engines; nothing here knows of incidents.

1. Errors, each with an exit code and a message that says what to do.
2. Values: times, keys and texts as they are stored.
3. Migrations: numbered SQL files, each applied with its record in one transaction.
4. Files: written whole or not at all, and locks that end with the process.
5. Databases: what queries need of an engine, and calls that share a commit.
6. SQLite: opening, copying, and one writer thread that shares a commit between its callers.
7. Mirrored files: SQLite in memory, and a JSON file for each thing that is kept there.
8. Spool: rows that wait in a SQLite file for a server that is away.
9. PostgreSQL connections: where the server is, TLS, and what its errors mean.
10. PostgreSQL: a pool of connections, wake-ups by LISTEN and NOTIFY, migrations.

state_store.py puts its statements and stores on top of this module, and nightcrier.py opens them;
it imports nothing from there.
"""

from __future__ import annotations

import array
import asyncio
import contextlib
import fcntl
import functools
import hashlib
import itertools
import json
import logging
import math
import os
import pwd
import queue
import re
import secrets
import select
import shutil
import socket
import stat
import struct
import sys
import threading
import time
import urllib.parse
from collections import deque
from collections.abc import Awaitable, Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Protocol, TypeVar

if TYPE_CHECKING:
    import ssl

    import apsw
    import pg8000.exceptions
    import pg8000.native

T = TypeVar("T")
Item = TypeVar("Item")

log = logging.getLogger("nightcrier.database")


# ============================================================================
# 1. Errors
# StoreUnavailable may go away by itself; the others need somebody.
# ============================================================================


class StoreError(Exception):
    """The database cannot be used as it is."""

    exit_code: ClassVar[int] = 4


class StoreUnavailable(StoreError):
    """The database cannot be written now (full disk, lock, permissions); trying later may work."""


class SchemaError(StoreError):
    """The schema of the database and the one this program knows do not fit together."""


class SchemaTooNew(SchemaError):
    """The database was migrated by a newer program."""


class SchemaEdited(SchemaError):
    """A migration was changed after it had been applied."""


class CommitUnknown(StoreUnavailable):
    """The connection was lost while the database committed: what was asked for may be done.

    Asking again is safe for whatever looks for its own effect first.
    """


class RowRefused(StoreError):
    """A row breaks a rule of the schema, or is too large: it will never be accepted."""


class InvalidRequest(StoreError):
    """What was asked for cannot be done to this database."""

    exit_code = 2


class ConnectionStringError(InvalidRequest):
    """The text that says where the server is cannot be used; the message never repeats it."""


class DriverMissing(StoreError):
    """The library of the database cannot be loaded."""

    exit_code = 5


# ============================================================================
# 2. Values
# Times, keys and texts as they are stored. The order of times and keys is the order of time.
# ============================================================================


def utc_now() -> datetime:
    return datetime.now(UTC)


def format_time(moment: datetime) -> str:
    """UTC ISO 8601 with microseconds and `Z`: text order is time order."""
    # not strftime: its %Y does not pad the year 1, which is Go's zero time
    return moment.astimezone(UTC).isoformat(timespec="microseconds")[:26] + "Z"


def parse_time(text: str) -> datetime | None:
    """Read an RFC 3339 time of any offset (none means UTC); None if it is not one."""
    try:
        moment = datetime.fromisoformat(text)
        return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).astimezone(UTC)
    except (ValueError, OverflowError):
        return None


class _UUID7:
    """UUIDv7 (RFC 9562, 5.7) that only grow within a process.

    `rand_a` holds the fraction of the millisecond (there 6.2, method 3); where the clock stands
    still or goes back, the last value is counted up.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._last = 0

    def __call__(self) -> str:
        milliseconds, rest = divmod(time.time_ns() // 1000, 1000)
        with self._lock:
            self._last = ticks = max((milliseconds << 12) | (rest * 4096 // 1000), self._last + 1)
        value = (ticks >> 12) << 80 | 7 << 76 | (ticks & 0xFFF) << 64
        value |= 0b10 << 62 | secrets.randbits(62)
        text = f"{value:032x}"
        return f"{text[:8]}-{text[8:12]}-{text[12:16]}-{text[16:20]}-{text[20:]}"


new_id = _UUID7()


def id_floor(moment: datetime) -> str:
    """An id just below every one that `new_id` makes from `moment` (to the millisecond) on."""
    text = f"{max(0, int(moment.timestamp() * 1000)):012x}"
    return f"{text[:8]}-{text[8:12]}-0000-0000-000000000000"


_UNSTORABLE = re.compile("[\x00\ud800-\udfff]")


def clean_text(text: str, limit: int | None = None) -> str:
    """Make text storable in every database: NUL and lone surrogates become U+FFFD."""
    if limit is not None:
        text = text[:limit]
    return _UNSTORABLE.sub("\ufffd", text)


def clean_json(value: object) -> object:
    if isinstance(value, str):
        return clean_text(value)
    if isinstance(value, dict):
        return {clean_text(str(key)): clean_json(item) for key, item in value.items()}
    if isinstance(value, list):
        return [clean_json(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None  # Python reads and writes NaN and 1e999, JSON knows neither
    return value


def storable_json(value: dict[str, Any]) -> tuple[dict[str, Any], str]:
    """A JSON object in which every text is storable, and the object as JSON.

    Nearly always it is so already, and one search over all of it says so.
    """
    dump = functools.partial(json.dumps, ensure_ascii=False, separators=(",", ":"))
    with contextlib.suppress(ValueError):  # a number that JSON does not know
        text = dump(value, allow_nan=False)
        if "\\u0000" not in text and not _UNSTORABLE.search(text):
            return value, text
    clean = {clean_text(str(key)): clean_json(item) for key, item in value.items()}
    return clean, dump(clean)


# ============================================================================
# 3. Migrations
# A file that was applied is never edited; its checksum is kept.
# ============================================================================


@dataclass(frozen=True, slots=True, kw_only=True)
class Migration:
    version: int
    name: str
    up: str
    down: str

    @property
    def checksum(self) -> str:
        return hashlib.sha256(self.up.encode()).hexdigest()

    def __str__(self) -> str:
        return f"{self.version:04d}_{self.name}"


@dataclass(frozen=True, slots=True, kw_only=True)
class AppliedMigration:
    version: int
    name: str
    checksum: str
    applied_at: str
    applied_by: str

    def __str__(self) -> str:
        return f"{self.version:04d}_{self.name}"


class MigrationTarget(Protocol):
    """A database, as far as migrations need it."""

    dialect: str

    def run(self, sql: str, **params: Any) -> list[tuple[Any, ...]]: ...

    def run_script(self, sql: str) -> None:
        """Run several statements."""
        ...

    def exclusive(self) -> contextlib.AbstractContextManager[None]:
        """A transaction that no other writer or migration runs beside."""
        ...

    def has_table(self, name: str) -> bool: ...

    def is_empty(self) -> bool:
        """Whether there is no table at all."""
        ...

    @property
    def room(self) -> str:
        """What the tables live in, and how to name another one."""
        ...

    def safety_copy(self, label: str) -> Path | None:
        """Copy a database that holds something; None where the engine has its own way."""
        ...


_MIGRATION_FILE = re.compile(r"(\d{4})_(\w+)\.(up|down)\.sql")
_MIGRATIONS_TABLE = """
    create table if not exists schema_migrations (
        version    integer not null primary key,
        name       text not null,
        checksum   text not null,
        applied_at text not null,
        applied_by text not null
    )"""


def _schema_files(dialect: str) -> dict[str, str]:
    """Name and SQL: from a checkout, an installation (`nightcrier_schema`) or the .pyz."""
    here = Path(__file__).resolve().parent
    if here.is_file():  # __file__ is nightcrier.pyz/sql_database.py
        read: Callable[[str], bytes] = __loader__.get_data  # type: ignore[name-defined]
        names = read(f"schema/{dialect}/index").decode().split()
        return {name: read(f"schema/{dialect}/{name}").decode() for name in names}
    checkout = here / "schema" / dialect
    folder = checkout if checkout.is_dir() else here / "nightcrier_schema" / dialect
    files = folder.iterdir() if folder.is_dir() else ()
    return {file.name: file.read_text(encoding="utf-8") for file in files}


def load_migrations(dialect: str) -> list[Migration]:
    """Every migration that this program knows, in order; an empty list would be a broken build."""
    texts: dict[tuple[int, str], dict[str, str]] = {}
    for file_name, text in _schema_files(dialect).items():
        if found := _MIGRATION_FILE.fullmatch(file_name):
            version, name, way = found.groups()
            texts.setdefault((int(version), name), {})[way] = text
    migrations = [
        Migration(version=version, name=name, up=ways.get("up", ""), down=ways.get("down", ""))
        for (version, name), ways in sorted(texts.items())
    ]
    numbers = [migration.version for migration in migrations]
    whole = all(migration.up and migration.down for migration in migrations)
    if not migrations or not whole or numbers != list(range(1, len(numbers) + 1)):
        raise SchemaError(f"the schema files for {dialect} are incomplete: this build is broken")
    return migrations


def applied_migrations(target: MigrationTarget) -> list[AppliedMigration]:
    if not target.has_table("schema_migrations"):
        return []
    rows = target.run("""
        select version, name, checksum, applied_at, applied_by
        from schema_migrations order by version""")
    return [
        AppliedMigration(version=v, name=n, checksum=c, applied_at=str(at), applied_by=by)
        for v, n, c, at, by in rows
    ]


def pending_migrations(target: MigrationTarget, migrations: Sequence[Migration]) -> list[Migration]:
    """What is still to be applied.

    Raises SchemaTooNew if the database knows more than this program, SchemaEdited if an applied
    migration is not the one that this program holds.
    """
    applied = applied_migrations(target)
    newest = migrations[-1].version
    if applied and applied[-1].version > newest:
        raise SchemaTooNew(
            f"the database has schema version {applied[-1].version}, this nightcrier knows "
            f"{newest}: use the newer nightcrier, or its `migrate down --to {newest}`"
        )
    for done, known in zip(applied, migrations, strict=False):
        if (done.version, done.name, done.checksum) != (known.version, known.name, known.checksum):
            raise SchemaEdited(
                f"migration {done} was applied to the database on {done.applied_at} with other "
                f"content than this nightcrier's {known}: use the nightcrier that applied it"
            )
    return list(migrations[len(applied) :])


def migrate_up(
    target: MigrationTarget, migrations: Sequence[Migration], *, applied_by: str
) -> list[Migration]:
    """Apply what is pending; several programs may do so at the same time. Returns what was done.

    Raises SchemaError for a database that somebody else uses.
    """
    done: list[Migration] = []
    # In this order: between the two questions another program may make all the tables.
    if not target.is_empty() and not target.has_table("schema_migrations"):
        raise SchemaError(f"{target.room} holds tables that are not nightcrier's")
    if pending_migrations(target, migrations):
        target.safety_copy(f"before-{migrations[-1].version:04d}")
    while pending := pending_migrations(target, migrations):
        try:
            migration = _apply_next(target, migrations, applied_by)
        except RowRefused:
            # Where the lock is no lock, the record's key is: another program was faster.
            if pending_migrations(target, migrations) == pending:
                raise
            continue
        if migration is not None:
            done.append(migration)
    return done


def _apply_next(
    target: MigrationTarget, migrations: Sequence[Migration], applied_by: str
) -> Migration | None:
    with target.exclusive():
        target.run(_MIGRATIONS_TABLE)
        # Asked again under the lock: another program may have been faster.
        pending = pending_migrations(target, migrations)
        if not pending:
            return None
        _record(target, pending[0], applied_by)
        target.run_script(pending[0].up)
        return pending[0]


def _record(target: MigrationTarget, migration: Migration, applied_by: str) -> None:
    """First in the transaction: the primary key stops a racing program where locks do not."""
    target.run(
        """insert into schema_migrations (version, name, checksum, applied_at, applied_by)
           values (:version, :name, :checksum, :applied_at, :applied_by)""",
        version=migration.version,
        name=migration.name,
        checksum=migration.checksum,
        applied_at=format_time(utc_now()),
        applied_by=applied_by,
    )


def migrate_down(
    target: MigrationTarget, migrations: Sequence[Migration], *, to: int
) -> list[Migration]:
    """Undo every migration above version `to`, newest first: their tables and rows are gone."""
    pending = pending_migrations(target, migrations)
    newest = len(migrations) - len(pending)
    if not 0 <= to <= newest:
        raise InvalidRequest(f"--to must be from 0 to {newest}, the version of the database")
    undone = [migration for migration in reversed(migrations) if to < migration.version <= newest]
    if undone:
        target.safety_copy(f"before-down-to-{to:04d}")
    for migration in undone:
        with target.exclusive():
            target.run_script(migration.down)
            target.run(
                "delete from schema_migrations where version = :version", version=migration.version
            )
    return undone


def plan(target: MigrationTarget, migrations: Sequence[Migration]) -> str:
    """The SQL that `migrate_up` would run."""
    pending = pending_migrations(target, migrations)
    return "\n".join(f"-- {migration}\n{migration.up}" for migration in pending)


def status(target: MigrationTarget, migrations: Sequence[Migration]) -> list[str]:
    """A line for each migration: who applied it when, or that it is pending."""
    pending = pending_migrations(target, migrations)
    lines = [
        f"{applied}  applied {applied.applied_at} by {applied.applied_by}"
        for applied in applied_migrations(target)
    ]
    return lines + [f"{migration}  pending" for migration in pending]


# ============================================================================
# 4. Files
# Durable means that it survives the loss of power.
# ============================================================================


def sync_file(path: Path) -> None:
    """Make a file, or the entries of a directory, durable."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_file(path: Path, text: str, *, mode: int = 0o600, durable: bool = False) -> None:
    """Write a text file that is there whole or not at all."""
    unfinished = path.with_name(f".{path.name}.unfinished")
    # O_NONBLOCK: an agent may have put a pipe there, and nobody would read it.
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    handle = os.open(unfinished, flags, mode)
    with open(handle, "w", encoding="utf-8") as file:
        file.write(text)
        if durable:
            file.flush()
            os.fsync(handle)
    os.rename(unfinished, path)
    if durable:
        sync_file(path.parent)


def must_be_writable(path: Path) -> str:
    """Raises StoreUnavailable for a path that neither can be written nor made."""
    folder = next(parent for parent in (path, *path.parents) if parent.exists())
    if not os.access(folder, os.W_OK | os.X_OK):
        raise StoreUnavailable(f"{path} cannot be used: {folder} is not writable")
    return str(path)


def require_room(root: Path, least: int) -> None:
    """Without room for what is to be written work waits, instead of failing."""
    place = next(path for path in (root.absolute(), *root.absolute().parents) if path.exists())
    if shutil.disk_usage(place).free < least:
        raise StoreUnavailable(f"{root}: the disk is full: make room, work goes on by itself")


class FileLock:
    """A lock that ends with the process, for what only one process may do; does not wait."""

    def __init__(self, path: Path, advice: str) -> None:
        try:
            path.parent.mkdir(mode=0o750, parents=True, exist_ok=True)
            self._handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o640)
        except OSError as error:
            raise StoreUnavailable(f"{path} cannot be opened: {error.strerror}") from error
        try:
            fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._handle)
            raise StoreError(f"{path} is held by another nightcrier: {advice}") from None

    def release(self) -> None:
        if self._handle >= 0:
            os.close(self._handle)
            self._handle = -1


# ============================================================================
# 5. Databases
# What queries need of an engine, and what engines share.
# ============================================================================


Row = Mapping[str, Any]


class Transaction(Protocol):
    """What queries need of a connection; they run inside begin and commit.

    What works on many rows is a method, because engines do it differently: SQLite has no round
    trips to save and runs a statement for each row, PostgreSQL is sent all rows in one statement.
    The rows of one call have the same fields.

    A method that returns nothing may be carried out with the next one that does, or with the
    commit, and fail then: so a server is not waited for where nothing depends on its answer.
    """

    @property
    def now(self) -> datetime:
        """The clock that decides: of the database, where that is a server.

        In a statement it is `:now`, for which no round trip is needed.
        """
        ...

    # Behind a select: keep the rows of the table that it calls `i` from changing until the end of
    # the transaction; and the same, without those that another transaction has locked.
    lock_rows: str
    lock_free_rows: str
    each_value: str  # behind `from`: the texts of the parameter `values`, a JSON array, as `value`

    def run(self, sql: str, **params: Any) -> list[tuple[Any, ...]]: ...

    def send(self, sql: str, **params: Any) -> None:
        """Run a statement whose rows nobody needs."""
        ...

    def insert(self, table: str, rows: Sequence[Row], on_conflict: str = "") -> None: ...

    def insert_new(self, table: str, rows: Sequence[Row]) -> int:
        """Insert the rows that break no rule of uniqueness; returns how many these were."""
        ...

    def insert_numbered(
        self, table: str, rows: Sequence[Row], number: str, key: str, at: str
    ) -> None:
        """Insert rows; column `number` counts those of a `key`, of which a call has one at most.

        Column `at` is when that is done: for a key it grows with the number.
        """
        ...

    def update(self, table: str, key: str, rows: Sequence[Row]) -> None:
        """Set the other fields of each row where `key` is that of the row."""
        ...

    def delete(self, table: str, key: str, values: Sequence[Any]) -> None: ...


class Database(Protocol):
    """A connection pool and its transactions: all that differs between engines."""

    def write(self, job: Callable[[Transaction], T]) -> T:
        """Run `job` in a transaction; its result is durable when this returns."""
        ...

    def read(self, job: Callable[[Transaction], T]) -> T:
        """Run `job`, which only reads: all its statements see the same state."""
        ...

    def notify(self, topic: str) -> None:
        """Tell everybody who shares the database that there is something new; a hint, no more."""
        ...

    def listen(self, heard: Callable[[str], None]) -> None:
        """Have `heard` called, in a thread of the database's, with what others notify of."""
        ...

    @property
    def hears(self) -> bool:
        """Whether notifications of others arrive at the moment: else polling must find it all."""
        ...

    def backup(self, path: Path) -> None: ...

    def close(self) -> None: ...


def next_number(table: str, number: str, key: str, value: str) -> str:
    return f"(select coalesce(max({number}), 0) + 1 from {table} where {key} = {value})"


def insert_statement(table: str, fields: Sequence[str]) -> str:
    return (
        f"insert into {table} ({', '.join(fields)}) "
        f"values ({', '.join(f':{name}' for name in fields)})"
    )


def update_statement(table: str, fields: Sequence[str], key: str) -> str:
    changes = ", ".join(f"{name} = :{name}" for name in fields if name != key)
    return f"update {table} set {changes} where {key} = :{key}"


def numbered_insert_statement(
    table: str, fields: Sequence[str], number: str, key: str, moment: tuple[str, str]
) -> str:
    """`moment`: a column, and the expression that is its value."""
    (at, clock), given = moment, [f":{name}" for name in fields]
    values = [next_number(table, number, key, f":{key}"), clock, *given]
    return f"insert into {table} ({', '.join([number, at, *fields])}) values ({', '.join(values)})"


class GroupCall(Generic[Item, T]):
    """Makes the calls that wait at the same time one call, for which they share a commit.

    `together` is given the arguments of all of them, and answers each with a result or with an
    exception to be raised. One that the database refuses is called again alone, as the others are.
    """

    MOST = 100

    def __init__(
        self, together: Callable[[Sequence[Item]], Awaitable[Sequence[T | Exception]]]
    ) -> None:
        self._together = together
        self._waiting: list[tuple[Item, asyncio.Future[T]]] = []
        self._task: asyncio.Task[None] | None = None

    async def call(self, item: Item) -> T:
        answer: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        self._waiting.append((item, answer))
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._work(), name="group call")
        return await answer

    async def _work(self) -> None:
        while self._waiting:
            batch, self._waiting = self._waiting[: self.MOST], self._waiting[self.MOST :]
            results = await self._results([item for item, _ in batch])
            for (_, answer), result in zip(batch, results, strict=True):
                if answer.done():  # nobody waits for it any more
                    continue
                if isinstance(result, Exception):
                    answer.set_exception(result)
                else:
                    answer.set_result(result)

    async def _results(self, items: Sequence[Item]) -> Sequence[T | Exception]:
        try:
            return await self._together(items)
        except Exception as error:
            if isinstance(error, RowRefused) and len(items) > 1:
                return [result for item in items for result in await self._results([item])]
            return [error] * len(items)


# ============================================================================
# 6. SQLite
# Every failure of the library becomes an error that says what to do.
# ============================================================================


class SQLiteTransaction:
    """Adapts an apsw connection to what queries need."""

    lock_rows = ""  # there is one writer at a time
    lock_free_rows = ""
    each_value = "json_each(:values)"

    def __init__(self, connection: apsw.Connection) -> None:
        self._connection = connection
        self.now = utc_now()
        self._now = format_time(self.now)

    def run(self, sql: str, **params: Any) -> list[tuple[Any, ...]]:
        return self._connection.execute(sql, {"now": self._now, **params}).fetchall()

    def send(self, sql: str, **params: Any) -> None:
        self.run(sql, **params)

    def insert(self, table: str, rows: Sequence[Row], on_conflict: str = "") -> None:
        if rows:
            statement = f"{insert_statement(table, list(rows[0]))} {on_conflict}"
            self._connection.executemany(statement, rows)

    def insert_new(self, table: str, rows: Sequence[Row]) -> int:
        before = self._connection.total_changes()
        self.insert(table, rows, "on conflict do nothing")
        return self._connection.total_changes() - before

    def insert_numbered(
        self, table: str, rows: Sequence[Row], number: str, key: str, at: str
    ) -> None:
        if rows:
            moment = (at, ":now")
            statement = numbered_insert_statement(table, list(rows[0]), number, key, moment)
            self._connection.executemany(statement, [{**row, "now": self._now} for row in rows])

    def update(self, table: str, key: str, rows: Sequence[Row]) -> None:
        if rows:
            statement = update_statement(table, list(rows[0]), key)
            self._connection.executemany(statement, rows)

    def delete(self, table: str, key: str, values: Sequence[Any]) -> None:
        statement = f"delete from {table} where {key} = :value"
        self._connection.executemany(statement, [{"value": value} for value in values])


def _unavailable(error: Exception, path: Path) -> StoreError:
    """What a failure of SQLite means for the caller, and what to do about it."""
    import apsw

    advice = {
        apsw.FullError: "the disk is full: make room, work goes on by itself",
        apsw.IOError: "reading or writing failed: look at the disk and at the kernel's log",
        apsw.BusyError: "another program holds the write lock: end its transaction",
        apsw.LockedError: "another connection holds a lock",
        apsw.ReadOnlyError: "it cannot be written: check the permissions of file and directory",
        apsw.CantOpenError: "it cannot be opened: check the permissions of file and directory",
        apsw.PermissionsError: "access was denied: check the permissions of file and directory",
        apsw.NoMemError: "there is not enough memory",
        apsw.ConnectionClosedError: "it has been closed",
        apsw.CorruptError: "it is damaged: stop, and restore the newest backup",
    }
    for raised, text in advice.items():
        if isinstance(error, raised):
            return StoreUnavailable(f"database {path}: {text} ({error})")
    if isinstance(error, apsw.NotADBError):
        return StoreError(f"{path} is not a SQLite database: name another file with --sqlite")
    refused = isinstance(error, apsw.ConstraintError | apsw.MismatchError | apsw.TooBigError)
    kind = RowRefused if refused else StoreError
    return kind(f"database {path}: {type(error).__name__}: {error}")


@contextlib.contextmanager
def sqlite_errors(path: Path) -> Iterator[None]:
    """Turn what SQLite raises into errors of nightcrier."""
    import apsw

    try:
        yield
    except apsw.Error as error:
        raise _unavailable(error, path) from error


_PRAGMAS = (
    ("journal_mode", "wal"),
    ("synchronous", 2),  # FULL: with group commit it costs little
    ("foreign_keys", 1),
    ("wal_autocheckpoint", 4000),
    ("journal_size_limit", 64 * 1024 * 1024),
    ("temp_store", 2),
    ("cache_size", -64 * 1024),
)


def load_sqlite() -> str:
    """Have SQLite, whose version is returned, or raise DriverMissing."""
    try:
        import apsw
    except ImportError as error:
        raise DriverMissing(f"the package apsw cannot be loaded: {error}") from error
    return apsw.sqlite_lib_version()


def connect_sqlite(path: Path) -> apsw.Connection:
    """Open a database file, make it if it is missing (mode 0640, in directories of mode 0750)."""
    load_sqlite()
    import apsw

    try:
        path.parent.mkdir(mode=0o750, parents=True, exist_ok=True)
        # SQLite would make it with the umask's mode; -wal and -shm take after it. A file that is
        # there must not be opened here: closing it would drop the locks that SQLite holds on it
        # for this process (POSIX), and the next sqlite3 that looks in would take away the WAL.
        with contextlib.suppress(FileExistsError):
            os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o640))
    except OSError as error:
        raise StoreUnavailable(f"database {path} cannot be opened: {error.strerror}") from error
    with sqlite_errors(path):
        connection = apsw.Connection(str(path))
        _configure(connection)
    return connection


def _configure(connection: apsw.Connection) -> None:
    import apsw

    connection.set_busy_timeout(5000)  # first: switching to WAL takes a lock
    connection.config(apsw.SQLITE_DBCONFIG_DQS_DML, 0)
    connection.config(apsw.SQLITE_DBCONFIG_DQS_DDL, 0)
    connection.pragma("auto_vacuum", 2)  # incremental; only before the first table does it count
    for name, value in _PRAGMAS:
        connection.pragma(name, value)
        if connection.pragma(name) != value:
            raise apsw.SQLError(f"pragma {name} stays {connection.pragma(name)}, not {value}")
    # The -wal file stays after a clean stop, so that another user can open the database read-only.
    stay = array.array("i", [1])
    connection.file_control("main", apsw.SQLITE_FCNTL_PERSIST_WAL, stay.buffer_info()[0])


class SQLiteMigrationTarget:
    """A SQLite file as the migrations see it, on a connection of its own."""

    dialect = "sqlite"

    def __init__(self, path: Path) -> None:
        self._path = path
        self.room = f"{path} (name another file with --sqlite)"
        self.details: list[str] = []  # worth knowing of the database
        self._connection = connect_sqlite(path)
        self.safety_copies: list[Path] = []

    def run(self, sql: str, **params: Any) -> list[tuple[Any, ...]]:
        with sqlite_errors(self._path):
            return self._connection.execute(sql, params).fetchall()

    def run_script(self, sql: str) -> None:
        # apsw runs a statement when its rows are asked for: the loop runs them all.
        for _ in self._connection.execute(sql):
            pass

    @contextlib.contextmanager
    def exclusive(self) -> Iterator[None]:
        with sqlite_errors(self._path), _turn(self._path):
            self._connection.execute("begin immediate")
            try:
                yield
                self._connection.execute("commit")
            finally:
                if self._connection.in_transaction:
                    self._connection.execute("rollback")

    def is_empty(self) -> bool:
        return not self.run("select 1 from sqlite_master limit 1")

    def has_table(self, name: str) -> bool:
        found = self.run("select 1 from sqlite_master where type = 'table' and name = :n", n=name)
        return bool(found)

    def safety_copy(self, label: str) -> Path | None:
        if self.is_empty():
            return None
        stamp = utc_now().strftime("%Y%m%dT%H%M%S%f")
        copy = self._path.with_name(f"{self._path.name}.{label}.{stamp}.backup")
        copy_sqlite(self._connection, copy)
        self.safety_copies.append(copy)
        log.info("database copied before the migration", extra={"path": str(copy)})
        return copy

    def close(self) -> None:
        self._connection.close()


def copy_sqlite(source: apsw.Connection, path: Path) -> None:
    """Online backup: consistent while others write. `path` must not exist yet."""
    import apsw

    if os.path.lexists(path):
        raise InvalidRequest(f"{path} is already there: name another file")
    unfinished = path.with_name(path.name + ".unfinished")
    try:
        os.close(os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o640))
        target = apsw.Connection(str(unfinished))
        try:
            with target.backup("main", source, "main") as backup:
                backup.step()  # all at once: between steps each write of others starts it anew
            target.pragma("journal_mode", "delete")  # one file, without -wal
        finally:
            target.close()
        sync_file(unfinished)
        os.rename(unfinished, path)
        sync_file(path.parent)
    except OSError as error:
        raise StoreUnavailable(f"{path} cannot be written: {error.strerror}") from error
    except apsw.Error as error:
        raise _unavailable(error, path) from error
    finally:
        with contextlib.suppress(OSError):
            unfinished.unlink()


@contextlib.contextmanager
def _turn(path: Path) -> Iterator[None]:
    """Wait for this process's turn to write.

    SQLite's own busy handler lets the fastest of several processes win nearly always; the kernel
    hands a file lock out fairly.
    """
    try:
        handle = os.open(f"{path}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o640)
    except OSError as error:
        raise StoreUnavailable(f"{path}.lock cannot be opened: {error.strerror}") from error
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
        except OSError as error:
            raise StoreUnavailable(f"{path}.lock cannot be locked: {error.strerror}") from error
        yield
    finally:
        os.close(handle)


def _identity(path: Path) -> tuple[int, int]:
    found = path.stat()
    return found.st_dev, found.st_ino


@dataclass(slots=True)
class _Job:
    work: Callable[[Transaction], Any]
    answer: Future[Any] = field(default_factory=Future)
    result: Any = None
    error: Exception | None = None


class SQLiteDatabase:
    """One writer thread and a few readers on a SQLite file.

    What waits to be written goes into one transaction, a savepoint each, and is answered after
    the commit: many callers share the cost of one fsync (group commit).
    """

    MAX_JOBS = 500
    READERS = 3
    PATIENCE = 15.0  # seconds until a caller hears that another process holds the write lock

    def __init__(self, path: Path) -> None:
        self._path = path
        self._closed = False
        self._gate = threading.Lock()
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._connection = connect_sqlite(path)
        self._file = _identity(path)
        self._readers: queue.LifoQueue[apsw.Connection | None] = queue.LifoQueue()
        for _ in range(self.READERS):
            reader = connect_sqlite(path)
            reader.pragma("query_only", 1)
            self._readers.put(reader)
        self._writer = threading.Thread(target=self._write_loop, name="sqlite writer", daemon=True)
        self._writer.start()

    def write(self, job: Callable[[Transaction], T]) -> T:
        waiting = _Job(job)
        with self._gate:  # nothing may be queued behind the None of close()
            if self._closed:
                raise self._is_closed()
            self._jobs.put(waiting)
        try:
            result: T = waiting.answer.result(self.PATIENCE)
        except TimeoutError:
            if waiting.answer.cancel():  # it has not begun, and will not
                raise StoreUnavailable(
                    f"database {self._path}: another nightcrier holds {self._path}.lock and does "
                    "not go on: resume or end it"
                ) from None
            result = waiting.answer.result()
        return result

    def read(self, job: Callable[[Transaction], T]) -> T:
        with sqlite_errors(self._path), self._reader() as reader, reader:
            # `with reader` is a savepoint: all statements of the job see the same state.
            return job(SQLiteTransaction(reader))
        raise AssertionError("a savepoint does not swallow exceptions")

    @contextlib.contextmanager
    def _reader(self) -> Iterator[apsw.Connection]:
        reader = self._readers.get()
        try:
            if reader is None:  # what close() leaves, for everybody who waits
                raise self._is_closed()
            yield reader
        finally:
            self._readers.put(reader)

    def _is_closed(self) -> StoreUnavailable:
        return StoreUnavailable(f"database {self._path} is closed")

    def notify(self, topic: str) -> None:
        """Nobody hears: other processes poll, and a file has no other hosts."""

    def listen(self, heard: Callable[[str], None]) -> None:
        """Nobody speaks."""

    hears = False

    def backup(self, path: Path) -> None:
        with self._reader() as reader:
            copy_sqlite(reader, path)

    def close(self) -> None:
        """Write what was asked for, then close."""
        with self._gate:
            if self._closed:
                return
            self._closed = True
            self._jobs.put(None)
        self._writer.join(self.PATIENCE)
        for _ in range(self.READERS):
            if reader := self._readers.get():
                reader.close()
        self._readers.put(None)
        if not self._writer.is_alive():  # else it waits for a lock, with nothing left to write
            self._connection.close()

    def _write_loop(self) -> None:
        open_ = True
        while open_:
            waiting = [self._jobs.get()]
            while len(waiting) < self.MAX_JOBS and not self._jobs.empty():
                waiting.append(self._jobs.get())
            open_ = None not in waiting
            jobs = [job for job in waiting if job is not None]
            if jobs:
                self._write_round(jobs)

    def _write_round(self, jobs: Sequence[_Job]) -> None:
        failure: Exception | None = None
        try:
            with _turn(self._path):
                self._refuse_another_file()
                jobs = [job for job in jobs if job.answer.set_running_or_notify_cancel()]
                self._connection.execute("begin immediate")
                for job in jobs:
                    self._run_job(job)
                self._connection.execute("commit")
        except Exception as error:  # whatever it was, the callers must hear of it
            failure = self._round_failed(error)
        for job in jobs:
            if not (job.answer.running() or job.answer.set_running_or_notify_cancel()):
                continue  # its caller has given it up
            if failure or job.error:
                job.answer.set_exception(failure or job.error)
            else:
                job.answer.set_result(job.result)

    def _refuse_another_file(self) -> None:
        """What is written to a file that was deleted or replaced would be gone at the end."""
        try:
            there = _identity(self._path)
        except FileNotFoundError:
            there = None
        if there != self._file:
            raise StoreUnavailable(
                f"database {self._path} was deleted or replaced: put it back, or restart nightcrier"
            )

    def _run_job(self, job: _Job) -> None:
        """Run one job in a savepoint: its failure undoes its own statements only."""
        import apsw

        self._connection.execute("savepoint job")
        try:
            job.result = job.work(SQLiteTransaction(self._connection))
        except Exception as error:
            if not self._connection.in_transaction:
                raise  # a full disk and the like undo the whole transaction
            self._connection.execute("rollback to job")
            known = isinstance(error, apsw.Error)
            job.error = _unavailable(error, self._path) if known else error
        self._connection.execute("release job")

    def _round_failed(self, error: Exception) -> Exception:
        import apsw

        if self._connection.in_transaction:
            with contextlib.suppress(apsw.Error):
                self._connection.execute("rollback")
        return _unavailable(error, self._path) if isinstance(error, apsw.Error) else error


# ============================================================================
# 7. Mirrored files
# For one process: what is kept can be read without SQLite.
# ============================================================================


class _NamingTransaction(SQLiteTransaction):
    """Notes which things a transaction names, so that they can be written to their files."""

    def __init__(self, connection: apsw.Connection, keys: Collection[str]) -> None:
        super().__init__(connection)
        self.named: set[str] = set()
        self._keys = keys

    def run(self, sql: str, **params: Any) -> list[tuple[Any, ...]]:
        self._note(params)
        return super().run(sql, **params)

    def insert(self, table: str, rows: Sequence[Row], on_conflict: str = "") -> None:
        for row in rows:
            self._note(row)
        super().insert(table, rows, on_conflict)

    def insert_numbered(
        self, table: str, rows: Sequence[Row], number: str, key: str, at: str
    ) -> None:
        for row in rows:
            self._note(row)
        super().insert_numbered(table, rows, number, key, at)

    def update(self, table: str, key: str, rows: Sequence[Row]) -> None:
        for row in rows:
            self._note(row)
        super().update(table, key, rows)

    def delete(self, table: str, key: str, values: Sequence[Any]) -> None:
        self.named.update(values)
        super().delete(table, key, values)

    def _note(self, params: Mapping[str, Any]) -> None:
        self.named.update(params[key] for key in self._keys if params.get(key) is not None)


class MirroredDatabase:
    """SQLite in memory; what a transaction changes is in files before it ends.

    Each thing has a file `<root>/<id>/<file_name>` with its rows and what `describe` says of it;
    if that is None, the thing is gone. `tables` are those that hold a thing, parents first, and
    their columns with its id; a parameter that is called like one of these, or `id`, names a thing.
    The files are read once, at the start.
    """

    def __init__(
        self,
        root: Path,
        file_name: str,
        tables: Mapping[str, str],
        describe: Callable[[Transaction, str], Mapping[str, Any] | None],
        *,
        advice: str,
    ) -> None:
        """`advice`: what to do if another process has the files."""
        load_sqlite()
        self._root = root
        self._file_name = file_name
        self._tables = tables
        self._keys = frozenset(("id", *tables.values()))
        self._describe = describe
        self._mutex = threading.Lock()
        try:
            root.mkdir(mode=0o750, parents=True, exist_ok=True)
        except OSError as error:
            raise StoreUnavailable(f"{root} cannot be used: {error.strerror}") from error
        self._lock = FileLock(root / "lock", advice)
        try:
            self._load()
        except BaseException:
            self._lock.release()
            raise

    def _load(self) -> None:
        import apsw

        self._connection = apsw.Connection(":memory:")
        self._connection.pragma("foreign_keys", 1)
        for migration in load_migrations("sqlite"):
            for _ in self._connection.execute(migration.up):
                pass
        self._columns = {
            table: [row[1] for row in self._connection.execute(f"pragma table_info({table})")]
            for table in self._tables
        }
        for file in sorted(self._root.glob(f"*/{self._file_name}")):
            try:
                self._load_file(file)
            except (OSError, ValueError, KeyError, TypeError, apsw.Error) as error:
                raise StoreError(
                    f"{file} cannot be read back: repair or remove it: {error!r}"
                ) from error

    def _load_file(self, file: Path) -> None:
        kept = json.loads(file.read_text(encoding="utf-8"))["rows"]
        tx = SQLiteTransaction(self._connection)
        for table, columns in self._columns.items():
            for row in kept[table]:
                tx.insert(table, [{name: row[name] for name in columns if name in row}])

    def write(self, job: Callable[[Transaction], T]) -> T:
        with self._mutex, sqlite_errors(self._root):
            transaction = _NamingTransaction(self._connection, self._keys)
            try:
                with self._connection:
                    result = job(transaction)
                    for name in sorted(transaction.named):
                        self._mirror(transaction, name)
            except OSError as error:
                raise StoreUnavailable(
                    f"{self._root} cannot be written: {error.strerror}"
                ) from error
            return result

    def _mirror(self, transaction: _NamingTransaction, name: str) -> None:
        folder = self._root / name
        document = self._describe(transaction, name)
        if document is None:  # deleted
            shutil.rmtree(folder, ignore_errors=True)
            return
        rows = {
            table: [
                dict(zip(self._columns[table], row, strict=True))
                for row in self._connection.execute(
                    f"select * from {table} where {key} = ?", (name,)
                )
            ]
            for table, key in self._tables.items()
        }
        if not folder.is_dir():
            folder.mkdir(mode=0o750)
            sync_file(self._root)
        text = json.dumps({**document, "rows": rows}, ensure_ascii=False)
        write_file(folder / self._file_name, text, mode=0o640, durable=True)

    def read(self, job: Callable[[Transaction], T]) -> T:
        with self._mutex, sqlite_errors(self._root):
            return job(SQLiteTransaction(self._connection))

    def notify(self, topic: str) -> None:
        """There is nobody else."""

    def listen(self, heard: Callable[[str], None]) -> None:
        """Nobody speaks."""

    hears = False

    def backup(self, path: Path) -> None:
        with self._mutex, sqlite_errors(self._root):
            self._connection.cursor()  # raises the right error if it has been closed
            copy_sqlite(self._connection, path)

    def close(self) -> None:
        with self._mutex:
            self._connection.close()
        self._lock.release()


# ============================================================================
# 8. Spool
# As durable as a SQLite database, and of one process; what a dead one left is taken over.
# ============================================================================


class RowSpool:
    """Rows of one table that wait for a server: a SQLite file with the same schema.

    Each process has a file of its own in a folder, `spool-<n>.db`. One that nobody holds is of a
    process that is dead, whatever its host says: its rows are taken over, and its owners named.
    """

    OWNERS = "workers"

    def __init__(self, folder: Path, limit: int, table: str, *, key: str, owner: Row) -> None:
        self._limit = limit  # bytes
        self._table = table
        self._key = key
        (self._lock, self.path), *left = self._take(folder)
        self._database = self._open(self.path)
        for lock, path in left:
            self._take_over(path)
            lock.release()
        self.earlier_owners = self._read_all(self._database, self.OWNERS)
        self.count = len(self._read_all(self._database, table, key))
        self._database.write(lambda tx: self._note_owner(tx, owner))

    @staticmethod
    def _take(folder: Path) -> list[tuple[FileLock, Path]]:
        """A file of our own, and behind it those that others have left."""
        taken: list[tuple[FileLock, Path]] = []
        there = sorted(folder.glob("spool-*.db"))
        new = (folder / f"spool-{number}.db" for number in itertools.count(1))
        for path in itertools.chain(there, new):
            if taken and path not in there:
                break
            try:
                taken.append((FileLock(path.with_suffix(".lock"), "it has its own spool"), path))
            except StoreUnavailable:
                raise
            except StoreError:
                continue  # of a process that lives
        return taken

    @staticmethod
    def _open(path: Path) -> SQLiteDatabase:
        with contextlib.closing(SQLiteMigrationTarget(path)) as target:
            migrate_up(target, load_migrations("sqlite"), applied_by="spool")
        return SQLiteDatabase(path)

    @staticmethod
    def _read_all(database: SQLiteDatabase, table: str, names: str = "*") -> list[Row]:
        columns = database.read(
            lambda tx: tx.run("select name from pragma_table_info(:t)", t=table)
        )
        wanted = [name for (name,) in columns if names in ("*", name)]
        statement = f"select {', '.join(wanted)} from {table}"
        rows = database.read(lambda tx: tx.run(statement))
        return [dict(zip(wanted, row, strict=True)) for row in rows]

    def _take_over(self, path: Path) -> None:
        """Move everything here from a file; what was moved before a crash is there already."""
        other = self._open(path)
        try:
            found = {table: self._read_all(other, table) for table in (self._table, self.OWNERS)}
        finally:
            other.close()

        def job(tx: Transaction) -> None:
            for table, rows in found.items():
                tx.insert(table, rows, "on conflict do nothing")

        self._database.write(job)
        for end in ("", "-wal", "-shm"):
            path.with_name(path.name + end).unlink(missing_ok=True)
        log.info("took over a spool", extra={"path": str(path), "rows": len(found[self._table])})

    def _note_owner(self, tx: Transaction, owner: Row) -> None:
        """Whoever finds the file later knows whose it was; of an empty one nobody needs to know."""
        if not self.count:
            tx.run("delete from workers")
        tx.insert(self.OWNERS, [owner])

    def add(self, rows: Sequence[Row]) -> None:
        """Make rows durable; raises StoreUnavailable when the file is as large as it may be."""

        def job(tx: Transaction) -> int:
            ((used,),) = tx.run(
                """select (page_count - freelist_count) * page_size
                   from pragma_page_count, pragma_freelist_count, pragma_page_size"""
            )
            if used >= self._limit:
                raise StoreUnavailable(
                    f"the spool {self.path} is full ({used} bytes): reading pauses until the "
                    "database is back, or a larger limit is set"
                )
            return tx.insert_new(self._table, rows)

        self.count += self._database.write(job)

    def oldest(
        self, limit: int, names: Sequence[str], group: str, without: Collection[str]
    ) -> list[tuple[Any, ...]]:
        """The first rows by their key, but none whose `group` is one of some."""
        params = {f"without_{number}": value for number, value in enumerate(sorted(without))}
        condition = f"{group} not in ({', '.join(f':{name}' for name in params)})"
        statement = f"""select {", ".join(names)} from {self._table}
                        where {condition if params else "true"} order by {self._key} limit :limit"""
        return self._database.read(lambda tx: tx.run(statement, **params, limit=limit))

    def remove(self, keys: Sequence[str]) -> None:
        def job(tx: Transaction) -> None:
            tx.delete(self._table, self._key, keys)
            tx.run("pragma incremental_vacuum")

        self._database.write(job)
        self.count -= len(keys)

    def close(self) -> None:
        self._database.close()
        self._lock.release()


# ============================================================================
# 9. PostgreSQL connections
# Where the server is comes from a URL and the PG* variables; no text shows a password.
# ============================================================================


@dataclass(frozen=True, slots=True, kw_only=True)
class PostgresSettings:
    """Where a server is, and how to log in; `parse_dsn` makes it."""

    hosts: tuple[tuple[str, int], ...]  # a host that starts with / is a unix socket's directory
    user: str
    password: str | None = field(default=None, repr=False)
    database: str
    sslmode: str = "prefer"
    sslrootcert: str | None = None  # a file, or `system`
    sslcert: str | None = None
    sslkey: str | None = None
    connect_timeout: float = 5.0  # seconds, for each address; the DNS has its own
    target_session_attrs: str = "read-write"
    settings: Mapping[str, str] = field(default_factory=dict, repr=False)  # from `options`

    def __str__(self) -> str:
        hosts = ",".join(_host_and_port(host, port) for host, port in self.hosts)
        user, database = (urllib.parse.quote(text, safe="") for text in (self.user, self.database))
        return f"postgresql://{user}@{hosts}/{database}"


def _host_and_port(host: str, port: int) -> str:
    if host.startswith("/"):
        host = urllib.parse.quote(host, safe="")
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


SSL_MODES = ("disable", "prefer", "require", "verify-ca", "verify-full")
SESSION_ATTRIBUTES = ("any", "read-write", "primary")

# What a URL may say, as libpq calls it, and the variable that stands in where it does not.
_PARAMETERS = {
    "host": "PGHOST",
    "port": "PGPORT",
    "user": "PGUSER",
    "password": "PGPASSWORD",
    "dbname": "PGDATABASE",
    "sslmode": "PGSSLMODE",
    "sslrootcert": "PGSSLROOTCERT",
    "sslcert": "PGSSLCERT",
    "sslkey": "PGSSLKEY",
    "options": "PGOPTIONS",
    "connect_timeout": "PGCONNECT_TIMEOUT",
    "target_session_attrs": "PGTARGETSESSIONATTRS",
    "passfile": "PGPASSFILE",
}
# Parameters of libpq that change nothing here: connections are named and kept alive anyway.
_WITHOUT_EFFECT = {
    *("application_name", "fallback_application_name", "client_encoding", "gssencmode"),
    *("keepalives", "keepalives_idle", "keepalives_interval", "keepalives_count"),
    *("tcp_user_timeout", "sslsni", "sslcompression"),
}
_NOT_OFFERED = {
    *("channel_binding", "hostaddr", "krbsrvname", "load_balance_hosts", "replication"),
    *("require_auth", "requirepeer", "requiressl", "service", "ssl_max_protocol_version"),
    *("ssl_min_protocol_version", "sslcertmode", "sslcrl", "sslcrldir", "sslnegotiation"),
    "sslpassword",
}
_SOCKET_FOLDERS = ("/var/run/postgresql", "/tmp")  # noqa: S108 — where Debian's and others' are
_HOST_NAME = re.compile(r"[^\s/@,\[\]?#]+")
_SETTING = re.compile(r"(?:-c\s*|--)([A-Za-z_][\w.-]*)=(.*)", re.DOTALL | re.ASCII)


def parse_dsn(text: str, environment: Mapping[str, str]) -> PostgresSettings:
    """Read a URL as libpq does; PG* variables, a password file and defaults fill it up.

    Raises ConnectionStringError, whose text repeats nothing that could be a piece of a password:
    no part of the URL whose place depends on the password having been written rightly.
    """
    if environment.get("PGSERVICE"):
        raise ConnectionStringError(
            "PGSERVICE is set, and service files are not read: unset it, and name the server by "
            "postgresql://user@host/database or by PGHOST, PGUSER and PGDATABASE"
        )
    variables = {name: environment.get(given, "") for name, given in _PARAMETERS.items()}
    given = {name: value for name, value in variables.items() if value} | _parse_url(text.strip())
    for name, value in given.items():
        _refuse_unusable_text(name, value)
    user = given.get("user") or _user_of_process()
    database = given.get("dbname") or user
    hosts = _parse_hosts(given.get("host", ""), given.get("port", ""))
    password = given.get("password")
    if not password:
        home = environment.get("HOME") or os.path.expanduser("~")
        passfile = Path(given.get("passfile") or f"{home}/.pgpass")
        password = _password_from_file(passfile, hosts, database, user)
    return PostgresSettings(
        hosts=hosts,
        user=user,
        password=password,
        database=database,
        connect_timeout=_parse_timeout(given.get("connect_timeout", "5")),
        target_session_attrs=_parse_attributes(given.get("target_session_attrs", "read-write")),
        settings=_parse_options(given.get("options", "")),
        **_parse_tls(given),
    )


def _wrong(what: str) -> ConnectionStringError:
    return ConnectionStringError(f"PostgreSQL DSN: {what}")


def _wrong_value(name: str, what: str) -> ConnectionStringError:
    return _wrong(f"{name} (or {_PARAMETERS[name]}) {what}")


def _parse_url(text: str) -> dict[str, str]:
    scheme, separator, rest = text.partition("://")
    if not separator or scheme.lower() not in ("postgresql", "postgres"):
        raise _wrong(
            "write it as a URL, postgresql://user@host:5432/database?sslmode=verify-full "
            "(keyword=value strings are not read)"
        )
    who, where = "", rest
    if "@" in rest.partition("/")[0]:
        who, _, where = rest.partition("@")
    if "@" in where:
        raise _wrong(
            "there is an @ behind the one that ends user and password: percent-encode the special "
            "characters of both (@ is %40, / is %2F, : is %3A, ? is %3F, # is %23, % is %25)"
        )
    address, _, query = where.partition("?")
    authority, _, database = address.partition("/")
    user, _, password = who.partition(":")
    pairs = [_split_host(entry) for entry in authority.split(",")]
    given = {
        "user": _decoded(user),
        "password": _decoded(password),
        "host": ",".join(_decoded(host) for host, _ in pairs),
        "port": ",".join(_decoded(port) for _, port in pairs),
        "dbname": _decoded(database),
    }
    return {name: value for name, value in given.items() if value} | _parse_query(query)


def _split_host(entry: str) -> tuple[str, str]:
    """An entry of a host list; an IPv6 address is in brackets."""
    if entry.startswith("["):
        host, bracket, port = entry[1:].partition("]")
        if not bracket or not host or (port and not port.startswith(":")):
            raise _wrong("an IPv6 address is written [::1]:5432")
        return host, port[1:]
    host, _, port = entry.partition(":")
    return host, port


def _parse_query(query: str) -> dict[str, str]:
    given = {}
    for number, pair in enumerate(filter(None, query.split("&")), start=1):
        name, equals, value = (_decoded(part) for part in pair.partition("="))
        if not equals:
            raise _wrong(f"parameter {number} behind the ? has no value: write name=value")
        if name == "ssl" and value == "true":  # as JDBC says it, and libpq understands
            name, value = "sslmode", "require"
        if name in _WITHOUT_EFFECT:
            log.warning("parameter of the DSN has no effect", extra={"parameter": name})
        elif name in _NOT_OFFERED:
            raise _wrong(f"the parameter {name} is not offered: leave it out")
        elif name not in _PARAMETERS:
            raise _wrong(f"parameter {number} behind the ? is unknown{_hint(name)}")
        elif value:
            given[name] = value
    return given


def _hint(name: str) -> str:
    """Never the unknown name itself: it may be what followed a & in a password."""
    import difflib

    near = difflib.get_close_matches(name, _PARAMETERS, 1)
    return f": did you mean {near[0]}?" if near else f": there are {', '.join(_PARAMETERS)}"


def _decoded(text: str) -> str:
    if re.search(r"%(?![0-9A-Fa-f]{2})", text):
        raise _wrong("a % that two hexadecimal digits do not follow must be written %25")
    try:
        return urllib.parse.unquote(text, errors="strict")
    except UnicodeDecodeError:
        raise _wrong("percent-encoded characters must be UTF-8") from None


def _refuse_unusable_text(name: str, value: str) -> None:
    """What the protocol cannot carry: NUL, and bytes of a variable that are not UTF-8."""
    try:
        unusable = b"\0" in value.encode()
    except UnicodeEncodeError:
        unusable = True
    if unusable:
        raise _wrong_value(name, "holds a NUL, or bytes that are not UTF-8")


def _user_of_process() -> str:
    try:
        return pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:
        raise _wrong("name a user: this process runs as one that has no name") from None


def _parse_hosts(host: str, port: str) -> tuple[tuple[str, int], ...]:
    hosts, ports = host.split(","), port.split(",")
    if len(ports) == 1:
        ports *= len(hosts)
    if len(ports) != len(hosts):
        raise _wrong(f"there are {len(hosts)} hosts and {len(ports)} ports")
    numbers = [_parse_port(text) for text in ports]
    return tuple(
        (_parse_host(name) or _default_host(number), number)
        for name, number in zip(hosts, numbers, strict=True)
    )


def _parse_port(text: str) -> int:
    if not text:
        return 5432
    if not re.fullmatch(r"[0-9]{1,5}", text) or not 0 < int(text) < 65536:
        hint = "an IPv6 address needs brackets, and a : in user or password is %3A"
        raise _wrong_value("port", f"must be a number from 1 to 65535 ({hint})")
    return int(text)


def _parse_host(name: str) -> str:
    if name.startswith("/") or not name:
        return name
    with contextlib.suppress(UnicodeError):
        if _HOST_NAME.fullmatch(name) and (":" in name or name.encode("idna")):
            return name
    raise _wrong_value("host", "must be a host name, an address or a socket's directory")


def _default_host(port: int) -> str:
    folders = (name for name in _SOCKET_FOLDERS if os.path.exists(f"{name}/.s.PGSQL.{port}"))
    return next(folders, "localhost")


def _parse_timeout(text: str) -> float:
    if not re.fullmatch(r"[0-9]{1,3}", text) or not 1 <= int(text) <= 600:
        raise _wrong_value("connect_timeout", "must be seconds, from 1 to 600")
    return float(text)


def _parse_attributes(text: str) -> str:
    if text not in SESSION_ATTRIBUTES:
        choices = ", ".join(SESSION_ATTRIBUTES)
        raise _wrong_value("target_session_attrs", f"must be one of {choices}: it is written to")
    return text


def _parse_options(text: str) -> dict[str, str]:
    """`-c name=value`, `-cname=value` and `--name=value`; a backslash keeps a blank in a value."""
    settings = {}
    words = re.findall(r"(?:-c\s+)?(?:\\.|\S)+", text, re.DOTALL)
    for word in words:
        found = _SETTING.fullmatch(word)
        if not found:
            raise _wrong_value("options", "is read as -c name=value and --name=value only")
        name, value = found.groups()
        settings[name.replace("-", "_").lower()] = re.sub(r"\\(.)", r"\1", value, flags=re.DOTALL)
    return settings


def _parse_tls(given: Mapping[str, str]) -> dict[str, Any]:
    root, certificate, key = (given.get(n) for n in ("sslrootcert", "sslcert", "sslkey"))
    mode = given.get("sslmode", "verify-full" if root == "system" else "prefer")
    if mode == "allow":
        raise _wrong_value("sslmode", "allow would try without TLS first: use prefer")
    if mode not in SSL_MODES:
        raise _wrong_value("sslmode", f"must be one of {', '.join(SSL_MODES)}")
    if mode == "disable":
        return {"sslmode": mode}
    if mode.startswith("verify") and not root:
        raise _wrong_value("sslrootcert", f"is missing: {mode} needs a file of CAs, or `system`")
    if root == "system" and mode != "verify-full":  # anybody can get a certificate of those CAs
        raise _wrong_value("sslmode", "must be verify-full with sslrootcert=system")
    if bool(certificate) != bool(key):
        raise _wrong("sslcert and sslkey go together: give both, or neither")
    for name in ("sslrootcert", "sslcert", "sslkey"):
        if given.get(name) not in (None, "system"):
            _refuse_unusable_file(name, given[name])
    if mode == "require" and root:
        mode = "verify-ca"  # as libpq has it
    return {"sslmode": mode, "sslrootcert": root, "sslcert": certificate, "sslkey": key}


def _refuse_unusable_file(name: str, path: str) -> None:
    try:
        with open(path, "rb") as file:
            found = os.fstat(file.fileno())
    except OSError as error:
        raise _wrong_value(name, f"{path} cannot be read: {error.strerror}") from None
    # A key of root may be readable by a group, as Debian's ssl-cert and Kubernetes have it.
    loose = 0o027 if found.st_uid == 0 else 0o077
    if name == "sslkey" and stat.S_IMODE(found.st_mode) & loose:
        raise _wrong_value(name, f"{path} can be read by others: chmod 600 it")


_PASSFILE_FIELD = re.compile(r"((?:\\.|[^:\\]|\\$)*)(?::|$)")


def _password_from_file(
    path: Path, hosts: Sequence[tuple[str, int]], database: str, user: str
) -> str | None:
    """The first line of a ~/.pgpass that fits one of the hosts: `host:port:database:user:password`.

    One password serves all hosts of a DSN.
    """
    try:
        with path.open(encoding="utf-8", errors="surrogateescape") as file:
            found = os.fstat(file.fileno())
            if not stat.S_ISREG(found.st_mode) or found.st_mode & 0o077:
                log.warning(
                    "password file ignored: it must be a file that only its owner can read",
                    extra={"path": str(path), "mode": f"{stat.S_IMODE(found.st_mode):o}"},
                )
                return None
            lines = file.read().splitlines()
    except OSError as error:
        if not isinstance(error, FileNotFoundError):
            log.warning("password file ignored", extra={"path": str(path), "error": error.strerror})
        return None
    for host, port in hosts:
        known_as = "localhost" if host in _SOCKET_FOLDERS else host
        for line in lines:
            fields = _PASSFILE_FIELD.findall(line)[:5]
            wanted = (known_as, str(port), database, user)
            if not line.startswith("#") and len(fields) == 5 and _fits(fields, wanted):
                return _unescaped(fields[4]) or None
    return None


def _fits(fields: Sequence[str], wanted: Sequence[str]) -> bool:
    pairs = zip(fields, wanted, strict=False)
    return all(field == "*" or _unescaped(field) == value for field, value in pairs)


def _unescaped(text: str) -> str:
    return re.sub(r"\\(.)", r"\1", text)


# SQLSTATE, of which the longest beginning counts: the error that it becomes, and advice.
_SQLSTATES: dict[str, tuple[type[StoreError], str]] = {
    "08": (StoreUnavailable, "the connection was lost"),
    "22": (RowRefused, "a value does not fit"),
    "23": (RowRefused, "a row breaks a rule of the schema"),
    "25006": (StoreUnavailable, "it is read-only: a standby, or after a failover"),
    "25P": (StoreUnavailable, "the transaction took too long and was ended"),
    "25P02": (StoreError, "an earlier statement of the transaction failed"),
    "28": (StoreError, "it does not let us in: look at the user and at its pg_hba.conf"),
    "28P01": (StoreError, "the password was not accepted"),
    "3D000": (StoreError, "there is no such database: create it, or name another one"),
    "3F000": (StoreError, "a schema is missing: create it, or correct search_path"),
    "40": (StoreUnavailable, "the transaction met another one"),
    "42501": (StoreError, "permission denied: grant it to the user"),
    "42P01": (StoreError, "a table is missing: run `migrate up`, and look at search_path"),
    "53": (StoreUnavailable, "it is out of resources"),
    "53100": (StoreUnavailable, "its disk is full: make room, work goes on by itself"),
    "53300": (StoreUnavailable, "it has too many connections: raise max_connections"),
    "54": (RowRefused, "a row is too large, or too deeply nested"),
    "55P03": (StoreUnavailable, "somebody holds a lock: end that transaction"),
    "57014": (StoreUnavailable, "a statement took too long or was cancelled"),
    "57P": (StoreUnavailable, "it is stopping or was restarted"),
    "57P03": (StoreUnavailable, "it is starting up or stopping"),
    "57P04": (StoreError, "the database was dropped"),
    "58": (StoreUnavailable, "reading or writing failed there: look at its disk and log"),
    "XX001": (StoreError, "it is damaged: restore a backup"),
    "XX002": (StoreError, "an index is damaged: reindex it"),
}
_LOST = {"network error", "communication error", "connection is closed"}  # as pg8000 says it


def postgres_error(error: BaseException, where: str) -> StoreError:
    """What a failure of the driver means for the caller, and what to do about it.

    Only the server's primary message is repeated, and only its beginning: details hold rows.
    """
    import pg8000.exceptions

    if isinstance(error, StoreError):
        return error
    if isinstance(error, pg8000.exceptions.DatabaseError):
        state, message = _answer(error)
        fitting = [start for start in _SQLSTATES if state.startswith(start)]
        kind, advice = _SQLSTATES[max(fitting, key=len)] if fitting else (StoreError, "it failed")
        return kind(f"database {where}: {advice} ({state}: {message})")
    if isinstance(error, OSError | struct.error) or str(error) in _LOST:
        return StoreUnavailable(f"database {where}: the connection was lost")
    return StoreError(f"database {where}: {type(error).__name__}: {str(error)[:200]}")


def _answer(error: pg8000.exceptions.DatabaseError) -> tuple[str, str]:
    """SQLSTATE and message of what the server answered."""
    fields = error.args[0] if error.args and isinstance(error.args[0], dict) else {}
    message = " ".join(str(fields.get("M", "")).split())
    return str(fields.get("C", "")), message[:200]


@dataclass(slots=True, kw_only=True)
class PostgresConnection:
    """A connection that is logged in."""

    driver: pg8000.native.Connection
    pooled: bool  # a pooler in between gives each transaction any of its server connections
    where: str  # host:port, for messages

    def close(self) -> None:
        with contextlib.suppress(Exception):  # it may have been lost already
            self.driver.close()


_SOCKET_OPTIONS = {  # those that this system has; TCP_KEEPALIVE is what macOS calls TCP_KEEPIDLE
    "TCP_NODELAY": 1,  # without it, statements of more than 8 KiB wait 40 ms
    "TCP_KEEPIDLE": 10,
    "TCP_KEEPALIVE": 10,
    "TCP_KEEPINTVL": 5,
    "TCP_KEEPCNT": 3,
    "TCP_USER_TIMEOUT": 15_000,  # milliseconds that what was sent may stay unacknowledged
}
_LAST_RESORT = 60.0  # seconds until a silent connection is given up
_SSL_REQUEST = struct.pack("!ii", 8, 80877103)
_APPLICATION_NAME_BYTES = 63  # the server cuts it there


@dataclass(frozen=True, slots=True, kw_only=True)
class _Address:
    host: str
    where: str
    family: int
    address: Any


def connect_postgres(settings: PostgresSettings, application_name: str) -> PostgresConnection:
    """Log in to the first host that can be used, in their order.

    The settings of `options` hold for the session; on a pooled connection, where they would be
    another client's as well, the caller has to set them in each transaction.
    Raises StoreUnavailable if that may pass, StoreError if somebody has to mend it.
    """
    try:
        import pg8000.native  # noqa: F401
    except ImportError as error:
        raise DriverMissing(f"the package pg8000 cannot be loaded: {error}") from error
    context = _tls_context(settings) if settings.sslmode != "disable" else None
    failures: list[StoreUnavailable] = []
    for host, port in settings.hosts:
        try:
            for address in _addresses(host, port):
                try:
                    return _connect_to(address, settings, application_name, context)
                except StoreUnavailable as error:
                    failures.append(error)
        except StoreUnavailable as error:
            failures.append(error)
    raise StoreUnavailable("; ".join(dict.fromkeys(map(str, failures)))) from failures[-1]


def _tls_context(settings: PostgresSettings) -> ssl.SSLContext:
    import ssl

    # Not create_default_context(): it loads the system's CAs, and from Python 3.13 on refuses
    # certificates of many a private CA.
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = settings.sslmode == "verify-full"
    if not settings.sslrootcert:
        context.verify_mode = ssl.CERT_NONE
    try:
        if settings.sslrootcert == "system":
            context.load_default_certs()
        elif settings.sslrootcert:
            context.load_verify_locations(settings.sslrootcert)
        if settings.sslcert:
            # An empty password, or an encrypted key would have OpenSSL ask for one on the terminal.
            context.load_cert_chain(settings.sslcert, settings.sslkey, password=lambda: "")
    except (OSError, ValueError) as error:
        raise StoreError(
            f"a certificate of the PostgreSQL DSN cannot be used: {_reason(error)}: sslrootcert, "
            "sslcert and sslkey must be PEM files, the key not encrypted and that of sslcert"
        ) from error
    return context


def _reason(error: Exception) -> str:
    return str(getattr(error, "reason", None) or getattr(error, "strerror", None) or error)


def _addresses(host: str, port: int) -> list[_Address]:
    where = _host_and_port(host, port)
    if host.startswith("/"):
        path = f"{host}/.s.PGSQL.{port}"
        return [_Address(host=host, where=path, family=socket.AF_UNIX, address=path)]
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except OSError as error:
        raise StoreUnavailable(
            f"database {where}: the host name cannot be resolved ({error.strerror}): correct it, "
            "or look at the DNS"
        ) from error
    return [
        _Address(host=host, where=where, family=family, address=address)
        for family, _, _, _, address in found
    ]


def _connect_to(
    address: _Address,
    settings: PostgresSettings,
    application_name: str,
    context: ssl.SSLContext | None,
) -> PostgresConnection:
    outer = sys.exception()  # what the caller handles is no cause of what goes wrong here
    deadline = time.monotonic() + settings.connect_timeout
    sock: socket.socket | None = None
    try:
        sock = socket.socket(address.family, socket.SOCK_STREAM)
        _prepare(sock, address, deadline)
        if context and address.family != socket.AF_UNIX:
            sock = _start_tls(sock, context, address, settings)
        sock.settimeout(max(0.1, deadline - time.monotonic()))
        connection = _log_in(sock, address, settings, application_name)
        sock.settimeout(_LAST_RESORT)
    except BaseException as error:
        if sock:
            sock.close()
        if isinstance(error, StoreError) or not isinstance(error, Exception):
            raise
        # pg8000 raises anything where it is not PostgreSQL that answers.
        raise _connect_error(error, outer, address.where, settings) from error
    return connection


def _prepare(sock: socket.socket, address: _Address, deadline: float) -> None:
    if address.family != socket.AF_UNIX:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in _SOCKET_OPTIONS.items():
            if option := getattr(socket, name, None):
                sock.setsockopt(socket.IPPROTO_TCP, option, value)
    sock.settimeout(max(0.1, deadline - time.monotonic()))
    sock.connect(address.address)


def _start_tls(
    sock: socket.socket,
    context: ssl.SSLContext,
    address: _Address,
    settings: PostgresSettings,
) -> socket.socket:
    """Ask for TLS; here and not in pg8000, which has no `prefer` with certificates."""
    sock.sendall(_SSL_REQUEST)
    answer = sock.recv(1)
    if answer == b"S":
        return context.wrap_socket(sock, server_hostname=address.host)
    if answer == b"N" and settings.sslmode == "prefer":
        return sock
    if answer == b"N":
        raise StoreError(
            f"database {address.where}: it does not offer TLS, and sslmode is {settings.sslmode}: "
            "switch `ssl` on there, or use sslmode=disable where the network is trusted"
        )
    raise ConnectionResetError(f"answered {answer!r} to the request for TLS")


def _log_in(
    sock: socket.socket, address: _Address, settings: PostgresSettings, application_name: str
) -> PostgresConnection:
    import pg8000.native

    name = application_name.replace("\0", "").encode()[:_APPLICATION_NAME_BYTES]
    driver = pg8000.native.Connection(
        settings.user,
        password=settings.password or "",  # None would fail in pg8000 where one is asked for
        database=settings.database,
        application_name=name.decode(errors="ignore"),
        sock=sock,
        ssl_context=False,  # it is there already
    )
    connection = PostgresConnection(driver=driver, pooled=False, where=address.where)
    try:
        _look_around(connection, settings)
    except BaseException:
        connection.close()  # as it is the driver's, too: our own close() would leave it open
        raise
    return connection


def _look_around(connection: PostgresConnection, settings: PostgresSettings) -> None:
    """Find out whether this is a server to write to, and whether a pooler is in between."""
    driver = connection.driver
    # Without parameters: that is one message, and so right behind a pooler as well.
    ((pid, recovering, read_only, encoding),) = driver.run(
        "select pg_backend_pid(), pg_is_in_recovery(), current_setting('transaction_read_only'), "
        "current_setting('server_encoding')"
    )
    if encoding != "UTF8":
        raise StoreError(
            f"database {connection.where}: its encoding is {encoding}, which cannot keep every "
            "event: create one with encoding 'UTF8' template template0"
        )
    wanted = settings.target_session_attrs
    if (wanted == "primary" and recovering) or (wanted == "read-write" and read_only == "on"):
        raise StoreUnavailable(
            f"database {connection.where}: it is read-only, a standby for example: name the primary"
        )
    key = driver._backend_key_data or b""  # the server's own, or what a pooler made up
    connection.pooled = int.from_bytes(key[:4], signed=True) != pid
    if not connection.pooled:
        for setting, value in settings.settings.items():
            driver.run("select set_config(:setting, :value, false)", setting=setting, value=value)


def _connect_error(
    error: Exception, outer: BaseException | None, where: str, settings: PostgresSettings
) -> StoreError:
    """Why there is no connection: of an error and its causes, the one that says most."""
    import pg8000.exceptions

    causes: list[BaseException] = [error]
    for cause in causes:
        before = (cause.__cause__, cause.__context__)
        causes += [found for found in before if found and found not in (outer, *causes)]
    for cause in causes:  # pg8000 says goodbye after an answer; when that fails it hides it
        if isinstance(cause, pg8000.exceptions.DatabaseError):
            if _answer(cause)[0] == "28P01" and not settings.password:
                return _password_missing(where, settings.user)
            return postgres_error(cause, where)
    for cause in causes:
        if isinstance(cause, OSError):
            return _network_error(cause, where, settings)
    if str(error) in _LOST:
        return StoreUnavailable(f"database {where}: it closed the connection")
    if isinstance(error, pg8000.exceptions.InterfaceError):
        return StoreError(f"database {where}: {error}")
    return StoreError(
        f"database {where}: it does not answer as PostgreSQL does ({type(error).__name__}): "
        "correct host and port"
    )


def _password_missing(where: str, user: str) -> StoreError:
    return StoreError(
        f"database {where}: it asks {user} for a password: give one by PGPASSWORD or in a "
        "password file (PGPASSFILE, ~/.pgpass)"
    )


def _network_error(error: OSError, where: str, settings: PostgresSettings) -> StoreError:
    import ssl

    if isinstance(error, ssl.SSLCertVerificationError):
        return StoreError(
            f"database {where}: its certificate is not accepted ({error.verify_message}): correct "
            "the host name or sslrootcert"
        )
    if isinstance(error, TimeoutError):
        reason = f"it did not answer within {settings.connect_timeout:g} s"
    elif isinstance(error, ConnectionRefusedError | FileNotFoundError):
        reason = "nothing listens there: start PostgreSQL, or correct host and port"
    elif isinstance(error, ssl.SSLEOFError | ConnectionResetError | BrokenPipeError):
        reason = "it closed the connection"
    elif isinstance(error, ssl.SSLError):
        return StoreError(f"database {where}: TLS failed ({_reason(error)}): look at its log")
    else:
        reason = f"it cannot be reached ({_reason(error)})"
    return StoreUnavailable(f"database {where}: {reason}")


# ============================================================================
# 10. PostgreSQL
# Every statement runs between begin and commit, and nothing that matters is kept in a session: a
# pooler in transaction mode may hand each transaction to another one.
# ============================================================================

# What a session is set to; the connection string's `options` come after, and win.
_SESSION_SETTINGS = {
    "statement_timeout": "30s",
    "lock_timeout": "10s",
    "idle_in_transaction_session_timeout": "60s",  # a replica that hangs keeps no row locked
}
# How values are written: we read them so, whatever a role, a database or `options` is set to.
_SESSION_FORMATS = {"timezone": "UTC", "datestyle": "ISO", "client_encoding": "UTF8"}
_IN_NO_ORDER = ("40001", "40P01")  # serialization failure, deadlock: the same works once repeated
_UUID_OID, _JSON_OIDS, _TIMESTAMPTZ_OID = 2950, (114, 3802), 1184


class _TryAgain(StoreUnavailable):
    """Nothing was committed, and the same may work at once, on another connection."""

    by_server = False  # it is what the server said, not that it said nothing


# `:now` of a statement, but not `::now` or `:nowhere`
_NOW = re.compile(r"(?<!:):now\b")
_EXECUTE_AND_SYNC = b"E\0\0\0\x09\0\0\0\0\0S\0\0\0\x04"


def _message(kind: bytes, body: bytes) -> bytes:
    return kind + struct.pack("!i", len(body) + 4) + body


def _as_texts(values: Sequence[Any]) -> bytes:
    """Parameters as a Bind message has them; the server knows the types."""
    parts = [struct.pack("!hh", 0, len(values))]
    for value in values:
        if value is None:
            parts.append(b"\xff\xff\xff\xff")
            continue
        text = str(value).encode()
        parts += struct.pack("!i", len(text)), text
    return b"".join(parts) + b"\0\0"


class _Session:
    """A connection and its prepared statements; every failure of the driver is ours here."""

    STATEMENTS = 500

    def __init__(self, settings: PostgresSettings, name: str, generation: int) -> None:
        from pg8000.native import literal

        self._connection = connect_postgres(settings, name)
        self.driver, self.pooled = self._connection.driver, self._connection.pooled
        self.generation = generation
        self.alive = True
        self._prepared: dict[str, Callable[[Row], None]] = {}
        self._waiting: deque[Any] = deque()  # for the answers to what was sent
        self._began: Any = None  # the answer to the last `begin`
        for oid in (_UUID_OID, *_JSON_OIDS):
            self.driver.register_in_adapter(oid, str)
        self.driver.register_in_adapter(_TIMESTAMPTZ_OID, datetime.fromisoformat)
        # Behind a pooler the next transaction may find another session, with other settings.
        local = "true" if self.pooled else "false"
        configure = "".join(
            f"select set_config({literal(key)}, {literal(value)}, {local});"
            for key, value in {**_SESSION_SETTINGS, **settings.settings, **_SESSION_FORMATS}.items()
        )
        self._configure = configure if self.pooled else ""
        if not self.pooled:
            try:
                self.simple(configure)
            except BaseException:
                self.close()
                raise

    def simple(self, script: str) -> list[Any]:
        """Run statements without parameters, in one round trip; the rows of all of them."""
        self._send_script(script)
        return self._receive().rows or []

    def begin(self, how: str) -> None:
        """Begin a transaction, together with its first statement."""
        self._send_script(f"begin {how};{self._configure}select now()")
        self._began = self._waiting[-1]

    @property
    def now(self) -> datetime:
        """When the transaction began, by the server's clock."""
        if self._began in self._waiting:
            self._receive()
        moment: datetime = self._began.rows[-1][0]
        return moment

    def commit(self) -> None:
        self._send_script("commit")
        try:
            self._receive()
        except _TryAgain as error:
            # The server may have ended the session at an earlier statement: then it says so.
            if self.alive or (self._waiting and error.by_server):
                raise
            raise CommitUnknown(f"{error}: whether the last write was done is not known") from error

    def end_reading(self) -> None:
        """Commit what has only read: nobody waits for the answer, it is taken with the next."""
        self._send_script("commit")
        self._ask(self.driver._sock.flush)

    def rollback(self) -> None:
        with contextlib.suppress(StoreError):
            if self.alive:
                self.simple("rollback")

    def run(self, sql: str, params: Row) -> tuple[list[Any], int]:
        """Run a statement; its rows, and how many rows it was about."""
        self.send(sql, params)
        context = self._receive()
        return context.rows or [], context.row_count

    def send(self, sql: str, params: Row) -> None:
        """Run a statement together with what comes next."""
        if sql not in self._prepared:
            if len(self._prepared) >= self.STATEMENTS:  # filters of lists have many combinations
                self._prepared.clear()
                if not self.pooled:
                    self.simple("deallocate all")
            self._prepared[sql] = self._prepare(sql)
        self._prepared[sql](params)

    def _prepare(self, sql: str) -> Callable[[Row], None]:
        from pg8000.core import Context
        from pg8000.native import to_statement

        statement, values = to_statement(_NOW.sub("now()", sql))
        name, columns, decoders, before, after = b"\0", None, None, b"", b""
        if self.pooled:  # a named statement would stay behind in a session that others get
            parse = b"\0" + statement.encode() + b"\0\0\0"
            before, after = _message(b"P", parse), _message(b"D", b"P\0")
        else:
            if self._waiting:
                self._receive()
            name, columns, decoders = self._ask(self.driver.prepare_statement, statement, ())

        def send(params: Row) -> None:
            bind = b"\0" + name + _as_texts(values(params))
            message = before + _message(b"B", bind) + after + _EXECUTE_AND_SYNC
            self._ask(self.driver._sock.write, message)
            context = Context(statement, columns=columns, input_funcs=decoders)
            self._waiting.append(context)

        return send

    def _send_script(self, script: str) -> None:
        from pg8000.core import Context

        self._ask(self.driver.send_QUERY, script)
        self._waiting.append(Context(script))

    def _receive(self) -> Any:
        """Take the answers to all that was sent; returns the last, or raises the first error."""
        self._ask(self.driver._sock.flush)
        failure: StoreError | None = None
        while self._waiting:
            context = self._waiting.popleft()
            if failure:
                context.statement = "rollback"  # what a commit is then; the driver would object
            try:
                self._ask(self._take_answer, context)
            except StoreError as error:
                # What was sent behind it fails, too, because it did.
                failure = failure or error
                if not self.alive:
                    break
        if failure:
            raise failure
        return context

    def _take_answer(self, context: Any) -> None:
        try:
            self.driver.handle_messages(context)
        except Exception as error:
            # A server that ends the session says why; the driver reads on, and finds nothing.
            farewell = context.error
            if farewell is not None and farewell.args[0].get("V") in ("FATAL", "PANIC"):
                raise farewell from error
            raise

    def _ask(self, method: Callable[..., Any], *arguments: Any) -> Any:
        from pg8000.exceptions import DatabaseError

        try:
            return method(*arguments)
        except Exception as error:
            known = postgres_error(error, self._connection.where)
            answer = error.args[0] if isinstance(error, DatabaseError) else {}
            # Without an answer nobody knows what the next one would belong to.
            self.alive = bool(answer) and answer.get("V") not in ("FATAL", "PANIC")
            lost = not self.alive and isinstance(known, StoreUnavailable)
            if lost or answer.get("C") in _IN_NO_ORDER:
                again = _TryAgain(str(known))
                # A pooler speaks for a server that it has lost, whatever that has done meanwhile.
                again.by_server = bool(answer) and not self.pooled
                raise again from error
            raise known from error

    def cut(self) -> None:
        """End the wait of another thread for an answer; it closes the connection."""
        with contextlib.suppress(OSError):
            self.driver._usock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self.alive = False
        self._connection.close()


class PostgresTransaction:
    """What queries need of a connection, on PostgreSQL: many rows are one JSON parameter.

    One row is a parameter for each column, as in SQLite: less work for the server.
    """

    lock_rows = "for update of i"
    lock_free_rows = "for update of i skip locked"
    each_value = "json_array_elements_text(cast(:values as json))"

    def __init__(self, session: _Session, json_columns: Collection[tuple[str, str]]) -> None:
        self._session = session
        self._json_columns = json_columns

    @property
    def now(self) -> datetime:
        return self._session.now

    def run(self, sql: str, **params: Any) -> list[tuple[Any, ...]]:
        rows, _ = self._session.run(sql, params)
        return [tuple(row) for row in rows]

    def send(self, sql: str, **params: Any) -> None:
        self._session.send(sql, params)

    def insert(self, table: str, rows: Sequence[Row], on_conflict: str = "") -> None:
        if rows:
            self._session.send(*self._insert(table, rows, on_conflict))

    def insert_new(self, table: str, rows: Sequence[Row]) -> int:
        if not rows:
            return 0
        return self._session.run(*self._insert(table, rows, "on conflict do nothing"))[1]

    def insert_numbered(
        self, table: str, rows: Sequence[Row], number: str, key: str, at: str
    ) -> None:
        clock = "clock_timestamp()"  # now() is when the transaction began
        if len(rows) == 1:
            statement = numbered_insert_statement(table, list(rows[0]), number, key, (at, clock))
            self._session.send(statement, rows[0])
        elif rows:
            names, values = self._columns(table, rows[0])
            statement = f"""insert into {table} ({number}, {at}, {names})
                            select {next_number(table, number, key, f"r.{key}")}, {clock}, {values}
                            from {_rows_of(table)}"""
            self._session.send(statement, _as_json(rows))

    def _insert(self, table: str, rows: Sequence[Row], on_conflict: str) -> tuple[str, Row]:
        if len(rows) == 1:
            return f"{insert_statement(table, list(rows[0]))} {on_conflict}", rows[0]
        names, values = self._columns(table, rows[0])
        statement = f"""insert into {table} ({names})
                        select {values} from {_rows_of(table)} {on_conflict}"""
        return statement, _as_json(rows)

    def update(self, table: str, key: str, rows: Sequence[Row]) -> None:
        if len(rows) == 1:
            self._session.send(update_statement(table, list(rows[0]), key), rows[0])
        elif rows:
            changes = ", ".join(
                f"{name} = {self._value(table, name)}" for name in rows[0] if name != key
            )
            statement = f"""update {table} t set {changes}
                            from {_rows_of(table)} where t.{key} = r.{key}"""
            self._session.send(statement, _as_json(rows))

    def delete(self, table: str, key: str, values: Sequence[Any]) -> None:
        statement = f"delete from {table} where {key} in (select {key} from {_rows_of(table)})"
        self._session.send(statement, _as_json([{key: value} for value in values]))

    def _columns(self, table: str, names: Collection[str]) -> tuple[str, str]:
        return ", ".join(names), ", ".join(self._value(table, name) for name in names)

    def _value(self, table: str, name: str) -> str:
        """A column of the rows; JSON comes as text, as it does for SQLite."""
        is_json = (table, name) in self._json_columns
        return f"cast(r.{name} #>> '{{}}' as jsonb)" if is_json else f"r.{name}"


def _rows_of(table: str) -> str:
    """The parameter `rows` as rows that have the types of a table's columns."""
    return f"json_populate_recordset(cast(null as {table}), cast(:rows as json)) r"


def _as_json(rows: Sequence[Row]) -> dict[str, str]:
    return {"rows": json.dumps(rows, ensure_ascii=False, separators=(",", ":"))}


class PostgresDatabase:
    """A pool of connections to a PostgreSQL server, made when they are needed.

    A connection that was lost is replaced, and its transaction repeated, as long as nothing was
    committed. Whoever is told StoreUnavailable may try again at any time.
    """

    CONNECTIONS = 10
    TRIES = 4
    PATIENCE = 30.0  # seconds to wait for a connection of the pool

    def __init__(self, settings: PostgresSettings, name: str) -> None:
        self._settings = settings
        self._name = name
        self._closed = False
        self._generation = 0  # of connections; those of an earlier one are not used any more
        self._json_columns: frozenset[tuple[str, str]] = frozenset()
        # What is used last is used next; None stands for a connection that may be made.
        self._pool: queue.LifoQueue[_Session | None] = queue.LifoQueue()
        for _ in range(self.CONNECTIONS):
            self._pool.put(None)
        self._busy: set[_Session] = set()
        self._wake_ups = _WakeUps(lambda: _Session(settings, name, 0))
        try:
            with self._session() as session:
                self._json_columns = _find_json_columns(session)
        except BaseException:
            self.close()
            raise

    def write(self, job: Callable[[Transaction], T]) -> T:
        return self._transact("isolation level read committed", job, _Session.commit)

    def read(self, job: Callable[[Transaction], T]) -> T:
        how = "isolation level repeatable read read only"
        return self._transact(how, job, _Session.end_reading)

    def _transact(
        self, how: str, job: Callable[[Transaction], T], end: Callable[[_Session], None]
    ) -> T:
        for left in reversed(range(self.TRIES)):
            try:
                with self._session() as session:
                    session.begin(how)
                    return self._try(session, job, end)
            except _TryAgain:
                if not left:
                    raise
        raise AssertionError("the last try returns or raises")

    def _try(
        self, session: _Session, job: Callable[[Transaction], T], end: Callable[[_Session], None]
    ) -> T:
        try:
            result = job(PostgresTransaction(session, self._json_columns))
        except BaseException:
            session.rollback()
            raise
        end(session)
        return result

    @contextlib.contextmanager
    def _session(self) -> Iterator[_Session]:
        try:
            session = self._pool.get(timeout=self.PATIENCE)
        except queue.Empty:
            text = f"{self._settings}: all connections are in use and none comes back"
            raise StoreUnavailable(text) from None
        try:
            if self._closed:
                raise StoreUnavailable(f"{self._settings}: the store is closed")
            if session is not None and session.generation != self._generation:
                session.close()  # as old as one that was lost
                session = None
            session = session or _Session(self._settings, self._name, self._generation)
            self._busy.add(session)
            yield session
        except _TryAgain:
            if session is not None and not session.alive:
                self._generation = max(self._generation, session.generation + 1)
            raise
        finally:
            keep = session is not None and session.alive and not self._closed
            self._busy.discard(session)
            if session is not None and not keep:
                session.close()
            self._pool.put(session if keep else None)
            if keep and self._closed:  # by now
                self._close_idle()

    def notify(self, topic: str) -> None:
        self._wake_ups.notify(topic)

    def listen(self, heard: Callable[[str], None]) -> None:
        self._wake_ups.listen(heard)

    @property
    def hears(self) -> bool:
        return self._wake_ups.hears

    def backup(self, path: Path) -> None:
        raise InvalidRequest("a PostgreSQL database is copied with pg_dump, not by nightcrier")

    def close(self) -> None:
        """Also of calls that are under way: who wants their results waits for them before."""
        self._closed = True
        for busy in list(self._busy):
            busy.cut()
        self._wake_ups.close()
        self._close_idle()  # those in use are closed when they come back

    def _close_idle(self) -> None:
        idle = []
        with contextlib.suppress(queue.Empty):
            while True:
                idle.append(self._pool.get_nowait())
        for session in idle:
            if session is not None:
                session.close()
            self._pool.put(None)


def _find_json_columns(session: _Session) -> frozenset[tuple[str, str]]:
    session.begin("read only")
    rows, _ = session.run(
        """select table_name, column_name from information_schema.columns
           where table_schema = current_schema() and data_type = 'jsonb'""",
        {},
    )
    session.commit()
    return frozenset((table, column) for table, column in rows)


class _WakeUps:
    """LISTEN and NOTIFY on a connection of their own, in a thread that starts when it is needed.

    A NOTIFY inside a transaction takes a lock that keeps others from committing together: so it
    is sent by itself, and at most every 20 ms. It is a hint: the topics are found by polling, too.
    """

    INTERVAL = 0.02
    LOOK = 1.0  # seconds; what the driver has read along with an answer is found then

    def __init__(self, connect: Callable[[], _Session]) -> None:
        self._connect = connect
        self._heard: list[Callable[[str], None]] = []
        self._gate = threading.Lock()
        self._topics: set[str] = set()
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None
        self._wake, self._waker = socket.socketpair()
        self._wake.setblocking(False)
        self._waker.setblocking(False)
        self.hears = False

    def listen(self, heard: Callable[[str], None]) -> None:
        self._heard.append(heard)
        self._poke()

    def notify(self, topic: str) -> None:
        with self._gate:
            self._topics.add(topic)
        self._poke()

    def _poke(self) -> None:
        self._start()
        with contextlib.suppress(OSError):  # full: it wakes up anyway; closed: nobody cares
            self._waker.send(b"x")

    def _start(self) -> None:
        with self._gate:
            if self._thread is None and not self._closed.is_set():
                self._thread = threading.Thread(target=self._run, name="wake-ups", daemon=True)
                self._thread.start()

    def _run(self) -> None:
        failures = 0
        while not self._closed.is_set():
            session: _Session | None = None
            try:
                session = self._connect()
                failures = 0
                while not self._closed.is_set():
                    self._turn(session)
            except StoreError as error:
                failures += 1
                log.debug("no notifications at the moment, polling goes on: %s", error)
            finally:
                self.hears = False
                if session is not None:
                    session.close()
            self._closed.wait(min(0.2 * 2**failures, 10.0))

    def _turn(self, session: _Session) -> None:
        """Send what is to be told, and hear what others tell."""
        listen = bool(self._heard) and not session.pooled
        if listen and not self.hears:
            session.simple(f"listen {_CHANNEL}")
            self.hears = True
        news = select.poll()  # not select(), which knows 1024 files only
        for source in (self._wake, session.driver._usock):
            news.register(source, select.POLLIN)
        news.poll(self.LOOK * 1000)
        with contextlib.suppress(BlockingIOError):
            self._wake.recv(4096)
        with self._gate:
            topics, self._topics = sorted(self._topics), set()
        # A topic is a word of the program's own. The driver takes notifications along with answers.
        calls = [f"select pg_notify('{_CHANNEL}', '{topic}');" for topic in topics]
        session.simple("".join(calls) or "select 1")
        if topics:
            self._closed.wait(self.INTERVAL)
        while session.driver.notifications:
            _, _, topic = session.driver.notifications.popleft()
            for heard in self._heard:
                heard(topic)

    def close(self) -> None:
        self._closed.set()
        with contextlib.suppress(OSError):
            self._waker.send(b"x")
        with self._gate:
            thread = self._thread
        if thread is not None:
            thread.join(5.0)
        if thread is None or not thread.is_alive():
            self._wake.close()
            self._waker.close()


_CHANNEL = "nightcrier"


class PostgresMigrationTarget:
    """The schema that the connection's search_path names first, as the migrations see it."""

    dialect = "postgres"
    LOCK = "select pg_advisory_xact_lock(7281944063211)"  # a number of ours

    def __init__(self, settings: PostgresSettings, name: str) -> None:
        self._session = _Session(settings, name, 0)
        # A migration may be silent for long; a server that is gone is found out by keep-alives.
        self._session.driver._usock.settimeout(None)
        self._inside = False
        self.safety_copies: list[Path] = []
        try:
            ((schema, version),) = self.run(
                "select current_schema(), current_setting('server_version')"
            )
        except BaseException:
            self.close()
            raise
        self.details = [f"PostgreSQL {version}"]
        self.details += ["through a pooler: workers poll"] if self._session.pooled else []
        if schema is None:
            self.close()
            raise StoreError(
                f"{settings}: the schema of search_path is not there: create it first "
                "(create schema …), or name another one in the connection string's options"
            )
        self.room = f"schema {schema!r} of {settings} (name another one with search_path)"

    def run(self, sql: str, **params: Any) -> list[tuple[Any, ...]]:
        with contextlib.nullcontext() if self._inside else self._transaction(""):
            return [tuple(row) for row in self._session.run(sql, params)[0]]

    def run_script(self, sql: str) -> None:
        self._session.simple(sql)

    @contextlib.contextmanager
    def _transaction(self, first: str) -> Iterator[None]:
        self._session.begin("isolation level read committed")
        self._inside = True
        try:
            # An index on a large table takes as long as it takes; so does waiting for the others.
            self._session.simple(
                f"set local statement_timeout = 0; set local lock_timeout = 0;{first}"
            )
            yield
            self._session.commit()
        except BaseException:
            self._session.rollback()
            raise
        finally:
            self._inside = False

    def exclusive(self) -> contextlib.AbstractContextManager[None]:
        return self._transaction(self.LOCK)

    def is_empty(self) -> bool:
        return not self.run(
            """select 1 from information_schema.tables
               where table_schema = current_schema() limit 1"""
        )

    def has_table(self, name: str) -> bool:
        found = self.run(
            """select 1 from information_schema.tables
               where table_schema = current_schema() and table_name = :name""",
            name=name,
        )
        return bool(found)

    def safety_copy(self, label: str) -> Path | None:
        """A server has its own backups."""
        return None

    def close(self) -> None:
        self._session.close()
