"""Packs nightcrier.pyz: the program, its schema, its packages, and what starts it.

build_zipapp.sh calls this; `--renew-lock` writes the hashes in requirements.lock anew.

    __main__.py              start.py
    zipapp_importer.py       importer.py
    zipapp_cache.py          cache.py
    apsw/__init__.py         native.py
    nightcrier.py schema/    the program: the modules that pyproject.toml names, and its SQL
    h11/ pg8000/ yaml/ …     the packages, without their native parts
    nightcrier_build/        what is in the file, and the licences of it all: see account.py
    _native/                 apsw: xz streams of native modules, and the index of them all
    _pyc/<cache tag>/        bytecode, for each Python of the building machine: of the importer, and
                             of all modules in one entry
    _pyc/sources             a hash of all sources: code that a start compiled is kept under it
"""

# ruff: noqa: S603 — it runs compileall, and Pythons that it has found
import argparse
import fnmatch
import io
import lzma
import marshal
import os
import re
import subprocess
import sys
import tempfile
import time
import tomllib
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import account
import native
import wheels
from wheels import NATIVE_PACKAGE, PYTHONS, ROOT, Wheel, sha256

SLIM = "*-linux-gnu-*"
# Python's own importer loads the first of them; the others are never imported.
NOT_COMPILED = re.compile(
    r"__main__\.py|asn1crypto/(_inet|_perf/.+|cms|crl|csr|ocsp|pdf|pkcs12|tsp)\.py"
    r"|dateutil/(easter|rrule|utils|zoneinfo/.+)\.py"
)
PYC_HEADER = 16
# So that a Python without zlib can say so.
NOT_DEFLATED = ("__main__.py", "_native/index", "_native/summary")
PLATFORM_VERSION = re.compile(r"-(?:manylinux|musllinux|macosx)_(\d+)_(\d+)_")
EARLIEST_ZIP_DATE = 315532800  # 1980-01-01
# The dictionary holds all modules of a stream; a larger one, or --extreme, gains nothing.
XZ_PRESET = 8

HEADER = """\
#!/bin/sh
# nightcrier in one file: this script, and behind it a zip archive that Python runs.
# -I and -S keep the packages of the user and of the host out, and make the start quicker;
# -X tells what is behind that nobody chose this Python, so that it may look for a newer one.
for python in python3 {pythons}; do
    if command -v "$python" >/dev/null; then exec "$python" -I -S -X nightcrier "$0" "$@"; fi
done
echo "nightcrier: needs Python 3.11 or newer, and found none; this file has: {bundled}" >&2
exit 5
"""


def main() -> None:
    options = parse_options()
    if options.renew_lock:
        wheels.renew_lock()
        return
    targets = chosen_targets(options)
    found = wheels.locked_wheels(targets, options.wheels, offline=options.offline)
    pythons = chosen_pythons(targets, options)
    account_of_it = make_account(targets, found, pythons)
    natives = [wheel for wheel in found if wheel.package == NATIVE_PACKAGE]
    files = program() | python_files([wheel for wheel in found if wheel not in natives])
    files |= account.account_files(account_of_it, found)
    versions = ", ".join(account_of_it.bytecode) or "no Python"
    what = targets[0] if len(targets) == 1 else f"{len(targets)} targets"
    print(f"packing for {what}, with bytecode of {versions}", flush=True)
    files |= compress_and_compile(natives, pythons, files) | hash_of_sources(files)
    files["_native/summary"] = summary(targets).encode()
    write_archive(options.output, files, targets)
    if options.pythons_file:
        able = [python.executable for python in pythons if python.target in targets]
        options.pythons_file.write_text("".join(f"{path}\n" for path in able))


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Packs nightcrier.pyz.", allow_abbrev=False)
    targets = parser.add_mutually_exclusive_group()
    targets.add_argument("--slim", dest="targets", action="store_const", const=SLIM)
    targets.add_argument("--host-only", action="store_true")
    targets.add_argument("--targets", metavar="PATTERN")
    parser.add_argument("--bytecode", metavar="PY", action="append", default=[])
    parser.add_argument("--wheels", type=Path, default=ROOT / "build" / "wheels")
    parser.add_argument("--output", type=Path, default=ROOT / "dist" / "nightcrier.pyz")
    parser.add_argument("--offline", action="store_true")
    parser.add_argument("--pythons-file", type=Path)  # gets those that can run the result
    parser.add_argument("--renew-lock", action="store_true")
    return parser.parse_args()


