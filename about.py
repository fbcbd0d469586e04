"""What this program is made of, as `nightcrier version` tells it, and how all of it is loaded.

In the .pyz everything is known before: account.py wrote it into the package `nightcrier_build`, so
that an answer loads no library. An installation asks the metadata of its packages, and SQLite.

Nothing here knows of incidents.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from importlib.metadata import PackageMetadata

# What `version` prints instead of its lines.
ARGUMENTS: Mapping[str, Mapping[str, Any]] = {
    "--licenses": {
        "dest": "part",
        "action": "store_const",
        "const": "licenses",
        "help": "the licence texts of everything that is bundled, or installed with it",
    },
    "--sbom": {
        "dest": "part",
        "action": "store_const",
        "const": "sbom",
        "help": "the bill of materials of the .pyz (CycloneDX, JSON)",
    },
}


class NotBundled(Exception):
    """Only the .pyz has what was asked for."""

    exit_code: ClassVar[int] = 2


def show(part: str | None, *, version: str, schema: str) -> None:
    """Print what `version` was asked for."""
    build = _build()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # licences name people in any alphabet
    if part == "licenses":
        print("\n".join(_licences(build, version)))
    elif part == "sbom":
        print(_bill_of_materials(build))
    else:
        print("\n".join(_lines(build, version, schema)))


def preload(*, postgres: bool) -> None:
    """Load what a long run can come to need: somebody may replace the file under it.

    What is missing is said where it is used.
    """
    for name in ("apsw", "markdown_it", "yaml", *(["pg8000.native"] if postgres else [])):
        with contextlib.suppress(ImportError):
            importlib.import_module(name)


def _build() -> ModuleType | None:
    """What the build says of the archive that this program runs from."""
    try:
        return importlib.import_module("nightcrier_build")
    except ModuleNotFoundError:
        return None


def _bill_of_materials(build: ModuleType | None) -> str:
    if build is None:
        raise NotBundled("only nightcrier.pyz has a bill of materials: ask that file for it")
    import importlib.resources

    file = importlib.resources.files(build).joinpath("sbom.cdx.json")
    return file.read_text(encoding="utf-8").rstrip("\n")


def _lines(build: ModuleType | None, version: str, schema: str) -> Iterator[str]:
    import platform

    yield f"nightcrier {version}{_origin(build)}"
    implementation = platform.python_implementation()
    rows = [
        ("program", str(_program())),
        ("python", f"{platform.python_version()} {implementation} {sys.executable}"),
        *_sqlite_rows(build),
        ("schema", schema),
        *(("package", f"{name} {found}") for name, found in _by_name(_packages(build))),
    ]
    if build is not None:
        rows += [("target", line) for line in grouped_targets(build.TARGETS)]
        rows.append(("bytecode", " ".join(build.BYTECODE) or "none"))
    for key, value in rows:
        yield f"{key:<17}{value}"


def _origin(build: ModuleType | None) -> str:
    if build is None:
        return ""
    commit, _, dirty = (build.COMMIT or "unknown").partition("-")
    commit = "-".join(filter(None, [commit[:7], dirty]))
    return f" (commit {commit}, {build.SOURCE_DATE[:10]})"


def _program() -> Path:
    """The .pyz, or the folder of the modules."""
    return Path(__file__).resolve().parent


def _by_name(found: Mapping[str, str]) -> list[tuple[str, str]]:
    return sorted(found.items(), key=lambda item: item[0].lower())


def grouped_targets(targets: Iterable[str]) -> Iterator[str]:
    """`cp311-linux-gnu-x86_64` and so on, as `CPython 3.11-3.15 on linux-gnu-x86_64`."""
    platforms: dict[str, list[tuple[str, int]]] = {}
    for target in targets:
        if found := re.fullmatch(r"cp3(\d+)(t?)-(.+)", target):
            platforms.setdefault(found[3], []).append((found[2], int(found[1])))
    for platform, versions in sorted(platforms.items()):
        ranges: list[list[tuple[str, int]]] = []
        for threading, minor in sorted(versions):
            if ranges and ranges[-1][-1] == (threading, minor - 1):
                ranges[-1].append((threading, minor))
            else:
                ranges.append([(threading, minor)])
        shown = (
            "-".join(f"3.{minor}{threading}" for threading, minor in dict.fromkeys((r[0], r[-1])))
            for r in ranges
        )
        yield f"CPython {', '.join(shown)} on {platform}"


# Those that matter to who runs or packages it, of the options that have a value.
_SETTINGS = (
    "DEFAULT_SYNCHRONOUS",
    "DEFAULT_WAL_SYNCHRONOUS",
    "DQS",
    "MAX_ATTACHED",
    "MAX_LENGTH",
    "MAX_VARIABLE_NUMBER",
    "SECURE_DELETE",
    "TEMP_STORE",
    "THREADSAFE",
)


def _sqlite_rows(build: ModuleType | None) -> Iterator[tuple[str, str]]:
    options: Sequence[str]
    if build is not None and build.SQLITE:  # unknown if nothing of it runs where it was built
        version, options = build.SQLITE, build.SQLITE_OPTIONS
    else:
        try:
            import apsw
        except ImportError as error:
            yield "sqlite", f"none: the package apsw cannot be loaded: {error}"
            return
        version, options = apsw.sqlite_lib_version(), apsw.compile_options
    yield "sqlite", version
    yield from sqlite_options(options)


def sqlite_options(options: Sequence[str]) -> Iterator[tuple[str, str]]:
    if not options:
        return
    # What is so unless an option says otherwise is not in SQLite's list.
    given = {"DQS": "3"} | dict(option.partition("=")[::2] for option in options)
    enabled = {name.removeprefix("ENABLE_") for name in given if name.startswith("ENABLE_")}
    omitted = {name.removeprefix("OMIT_") for name in given if name.startswith("OMIT_")}
    settings = [f"{name}={given[name]}".rstrip("=") for name in _SETTINGS if name in given]
    yield "sqlite-settings", " ".join(settings)
    yield "sqlite-features", " ".join(sorted(enabled | ({"JSON", "LOAD_EXTENSION"} - omitted)))
    yield "sqlite-omitted", " ".join(sorted(omitted)) or "none"


PACKAGES = ("apsw", "h11", "markdown-it-py", "pg8000", "PyYAML")


def _packages(build: ModuleType | None) -> dict[str, str]:
    if build is not None:
        return dict(build.PACKAGES)
    from importlib import metadata

    found: dict[str, str] = {}
    wanted = list(PACKAGES)
    while wanted:
        name = wanted.pop()
        try:
            package = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            if name in PACKAGES:
                found[name] = "missing"
            continue  # of another platform, maybe
        if package.metadata["Name"] not in found:
            found[package.metadata["Name"]] = package.version
            needs = [need for need in package.requires or () if "extra ==" not in need]
            wanted += [re.split(r"[^\w.-]", need, maxsplit=1)[0] for need in needs]
    return found


_LICENCE = re.compile(r".*\.(dist|egg)-info/(.*/)?(LICEN|COPYING|NOTICE)[^/]*")
_SQLITE_LICENCE = """\
SQLite is in the public domain. Its source files begin with:

The author disclaims copyright to this source code. In place of a legal notice, here is a blessing:

   May you do good and not evil.
   May you find forgiveness for yourself and forgive others.
   May you share freely, never taking more than you give.

https://sqlite.org/copyright.html
"""


def _licences(build: ModuleType | None, version: str) -> Iterator[str]:
    """Each text with a heading, packages in the order of their names."""
    packages = _packages(build) | {"nightcrier": version}
    texts = _bundled_licences(build) if build is not None else _installed_licences(packages)
    titles = {_plain(name): f"{name} {found}" for name, found in packages.items()}
    titles["sqlite"] = "SQLite"
    if "sqlite" not in {_plain(name) for name, _, _ in texts}:
        texts.append(("SQLite", "public domain", _SQLITE_LICENCE))
    for name, file, licence in sorted((_plain(name), *rest) for name, *rest in texts):
        yield f"==== {titles.get(name, name)}: {file} ====\n\n{licence.strip()}\n"


def _plain(name: str) -> str:
    """The name of a package, however it is spelled."""
    return re.sub(r"[-_.]+", "-", name).lower()


def _bundled_licences(build: ModuleType) -> list[tuple[str, str, str]]:
    import importlib.resources

    return [
        (folder.name, file.name, file.read_text(encoding="utf-8"))
        for folder in importlib.resources.files(build).joinpath("LICENSES").iterdir()
        for file in folder.iterdir()
    ]


def _installed_licences(names: Iterable[str]) -> list[tuple[str, str, str]]:
    from importlib import metadata

    texts: list[tuple[str, str, str]] = []
    for name in names:
        own = _program() / "LICENSE"  # of a checkout
        if name == "nightcrier" and own.is_file():
            texts.append((name, own.name, own.read_text(encoding="utf-8")))
            continue
        try:
            package = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            continue
        files = [file for file in package.files or () if _LICENCE.fullmatch(str(file))]
        texts += [(name, file.name, file.read_text(encoding="utf-8")) for file in files]
        if not files:
            texts.append((name, "no text", _named_licence(package.metadata)))
    return texts


def _named_licence(said: PackageMetadata) -> str:
    named = said.get_all("License-Expression") or said.get_all("License") or ["none"]
    return f"It was installed without a text. The licence that it names: {', '.join(named)}"
