"""From the outcome of an incident to its delivery, on loopback; and what an idle look costs.

python tests/bench/telling.py [--samples 40] [--rows 100000] [--dir DIR]

The outcome is when the transaction began that wrote it, the delivery when the receiver had the
whole request. Both read the same clock.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from common import fresh

import sql_database
from conftest import a_schema, postgres_store, sqlite_store
from postgres_servers import a_postgres
from receiver import ACCEPTED, Answer, Received, Receiver
from running_program import Clusters, Program, an_agent, eventually


def deliveries(folder: Path, database: list[str], samples: int) -> list[float]:
    """Milliseconds of one incident after the other."""
    times: list[float] = []

    def answer(request: Received) -> Answer:
        completed = datetime.fromisoformat(request.document["data"]["completed_at"])
        times.append((datetime.now(UTC) - completed).total_seconds() * 1000)
        return ACCEPTED

    with Clusters("alpha") as clusters, Receiver(answer) as receiver:
        options = [*clusters.flags(), "--agent-cli", "command", "--agent-command", an_agent()]
        environment = {"NIGHTCRIER_WEBHOOK_URL": receiver.url()}
        with Program(*options, *database, cwd=folder, environment=environment) as program:
            clusters.await_watch()
            for number in range(samples + 1):
                clusters.emit("alpha", f"pod-{number}")
                eventually(lambda: len(times) > number)  # noqa: B023
            program.stop()
    return times[1:]  # the first one starts the supervisor


def fill(store: Any, count: int) -> None:
    """Messages that were sent long ago."""
    now = sql_database.format_time(sql_database.utc_now())
    for first in range(0, count, 5_000):
        rows = [
            {
                "notification_id": sql_database.new_id(),
                "kind": "incident",
                "sink": "webhook",
                "dedupe_key": f"incident:{number}:webhook",
                "payload": "{}",
                "status": "SENT",
                "created_at": now,
                "next_attempt_at": now,
            }
            for number in range(first, min(first + 5_000, count))
        ]
        store._database.write(lambda tx: tx.insert("notifications", rows))  # noqa: B023


def idle_look(store: Any) -> float:
    """Milliseconds of what a notifier asks now and then."""
    times = []
    for _ in range(300):
        began = time.perf_counter()
        store.tell_of_failures("webhook", 3)
        store.next_due("webhook")
        times.append((time.perf_counter() - began) * 1000)
    return statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=40)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--dir")
    arguments = parser.parse_args()
    with ExitStack() as stack:
        folder = stack.enter_context(fresh(arguments.dir))
        dsn = stack.enter_context(a_schema(stack.enter_context(a_postgres()).dsn()))
        engines: dict[str, tuple[list[str], Callable[[], Any]]] = {
            "sqlite": (["--sqlite", "n.db"], lambda: sqlite_store(folder / "n.db")),
            "postgres": (["--postgres-dsn", dsn], lambda: postgres_store(dsn)),
        }
        for name, (options, open_store) in engines.items():
            times = sorted(deliveries(folder, options, arguments.samples))
            print(f"{name}: outcome -> delivered: median {statistics.median(times):.1f} ms, "
                  f"worst of {len(times)} {times[-1]:.1f} ms")  # fmt: skip
            store = open_store()
            fill(store, arguments.rows)
            print(f"{name}: an idle look, {arguments.rows:,} sent: {idle_look(store):.2f} ms")
            store.close()


if __name__ == "__main__":
    main()
