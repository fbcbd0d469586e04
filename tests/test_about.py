"""What `version` says, in an installation and in the .pyz; what a long run loads at its start."""

from __future__ import annotations

import ast
import importlib.util
import json
import re
import subprocess
import sys
import tomllib
import zipfile
from importlib import metadata
from pathlib import Path

import apsw
import pytest

import about
from nightcrier import __version__
from running_program import clean_environment, nightcrier

ROOT = Path(__file__).parents[1]
BUILD = """
COMMIT = "32ac62df0e5bbd4b3c9c2ea2a7a0a2b5a1d0c9e8-dirty"
SOURCE_DATE = "2026-11-25T03:04:05Z"
SQLITE = "3.99.9"
SQLITE_OPTIONS = ("ENABLE_FTS5", "MAX_ATTACHED=125", "OMIT_SHARED_CACHE", "THREADSAFE=1")
TARGETS = ("cp311-linux-gnu-x86_64", "cp312-linux-gnu-x86_64", "cp314-macos-arm64")
BYTECODE = ("3.11.7", "3.12.1")
PACKAGES = {"h11": "9.9.9", "apsw": "9.9.9.0", "PyYAML": "9.9"}
"""


@pytest.fixture
def build(tmp_path: Path) -> Path:
    """What the build puts into the .pyz, in an archive of its own."""
    path = tmp_path / "build.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("nightcrier_build/__init__.py", BUILD)
        archive.writestr("nightcrier_build/sbom.cdx.json", '{"bomFormat": "CycloneDX"}\n')
        for package in ("pyyaml", "apsw", "nightcrier"):
            archive.writestr(f"nightcrier_build/LICENSES/{package}/LICENSE", f"of {package}, ©\n")
        archive.writestr("nightcrier_build/LICENSES/apsw/NOTICE", "noted\n")
    return path


def version(*words: str, cwd: Path, path: Path | str = "") -> str:
    done = nightcrier("version", *words, cwd=cwd, PYTHONPATH=str(path))
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def headings(text: str) -> list[str]:
    return re.findall(r"^==== (.*) ====$", text, re.MULTILINE)


# ---- In the archive ----


def test_the_archive_says_what_it_was_built_from(build: Path, tmp_path: Path) -> None:
    first, program, python, *rest = version(cwd=tmp_path, path=build).splitlines()
    assert first == f"nightcrier {__version__} (commit 32ac62d-dirty, 2026-11-25)"
    assert program.split() == ["program", str(ROOT)]
    assert re.fullmatch(rf"python +3\.\d+\.\S+ CPython {re.escape(sys.executable)}", python)
    assert rest == [
        "sqlite           3.99.9",
        "sqlite-settings  DQS=3 MAX_ATTACHED=125 THREADSAFE=1",
        "sqlite-features  FTS5 JSON LOAD_EXTENSION",
        "sqlite-omitted   SHARED_CACHE",
        "schema           0002_cluster_watches",
        "package          apsw 9.9.9.0",
        "package          h11 9.9.9",
        "package          PyYAML 9.9",
        "target           CPython 3.11-3.12 on linux-gnu-x86_64",
        "target           CPython 3.14 on macos-arm64",
        "bytecode         3.11.7 3.12.1",
    ]


def test_a_build_without_a_commit_says_so(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "other.zip", "w") as archive:
        unknown = re.sub(r"COMMIT = .*", 'COMMIT = ""', BUILD)
        archive.writestr("nightcrier_build/__init__.py", unknown)
    first = version(cwd=tmp_path, path=tmp_path / "other.zip").splitlines()[0]
    assert first.endswith(" (commit unknown, 2026-11-25)")


def test_a_build_for_other_hosts_asks_sqlite_itself(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "other.zip", "w") as archive:
        unknown = re.sub(r"(SQLITE\w*) = .*", r"\1 = ()", BUILD)
        archive.writestr("nightcrier_build/__init__.py", unknown)
    lines = version(cwd=tmp_path, path=tmp_path / "other.zip").splitlines()
    assert f"sqlite           {apsw.sqlite_lib_version()}" in lines


@pytest.mark.parametrize("words", [[], ["--licenses"], ["--sbom"]])
def test_the_archive_answers_without_its_libraries(
    words: list[str], build: Path, tmp_path: Path
) -> None:
    code = f"""if True:
        import sys
        sys.path[:0] = [{str(ROOT)!r}, {str(build)!r}]
        import nightcrier
        assert nightcrier.main(["version", *{words!r}]) == 0
        libraries = {{"apsw", "markdown_it", "pg8000", "yaml", "importlib.metadata"}}
        assert not libraries & set(sys.modules)
    """
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, capture_output=True)


def test_the_archive_prints_the_licences_in_it(build: Path, tmp_path: Path) -> None:
    printed = version("--licenses", cwd=tmp_path, path=build)
    assert headings(printed) == [
        "apsw 9.9.9.0: LICENSE",
        "apsw 9.9.9.0: NOTICE",
        f"nightcrier {__version__}: LICENSE",
        "PyYAML 9.9: LICENSE",
        "SQLite: public domain",
    ]
    assert "==== PyYAML 9.9: LICENSE ====\n\nof pyyaml, ©\n" in printed
    assert "May you do good and not evil." in printed


