"""From an event on the wire to a running agent, on an idle daemon (its own process, SQLite).

python tests/bench/latency.py [--samples 30] [--dir DIR]

Both ends read the same clock: the agent is a shell whose first act is `date`.
"""

from __future__ import annotations

import argparse
import statistics
import time

from common import fresh, rounds, table

from running_program import Clusters, Program, an_agent, eventually, rows, statuses

AGENT = "date +%s%N > output/investigation.md; printf '%0100d' 0 >> output/investigation.md"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=30)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dir")
    arguments = parser.parse_args()
    with fresh(arguments.dir) as folder, Clusters("alpha") as clusters:
        database = folder / "nightcrier.db"
        options = ["--agent-cli", "command", "--agent-command", an_agent(AGENT)]
        sent = 0

        def sample() -> float:
            nonlocal sent
            sent += 1
            began = time.time_ns()
            clusters.emit("alpha", f"pod-{sent}")
            eventually(lambda: statuses(database).get("RESOLVED") == sent)
            ((report,),) = rows(
                database,
                "select report_markdown from triage_reports order by report_id desc limit 1",
            )
            time.sleep(0.1)  # idle again
            return (int(report.split()[0]) - began) / 1e6

        def shell() -> float:
            """What starting `sh` and `date` costs by itself, for comparison."""
            import subprocess

            began = time.time_ns()
            done = subprocess.run(["sh", "-c", "date +%s%N"], capture_output=True, check=True)
            return (int(done.stdout) - began) / 1e6

        with Program(*clusters.flags(), *options, cwd=folder) as program:
            clusters.await_watch("alpha")
            sample()  # the first one starts the supervisor

            def many(measure: object) -> float:
                return statistics.median(measure() for _ in range(arguments.samples))  # type: ignore[operator]

            found = rounds(
                {
                    "event written -> agent runs": lambda: many(sample),
                    "sh and date alone": lambda: many(shell),
                },
                arguments.rounds,
            )
            table(found, "ms (median)", against="sh and date alone")
            program.stop()


if __name__ == "__main__":
    main()
