"""The wheels that nightcrier.pyz is made of: those that requirements.lock names, and no others."""

# ruff: noqa: S603 — it runs pip, with arguments of its own
import email.parser
import hashlib
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from email.message import Message
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
LOCK = ROOT / "requirements.lock"

NATIVE_PACKAGE = "apsw"
PYTHONS = ["3.11", "3.12", "3.13", "3.14", "3.15"]
PLATFORMS = {  # in the words of native.target(), and in those of pip
    "linux-gnu-x86_64": "manylinux_2_28_x86_64",
    "linux-gnu-aarch64": "manylinux_2_28_aarch64",
    "linux-musl-x86_64": "musllinux_1_2_x86_64",
    "linux-musl-aarch64": "musllinux_1_2_aarch64",
    "macos-x86_64": "macosx_11_0_x86_64",
    "macos-arm64": "macosx_11_0_arm64",
}
SYSTEMS = {"manylinux": "linux-gnu", "musllinux": "linux-musl", "macosx": "macos"}
# The .py files are the same in all wheels of a package, and not every Python has a wheel of it.
PURE_TARGET = "cp311-linux-gnu-x86_64"
PURE_PLATFORM = "manylinux2014_x86_64"

FETCHES_AT_ONCE = 4
NO_NETWORK = "NewConnectionError|NameResolutionError|ConnectTimeoutError|ProxyError"


def targets() -> list[str]:
    """All that a file can be for, as in cp311-linux-gnu-x86_64."""
    pythons = [f"cp{python.replace('.', '')}" for python in PYTHONS]
    return [f"{python}-{platform}" for platform in PLATFORMS for python in pythons]


@dataclass(frozen=True)
class Package:
    """An entry of requirements.lock."""

    name: str
    version: str
    hashes: frozenset[str]

    def __str__(self) -> str:
        hashes = (f"    --hash=sha256:{digest}" for digest in sorted(self.hashes))
        return " \\\n".join([f"{self.name}=={self.version}", *hashes]) + "\n"


@dataclass(frozen=True, order=True)
class Wheel:
    """A file that the lock names; of a pure package it is for PURE_TARGET, as for any other."""

    package: str
    target: str
    path: Path

    @property
    def sha256(self) -> str:
        return sha256(self.path.read_bytes())

    def metadata(self) -> Message:
        with zipfile.ZipFile(self.path) as archive:
            [name] = [n for n in archive.namelist() if n.endswith(".dist-info/METADATA")]
            return email.parser.Parser().parsestr(archive.read(name).decode())


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def normalized(name: str) -> str:
    """A package's name as others write it: python_dateutil is python-dateutil."""
    return re.sub(r"[-_.]+", "-", name).lower()


def read_lock() -> list[Package]:
    packages = []
    for line in LOCK.read_text().replace("\\\n", "").splitlines():
        if line and not line.startswith("#"):
            requirement, *hashes = line.split()
            name, version = requirement.split("==")
            digests = frozenset(option.removeprefix("--hash=sha256:") for option in hashes)
            packages.append(Package(name, version, digests))
    return packages


def target_of(file_name: str) -> str:
    """What a wheel serves, in the words of native.target()."""
    python, abi, platforms = file_name.removesuffix(".whl").rsplit("-", 3)[1:]
    if (abi, platforms) == ("none", "any"):
        return PURE_TARGET
    match = re.fullmatch(r"([a-z]+)_\d+_\d+_(\w+)", platforms.rpartition(".")[2])
    if not match or match[1] not in SYSTEMS:
        return f"{python}-{platforms}"
    return f"{abi}-{SYSTEMS[match[1]]}-{match[2]}"


def locked_wheels(wanted: list[str], directory: Path, *, offline: bool) -> list[Wheel]:
    """The wheels for some targets, from the directory or fetched into it, in the order of those."""
    needed = [
        (package, target)
        for package in read_lock()
        for target in (wanted if package.name == NATIVE_PACKAGE else [PURE_TARGET])
    ]
    found = wheels_in(directory)
    missing = [item for item in needed if item not in found]
    if missing and not offline:
        fetch(missing, directory)
        found = wheels_in(directory)
        missing = [item for item in needed if item not in found]
    if missing:
        advice = "build without --offline, or put them there" if offline else "renew the lock"
        raise RuntimeError(f"{directory} lacks wheels of {LOCK.name}: {listed(missing)}: {advice}")
    return [Wheel(package.name, target, found[package, target]) for package, target in needed]


def wheels_in(directory: Path) -> dict[tuple[Package, str], Path]:
    """The files that are what the lock says: one that is altered or half there is not seen."""
    locked = {normalized(package.name): package for package in read_lock()}
    found = {}
    for path in sorted(directory.glob("*.whl"), reverse=True):
        package = locked.get(normalized(path.name.partition("-")[0]))
        if package and sha256(path.read_bytes()) in package.hashes:
            found[package, target_of(path.name)] = path
    return found


