"""Replicas as separate processes on one PostgreSQL server, and a storm that nobody may notice.

Each process is given an API key of its own: by it the simulated clusters know who watches them.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import json
import random
import signal
import sqlite3
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self

from fake_mcp import FakeMCP, a_fault
from laws import POSTGRES_LAWS
from mcp_client import HTTPRequest, HTTPResponder, SimulatedSession
from postgres_servers import PostgresServer
from running_program import Clusters, Program, an_agent, children, eventually

REPORT = "# Report\n\n## Root Cause\n\nThe disk is full. Confidence: HIGH\n\n" + "x" * 100
# What was read from a stream is durable after that many seconds, on a machine that has no time.
UNTIL_DURABLE = 1.0


class WatchedCluster(FakeMCP):
    """A cluster that knows which process watches it, and when there were two."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.opened_by: dict[str, str] = {}  # session: key of the process that opened its stream
        self.watches: list[tuple[float, str]] = []  # when whose watch began
        self.watched_twice: list[str] = []

    def watchers(self) -> list[str]:
        """To whom a fault would be written now."""
        return [
            self.opened_by[session.session_id]
            for session in self.sessions.values()
            if session.stream is not None
            and not session.stream.transport.is_closing()
            and session.wants_logs
            and "faults" in session.sending.values()
        ]

    def _look(self) -> None:
        watchers = self.watchers()
        if len(watchers) > 1:
            self.watched_twice.append(f"{self.name} by {' and '.join(watchers)}")
        if watchers and (not self.watches or self.watches[-1][1] != watchers[-1]):
            self.watches.append((time.monotonic(), watchers[-1]))

    async def handle_get(self, request: HTTPRequest, respond: HTTPResponder) -> None:
        session_id = request.headers.get("mcp-session-id", "")
        self.opened_by[session_id] = request.headers["authorization"].removeprefix("Bearer ")
        # Once the stream is the session's; this call lasts as long as the stream.
        asyncio.get_running_loop().call_soon(self._look)
        await super().handle_get(request, respond)

    async def reply(
        self, session: SimulatedSession, method: str, params: Mapping[str, object]
    ) -> dict[str, Any]:
        reply = await super().reply(session, method, params)
        self._look()
        return reply

    def tell(self, name: str) -> list[str]:
        """Let a fault happen; the keys of the processes to whose streams it was written."""
        self._look()
        watchers = self.watchers()
        self.emit(a_fault(name))
        return watchers


@dataclass(frozen=True, slots=True, kw_only=True)
class Told:
    """A fault that was written to the stream of a process."""

    name: str
    cluster: str
    key: str
    at: float
    moment: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class End:
    """How and when a process ended: from the signal until it was gone."""

    how: signal.Signals
    asked: float
    gone: float
    code: int


class Replica:
    """One of several, on a host of its own as far as it knows; killed and started again."""

    def __init__(self, name: str, folder: Path, clusters: Clusters, options: Sequence[str]) -> None:
        self.name = name
        self.folder = folder / name
        self.folder.mkdir()
        self._clusters = clusters
        self._options = options
        self.program: Program
        self.ends: dict[str, End] = {}
        self.key = ""

    def start(self) -> None:
        self.key = f"key-of-{self.name}-{len(self.ends) + 1}"
        listed = [
            {"name": name, "mcp": {"endpoint": f"{self._clusters.url}/{name}/mcp"}}
            for name in self._clusters.fakes
        ]
        for cluster in listed:
            cluster["mcp"]["api_key"] = self.key  # type: ignore[index]
        (self.folder / "config.yaml").write_text(json.dumps({"clusters": listed}))
        self.program = Program("run", *self._options, cwd=self.folder)

    def end(self, how: signal.Signals) -> int:
        asked = time.monotonic()
        self.program.signal(how)
        code = self.program.ends()
        self.ends[self.key] = End(how=how, asked=asked, gone=time.monotonic(), code=code)
        return code

    def is_up(self) -> bool:
        """Whether it has come up; one that found the server away has ended, and is started again.

        That is what a service manager does.
        """
        code = self.program.process.poll()
        if code is not None:
            assert self.program.ends() == 4, self.program.err[-20:]
            self.start()
        return self.has_started()

    def has_started(self) -> bool:
        return any(" started" in line for line in self.program.err)

    def works(self) -> bool:
        """Whether its worker has begun: it is the one with a supervisor."""
        return any(True for _ in children(self.program.process.pid))

    @property
    def worker_id(self) -> str:
        return str(json.loads(self.program.wait_for(" started"))["worker_id"])

    def spooled(self) -> int:
        """Events that wait in its spool."""
        count = 0
        for path in self.folder.glob("nightcrier-spool/spool-*.db"):
            with contextlib.closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as spool:
                count += spool.execute("select count(*) from fault_events").fetchone()[0]
        return count


