"""Packs nightcrier.pyz: the program, its schema, its packages, their licences, and what starts it.

build_zipapp.sh calls this; `--renew-lock` writes the hashes in requirements.lock anew.

    __main__.py              start.py
    zipapp_importer.py       importer.py
    apsw/__init__.py         native.py
    nightcrier.py schema/    the program: the modules that pyproject.toml names, and its SQL
    h11/ pg8000/ yaml/ …     the packages, without their native parts
    _native/                 apsw: an xz stream for each platform, and the index of them all
    _pyc/<cache tag>/        bytecode
    LICENSES/
"""

# ruff: noqa: S603 — it runs pip and compileall, with arguments of its own
import argparse
import hashlib
import io
import itertools
import json
import lzma
import os
import re
import subprocess
import sys
import tempfile
import time
import tomllib
import zipfile
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import native

ROOT = Path(__file__).resolve().parents[1]
LOCK = ROOT / "requirements.lock"

NATIVE_PACKAGE = "apsw"
# The .py files are the same in all wheels of a package, and not every Python has a wheel of it.
PURE_WHEEL = ["--platform=manylinux2014_x86_64", "--python-version=3.11"]
LICENCE = re.compile(r"(?P<package>.+)\.dist-info/(licenses/)?(?P<name>(LICEN|COPYING|NOTICE).*)")
EARLIEST_ZIP_DATE = 315532800  # 1980-01-01
SYSTEMS = {"manylinux": "linux-gnu", "musllinux": "linux-musl", "macosx": "macos"}

# What --renew-lock asks the package index for.
PYTHONS = ["3.11", "3.12", "3.13", "3.14", "3.15"]
MACHINES = ["x86_64", "aarch64", "i686", "armv7l"]
PLATFORMS = [
    *(f"manylinux_2_28_{machine}" for machine in MACHINES),
    *(f"musllinux_1_2_{machine}" for machine in MACHINES),
    "macosx_11_0_arm64",
    "macosx_15_0_x86_64",
]

HEADER = """\
#!/bin/sh
# nightcrier in one file: this script, and behind it a zip archive that Python runs.
# -I and -S keep the packages of the user and of the host out, and make the start quicker;
# -X tells what is behind that nobody chose this Python, so that it may look for a newer one.
for python in python3 {pythons}; do
    if command -v "$python" >/dev/null; then exec "$python" -I -S -X nightcrier "$0" "$@"; fi
done
echo "nightcrier: needs Python 3.11 or newer, and found none; this file has: {targets}" >&2
exit 5
"""


@dataclass(frozen=True)
class Package:
    """An entry of requirements.lock."""

    name: str
    version: str
    hashes: frozenset[str]

    def __str__(self) -> str:
        hashes = (f"    --hash=sha256:{digest}" for digest in sorted(self.hashes))
        return " \\\n".join([f"{self.name}=={self.version}", *hashes]) + "\n"

    def wheel_in(self, directory: Path) -> Path | None:
        """A wheel that is in the lock and, of the native package, made for this machine."""
        for wheel in sorted(directory.glob("*.whl")):
            name = wheel.name.partition("-")[0].lower().replace("_", "-")
            if name != self.name.lower():
                continue
            if name == NATIVE_PACKAGE and target_of(wheel) != native.target():
                continue
            if sha256(wheel.read_bytes()) in self.hashes:
                return wheel
        return None


def main() -> None:
    options = parse_options()
    if options.renew_lock:
        renew_lock()
        return
    wheels = locked_wheels(options.wheels, offline=options.offline)
    natives = [wheels[NATIVE_PACKAGE]]
    files = program() | python_files([wheels[name] for name in wheels if name != NATIVE_PACKAGE])
    files |= bytecode({name: files[name] for name in files if name.endswith(".py")})
    write_archive(options.output, files | native_modules(natives) | licences(wheels.values()))


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Packs nightcrier.pyz.")
    parser.add_argument("--wheels", type=Path, default=ROOT / "build" / "wheels")
    parser.add_argument("--output", type=Path, default=ROOT / "dist" / "nightcrier.pyz")
    parser.add_argument("--offline", action="store_true")
    parser.add_argument("--renew-lock", action="store_true")
    return parser.parse_args()


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