def listed(missing: list[tuple[Package, str]]) -> str:
    """As in: apsw 3.54.1.0 (cp311-linux-gnu-x86_64, cp312-linux-gnu-x86_64), h11 0.16.0."""
    texts = []
    for package, items in itertools.groupby(missing, key=lambda item: item[0]):
        what = f" ({', '.join(target for _, target in items)})"
        native = package.name == NATIVE_PACKAGE
        texts.append(f"{package.name} {package.version}{what if native else ''}")
    return ", ".join(texts)


# --- pip ---


def fetch(missing: list[tuple[Package, str]], directory: Path) -> None:
    """One pip for each target, some at a time, and one for all packages of Python alone."""
    print(f"fetching {len(missing)} wheels", flush=True)
    directory.mkdir(parents=True, exist_ok=True)
    pure = [package for package, _ in missing if package.name != NATIVE_PACKAGE]
    requests = [(f"--platform={PURE_PLATFORM}", "--python-version=3.11", pure)] if pure else []
    for package, target in missing:
        if package.name == NATIVE_PACKAGE:
            python, _, platform = target.partition("-")
            version = f"--python-version=3.{python.removeprefix('cp3')}"
            requests.append((f"--platform={PLATFORMS[platform]}", version, [package]))
    in_parallel(lambda request: fetch_into(directory, *request), requests)


def fetch_into(directory: Path, platform: str, version: str, packages: list[Package]) -> None:
    """Into a directory of its own first: what pip was stopped at is not left among the others."""
    with tempfile.TemporaryDirectory(prefix=".fetching-", dir=directory) as name:
        pip(
            *("download", "--require-hashes", "--only-binary=:all:", "--no-deps", "--dest", name),
            *(platform, version, "--implementation=cp", "--requirement=/dev/stdin"),
            stdin="".join(map(str, packages)),
        )
        for wheel in Path(name).iterdir():
            os.replace(wheel, directory / wheel.name)
            print(f"  {wheel.name}", flush=True)


def in_parallel(work: Callable[[Any], Any], items: Iterable[Any]) -> list[Any]:
    pool = ThreadPoolExecutor(FETCHES_AT_ONCE)
    try:
        return list(pool.map(work, items))
    finally:  # after a failure, or Ctrl-C, no further one begins
        pool.shutdown(cancel_futures=True)


def pip(*arguments: str, stdin: str = "") -> str:
    command = [sys.executable, "-m", "pip", "--no-input", "--disable-pip-version-check"]
    command += arguments
    done = subprocess.run(command, input=stdin, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(what_pip_says(done.stderr))
    return done.stdout


def what_pip_says(stderr: str) -> str:
    """Its reason, in a line."""
    if "No module named pip" in stderr:
        return f"{sys.executable} has no pip: install it (python3-pip), or name another --python"
    if re.search(NO_NETWORK, stderr):
        return "no connection to the package index: with the wheels at hand, --offline needs none"
    errors = re.findall(r"^ERROR: (.+)", stderr, re.MULTILINE) or stderr.split("\n")[-2:]
    return f"pip: {'; '.join(errors)}"


def renew_lock() -> None:
    """Lock all wheels of the versions that the lock names: edit those, then run this."""
    lines = LOCK.read_text().splitlines()
    comment = [*itertools.takewhile(lambda line: line.startswith("#"), lines), ""]
    renewed = [Package(p.name, p.version, hashes_in_index(p)) for p in read_lock()]
    LOCK.write_text("\n".join([*comment, *map(str, renewed)]))


def hashes_in_index(package: Package) -> frozenset[str]:
    first, *others = itertools.product([package], PYTHONS, PLATFORMS.values())
    wheels = [wheel_in_index(first)]
    if not (wheels[0] and wheels[0]["url"].endswith("-none-any.whl")):  # the same one everywhere
        wheels += in_parallel(wheel_in_index, others)
    hashes = {wheel["archive_info"]["hashes"]["sha256"] for wheel in wheels if wheel}
    print(f"{package.name} {package.version}: {len(hashes)} wheels", flush=True)
    return frozenset(hashes)


def wheel_in_index(wanted: tuple[Package, str, str]) -> dict[str, Any] | None:
    package, python, platform = wanted
    try:
        report = pip(
            *("install", "--dry-run", "--quiet", "--report=-", "--target=nowhere"),
            *("--no-deps", "--ignore-installed", "--only-binary=:all:"),
            *(f"--python-version={python}", f"--platform={platform}"),
            f"{package.name}=={package.version}",
        )
    except RuntimeError as error:
        if "No matching distribution" not in str(error):
            raise
        return None
    wheel: dict[str, Any] = json.loads(report)["install"][0]["download_info"]
    return wheel