def chosen_targets(options: argparse.Namespace) -> list[str]:
    pattern = native.target() if options.host_only else options.targets or "*"
    chosen = fnmatch.filter(wheels.targets(), pattern)
    if not chosen:
        has = ", ".join(wheels.targets())
        raise RuntimeError(f"no target is {pattern}; there are: {has}")
    return chosen


def make_account(
    targets: list[str], found: list[Wheel], pythons: list["Python"]
) -> account.Account:
    sqlite: tuple[str, tuple[str, ...]] = ("", ())
    runnable = [
        (wheel, python)
        for python in pythons
        for wheel in found
        if wheel.package == NATIVE_PACKAGE and wheel.target == python.target
    ]
    if runnable:
        wheel, python = runnable[0]
        sqlite = account.sqlite_facts(wheel, python.executable)
    else:
        print("no Python here runs an apsw of this file: it will not know its SQLite")
    return account.Account(
        commit=account.checkout()[0],
        source_date=account.iso(account.source_date()),
        sqlite=sqlite[0],
        sqlite_options=sqlite[1],
        targets=tuple(targets),
        bytecode=tuple(python.version for python in pythons),
        packages={package.name: package.version for package in wheels.read_lock()},
    )


# --- Pythons: those of this machine that the file is for ---


ASK = """import platform, sys
free_threaded = "t" in getattr(sys, "abiflags", "")
print(sys.implementation.name, free_threaded, sys.hexversion, platform.python_version())"""


@dataclass(frozen=True, order=True)
class Python:
    hexversion: int
    version: str  # as in 3.11.7
    executable: str

    @property
    def tag(self) -> str:
        return "".join(self.version.split(".")[:2])

    @property
    def target(self) -> str:
        """What it needs a native module for."""
        return f"cp{self.tag}-{native.target().partition('-')[2]}"


def chosen_pythons(targets: list[str], options: argparse.Namespace) -> list[Python]:
    """One for each version that there are targets for: what is found depends on the machine.

    The one that runs this comes before those that are named, and these before the newest.
    """
    chosen: dict[str, Python] = {}
    ours, *named = map(ask, [sys.executable, *options.bytecode])
    for path, python in zip(options.bytecode, named, strict=True):
        if not python:
            raise RuntimeError(f"{path} is no CPython that runs")
    with ThreadPoolExecutor() as pool:
        others = pool.map(ask, [] if options.host_only else sorted(places()))
        newest_first = sorted(filter(None, others), reverse=True)
    for python in filter(None, [ours, *named, *newest_first]):
        chosen.setdefault(python.tag, python)
    served = {target.partition("-")[0] for target in targets}
    return sorted(python for python in chosen.values() if f"cp{python.tag}" in served)


def places() -> set[str]:
    names = [f"python{version}" for version in PYTHONS]
    folders = [Path(folder) for folder in os.get_exec_path()]
    folders += Path(os.path.expanduser("~")).glob(".pyenv/versions/*/bin")
    return {str(folder / name) for folder in folders for name in names if (folder / name).exists()}


def ask(executable: str) -> Python | None:
    """Run it: a pyenv shim has not always something behind it."""
    command = [executable, "-I", "-S", "-c", ASK]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        name, free_threaded, hexversion, version = done.stdout.split()
    except (OSError, ValueError, subprocess.CalledProcessError):
        return None
    if name != "cpython" or free_threaded == "True":  # its native modules are others
        return None
    return Python(int(hexversion), version, executable)


# --- Content: name in the archive -> bytes ---