# --- Wheels: what the lock names, and nothing else ---


def read_lock() -> list[Package]:
    packages = []
    for line in LOCK.read_text().replace("\\\n", "").splitlines():
        if line and not line.startswith("#"):
            requirement, *hashes = line.split()
            name, version = requirement.split("==")
            digests = frozenset(option.removeprefix("--hash=sha256:") for option in hashes)
            packages.append(Package(name, version, digests))
    return packages


def target_of(wheel: Path) -> str | None:
    """What a native wheel serves, in the words of native.target()."""
    match = re.fullmatch(r".+-cp\d+-(cp\d+t?)-([a-z]+)_\d+_\d+_(\w+)\.whl", wheel.name)
    if not match or match[2] not in SYSTEMS:
        return None
    return f"{match[1]}-{SYSTEMS[match[2]]}-{match[3]}"


def locked_wheels(directory: Path, *, offline: bool) -> dict[str, Path]:
    """A wheel of each locked package, from the directory or fetched into it."""
    locked = read_lock()
    missing = [package for package in locked if not package.wheel_in(directory)]
    if missing and not offline:
        print("fetching", ", ".join(package.name for package in missing), flush=True)
        fetch([package for package in missing if package.name == NATIVE_PACKAGE], directory)
        fetch([p for p in missing if p.name != NATIVE_PACKAGE], directory, *PURE_WHEEL)
    wheels = {}
    for package in locked:
        wheel = package.wheel_in(directory)
        if not wheel:
            here = f"{directory} has no wheel of {package.name}"
            raise RuntimeError(f"{here} that is for {native.target()} and in {LOCK.name}")
        wheels[package.name] = wheel
    return wheels


def fetch(packages: list[Package], directory: Path, *options: str) -> None:
    if packages:
        pip(
            *("download", "--require-hashes", "--only-binary=:all:", "--no-deps", *options),
            *("--dest", str(directory), "--requirement", "/dev/stdin"),
            stdin="".join(map(str, packages)),
        )


