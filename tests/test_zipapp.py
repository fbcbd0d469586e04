"""The delivered file: built once, then run as its users run it."""

import ast
import contextlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from built_files import ROOT, Result

THIS_PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"


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

    def run(self, *command: str | Path, **environment: str) -> Result:
        return subprocess.run(
            command,
            env=self.environment(**environment),
            cwd=self.home,
            capture_output=True,
            text=True,
            check=False,
        )

    def runs(self, *command: str | Path, **environment: str) -> str:
        """The same, for a command that has to succeed."""
        result = self.run(*command, **environment)
        assert result.returncode == 0, result.stderr
        return result.stdout

    def python(self, code: str, **environment: str) -> str:
        return self.runs("python3", "-c", code, **environment)


@pytest.fixture
def host(tmp_path: Path) -> Host:
    return Host(tmp_path)


@pytest.fixture
def cached(pyz: Path, host: Host) -> Path:
    """The native module, where the first start has left it."""
    host.runs(pyz, *host.migrate)
    [file] = host.cache.iterdir()
    return file


def find_python(version: str) -> Path | None:
    pyenv = sorted(Path.home().glob(f".pyenv/versions/{version}.*/bin/python{version}"))
    for python in [*pyenv, shutil.which(f"python{version}")]:
        # Run it: a pyenv shim has not always something behind it.
        if python and not subprocess.call([python, "-c", ""], stderr=subprocess.DEVNULL):
            return Path(python)
    return None


# --- Ways to start it ---


def test_version_says_the_version_of_the_module_and_leaves_nothing_in_the_home(pyz, host):
    source = ast.parse((ROOT / "nightcrier.py").read_text())
    assigned = [node for node in source.body if isinstance(node, ast.Assign)]
    [version] = [a.value.value for a in assigned if a.targets[0].id == "__version__"]

    assert version in host.runs(pyz, "version")
    assert list(host.home.iterdir()) == []


def test_the_demo_runs_the_whole_pipeline_from_the_file(pyz, host):
    printed = host.runs(pyz, "demo", "--health-listen", "127.0.0.1:0")

    assert "RESOLVED" in printed


def test_it_runs_through_a_symlink_and_from_a_path_with_spaces(pyz, host, tmp_path):
    folder = tmp_path / "a folder, früher"
    folder.mkdir()
    copy = Path(shutil.copy(pyz, folder))
    (host.bin / "nightcrier").symlink_to(copy)

    host.runs("nightcrier", *host.migrate)
    host.runs(copy, *host.migrate)


@pytest.mark.parametrize(
    "options", [[], ["-I"], ["-S", "-P"], ["-B", "-OO"], ["-W", "error"]], ids=" ".join
)
def test_it_runs_when_named_to_python_by_a_relative_path(pyz, host, options):
    file = os.path.relpath(pyz, host.home)
    host.runs("python3", *options, file, *host.migrate)


def test_the_header_passes_over_a_python3_that_is_too_old(pyz, host):
    old = find_python("3.9") or find_python("3.10")
    if not old:
        pytest.skip("no Python 3.9 or 3.10 here")
    host.install("python3", old)
    host.install(f"python{THIS_PYTHON}", sys.executable)

    host.runs(pyz, *host.migrate)


@pytest.mark.parametrize("version", ["2.7", "3.6", "3.7", "3.8", "3.9", "3.10"])
def test_an_unsupported_python_gets_one_line_and_exit_code_5(pyz, host, version):
    python = find_python(version)
    if not python:
        pytest.skip(f"no Python {version} here")

    result = host.run(python, pyz, "version")

    assert result.returncode == 5
    [line] = result.stderr.splitlines()
    assert f"needs Python 3.11 or newer, and this is {version};" in line
    assert f"cp{THIS_PYTHON.replace('.', '')}-" in line