def program() -> dict[str, bytes]:
    ours = Path(__file__).parent
    files = {
        "__main__.py": ours / "start.py",
        "zipapp_importer.py": ours / "importer.py",
        "zipapp_cache.py": ours / "cache.py",
        "apsw/__init__.py": ours / "native.py",
    }
    with (ROOT / "pyproject.toml").open("rb") as file:
        modules = tomllib.load(file)["tool"]["setuptools"]["py-modules"]
    files |= {f"{module}.py": ROOT / f"{module}.py" for module in modules}
    files |= {str(sql.relative_to(ROOT)): sql for sql in ROOT.glob("schema/*/*.sql")}
    contents = {name: path.read_bytes() for name, path in files.items()}
    for folder in ROOT.glob("schema/*/"):  # importers tell no names
        names = sorted(sql.name for sql in folder.glob("*.sql"))
        contents[f"schema/{folder.name}/index"] = "\n".join(names).encode()
    return contents


def python_files(pure: list[Wheel]) -> dict[str, bytes]:
    files: dict[str, bytes] = {}
    for wheel in pure:
        with zipfile.ZipFile(wheel.path) as archive:
            names = [name for name in archive.namelist() if name.endswith(".py")]
            files |= {name: with_version(archive.read(name), wheel.path) for name in names}
    return files


def with_version(source: bytes, wheel: Path) -> bytes:
    """Write in the version that a package would look up: that costs a start 20 ms, and needs
    metadata which the archive does not have."""
    lookup, package, version = b"importlib.metadata", *wheel.name.split("-")[:2]
    if lookup not in source:
        return source
    known = f"# {wheel.name}: pack.py has written the version in\n".encode()
    source = source.replace(b"from importlib.metadata import version\n", known)
    source = source.replace(f'version("{package}")'.encode(), f'"{version}"'.encode())
    if lookup in source or b"version(" in source:
        raise RuntimeError(f"{wheel.name} looks up a version in a way that is new to pack.py")
    return source


def compress_and_compile(
    natives: list[Wheel], pythons: list[Python], files: dict[str, bytes]
) -> dict[str, bytes]:
    """The slow part, as parallel as the machine allows: xz releases Python's lock."""
    streams, index = native_modules(natives)
    compiled_ones = [n for n in files if n.endswith(".py") and not NOT_COMPILED.fullmatch(n)]
    sources = {name: files[name] for name in compiled_ones}
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        packed = pool.map(lambda stream: lzma.compress(stream, preset=XZ_PRESET), streams.values())
        compiled = pool.map(lambda python: bytecode(sources, python), pythons)
        result = dict(zip(streams, packed, strict=True)) | {"_native/index": index}
        for pycs in compiled:
            result |= pycs
    return result


def bytecode(sources: dict[str, bytes], python: Python) -> dict[str, bytes]:
    """Compile in a process that does nothing else: what a .pyc marks as shared depends on that."""
    with tempfile.TemporaryDirectory() as name:
        stage = Path(name)
        for path, source in sources.items():
            (stage / path).parent.mkdir(parents=True, exist_ok=True)
            (stage / path).write_bytes(source)
        command = [python.executable, "-S", "-P", "-m", "compileall", "-q"]
        command += ["--invalidation-mode=unchecked-hash", "-s", name, "-p", "nightcrier.pyz", name]
        settings = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
        # The order of a frozenset in a .pyc depends on the seed.
        subprocess.run(command, env=settings | {"PYTHONHASHSEED": "0"}, check=True)
        pycs = {source_of(pyc.relative_to(stage)): pyc.read_bytes() for pyc in stage.rglob("*.pyc")}
    importer = pycs["zipapp_importer.py"]
    modules = {source: zlib.compress(pyc[PYC_HEADER:], 9) for source, pyc in sorted(pycs.items())}
    folder = f"_pyc/cpython-{python.tag}"
    return {
        f"{folder}/zipapp_importer.pyc": importer,
        # Version 2 of the format depends on nothing but the values.
        f"{folder}/modules": marshal.dumps({"magic": importer[:4], **modules}, 2),
    }


def source_of(pyc: Path) -> str:
    """yaml/nodes.py, of yaml/__pycache__/nodes.cpython-311.pyc."""
    return str(pyc.parents[1] / f"{pyc.name.partition('.')[0]}.py")


