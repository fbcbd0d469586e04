"""Starting the program: nightcrier.pyz beside a virtual environment, shiv and pex.

python tests/bench/startup.py [--pyz FILE …] [--python PY …] [--rounds 20] [--dir DIR]

For each Python that is found, or named with --python (3.11 and newer), the wheel of this checkout
becomes an installation in a virtual environment and files of shiv and pex, with the packages of
requirements.lock, which pip fetches. Beside them is dist/nightcrier.pyz, or the first --pyz that
runs with this Python: build it from the same checkout. shiv and pex come with
`pip install '.[bench]'`; one that is not there is left out, and a line says so.

`version` opens nothing, `migrate status` opens a database. A start is a process with HOME and PATH
and no other variable, from the spawn to its end; CPU is its own, and of the children it waits for.

- warm (no word for it in the tables): the home is one where both commands ran before.
- cold: each start has a new, empty home. The pages of the files are in memory, as they are warm.
- no cache: the home does not exist, so the native module goes through memory at each start.
- new Python: nightcrier.pyz without the bytecode of this Python, as if the build had not had it.

shiv and pex are built in the ways that start quickest: shiv without and with --compile-pyc (which
pays at the first start), pex with --compile and --sh-boot, and by the Python that runs it: else
--sh-boot does not find the environment that --venv has made.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from common import ROOT, fresh, rounds

Word = str | Path  # of a command

PYTHONS = ["3.11", "3.12", "3.13", "3.14", "3.15"]
OURS, NEW_PYTHON, REFERENCE = "nightcrier.pyz", "nightcrier.pyz, new Python", "venv"
PEERS = ["shiv", "shiv --compile-pyc", "pex", "pex --venv"]

# What is wanted, as multiples of the virtual environment's median.
WARM = {"version": 1.5, "migrate status": 1.1}
COLD = 2.0

ABOUT_PYTHON = """
import importlib.util, json, platform, sys
print(json.dumps([platform.python_version(), sys.implementation.cache_tag,
                  importlib.util.MAGIC_NUMBER.hex(), sys.version_info >= (3, 11)]))