def test_a_python_that_the_file_has_no_native_module_for_gets_one_line_and_exit_code_5(
    host_only_pyz, host
):
    others = [f"3.{minor}" for minor in range(11, 16) if f"3.{minor}" != THIS_PYTHON]
    python = next(filter(None, map(find_python, others)), None)
    if not python:
        pytest.skip(f"no Python of {', '.join(others)} here")

    host.runs(python, host_only_pyz, "version")
    result = host.run(python, host_only_pyz, *host.migrate)

    assert result.returncode == 5
    [line] = result.stderr.splitlines()
    assert re.search(r"no bundled apsw for cp\d+-\S+; this file has: cp\d+-", line)


def test_the_exit_code_of_a_failing_command_passes_through(pyz, host, tmp_path):
    (tmp_path / "nightcrier.db").write_text("this is a text file, and a long one at that\n" * 100)

    assert host.run(pyz, "no-such-command").returncode == 2
    assert host.run(pyz, *host.migrate).returncode == 4


# --- Whose modules are imported ---


FAKE = "raise RuntimeError('imported from the host')\n"


def test_packages_of_the_host_are_not_imported(pyz, host, tmp_path):
    for name in ("apsw", "h11", "pg8000", "yaml", "nightcrier"):
        (tmp_path / "site" / name).mkdir(parents=True)
        (tmp_path / "site" / name / "__init__.py").write_text(FAKE)
    (tmp_path / "site" / "sqlite3.py").write_text(FAKE)

    host.runs("python3", pyz, *host.migrate, PYTHONPATH=str(tmp_path / "site"))
    host.runs(pyz, *host.migrate, PYTHONPATH=str(tmp_path / "site"))