def hash_of_sources(files: dict[str, bytes]) -> dict[str, bytes]:
    hashes = [f"{name} {sha256(files[name])}\n" for name in sorted(files) if name.endswith(".py")]
    return {"_pyc/sources": sha256("".join(hashes).encode()).encode()}


def native_modules(natives: list[Wheel]) -> tuple[dict[str, bytes], bytes]:
    """One solid stream for a system and a machine: the same SQLite is in each of its modules.

    To unpack a module is to unpack those before it. So glibc comes before musl, and the Pythons
    that hosts have had for longest come first.
    """
    streams: dict[str, bytes] = {}
    index = []
    for wheel in sorted(natives, key=lambda wheel: wheel.target.split("-", 1)[::-1]):
        with zipfile.ZipFile(wheel.path) as archive:
            [name] = [n for n in archive.namelist() if re.match(r"apsw/__init__\..+\.so$", n)]
            module = archive.read(name)
        stream = native.stream_of(wheel.target)
        before = streams.get(stream, b"")
        place = f"{len(before)} {len(module)} {zlib.crc32(module):08x}"
        [libc] = {".".join(found) for found in PLATFORM_VERSION.findall(wheel.path.name)}
        index.append(f"{wheel.target} {libc} {place} {sha256(module)}\n")
        streams[stream] = before + module
    return streams, "".join(index).encode()


def summary(targets: list[str]) -> str:
    """As in: CPython 3.11-3.15 on linux-gnu-aarch64, linux-gnu-x86_64."""
    minors: dict[str, list[int]] = {}
    for target in targets:
        python, platform = target.split("-", 1)
        minors.setdefault(platform, []).append(int(python[3:]))
    platforms: dict[str, list[str]] = {}
    for platform, found in sorted(minors.items()):
        has_gaps = max(found) - min(found) >= len(found)
        ends = sorted(found) if has_gaps else sorted({min(found), max(found)})
        pythons = (", " if has_gaps else "-").join(f"3.{minor}" for minor in ends)
        platforms.setdefault(pythons, []).append(platform)
    return "; ".join(f"CPython {p} on {', '.join(where)}" for p, where in platforms.items())


# --- The file ---


def write_archive(output: Path, files: dict[str, bytes], targets: list[str]) -> None:
    """The same files give the same bytes: nothing of this machine gets in but its zlib and xz."""
    date = max(account.source_date(), EARLIEST_ZIP_DATE)
    content = io.BytesIO()
    content.write(header(targets).encode())
    with zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
        for name in sorted(files):
            entry = zipfile.ZipInfo(name, time.gmtime(date)[:6])
            entry.create_system = 3  # Unix, and so the next line is a file mode
            entry.external_attr = 0o100644 << 16
            stored = name.endswith((".xz", "/modules")) or name in NOT_DEFLATED
            entry.compress_type = zipfile.ZIP_STORED if stored else zipfile.ZIP_DEFLATED
            archive.writestr(entry, files[name])
        sizes = sizes_by_content(archive.infolist())
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_bytes(content.getvalue())
    output.chmod(0o755)
    sizes["zip directory and header"] = len(content.getvalue()) - sum(sizes.values())
    for what, size in sizes.items():
        print(f"{size:12,}  {what}")


def sizes_by_content(entries: Iterable[zipfile.ZipInfo]) -> Counter[str]:
    kinds = {"_native": "apsw", "_pyc": "bytecode", account.PLACE: "account and licences"}
    sizes: Counter[str] = Counter()
    for entry in entries:
        top, _, rest = entry.filename.partition("/")
        kind = kinds.get(top, "sources")
        if top in ("_native", "_pyc"):
            kind += f" {rest.partition('/')[0]}"
        sizes[kind] += entry.compress_size
    return sizes


def header(targets: list[str]) -> str:
    pythons = sorted({f"python3.{target[3:5]}" for target in targets}, reverse=True)
    return HEADER.format(pythons=" ".join(pythons), bundled=summary(targets))


if __name__ == "__main__":
    try:
        main()
    except RuntimeError as error:
        sys.exit(f"pack.py: {error}")
    except KeyboardInterrupt:
        sys.exit("pack.py: interrupted")
