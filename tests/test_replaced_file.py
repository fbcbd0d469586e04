"""The built file is replaced while a program runs from it, as an upgrade does."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from conftest import a_schema
from running_program import Clusters, Program, an_agent, eventually

# Of another length, and with nothing where it was: neither header, directory nor stream.
GARBAGE = bytes(range(1, 256)) * 20_000

# A sitecustomize: it writes down who opens the file once the program has started.
WATCHER = """
import logging, os, sys, traceback

make_record, opened = logging.getLogRecordFactory(), []

def watch_for_the_start(*args, **options):
    record = make_record(*args, **options)
    if record.getMessage().startswith("nightcrier 0."):
        opened.append(open(os.environ["OPENED"], "w", buffering=1))
    return record

def note_opening(event, arguments):
    if opened and event == "open" and arguments[0] == os.environ["WATCHED"]:
        traceback.print_stack(file=opened[0])

logging.setLogRecordFactory(watch_for_the_start)
sys.addaudithook(note_opening)
"""


def moved_over(file: Path) -> None:
    new = file.with_suffix(".new")
    new.write_bytes(GARBAGE)
    new.rename(file)


def overwritten(file: Path) -> None:
    file.write_bytes(GARBAGE)


def emptied(file: Path) -> None:
    """What `cp` does first."""
    file.write_bytes(b"")


@pytest.fixture
def copy(pyz: Path, tmp_path: Path) -> Path:
    file = tmp_path / "nightcrier.pyz"
    file.write_bytes(pyz.read_bytes())
    return file


@pytest.fixture
def clusters() -> Iterator[Clusters]:
    with Clusters("alpha", "beta") as running:
        yield running


@pytest.fixture
def watcher(copy: Path, tmp_path: Path) -> dict[str, str]:
    """The environment of a program that notes down when the file is opened."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(WATCHER)
    return {
        "PYTHONPATH": str(tmp_path / "site"),
        "WATCHED": str(copy),
        "OPENED": str(tmp_path / "opened"),
        "HOME": str(tmp_path),
    }


def investigated(program: Program, cluster: str) -> bool:
    lines = [line for line in program.log() if line["message"] == "resolved"]
    return any(line["cluster"] == cluster for line in lines)


def goes_on(program: Program, clusters: Clusters, config: Path) -> None:
    """It does everything that a long run does, and ends well."""
    clusters.await_watch("alpha")
    clusters.emit("alpha")
    eventually(lambda: investigated(program, "alpha"))
    beta = {"name": "beta", "mcp": {"endpoint": f"{clusters.url}/beta/mcp"}}
    config.write_text(json.dumps({"clusters": [beta]}))  # JSON is YAML, too
    program.signal(signal.SIGHUP)
    clusters.await_watch("beta")
    clusters.emit("beta")
    eventually(lambda: investigated(program, "beta"))
    status, body = program.get("/readyz")
    assert (status, json.loads(body)["ready"]) == (200, True)
    assert program.stop() == 0, program.err
    assert [line for line in program.log() if line["level"] == "error"] == []
    assert "Error" not in "\n".join(program.err)


def run_and_replace(
    copy: Path, clusters: Clusters, environment: dict[str, str], replace: Callable[[Path], None]
) -> None:
    folder = copy.parent
    words = ["run", "--agent-cli", "command", "--agent-command", an_agent()]
    words += ["--health-listen", "127.0.0.1:0", *clusters.flags("alpha")]
    with Program(*words, cwd=folder, environment=environment, program=copy) as program:
        program.wait_for("started")
        replace(copy)
        goes_on(program, clusters, config=folder / "config.yaml")
    assert (folder / "opened").read_text() == ""


@pytest.mark.parametrize("replace", [moved_over, overwritten])
def test_a_run_goes_on_without_its_file(
    replace: Callable[[Path], None], copy: Path, clusters: Clusters, watcher: dict[str, str]
) -> None:
    run_and_replace(copy, clusters, watcher, replace)


def test_a_replica_goes_on_without_its_file(
    copy: Path, clusters: Clusters, watcher: dict[str, str], postgres_dsn: str
) -> None:
    with a_schema(postgres_dsn) as dsn:
        environment = watcher | {"NIGHTCRIER_POSTGRES_DSN": dsn}
        run_and_replace(copy, clusters, environment, emptied)


@pytest.mark.slow
def test_the_demo_goes_on_without_its_file(copy: Path, tmp_path: Path) -> None:
    words = ("demo", "--sqlite", tmp_path / "demo.db")
    with Program(*words, cwd=tmp_path, program=copy) as demo:
        demo.wait_for("watching")
        emptied(copy)
        assert demo.ends() == 0, demo.err
    assert "7 faults, 7 incidents: each fault is one finished incident" in "\n".join(demo.out)


def another_release(copy: Path) -> bytes:
    """A file that has an entry where the old one had it, with another content."""
    content = bytearray(copy.read_bytes())
    with zipfile.ZipFile(copy) as archive:
        entry = archive.getinfo("yaml/parser.py")
    start = entry.header_offset + 30 + len(entry.filename)
    content[start : start + 1000] = GARBAGE[:1000]
    return bytes(content)


@pytest.mark.parametrize("new", [lambda _: b"", lambda _: GARBAGE, another_release])
def test_an_exception_is_logged_when_its_source_is_gone(
    new: Callable[[Path], bytes], copy: Path, tmp_path: Path
) -> None:
    (tmp_path / "new").write_bytes(new(copy))
    code = f"""if True:
        import logging, os, sys
        sys.path.insert(0, {str(copy)!r})
        import zipapp_importer
        zipapp_importer.install({str(copy)!r})
        import yaml
        os.rename({str(tmp_path / "new")!r}, {str(copy)!r})
        try:
            yaml.safe_load("[")
        except yaml.YAMLError:
            logging.exception("it failed")
    """
    done = subprocess.run(
        [sys.executable, "-I", "-c", code], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0
    first, *frames, last = done.stderr.splitlines()
    assert first == "ERROR:root:it failed"
    assert any(f'File "{copy}/yaml/parser.py"' in line for line in frames)
    assert "during handling" not in done.stderr.lower()
    assert last
