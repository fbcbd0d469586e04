"""What nightcrier.pyz says of itself: the package nightcrier_build, which exists only there.

nightcrier_build/__init__.py              constants, see Account
nightcrier_build/sbom.cdx.json            the software bill of materials, CycloneDX 1.6
nightcrier_build/LICENSES/<name>/<file>   of nightcrier, of each package, and of SQLite
"""

# ruff: noqa: S603 — it runs git, and Pythons that the build has found
import functools
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import tomllib
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wheels import NATIVE_PACKAGE, ROOT, Wheel, normalized, read_lock

PLACE = "nightcrier_build"
LICENCE = re.compile(r"[^/]+\.dist-info/(licenses/(?P<new>.+)|(?P<old>(LICEN|COPYING|NOTICE).*))")
MORE_LICENCES = Path(__file__).parent / "licences"  # of what is inside a wheel without its text
LICENCE_IDS = {
    "BSD 3-Clause License": "BSD-3-Clause",
    "MIT": "MIT",
    "MIT License": "MIT",
    "any-OSI": "any-OSI",
}
LATEST_ZIP_DATE = 4354819199  # 2107-12-31
ASK_SQLITE = """import json, sys
sys.path.insert(0, sys.argv[1])
import apsw
print(json.dumps([apsw.sqlite_lib_version(), apsw.compile_options]))"""


@dataclass(frozen=True)
class Account:
    """The constants of nightcrier_build, in upper case there."""

    commit: str  # the full hash, with -dirty if tracked files were changed; empty outside git
    source_date: str  # SOURCE_DATE_EPOCH, or when the commit was made: 2026-11-25T12:00:00Z
    sqlite: str  # its version, such as 3.54.1; empty if no apsw of the file runs where it was built
    sqlite_options: tuple[str, ...]  # apsw.compile_options; empty as above
    targets: tuple[str, ...]  # what the file has an apsw for, as in cp311-linux-gnu-x86_64
    bytecode: tuple[str, ...]  # versions of the Pythons that compiled for it, as in 3.11.7
    packages: dict[str, str]  # name -> version

    def source(self) -> bytes:
        lines = [f"{name.upper()} = {value!r}\n" for name, value in vars(self).items()]
        return f'"""What is in this file: its build has written it."""\n\n{"".join(lines)}'.encode()


def account_files(account: Account, wheels: list[Wheel]) -> dict[str, bytes]:
    sbom = json.dumps(bill_of_materials(account, wheels), indent=1, ensure_ascii=False)
    files = {"__init__.py": account.source(), "sbom.cdx.json": f"{sbom}\n".encode()}
    files |= {f"LICENSES/{name}": text for name, text in licences(wheels).items()}
    return {f"{PLACE}/{name}": content for name, content in files.items()}


# --- Facts ---


def git(*arguments: str) -> str:
    try:
        command = ["git", "-C", str(ROOT), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except OSError as error:
        raise RuntimeError(str(error)) from error
    except subprocess.CalledProcessError as error:
        raise RuntimeError(error.stderr.partition("\n")[0]) from error


@functools.cache
def checkout() -> tuple[str, int]:
    """The commit, with -dirty if tracked files were changed, and when it was made."""
    if not (ROOT / ".git").exists():  # that of another project may be around it
        return "", 0
    try:
        seconds, commit = git("rev-list", "--max-count=1", "--timestamp", "HEAD").split()
        changed = git("status", "--porcelain", "--untracked-files=no")
    except RuntimeError as error:  # there is no git, or the checkout belongs to another user
        warning = "WARNING: the file will not know its commit and the time of it"
        print(f"{warning}: {error}", file=sys.stderr)
        return "", 0
    return commit + ("-dirty" if changed else ""), int(seconds)


def source_date() -> int:
    """Whoever builds a commit gets the same times in the archive."""
    given = os.environ.get("SOURCE_DATE_EPOCH")
    if not given:
        return checkout()[1]
    if not given.isdecimal() or int(given) > LATEST_ZIP_DATE:
        raise RuntimeError(f"SOURCE_DATE_EPOCH is no time that a zip archive can have: {given}")
    return int(given)


def iso(seconds: int) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))


def sqlite_facts(wheel: Wheel, python: str) -> tuple[str, tuple[str, ...]]:
    """The version and the options of the SQLite in a wheel, from running it."""
    with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(wheel.path) as archive:
        for name in archive.namelist():
            if name.startswith("apsw/__init__.") and name.endswith(".so"):
                archive.extract(name, folder)
        command = [python, "-I", "-S", "-c", ASK_SQLITE, folder]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{wheel.path.name} does not run: {done.stderr.splitlines()[-1]}")
    version, options = json.loads(done.stdout)
    return version, tuple(options)