class Deployment:
    """Replicas, the clusters that they share, and their database; all of it ends with `with`."""

    def __init__(
        self,
        server: PostgresServer,
        folder: Path,
        *,
        replicas: int,
        clusters: int,
        lease: float,
        options: Sequence[str] = (),
    ) -> None:
        self.server = server
        self.lease = lease
        self.clusters = Clusters(*(f"c{n:03}" for n in range(clusters)), kind=WatchedCluster)
        (folder / "report.md").write_text(REPORT)
        given = ["--postgres-dsn", server.dsn(), "--lease-duration", str(lease)]
        given += [
            "--shutdown-timeout",
            "2",
            "--agent-cli",
            "command",
            "--health-listen",
            "127.0.0.1:0",
        ]
        # Some are at once, some are at work when their replica is killed.
        work = f"sleep 0.$(($$ % 5)); cp {folder / 'report.md'} output/investigation.md"
        given += ["--agent-command", an_agent(work)]
        self._options = [*given, *options]
        self._folder = folder
        self.replicas = [
            Replica(f"r{number}", folder, self.clusters, self._options)
            for number in range(1, replicas + 1)
        ]

    def start(self) -> None:
        """Start all of them, and wait until they watch everything in equal shares, and work.

        Before, one that loses the server ends.
        """
        for replica in self.replicas:
            replica.start()
        self.await_shares()
        for replica in self.replicas:
            eventually(replica.works, f"{replica.name} at work")

    def await_records(self) -> None:
        """Until the database knows of all watches: the end of another one leaves no gap."""
        active = "select count(*) from clusters where connection_state = 'active'"
        eventually(lambda: self.server.run(active) == [[len(self.clusters.fakes)]], "all active")

    def await_shares(self) -> None:
        count, rest = divmod(len(self.clusters.fakes), len(self.replicas))
        shares = [count] * (len(self.replicas) - rest) + [count + 1] * rest
        eventually(lambda: sorted(self.shares().values()) == shares, f"shares {shares}", 120.0)

    def shares(self) -> dict[str, int]:
        """How many clusters each process watches, as the clusters see it."""
        fakes = list(self.clusters.fakes.values())
        found = self.clusters.do(lambda: [key for fake in fakes for key in fake.watchers()])
        return dict(collections.Counter(found))

    def tell(self, cluster: str, name: str) -> list[Told]:
        fake = self.clusters.fakes[cluster]
        at, moment = time.monotonic(), datetime.now(UTC)
        keys = self.clusters.do(lambda: fake.tell(name))
        return [Told(name=name, cluster=cluster, key=key, at=at, moment=moment) for key in keys]

    def watched_twice(self) -> list[str]:
        return [said for fake in self.clusters.fakes.values() for said in fake.watched_twice]

    def await_quiet(self, last: set[str]) -> None:
        """Until what was told last is stored, all is investigated, and nothing waits in a spool."""

        def quiet() -> bool:
            found = dict(self.server.run("select resource_name, status from incidents"))
            if not last <= found.keys() or {"PENDING", "RUNNING"} & set(found.values()):
                return False
            return not any(replica.spooled() for replica in self.replicas)

        eventually(quiet, "quiet", 600.0)

    def stop(self) -> list[int]:
        """Stop all in peace; their exit codes."""
        return [replica.end(signal.SIGTERM) for replica in self.replicas]

    def __enter__(self) -> Self:
        self.clusters.__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        for replica in self.replicas:
            if hasattr(replica, "program"):
                replica.program.__exit__(*exception)
        self.clusters.__exit__(*exception)


