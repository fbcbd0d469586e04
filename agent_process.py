"""Runs agents: programs that die with the process that started them, and that nobody trusts.

1. The supervisor: a small process of its own is the parent of every program. It holds the other
   end of a socket of this process, so it learns at once that this process is gone, however it
   died, and kills what runs.
2. Programs: each runs to its end or to its limits.
3. Agents: how each kind is run, what it is given, and what it says of its usage.
4. What was left: files where a program could put anything, and their place in the next run.

Nothing here knows of incidents. nightcrier.py uses this module; it imports nothing from there.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import functools
import inspect
import json
import os
import re
import resource
import secrets
import select
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import (
    AsyncIterator,
    Awaitable,
    Callable,
    Collection,
    Iterator,
    Mapping,
    Sequence,
)
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, BinaryIO

# ============================================================================
# 1. Supervisor
# There is no moment at which a program could be left behind.
# ============================================================================


def signal_name(exit_code: int) -> str | None:
    """The signal that ended a process, from minus its number; None if it exited."""
    if exit_code >= 0:
        return None
    try:
        return signal.Signals(-exit_code).name
    except ValueError:
        return f"signal {-exit_code}"


def process_start_time(pid: int) -> datetime | None:
    """When a process started, to the clock tick; None if it is gone or the system does not tell.

    proc(5): field 22 of /proc/PID/stat, in ticks since the boot time of /proc/stat.
    """
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
        ticks = int(fields.rpartition(")")[2].split()[19])
        booted = re.search(r"^btime (\d+)$", Path("/proc/stat").read_text(), re.MULTILINE)
    except (OSError, ValueError, IndexError):
        return None
    if booted is None:
        return None
    seconds = int(booted[1]) + ticks / os.sysconf("SC_CLK_TCK")
    return datetime.fromtimestamp(seconds, UTC)


def is_supervised(pid: int) -> bool:
    """Whether a process is the child of a living supervisor, which will not leave it behind."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
        parent = fields.rpartition(")")[2].split()[1]
        return _SupervisorProcess.__name__.encode() in Path(f"/proc/{parent}/cmdline").read_bytes()
    except (OSError, IndexError):
        return False


def kill_leftover(pid: int | None, started_at: datetime | None) -> bool:
    """Kill the group of a process that was left behind; whether that was done.

    A pid is only believed together with the time at which its process started. Children of other
    supervisors on this host, which live, are left alone: their supervisors do.
    """
    if pid is None or started_at is None or is_supervised(pid):
        return False
    started = process_start_time(pid)
    # The boot time is known to the second only, and a clock that is set moves it.
    if started is None or abs(started - started_at) >= timedelta(seconds=2):
        return False
    with contextlib.suppress(OSError):
        os.killpg(pid, signal.SIGKILL)
        return True
    return False


