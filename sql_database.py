"""SQL databases: migrations and engines; nothing here knows of incidents.

1. Errors, each with an exit code and a message that says what to do.
2. Values: times and keys as they are stored.
3. Migrations: numbered SQL files, each applied with its record in one transaction.
4. Files: written whole or not at all, and locks that end with the process.
5. SQLite: opening, copying, and one writer thread that shares a commit between its callers.

nightcrier.py uses this module for its sections 5 and 6; it imports nothing from there.
"""

from __future__ import annotations

import array
import contextlib
import fcntl
import hashlib
import logging
import os
import queue
import re
import secrets
import threading
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, TypeVar

if TYPE_CHECKING:
    import apsw

T = TypeVar("T")

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


class DriverMissing(StoreError):
    """The library of the database cannot be loaded."""

    exit_code = 5


# ============================================================================
# 2. Values
# Times and keys as they are stored: text, whose order is the order of time.
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
    """UUIDv7 (RFC 9562 section 5.7) that only grow within a process.

    `rand_a` holds the fraction of the millisecond (section 6.2, method 3); where the clock stands
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


def _schema_folder(dialect: str) -> Traversable:
    """`schema/<dialect>` of a checkout or the .pyz, or `nightcrier_schema` of an installation."""
    here = Path(__file__).resolve().parent
    if here.is_file():  # __file__ is nightcrier.pyz/nightcrier.py
        return zipfile.Path(here, f"schema/{dialect}/")
    checkout = here / "schema" / dialect
    return checkout if checkout.is_dir() else here / "nightcrier_schema" / dialect


def load_migrations(dialect: str) -> list[Migration]:
    """Every migration that this program knows, in order; an empty list would be a broken build."""
    texts: dict[tuple[int, str], dict[str, str]] = {}
    folder = _schema_folder(dialect)
    for file in folder.iterdir() if folder.is_dir() else ():
        if found := _MIGRATION_FILE.fullmatch(file.name):
            version, name, way = found.groups()
            texts.setdefault((int(version), name), {})[way] = file.read_text(encoding="utf-8")
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
# 5. SQLite
# Every failure of the library becomes an error that says what to do.
# ============================================================================


Row = Mapping[str, Any]


class Transaction(Protocol):
    """What queries need of a connection; they run inside begin and commit.

    What works on many rows is a method, because engines do it differently: SQLite has no round
    trips to save and runs a statement for each row, PostgreSQL is sent all rows in one statement.
    The rows of one call have the same fields.
    """

    now: datetime  # the clock that decides: of the database, where that is a server
    # Behind a select: keep the rows from changing until the end of the transaction; and the same,
    # without those that another transaction has locked.
    lock_rows: str
    lock_free_rows: str

    def run(self, sql: str, **params: Any) -> list[tuple[Any, ...]]: ...

    def insert(self, table: str, rows: Sequence[Row], on_conflict: str = "") -> int:
        """Insert rows; returns how many were inserted or, by `on_conflict`, changed."""
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


def insert_statement(table: str, fields: Sequence[str]) -> str:
    return (
        f"insert into {table} ({', '.join(fields)}) "
        f"values ({', '.join(f':{name}' for name in fields)})"
    )


class SQLiteTransaction:
    """Adapts an apsw connection to what queries need."""

    lock_rows = ""  # there is one writer at a time
    lock_free_rows = ""

    def __init__(self, connection: apsw.Connection) -> None:
        self._connection = connection
        self.now = utc_now()

    def run(self, sql: str, **params: Any) -> list[tuple[Any, ...]]:
        return self._connection.execute(sql, params).fetchall()

    def insert(self, table: str, rows: Sequence[Row], on_conflict: str = "") -> int:
        if not rows:
            return 0
        before = self._connection.total_changes()
        statement = f"{insert_statement(table, list(rows[0]))} {on_conflict}"
        self._connection.executemany(statement, rows)
        return self._connection.total_changes() - before

    def update(self, table: str, key: str, rows: Sequence[Row]) -> None:
        if rows:
            changes = ", ".join(f"{name} = :{name}" for name in rows[0] if name != key)
            statement = f"update {table} set {changes} where {key} = :{key}"
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


def connect_sqlite(path: Path) -> apsw.Connection:
    """Open a database file, make it if it is missing (mode 0640, in directories of mode 0750)."""
    try:
        import apsw
    except ImportError as error:
        raise DriverMissing(f"the package apsw cannot be loaded: {error}") from error
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