@dataclass(frozen=True, slots=True, kw_only=True)
class Weather:
    """How a storm blows."""

    faults: int
    pause: float  # seconds between two faults, in the mean
    between_ends: float  # seconds between two ends of replicas, in the mean
    ends: int = 0  # of replicas, at least: faults go on until then
    restarts: int  # of the server, spread over the storm
    lease: float


@dataclass(slots=True, kw_only=True)
class Damage:
    """What the storm was, and what it did."""

    told: list[Told] = field(default_factory=list)
    nobody: int = 0  # faults that happened while nobody watched
    ends: collections.Counter[str] = field(default_factory=collections.Counter)
    stored: set[str] = field(default_factory=set)
    statuses: dict[str, int] = field(default_factory=dict)
    lost: list[tuple[Told, End | None]] = field(default_factory=list)
    unrecorded: list[Told] = field(default_factory=list)
    longest_stop: float = 0.0  # from SIGTERM on
    seconds: float = 0.0

    @property
    def unexplained(self) -> list[tuple[Told, End | None]]:
        """Lost, though its process was not killed so soon that it cannot have been accepted."""
        return [
            (told, end)
            for told, end in self.lost
            if end is None
            or end.how is not signal.SIGKILL
            or not told.at <= end.gone
            or end.asked - told.at > UNTIL_DURABLE
        ]

    def __str__(self) -> str:
        waits = sorted(end.asked - told.at for told, end in self.lost if end)
        longest = f", at most {max(waits) * 1000:.0f} ms before" if waits else ""
        return (
            f"{self.seconds:.0f} s; ends of replicas and the server: {dict(self.ends)}, "
            f"a stop in peace took {self.longest_stop:.1f} s at most\n"
            f"faults written to a stream {len(self.told):,}, "
            f"while nobody watched {self.nobody:,}\n"
            f"incidents {len(self.stored):,}: {self.statuses}\n"
            f"in the sockets of killed replicas {len(self.lost)}{longest}"
        )