def pip(*arguments: str, stdin: str = "") -> str:
    command = [sys.executable, "-m", "pip", *arguments]
    done = subprocess.run(command, input=stdin, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return done.stdout


def renew_lock() -> None:
    """Lock all wheels of the versions that the lock names: edit those, then run this."""
    lines = LOCK.read_text().splitlines()
    comment = [*itertools.takewhile(lambda line: line.startswith("#"), lines), ""]
    renewed = [Package(p.name, p.version, hashes_in_index(p)) for p in read_lock()]
    LOCK.write_text("\n".join([*comment, *map(str, renewed)]))


def hashes_in_index(package: Package) -> frozenset[str]:
    hashes = set()
    for python, platform in itertools.product(PYTHONS, PLATFORMS):
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
            continue
        wheel = json.loads(report)["install"][0]["download_info"]
        hashes.add(wheel["archive_info"]["hashes"]["sha256"])
        if wheel["url"].endswith("-none-any.whl"):
            break  # the same one everywhere
    print(f"{package.name} {package.version}: {len(hashes)} wheels")
    return frozenset(hashes)


# --- Content: name in the archive -> bytes ---


def program() -> dict[str, bytes]:
    ours = Path(__file__).parent
    files = {
        "__main__.py": ours / "start.py",
        "zipapp_importer.py": ours / "importer.py",
        "apsw/__init__.py": ours / "native.py",
    }
    with (ROOT / "pyproject.toml").open("rb") as file:
        modules = tomllib.load(file)["tool"]["setuptools"]["py-modules"]
    files |= {f"{module}.py": ROOT / f"{module}.py" for module in modules}
    files |= {str(sql.relative_to(ROOT)): sql for sql in ROOT.glob("schema/*/*.sql")}
    return {name: path.read_bytes() for name, path in files.items()}


def python_files(wheels: list[Path]) -> dict[str, bytes]:
    files: dict[str, bytes] = {}
    for wheel in wheels:
        with zipfile.ZipFile(wheel) as archive:
            names = [name for name in archive.namelist() if name.endswith(".py")]
            files |= {name: with_version(archive.read(name), wheel) for name in names}
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


def bytecode(sources: dict[str, bytes]) -> dict[str, bytes]:
    """Compile in a process that does nothing else: what a .pyc marks as shared depends on that."""
    with tempfile.TemporaryDirectory() as name:
        stage = Path(name)
        for path, source in sources.items():
            (stage / path).parent.mkdir(parents=True, exist_ok=True)
            (stage / path).write_bytes(source)
        command = [sys.executable, "-S", "-P", "-m", "compileall", "-q"]
        command += ["--invalidation-mode=unchecked-hash", "-s", name, "-p", "nightcrier.pyz", name]
        settings = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
        # The order of a frozenset in a .pyc depends on the seed.
        subprocess.run(command, env=settings | {"PYTHONHASHSEED": "0"}, check=True)
        return {
            bytecode_name(pyc.relative_to(stage)): pyc.read_bytes() for pyc in stage.rglob("*.pyc")
        }


def bytecode_name(pyc: Path) -> str:
    """`yaml/__pycache__/nodes.cpython-311.pyc` is `_pyc/cpython-311/yaml/nodes.pyc` in the archive.

    Two modules are still loaded by Python's own importer, which wants it beside the source.
    """
    module, tag, suffix = pyc.name.rsplit(".", 2)
    if module in ("__main__", "zipapp_importer"):
        return f"{module}.{suffix}"
    return str(Path("_pyc", tag, pyc.parents[1], f"{module}.{suffix}"))


def native_modules(wheels: list[Path]) -> dict[str, bytes]:
    """One solid stream for a platform: the same SQLite sits in its module for every Python."""
    streams: dict[str, bytes] = {}
    index = []
    for target, wheel in sorted((target_of(wheel) or "", wheel) for wheel in wheels):
        with zipfile.ZipFile(wheel) as archive:
            [name] = [n for n in archive.namelist() if re.match(r"apsw/__init__\..+\.so$", n)]
            module = archive.read(name)
        stream = f"_native/{target.partition('-')[2]}.xz"
        before = streams.get(stream, b"")
        index.append(
            f"{target} {len(before)} {len(module)} {zlib.crc32(module):08x} {sha256(module)}\n"
        )
        streams[stream] = before + module
    files = {name: lzma.compress(s, preset=9 | lzma.PRESET_EXTREME) for name, s in streams.items()}
    return files | {"_native/index": "".join(index).encode()}


def licences(wheels: Iterable[Path]) -> dict[str, bytes]:
    files = {
        f"LICENSES/nightcrier/{file.name}": file.read_bytes() for file in ROOT.glob("LICENSE*")
    }
    for wheel in wheels:
        with zipfile.ZipFile(wheel) as archive:
            for name in archive.namelist():
                if text := LICENCE.fullmatch(name):
                    files[f"LICENSES/{text['package']}/{text['name']}"] = archive.read(name)
    return files


# --- The file ---


def write_archive(output: Path, files: dict[str, bytes]) -> None:
    """The same files give the same bytes: nothing of this machine gets in but its zlib and xz."""
    date = max(int(os.environ.get("SOURCE_DATE_EPOCH", "0")), EARLIEST_ZIP_DATE)
    targets = [line.split()[0] for line in files["_native/index"].decode().splitlines()]
    print(f"packing {len(files)} files for {', '.join(targets)}")
    content = io.BytesIO()
    content.write(header(targets).encode())
    with zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
        for name in sorted(files):
            entry = zipfile.ZipInfo(name, time.gmtime(date)[:6])
            entry.create_system = 3  # Unix, and so the next line is a file mode
            entry.external_attr = 0o100644 << 16
            packed = name.endswith(".xz")
            entry.compress_type = zipfile.ZIP_STORED if packed else zipfile.ZIP_DEFLATED
            archive.writestr(entry, files[name])
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_bytes(content.getvalue())
    output.chmod(0o755)
    checksum = f"{sha256(content.getvalue())}  {output.name}\n"
    output.with_name(f"{output.name}.sha256").write_text(checksum)


def header(targets: list[str]) -> str:
    pythons = sorted({f"python3.{target[3:5]}" for target in targets}, reverse=True)
    return HEADER.format(pythons=" ".join(pythons), targets=", ".join(targets))


if __name__ == "__main__":
    try:
        main()
    except RuntimeError as error:
        sys.exit(f"pack.py: {error}")