def test_licences_are_printed_in_any_encoding(build: Path, tmp_path: Path) -> None:
    environment = {"PYTHONPATH": str(build), "PYTHONIOENCODING": "ascii"}
    done = nightcrier("version", "--licenses", cwd=tmp_path, **environment)
    assert done.returncode == 0, done.stderr
    assert "\nof pyyaml, ?\n" in done.stdout


def test_the_archive_prints_its_bill_of_materials(build: Path, tmp_path: Path) -> None:
    assert json.loads(version("--sbom", cwd=tmp_path, path=build)) == {"bomFormat": "CycloneDX"}


# ---- In an installation ----


def test_an_installation_says_what_is_installed(tmp_path: Path) -> None:
    first, *lines = version(cwd=tmp_path).splitlines()
    assert first == f"nightcrier {__version__}"
    found = [line.split(maxsplit=1) for line in lines]
    assert ["sqlite", apsw.sqlite_lib_version()] in found
    assert ["schema", "0002_cluster_watches"] in found
    for name in (*about.PACKAGES, "scramp", "asn1crypto", "mdurl", "python-dateutil"):
        assert ["package", f"{name} {metadata.version(name)}"] in found
    assert not {"target", "bytecode"} & {key for key, _ in found}


def test_the_packages_that_it_asks_for_are_those_of_the_project() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert [re.split("[~>=]", need)[0] for need in project["dependencies"]] == [*about.PACKAGES]


def test_a_library_that_does_not_load_is_said(tmp_path: Path) -> None:
    (tmp_path / "apsw.py").write_text("raise ImportError('no SQLite here')\n")
    lines = version(cwd=tmp_path, path=tmp_path).splitlines()
    assert "sqlite           none: the package apsw cannot be loaded: no SQLite here" in lines


def test_an_installation_prints_the_licences_of_its_packages(tmp_path: Path) -> None:
    printed = version("--licenses", cwd=tmp_path)
    found = headings(printed)
    assert found == sorted(found, key=str.lower)
    packages = {heading.partition(" ")[0].rstrip(":") for heading in found}
    assert {*about.PACKAGES, "nightcrier", "scramp", "SQLite"} <= packages
    assert not any(heading.endswith("no text") for heading in found)
    assert (ROOT / "LICENSE").read_text().strip() in printed


def test_only_the_archive_has_a_bill_of_materials(tmp_path: Path) -> None:
    done = nightcrier("version", "--sbom", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        "nightcrier: only nightcrier.pyz has a bill of materials: ask that file for it\n"
    )


# ---- How it is said ----


@pytest.mark.parametrize(
    ("pythons", "said"),
    [
        ("cp311 cp312 cp313", "3.11-3.13"),
        ("cp39 cp310", "3.9-3.10"),
        ("cp315 cp311 cp313 cp314", "3.11, 3.13-3.15"),
        ("cp313 cp313t cp314t", "3.13, 3.13t-3.14t"),
    ],
)
def test_targets_are_grouped_by_platform(pythons: str, said: str) -> None:
    targets = [f"{python}-linux-musl-aarch64" for python in pythons.split()]
    assert [*about.grouped_targets(targets)] == [f"CPython {said} on linux-musl-aarch64"]


def test_what_an_option_of_sqlite_switches_off_is_not_among_its_features() -> None:
    said = dict(about.sqlite_options(["OMIT_JSON", "DQS=0", "SECURE_DELETE", "ENABLE_STAT4"]))
    assert said == {
        "sqlite-settings": "DQS=0 SECURE_DELETE",
        "sqlite-features": "LOAD_EXTENSION STAT4",
        "sqlite-omitted": "JSON",
    }


# ---- What is loaded at the start ----


def functions_imports(module: str, file: Path) -> set[str]:
    """The modules that functions of a module import when they are called."""
    package = module if file.name == "__init__.py" else module.rpartition(".")[0]
    found: set[str] = set()
    for function in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if not isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        for node in ast.walk(function):
            if isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                name = "." * node.level + (node.module or "")
                found.add(importlib.util.resolve_name(name, package))
    return found


@pytest.mark.parametrize(("postgres", "later"), [(True, set()), (False, {"pg8000"})])
def test_after_the_start_nothing_imports_a_package_for_the_first_time(
    postgres: bool, later: set[str], tmp_path: Path
) -> None:
    code = f"""if True:
        import json, sys
        import about, nightcrier
        about.preload(postgres={postgres})
        modules = {{name: getattr(m, "__file__", None) for name, m in sys.modules.items()}}
        print(json.dumps(modules))
    """
    environment = clean_environment(PYTHONPATH=str(ROOT))
    printed = subprocess.check_output(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, text=True
    )
    loaded: dict[str, str | None] = json.loads(printed)
    ours = {"apsw", "asn1crypto", "dateutil", "h11", "markdown_it", "mdurl", "pg8000"}
    ours |= {"scramp", "yaml"}
    ours |= {path.stem for path in ROOT.glob("*.py")}
    missing = {
        name.partition(".")[0]
        for module, file in loaded.items()
        if file and file.endswith(".py") and module.partition(".")[0] in ours
        for name in functions_imports(module, Path(file)) - loaded.keys()
        if name.partition(".")[0] in ours
    }
    assert missing == later
