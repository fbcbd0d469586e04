"""The delivered file: built once, then run as its users run it."""

import ast
import contextlib
import json
import marshal
import os
import platform
import re
import shutil
import subprocess
import sys
import textwrap
import time
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path

import pytest

from built_files import ROOT, Result

THIS_PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"
NOBODY = 65534
DAY = 86400

# Other users and mounts. On CI they have to be there, so that nothing is left out without notice.
as_root = pytest.mark.skipif(
    os.geteuid() != 0 and "CI" not in os.environ, reason="takes root: other users and mounts"
)


def find_python(version: str) -> Path | None:
    pyenv = sorted(Path.home().glob(f".pyenv/versions/{version}.*/bin/python{version}"))
    for python in [*pyenv, shutil.which(f"python{version}")]:
        # Run it: a pyenv shim has not always something behind it.
        if python and not subprocess.call([python, "-c", ""], stderr=subprocess.DEVNULL):
            return Path(python)
    return None


def supported_pythons() -> list[Path]:
    """One of each version that is found, and those of NIGHTCRIER_TEST_PYTHONS (path:path)."""
    named = os.environ.get("NIGHTCRIER_TEST_PYTHONS", "").split(":")
    found = [find_python(f"3.{minor}") for minor in range(11, 16)]
    return [Path(python) for python in [*found, *named] if python]


every_python = pytest.mark.parametrize("python", supported_pythons(), ids=lambda path: path.name)