class _SupervisorProcess:
    """The whole program of the supervisor, which runs in a bare interpreter of its own.

    Requests come on a socket that is standard input, with the file descriptors of the new
    process; answers go to standard output, a JSON object a line. End of file on the socket means
    that the parent is gone, however it died: then every program is killed at once.
    """

    IMPORTS = (
        "import contextlib, ctypes, json, os, resource, select, signal, socket, subprocess"
        "\nimport sys, time"
    )

    def __init__(self) -> None:
        self.children: dict[int, str] = {}  # pid: the run's name
        # A death wakes `select` through a pipe: a signal just before a system call would be missed.
        self.woken, waker = os.pipe()
        for end in (self.woken, waker):
            os.set_blocking(end, False)
        signal.set_wakeup_fd(waker, warn_on_full_buffer=False)
        # Handlers, not SIG_IGN: programs would inherit that, and could not be ended by a signal.
        for number in (signal.SIGCHLD, signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, lambda *_: None)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        if sys.platform == "linux":
            # PR_SET_CHILD_SUBREAPER: a descendant that daemonised becomes ours, and can be killed.
            ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)

    def run(self) -> None:
        try:
            self.serve()
        finally:
            for pid in self.children:
                self.kill(pid, group=True)
            self.children.clear()
            self.clear()

    def serve(self) -> None:
        requests = socket.socket(fileno=0)
        data = b""
        received: list[int] = []
        while True:
            ready, _, _ = select.select([requests.fileno(), self.woken], [], [])
            if self.woken in ready:
                os.read(self.woken, 4096)
                self.reap()
            if requests.fileno() not in ready:
                continue
            try:
                piece, files, _, _ = socket.recv_fds(requests, 65536, 3)
            except OSError:
                piece, files = b"", []
            if not piece:
                return
            received += files
            *lines, data = (data + piece).split(b"\n")
            for line in lines:
                self.obey(json.loads(line), received)

    def obey(self, request: dict[str, Any], received: list[int]) -> None:
        if "argv" in request:
            files = [received.pop(0) for _ in range(3)]
            self.spawn(request, files)
            for file in files:
                os.close(file)
        for pid, run in self.children.items():
            if run == request.get("signal"):
                self.kill(pid, group=True, number=request["number"])

    def spawn(self, request: dict[str, Any], files: list[int]) -> None:
        try:
            process = subprocess.Popen(  # noqa: S603 (a list of words: no shell)
                request["argv"],
                cwd=request["cwd"],
                env=request["env"],
                stdin=files[0],
                stdout=files[1],
                stderr=files[2],
                start_new_session=True,
            )
        except (OSError, ValueError) as error:
            self.answer(run=request["run"], error=str(error))
            return
        process.returncode = 0  # collected by reap(), not by the object
        self.children[process.pid] = request["run"]
        self.answer(run=request["run"], pid=process.pid)

    def answer(self, **message: object) -> None:
        with contextlib.suppress(OSError):  # nobody listens: end of file on the socket follows
            os.write(1, json.dumps(message).encode() + b"\n")

    def reap(self) -> None:
        """Collect what has ended."""
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            run = self.children.pop(pid, None)
            if run is not None:
                self.kill(pid, group=True)  # its number stays taken while one of the group lives
            self.clear()
            if run is not None:
                self.answer(run=run, exited=os.waitstatus_to_exitcode(status))

    def clear(self) -> None:
        """Kill what outlived its program; each death may hand over further descendants."""
        for _ in range(50):
            found, unclear = self.strays()
            if not found and not unclear:
                return
            for pid in found:
                self.kill(pid, group=False)
            time.sleep(0.002)
            for pid in found:
                with contextlib.suppress(OSError):
                    os.waitpid(pid, os.WNOHANG)

    def strays(self) -> tuple[list[int], bool]:
        """Adopted descendants of programs that have ended; whether there may be more.

        A variable that all inherit tells which those are; who dropped it goes with the last one.
        While a process begins another program (execve) it shows no variables at all: such a one
        is to be looked at again.
        """
        running = {f"SUPERVISED_RUN={run}".encode() for run in self.children.values()}
        found, unclear = [], False
        with contextlib.suppress(OSError), open(f"/proc/self/task/{os.getpid()}/children") as file:
            for pid in {int(pid) for pid in file.read().split()} - self.children.keys():
                with contextlib.suppress(OSError), open(f"/proc/{pid}/environ", "rb") as environ:
                    words = environ.read().split(b"\0")
                    marks = {word for word in words if word.startswith(b"SUPERVISED_RUN=")}
                    if not running or (marks and not marks & running):
                        found.append(pid)
                    elif words == [b""]:
                        unclear = True
        return found, unclear

    def kill(self, pid: int, *, group: bool, number: int = 9) -> None:
        with contextlib.suppress(OSError):
            (os.killpg if group else os.kill)(pid, number)


@functools.cache
def _supervisor_source() -> str:
    return (
        f"from __future__ import annotations\n{_SupervisorProcess.IMPORTS}\n"
        f"{inspect.getsource(_SupervisorProcess)}\n_SupervisorProcess().run()\n"
    )


