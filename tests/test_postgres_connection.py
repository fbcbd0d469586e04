"""Where a PostgreSQL is, how to log in there, and what its errors mean."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import pwd
import re
import socket
import struct
import threading
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pg8000.core
import pg8000.exceptions
import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

import sql_database
from postgres_servers import (
    TRUST,
    Authority,
    Certificate,
    DebianPostgres,
    PostgresServer,
    a_postgres,
    free_port,
    pgbouncer,
)
from sql_database import (
    ConnectionStringError,
    PostgresConnection,
    PostgresSettings,
    RowRefused,
    StoreError,
    StoreUnavailable,
    connect_postgres,
    parse_dsn,
    postgres_error,
)

ME = pwd.getpwuid(os.geteuid()).pw_name


def parsed(text: str, **environment: str) -> PostgresSettings:
    """Without the ~/.pgpass of whoever runs the tests."""
    return parse_dsn(text, {"HOME": "/nonexistent", **environment})


def mistake(text: str, **environment: str) -> str:
    with pytest.raises(ConnectionStringError) as caught:
        parsed(text, **environment)
    assert caught.value.exit_code == 2
    return str(caught.value)


# --- The URL ---


def test_a_url_names_everything() -> None:
    found = parsed("postgresql://night:s3cret@db.example:5433/incidents?connect_timeout=9")

    assert found.hosts == (("db.example", 5433),)
    assert (found.user, found.password, found.database) == ("night", "s3cret", "incidents")
    assert found.connect_timeout == 9


def test_the_scheme_postgres_means_the_same_and_blanks_around_the_url_do_not_count() -> None:
    assert parsed(" postgres://u@h/d\n") == parsed("postgresql://u@h/d")


@pytest.mark.parametrize(
    ("hosts", "expected"),
    [
        ("h", [("h", 5432)]),
        ("h1:5432,h2:5433", [("h1", 5432), ("h2", 5433)]),
        ("h1,h2:5433", [("h1", 5432), ("h2", 5433)]),
        ("127.0.0.1:1", [("127.0.0.1", 1)]),
        ("[::1]", [("::1", 5432)]),
        ("[fe80::1%25eth0]:5433,h", [("fe80::1%eth0", 5433), ("h", 5432)]),
        ("%2Fvar%2Frun%2Fdb:6000", [("/var/run/db", 6000)]),
        ("b%C3%BCro.example", [("büro.example", 5432)]),
    ],
)
def test_a_url_may_name_several_hosts_addresses_and_sockets(
    hosts: str, expected: list[tuple[str, int]]
) -> None:
    assert list(parsed(f"postgresql://u@{hosts}/d").hosts) == expected


def test_everything_may_be_a_parameter_and_a_parameter_wins() -> None:
    found = parsed(
        "postgresql://other:word@h/d?host=/var/run/x,h2&port=1,2&user=u&password=p%26w&dbname=b"
    )
    assert found.hosts == (("/var/run/x", 1), ("h2", 2))
    assert (found.user, found.password, found.database) == ("u", "p&w", "b")


def test_one_port_serves_all_hosts() -> None:
    assert parsed("postgresql://u@/d?host=a,b&port=7").hosts == (("a", 7), ("b", 7))


def test_what_the_url_leaves_out_comes_from_the_variables() -> None:
    variables = {
        "PGHOST": "h1,h2",
        "PGPORT": "1,2",
        "PGUSER": "u",
        "PGPASSWORD": "p",
        "PGDATABASE": "d",
        "PGSSLMODE": "disable",
        "PGOPTIONS": "-c search_path=night",
        "PGCONNECT_TIMEOUT": "3",
        "PGTARGETSESSIONATTRS": "primary",
    }
    assert parsed("postgresql://", **variables) == PostgresSettings(
        hosts=(("h1", 1), ("h2", 2)),
        user="u",
        password="p",
        database="d",
        sslmode="disable",
        settings={"search_path": "night"},
        connect_timeout=3,
        target_session_attrs="primary",
    )
    assert parsed("postgresql://v@h/e", **{**variables, "PGPORT": "3"}).hosts == (("h", 3),)


def test_the_rest_is_what_libpq_takes() -> None:
    found = parsed("postgresql://h", PGPASSWORD="", PGSSLMODE="")

    assert (found.user, found.database, found.password) == (ME, ME, None)
    assert (found.sslmode, found.target_session_attrs) == ("prefer", "read-write")
    assert parsed("postgresql://u@h").database == "u"


def test_without_a_host_a_socket_is_taken_where_there_is_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sql_database, "_SOCKET_FOLDERS", (str(tmp_path),))

    assert parsed("postgresql:///d").hosts == (("localhost", 5432),)
    (tmp_path / ".s.PGSQL.5432").touch()
    assert parsed("postgresql:///d").hosts == ((str(tmp_path), 5432),)
    assert parsed("postgresql://:5433/d").hosts == (("localhost", 5433),)


@pytest.mark.parametrize(
    ("options", "settings"),
    [
        ("-c search_path=night,public", {"search_path": "night,public"}),
        ("-csearch_path=night", {"search_path": "night"}),
        ("--search-path=night", {"search_path": "night"}),
        ("-c a=1 --b=2  -cnight.c=3", {"a": "1", "b": "2", "night.c": "3"}),
        ("-c a=two\\ words\\\\", {"a": "two words\\"}),
        ("-c Work_Mem=1 -c work_mem=2", {"work_mem": "2"}),
        ("-c a=", {"a": ""}),
        ("", {}),
    ],
)
def test_options_are_settings_of_the_server(options: str, settings: dict[str, str]) -> None:
    assert parsed(f"postgresql://u@h/d?options={quote(options)}").settings == settings


@pytest.mark.parametrize("options", ["-d 5", "search_path=x", "-c", "-c a", "-c 1a=2", "-c 'a'=1"])
def test_options_that_are_no_settings_are_refused(options: str) -> None:
    assert "-c name=value" in mistake(f"postgresql://u@h/d?options={quote(options)}")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("mysql://u@h/d", "write it as a URL, postgresql://"),
        ("", "write it as a URL, postgresql://"),
        ("host=h dbname=d", "keyword=value strings are not read"),
        ("postgresql://u@h:x/d", "port (or PGPORT) must be a number from 1 to 65535"),
        ("postgresql://u@h:0/d", "from 1 to 65535"),
        ("postgresql://u@h:65536/d", "from 1 to 65535"),
        ("postgresql://u@h:٣/d", "from 1 to 65535"),
        ("postgresql://u@::1/d", "an IPv6 address needs brackets"),
        ("postgresql://u@[::1/d", "an IPv6 address is written [::1]:5432"),
        ("postgresql://u@[::1]5432/d", "an IPv6 address is written [::1]:5432"),
        ("postgresql://u@a b/d", "host (or PGHOST) must be a host name"),
        ("postgresql://u@a..b/d", "host (or PGHOST) must be a host name"),
        ("postgresql://u@h/d?host=a,b&port=1,2,3", "there are 2 hosts and 3 ports"),
        ("postgresql://u@h/d?ssl_mode=require", "did you mean sslmode?"),
        ("postgresql://u@h/d?quux=1", "parameter 1 behind the ? is unknown: there are host, port"),
        ("postgresql://u@h/d?sslmode", "parameter 1 behind the ? has no value"),
        ("postgresql://u@h/d?service=x", "service is not offered: leave it out"),
        ("postgresql://u@h/d?sslmode=verify_full", "one of disable, prefer, require, verify-ca"),
        ("postgresql://u@h/d?sslmode=allow", "use prefer"),
        ("postgresql://u@h/d?sslmode=verify-full", "sslrootcert (or PGSSLROOTCERT) is missing"),
        ("postgresql://u@h/d?sslmode=require&sslrootcert=system", "must be verify-full"),
        ("postgresql://u@h/d?sslrootcert=/no/ca.crt", "/no/ca.crt cannot be read: No such file"),
        ("postgresql://u@h/d?sslcert=/no/c.crt", "give both, or neither"),
        ("postgresql://u@h/d?connect_timeout=0", "must be seconds, from 1 to 600"),
        ("postgresql://u@h/d?connect_timeout=soon", "must be seconds, from 1 to 600"),
        ("postgresql://u@h/d?target_session_attrs=standby", "one of any, read-write, primary"),
        ("postgresql://u@h/50%", "must be written %25"),
        ("postgresql://u@h/%ff", "must be UTF-8"),
        ("postgresql://u@h/a%00b", "dbname (or PGDATABASE) holds a NUL"),
        ("postgresql://u:p@ss@h/d", "@ is %40"),
        ("postgresql://u:p/ss@h/d", "/ is %2F"),
    ],
)
def test_a_mistake_is_named_with_what_to_write_instead(text: str, says: str) -> None:
    assert says in mistake(text)


def test_a_service_file_and_unreadable_variables_are_refused() -> None:
    assert "unset it" in mistake("postgresql://u@h/d", PGSERVICE="night")
    assert "PGUSER" in mistake("postgresql://h/d", PGUSER="caf\udce9")
    assert "PGSSLMODE" in mistake("postgresql://h/d", PGSSLMODE="on")


def test_a_key_that_others_can_read_is_refused(tmp_path: Path) -> None:
    key = tmp_path / "client.key"
    key.write_text("key")
    dsn = f"postgresql://u@h/d?sslcert={key}&sslkey={key}"

    key.chmod(0o604)
    assert "can be read by others: chmod 600 it" in mistake(dsn)
    assert parsed(f"{dsn}&sslmode=disable").sslkey is None
    key.chmod(0o600)
    assert parsed(dsn).sslkey == str(key)


def test_require_with_a_root_certificate_verifies_as_libpq_does(tmp_path: Path) -> None:
    (tmp_path / "ca.crt").write_text("ca")
    dsn = f"postgresql://u@h/d?sslrootcert={tmp_path}/ca.crt"

    assert parsed(f"{dsn}&sslmode=require").sslmode == "verify-ca"
    assert parsed(f"{dsn}&ssl=true").sslmode == "verify-ca"
    assert parsed("postgresql://u@h/d?sslrootcert=system").sslmode == "verify-full"


def test_parameters_without_effect_are_said_to_be_so(caplog: pytest.LogCaptureFixture) -> None:
    assert parsed("postgresql://u@h/d?application_name=x") == parsed("postgresql://u@h/d")
    assert [record.getMessage() for record in caplog.records] == [
        "parameter of the DSN has no effect"
    ]


# --- What is shown of it ---


def test_settings_show_neither_password_nor_parameters() -> None:
    found = parsed("postgresql://u:s3cret@h,[::1]:5433,%2Ftmp/d%20b?options=-c%20app.key=s3cret")

    assert str(found) == "postgresql://u@h:5432,[::1]:5433,%2Ftmp:5432/d%20b"
    assert "s3cret" not in repr(found)
    assert parsed(str(found)).hosts == found.hosts


SPECIAL = st.sampled_from([*"@:/?#[]%&=+,; \\'\"~$", "%40", "%zz", "://", "ü", "\n"])
PASSWORDS = st.lists(st.sampled_from(["Qz7", "xK9", "Wv3"]) | SPECIAL, min_size=2, max_size=8)
TAILS = ["", ":5432", ":x", "/d", "/d?sslmode=nope", "/d?quux=1", "?port=0", "/d?options=-x", ",["]


@given(PASSWORDS, st.sampled_from(TAILS), st.booleans(), st.booleans())
@example(["Qz7", "/", "xK9"], "/d", False, False)
@example(["Qz7", "@", "xK9", "/"], "/d", False, False)
@example(["5432,", "Qz7", "/"], "/d", False, False)
@example(["Qz7", "&", "xK9", "="], "", True, False)
def test_no_mistake_and_nothing_shown_repeats_a_piece_of_the_password(
    pieces: list[str], tail: str, as_parameter: bool, encoded: bool
) -> None:
    """However the password is written: also where it breaks the URL into other pieces."""
    password = quote("".join(pieces), safe="") if encoded else "".join(pieces)
    if as_parameter:
        text = f"postgresql://u@h{tail}{'&' if '?' in tail else '?'}password={password}"
    else:
        text = f"postgresql://u:{password}@h{tail}"
    try:
        found = parsed(text)
        shown = f"{found} {found!r}"
    except ConnectionStringError as error:
        shown = "".join(traceback.format_exception(error)).partition("ConnectionStringError: ")[2]
    assert shown
    assert not re.search("Qz7|xK9|Wv3", shown)


@given(st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1))
def test_a_percent_encoded_password_is_read_back(password: str) -> None:
    assert parsed(f"postgresql://u:{quote(password, safe='')}@h/d").password == password


# --- The password file ---


@pytest.fixture
def passfile(tmp_path: Path) -> Callable[..., str | None]:
    def find(content: str, dsn: str = "postgresql://night@db/incidents", mode: int = 0o600) -> Any:
        file = tmp_path / ".pgpass"
        file.write_text(content)
        file.chmod(mode)
        return parse_dsn(dsn, {"HOME": str(tmp_path)}).password

    return find


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("db:5432:incidents:night:word\n", "word"),
        ("# a comment\n\ndb:5432:incidents:night:word", "word"),
        ("*:*:*:*:word\n", "word"),
        ("other:*:*:*:no\ndb:5433:*:*:no\n*:*:*:night:word\n*:*:*:*:late\n", "word"),
        (r"db:*:*:*:w\:o\\rd" + "\n", r"w:o\rd"),
        ("db:*:*:*:word:rest\n", "word"),
        ("db:*:*:*:word\r\n", "word"),
        ("db:*:*\nshort\n", None),
        (r"db:*:*:\*:no" + "\n", None),
        ("db:*:*:*:\n", None),
        ("", None),
    ],
)
def test_the_first_line_of_the_password_file_that_fits_has_the_password(
    passfile: Callable[..., str | None], content: str, expected: str | None
) -> None:
    assert passfile(content) == expected


FIELDS = st.text(st.sampled_from("ab:\\*# "), min_size=1, max_size=6)


@given(FIELDS, FIELDS, FIELDS)
def test_any_name_and_password_can_be_escaped_in_the_password_file(
    tmp_path_factory: pytest.TempPathFactory, database: str, user: str, password: str
) -> None:
    assume("*" not in (database, user))
    file = tmp_path_factory.getbasetemp() / "pgpass"
    escaped = [re.sub(r"([:\\])", r"\\\1", text) for text in (database, user, password)]
    file.write_text(":".join(["db", "5432", *escaped]) + "\n")
    file.chmod(0o600)

    dsn = f"postgresql://{quote(user, safe='')}@db/{quote(database, safe='')}"
    assert parse_dsn(dsn, {"PGPASSFILE": str(file)}).password == password


def test_a_password_file_knows_the_usual_sockets_as_localhost(
    passfile: Callable[..., str | None],
) -> None:
    line = "localhost:*:*:*:word\n"
    assert passfile(line, "postgresql://u@%2Fvar%2Frun%2Fpostgresql/d") == "word"
    assert passfile(line, "postgresql://u@%2Fother/d") is None
    assert passfile("/other:*:*:*:word\n", "postgresql://u@%2Fother/d") == "word"


def test_a_given_password_comes_before_the_file(passfile: Callable[..., str | None]) -> None:
    assert passfile("*:*:*:*:word\n", "postgresql://u:given@h/d") == "given"


def test_a_password_file_that_others_can_read_is_ignored_with_a_warning(
    passfile: Callable[..., str | None], caplog: pytest.LogCaptureFixture
) -> None:
    assert passfile("*:*:*:*:s3cret\n", mode=0o640) is None
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert "s3cret" not in str(caplog.records[0].__dict__)


def test_the_file_may_be_named(tmp_path: Path) -> None:
    file = tmp_path / "passwords"
    file.write_text("*:*:*:*:word\n")
    file.chmod(0o600)

    assert parsed("postgresql://u@h/d", PGPASSFILE=str(file)).password == "word"
    assert parsed(f"postgresql://u@h/d?passfile={file}").password == "word"
    assert parsed("postgresql://u@h/d", PGPASSFILE=str(tmp_path / "none")).password is None


# --- Logging in ---


@contextlib.contextmanager
def connected(dsn: str, name: str = "test", **environment: str) -> Iterator[PostgresConnection]:
    connection = connect_postgres(parsed(dsn, **environment), name)
    try:
        yield connection
    finally:
        connection.close()


def ask(connection: PostgresConnection, sql: str) -> Any:
    ((value,),) = connection.driver.run(sql)
    return value


def refused(dsn: str, kind: type[StoreError], **environment: str) -> str:
    settings = parsed(dsn, **environment)
    with pytest.raises(StoreError) as caught:
        connect_postgres(settings, "test")
    assert type(caught.value) is kind, caught.value
    return str(caught.value)


def test_a_connection_tells_its_name_and_is_not_pooled(debian_postgres: DebianPostgres) -> None:
    with connected(debian_postgres.dsn(), "ü" * 40) as connection:
        name = ask(connection, "select current_setting('application_name')")
        assert not connection.pooled
        assert connection.where == f"127.0.0.1:{debian_postgres.port}"
    assert not re.sub(r"\\xc3\\xbc|ü|\?", "", name), "whole letters, however the server writes them"


def test_a_connection_does_not_wait_for_full_packets_and_notices_a_dead_peer(
    debian_postgres: DebianPostgres,
) -> None:
    with connected(debian_postgres.dsn()) as connection:
        sock = connection.driver._usock
        assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        if hasattr(socket, "TCP_USER_TIMEOUT"):
            assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 15_000
            assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) == 10
        assert sock.gettimeout() == 60


def test_a_unix_socket_serves_without_tls_whatever_sslmode_says(
    debian_postgres: DebianPostgres,
) -> None:
    folder = str(debian_postgres.folder)
    with connected(debian_postgres.dsn(host=folder, sslmode="require")) as connection:
        assert ask(connection, "select inet_client_addr() is null")
    with connected(
        f"postgresql:///postgres?host={folder}&port={debian_postgres.port}&user=postgres"
    ):
        pass


def test_settings_of_options_hold_for_the_session(debian_postgres: DebianPostgres) -> None:
    options = "-c search_path=night -c statement_timeout=1234"
    with connected(debian_postgres.dsn(options=options)) as connection:
        assert ask(connection, "select current_setting('search_path')") == "night"
        assert ask(connection, "select current_setting('statement_timeout')") == "1234ms"


def test_a_setting_that_the_server_does_not_know_is_an_error(
    debian_postgres: DebianPostgres,
) -> None:
    said = refused(debian_postgres.dsn(options="-c serch_path=x"), StoreError)
    assert "serch_path" in said


def test_a_pooler_is_recognised(debian_postgres: DebianPostgres) -> None:
    with (
        pgbouncer(debian_postgres) as bouncer,
        connected(bouncer.dsn(options="-c search_path=night")) as connection,
    ):
        assert connection.pooled
        assert ask(connection, "select current_setting('search_path')") != "night"


def test_a_host_that_is_down_is_passed_over(debian_postgres: DebianPostgres) -> None:
    dsn = debian_postgres.dsn()
    down = f"127.0.0.1:{free_port()}"
    with connected(dsn.replace("@127", f"@no-such-host.invalid,{down},127")) as connection:
        assert connection.where == f"127.0.0.1:{debian_postgres.port}"


def test_a_standby_is_passed_over_unless_any_server_will_do(
    debian_postgres: DebianPostgres,
) -> None:
    with DebianPostgres(standby=True) as standby:
        both = debian_postgres.dsn().replace("@127", f"@127.0.0.1:{standby.port},127")
        with connected(both) as connection:
            assert connection.where == f"127.0.0.1:{debian_postgres.port}"
        with connected(both + "?target_session_attrs=primary") as connection:
            assert connection.where == f"127.0.0.1:{debian_postgres.port}"
        with connected(both + "?target_session_attrs=any") as connection:
            assert connection.where == f"127.0.0.1:{standby.port}"
        assert "it is read-only" in refused(standby.dsn(), StoreUnavailable)


def test_a_server_that_is_down_may_come_back() -> None:
    port = free_port()
    said = refused(f"postgresql://u:s3cret@127.0.0.1:{port}/d", StoreUnavailable)
    assert said == (
        f"database 127.0.0.1:{port}: nothing listens there: start PostgreSQL, or correct host and "
        "port"
    )
    assert "nothing listens there" in refused("postgresql://u@%2Fnowhere/d", StoreUnavailable)
    said = refused("postgresql://u@no-such-host.invalid/d", StoreUnavailable)
    assert "the host name cannot be resolved" in said


def test_the_reasons_of_all_hosts_are_told_once() -> None:
    first, second = free_port(), free_port()
    said = refused(f"postgresql://u@localhost:{first},127.0.0.1:{second}/d", StoreUnavailable)
    assert said.count("nothing listens there") == 2
    assert f"localhost:{first}" in said
    assert f"127.0.0.1:{second}" in said


def test_a_server_that_is_starting_may_be_asked_again() -> None:
    with DebianPostgres(standby=True, settings={"hot_standby": "off"}) as starting:
        assert "it is starting up" in refused(starting.dsn(), StoreUnavailable)


def test_a_database_that_is_missing_has_to_be_made(debian_postgres: DebianPostgres) -> None:
    said = refused(debian_postgres.dsn(database="nowhere"), StoreError)
    assert "there is no such database: create it" in said
    assert '"nowhere"' in said


def test_too_many_connections_may_become_fewer() -> None:
    settings = {"max_connections": "3", "superuser_reserved_connections": "1"}
    settings |= {"max_wal_senders": "0"}
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(DebianPostgres(settings=settings))
        server.run("create role u login")
        dsn = server.dsn(user="u")
        for _ in range(2):
            stack.enter_context(connected(dsn))
        assert "raise max_connections" in refused(dsn, StoreUnavailable)


@pytest.mark.parametrize("method", ["scram-sha-256", "md5", "password"])
def test_a_password_is_asked_for_and_has_to_be_right(method: str) -> None:
    encryption = "md5" if method == "md5" else "scram-sha-256"
    with DebianPostgres(settings={"password_encryption": encryption}) as server:
        server.run("create role night login password 'r!ght'")
        server.set_hba(f"local all all trust\nhost all all 127.0.0.1/32 {method}\n")

        with connected(server.dsn(user="night", password="r!ght")) as connection:
            assert ask(connection, "select current_user") == "night"
        said = refused(server.dsn(user="night", password="wr0ng"), StoreError)
        assert "the password was not accepted" in said
        assert "wr0ng" not in said
        assert "give one by PGPASSWORD" in refused(server.dsn(user="night"), StoreError)
        with connected(server.dsn(user="night"), PGPASSWORD="r!ght") as connection:
            assert ask(connection, "select current_user") == "night"


def test_a_user_whom_the_server_does_not_let_in_reads_why(
    debian_postgres: DebianPostgres,
) -> None:
    assert '"nobody" does not exist' in refused(debian_postgres.dsn(user="nobody"), StoreError)
    with DebianPostgres(hba="local all all trust\n") as closed:
        said = refused(closed.dsn(), StoreError)
    assert "look at the user and at its pg_hba.conf" in said


# --- TLS ---


@dataclasses.dataclass
class Tls:
    server: DebianPostgres
    authority: Authority
    other: Authority
    client: Certificate

    def dsn(self, host: str = "localhost", **parameters: str) -> str:
        return self.server.dsn(host=host, **parameters)


@pytest.fixture(scope="module")
def tls(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tls]:
    folder = tmp_path_factory.mktemp("certificates")
    authority, other = Authority(folder), Authority(folder, "stranger")
    certificate = authority.issue("server", "DNS:localhost")
    rules = "hostssl all certified 127.0.0.1/32 cert\nhostnossl all secured all reject\n" + TRUST
    with DebianPostgres(tls=certificate, hba=rules) as server:
        server.run("create role certified login")
        server.run("create role secured login password 's3cret'")
        yield Tls(server, authority, other, authority.issue("certified"))


ENCRYPTED = "select ssl from pg_stat_ssl where pid = pg_backend_pid()"


@pytest.mark.parametrize(("mode", "encrypted"), [("disable", False), ("prefer", True)])
def test_prefer_takes_tls_where_it_is_offered_and_disable_does_not(
    tls: Tls, mode: str, encrypted: bool
) -> None:
    with connected(tls.dsn(sslmode=mode)) as connection:
        assert ask(connection, ENCRYPTED) is encrypted


def test_prefer_goes_on_without_tls_where_it_is_not_offered_and_require_does_not(
    debian_postgres: DebianPostgres,
) -> None:
    with connected(debian_postgres.dsn(sslmode="prefer")) as connection:
        assert ask(connection, ENCRYPTED) is False
    said = refused(debian_postgres.dsn(sslmode="require"), StoreError)
    assert "it does not offer TLS, and sslmode is require" in said


def test_require_asks_for_no_certificate_that_is_known(tls: Tls) -> None:
    with connected(tls.dsn("127.0.0.1", sslmode="require")) as connection:
        assert ask(connection, ENCRYPTED) is True


@pytest.mark.parametrize("mode", ["prefer", "require", "verify-ca", "verify-full"])
def test_a_certificate_of_another_authority_is_refused_wherever_an_authority_is_named(
    tls: Tls, mode: str
) -> None:
    root = str(tls.authority.certificate)
    with connected(tls.dsn(sslmode=mode, sslrootcert=root)) as connection:
        assert ask(connection, ENCRYPTED) is True
    root = str(tls.other.certificate)
    said = refused(tls.dsn(sslmode=mode, sslrootcert=root), StoreError)
    assert "its certificate is not accepted" in said


def test_only_verify_full_looks_at_the_name(tls: Tls) -> None:
    root = str(tls.authority.certificate)
    with connected(tls.dsn("127.0.0.1", sslmode="verify-ca", sslrootcert=root)):
        pass
    said = refused(tls.dsn("127.0.0.1", sslmode="verify-full", sslrootcert=root), StoreError)
    assert "its certificate is not accepted (IP address mismatch" in said


def test_the_authorities_of_the_system_do_not_know_ours(tls: Tls) -> None:
    assert "not accepted" in refused(tls.dsn(sslrootcert="system"), StoreError)


def test_a_client_certificate_is_the_login(tls: Tls) -> None:
    dsn = tls.dsn(user="certified")
    assert "valid client certificate" in refused(dsn, StoreError)

    files = {"sslcert": str(tls.client.certificate), "sslkey": str(tls.client.key)}
    for mode in ("prefer", "require"):
        with connected(tls.dsn(user="certified", sslmode=mode, **files)) as connection:
            assert ask(connection, "select current_user") == "certified"


def test_a_password_login_is_bound_to_the_tls_connection(tls: Tls) -> None:
    tls.server.set_hba("local all all trust\nhostssl all all 127.0.0.1/32 scram-sha-256\n")
    with connected(tls.dsn(user="secured", password="s3cret")) as connection:
        assert connection.driver.auth.mechanism_name == "SCRAM-SHA-256-PLUS"
    said = refused(tls.dsn(user="secured", password="s3cret", sslmode="disable"), StoreError)
    assert "no encryption" in said


def test_certificate_files_that_hold_something_else_are_an_error(tls: Tls, tmp_path: Path) -> None:
    wrong = tmp_path / "wrong.pem"
    wrong.write_text("not a certificate")
    wrong.chmod(0o600)
    said = refused(tls.dsn(sslmode="verify-full", sslrootcert=str(wrong)), StoreError)
    assert "cannot be used" in said
    files = {"sslcert": str(tls.client.certificate), "sslkey": str(wrong)}
    assert "must be PEM files" in refused(tls.dsn(**files), StoreError)


# --- Servers that are none ---


@contextlib.contextmanager
def listening(answer: Callable[[socket.socket], object]) -> Iterator[str]:
    """A DSN of something that listens, and does with a client what it is told."""

    def serve(client: socket.socket) -> None:
        with client, contextlib.suppress(OSError):
            answer(client)

    with socket.create_server(("127.0.0.1", 0)) as listener:

        def accept() -> None:
            with contextlib.suppress(OSError):
                while True:
                    serve(listener.accept()[0])

        thread = threading.Thread(target=accept)
        thread.start()
        yield f"postgresql://u:s3cret@127.0.0.1:{listener.getsockname()[1]}/d?sslmode=disable"
        listener.shutdown(socket.SHUT_RDWR)
    thread.join()


def test_a_server_that_is_silent_is_given_up_in_time() -> None:
    over = threading.Event()
    with listening(lambda client: over.wait()) as dsn:
        for given in (dsn, dsn.replace("disable", "prefer")):
            settings = dataclasses.replace(parsed(given), connect_timeout=0.3)
            with pytest.raises(StoreUnavailable, match=r"did not answer within 0\.3 s"):
                connect_postgres(settings, "test")
        over.set()


def test_a_server_that_hangs_up_may_be_asked_again() -> None:
    with listening(lambda client: None) as dsn:
        for given in (dsn, dsn.replace("disable", "prefer")):
            assert "it closed the connection" in refused(given, StoreUnavailable)


@pytest.mark.parametrize(
    "answer", [b"HTTP/1.1 400 Bad Request\r\n\r\n" + b"x" * 2000, b"R\0\0\0\x08\0\0\0\x63"]
)
def test_something_that_is_not_postgresql_is_recognised(answer: bytes) -> None:
    def talk(client: socket.socket) -> None:
        client.recv(1000)
        client.sendall(answer)
        client.shutdown(socket.SHUT_WR)
        client.recv(1000)

    with listening(talk) as dsn, pytest.raises(StoreError) as caught:
        connect_postgres(parsed(dsn), "test")
    assert "s3cret" not in str(caught.value)


def test_an_answer_is_told_even_when_the_server_is_gone_by_then(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """pg8000 then fails to say goodbye, and hides the answer behind that."""
    fields = b"SFATAL\0VFATAL\0C53300\0Mtoo many clients\0\0"

    def talk(client: socket.socket) -> None:
        client.recv(1000)
        client.sendall(b"E" + struct.pack("!i", len(fields) + 4) + fields)
        client.recv(1000)

    really_close = pg8000.core.CoreConnection.close

    def goodbye(connection: pg8000.core.CoreConnection) -> None:
        really_close(connection)
        raise pg8000.exceptions.InterfaceError("network error") from BrokenPipeError()

    monkeypatch.setattr("pg8000.core.CoreConnection.close", goodbye)
    with listening(talk) as dsn:
        assert "too many clients" in refused(dsn, StoreUnavailable)


def test_what_the_caller_handles_is_not_taken_for_the_cause() -> None:
    with listening(lambda client: None) as dsn:
        try:
            raise pg8000.exceptions.DatabaseError({"C": "23505", "M": "duplicate"})
        except pg8000.exceptions.DatabaseError:
            assert "it closed the connection" in refused(dsn, StoreUnavailable)


# --- What errors mean ---


def server_says(state: str, message: str = "something") -> pg8000.exceptions.DatabaseError:
    return pg8000.exceptions.DatabaseError({"C": state, "M": message, "D": "Key (a)=(s3cret)"})


@pytest.mark.parametrize(
    ("state", "kind"),
    [
        *((state, RowRefused) for state in ("23505", "23514", "22001", "22P02", "54000", "54001")),
        *((state, StoreUnavailable) for state in ("53100", "53300", "57P01", "57P02", "57P03")),
        *((state, StoreUnavailable) for state in ("08006", "55P03", "57014", "25006", "25P03")),
        *((state, StoreUnavailable) for state in ("40001", "40P01", "58030")),
        *((state, StoreError) for state in ("42501", "3F000", "42P01", "28P01", "3D000")),
        *((state, StoreError) for state in ("42601", "XX000", "57P04", "25P02", "")),
    ],
)
def test_what_a_state_of_the_server_means(state: str, kind: type[StoreError]) -> None:
    error = postgres_error(server_says(state), "h:5432")

    assert type(error) is kind
    assert str(error).startswith("database h:5432: ")
    assert "something" in str(error)
    assert "s3cret" not in str(error)


def test_a_long_message_of_the_server_is_cut() -> None:
    message = 'invalid input syntax for type uuid: "' + "x" * 5000 + '"'
    said = str(postgres_error(server_says("22P02", message), "h:5432"))

    assert "invalid input syntax for type uuid" in said
    assert len(said) < 300


@pytest.mark.parametrize(
    "error",
    [
        pg8000.exceptions.InterfaceError("network error"),
        pg8000.exceptions.InterfaceError("connection is closed"),
        ConnectionResetError("reset"),
        TimeoutError("timed out"),
        struct.error("unpack requires a buffer of 4 bytes"),
    ],
)
def test_a_connection_that_was_lost_may_be_made_again(error: Exception) -> None:
    found = postgres_error(error, "h:5432")

    assert type(found) is StoreUnavailable
    assert str(found) == "database h:5432: the connection was lost"


def test_a_mistake_of_ours_is_not_taken_for_a_lost_connection() -> None:
    error = pg8000.exceptions.InterfaceError("There's a placeholder 'a' in the query")
    assert type(postgres_error(error, "h:5432")) is StoreError


def test_an_error_that_is_known_stays_as_it_is() -> None:
    known = StoreUnavailable("database h:5432: it is read-only")
    assert postgres_error(known, "h:5432") is known


def test_errors_of_a_real_server_mean_what_they_should(own_postgres: PostgresServer) -> None:
    own_postgres.run("create role night login")
    own_postgres.run("create table rows (n integer primary key, check (n < 10))")
    statements = {
        "insert into rows values (11)": RowRefused,
        "select 'no-uuid'::uuid": RowRefused,
        "set transaction read only; insert into rows values (1)": StoreUnavailable,
        "set statement_timeout = 1; select pg_sleep(10)": StoreUnavailable,
        "select * from nowhere": StoreError,
        "set session authorization night; select * from rows": StoreError,
    }
    for sql, kind in statements.items():
        with connected(own_postgres.dsn()) as connection:
            with pytest.raises(pg8000.exceptions.DatabaseError) as caught:
                connection.driver.run(sql)
            assert type(postgres_error(caught.value, "h:5432")) is kind, sql


def test_a_crash_of_the_server_is_a_lost_connection() -> None:
    with a_postgres() as server, connected(server.dsn()) as connection:
        server.restart("immediate")
        with pytest.raises((pg8000.exceptions.Error, OSError)) as caught:
            connection.driver.run("select 1")
        assert type(postgres_error(caught.value, "h:5432")) is StoreUnavailable
        with connected(server.dsn()) as again:
            assert ask(again, "select 1") == 1