def read_archive(archive: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(archive) as file:
        return {name: file.read(name) for name in file.namelist()}


def write_archive(path: Path, files: Mapping[str, bytes], header: bytes = b"") -> Path:
    path.write_bytes(header)
    path.chmod(0o755)
    with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


@pytest.fixture(scope="session")
def bare(pyz: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same file as a build makes it that has none of our interpreters: without bytecode."""
    files = read_archive(pyz)
    kept = {name: files[name] for name in files if not name.startswith("_pyc/cpython-")}
    header = pyz.read_bytes().partition(b"PK\3\4")[0]
    return write_archive(tmp_path_factory.mktemp("bare") / "nightcrier.pyz", kept, header)


class Host:
    """A user: a home, a PATH whose python3 is the one that runs these tests, nothing else."""

    def __init__(self, folder: Path) -> None:
        self.home = folder / "home"
        self.bin = folder / "bin"
        self.cache = self.home / ".cache" / "nightcrier"
        self.migrate = ["migrate", "up", "--sqlite", str(folder / "nightcrier.db")]
        self.home.mkdir()
        self.bin.mkdir()
        self.install("python3", sys.executable)

    def install(self, name: str, python: str | Path) -> None:
        (self.bin / name).unlink(missing_ok=True)
        (self.bin / name).symlink_to(python)

    def environment(self, **more: str) -> dict[str, str]:
        return {"HOME": str(self.home), "PATH": f"{self.bin}:/usr/bin:/bin", **more}

    def run(self, *command: str | Path, umask: int = 0o022, **environment: str) -> Result:
        return subprocess.run(
            command,
            env=self.environment(**environment),
            cwd=self.home,
            umask=umask,
            capture_output=True,
            text=True,
            check=False,
            timeout=120,  # of a start that waits for ever
        )

    def runs(self, *command: str | Path, umask: int = 0o022, **environment: str) -> str:
        """The same, for a command that has to succeed, without a word on stderr."""
        result = self.run(*command, umask=umask, **environment)
        assert (result.returncode, result.stderr) == (0, "")
        return result.stdout

    def refuses(self, *command: str | Path, **environment: str) -> str:
        """The same, for one that has to end for a missing dependency, with one line."""
        result = self.run(*command, **environment)
        assert result.returncode == 5
        [line] = result.stderr.splitlines()
        assert line.startswith("nightcrier: ")
        return line

    def python(self, code: str, **environment: str) -> str:
        return self.runs("python3", "-c", code, **environment)

    def mounted(self, mounts: str, *command: str | Path, **environment: str) -> str:
        """Run it where the shell commands have changed the file systems, for it alone."""
        script = f'set -e\n{mounts}\nexec "$@"'
        return self.runs("unshare", "-m", "sh", "-c", script, "sh", *command, **environment)

    def patch(self, code: str) -> dict[str, str]:
        """The environment of a Python that runs this first; -I and -S would keep it from that."""
        (self.bin.parent / "patch").mkdir()
        (self.bin.parent / "patch" / "sitecustomize.py").write_text(code)
        return {"PYTHONPATH": str(self.bin.parent / "patch")}

    def cached(self) -> set[str]:
        return {path.name for path in self.cache.iterdir()}


@pytest.fixture
def host(tmp_path: Path) -> Host:
    return Host(tmp_path)


@pytest.fixture
def cached(pyz: Path, host: Host) -> Path:
    """The native module, where the first start has left it."""
    host.runs(pyz, *host.migrate)
    [file] = host.cache.glob("*.so")
    return file


# --- Ways to start it ---


def test_version_says_the_version_of_the_module_and_leaves_nothing_in_the_home(pyz, host):
    source = ast.parse((ROOT / "nightcrier.py").read_text())
    assigned = [node for node in source.body if isinstance(node, ast.Assign)]
    [version] = [
        a.value.value for a in assigned if getattr(a.targets[0], "id", "") == "__version__"
    ]

    assert version in host.runs(pyz, "version")
    assert list(host.home.iterdir()) == []


@every_python
def test_it_starts_with_every_supported_python(pyz, host, python):
    host.install("python3", python)

    for _ in ("cold", "warm"):
        host.runs(pyz, "version")
        host.runs(pyz, *host.migrate)
        host.runs("python3", pyz, *host.migrate)
    assert len(host.cached()) == 1


def test_the_demo_runs_the_whole_pipeline_from_the_file(pyz, host):
    printed = host.run(
        *(pyz, "demo", "--sqlite", host.home / "demo.db", "--health-listen", "127.0.0.1:0")
    ).stdout

    assert "RESOLVED" in printed
    pages = [*host.home.glob("demo.incidents/*/output/investigation.html")]
    assert pages
    assert all("<h2>Root Cause</h2>" in page.read_text() for page in pages)


def test_it_runs_through_a_symlink_and_from_a_path_with_spaces(pyz, host, tmp_path):
    folder = tmp_path / "a folder, früher"
    folder.mkdir()
    copy = Path(shutil.copy(pyz, folder))
    (host.bin / "nightcrier").symlink_to(copy)

    host.runs("nightcrier", *host.migrate)
    host.runs(copy, *host.migrate)


def test_it_runs_behind_another_header(pyz, host, tmp_path):
    copy = tmp_path / "nightcrier.pyz"
    copy.write_bytes(b"#!/usr/bin/env python3\n" + pyz.read_bytes())
    copy.chmod(0o755)

    host.runs(copy, *host.migrate)


@pytest.mark.parametrize(
    "options", [[], ["-I"], ["-S", "-P"], ["-B", "-OO"], ["-W", "error"]], ids=" ".join
)
def test_it_runs_when_named_to_python_by_a_relative_path(pyz, host, tmp_path, options):
    copy = Path(shutil.copy(pyz, tmp_path))
    copy.chmod(0o444)

    host.runs("python3", *options, f"../{copy.name}", *host.migrate)


@pytest.mark.parametrize("name", ["PYTHONSAFEPATH", "PYTHONOPTIMIZE", "PYTHONDONTWRITEBYTECODE"])
def test_it_runs_with_the_variables_that_python_knows(pyz, host, name):
    host.runs("python3", pyz, *host.migrate, **{name: "1"})


def test_a_python_home_of_something_else_is_overlooked(pyz, host):
    host.runs(pyz, *host.migrate, PYTHONHOME="/nonexistent")


@pytest.mark.parametrize("umask", [0o077, 0o000])
def test_whatever_the_umask_what_it_leaves_is_for_its_user_alone(bare, host, umask):
    host.runs(bare, *host.migrate, umask=umask)

    assert host.cache.stat().st_mode & 0o777 == 0o700
    assert {path.stat().st_mode & 0o777 for path in host.cache.iterdir()} == {0o500}


def test_the_header_passes_over_a_python3_that_is_too_old(pyz, host):
    old = find_python("3.9") or find_python("3.10")
    if not old:
        pytest.skip("no Python 3.9 or 3.10 here")
    host.install("python3", old)
    host.install(f"python{THIS_PYTHON}", sys.executable)

    host.runs(pyz, *host.migrate)


def test_the_exit_code_of_a_failing_command_passes_through(pyz, host, tmp_path):
    (tmp_path / "nightcrier.db").write_text("this is a text file, and a long one at that\n" * 100)

    assert host.run(pyz, "no-such-command").returncode == 2
    assert host.run(pyz, *host.migrate).returncode == 4


@pytest.mark.parametrize(
    "closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"], ids=["stdin", "stdout", "stderr", "all"]
)
def test_it_runs_without_standard_streams_and_opens_nothing_in_their_place(
    pyz, host, tmp_path, closed
):
    look = f"""if True:
        import atexit, os

        def look():
            opened = [os.readlink(f"/proc/self/fd/{{number}}") for number in range(3)]
            with open({str(tmp_path / "opened")!r}, "w") as file:
                file.write("\\n".join(opened))

        atexit.register(look)
    """
    redirected = ["sh", "-c", f'exec "$@" {closed}', "sh", "python3", "-W", "error", pyz]

    host.runs(*redirected, *host.migrate, **host.patch(look))

    opened = (tmp_path / "opened").read_text().splitlines()
    assert "/dev/null" in opened
    assert [file for file in opened if str(tmp_path) in file or ".pyz" in file] == []


def test_ctrl_c_during_the_imports_ends_it_without_a_word(pyz, host):
    press_it = """if True:
        import signal, sys

        def press(event, arguments):
            if event == "import" and arguments[0] == "settings":
                signal.raise_signal(signal.SIGINT)

        signal.signal(signal.SIGINT, signal.default_int_handler)  # in the background it is ignored
        sys.addaudithook(press)
    """
    result = host.run("python3", pyz, *host.migrate, **host.patch(press_it))

    assert (result.returncode, result.stderr) == (130, "")


# --- What it says of itself ---


def test_version_says_what_is_in_the_file(pyz, host):
    first, *lines = host.runs(pyz, "version").splitlines()
    said = [line.split(maxsplit=1) for line in lines]
    locked = re.findall(r"^(\S+)==(\S+)", (ROOT / "requirements.lock").read_text(), re.M)

    assert re.fullmatch(
        r"nightcrier \S+ \(commit (unknown|[0-9a-f]{7}(-dirty)?), \d{4}-\d\d-\d\d\)", first
    )
    assert ["program", str(pyz)] in said
    assert {value.lower() for key, value in said if key == "package"} >= {
        f"{name} {version}".lower() for name, version in locked
    }
    assert any(key == "target" and f"{THIS_PYTHON}" in value for key, value in said)
    assert any(
        key == "bytecode" and platform.python_version() in value.split() for key, value in said
    )
    assert list(host.home.iterdir()) == []  # the native library was not needed


def test_version_says_the_sqlite_that_the_file_brings(pyz, host):
    printed = host.python(f"""if True:
        import sys
        sys.path.insert(0, {str(pyz)!r})
        import apsw, nightcrier_build
        assert nightcrier_build.SQLITE == apsw.sqlite_lib_version()
        print(set(nightcrier_build.SQLITE_OPTIONS) <= set(apsw.compile_options))
    """)

    assert printed == "True\n"


@every_python
def test_version_prints_the_licences_and_the_bill_of_materials_of_the_file(pyz, host, python):
    locked = re.findall(r"^(\S+)==(\S+)", (ROOT / "requirements.lock").read_text(), re.M)
    printed = host.runs(python, pyz, "version", "--licenses")
    headings = re.findall(r"^==== (\S+) (\S+): .* ====$", printed, re.M)
    components = json.loads(host.runs(python, pyz, "version", "--sbom"))["components"]

    wanted = {(name.lower(), version) for name, version in locked}
    assert {(name.lower(), version) for name, version in headings} >= wanted
    assert {(c["name"].lower(), c["version"]) for c in components} >= wanted


# --- Where it cannot run ---


NEEDS = "needs CPython 3.11 or newer, with its whole standard library, on Linux or macOS"
BUNDLED = r"this file has: CPython 3\.\d\d[\d., -]* on linux-gnu-\w+"


@pytest.mark.parametrize("version", ["2.7", "3.6", "3.7", "3.8", "3.9", "3.10"])
def test_an_unsupported_python_gets_one_line_and_exit_code_5(pyz, host, version):
    python = find_python(version)
    if not python:
        pytest.skip(f"no Python {version} here")

    line = host.refuses(python, pyz, "version")

    assert re.search(f"this is CPython {version} on Linux: it {NEEDS}; {BUNDLED}", line)


def test_a_host_without_python_gets_one_line_and_exit_code_5(pyz, host):
    line = host.refuses(pyz, "version", PATH="/nonexistent")

    assert re.search(f"needs Python 3.11 or newer, and found none; {BUNDLED}", line)


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("sys.implementation.name = 'pypy'", f"this is .* on Linux: it {NEEDS}; {BUNDLED}"),
        ("os.name = 'nt'", f"this is .* on Linux: it {NEEDS}; {BUNDLED}"),
        ("sys.modules['zlib'] = None", f"cannot start: .*zlib.*: it {NEEDS}; {BUNDLED}"),
        ("sys.modules['_ctypes'] = None", f"cannot start: .*_ctypes.*: it {NEEDS}; {BUNDLED}"),
        ("sys.modules['lzma'] = None", "does not load: this Python was built without lzma"),
        ("sys.abiflags = 't'", rf"no bundled apsw for cp3\d\dt-linux-gnu-\w+; {BUNDLED}"),
        ("machine('riscv64')", rf"no bundled apsw for cp3\d\d-linux-gnu-riscv64; {BUNDLED}"),
        (
            "machine('riscv64'); libc(None)",
            rf"no bundled apsw for cp3\d\d-linux-musl-riscv64; {BUNDLED}",
        ),
        ("libc('glibc 2.17')", r"needs glibc 2\.28, and this host has 2\.17"),
    ],
)
def test_a_host_that_it_cannot_serve_gets_one_line_and_exit_code_5(pyz, host, code, said):
    faked = """if True:
        import os, sys

        def machine(name):
            os.uname = lambda: os.uname_result(("Linux", "host", "6.1", "#1", name))

        def libc(version):
            def confstr(name):
                if version is None:
                    raise ValueError("unrecognized configuration name")
                return version
            os.confstr = confstr

    """
    line = host.refuses("python3", pyz, *host.migrate, **host.patch(f"{faked}    {code}\n"))

    assert re.search(said, line)


@pytest.mark.parametrize("kept", [0.5, -1], ids=["a half", "all but a byte"])
def test_a_truncated_file_does_not_run(pyz, host, tmp_path, kept):
    """Python finds no directory at its end, takes it for a script, and cannot read that."""
    content = pyz.read_bytes()
    truncated = tmp_path / "truncated.pyz"
    truncated.write_bytes(content[: int(len(content) * kept) if kept > 0 else kept])
    truncated.chmod(0o755)

    result = host.run(truncated, *host.migrate)

    assert result.returncode == 1
    assert "SyntaxError: " in result.stderr
    assert list(host.home.iterdir()) == []


def alter(archive: Path, name: str) -> None:
    """Flip a bit in the middle of an entry."""
    with zipfile.ZipFile(archive) as file:
        entry = file.getinfo(name)
    content = bytearray(archive.read_bytes())
    content[entry.header_offset + 30 + len(name) + entry.compress_size // 2] ^= 0x10
    archive.write_bytes(content)


@pytest.mark.parametrize("entry", [r"_native/.+\.xz", "_pyc/{tag}/modules", "nightcrier.py"])
def test_an_altered_file_is_refused_in_one_line(pyz, bare, host, tmp_path, entry):
    """What starts first is not checked: start.py, and the importer that has the checks."""
    source = bare if entry == "nightcrier.py" else pyz
    pattern = entry.format(tag=sys.implementation.cache_tag)
    copy = Path(shutil.copy(source, tmp_path))
    for name in read_archive(copy):
        if re.fullmatch(pattern, name):
            alter(copy, name)

    line = host.refuses("python3", copy, *host.migrate)

    assert f"{copy} is damaged, or was written over while it ran: get it anew" in line


# --- Whose modules are imported ---


FAKE = "raise RuntimeError('imported from the host')\n"


def test_modules_of_the_host_are_not_imported(pyz, host, tmp_path):
    ours = {Path(name).parts[0] for name in read_archive(pyz) if name.endswith(".py")}
    assert {"apsw", "h11", "pg8000", "scramp", "settings.py", "zipapp_cache.py"} <= ours
    for folder in (tmp_path / "site", host.home):  # the home is where it is started
        for name in {*ours, "sqlite3.py"} - {"__main__.py"}:
            module = folder / name if name.endswith(".py") else folder / name / "__init__.py"
            module.parent.mkdir(parents=True, exist_ok=True)
            module.write_text(FAKE)

    host.runs("python3", pyz, *host.migrate, PYTHONPATH=str(tmp_path / "site"))
    host.runs(pyz, *host.migrate, PYTHONPATH=str(tmp_path / "site"))


def test_packages_that_the_host_imported_before_the_start_are_forgotten(pyz, host):
    environment = host.patch(
        "import sys, types\n"
        "sys.modules.update((name, types.ModuleType(name)) for name in ('apsw', 'yaml', 'h11'))\n"
    )
    host.runs("python3", pyz, *host.migrate, **environment)


def inside(pyz: Path, code: str) -> str:
    """Code that runs with the archive's modules."""
    begin = f"""
import os, sys
sys.path.insert(0, {str(pyz)!r})
import zipapp_importer
zipapp_importer.install({str(pyz)!r})
"""
    return begin + textwrap.dedent(code)


def test_modules_know_their_source(pyz, host):
    code = "import inspect, nightcrier; print(inspect.getsource(nightcrier.main))"
    printed = host.python(inside(pyz, code))

    assert printed.strip() in (ROOT / "nightcrier.py").read_text()


def test_the_driver_of_postgresql_loads_without_looking_for_its_metadata(pyz, host):
    code = """
        import pg8000.native, scramp
        assert "importlib.metadata" not in sys.modules
        print(pg8000.native.__file__, pg8000.native.__version__, scramp.__version__)
    """
    printed = host.runs("python3", "-I", "-S", "-c", inside(pyz, code))

    locked = dict(re.findall(r"^(\S+)==(\S+)", (ROOT / "requirements.lock").read_text(), re.M))
    versions = f"{locked['pg8000']} {locked['scramp']}"
    assert printed == f"{pyz}/pg8000/native.py {versions}\n"


def test_a_traceback_shows_source_lines(pyz, host):
    result = host.run("python3", "-c", inside(pyz, "import yaml; yaml.safe_load('[')"))

    assert f'File "{pyz}/yaml/parser.py"' in result.stderr
    assert "raise ParserError(" in result.stderr


def test_the_file_of_the_start_serves_a_program_to_its_end(pyz, host, tmp_path):
    """An upgrade moves another file in its place."""
    copy = shutil.copy(pyz, tmp_path)
    (tmp_path / "new").write_bytes(b"another version")

    code = f"""
        os.rename({str(tmp_path / "new")!r}, {copy!r})
        import apsw, inspect, sql_database, yaml
        print(len(sql_database.load_migrations("sqlite")), inspect.getsource(yaml.safe_load))
    """
    printed = host.python(inside(copy, code))

    assert re.match(r"\d+ def safe_load\(", printed)


def test_an_import_from_a_file_that_was_written_over_fails_as_imports_do(pyz, host, tmp_path):
    copy = shutil.copy(pyz, tmp_path)

    code = f"""
        with open({copy!r}, "wb") as file:
            file.write(os.urandom(100_000))
        try:
            import apsw
        except ImportError as error:
            print(error)
    """
    printed = host.python(inside(copy, code))

    assert f"{copy} is damaged, or was written over while it ran" in printed


def test_it_works_as_a_library_and_in_spawned_processes(pyz, host):
    printed = host.python(f"""if True:
        import multiprocessing, sys
        sys.path.insert(0, {str(pyz)!r})
        import apsw
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            print(pool.apply(apsw.sqlite_lib_version) == apsw.sqlite_lib_version())
    """)

    assert printed == "True\n"


# --- Compiled code ---


# Python's own importer compiles what begins a start; all else has to be there as code.
REFUSE_TO_COMPILE = """
import os, sys

def refuse_to_compile(event, arguments):
    file = os.fsdecode(arguments[1] or "") if event == "compile" else ""
    folder, name = os.path.split(file)
    if ".pyz" in folder and not name.startswith(("__main__", "zipapp_")):
        os.write(2, b"compiled " + name.encode())
        os._exit(99)

sys.addaudithook(refuse_to_compile)
"""


@every_python
def test_a_later_start_compiles_nothing(pyz, bare, host, python):
    environment = host.patch(REFUSE_TO_COMPILE)
    assert host.run(python, bare, "version", **environment).returncode == 99

    host.runs(python, bare, "version")
    host.runs(python, bare, "version", **environment)
    assert host.cached() == {name for name in host.cached() if name.endswith(".code")}


def test_with_the_bytecode_of_the_build_no_start_compiles(pyz, host):
    host.runs("python3", pyz, *host.migrate, **host.patch(REFUSE_TO_COMPILE))

    assert len(host.cached()) == 1


def test_code_without_docstrings_is_for_starts_that_ask_for_it(pyz, bare, host):
    for archive in (pyz, bare):
        for options, kept in ((["-OO"], False), ([], True), (["-OO"], False), ([], True)):
            code = inside(archive, "import settings; print(bool(settings.__doc__))")
            assert host.runs("python3", *options, "-c", code) == f"{kept}\n"


@pytest.mark.parametrize("start", [["python3", "-B"], ["python3"], []], ids=["-B", "", "./"])
def test_who_wants_no_bytecode_gets_none(bare, host, start):
    variables = {} if "-B" in start else {"PYTHONDONTWRITEBYTECODE": "1"}

    host.runs(*start, bare, *host.migrate, **variables)

    [native] = host.cached()
    assert native.endswith(".so")


def test_an_upgrade_does_not_run_the_code_of_the_version_before(bare, host, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "zipapp")
    import pack

    files = read_archive(bare)
    source = files["nightcrier.py"]
    files["nightcrier.py"] = re.sub(rb'__version__ = ".*"', b'__version__ = "9.8.7"', source)
    files |= pack.hash_of_sources(files)
    upgrade = write_archive(tmp_path / "upgrade.pyz", files)

    before = host.runs("python3", bare, "version")
    after = host.runs("python3", upgrade, "version")

    assert "9.8.7" not in before
    assert "9.8.7" in after
    assert host.runs("python3", bare, "version") == before


def test_code_of_the_cache_knows_its_source_when_the_file_has_moved(bare, host, tmp_path):
    host.runs("python3", bare, "version")
    moved = Path(shutil.copy(bare, tmp_path / "moved.pyz"))

    printed = host.python(
        inside(moved, "from nightcrier import main; print(main.__code__.co_filename)"),
        **host.patch(REFUSE_TO_COMPILE),
    )

    assert printed == f"{moved}/nightcrier.py\n"


def writable_by_the_group(file: Path) -> None:
    file.chmod(0o720)


def writable_by_all(file: Path) -> None:
    file.chmod(0o702)


def given_away(file: Path) -> None:
    os.chown(file, NOBODY, NOBODY)


def moved_behind_a_symlink(file: Path) -> None:
    elsewhere = file.parent.parent / file.name
    file.rename(elsewhere)
    file.symlink_to(elsewhere)


def cut_short(file: Path) -> None:
    os.truncate(file, file.stat().st_size - 1)


def emptied(file: Path) -> None:
    os.truncate(file, 0)


def made_longer(file: Path) -> None:
    with file.open("ab") as end:
        end.write(b"\0")


def altered(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def replaced_by_a_fifo(file: Path) -> None:
    file.unlink()
    os.mkfifo(file)


SPOILED = [writable_by_the_group, writable_by_all, moved_behind_a_symlink, replaced_by_a_fifo]
SPOILED += [cut_short, emptied, made_longer, altered]


def plant(file: Path, code: str) -> None:
    compiled = marshal.dumps(compile(code, "planted", "exec"))
    file.unlink()
    file.write_bytes(zlib.crc32(compiled).to_bytes(4, "little") + compiled)
    file.chmod(0o700)


def whole_and_ours(file: Path) -> bool:
    status = file.stat(follow_symlinks=False)
    return (status.st_mode, status.st_uid) == (0o100500, os.geteuid())


def test_code_that_was_spoiled_is_not_run_and_replaced(bare, host):
    host.runs(bare, "version")
    files = sorted(host.cache.glob("*.code"))
    plant(files[0], "raise SystemExit('planted')")
    assert host.run(bare, "version").stderr == "planted\n"

    for spoil, file in zip(SPOILED, files, strict=False):
        plant(file, f"raise SystemExit('{spoil.__name__}')")
        spoil(file)
    host.runs(bare, "version")

    assert all(map(whole_and_ours, files))
    host.runs("python3", bare, "version", **host.patch(REFUSE_TO_COMPILE))


@as_root
def test_code_of_another_user_is_not_run(bare, host):
    host.runs(bare, "version")
    [file] = host.cache.glob("nightcrier.*.code")
    plant(file, "raise SystemExit('planted')")
    given_away(file)

    host.runs(bare, "version")

    assert whole_and_ours(file)


# --- The native module ---


def test_the_first_start_caches_the_native_module_for_its_user_alone(cached, host):
    digest = re.fullmatch(r"apsw-cp\d+-.+-([0-9a-f]{64})\.so", cached.name)

    assert digest
    assert host.cache.stat().st_mode & 0o777 == 0o700
    assert cached.stat().st_mode & 0o222 == 0


def test_a_later_start_does_not_write_it_again(pyz, host, cached):
    before = cached.stat()
    host.runs(pyz, *host.migrate)

    assert cached.stat().st_ino == before.st_ino


def test_a_native_module_that_was_spoiled_is_not_loaded_and_replaced(pyz, host, cached):
    whole = cached.read_bytes()
    for spoil in SPOILED:
        cached.chmod(0o700)
        spoil(cached)

        host.runs(pyz, *host.migrate)

        assert whole_and_ours(cached), spoil
        assert cached.read_bytes() == whole
    assert host.cached() == {cached.name}


@as_root
def test_a_native_module_of_another_user_is_not_loaded(pyz, host, cached):
    given_away(cached)

    host.runs(pyz, *host.migrate)

    assert whole_and_ours(cached)


LOADED = "import apsw; print(apsw.__file__)"


def test_what_was_verified_is_loaded_and_not_what_came_in_its_place(pyz, host, cached):
    assert host.python(inside(pyz, LOADED)).startswith("/proc/self/fd/")


@as_root
def test_without_proc_the_path_serves_where_nobody_else_can_put_a_file(pyz, host, tmp_path):
    hidden = "mount -t tmpfs tmpfs /proc"
    code = inside(pyz, LOADED)
    file = host.mounted(hidden, "python3", "-c", code).strip()
    assert Path(file).parent == host.cache

    host.home.chmod(0o777)  # its .cache can be moved away
    result = host.mounted(hidden, "python3", "-c", code, TMPDIR=str(tmp_path)).strip()

    assert Path(result).parents[1] == tmp_path
    assert not Path(result).exists()


def test_a_cache_directory_that_is_a_symlink_is_not_used(pyz, host, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    host.cache.parent.mkdir()
    host.cache.symlink_to(tmp_path / "elsewhere")

    host.runs(pyz, *host.migrate)

    assert list((tmp_path / "elsewhere").iterdir()) == []


@pytest.mark.parametrize("mode", [0o770, 0o707])
def test_a_cache_directory_that_others_can_write_is_not_used(bare, host, mode):
    host.cache.mkdir(parents=True)
    host.cache.chmod(mode)

    host.runs(bare, *host.migrate)

    assert host.cached() == set()


def test_a_file_planted_by_others_in_the_cache_is_not_loaded(pyz, host, cached):
    cached.chmod(0o700)
    cached.write_bytes(b"not a library")
    host.cache.chmod(0o777)

    host.runs(pyz, *host.migrate)

    assert cached.read_bytes() == b"not a library"


@as_root
def test_root_with_the_home_of_a_user_leaves_nothing_there(bare, host):
    os.chown(host.home, NOBODY, NOBODY)

    host.runs(bare, *host.migrate)

    assert list(host.home.iterdir()) == []


# Rights to read are kept: the interpreter may be in the home of root.
AS_NOBODY = ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups"]
AS_NOBODY += ["--inh-caps=+dac_read_search", "--ambient-caps=+dac_read_search"]


@as_root
def test_a_user_has_a_cache_of_his_own_and_does_not_use_that_of_another(pyz, host, cached):
    home = host.home.parent / "nobody"
    home.mkdir()
    os.chown(home, NOBODY, NOBODY)
    migrate = [*AS_NOBODY, pyz, "migrate", "up", "--sqlite", home / "nobody.db"]

    # The directory that it is started in is not writable for this user.
    host.runs(*migrate, HOME=str(home))
    other = host.run(*migrate, HOME=str(home), NIGHTCRIER_CACHE=str(host.cache))

    [file] = (home / ".cache" / "nightcrier").iterdir()
    assert file.stat().st_uid == NOBODY
    assert other.returncode == 0
    assert f"{host.cache} is not ours alone" in other.stderr


@pytest.mark.parametrize("home", ["/dev/null", "/nonexistent/home", "relative"])
def test_a_home_that_cannot_be_used_does_not_stop_it(bare, host, home):
    host.runs(bare, *host.migrate, HOME=home)

    assert list(host.home.iterdir()) == []


def test_no_home_at_all_does_not_stop_it(pyz, host, tmp_path):
    command = ["env", "-u", "HOME", pyz, *host.migrate]
    host.runs(*command, XDG_CACHE_HOME=str(tmp_path / "cache"))

    assert len(list((tmp_path / "cache" / "nightcrier").iterdir())) == 1


@as_root
def test_a_read_only_home_does_not_stop_it(bare, host, tmp_path):
    os.chown(host.home, NOBODY, NOBODY)
    host.home.chmod(0o500)
    os.chown(tmp_path, NOBODY, NOBODY)

    host.runs(*AS_NOBODY, bare, *host.migrate)

    assert list(host.home.iterdir()) == []


def test_the_environment_names_the_cache(pyz, host, tmp_path):
    host.runs(pyz, *host.migrate, XDG_CACHE_HOME=str(tmp_path / "xdg"))
    host.runs(pyz, *host.migrate, NIGHTCRIER_CACHE=str(tmp_path / "ours"))

    assert len(list((tmp_path / "xdg" / "nightcrier").iterdir())) == 1
    assert len(list((tmp_path / "ours").iterdir())) == 1


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("relative", "relative is not an absolute path"),
        ("/dev/null/cache", "Not a directory: '/dev/null/cache'"),
        ("/nonexistent/more/cache", "No such file or directory: '/nonexistent'"),
        ("/tmp", "/tmp is not ours alone"),
    ],
)
def test_a_cache_that_was_named_and_cannot_be_used_is_told_of(pyz, host, path, reason):
    result = host.run(pyz, *host.migrate, NIGHTCRIER_CACHE=path)

    assert result.returncode == 0
    [line] = result.stderr.splitlines()
    assert line.startswith("nightcrier: NIGHTCRIER_CACHE is not used: ")
    assert reason in line


@as_root
@pytest.mark.parametrize(
    "mounts",
    [
        "mount -t tmpfs -o noexec tmpfs $HOME",
        "mount -t tmpfs -o size=1m tmpfs $HOME",
        # The home may be on a file system of its own.
        "mount -t tmpfs tmpfs $DB; mount -o remount,bind,ro /;"
        " mount --bind $HOME $HOME; mount -o remount,bind,ro $HOME",
    ],
    ids=["a home that is noexec", "a full disk", "a read-only root"],
)
def test_file_systems_that_cannot_keep_it_do_not_stop_it(bare, host, tmp_path, mounts):
    (tmp_path / "db").mkdir()
    migrate = f"python3 {bare} migrate up --sqlite {tmp_path}/db/nightcrier.db"
    look = "find $HOME -name '.*.*'"  # what was not written to its end

    printed = host.mounted(mounts, "sh", "-ec", f"{migrate}; {look}", DB=str(tmp_path / "db"))

    assert printed.splitlines()[-1].startswith("applied")
    assert list(host.home.iterdir()) == []


WITHOUT_MEMORY = "import os; del os.memfd_create\n"


def test_without_cache_and_memfd_a_temporary_file_serves_and_goes(pyz, host, tmp_path):
    (tmp_path / "tmp").mkdir()
    code = f"{WITHOUT_MEMORY}import sys; sys.path.insert(0, {str(pyz)!r}); import apsw"

    host.python(code, HOME="/dev/null", TMPDIR=str(tmp_path / "tmp"))

    assert list((tmp_path / "tmp").iterdir()) == []


@as_root
def test_where_nothing_can_be_loaded_one_line_has_every_reason(pyz, host, tmp_path):
    (tmp_path / "tmp").mkdir()
    mounts = "mount -t tmpfs -o noexec tmpfs $TMPDIR"
    line = host.refuses(
        *("unshare", "-m", "sh", "-c", f'{mounts} && exec "$@"', "sh", "python3", pyz),
        *host.migrate,
        **host.patch(WITHOUT_MEMORY),
        HOME="/dev/null",
        TMPDIR=str(tmp_path / "tmp"),
    )

    assert re.search("/dev/null.*; no memfd on this system; .*failed to map segment", line)


def test_many_first_starts_at_once_succeed_and_leave_whole_files(bare, host):
    with contextlib.ExitStack() as stack:
        starts = [
            stack.enter_context(
                subprocess.Popen(
                    ["python3", bare, "migrate", "up", "--sqlite", host.home / f"{number}.db"],
                    env=host.environment(),
                    stdout=subprocess.DEVNULL,
                )
            )
            for number in range(4)
        ]
    assert [start.returncode for start in starts] == [0] * 4
    assert len(list(host.cache.glob("*.so"))) == 1
    assert [name for name in host.cached() if name.startswith(".")] == []
    host.runs("python3", bare, *host.migrate, **host.patch(REFUSE_TO_COMPILE))


def test_what_was_not_used_for_a_month_goes_with_the_next_first_start(bare, host):
    digest = "0123456789abcdef" * 4
    old = {
        f"apsw-cp311-linux-gnu-x86_64-{digest}.so": 31,
        f"h11._util.cpython-311-a70d0d0a-O0-{digest}.code": 31,
        f".apsw-cp311-linux-gnu-x86_64-{digest}.so.0123456789abcdef": 1 / 12,
    }
    kept = {
        f"apsw-cp312-linux-gnu-x86_64-{digest}.so": 29,
        f"yaml.cpython-312-cb0d0d0a-O0-{digest}.code": 29,
        f".yaml.cpython-312-cb0d0d0a-O0-{digest}.code.0123456789abcdef": 1 / 48,
        "apsw-notes.txt": 400,
        ".hidden": 400,
    }
    host.cache.mkdir(parents=True, mode=0o700)
    # What cannot be removed does not keep the others there, wherever it comes among them.
    stuck = [f"apsw-cp31{minor}-linux-gnu-x86_64-{digest}.so" for minor in range(20, 36)]
    for name in stuck:
        (host.cache / name).mkdir()
        os.utime(host.cache / name, times=(0, 0))
    for name, days in (old | kept).items():
        (host.cache / name).touch()
        os.utime(host.cache / name, times=(0, time.time() - days * DAY))

    host.runs(bare, *host.migrate)

    assert set(kept) <= host.cached()
    assert not set(old) & host.cached()


@pytest.mark.parametrize(("days", "noted"), [(2, True), (0.5, False)])
def test_a_use_is_noted_once_a_day(pyz, host, cached, days, noted):
    before = time.time() - days * DAY
    os.utime(cached, times=(before, before))

    host.runs(pyz, *host.migrate)

    assert (cached.stat().st_mtime > before + 1) == noted