class SupervisedProcess:
    """A process started by the Supervisor."""

    def __init__(self, run: str, pid: int, supervisor: Supervisor) -> None:
        self.pid = pid
        self.started_at = process_start_time(pid)
        self.exit_code: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._run = run
        self._supervisor = supervisor

    def signal(self, number: int) -> None:
        """Send a signal to the whole process group."""
        with contextlib.suppress(OSError):  # the supervisor is gone, and the process with it
            self._supervisor.request({"signal": self._run, "number": number})


class Supervisor:
    """Starts processes that die when this process dies, however it dies.

    A small process of its own holds the other end of a socket and is the parent of the programs: it
    knows each of them from the moment it exists, so there is no window in which one could be left
    behind. It is started with the first agent, and again if somebody killed it.
    """

    def __init__(self) -> None:
        self._requests: socket.socket | None = None
        self._process: asyncio.subprocess.Process | None = None
        self._reader: asyncio.Task[None] | None = None
        self._starting: dict[str, asyncio.Future[SupervisedProcess]] = {}
        self._running: dict[str, SupervisedProcess] = {}
        self._lock = asyncio.Lock()
        self._source = _supervisor_source()  # now: later, somebody may have replaced the file

    async def start(self) -> None:
        async with self._lock:
            if self._requests is not None:
                return
            ours, theirs = socket.socketpair()
            keep = ("PATH", "LANG", "LD_LIBRARY_PATH")
            try:
                self._process = await asyncio.create_subprocess_exec(
                    *(sys.executable, "-I", "-S", "-c", self._source),
                    stdin=theirs.fileno(),
                    stdout=asyncio.subprocess.PIPE,
                    env={name: os.environ[name] for name in keep if name in os.environ},
                    start_new_session=True,  # Ctrl-C at a terminal is its parent's business
                )
            finally:
                theirs.close()
            ours.settimeout(10.0)
            self._requests = ours
            self._reader = asyncio.create_task(self._read(self._process), name="supervisor")

    async def spawn(
        self, argv: Sequence[str], cwd: Path, env: Mapping[str, str], files: Sequence[int]
    ) -> SupervisedProcess:
        """Start a process in a session of its own; raises OSError if it cannot be started.

        `files` are its stdin, stdout and stderr.
        """
        await self.start()
        run = secrets.token_hex(16)
        started: asyncio.Future[SupervisedProcess] = asyncio.get_running_loop().create_future()
        self._starting[run] = started
        marked = {**env, "SUPERVISED_RUN": run}
        try:
            self.request({"run": run, "argv": list(argv), "cwd": str(cwd), "env": marked}, files)
            return await asyncio.shield(started)
        except OSError:
            self._starting.pop(run, None)
            raise
        except asyncio.CancelledError:
            # It may be on its way, and nobody would end it any more.
            started.add_done_callback(_kill_unwanted)
            raise

    def request(self, message: Mapping[str, Any], files: Sequence[int] = ()) -> None:
        """Tell the supervisor process something; raises OSError if it is gone."""
        if self._requests is None:
            raise OSError("the supervisor is gone")
        line = json.dumps(message).encode() + b"\n"
        sent = socket.send_fds(self._requests, [line], list(files)) if files else 0
        self._requests.sendall(line[sent:])

    async def _read(self, process: asyncio.subprocess.Process) -> None:
        assert process.stdout is not None
        while line := await process.stdout.readline():
            self._take(json.loads(line))
        await process.wait()
        self._gone()

    def _take(self, message: Mapping[str, Any]) -> None:
        run = message["run"]
        if "exited" in message:
            ended = self._running.pop(run, None)
            if ended is not None and not ended.exit_code.done():
                ended.exit_code.set_result(message["exited"])
            return
        started = self._starting.pop(run)
        if "error" in message:
            started.set_exception(OSError(message["error"]))
            started.exception()  # retrieved, should nobody wait for it any more
        else:
            process = SupervisedProcess(run, message["pid"], self)
            self._running[run] = process
            started.set_result(process)

    def _gone(self) -> None:
        """The supervisor has ended: should it have been killed, its programs are ours to kill."""
        self._hang_up()
        for process in self._running.values():
            with contextlib.suppress(OSError):
                os.killpg(process.pid, signal.SIGKILL)
            if not process.exit_code.done():
                process.exit_code.set_result(-signal.SIGKILL)
        for started in self._starting.values():
            started.set_exception(OSError("the supervisor was killed"))
            started.exception()
        self._running.clear()
        self._starting.clear()

    def _hang_up(self) -> None:
        if self._requests is not None:
            self._requests.close()
            self._requests = None

    async def close(self) -> None:
        """Kill what still runs, and end the supervisor."""
        self._hang_up()
        if self._reader is not None:
            await self._reader


