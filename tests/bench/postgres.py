"""On one PostgreSQL server, in one run: nightcrier beside procrastinate and pgqueuer.

python tests/bench/postgres.py [PART …] [--dsn URL] [--jobs 1000] [--rounds 3] [--finished 1000000]

The parts: `work`, `ingest`, `idle` and `lookup`; without any, all of them. The server is started by
the script (Debian's, or the one that pip has installed) unless --dsn names another; everybody has a
database of its own on it, and synchronous_commit is on for all. The peers come with
`pip install .[bench]`; one that is not there is left out, and a line says so.

work: a queue of jobs that do nothing, from claimed to done. A worker is a process; the clock stops
when the server has no unfinished job any more. What one job costs, in rows and commits:

- nightcrier, full: claim (one commit for all that were claimed) updates the incident and adds a
  transition; completing (one commit each) updates it and adds transition, execution and report.
  `together`: what was claimed is completed in one commit, as the daemon does with agents that end
  at the same time.
- nightcrier, equal: the same as `together`, without execution and report. Two tables are written,
  as by the peers, which keep a row for the job and a row of its history for each change.
- procrastinate: fetches one job at a time (one commit) and finishes it (one commit), with a trigger
  that adds an event each time; `concurrency` is how many run side by side.
- pgqueuer: dequeues a batch (one commit), and moves what is done from its queue to its log in
  batches of the same size (one commit for a batch): a crash repeats up to a batch of finished jobs.
  nightcrier never repeats one whose outcome it was told is written.

ingest: what is acknowledged after its commit, in batches of 1 and 100. nightcrier writes an event
and an incident (two tables, seven indexes, places in the queue), a peer one row with its indexes
and, procrastinate, one event. The payload is as large as the event, about 900 bytes.

idle: from the return of the call that stores one job to the start of its work in another process.

lookup: claims and pages of lists with and without a million finished incidents behind the queue.
"""

from __future__ import annotations

import abc
import argparse
import asyncio
import contextlib
import dataclasses
import functools
import importlib.util
import json
import logging
import os
import random
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from common import at_once, rounds, seconds_of, table
from work_queue import claim_milliseconds, work

import nightcrier
import sql_database
import state_store
from conftest import LEASE, a_schema, an_event, postgres_store, resolved
from incidents import Completion, IncidentFilter, IncidentStatus, Severity
from postgres_servers import a_postgres

CLUSTERS = 50
CONTEXT = "back-off restarting failed container " * 8
PAYLOAD = json.dumps(
    {"specversion": "1.0", "type": "fault", "data": {"labels": {"app": "web"}, "log": "x" * 200}}
)


def events(count: int) -> list[nightcrier.FaultEvent]:
    return [
        an_event(f"prod{number % CLUSTERS}", context=CONTEXT, payload=PAYLOAD)
        for number in range(count)
    ]


def as_payload(event: nightcrier.FaultEvent) -> dict[str, Any]:
    """An event as a peer's job carries it."""
    return {k: str(v) for k, v in dataclasses.asdict(event).items()}


def open_store(dsn: str, name: str = "bench") -> state_store.PostgresStore:
    return state_store.PostgresStore(sql_database.parse_dsn(dsn, os.environ), name)


def ask(dsn: str, sql: str, **params: Any) -> list[Any]:
    driver = sql_database.connect_postgres(sql_database.parse_dsn(dsn, os.environ), "bench").driver
    try:
        return list(driver.run(sql, **params) or ())
    finally:
        driver.close()


# --- nightcrier ---