"""


@dataclass(frozen=True)
class Python:
    path: Path
    version: str
    tag: str
    magic: bytes


@dataclass(frozen=True)
class Contestant:
    name: str
    program: list[Word]
    size: int = 0
    states: tuple[str, ...] = ("warm", "cold")

    @property
    def file_name(self) -> str:
        """Without spaces: a file of pex does not start from a home that has one in its path."""
        return re.sub(r"[^\w.]+", "-", self.name)


# --- Interpreters ---


def look_at(path: Path | str) -> Python | None:
    """None unless it runs (a pyenv shim has not always something behind it) and is supported."""
    command = [path, "-I", "-c", ABOUT_PYTHON]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    version, tag, magic, is_supported = json.loads(done.stdout)
    return Python(Path(path), version, tag, bytes.fromhex(magic)) if is_supported else None


def find_pythons() -> Iterator[Python]:
    for version in PYTHONS:
        pyenv = sorted(Path.home().glob(f".pyenv/versions/{version}.*/bin/python{version}"))
        paths = [*pyenv, shutil.which(f"python{version}")]
        found = [python for path in paths if path and (python := look_at(path))]
        yield from found[:1]


def named_python(name: str) -> Python:
    python = look_at(path) if (path := shutil.which(name)) else None
    if not python:
        raise argparse.ArgumentTypeError(f"{name} is no Python 3.11 or newer that runs")
    return python


# --- One start ---


class Host:
    """A PATH whose python3 is the one that is measured, and homes."""

    def __init__(self, folder: Path, python: Python) -> None:
        self.folder, self.python = folder, python
        self._bin = folder / "bin"
        self._bin.mkdir(parents=True)
        (self._bin / "python3").symlink_to(python.path)
        database = str(folder / "nightcrier.db")
        self.migrate_up = ["migrate", "up", "--sqlite", database]
        self.commands = {
            "version": ["version"],
            "migrate status": ["migrate", "status", "--sqlite", database],
        }

    def start(
        self, contestant: Contestant, arguments: list[str], home: Path
    ) -> tuple[float, float]:
        """Milliseconds from the spawn to the end, and those of CPU."""
        command = [str(word) for word in [*contestant.program, *arguments]]
        environment = {"HOME": str(home), "PATH": f"{self._bin}:/usr/bin:/bin"}
        errors = self.folder / "stderr"
        new = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
        files = [
            (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
            (os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0),
            (os.POSIX_SPAWN_OPEN, 2, str(errors), new, 0o600),
        ]
        began = time.perf_counter()
        pid = os.posix_spawn(command[0], command, environment, file_actions=files)
        _, status, usage = os.wait4(pid, 0)
        seconds = time.perf_counter() - began
        if status:
            raise RuntimeError(f"{' '.join(command)} failed: {errors.read_text().strip()}")
        return seconds * 1000, (usage.ru_utime + usage.ru_stime) * 1000

    def start_in(
        self, state: str, contestant: Contestant, arguments: list[str]
    ) -> tuple[float, float]:
        if state == "warm":
            return self.start(contestant, arguments, self.warm_home(contestant))
        if state == "no cache":
            return self.start(contestant, arguments, self.folder / "no-home")
        home = Path(tempfile.mkdtemp(prefix="home-", dir=self.folder))
        try:
            return self.start(contestant, arguments, home)
        finally:
            shutil.rmtree(home)

    def warm_home(self, contestant: Contestant) -> Path:
        return self.folder / "homes" / contestant.file_name

    def warm_up(self, contestant: Contestant) -> None:
        self.warm_home(contestant).mkdir(parents=True)
        for arguments in [*self.commands.values()] * 2:
            self.start_in("warm", contestant, arguments)


# --- The contestants ---


def run(*command: Word, **variables: str) -> None:
    done = subprocess.run(
        command, env=os.environ | variables, capture_output=True, text=True, check=False
    )
    if done.returncode:
        sys.exit(f"{done.stderr}{' '.join(map(str, command))} failed")


def make_wheel(folder: Path) -> Path:
    run(sys.executable, "-m", "pip", "wheel", "--no-deps", f"--wheel-dir={folder}", ROOT)
    [wheel] = folder.glob("*.whl")
    return wheel


def make_venv(host: Host, wheel: Path) -> Path:
    """Without a pip of its own, which shiv would carry along."""
    venv, constraints = host.folder / "venv", host.folder / "constraints"
    pins = re.findall(r"^[\w.-]+==\S+", (ROOT / "requirements.lock").read_text(), re.MULTILINE)
    constraints.write_text("\n".join(pins))
    run(host.python.path, "-m", "venv", "--without-pip", venv)
    pip: list[Word] = [sys.executable, "-m", "pip", "--python", venv / "bin" / "python"]
    run(*pip, "install", f"--constraint={constraints}", wheel)
    return venv


def shiv(host: Host, venv: Path, _: Path) -> Iterator[Contestant]:
    [packages] = venv.glob("lib/python*/site-packages")
    for name in ("shiv", "shiv --compile-pyc"):
        output = host.folder / f"{name.replace(' ', '')}.pyz"
        what: list[Word] = ["--site-packages", packages, "--console-script", "nightcrier"]
        where: list[Word] = ["--python", host.python.path, "--output-file", output]
        run(sys.executable, "-m", "shiv", *what, *where, *name.split()[1:])
        yield Contestant(name, [output], output.stat().st_size)


def pex(host: Host, venv: Path, package: Path) -> Iterator[Contestant]:
    tools = host.folder / "tools"
    shutil.copytree(package, tools / "pex")
    for name in ("pex", "pex --venv"):
        output = host.folder / f"{name.replace(' ', '')}.pex"
        what: list[Word] = ["nightcrier", "--console-script", "nightcrier"]
        what += ["--venv-repository", venv]
        where: list[Word] = ["--pex-root", tools / "root", "--python-shebang", host.python.path]
        options: list[Word] = ["--compile", "--sh-boot", "--output-file", output, *name.split()[1:]]
        run(host.python.path, "-m", "pex", *what, *where, *options, PYTHONPATH=str(tools))
        yield Contestant(name, [output], output.stat().st_size)


def ours(host: Host, files: list[Path]) -> Iterator[Contestant]:
    """The first file that has an apsw for this Python, and the same without bytecode for it."""
    refusals = []
    for file in files:
        output = host.folder / OURS
        shutil.copy(file, output)
        found = Contestant(OURS, [output], output.stat().st_size, ("warm", "cold", "no cache"))
        try:
            host.start_in("cold", found, host.commands["migrate status"])
        except RuntimeError as error:
            refusals.append(f"left out: {error}")
            continue
        yield found
        bare = host.folder / "new-python.pyz"
        if leave_bytecode_out(output, bare, host.python):
            yield Contestant(NEW_PYTHON, [bare], bare.stat().st_size, found.states)
        else:
            print(f"{file} has no bytecode of Python {host.python.version}: it is a new Python")
        return
    print("\n".join(refusals))


def leave_bytecode_out(pyz: Path, output: Path, python: Python) -> bool:
    """Whether there was any. This knows where zipapp/pack.py puts it."""
    left_out = False
    with zipfile.ZipFile(pyz) as archive, output.open("wb") as file:
        entries = archive.infolist()
        file.write(pyz.read_bytes()[: min(entry.header_offset for entry in entries)])
        with zipfile.ZipFile(file, "w", compresslevel=9) as rest:
            for entry in entries:
                content = archive.read(entry)
                is_pyc = entry.filename.endswith(".pyc") and content.startswith(python.magic)
                if is_pyc or entry.filename.startswith(f"_pyc/{python.tag}/"):
                    left_out = True
                else:
                    rest.writestr(entry, content, entry.compress_type, 9)
    output.chmod(0o755)
    return left_out


def contestants(host: Host, wheel: Path, files: list[Path]) -> list[Contestant]:
    venv = make_venv(host, wheel)
    reference = Contestant(REFERENCE, [venv / "bin" / "nightcrier"], size_of(venv), ("warm",))
    host.start(reference, host.migrate_up, host.folder)
    found = [reference, *ours(host, files)]
    for make in (shiv, pex):
        spec = importlib.util.find_spec(make.__name__)
        if spec and spec.origin:
            found += make(host, venv, Path(spec.origin).parent)
        else:
            print(f"left out: {make.__name__} is not installed (pip install '.[bench]')")
    return found


def size_of(folder: Path) -> int:
    files = (path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
    return sum(path.stat().st_size for path in files)


# --- What comes of it ---


def measure(host: Host, those: list[Contestant], command: str, count: int) -> None:
    cpu: dict[str, list[float]] = {}

    def line(state: str, contestant: Contestant, arguments: list[str]) -> Callable[[], float]:
        def one() -> float:
            milliseconds, of_cpu = host.start_in(state, contestant, arguments)
            cpu.setdefault(name_of(contestant.name, state), []).append(of_cpu)
            return milliseconds

        return one

    floor = Contestant("python -I -S -c pass", [host.python.path, "-I", "-S"], states=("warm",))
    lines = {name_of(floor.name, "warm"): line("warm", floor, ["-c", "pass"])}
    # The cold starts of shiv and pex, which write much, come last in a round.
    for state in ("warm", "no cache", "cold"):
        for contestant in those:
            if state in contestant.states:
                name = name_of(contestant.name, state)
                lines[name] = line(state, contestant, host.commands[command])
    results = rounds(lines, count)
    print_times(f"`{command}`, Python {host.python.version}", results, cpu)
    print_targets(command, {name: statistics.median(times) for name, times in results.items()})


def name_of(contestant: str, state: str) -> str:
    return contestant if state == "warm" else f"{contestant}, {state}"


def print_sizes(host: Host, those: list[Contestant]) -> None:
    print(f"\n{'Python ' + host.python.version:36}  {'MB':>6}  {'MB in the home':>14}")
    for contestant in those:
        home = size_of(host.warm_home(contestant))
        print(f"{contestant.name:36}  {contestant.size / 1e6:6.1f}  {home / 1e6:14.1f}")


def print_times(
    title: str, results: Mapping[str, list[float]], cpu: Mapping[str, list[float]]
) -> None:
    """The ratios are of medians, of the lowest, and of CPU: the last of them hardly minds others
    on the machine."""
    reference = statistics.median(results[REFERENCE])
    lowest_reference, cpu_reference = min(results[REFERENCE]), statistics.median(cpu[REFERENCE])
    print(f"\n{title:36}  {'ms':>7} [lowest]      CPU   ratio [of lowest] of CPU")
    for name, times in results.items():
        median, of_cpu = statistics.median(times), statistics.median(cpu[name])
        lowest, of_lowest = f"[{min(times):.1f}]", f"[{min(times) / lowest_reference:.2f}]"
        print(
            f"{name:36}  {median:7.1f} {lowest:>8} {of_cpu:8.1f}"
            f"  {median / reference:6.2f} {of_lowest:>11} {of_cpu / cpu_reference:6.2f}"
        )


def print_targets(command: str, medians: Mapping[str, float]) -> None:
    for state, limit in (("warm", WARM[command]), ("cold", COLD)):
        peers = [name_of(peer, state) for peer in PEERS]
        for name in (name_of(OURS, state), name_of(NEW_PYTHON, state)):
            if name in medians:
                print_target(medians, name, REFERENCE, at_most=limit)
                if there := [peer for peer in peers if peer in medians]:
                    print_target(medians, name, min(there, key=medians.__getitem__), at_most=1.0)


def print_target(medians: Mapping[str, float], name: str, other: str, *, at_most: float) -> None:
    ratio = medians[name] / medians[other]
    holds = "holds" if ratio <= at_most else "FAILS"
    print(f"{holds}: {name}: {ratio:.2f} × {other}, at most {at_most} is wanted")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pyz", action="append", type=Path)
    parser.add_argument("--python", action="append", type=named_python)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--dir")
    arguments = parser.parse_args()
    files = arguments.pyz or [ROOT / "dist" / OURS]
    if missing := [str(file) for file in files if not file.exists()]:
        parser.error(f"no {', '.join(missing)}: ./build_zipapp.sh makes dist/{OURS}")
    if not importlib.util.find_spec("pip"):
        parser.error(f"{sys.executable} has no pip")
    with fresh(arguments.dir) as relative:
        folder = relative.resolve()
        wheel = make_wheel(folder)
        for python in arguments.python or find_pythons():
            host = Host(folder / python.version, python)
            those = contestants(host, wheel, files)
            for contestant in those:
                host.warm_up(contestant)
            print_sizes(host, those)
            for command in host.commands:
                measure(host, those, command, arguments.rounds)
            print(flush=True)


if __name__ == "__main__":
    main()
