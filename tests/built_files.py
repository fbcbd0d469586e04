"""The delivered file, built once for all tests that run it or look into it."""

from __future__ import annotations

import json
import os
import runpy
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
WHEELS = ROOT / "build" / "wheels"
NO_NETWORK = "no connection to the package index"

Result = subprocess.CompletedProcess[str]


def build(
    output: Path,
    *options: str | Path,
    tree: Path = ROOT,
    umask: int = 0o022,
    **environment: str,
) -> Result:
    return subprocess.run(
        [tree / "build_zipapp.sh", "--python", sys.executable, "--output", output, *options],
        env=os.environ | environment,
        umask=umask,
        capture_output=True,
        text=True,
        check=False,
    )


def built(output: Path, *options: str | Path, **how: Any) -> Path:
    """The same, for a build that has to succeed."""
    result = build(output, *options, **how)
    if NO_NETWORK in result.stderr and "CI" not in os.environ:
        pytest.skip("build/wheels lacks wheels of requirements.lock, and there is no network")
    assert result.returncode == 0, result.stderr
    return output


def this_target() -> str:
    """What native.py says that the Python of the tests needs: cp311-linux-gnu-x86_64."""
    target: str = runpy.run_path(str(ROOT / "zipapp" / "native.py"))["target"]()
    return target


@pytest.fixture(scope="session")
def pyz(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """For this machine, and all Pythons: those that are here have their bytecode in it."""
    output = tmp_path_factory.mktemp("dist") / "nightcrier.pyz"
    platform = this_target().partition("-")[2]
    return built(output, "--targets", f"cp*-{platform}")


@pytest.fixture(scope="session")
def host_only_pyz(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """For this machine and this Python alone."""
    return built(tmp_path_factory.mktemp("host-only") / "nightcrier.pyz", "--host-only")


def account_of(pyz: Path) -> Any:
    """The constants of nightcrier_build."""
    constants: dict[str, Any] = {}
    with zipfile.ZipFile(pyz) as archive:
        exec(archive.read("nightcrier_build/__init__.py"), constants)
    return SimpleNamespace(**constants)


def bill_of(pyz: Path) -> dict[str, Any]:
    with zipfile.ZipFile(pyz) as archive:
        bill: dict[str, Any] = json.loads(archive.read("nightcrier_build/sbom.cdx.json"))
    return bill


def copy_of_the_tree(folder: Path, *without: str) -> Path:
    """What a build needs to have in another directory, with the state that git has of it."""
    ignored = shutil.ignore_patterns("build", "dist", ".venv", ".*_cache", "__pycache__", *without)
    shutil.copytree(ROOT, folder, ignore=ignored)
    return folder