class Storm:
    """Faults everywhere, replicas that are killed and stopped, a server that crashes."""

    def __init__(self, deployment: Deployment, weather: Weather, seed: int) -> None:
        self.deployment = deployment
        self.weather = weather
        self.damage = Damage()
        self._chance = random.Random(seed)
        self._faults = random.Random(seed + 1)  # of its own: it is another thread
        self._over = threading.Event()

    def blow(self) -> Damage:
        began = time.monotonic()
        teller = threading.Thread(target=self._tell)
        teller.start()
        try:
            self._end_replicas(teller)
        finally:
            self._over.set()
            teller.join()
        self._calm()
        self.damage.seconds = time.monotonic() - began
        self._survey()
        return self.damage

    @property
    def _share(self) -> float:
        """How much of the storm has passed."""
        ends = self.damage.ends["SIGKILL"] + self.damage.ends["SIGTERM"]
        if ends < self.weather.ends or self.damage.ends["server"] < self.weather.restarts:
            return min(self._told, 0.99)
        return self._told

    @property
    def _told(self) -> float:
        return len(self.damage.told) / (self.weather.faults - len(self.deployment.clusters.fakes))

    def _tell(self) -> None:
        """All faults but the last one of each cluster."""
        clusters = sorted(self.deployment.clusters.fakes)
        number = 0
        while self._share < 1 and not self._over.wait(
            self._faults.uniform(0.0, 2 * self.weather.pause)
        ):
            number += 1
            told = self.deployment.tell(self._faults.choice(clusters), f"pod-{number}")
            self.damage.told += told
            self.damage.nobody += not told

    def _end_replicas(self, teller: threading.Thread) -> None:
        weather, ends = self.weather, self.damage.ends
        while teller.is_alive():
            teller.join(self._chance.uniform(0.5, 1.5) * weather.between_ends)
            due = int(self._told * (weather.restarts + 1))
            if ends["server"] < min(due, weather.restarts):
                self._crash_server()
            elif teller.is_alive():
                self._end_one()

    def _end_one(self) -> None:
        replica = self._chance.choice(self.deployment.replicas)
        eventually(replica.is_up)
        self._end(replica)
        # Back at once it has its leases again; later the others have taken over.
        time.sleep(self._chance.choice([0.0, 1.2 * self.weather.lease]))
        replica.start()

    def _end(self, replica: Replica) -> None:
        how = self._chance.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGTERM])
        code = replica.end(how)
        assert code == (0 if how is signal.SIGTERM else -how), replica.program.err[-20:]
        self.damage.ends[how.name] += 1

    def _crash_server(self) -> None:
        self.deployment.server.stop("immediate")
        self.damage.ends["server"] += 1
        # Shorter than a lease, or longer: then nobody may take over before the owners are back.
        time.sleep(self._chance.uniform(0.0, 1.2) * self.weather.lease)
        victim = self._chance.choice([None, *filter(Replica.has_started, self.deployment.replicas)])
        if victim is not None:
            self._end(victim)
        self.deployment.server.start()
        if victim is not None:
            victim.start()
        for replica in self.deployment.replicas:
            eventually(replica.is_up)

    def _calm(self) -> None:
        """A last fault of each cluster: before it, its stream had everything else."""
        clusters = self.deployment.clusters
        last: set[str] = set()
        for name in clusters.fakes:
            told: list[Told] = []
            while not told:
                clusters.await_watch(name)
                told = self.deployment.tell(name, f"last-of-{name}-{len(last)}")
            self.damage.told += told
            last.add(told[0].name)
        self.deployment.await_quiet(last)
        for replica in self.deployment.replicas:
            eventually(replica.is_up)
        still_open = "select cluster from cluster_gaps where restored_at is null"
        eventually(lambda: self.deployment.server.run(still_open) == [], "every gap has its end")

    def _survey(self) -> None:
        run = self.deployment.server.run
        self.damage.stored = {name for (name,) in run("select resource_name from fault_events")}
        rows = run("select status, count(*) from incidents group by status order by status")
        self.damage.statuses = dict(rows)
        ends = {k: end for replica in self.deployment.replicas for k, end in replica.ends.items()}
        self.damage.lost = [
            (told, ends.get(told.key))
            for told in self.damage.told
            if told.name not in self.damage.stored
        ]
        self.damage.longest_stop = max(
            (end.gone - end.asked for end in ends.values() if end.how is signal.SIGTERM),
            default=0.0,
        )
        gaps = run("select cluster, lost_at, restored_at from cluster_gaps")
        self.damage.unrecorded = [
            told
            for told, _ in self.damage.lost
            if not any(
                cluster == told.cluster
                and restored_at is not None
                and (lost_at - told.moment).total_seconds() <= UNTIL_DURABLE
                and told.moment <= restored_at
                for cluster, lost_at, restored_at in gaps
            )
        ]


def broken_laws(server: PostgresServer) -> dict[str, list[Any]]:
    found = {law: server.run(query) for law, query in POSTGRES_LAWS.items()}
    return {law: offenders for law, offenders in found.items() if offenders}


def storm(
    server: PostgresServer,
    folder: Path,
    weather: Weather,
    *,
    replicas: int,
    clusters: int,
    seed: int,
) -> Damage:
    """Let a storm pass, stop everybody, and look that all the laws hold."""
    print(f"seed {seed}", flush=True)
    deployment = Deployment(
        server, folder, replicas=replicas, clusters=clusters, lease=weather.lease
    )
    with deployment:
        deployment.start()
        deployment.await_records()
        damage = Storm(deployment, weather, seed).blow()
        print(damage, flush=True)
        codes = deployment.stop()
        told = {told.name for told in damage.told}
        wrong = {
            "exit codes": [code for code in codes if code],
            "watched twice": deployment.watched_twice(),
            "stored, and not sent": damage.stored - told,
            "lost, and not with a killed replica": damage.unexplained,
            "lost without a gap that says so": damage.unrecorded,
            **broken_laws(server),
        }
        found = {what: offenders for what, offenders in wrong.items() if offenders}
        assert not found, found
    return damage
