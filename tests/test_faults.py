"""The whole program when it is killed, and when the machine below it fails."""

from __future__ import annotations

import contextlib
import json
import random
import secrets
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from fake_mcp import a_fault
from laws import SQLITE_LAWS
from running_program import (
    GOOD_AGENT,
    Clusters,
    Program,
    an_agent,
    eventually,
    nightcrier,
    processes_with,
    rows,
    statuses,
)

# ---- Killed at any moment ----


def broken_laws(database: Path) -> dict[str, object]:
    found = {law: rows(database, query) for law, query in SQLITE_LAWS.items()}
    return {law: offenders for law, offenders in found.items() if offenders}


class Storm:
    """Faults of two clusters, one after the other, for as long as the block lasts."""

    def __init__(self, clusters: Clusters, chance: random.Random) -> None:
        self.clusters = clusters
        self.told: set[str] = set()  # written to an open stream
        self._chance = chance
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._blow)

    def _blow(self) -> None:
        number = 0
        while not self._over.wait(self._chance.uniform(0.0, 0.06)):
            number += 1
            self.emit(f"pod-{number}")

    def emit(self, name: str) -> None:
        if self.clusters.emit(self._chance.choice(["alpha", "beta"]), name):
            self.told.add(name)

    def __enter__(self) -> Storm:
        self._thread.start()
        return self

    def __exit__(self, *_exception: object) -> None:
        self._over.set()
        self._thread.join()


def kill_again_and_again(folder: Path, times: int) -> None:
    seed = secrets.randbits(32)
    print(f"seed {seed}")  # pytest shows it when the test fails
    chance = random.Random(seed)
    database = folder / "nightcrier.db"
    marker = f"marker-{seed}"
    script = f": {marker}; sleep 0.$(($$ % 4)); {GOOD_AGENT}"
    options = ["--agent-cli", "command", "--agent-command", an_agent(script)]
    options += ["--lease-duration", "1", "--health-listen", "127.0.0.1:0", "--log-level", "warning"]
    with Clusters("alpha", "beta") as clusters:
        options = [*clusters.flags(), *options]
        with Storm(clusters, chance) as storm:
            for _ in range(times):
                with Program(*options, cwd=folder) as program:
                    moment = chance.choice([0.6, 2.0])  # some while it starts, some at work
                    time.sleep(chance.uniform(0.0, moment))
                    assert program.process.poll() is None, program.err
                    program.signal(signal.SIGKILL)
                    assert program.ends() == -signal.SIGKILL
                    eventually(lambda: not list(processes_with(marker)), "no agent left", 2.0)
        with Program(*options, cwd=folder) as program:
            clusters.await_watch()
            before = set(storm.told)
            for number in range(20):
                storm.emit(f"last-{number}")
            last = storm.told - before
            assert len(last) == 20

            def quiet() -> bool:
                found = dict(rows(database, "select resource_name, status from incidents"))
                return last <= found.keys() and not {"PENDING", "RUNNING"} & set(found.values())

            eventually(quiet, "quiet", 120.0)
            assert program.stop() == 0
    assert broken_laws(database) == {}
    stored = {name for (name,) in rows(database, "select resource_name from fault_events")}
    assert stored <= storm.told, "nothing is stored that was not sent"
    assert statuses(database).get("RESOLVED", 0) >= 20
    print(f"told {len(storm.told)}, stored {len(stored)}, {statuses(database)}")


def test_whenever_the_program_is_killed_every_accepted_event_ends_once(tmp_path: Path) -> None:
    kill_again_and_again(tmp_path, 5)


@pytest.mark.slow
def test_however_often_the_program_is_killed_every_accepted_event_ends_once(
    tmp_path: Path,
) -> None:
    kill_again_and_again(tmp_path, 50)


