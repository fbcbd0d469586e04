"""Several replicas on one PostgreSQL server, as separate processes."""

from __future__ import annotations

import secrets
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

import sql_database
from postgres_servers import PostgresServer
from replicas import Deployment, Weather, storm
from running_program import eventually


def test_nobody_notices_when_replicas_and_the_server_die(
    own_postgres: PostgresServer, tmp_path: Path
) -> None:
    weather = Weather(faults=100, pause=0.05, between_ends=0.8, ends=2, restarts=1, lease=3.0)
    damage = storm(
        own_postgres, tmp_path, weather, replicas=3, clusters=12, seed=secrets.randbits(32)
    )
    assert damage.ends["SIGKILL"] + damage.ends["SIGTERM"] >= 2
    assert damage.ends["server"] == 1


@pytest.mark.slow
def test_nobody_notices_a_longer_storm(own_postgres: PostgresServer, tmp_path: Path) -> None:
    weather = Weather(faults=1000, pause=0.04, between_ends=2.0, restarts=2, lease=4.0)
    damage = storm(
        own_postgres, tmp_path, weather, replicas=4, clusters=50, seed=secrets.randbits(32)
    )
    assert damage.ends["server"] == 2


def test_ten_replicas_that_start_at_once_on_an_empty_database_all_come_up(
    own_postgres: PostgresServer, tmp_path: Path
) -> None:
    with Deployment(own_postgres, tmp_path, replicas=10, clusters=1, lease=60.0) as deployment:
        for replica in deployment.replicas:
            replica.start()
        workers = {replica.worker_id for replica in deployment.replicas}
        for replica in deployment.replicas:
            assert replica.program.get("/healthz")[0] == 200
        deployment.clusters.await_watch()
        applied = sorted(
            (entry["migration"], replica.program.process.pid)
            for replica in deployment.replicas
            for entry in replica.program.log()
            if entry["message"] == "migration applied"
        )
        rows = own_postgres.run(
            "select version, name, applied_by from schema_migrations order by version"
        )
        assert [migration for migration, _ in applied] == [
            f"{version:04d}_{name}" for version, name, _ in rows
        ]
        known = [m.version for m in sql_database.load_migrations("postgres")]
        assert [version for version, _, _ in rows] == known
        for (_, pid), (_, _, applied_by) in zip(applied, rows, strict=True):
            assert str(pid) in applied_by, "the one that says so has done it"
        eventually(
            lambda: {row[0] for row in own_postgres.run("select worker_id from workers")} == workers
        )
        assert deployment.stop() == [0] * 10


@pytest.fixture
def sharing(own_postgres: PostgresServer, tmp_path: Path) -> Iterator[Deployment]:
    """Three replicas that share ten clusters; a lease is longer than any test waits."""
    with Deployment(own_postgres, tmp_path, replicas=3, clusters=10, lease=600.0) as deployment:
        yield deployment


def test_clusters_are_shared_evenly_also_when_replicas_come_and_go(sharing: Deployment) -> None:
    first, *others = sharing.replicas
    first.start()
    eventually(lambda: sharing.shares() == {first.key: 10})
    for replica in others:
        replica.start()
    sharing.await_shares()
    assert sorted(sharing.shares().values()) == [3, 3, 4]
    # In peace: the others have its clusters at once, not after the ten minutes of its lease.
    assert first.end(signal.SIGTERM) == 0
    eventually(lambda: set(sharing.shares().values()) == {5})
    assert sharing.watched_twice() == []
    assert sharing.stop()[1:] == [0, 0]


def test_a_killed_replica_that_comes_back_has_its_clusters_at_once(sharing: Deployment) -> None:
    """Its spool tells it who it was: nobody waits for the end of that one's lease."""
    sharing.start()
    victim = sharing.replicas[0]
    victim.end(signal.SIGKILL)
    victim.start()
    sharing.await_shares()
    assert victim.key in sharing.shares()
    assert sharing.watched_twice() == []


def test_the_clusters_of_a_killed_replica_are_taken_over_when_its_lease_ends(
    own_postgres: PostgresServer, tmp_path: Path
) -> None:
    with Deployment(own_postgres, tmp_path, replicas=2, clusters=4, lease=2.0) as deployment:
        deployment.start()
        deployment.await_records()
        survivor, victim = deployment.replicas
        theirs = {
            name
            for name, fake in deployment.clusters.fakes.items()
            if deployment.clusters.do(fake.watchers) == [victim.key]
        }
        victim.end(signal.SIGKILL)
        (killed_at,) = own_postgres.run("select now()")[0]
        eventually(lambda: deployment.shares() == {survivor.key: 4})
        assert deployment.watched_twice() == []
        turns = """
            select w.cluster, earlier.updated_at + interval '2 seconds' <= w.connected_at
            from cluster_watches w join cluster_watches earlier using (cluster)
            where w.owner = :survivor and earlier.owner = :victim
              and earlier.lease_epoch + 1 = w.lease_epoch and w.connected_at > :killed_at"""
        names = {"survivor": survivor.worker_id, "victim": victim.worker_id}
        names["killed_at"] = killed_at
        eventually(lambda: len(own_postgres.run(turns, **names)) == len(theirs))
        taken = dict(own_postgres.run(turns, **names))
        assert taken == dict.fromkeys(theirs, True), "not before the lease had ended"
        gaps = """select cluster from cluster_gaps
                  where lost_at <= :killed_at and restored_at > :killed_at"""
        eventually(
            lambda: {row[0] for row in own_postgres.run(gaps, killed_at=killed_at)} == theirs,
            "the time between is recorded",
        )


def test_a_lease_that_a_replica_did_not_hear_of_is_watched_all_the_same(
    own_postgres: PostgresServer, tmp_path: Path
) -> None:
    """The connection may be lost while the database commits that it was taken."""
    with Deployment(own_postgres, tmp_path, replicas=1, clusters=2, lease=600.0) as deployment:
        (replica,) = deployment.replicas
        deployment.start()
        own_postgres.run(
            """insert into workers (worker_id, host, pid, version, role, state, started_at,
                                    heartbeat_at)
               values ('other', 'far', 1, '0', 'ingest', 'running', now(), now())"""
        )
        eventually(lambda: deployment.shares() == {replica.key: 1}, "half is given to the other")
        own_postgres.run(
            "update clusters set owner = 'other', lease_epoch = 7, "
            "lease_expires_at = now() + interval '1 hour' where owner is null"
        )
        own_postgres.run(
            "with gone as (update workers set state = 'stopped' where worker_id = 'other') "
            "update clusters set owner = :me where owner = 'other'",
            me=replica.worker_id,
        )
        eventually(lambda: deployment.shares() == {replica.key: 2})