def _kill_unwanted(started: asyncio.Future[SupervisedProcess]) -> None:
    if not started.cancelled() and started.exception() is None:
        started.result().signal(signal.SIGKILL)


# ============================================================================
# 2. Programs
# No time, and no output that is kept, is without a limit.
# ============================================================================


class _Capture(asyncio.Protocol):
    """Keeps the beginning of a stream in a file and its end in memory, and counts the rest."""

    TAIL = 65_536
    NOTE = "\n[{} bytes left out]\n"

    def __init__(self, path: Path, limit: int) -> None:
        self._file = path.open("wb", buffering=0)
        self._room = limit
        self._tail = b""
        self._left_out = 0
        self.closed: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def data_received(self, data: bytes) -> None:
        kept, rest = data[: self._room], data[self._room :]
        if kept:
            self._room -= len(kept)
            try:
                self._file.write(kept)
            except OSError:  # a full disk: the program goes on, its output is not kept
                rest, self._room = data, 0
        if rest:
            self._left_out += len(rest)
            self._tail = (self._tail + rest)[-self.TAIL :]

    def connection_lost(self, _error: Exception | None) -> None:
        with contextlib.suppress(OSError):
            if left_out := self._left_out - len(self._tail):
                self._file.write(self.NOTE.format(left_out).encode())
            self._file.write(self._tail)
        self._file.close()
        if not self.closed.done():
            self.closed.set_result(None)


def kept_output(limit: int) -> int:
    """How large the file of a stream is at most, of which the first `limit` bytes are kept."""
    return limit + _Capture.TAIL + len(_Capture.NOTE) + 20


@contextlib.asynccontextmanager
async def _captured(path: Path, limit: int) -> AsyncIterator[BinaryIO]:
    """A pipe whose reading end goes to a capped file; yields the writing end.

    The reading ends with the program: a grandchild that keeps the pipe open does not hold it up.
    """
    capture = _Capture(path, limit)  # before the pipe, which nobody would close if this fails
    loop = asyncio.get_running_loop()
    read_end, write_end = os.pipe()
    with os.fdopen(write_end, "wb", buffering=0) as writing:
        reading = os.fdopen(read_end, "rb", buffering=0)
        transport, _ = await loop.connect_read_pipe(lambda: capture, reading)
        try:
            yield writing
        finally:
            writing.close()
            try:
                async with asyncio.timeout(1.0):
                    await asyncio.shield(capture.closed)
            except TimeoutError:
                pass
            finally:
                transport.close()
            await capture.closed


@dataclass(frozen=True, slots=True, kw_only=True)
class ProgramEnd:
    """How a program ended: its exit code, or minus the signal that ended it."""

    exit_code: int
    timed_out: bool

    @property
    def how(self) -> str:
        name = signal_name(self.exit_code)
        return f"was killed by {name}" if name else f"exited with code {self.exit_code}"


_KILL_AFTER = 10.0  # seconds between TERM and KILL


@dataclass(frozen=True, slots=True, kw_only=True)
class Program:
    """What to run. `output_limit` bounds, in bytes, what is kept of each of stdout and stderr."""

    argv: Sequence[str]
    cwd: Path
    env: Mapping[str, str]
    stdin: Path
    stdout: Path
    stderr: Path
    output_limit: int
    time_limit: float  # seconds


