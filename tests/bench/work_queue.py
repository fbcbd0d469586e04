"""Claim and complete: full work (incident, transition, execution, report) on SQLite.

python tests/bench/work_queue.py [--incidents 2000] [--rounds 3] [--dir DIR]

A worker claims a batch and completes each of its incidents, one transaction each. (Not called
queue.py: that would take the place of the standard library's `queue`.)
"""

from __future__ import annotations

import argparse
import functools
import multiprocessing
import statistics
import threading
import time
from datetime import timedelta
from pathlib import Path

from common import fresh, fsync_milliseconds, rounds, sqlite_store, table

import nightcrier
import sql_database
import state_store
from conftest import LEASE, an_event, resolved


def work(store: nightcrier.StateStore, worker: str, size: int) -> int:
    done = 0
    while claimed := store.claim_incidents(worker, size, LEASE):
        for incident in claimed:
            store.complete_incident(incident, resolved(incident))
        done += len(claimed)
    return done


def fill(path: Path, pending: int, finished: int = 0) -> None:
    store = sqlite_store(path)
    for count, skipped in ((finished, ("old",)), (pending, ())):
        cluster = "old" if skipped else "prod"
        for first in range(0, count, 2000):
            events = [
                an_event(f"{cluster}{'' if skipped else number % 50}", context="x" * 300)
                for number in range(min(2000, count - first))
            ]
            store.create_incidents(events, without_triage=skipped)
    store.close()


def threads(count: int, size: int, incidents: int, where: str | None) -> float:
    with fresh(where) as folder:
        fill(folder / "n.db", incidents)
        store = state_store.SQLiteStore(folder / "n.db")
        workers = [
            threading.Thread(target=work, args=(store, f"w{number}", size))
            for number in range(count)
        ]
        began = time.perf_counter()
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        seconds = time.perf_counter() - began
        store.close()
        return incidents / seconds


def _process(path: Path, worker: str, size: int, ready: object, go: object) -> None:
    store = state_store.SQLiteStore(path)
    ready.release()  # type: ignore[attr-defined]
    go.wait()  # type: ignore[attr-defined]
    work(store, worker, size)
    store.close()


def processes(count: int, size: int, incidents: int, where: str | None) -> float:
    context = multiprocessing.get_context("spawn")
    ready, go = context.Semaphore(0), context.Event()
    with fresh(where) as folder:
        fill(folder / "n.db", incidents)
        workers = [
            context.Process(target=_process, args=(folder / "n.db", f"w{number}", size, ready, go))
            for number in range(count)
        ]
        for worker in workers:
            worker.start()
        for _ in workers:
            ready.acquire()
        began = time.perf_counter()
        go.set()
        for worker in workers:
            worker.join()
        return incidents / (time.perf_counter() - began)


def bare_commits(incidents: int, where: str | None) -> float:
    """One row, one commit, and nothing else: what a completion could cost at the very least."""
    with fresh(where) as folder:
        connection = sql_database.connect_sqlite(folder / "n.db")
        connection.execute("create table t (id integer primary key, done integer)")
        began = time.perf_counter()
        for number in range(incidents):
            connection.execute("begin immediate")
            connection.execute("insert into t values (?, 1)", (number,))
            connection.execute("commit")
        seconds = time.perf_counter() - began
        connection.close()
        return incidents / seconds


def claim_milliseconds(store: nightcrier.StateStore, size: int) -> float:
    """The median of claims, each given back, so that what is there stays as it is."""
    times = []
    for _ in range(100):
        began = time.perf_counter()
        claimed = store.claim_incidents("w", size, timedelta(minutes=1))
        times.append((time.perf_counter() - began) * 1000)
        for incident in claimed:
            store.release_incident(incident, "benchmark")
    return statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--incidents", type=int, default=2_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dir")
    arguments = parser.parse_args()
    count, where = arguments.incidents, arguments.dir
    with fresh(where) as folder:
        print(f"{count} incidents a round; one fdatasync: {fsync_milliseconds(folder):.3f} ms")
    contestants = {"bare apsw, one row a commit": functools.partial(bare_commits, count, where)}
    for size in (1, 10, 32):
        for kind, number in ((threads, 1), (threads, 4), (processes, 1), (processes, 4)):
            name = f"{number} {kind.__name__}, claims of {size}"
            contestants[name] = functools.partial(kind, number, size, count, where)
    table(rounds(contestants, arguments.rounds), "incidents/s", against="1 threads, claims of 1")

    print()
    with fresh(where) as folder:
        stores = {}
        for amount in (1_000, 100_000):
            fill(folder / f"{amount}.db", amount, finished=amount)
            stores[amount] = state_store.SQLiteStore(folder / f"{amount}.db")
        latencies = {
            f"claim of {size}, {amount:,} pending and {amount:,} finished": functools.partial(
                claim_milliseconds, store, size
            )
            for size in (1, 10)
            for amount, store in stores.items()
        }
        found = rounds(latencies, arguments.rounds)
        table(found, "ms", against="claim of 1, 1,000 pending and 1,000 finished")
        for store in stores.values():
            store.close()


if __name__ == "__main__":
    main()
