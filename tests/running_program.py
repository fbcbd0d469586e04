"""The whole program as a child process, and clusters for it in a thread of the test process."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import http.client
import json
import os
import shlex
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Generic, Self, TypeVar

from fake_mcp import FakeMCP, a_fault
from mcp_client import HTTPServer, simulated_clusters

PROGRAM = Path(__file__).with_name("installed.py")
DEADLINE = 30.0  # seconds; far more than anything takes
T = TypeVar("T")

REPORT = "# Report\\n\\n## Root Cause\\n\\nThe disk is full. Confidence: HIGH\\n\\n" + "x" * 100
GOOD_AGENT = f"printf '{REPORT}' > output/investigation.md"


def an_agent(script: str = GOOD_AGENT) -> str:
    """`--agent-command` for a shell script."""
    return shlex.join(["sh", "-c", script])


def eventually(condition: Callable[[], T], what: str = "", seconds: float = DEADLINE) -> T:
    """Its value as soon as it is true, asked of another process again and again."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, f"not within {seconds:g} s: {what or condition}"
        time.sleep(0.01)
    return value


def clean_environment(**changes: str) -> dict[str, str]:
    """The environment without settings of whoever runs the tests."""
    known = {"PATH", "HOME", "LANG", "TMPDIR"}
    kept = {name: value for name, value in os.environ.items() if name in known}
    return kept | {"PYTHONWARNINGS": "error", **changes}


def nightcrier(
    *words: str | Path, cwd: Path, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run a command to its end."""
    return subprocess.run(
        [sys.executable, str(PROGRAM), *map(str, words)],
        cwd=cwd,
        env=clean_environment(**environment),
        capture_output=True,
        text=True,
        timeout=DEADLINE,
        check=False,
        stdin=subprocess.DEVNULL,
    )


class Program:
    """A nightcrier that runs; what it logs (JSON lines) is read as it comes."""

    def __init__(
        self,
        *words: str | Path,
        cwd: Path,
        environment: Mapping[str, str] | None = None,
        wrapper: Sequence[str] = (),
        program: Path = PROGRAM,
    ) -> None:
        self.process = subprocess.Popen(
            [*wrapper, sys.executable, str(program), *map(str, words)],
            cwd=cwd,
            env=clean_environment(**(environment or {})),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
        )
        self.out: list[str] = []
        self.err: list[str] = []
        self._changed = threading.Condition()
        self._readers = [
            threading.Thread(target=self._read, args=(stream, lines), daemon=True)
            for stream, lines in ((self.process.stdout, self.out), (self.process.stderr, self.err))
        ]
        for reader in self._readers:
            reader.start()

    def _read(self, stream: Any, lines: list[str]) -> None:
        with stream:
            for line in stream:
                with self._changed:
                    lines.append(line.rstrip("\n"))
                    self._changed.notify_all()
        with self._changed:
            self._changed.notify_all()

    def wait_for(self, words: str, count: int = 1) -> str:
        """The n-th line of the log that has these words, once it is there."""

        def found() -> list[str]:
            return [line for line in self.err if words in line]

        with self._changed:
            ok = self._changed.wait_for(
                lambda: len(found()) >= count or self.process.poll() is not None, DEADLINE
            )
            complaint = f"no {words!r} in:\n" + "\n".join(self.err[-30:])
            assert ok, complaint
            assert len(found()) >= count, complaint
            return found()[count - 1]

    def log(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in list(self.err) if line.startswith("{")]

    def signal(self, number: signal.Signals = signal.SIGTERM) -> None:
        self.process.send_signal(number)

    def ends(self, seconds: float = DEADLINE) -> int:
        """The exit code, once it has ended and everything that it said was read."""
        code = self.process.wait(seconds)
        for reader in self._readers:
            reader.join(DEADLINE)
        return code

    def stop(self) -> int:
        self.signal()
        return self.ends()

    @functools.cached_property
    def address(self) -> str:
        """Of the health endpoints: `--health-listen 127.0.0.1:0` takes a free port."""
        return str(json.loads(self.wait_for("health endpoint"))["address"])

    def get(self, path: str) -> tuple[int, str]:
        return get(self.address, path)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exception: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.ends()


def get(address: str, path: str, method: str = "GET") -> tuple[int, str]:
    """Status and body of an HTTP request."""
    with contextlib.closing(http.client.HTTPConnection(address, timeout=DEADLINE)) as connection:
        connection.request(method, path)
        response = connection.getresponse()
        return response.status, response.read().decode()


Fake = TypeVar("Fake", bound=FakeMCP)


class Clusters(Generic[Fake]):
    """Simulated clusters on one port, in a thread with its own event loop."""

    def __init__(self, *names: str, kind: Callable[[str], Fake] = FakeMCP) -> None:  # type: ignore[assignment]
        self.fakes = {name: kind(name) for name in names}
        self.url = ""
        self._loop = asyncio.new_event_loop()
        self._server = HTTPServer(simulated_clusters(self.fakes.values()))
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._ready = threading.Event()

    def _serve(self) -> None:
        async def start() -> None:
            _, port = await self._server.start("127.0.0.1", 0)
            self.url = f"http://127.0.0.1:{port}"
            self._ready.set()

        self._loop.run_until_complete(start())
        self._loop.run_forever()
        self._loop.run_until_complete(self._server.close())
        self._loop.close()

    def __enter__(self) -> Self:
        self._thread.start()
        assert self._ready.wait(DEADLINE)
        return self

    def __exit__(self, *_exception: object) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    def do(self, work: Callable[[], T]) -> T:
        """Run in the thread of the clusters."""

        async def called() -> T:
            return work()

        return asyncio.run_coroutine_threadsafe(called(), self._loop).result(DEADLINE)

    def flags(self, *names: str) -> list[str]:
        wanted = names or tuple(self.fakes)
        return [word for n in wanted for word in ("--cluster", f"{n}={self.url}/{n}/mcp")]

    def watched(self, name: str) -> bool:
        """Whether a fault would reach somebody now."""
        sessions = self.fakes[name].sessions.values()
        return self.do(lambda: any(s.stream and s.wants_logs and s.sending for s in sessions))

    def await_watch(self, *names: str) -> None:
        for name in names or tuple(self.fakes):
            eventually(lambda name=name: self.watched(name), f"a watch of {name}")

    def emit(self, cluster: str, name: str = "web-1", **changes: str) -> bool:
        """Let a fault happen; whether it was written to an open stream."""
        return self.do(lambda: self.fakes[cluster].emit(a_fault(name, **changes)))


def rows(path: Path, sql: str, *params: object) -> list[tuple[Any, ...]]:
    """Ask the database with another library, as a person would."""
    with contextlib.closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as connection:
        return connection.execute(sql, params).fetchall()


def statuses(path: Path) -> dict[str, int]:
    return dict(rows(path, "select status, count(*) from incidents group by status"))


def processes_with(words: str) -> Iterator[int]:
    """Living processes that have these words in their command line."""
    for folder in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if folder.name.isdecimal() and words.encode() in (folder / "cmdline").read_bytes():
                yield int(folder.name)


def children(pid: int) -> Iterator[int]:
    """Processes that a process has started itself, also those that have ended."""
    for folder in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if folder.name.isdecimal():
                parent = (folder / "stat").read_text().rpartition(")")[2].split()[1]
                if int(parent) == pid:
                    yield int(folder.name)
