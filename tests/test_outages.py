"""Replicas as processes, while the server is away or one of them is cut off from it."""

from __future__ import annotations

import contextlib
import signal
import time
from collections import Counter
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from postgres_servers import PostgresServer, Proxy
from replicas import Deployment, broken_laws
from running_program import eventually, processes_with

# Waits for the file that lets it go on.
WAITING = "until [ -e {go} ]; do sleep 0.02; done; cp {report} output/investigation.md"


@contextlib.contextmanager
def a_deployment(
    server: PostgresServer, folder: Path, *, replicas: int, clusters: int, lease: float
) -> Iterator[Deployment]:
    """With agents that wait for `folder/go`."""
    script = WAITING.format(go=folder / "go", report=folder / "report.md")
    (folder / "agent.sh").write_text(script)
    with Deployment(
        server,
        folder,
        replicas=replicas,
        clusters=clusters,
        lease=lease,
        options=["--agent-command", f"sh {folder / 'agent.sh'}"],
    ) as deployment:
        yield deployment


def stored(server: PostgresServer) -> Counter[str]:
    return Counter(name for (name,) in server.run("select resource_name from fault_events"))


def agents(folder: Path) -> list[int]:
    return list(processes_with(f"sh\0{folder / 'agent.sh'}"))


def executions(server: PostgresServer) -> list[Any]:
    return server.run("select attempt, outcome from agent_executions order by attempt")


def test_an_agent_works_on_through_an_outage_that_is_shorter_than_the_lease(
    own_postgres: PostgresServer, tmp_path: Path
) -> None:
    with a_deployment(own_postgres, tmp_path, replicas=1, clusters=1, lease=6.0) as deployment:
        deployment.start()
        (replica,) = deployment.replicas
        deployment.tell("c000", "pod-1")
        eventually(lambda: executions(own_postgres) == [[1, None]])
        (agent,) = agents(tmp_path)
        own_postgres.stop("immediate")
        replica.program.wait_for("leases cannot be renewed")
        own_postgres.start()
        (tmp_path / "go").touch()
        deployment.await_quiet({"pod-1"})
        assert executions(own_postgres) == [[1, "succeeded"]]
        assert "the lease is lost" not in replica.program.err
        assert agent not in agents(tmp_path)
        assert deployment.stop() == [0]
    assert broken_laws(own_postgres) == {}


def test_an_agent_is_stopped_when_its_lease_is_really_lost_and_the_incident_is_run_again(
    own_postgres: PostgresServer, tmp_path: Path
) -> None:
    with a_deployment(own_postgres, tmp_path, replicas=1, clusters=1, lease=2.0) as deployment:
        deployment.start()
        (replica,) = deployment.replicas
        deployment.tell("c000", "pod-1")
        eventually(lambda: executions(own_postgres) == [[1, None]])
        own_postgres.stop("immediate")
        replica.program.wait_for("the lease is lost")
        eventually(lambda: agents(tmp_path) == [])
        own_postgres.start()
        (tmp_path / "go").touch()
        deployment.await_quiet({"pod-1"})
        assert executions(own_postgres) == [[1, "lease_lost"], [2, "succeeded"]]
        assert deployment.stop() == [0]
    assert broken_laws(own_postgres) == {}


def owners(server: PostgresServer) -> list[Any]:
    return server.run("select cluster, owner, lease_epoch from clusters order by cluster")