def own_version() -> str:
    [version] = re.findall(r'^__version__ = "(.+)"', (ROOT / "nightcrier.py").read_text(), re.M)
    return str(version)


# --- Licences ---


def licences(wheels: Iterable[Wheel]) -> dict[str, bytes]:
    files = {f"nightcrier/{file.name}": file.read_bytes() for file in ROOT.glob("LICENSE*")}
    for file in MORE_LICENCES.glob("*/*"):
        files[str(file.relative_to(MORE_LICENCES))] = file.read_bytes()
    for wheel in wheels:
        with zipfile.ZipFile(wheel.path) as archive:
            for name in archive.namelist():
                text = LICENCE.fullmatch(name)
                if text:
                    files[f"{wheel.package}/{text['new'] or text['old']}"] = archive.read(name)
    silent = {wheel.package for wheel in wheels} - {name.partition("/")[0] for name in files}
    if silent:
        where = MORE_LICENCES.relative_to(ROOT)
        raise RuntimeError(
            f"no licence text in the wheel of {', '.join(silent)}: add it to {where}"
        )
    return files


def licence(wheel: Wheel) -> dict[str, Any]:
    """As SPDX has it, in CycloneDX."""
    metadata = wheel.metadata()
    classes = [text.rpartition(" :: ")[2] for text in metadata.get_all("Classifier", [])]
    known = [LICENCE_IDS.get(text) for text in (metadata["License"], *classes)]
    name = next(filter(None, (metadata["License-Expression"], *known)), None)
    if not name:
        raise RuntimeError(f"{wheel.path.name} has a licence that is new to account.py")
    return {"expression": name} if " " in name else {"license": {"id": name}}


# --- Bill of materials ---


def bill_of_materials(account: Account, wheels: list[Wheel]) -> dict[str, Any]:
    """Without a serial number and the time of the build: the same build gives the same bytes."""
    with (ROOT / "pyproject.toml").open("rb") as file:
        needs = tomllib.load(file)["project"]["dependencies"]
    nightcrier = {
        "type": "application",
        "bom-ref": "nightcrier",
        "name": "nightcrier",
        "version": own_version(),
        "licenses": [{"license": {"id": "Apache-2.0"}}],
    }
    sqlite = sqlite_component(account.sqlite)
    refs = {normalized(name): purl(name) for name in account.packages}
    first = {wheel.package: wheel for wheel in reversed(wheels)}  # metadata is the same in all
    requirements = {
        purl(name): first[name].metadata().get_all("Requires-Dist", []) for name in first
    }
    depends = {"nightcrier": bundled(needs, refs)}
    depends |= {ref: bundled(texts, refs) for ref, texts in requirements.items()}
    depends[purl(NATIVE_PACKAGE)] += [sqlite["bom-ref"]]
    depends[sqlite["bom-ref"]] = []
    packages = [
        package_component(first[name], [wheel for wheel in wheels if wheel.package == name])
        for name in account.packages
    ]
    return {
        "$schema": "http://cyclonedx.org/schema/bom-1.6.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "version": 1,
        "metadata": {"timestamp": account.source_date, "component": nightcrier},
        "components": [*packages, sqlite],
        "dependencies": [{"ref": ref, "dependsOn": depends[ref]} for ref in depends],
    }


def purl(package: str) -> str:
    [version] = [locked.version for locked in read_lock() if locked.name == package]
    return f"pkg:pypi/{normalized(package)}@{version}"


def bundled(requirements: list[str], refs: dict[str, str]) -> list[str]:
    """The references of those packages, of the ones in requirements, that are in the file."""
    names = [normalized(re.split(r"[^\w.-]", text, maxsplit=1)[0]) for text in requirements]
    return [refs[name] for name in names if name in refs]


def package_component(wheel: Wheel, wheels: list[Wheel]) -> dict[str, Any]:
    metadata = wheel.metadata()
    return {
        "type": "library",
        "bom-ref": purl(wheel.package),
        "name": wheel.package,
        "version": metadata["Version"],
        "description": metadata["Summary"],
        "licenses": [licence(wheel)],
        "purl": purl(wheel.package),
        "externalReferences": [
            {
                "type": "distribution",
                "url": wheel.path.name,
                "hashes": [{"alg": "SHA-256", "content": wheel.sha256}],
            }
            for wheel in wheels
        ],
    }


def sqlite_component(version: str) -> dict[str, Any]:
    known = {
        "version": version,
        "purl": f"pkg:generic/sqlite@{version}",
        "cpe": f"cpe:2.3:a:sqlite:sqlite:{version}:*:*:*:*:*:*:*",
    }
    return {
        "type": "library",
        "bom-ref": "sqlite",
        "name": "SQLite",
        "description": f"Inside the native module of {NATIVE_PACKAGE}; in the public domain",
        "licenses": [{"license": {"id": "blessing"}}],
        **(known if version else {}),
    }