class Nightcrier:
    """Each measurement has a schema of its own; `dsn` is for the processes."""

    UNFINISHED = "select 1 from incidents where status in ('PENDING', 'RUNNING') limit 1"

    def __init__(self, dsn: str) -> None:
        self._server = dsn

    @contextlib.contextmanager
    def queue(self, jobs: int) -> Iterator[str]:
        with a_schema(self._server) as dsn:
            with contextlib.closing(postgres_store(dsn)) as store:
                for first in range(0, jobs, 500):
                    store.create_incidents(events(min(500, jobs - first)))
            ask(dsn, "vacuum analyze")
            yield dsn

    @contextlib.contextmanager
    def unfinished(self, dsn: str) -> Iterator[Callable[[], bool]]:
        with contextlib.closing(open_store(dsn)) as store:
            yield lambda: bool(store._database.read(lambda tx: tx.run(self.UNFINISHED)))

    @staticmethod
    def work(start: Callable[[], None], number: int, dsn: str, how: str, size: int) -> None:
        store = open_store(dsn)
        store.has_pending()
        if how == "full":
            start()
            work(store, f"w{number}", size)
            return
        start()
        while claimed := store.claim_incidents(f"w{number}", size, LEASE):
            store.complete_incidents(
                [(incident, _completion(how, incident)) for incident in claimed]
            )

    @staticmethod
    def ingest(start: Callable[[], None], number: int, dsn: str, jobs: int, size: int) -> None:
        store = open_store(dsn)
        store.has_pending()
        batches = [events(size) for _ in range(jobs // size)]
        start()
        for batch in batches:
            store.create_incidents(batch)

    @staticmethod
    def idle(start: Callable[[], None], number: int, dsn: str, hears: bool, began: Any) -> None:
        store = open_store(dsn)
        woken = threading.Event()
        if hears:
            store.listen(lambda _: woken.set())
        start()
        while True:
            woken.clear()
            claimed = store.claim_incidents("w", 1, LEASE) if store.has_pending() else []
            for incident in claimed:
                began.send(time.perf_counter())
                store.complete_incident(incident, resolved(incident))
            if not claimed:
                woken.wait(random.uniform(*store.poll_interval()))

    @contextlib.contextmanager
    def enqueue(self, dsn: str) -> Iterator[Callable[[], object]]:
        with contextlib.closing(open_store(dsn)) as store:
            yield lambda: store.create_incidents(events(1))


def _completion(how: str, incident: nightcrier.Incident) -> Completion:
    completion = resolved(incident)
    if how == "equal":
        completion = dataclasses.replace(completion, execution=None, report=None)
    return completion


# --- Peers: the tables are made once, and emptied for each measurement ---


class Peer(abc.ABC):
    UNFINISHED = ""
    EMPTY = ""

    def __init__(self, dsn: str) -> None:
        self._server = dsn
        logging.getLogger(type(self).__name__.lower()).setLevel(logging.ERROR)
        asyncio.run(self._install())

    @abc.abstractmethod
    async def _install(self) -> None: ...

    @abc.abstractmethod
    async def _fill(self, jobs: int) -> None: ...

    @contextlib.contextmanager
    def queue(self, jobs: int) -> Iterator[str]:
        ask(self._server, self.EMPTY)
        asyncio.run(self._fill(jobs))
        ask(self._server, "vacuum analyze")
        yield self._server

    @contextlib.contextmanager
    def unfinished(self, dsn: str) -> Iterator[Callable[[], bool]]:
        driver = sql_database.connect_postgres(sql_database.parse_dsn(dsn, {}), "bench").driver
        with contextlib.closing(driver):
            yield lambda: bool(driver.run(self.UNFINISHED))


class Procrastinate(Peer):
    UNFINISHED = "select 1 from procrastinate_jobs where status in ('todo', 'doing') limit 1"
    EMPTY = "truncate procrastinate_jobs, procrastinate_events cascade"

    @staticmethod
    def app(dsn: str, began: Any = None) -> Any:
        import procrastinate

        app = procrastinate.App(connector=procrastinate.PsycopgConnector(conninfo=dsn))

        @app.task(name="nothing")  # type: ignore[untyped-decorator]
        async def nothing(**_: Any) -> None:
            if began:
                began.send(time.perf_counter())

        return app

    async def _install(self) -> None:
        async with (app := self.app(self._server)).open_async():
            await app.schema_manager.apply_schema_async()

    async def _fill(self, jobs: int) -> None:
        async with (app := self.app(self._server)).open_async():
            for first in range(0, jobs, 500):
                batch = [as_payload(event) for event in events(min(500, jobs - first))]
                await app.tasks["nothing"].batch_defer_async(*batch)

    @staticmethod
    def work(start: Callable[[], None], number: int, dsn: str, how: str, size: int) -> None:
        async def run() -> None:
            async with (app := Procrastinate.app(dsn)).open_async():
                await app.check_connection_async()
                start()
                await app.run_worker_async(
                    wait=False,
                    concurrency=size,
                    listen_notify=False,
                    install_signal_handlers=False,
                )

        asyncio.run(run())

    @staticmethod
    def ingest(start: Callable[[], None], number: int, dsn: str, jobs: int, size: int) -> None:
        async def run() -> None:
            async with (app := Procrastinate.app(dsn)).open_async():
                await app.check_connection_async()
                task = app.tasks["nothing"]
                batches = [[as_payload(e) for e in events(size)] for _ in range(jobs // size)]
                start()
                for batch in batches:
                    if size == 1:
                        await task.defer_async(**batch[0])
                    else:
                        await task.batch_defer_async(*batch)

        asyncio.run(run())

    @staticmethod
    def idle(start: Callable[[], None], number: int, dsn: str, hears: bool, began: Any) -> None:
        async def run() -> None:
            async with (app := Procrastinate.app(dsn, began)).open_async():
                start()
                await app.run_worker_async(install_signal_handlers=False, listen_notify=hears)

        asyncio.run(run())

    @contextlib.contextmanager
    def enqueue(self, dsn: str) -> Iterator[Callable[[], object]]:
        with asyncio.Runner() as runner:
            app = self.app(dsn)
            runner.run(app.open_async().__aenter__())
            (payload,) = map(as_payload, events(1))
            yield lambda: runner.run(app.tasks["nothing"].defer_async(**payload))
            runner.run(app.close_async())


class PgQueuer(Peer):
    UNFINISHED = "select 1 from pgqueuer limit 1"
    EMPTY = "truncate pgqueuer, pgqueuer_log"

    async def _install(self) -> None:
        async with self.queries(self._server) as queries:
            await queries.install()

    @staticmethod
    @contextlib.asynccontextmanager
    async def queries(dsn: str) -> Any:
        import asyncpg
        from pgqueuer.db import AsyncpgDriver
        from pgqueuer.queries import Queries

        connection = await asyncpg.connect(dsn)
        try:
            yield Queries(AsyncpgDriver(connection))
        finally:
            await connection.close()

    @staticmethod
    async def put(queries: Any, batch: list[bytes]) -> None:
        count = len(batch)
        await queries.enqueue(["nothing"] * count, batch, [0] * count)

    @staticmethod
    def jobs(count: int) -> list[bytes]:
        return [json.dumps(as_payload(event)).encode() for event in events(count)]

    async def _fill(self, jobs: int) -> None:
        async with self.queries(self._server) as queries:
            for first in range(0, jobs, 500):
                await self.put(queries, self.jobs(min(500, jobs - first)))

    @staticmethod
    async def run(
        dsn: str, size: int, start: Callable[[], None], *, drain: bool, began: Any
    ) -> None:
        import asyncpg
        import pgqueuer
        from pgqueuer.types import QueueExecutionMode

        logging.getLogger("pgqueuer").setLevel(logging.ERROR)
        connection = await asyncpg.connect(dsn)
        queue = pgqueuer.PgQueuer.from_asyncpg_connection(connection)

        @queue.entrypoint("nothing")
        async def nothing(_: Any) -> None:
            if began:
                began.send(time.perf_counter())

        start()
        mode = QueueExecutionMode.drain if drain else QueueExecutionMode.continuous
        await queue.qm.run(batch_size=size, mode=mode)

    @staticmethod
    def work(start: Callable[[], None], number: int, dsn: str, how: str, size: int) -> None:
        asyncio.run(PgQueuer.run(dsn, size, start, drain=True, began=None))

    @staticmethod
    def ingest(start: Callable[[], None], number: int, dsn: str, jobs: int, size: int) -> None:
        async def run() -> None:
            async with PgQueuer.queries(dsn) as queries:
                batches = [PgQueuer.jobs(size) for _ in range(jobs // size)]
                start()
                for batch in batches:
                    await PgQueuer.put(queries, batch)

        asyncio.run(run())

    @staticmethod
    def idle(start: Callable[[], None], number: int, dsn: str, hears: bool, began: Any) -> None:
        asyncio.run(PgQueuer.run(dsn, 1, start, drain=False, began=began))

    @contextlib.contextmanager
    def enqueue(self, dsn: str) -> Iterator[Callable[[], object]]:
        with asyncio.Runner() as runner:
            opened = self.queries(dsn)
            queries = runner.run(opened.__aenter__())
            batch = self.jobs(1)
            yield lambda: runner.run(self.put(queries, batch))
            runner.run(opened.__aexit__(None, None, None))


# --- The four parts ---


def worked(queue: Any, processes: int, how: str, size: int, jobs: int) -> float:
    """Jobs a second, from the start of the workers to the last job that is done on the server."""
    with (
        queue.queue(jobs) as dsn,
        queue.unfinished(dsn) as unfinished,
        at_once(processes, queue.work, dsn, how, size) as began,
    ):
        while unfinished():
            time.sleep(0.01)
        return jobs / (time.perf_counter() - began)


def ingested(queue: Any, processes: int, size: int, jobs: int) -> float:
    with queue.queue(0) as dsn:
        return jobs / seconds_of(processes, queue.ingest, dsn, jobs // processes, size)


def work_part(queues: Mapping[str, Any], jobs: int, count: int) -> None:
    kinds = {
        "nightcrier": [
            *(("full", 1), ("full", 10), ("full", 100)),
            *(("together", 10), ("together", 100)),
            *(("equal", 1), ("equal", 10), ("equal", 100)),
        ],
        "procrastinate": [("concurrency", 1), ("concurrency", 10)],
        "pgqueuer": [("batch", 1), ("batch", 10), ("batch", 100)],
    }
    for processes in (1, 4):
        contestants = {
            f"{name}, {how}{' of' if name == 'nightcrier' else ''} {size}": functools.partial(
                worked, queue, processes, how, size, jobs
            )
            for name, queue in queues.items()
            for how, size in kinds[name]
        }
        print(f"\nclaim + complete, {processes} worker processes, {jobs} jobs")
        table(rounds(contestants, count), "jobs/s", against="nightcrier, full of 10")


def ingest_part(queues: Mapping[str, Any], jobs: int, count: int) -> None:
    for size, amount in ((1, jobs), (100, 10 * jobs)):
        contestants = {
            f"{name}, {processes} processes": functools.partial(
                ingested, queue, processes, size, amount
            )
            for name, queue in queues.items()
            for processes in (1, 4)
        }
        print(f"\ningest, {size} in a commit, {amount} jobs")
        table(rounds(contestants, count), "jobs/s", against="nightcrier, 1 processes")


def idle_part(queues: Mapping[str, Any], samples: int) -> None:
    import multiprocessing

    found: dict[str, list[float]] = {}
    print(f"\nidle: stored -> started in another process, {samples} samples (polling: fewer)")
    with contextlib.ExitStack() as stack:
        turns = {}
        lines = [(name, queue, True) for name, queue in queues.items()]
        lines.append(("nightcrier, polling", queues["nightcrier"], False))
        for name, queue, hears in lines:
            dsn = stack.enter_context(queue.queue(0))
            here, there = multiprocessing.get_context("spawn").Pipe(duplex=False)
            put = stack.enter_context(queue.enqueue(dsn))
            # The process is killed with the stack: it would wait for jobs for ever.
            stack.enter_context(_idler(queue, dsn, hears, there))
            turns[name] = (put, here)

        def sample(name: str) -> float:
            put, here = turns[name]
            time.sleep(random.uniform(0.03, 0.06))  # idle, and not in step with anybody's beat
            put()
            stored = time.perf_counter()
            if not here.poll(30):
                raise RuntimeError(f"{name} did not start a job within 30 s")
            return (float(here.recv()) - stored) * 1000

        time.sleep(2)  # everybody listens by now
        for name in turns:
            sample(name)
        for number in range(samples):
            for name in turns:
                if "polling" not in name or number % 10 == 0:
                    found.setdefault(name, []).append(sample(name))
    width = max(map(len, found))
    print(f"{'':{width}}  median ms     p99 ms")
    for name, values in found.items():
        p99 = sorted(values)[min(len(values) - 1, int(len(values) * 0.99))]
        print(f"{name:{width}}  {statistics.median(values):9.2f}  {p99:9.2f}")


@contextlib.contextmanager
def _idler(queue: Any, dsn: str, hears: bool, began: Any) -> Iterator[None]:
    class Over(Exception):
        pass

    with contextlib.suppress(Over), at_once(1, queue.idle, dsn, hears, began):
        yield
        raise Over  # leaves without waiting for the process to end


FINISHED = """
    insert into fault_events
        (event_id, cluster, session_id, delivery_id, fault_fingerprint, fault_type, severity,
         context, occurred_at, received_at, resource_kind, resource_namespace, resource_name,
         payload)
    select cast(lpad(to_hex(cast(:first_ms as bigint) + n), 12, '0') || '-7000-8000-'
                || lpad(to_hex(n), 12, '0') as uuid),
           'cluster-' || cast(floor(200 * power(a, 2)) as integer), 'session', n,
           md5(cast(n % 50000 as text)),
           (array['CrashLoop', 'OOMKilled', 'NodeNotReady'])[1 + n % 3],
           case when b < 0.05 then 'critical' when b < 0.4 then 'warning' else 'info' end,
           :context, moment, moment,
           case when c < 0.7 then 'Pod' when c < 0.85 then 'Deployment' when c < 0.95 then 'Job'
                else 'Node' end,
           'namespace-' || n % 40, 'web-' || n % 5000, cast(:payload as jsonb)
    from (select n, random() as a, random() as b, random() as c,
                 to_timestamp((cast(:first_ms as bigint) + n) / 1000.0) as moment
          from generate_series(1, cast(:finished as integer)) n) given;

    insert into incidents
        (incident_id, status, queue_key, cluster, severity, fault_type, resource_kind,
         resource_namespace, resource_name, created_at, started_at, completed_at, attempt,
         attempts_charged, exit_code)
    select event_id, case when d < 0.9 then 'RESOLVED' when d < 0.96 then 'AGENT_FAILED'
                          when d < 0.97 then 'FAILED' else 'SKIPPED' end,
           cast(extract(epoch from received_at) * 1000000 as bigint), cluster, severity, fault_type,
           resource_kind, resource_namespace, resource_name, received_at, received_at,
           received_at + interval '3 minutes', 1, 1, 0
    from (select *, random() as d from fault_events) e;

    insert into incident_transitions (incident_id, seq, from_status, to_status, at, worker_id)
    select incident_id, 1, 'PENDING', 'RUNNING', started_at, 'w1' from incidents
    union all
    select incident_id, 2, 'RUNNING', status, completed_at, 'w1' from incidents"""


def fill_finished(dsn: str, finished: int) -> None:
    """What a year leaves behind; executions and reports are not looked at by what is measured."""
    first = int(time.time() * 1000) - finished - 86_400_000
    values = {"first_ms": first, "finished": finished, "context": CONTEXT, "payload": PAYLOAD}
    settings = sql_database.parse_dsn(dsn, os.environ)
    driver = sql_database.connect_postgres(settings, "bench").driver
    driver.run(f"set search_path = {settings.settings['search_path']}")
    for statement in FINISHED.split(";"):
        names = {name: value for name, value in values.items() if f":{name}" in statement}
        driver.run(statement, **names)
        print(f"filled {statement.split()[2]}", file=sys.stderr)
    driver.run("vacuum analyze")
    driver.run("checkpoint")
    driver.close()


def page_milliseconds(store: nightcrier.StateStore, wanted: IncidentFilter) -> float:
    times = []
    for _ in range(30):
        began = time.perf_counter()
        store.list_incidents(wanted, limit=50)
        times.append((time.perf_counter() - began) * 1000)
    return statistics.median(times)


def lookup_part(nightcrier_queue: Nightcrier, finished: int, count: int) -> None:
    contestants = {}
    with contextlib.ExitStack() as stack:
        for amount in (0, finished):
            dsn = stack.enter_context(nightcrier_queue.queue(0))
            if amount:
                began = time.perf_counter()
                fill_finished(dsn, amount)
                print(f"\nfilled {amount:,} in {time.perf_counter() - began:.0f} s")
            store = stack.enter_context(contextlib.closing(open_store(dsn)))
            store.create_incidents(events(1000))
            ask(dsn, "analyze")
            for size in (1, 10):
                contestants[f"claim of {size}, 1,000 pending, {amount:,} finished"] = (
                    functools.partial(claim_milliseconds, store, size)
                )
        table(rounds(contestants, count), "ms", against="claim of 1, 1,000 pending, 0 finished")
        some = functools.partial(IncidentFilter)
        failed = frozenset({IncidentStatus.AGENT_FAILED})
        wanted = {
            "all": some(),
            "a busy cluster": some(cluster="cluster-0"),
            "a quiet cluster": some(cluster="cluster-199"),
            "kind": some(resource_kind="Node"),
            "severity": some(severity=Severity.CRITICAL),
            "status": some(statuses=failed),
            "all four": some(
                cluster="cluster-199",
                resource_kind="Node",
                severity=Severity.CRITICAL,
                statuses=failed,
            ),
        }
        pages = {
            f"page of 50, by {name}": functools.partial(page_milliseconds, store, what)
            for name, what in wanted.items()
        }
        print(f"\nlists over {finished:,} incidents")
        table(rounds(pages, count), "ms", against="page of 50, by all")


def peers(server: str, stack: contextlib.ExitStack) -> dict[str, Any]:
    """Who takes part, each with a database of its own."""
    needs = {
        "nightcrier": (Nightcrier, ()),
        "procrastinate": (Procrastinate, ("procrastinate", "psycopg")),
        "pgqueuer": (PgQueuer, ("pgqueuer", "asyncpg")),
    }
    found: dict[str, Any] = {}
    for name, (kind, packages) in needs.items():
        if missing := [p for p in packages if importlib.util.find_spec(p) is None]:
            print(
                f"{name} is left out: {', '.join(missing)} is not installed (pip install .[bench])"
            )
            continue
        found[name] = kind(stack.enter_context(a_database(server, f"bench_{name}_{os.getpid()}")))
    return found


@contextlib.contextmanager
def a_database(server: str, name: str) -> Iterator[str]:
    ask(server, f"create database {name}")
    address, _, options = server.partition("?")
    try:
        yield f"{address.rpartition('/')[0]}/{name}" + (f"?{options}" if options else "")
    finally:
        ask(server, f"drop database {name} with (force)")


def main() -> None:
    names = ("work", "ingest", "idle", "lookup")
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(names)}")
    parser.add_argument("--dsn", help="postgresql://user:password@host:port/database")
    parser.add_argument("--jobs", type=int, default=1_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--samples", type=int, default=200)
    parser.add_argument("--finished", type=int, default=1_000_000)
    given = parser.parse_args()
    if unknown := set(given.parts) - set(names):
        parser.error(f"no such part: {', '.join(sorted(unknown))}")
    parts = given.parts or names
    with contextlib.ExitStack() as stack:
        server = (
            given.dsn or stack.enter_context(a_postgres(settings={"shared_buffers": "512MB"})).dsn()
        )
        ((version, durability),) = ask(
            server,
            "select current_setting('server_version'), current_setting('synchronous_commit')",
        )
        print(f"PostgreSQL {version}, synchronous_commit {durability}")
        queues = peers(server, stack)
        if "work" in parts:
            work_part(queues, given.jobs, given.rounds)
        if "ingest" in parts:
            ingest_part(queues, given.jobs, given.rounds)
        if "idle" in parts:
            idle_part(queues, given.samples)
        if "lookup" in parts:
            lookup_part(queues["nightcrier"], given.finished, given.rounds)


if __name__ == "__main__":
    main()
