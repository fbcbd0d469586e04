"""A storm at full size: replicas are killed, the server crashes, and nothing is lost or doubled.

python tests/bench/replicas.py [--replicas 4] [--clusters 200] [--faults 5000] [--seconds 150]
    [--restarts 2] [--between-ends 4] [--lease 6] [--seed N]

Prints what happened, and fails when a law is broken: what is looked at is in tests/replicas.py.
"""

from __future__ import annotations

import argparse
import secrets
import tempfile
from pathlib import Path

import common  # noqa: F401 (makes the tests' modules importable)

from postgres_servers import a_postgres
from replicas import Weather, storm


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--replicas", type=int, default=4)
    parser.add_argument("--clusters", type=int, default=200)
    parser.add_argument("--faults", type=int, default=5000)
    parser.add_argument("--seconds", type=float, default=150.0, help="over which the faults come")
    parser.add_argument("--restarts", type=int, default=2, help="crashes of the server")
    parser.add_argument("--between-ends", type=float, default=4.0, help="seconds, in the mean")
    parser.add_argument("--lease", type=float, default=6.0)
    parser.add_argument("--seed", type=int, default=secrets.randbits(32))
    args = parser.parse_args()
    weather = Weather(
        faults=args.faults,
        pause=args.seconds / args.faults,
        between_ends=args.between_ends,
        restarts=args.restarts,
        lease=args.lease,
    )
    with tempfile.TemporaryDirectory() as folder, a_postgres() as server:
        storm(
            server,
            Path(folder),
            weather,
            replicas=args.replicas,
            clusters=args.clusters,
            seed=args.seed,
        )
    print("every law holds")


if __name__ == "__main__":
    main()