async def run_program(
    supervisor: Supervisor,
    program: Program,
    on_started: Callable[[SupervisedProcess], Awaitable[None]],
) -> ProgramEnd:
    """Run a program to its end, or to its time limit. Cancelling kills it.

    Raises OSError if it cannot be started. When this returns, nothing of its process group runs.
    """
    async with (
        _captured(program.stdout, program.output_limit) as out,
        _captured(program.stderr, program.output_limit) as err,
    ):
        with program.stdin.open("rb") as read:
            files = (read.fileno(), out.fileno(), err.fileno())
            process = await supervisor.spawn(program.argv, program.cwd, program.env, files)
        out.close()  # the program has it now: the end of its output can be seen
        err.close()
        try:
            await on_started(process)
            return await _wait_for(process, program.time_limit)
        finally:
            if not process.exit_code.done():
                process.signal(signal.SIGKILL)
                await asyncio.shield(process.exit_code)


async def _wait_for(process: SupervisedProcess, limit: float) -> ProgramEnd:
    try:
        async with asyncio.timeout(limit):
            return ProgramEnd(exit_code=await asyncio.shield(process.exit_code), timed_out=False)
    except TimeoutError:
        process.signal(signal.SIGTERM)
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(_KILL_AFTER):
            return ProgramEnd(exit_code=await asyncio.shield(process.exit_code), timed_out=True)
    process.signal(signal.SIGKILL)
    return ProgramEnd(exit_code=await asyncio.shield(process.exit_code), timed_out=True)


async def read_output(argv: Sequence[str], env: Mapping[str, str], limit: float) -> str:
    """What a program prints within `limit` seconds; empty if it cannot be started or takes longer.

    It is a child of this process itself, and does not outlive the call.
    """
    try:
        process = await asyncio.create_subprocess_exec(
            *argv,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
            env=env,
        )
    except OSError:
        return ""
    try:
        async with asyncio.timeout(limit):
            stdout, _ = await process.communicate()
    except TimeoutError:
        return ""
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    return stdout.decode("utf-8", errors="replace")


# ============================================================================
# 3. Agents
# Data, as far as it goes; what an agent says of itself is never an error.
# ============================================================================


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """What a run consumed, as far as the agent says so."""

    input_tokens: int | None = None
    output_tokens: int | None = None
    cost_usd: float | None = None
    raw: str | None = None  # JSON, as reported


@dataclass(frozen=True, slots=True, kw_only=True)
class UsageEvent:
    """Where an agent says what it consumed: in the last line of stdout that is of a `type`."""

    type: str
    place: str = ""  # the mapping in it that has the numbers; empty: the line itself
    inputs: tuple[str, ...]  # keys of numbers to be added up
    output: str = "output_tokens"
    total: str = ""  # given: the output is what this has beyond the input
    cost: str = ""  # key in the line itself
    kept: tuple[str, ...]  # keys of the line itself that are stored


@dataclass(frozen=True, slots=True, kw_only=True)
class Preset:
    """How to run one kind of agent: data, so that the next one is a new entry.

    The prompt always comes on stdin, never on the command line. `settings` has, for options and
    variables that the agent understands, the words that are appended to `argv`, in this order and
    with {value} filled in. `files` are written into the workspace, with {tools} as a JSON list.
    """

    argv: tuple[str, ...]
    settings: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    tool_names: Mapping[str, str] = field(default_factory=dict)  # claude's: its own
    files: Mapping[str, str] = field(default_factory=dict)
    version: tuple[str, ...] = ()
    # Provider (empty: the only one): the option that holds its key, and the agent's variable for it
    credentials: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    variables: Mapping[str, str] = field(default_factory=dict)  # that it always has
    environment: tuple[str, ...] = ()  # further variables that it may have
    usage: UsageEvent | None = None


