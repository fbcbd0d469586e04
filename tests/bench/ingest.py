"""Durable ingest: simulated servers (their own process) -> MCP streams -> parse -> committed.

python tests/bench/ingest.py [--events 20000] [--rounds 3] [--dir DIR]

Beside it what the disk and SQLite allow: the same rows in a bare apsw loop with the batch that the
inbox would make at most, and with one commit for each event.
"""

from __future__ import annotations

import argparse
import asyncio
import subprocess
import sys
import time
from collections.abc import Sequence

from common import fresh, fsync_milliseconds, rounds, sqlite_store, table

import nightcrier
import sql_database
import state_store
from fake_mcp import a_fault
from incidents import Incident, SubscribeMode, parse_event
from mcp_client import HTTPServer, SimulatedCluster, simulated_clusters
from nightcrier import ClusterConfig, ClusterWatch, Inbox
from state_store import AsyncStore


async def serve(streams: int, events: int) -> None:
    """The other end: prints its port, waits for a line, and sends as fast as it is read."""
    clusters = [SimulatedCluster(f"c{number}") for number in range(streams)]
    server = HTTPServer(simulated_clusters(clusters))
    _, port = await server.start("127.0.0.1", 0)
    print(port, flush=True)
    await asyncio.to_thread(sys.stdin.readline)

    async def send(cluster: SimulatedCluster) -> None:
        (session,) = cluster.sessions.values()
        assert session.stream is not None
        session.stream.write_seconds = 600.0  # the client pauses while it stores
        for number in range(events // streams):
            assert cluster.emit(a_fault(f"pod-{number}", context="x" * 300))
            if number % 20 == 0:
                await session.stream.drain()
        await session.stream.drain()

    await asyncio.gather(*(send(cluster) for cluster in clusters))
    await asyncio.to_thread(sys.stdin.readline)
    await server.close()


async def receive(store: nightcrier.StateStore, port: int, streams: int, go: object) -> float:
    stored: list[int] = []
    all_stored = asyncio.Event()
    total = 0

    def on_stored(incidents: Sequence[Incident]) -> None:
        nonlocal total
        stored.append(len(incidents))
        total += len(incidents)
        if total >= wanted:
            all_stored.set()

    wanted = EVENTS // streams * streams
    async_store = AsyncStore(store)
    inbox = Inbox(async_store, without_triage=tuple, on_stored=on_stored)
    watch = ClusterWatch(async_store, inbox, SubscribeMode.FAULTS)
    await watch.start(
        ClusterConfig(name=f"c{number}", endpoint=f"http://127.0.0.1:{port}/c{number}/mcp")
        for number in range(streams)
    )
    parts = [asyncio.create_task(inbox.run()), asyncio.create_task(watch.run())]
    while any(w.record.connection_state != "active" for w in watch.watchers.values()):  # noqa: ASYNC110
        await asyncio.sleep(0.01)
    began = time.perf_counter()
    go()  # type: ignore[operator]
    await all_stored.wait()
    seconds = time.perf_counter() - began
    parts[1].cancel()
    await watch.close()
    inbox.close()
    await asyncio.gather(*parts, return_exceptions=True)
    async_store.close()
    return wanted / seconds


def whole_path(streams: int, where: str | None) -> float:
    with fresh(where) as folder:
        command = [sys.executable, __file__, "--serve", str(streams), "--events", str(EVENTS)]
        with subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
        ) as server:
            assert server.stdin is not None
            assert server.stdout is not None
            stdin = server.stdin
            port = int(server.stdout.readline())

            def go() -> None:
                stdin.write("go\n")

            try:
                return asyncio.run(receive(sqlite_store(folder / "n.db"), port, streams, go))
            finally:
                server.kill()


def bare(batch: int, events: int, where: str | None) -> float:
    """The same statements and pragmas, and nothing else: no parsing, no keys, no threads."""
    fields = state_store.EVENT_FIELDS
    made = [
        parse_event(
            a_fault(f"pod-{number}", context="x" * 300),
            mode=SubscribeMode.FAULTS,
            cluster="c0",
            received_at=sql_database.utc_now(),
            session_id="S" * 26,
        )
        for number in range(events)
    ]
    rows = [state_store.params_of(event, fields) for event in made]
    copied = ("cluster", "severity", "fault_type")
    copied += ("resource_kind", "resource_namespace", "resource_name")
    incidents = [
        {
            **{name: row[name] for name in copied},
            "incident_id": row["event_id"],
            "status": "PENDING",
            "queue_key": number,
            "created_at": row["received_at"],
            "completed_at": None,
        }
        for number, row in enumerate(rows)
    ]
    insert_event = sql_database.insert_statement("fault_events", fields)
    insert_incident = sql_database.insert_statement("incidents", list(incidents[0]))
    with fresh(where) as folder:
        path = folder / "n.db"
        sqlite_store(path).close()
        connection = sql_database.connect_sqlite(path)
        began = time.perf_counter()
        for first in range(0, events, batch):
            connection.execute("begin immediate")
            connection.executemany(insert_event, rows[first : first + batch])
            connection.executemany(insert_incident, incidents[first : first + batch])
            connection.execute("commit")
        seconds = time.perf_counter() - began
        connection.close()
        return events / seconds


def main() -> None:
    where = ARGUMENTS.dir
    with fresh(where) as folder:
        print(f"{EVENTS} events a round; one fdatasync: {fsync_milliseconds(folder):.3f} ms")
    batch = Inbox.BATCH
    results = rounds(
        {
            "whole path, 1 stream": lambda: whole_path(1, where),
            "whole path, 64 streams": lambda: whole_path(64, where),
            f"bare apsw, {batch} a commit": lambda: bare(batch, EVENTS, where),
            "bare apsw, 1 a commit": lambda: bare(1, EVENTS // 5, where),
        },
        ARGUMENTS.rounds,
    )
    table(results, "events/s", against="bare apsw, 1 a commit")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--events", type=int, default=20_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dir")
    parser.add_argument("--serve", type=int, metavar="STREAMS", help=argparse.SUPPRESS)
    ARGUMENTS = parser.parse_args()
    EVENTS = ARGUMENTS.events
    if ARGUMENTS.serve:
        asyncio.run(serve(ARGUMENTS.serve, EVENTS))
    else:
        main()