def test_while_the_server_is_away_nobody_takes_over_and_nothing_is_lost(
    own_postgres: PostgresServer, tmp_path: Path
) -> None:
    (tmp_path / "go").touch()
    with a_deployment(own_postgres, tmp_path, replicas=2, clusters=4, lease=2.0) as deployment:
        deployment.start()
        before, shares = owners(own_postgres), deployment.shares()
        outage = datetime.now(UTC)  # earlier gaps: the first replica up gave clusters to the second
        own_postgres.stop("immediate")
        time.sleep(1.1 * deployment.lease)  # all leases have run out
        told = {f"pod-{number}" for number in range(40)}
        for number, name in enumerate(sorted(told)):
            assert deployment.tell(f"c{number % 4:03}", name)
        eventually(lambda: sum(replica.spooled() for replica in deployment.replicas) == 40)
        for replica in deployment.replicas:
            status, reasons = replica.program.get("/readyz")
            assert status == 503
            assert "events wait in the spool" in reasons
        own_postgres.start()
        deployment.await_quiet(told)
        assert stored(own_postgres) == Counter(told)
        assert owners(own_postgres) == before
        assert deployment.shares() == shares
        assert deployment.watched_twice() == []
        gaps = own_postgres.run("select cluster, lost_at from cluster_gaps")
        assert [gap for gap in gaps if gap[1] >= outage] == []
        assert deployment.stop() == [0, 0]
    assert broken_laws(own_postgres) == {}


def test_what_was_in_the_spool_of_a_killed_replica_is_stored_once(
    own_postgres: PostgresServer, tmp_path: Path
) -> None:
    (tmp_path / "go").touch()
    with a_deployment(own_postgres, tmp_path, replicas=1, clusters=1, lease=60.0) as deployment:
        deployment.start()
        (replica,) = deployment.replicas
        own_postgres.stop("immediate")
        told = {f"pod-{number}" for number in range(20)}
        for name in told:
            assert deployment.tell("c000", name)
        eventually(lambda: replica.spooled() == 20)
        replica.end(signal.SIGKILL)
        own_postgres.start()
        replica.start()
        deployment.await_quiet(told)
        assert stored(own_postgres) == Counter(told)
        deployment.await_shares()  # at once, and not after the minute of the old lease
        assert deployment.stop() == [0]
    assert broken_laws(own_postgres) == {}


@pytest.fixture
def proxy(own_postgres: PostgresServer) -> Iterator[Proxy]:
    proxy = Proxy(own_postgres.port)
    yield proxy
    proxy.close()


def test_what_two_replicas_received_while_one_was_cut_off_is_stored_once(
    own_postgres: PostgresServer, proxy: Proxy, tmp_path: Path
) -> None:
    (tmp_path / "go").touch()
    with a_deployment(own_postgres, tmp_path, replicas=2, clusters=4, lease=2.0) as deployment:
        cut_off, other = deployment.replicas
        through = own_postgres.dsn().replace(str(own_postgres.port), str(proxy.port))
        cut_off._options = [*cut_off._options, "--postgres-dsn", through]
        deployment.start()
        clusters = list(deployment.clusters.fakes)
        proxy.down()
        told: set[str] = set()

        def tell(what: str) -> Counter[int]:
            """A fault in each cluster; how many processes each was written to."""
            told.update(f"{what}-{cluster}" for cluster in clusters)
            return Counter(len(deployment.tell(c, f"{what}-{c}")) for c in clusters)

        assert tell("before") == {1: 4}
        # The other takes over, and the one that is cut off watches on.
        eventually(lambda: deployment.shares() == {cut_off.key: 2, other.key: 4}, "a takeover")
        assert tell("meanwhile") == {1: 2, 2: 2}
        eventually(lambda: cut_off.spooled() == 4)
        proxy.up()
        cut_off.program.wait_for("other replicas have taken over")
        deployment.await_quiet(told)
        deployment.await_shares()
        assert tell("after") == {1: 4}
        deployment.await_quiet(told)
        assert stored(own_postgres) == Counter(told)
        said = own_postgres.run(
            "select cluster from cluster_gaps where reason like '% are left out: %'"
        )
        assert len(said) == 2
        still_open = "select * from cluster_gaps where restored_at is null"
        eventually(lambda: own_postgres.run(still_open) == [], "every gap has its end")
        assert deployment.stop() == [0, 0]
    assert broken_laws(own_postgres) == {}