PRESETS: Mapping[str, Preset] = {
    # Claude Code 2.1.197, tried (`claude --help`; --max-turns is there and not listed): print mode,
    # only the tools that are allowed, no settings of a project directory, no session file.
    "claude": Preset(
        argv=(
            *("claude", "--print", "--output-format", "stream-json", "--verbose"),
            *("--no-session-persistence", "--strict-mcp-config", "--setting-sources", "user"),
            *("--permission-mode", "dontAsk"),
        ),
        settings={
            "agent_model": ("--model", "{value}"),
            "agent_max_turns": ("--max-turns", "{value}"),
            "agent_allowed_tools": ("--allowedTools", "{value}"),
        },
        version=("claude", "--version"),
        credentials={"": ("anthropic_api_key", "ANTHROPIC_API_KEY")},
        environment=("ANTHROPIC_BASE_URL", "CLAUDE_CONFIG_DIR"),
        usage=UsageEvent(
            type="result",
            place="usage",
            inputs=("input_tokens", "cache_creation_input_tokens", "cache_read_input_tokens"),
            cost="total_cost_usd",
            kept=("usage", "modelUsage", "total_cost_usd", "num_turns", "duration_ms"),
        ),
    ),
    # Codex 0.169.0, tried (`codex exec --help`, and its configuration reference). Its one tool is
    # a shell, in a sandbox in which only the workspace is writable. The network must be open, for
    # kubectl. Keys of --config give way to options such as --sandbox among the further arguments.
    # It does not read OPENAI_BASE_URL any more, and it does not know what a run costs.
    "codex": Preset(
        argv=(
            *("codex", "exec", "--json", "--skip-git-repo-check", "--ephemeral"),
            *("--ignore-user-config", "--ignore-rules", "--config", "sandbox_mode=workspace-write"),
            *("--config", "sandbox_workspace_write.network_access=true"),
            *("--config", "sandbox_workspace_write.exclude_slash_tmp=true"),
            *("--config", "sandbox_workspace_write.exclude_tmpdir_env_var=true"),
            *("--config", 'shell_environment_policy.exclude=["CODEX_API_KEY"]'),
            *("--config", "web_search=disabled"),
        ),
        settings={
            "OPENAI_BASE_URL": ("--config", "openai_base_url={value}"),
            "agent_model": ("--model", "{value}"),
        },
        version=("codex", "--version"),
        credentials={"": ("openai_api_key", "CODEX_API_KEY")},
        environment=("OPENAI_BASE_URL", "CODEX_HOME"),
        usage=UsageEvent(
            type="turn.completed",
            place="usage",
            inputs=("input_tokens",),  # the cached ones are among them, as in the output reasoning
            kept=("usage",),
        ),
    ),
    # Gemini CLI 0.61.0, tried (`gemini --help`, docs/reference/policy-engine.md of the package).
    # Its default mode refuses what a person would have to confirm; a policy allows the tools, and
    # hides the others. With GOOGLE_GEMINI_BASE_URL it wants the kind of its key in its own
    # settings.json (security.auth.selectedType). It does not know what a run costs.
    "gemini": Preset(
        argv=(
            *("gemini", "--output-format", "stream-json", "--approval-mode", "default"),
            *("--policy", "{workspace}/gemini-policy.toml", "--extensions", "none"),
            *("--allowed-mcp-server-names", "none", "--skip-trust"),
        ),
        settings={"agent_model": ("--model", "{value}"), "agent_allowed_tools": ()},
        tool_names={
            "Read": "read_file",
            "Write": "write_file",
            "Edit": "replace",
            "Grep": "grep_search",
            "Glob": "glob",
            "Bash": "run_shell_command",
            "WebFetch": "web_fetch",
        },
        files={
            "gemini-policy.toml": """\
[[rule]]
toolName = "*"
decision = "deny"
priority = 1

[[rule]]
toolName = {tools}
decision = "allow"
priority = 2
allowRedirection = true
"""
        },
        version=("gemini", "--version"),
        credentials={"": ("gemini_api_key", "GEMINI_API_KEY")},
        environment=("GOOGLE_GEMINI_BASE_URL", "GEMINI_CLI_HOME"),
        usage=UsageEvent(
            type="result",
            place="stats",
            inputs=("input_tokens",),
            total="total_tokens",  # output_tokens is without the thoughts, which are paid for
            kept=("stats",),
        ),
    ),
    # goose 1.50, not tried: from documentation/docs/guides/goose-cli-commands.md and the sources
    # (crates/goose-cli/src/cli.rs, session/mod.rs). Only the extension "developer": a shell and an
    # editor. Who is to be paid is the provider's matter: its key, and no other, is handed over.
    "goose": Preset(
        argv=(
            *("goose", "run", "--no-session", "--no-profile", "--with-builtin", "developer"),
            *("--output-format", "stream-json", "--instructions", "-"),
        ),
        settings={
            "agent_provider": ("--provider", "{value}"),
            "agent_model": ("--model", "{value}"),
            "agent_max_turns": ("--max-turns", "{value}"),
        },
        version=("goose", "--version"),
        credentials={
            "anthropic": ("anthropic_api_key", "ANTHROPIC_API_KEY"),
            "openai": ("openai_api_key", "OPENAI_API_KEY"),
            "google": ("gemini_api_key", "GOOGLE_API_KEY"),
        },
        variables={
            "GOOSE_MODE": "auto",  # nobody is there to confirm
            "GOOSE_DISABLE_KEYRING": "1",
            "GOOSE_DISABLE_SESSION_NAMING": "1",  # costs a call of the model
        },
        environment=("GOOSE_PROVIDER", "GOOSE_MODEL", "ANTHROPIC_HOST", "OPENAI_HOST"),
        usage=UsageEvent(
            type="complete",
            inputs=("input_tokens",),
            cost="cost_usd",
            kept=("input_tokens", "output_tokens", "total_tokens", "cost_usd"),
        ),
    ),
    "command": Preset(argv=()),
}