def test_the_laws_find_what_they_are_there_for(tmp_path: Path) -> None:
    (tmp_path / "fault.json").write_text(json.dumps(a_fault()))
    agent = ("--agent-cli", "command", "--agent-command", an_agent())
    done = nightcrier("replay", "fault.json", *agent, "--sqlite", "n.db", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    database = tmp_path / "n.db"
    assert broken_laws(database) == {}
    harm = {
        "an incident is at its end": "update incidents set completed_at = null, status = 'PENDING'",
        "transitions are numbered from 1 on": "update incident_transitions set seq = seq + 100",
        "no execution is open": "update agent_executions set completed_at = null, outcome = null",
        "an attempt is a claim": "update incidents set attempt = 2",
    }
    for law, statement in harm.items():
        connection = sqlite3.connect(database)
        connection.execute(statement)
        connection.commit()
        connection.close()
        assert law in broken_laws(database)


def test_whoever_looks_into_the_running_database_takes_nothing_away(tmp_path: Path) -> None:
    """The last connection to close takes the write-ahead log along: nobody may think it is that.

    POSIX locks of a process on a file are gone as soon as it closes any descriptor of the file.
    """
    database = tmp_path / "nightcrier.db"
    worker = ["run", "--role", "worker", "--agent-cli", "command", "--agent-command", an_agent()]
    with Clusters("alpha") as clusters:
        ingest = [*clusters.flags(), "--role", "ingest", "--health-listen", "127.0.0.1:0"]
        with Program(*ingest, cwd=tmp_path) as program:
            clusters.await_watch()
            for number in range(3):
                connection = sqlite3.connect(database)  # as `sqlite3 nightcrier.db`: it may write
                connection.execute("select count(*) from incidents").fetchall()
                connection.close()
                assert nightcrier("migrate", "status", cwd=tmp_path).returncode == 0
                with Program(*worker, "--health-listen", "127.0.0.1:0", cwd=tmp_path) as other:
                    other.wait_for("health endpoint")
                    assert other.stop() == 0
                clusters.emit("alpha", f"pod-{number}")
                program.wait_for("incident pending", number + 1)
                assert rows(database, "select count(*) from incidents") == [(number + 1,)]
            program.signal(signal.SIGKILL)
            program.ends()
    assert rows(database, "select count(*) from incidents") == [(3,)]
    assert rows(database, "pragma integrity_check") == [("ok",)]


# ---- A disk that is full, or cannot be written ----


@pytest.fixture(scope="module")
def mount_namespace() -> list[str]:
    """The command that runs others where mounting is their own business."""
    for command in (["unshare", "-m"], ["unshare", "-rm"]):
        trial = [*command, "mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", "/mnt"]
        try:
            if subprocess.run(trial, capture_output=True, check=False).returncode == 0:
                return command
        except OSError:
            break
    pytest.skip("this machine allows no private mount namespace")


def on_a_small_disk(command: list[str], place: Path, then: str = "") -> list[str]:
    """Wrap a command so that `place` is a disk of 16 MB which only it has."""
    script = f'mount -t tmpfs -o size=16m tmpfs "{place}" && {then or ":"} && exec "$@"'
    return [*command, "sh", "-c", script, "sh"]


class SmallDisk:
    """The disk of a program that was started on one; nobody else sees it."""

    def __init__(self, command: list[str], program: Program, place: Path) -> None:
        self._enter = ["nsenter", "-t", str(program.process.pid), "-m"]
        self._enter += ["-U", "--preserve-credentials"] if "-rm" in command else []
        self._place = place
        self._filler = Path(f"/proc/{program.process.pid}/root") / str(place)[1:] / "filler"

    def fill(self) -> None:
        with contextlib.suppress(OSError), self._filler.open("wb", buffering=0) as file:
            while True:
                file.write(b"x" * 4096)

    def make_room(self) -> None:
        self._filler.unlink()

    def rows(self, query: str) -> list[list[object]]:
        """SQLite follows links, and would end in our own directory: ask from within."""
        code = (
            "import json, sqlite3, sys; c = sqlite3.connect(sys.argv[1]);"
            "print(json.dumps(c.execute(sys.argv[2]).fetchall())); c.close()"
        )
        ask = [*self._enter, sys.executable, "-c", code, f"{self._place}/n.db", query]
        done = subprocess.run(ask, capture_output=True, text=True, check=True)
        found: list[list[object]] = json.loads(done.stdout)
        return found


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    place = tmp_path / "disk"
    place.mkdir()
    return place


def test_with_a_full_disk_reading_pauses_and_all_goes_on_when_there_is_room(
    mount_namespace: list[str], disk: Path, tmp_path: Path
) -> None:
    with Clusters("alpha") as clusters:
        options = [*clusters.flags(), "--role", "ingest", "--health-listen", "127.0.0.1:0"]
        with Program(
            *("run", *options, "--sqlite", disk / "n.db"),
            cwd=tmp_path,
            wrapper=on_a_small_disk(mount_namespace, disk),
        ) as program:
            clusters.await_watch()
            small = SmallDisk(mount_namespace, program, disk)

            def acknowledged() -> int:
                (cluster,) = json.loads(program.get("/health/clusters")[1])["clusters"]
                return int(cluster["event_count"])

            def stored() -> int:
                ((count,),) = small.rows("select count(*) from incidents")
                return int(str(count))

            def emit(first: int, count: int) -> None:
                for number in range(first, first + count):
                    assert clusters.emit("alpha", f"pod-{number}", context="x" * 2000)

            emit(0, 10)
            eventually(lambda: acknowledged() == 10)
            small.fill()
            emit(10, 300)
            program.wait_for("events cannot be stored, reading pauses")
            status, reasons = program.get("/readyz")
            assert status == 503
            assert "disk is full" in reasons
            for _ in range(10):
                assert acknowledged() <= stored() < 310
            assert program.get("/healthz")[0] == 200
            small.make_room()
            eventually(lambda: acknowledged() == stored() == 310)
            program.wait_for("events are stored again")
            assert program.get("/readyz")[0] == 200
            names = small.rows("select count(distinct resource_name) from fault_events")
            assert names == [[310]]
            assert small.rows("pragma integrity_check") == [["ok"]]
            complaints = [line for line in program.err if "reading pauses" in line]
            assert len(complaints) == 1, "one clear message"
            assert str(disk / "n.db") in complaints[0]
            assert "Traceback" not in "".join(program.err)
            assert program.stop() == 0


def test_outcomes_wait_for_room_on_the_disk_too(
    mount_namespace: list[str], disk: Path, tmp_path: Path
) -> None:
    agent = an_agent(f"until test -e {tmp_path}/go; do sleep 0.02; done; {GOOD_AGENT}")
    with Clusters("alpha") as clusters:
        options = [*clusters.flags(), "--health-listen", "127.0.0.1:0"]
        options += ["--agent-cli", "command", "--agent-command", agent]
        with Program(
            *("run", *options, "--sqlite", disk / "n.db", "--workspace-root", tmp_path / "work"),
            cwd=tmp_path,
            wrapper=on_a_small_disk(mount_namespace, disk),
        ) as program:
            clusters.await_watch()
            small = SmallDisk(mount_namespace, program, disk)
            clusters.emit("alpha")
            eventually(lambda: small.rows("select 1 from agent_executions"))
            small.fill()
            # What the write-ahead log has room for is still written: fill that, too.
            for number in range(50):
                clusters.emit("alpha", f"pod-{number}", context="x" * 20_000)
            program.wait_for("reading pauses")
            (tmp_path / "go").touch()
            program.wait_for("cannot be stored, trying again")
            small.make_room()
            by_status = "select status, count(*) from incidents group by status"
            eventually(lambda: small.rows(by_status) == [["RESOLVED", 51]])
            assert small.rows("select max(attempt) from incidents") == [[1]]
            assert program.stop() == 0


def test_incidents_wait_for_room_for_their_workspaces(
    mount_namespace: list[str], disk: Path, tmp_path: Path
) -> None:
    database = tmp_path / "n.db"
    with Clusters("alpha") as clusters:
        options = [*clusters.flags(), "--health-listen", "127.0.0.1:0"]
        options += ["--agent-cli", "command", "--agent-command", an_agent()]
        with Program(
            *("run", *options, "--sqlite", database, "--workspace-root", disk),
            cwd=tmp_path,
            wrapper=on_a_small_disk(mount_namespace, disk),
        ) as program:
            clusters.await_watch()
            small = SmallDisk(mount_namespace, program, disk)
            small.fill()
            for number in range(20):
                clusters.emit("alpha", f"pod-{number}")
            assert "disk is full" in program.wait_for("incidents cannot be claimed")
            assert program.get("/readyz")[0] == 503
            eventually(lambda: statuses(database) == {"PENDING": 20})
            small.make_room()
            eventually(lambda: statuses(database) == {"RESOLVED": 20})
            assert program.stop() == 0


def test_a_database_directory_that_cannot_be_written_is_exit_code_4_and_one_line(
    mount_namespace: list[str], disk: Path, tmp_path: Path
) -> None:
    read_only = on_a_small_disk(mount_namespace, disk, f'mount -o remount,ro "{disk}"')
    for command, complaint in (
        ("run --cluster a=http://127.0.0.1:1/mcp --role ingest", f"{disk} is not writable"),
        ("migrate up", f"{disk / 'n.db'} cannot be opened: Read-only"),
    ):
        with Program(
            *command.split(), "--sqlite", disk / "n.db", cwd=tmp_path, wrapper=read_only
        ) as program:
            assert program.ends() == 4
            (line,) = program.err
            assert complaint in line


def test_a_workspace_that_cannot_be_made_fails_the_incident_and_not_the_program(
    tmp_path: Path,
) -> None:
    with Clusters("alpha") as clusters:
        options = [*clusters.flags(), "--health-listen", "127.0.0.1:0"]
        options += ["--agent-cli", "command", "--agent-command", "true"]
        with Program(*options, cwd=tmp_path) as program:
            clusters.await_watch()
            (tmp_path / "incidents").write_text("in the way")
            clusters.emit("alpha")
            program.wait_for('"failed"')
            (tmp_path / "incidents").unlink()
            clusters.emit("alpha")
            program.wait_for('"agent_failed"')
            assert program.stop() == 0
    reasons = rows(
        tmp_path / "nightcrier.db",
        "select failure_reason from incidents order by incident_id",
    )
    assert "workspace cannot be made" in reasons[0][0]