def test_packages_that_the_host_imported_before_the_start_are_forgotten(pyz, host, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(
        "import sys, types\n"
        "sys.modules.update((name, types.ModuleType(name)) for name in ('apsw', 'yaml', 'h11'))\n"
    )
    host.runs("python3", pyz, *host.migrate, PYTHONPATH=str(tmp_path))


def test_modules_come_as_bytecode_and_know_their_source(pyz, host):
    printed = host.python(f"""if True:
        import inspect, sys
        sys.path.insert(0, {str(pyz)!r})
        import zipapp_importer
        zipapp_importer.install({str(pyz)!r})
        def refuse_to_compile(event, arguments):
            assert event != "compile" or not str(arguments[1]).startswith({str(pyz)!r}), arguments
        sys.addaudithook(refuse_to_compile)
        import apsw, h11, nightcrier, pg8000.native, yaml
        print(inspect.getsource(nightcrier.main))
    """)

    assert printed.strip() in (ROOT / "nightcrier.py").read_text()


def test_the_driver_of_postgresql_loads_without_looking_for_its_metadata(pyz, host):
    printed = host.runs(
        *("python3", "-I", "-S", "-c"),
        f"""if True:
        import sys
        sys.path.insert(0, {str(pyz)!r})
        import zipapp_importer
        zipapp_importer.install({str(pyz)!r})
        import pg8000.native, scramp
        assert "importlib.metadata" not in sys.modules
        print(pg8000.native.__file__, pg8000.native.__version__, scramp.__version__)
    """,
    )

    locked = dict(re.findall(r"^(\S+)==(\S+)", (ROOT / "requirements.lock").read_text(), re.M))
    versions = f"{locked['pg8000']} {locked['scramp']}"
    assert printed == f"{pyz}/pg8000/native.py {versions}\n"


def test_a_traceback_shows_source_lines(pyz, host):
    result = host.run(
        "python3",
        "-c",
        f"""if True:
        import sys
        sys.path.insert(0, {str(pyz)!r})
        import zipapp_importer
        zipapp_importer.install({str(pyz)!r})
        import yaml
        yaml.safe_load("[")
    """,
    )

    assert f'File "{pyz}/yaml/parser.py"' in result.stderr
    assert "raise ParserError(" in result.stderr


def test_it_works_as_a_library_and_in_spawned_processes(pyz, host):
    printed = host.python(f"""if True:
        import multiprocessing, sys
        sys.path.insert(0, {str(pyz)!r})
        import apsw
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            print(pool.apply(apsw.sqlite_lib_version) == apsw.sqlite_lib_version())
    """)

    assert printed == "True\n"


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


@pytest.mark.parametrize("damage", ["flipped", "truncated", "empty", "longer"])
def test_a_damaged_cached_file_is_replaced(pyz, host, cached, damage):
    whole = cached.read_bytes()
    broken = {
        "flipped": whole[:99_999] + bytes([whole[99_999] ^ 1]) + whole[100_000:],
        "truncated": whole[:100_000],
        "empty": b"",
        "longer": whole + b"\0",
    }[damage]
    cached.chmod(0o700)
    cached.write_bytes(broken)

    host.runs(pyz, *host.migrate)

    assert cached.read_bytes() == whole
    assert list(host.cache.iterdir()) == [cached]


def test_a_cache_directory_that_is_a_symlink_is_not_used(pyz, host, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    host.cache.parent.mkdir()
    host.cache.symlink_to(tmp_path / "elsewhere")

    host.runs(pyz, *host.migrate)

    assert list((tmp_path / "elsewhere").iterdir()) == []


@pytest.mark.parametrize("mode", [0o770, 0o707])
def test_a_cache_directory_that_others_can_write_is_not_used(pyz, host, mode):
    host.cache.mkdir(parents=True)
    host.cache.chmod(mode)

    host.runs(pyz, *host.migrate)

    assert list(host.cache.iterdir()) == []


def test_a_file_planted_by_others_in_the_cache_is_not_loaded(pyz, host, cached):
    cached.chmod(0o700)
    cached.write_bytes(b"not a library")
    host.cache.chmod(0o777)

    host.runs(pyz, *host.migrate)

    assert cached.read_bytes() == b"not a library"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a directory away")
def test_root_with_the_home_of_a_user_leaves_nothing_there(pyz, host):
    os.chown(host.home, 12345, 12345)

    host.runs(pyz, *host.migrate)

    assert list(host.home.iterdir()) == []


@pytest.mark.parametrize("home", ["/dev/null", "/nonexistent/home", "relative"])
def test_a_home_that_cannot_be_used_does_not_stop_it(pyz, host, home):
    host.runs(pyz, *host.migrate, HOME=home)

    assert list(host.home.iterdir()) == []


def test_a_read_only_home_does_not_stop_it(pyz, host):
    host.home.chmod(0o500)

    host.runs(pyz, *host.migrate)


def test_the_environment_names_the_cache(pyz, host, tmp_path):
    host.runs(pyz, *host.migrate, XDG_CACHE_HOME=str(tmp_path / "xdg"))
    host.runs(pyz, *host.migrate, NIGHTCRIER_CACHE=str(tmp_path / "ours"))

    assert len(list((tmp_path / "xdg" / "nightcrier").iterdir())) == 1
    assert len(list((tmp_path / "ours").iterdir())) == 1


def test_without_cache_and_memfd_a_temporary_file_serves_and_goes(pyz, host, tmp_path):
    (tmp_path / "tmp").mkdir()
    code = f"import os, sys; del os.memfd_create; sys.path.insert(0, {str(pyz)!r}); import apsw"

    host.python(code, HOME="/dev/null", TMPDIR=str(tmp_path / "tmp"))

    assert list((tmp_path / "tmp").iterdir()) == []


def test_a_damaged_file_is_refused_in_one_line(pyz, host, tmp_path):
    content = bytearray(pyz.read_bytes())
    middle_of_the_native_module = content.index(b"\xfd7zXZ") + 500_000
    content[middle_of_the_native_module] ^= 1
    damaged = tmp_path / "damaged.pyz"
    damaged.write_bytes(content)

    result = host.run("python3", damaged, *host.migrate)

    assert result.returncode == 5
    [line] = result.stderr.splitlines()
    assert "the bundled apsw does not load: it is damaged, get this file again" in line


def test_two_first_starts_at_once_both_succeed_and_leave_one_file(pyz, host):
    with contextlib.ExitStack() as stack:
        starts = [
            stack.enter_context(
                subprocess.Popen(
                    [pyz, "migrate", "up", "--sqlite", host.home / f"{number}.db"],
                    env=host.environment(),
                    stdout=subprocess.DEVNULL,
                )
            )
            for number in range(2)
        ]
    assert [start.returncode for start in starts] == [0, 0]
    assert len(list(host.cache.iterdir())) == 1