def last_event(printed: str, kind: str) -> dict[str, Any]:
    """The last line that is a JSON object of a `type`; empty if there is none."""
    for line in reversed(printed.split("\n")):
        if kind in line:
            with contextlib.suppress(ValueError, RecursionError):
                event = json.loads(line)
                if isinstance(event, dict) and event.get("type") == kind:
                    return event
    return {}


def usage_in(event: Mapping[str, Any], form: UsageEvent) -> Usage:
    """Tokens and cost, as far as they are there; cached input counts as input.

    Anything of another shape is no usage, never an error.
    """
    numbers = event.get(form.place) if form.place else event
    numbers = numbers if isinstance(numbers, dict) else {}
    counts = [count for key in form.inputs if (count := _amount(numbers.get(key))) is not None]
    output, total = _amount(numbers.get(form.output)), _amount(numbers.get(form.total))
    if total is not None and total >= sum(counts):
        output = total - sum(counts)
    raw = json.dumps({key: event[key] for key in form.kept if key in event})
    return Usage(
        input_tokens=int(sum(counts)) if counts else None,
        output_tokens=int(output) if output is not None else None,
        cost_usd=_amount(event.get(form.cost)),
        raw=raw if numbers and len(raw) < 20_000 else None,
    )


def _amount(value: object) -> float | None:
    """A number that every database can hold."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return value if 0 <= value < 2**53 else None


_PASSED_ON = (
    *("PATH", "HOME", "USER", "LOGNAME", "LANG", "LC_ALL", "LC_CTYPE", "TZ", "TMPDIR", "TERM"),
    *("HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "http_proxy", "https_proxy", "no_proxy"),
    *("SSL_CERT_FILE", "SSL_CERT_DIR", "NODE_EXTRA_CA_CERTS"),
)


def passed_on(inherited: Mapping[str, str], further: Collection[str] = ()) -> dict[str, str]:
    """Of the variables of this process, those that every agent may have, and further ones."""
    return {name: inherited[name] for name in (*_PASSED_ON, *further) if name in inherited}


def command_line(
    preset: Preset,
    command: Sequence[str],
    *,
    values: Mapping[str, str],
    arguments: Sequence[str],
    known: Mapping[str, str],
) -> list[str]:
    """The words of an agent's command, with those in `known` replaced wherever they stand.

    `command` is that of an agent whose preset has none. `values` are of options and variables;
    those that the agent does not understand, or that are empty, are left out.
    """
    words = [*(preset.argv or command), *arguments]
    for name, option in preset.settings.items():
        if value := values.get(name):
            words += [word.replace("{value}", value) for word in option]
    pattern = re.compile("|".join(re.escape(name) for name in known))
    argv = [pattern.sub(lambda found: known[found[0]], word) for word in words]
    if os.sep in argv[0]:
        argv[0] = os.path.abspath(argv[0])  # it starts in a directory of its own
    return argv


def own_names(preset: Preset, tools: Sequence[str]) -> list[str]:
    """Tools by the names that an agent has for them."""
    return [preset.tool_names.get(tool, tool) for tool in tools]


def own_files(preset: Preset, tools: Sequence[str]) -> dict[str, str]:
    """Name and content of the files that an agent is to find in its workspace."""
    listed = json.dumps(own_names(preset, tools), ensure_ascii=False)
    return {name: text.replace("{tools}", listed) for name, text in preset.files.items()}


# ============================================================================
# 4. What was left
# A program may have put anything in the place of a file.
# ============================================================================


class LeftInvalid(Exception):
    """What a program left cannot be used; the message says why."""


def set_aside(workspace: Path, prefix: str, name: str, unique: Callable[[], str]) -> None:
    """Move what an earlier run left in a directory to a new one in it, `<prefix><name>`.

    Those that are there already, by their prefix, stay; `unique` tells two of one name apart.
    """
    left = [entry for entry in workspace.iterdir() if not entry.name.startswith(prefix)]
    if not left:
        return
    earlier = workspace / f"{prefix}{name}"
    if os.path.lexists(earlier):
        earlier = workspace / f"{earlier.name}-{unique()}"
    earlier.mkdir(mode=0o700)
    for entry in left:
        entry.rename(earlier / entry.name)


@contextlib.contextmanager
def _folder_of(path: Path) -> Iterator[int]:
    """The directory of a file, opened without following a link that an agent put in its place."""
    folder = os.open(path.parent, os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        yield folder
    finally:
        os.close(folder)


def replace_left(workspace: Path, name: str, text: str) -> None:
    """Put a file where an agent may have left anything of that name; raises OSError.

    Links are not followed and not written through, and the file is there whole or not at all.
    """
    path = workspace / name
    unfinished = f".{path.name}.{secrets.token_hex(8)}"  # no agent can know it
    with _folder_of(path) as folder:
        os.fchmod(folder, 0o700)  # an agent may have closed it, to keep a page of its own there
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        handle = os.open(unfinished, flags, 0o600, dir_fd=folder)
        try:
            with open(handle, "w", encoding="utf-8") as file:
                file.write(text)
            os.rename(unfinished, path.name, src_dir_fd=folder, dst_dir_fd=folder)
        except OSError:
            os.unlink(unfinished, dir_fd=folder)
            raise


def read_left(workspace: Path, name: str, minimum: int, maximum: int) -> str:
    """Read what an agent left; raises LeftInvalid.

    The agent decides what is in its directory: links are not followed, a pipe is not waited for.
    """
    try:
        with _folder_of(workspace / name) as folder:
            flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
            handle = os.open(Path(name).name, flags, dir_fd=folder)
    except FileNotFoundError:
        raise LeftInvalid(f"the agent left no {name}") from None
    except OSError as error:
        raise LeftInvalid(f"{name} cannot be opened: {error.strerror}") from None
    try:
        found = os.fstat(handle)
        if not stat.S_ISREG(found.st_mode):
            raise LeftInvalid(f"{name} is not a plain file")
        if found.st_size < minimum:
            raise LeftInvalid(f"{name} has {found.st_size} bytes, less than {minimum}")
        if found.st_size > maximum:
            raise LeftInvalid(f"{name} has {found.st_size} bytes, more than {maximum}")
        return os.read(handle, found.st_size).decode("utf-8", errors="replace")
    finally:
        os.close(handle)
