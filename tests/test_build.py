"""How the delivered file is built, and what it says of itself."""

from __future__ import annotations

import base64
import csv
import getpass
import hashlib
import io
import json
import lzma
import marshal
import os
import re
import subprocess
import sys
import tomllib
import venv
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from built_files import (
    ROOT,
    WHEELS,
    Result,
    account_of,
    bill_of,
    build,
    built,
    copy_of_the_tree,
    this_target,
)

LOCKED = dict(re.findall(r"^(\S+)==(\S+)", (ROOT / "requirements.lock").read_text(), re.MULTILINE))
ELSEWHERE = {"umask": 0o077, "TZ": "Asia/Tokyo", "PYTHONHASHSEED": "7", "LC_ALL": "C"}
EPOCH = "1700000000"
OTHER_SUM = f"{hashlib.sha256(b'').hexdigest()}  nightcrier-slim.pyz\n"


def content_of(pyz: Path) -> Iterator[tuple[str, bytes]]:
    with zipfile.ZipFile(pyz) as archive:
        for name in archive.namelist():
            content = archive.read(name)
            if name.endswith("/modules"):
                for source, code in marshal.loads(content).items():
                    if source != "magic":
                        yield f"{name}/{source}c", zlib.decompress(code)
            else:
                yield name, lzma.decompress(content) if name.endswith(".xz") else content


def native_modules(pyz: Path) -> Iterator[tuple[str, str, bytes]]:
    """Target, SHA-256 as the index has it, and content."""
    content = dict(content_of(pyz))
    for line in content["_native/index"].decode().splitlines():
        target, _, offset, size, _, digest = line.split()
        _, system, *_, machine = target.split("-")
        stream = content[f"_native/{system}-{machine}.xz"]
        yield target, digest, stream[int(offset) : int(offset) + int(size)]


def refusal(result: Result, program: str = "pack.py") -> str:
    """The one line that a build which cannot be done ends with."""
    assert result.returncode == 1, result.stdout
    [line] = [line for line in result.stderr.splitlines() if not line.startswith("WARNING")]
    assert line.startswith(f"{program}: ")
    return line


# ---- The same bytes ----


def test_another_directory_umask_and_time_zone_give_the_same_bytes(
    host_only_pyz: Path, tmp_path: Path
) -> None:
    tree = copy_of_the_tree(tmp_path / "another")
    output = tmp_path / "out" / "nightcrier.pyz"
    built(output, "--host-only", "--offline", "--wheels", WHEELS, tree=tree, **ELSEWHERE)

    assert output.read_bytes() == host_only_pyz.read_bytes()
    assert output.stat().st_mode & 0o111


def test_nothing_of_the_machine_that_built_it_is_inside(pyz: Path) -> None:
    places = [ROOT, Path.home(), Path(sys.executable).parent, Path(sys.base_prefix)]
    private = [f"{place}/".encode() for place in places if len(place.parts) > 1]
    private += [f"/{getpass.getuser()}/".encode(), b"/tmp/"]
    inside = dict(content_of(pyz))

    for name, content in inside.items():
        if not name.startswith("_native/"):  # what the makers of the wheels left there is theirs
            assert [text for text in private if text in content and name.endswith(".pyc")] == []
            assert [text for text in private[:-1] if text in content] == []


def test_entries_are_sorted_and_have_one_time_and_one_mode(pyz: Path) -> None:
    with zipfile.ZipFile(pyz) as archive:
        entries = archive.infolist()

    assert [entry.filename for entry in entries] == sorted(entry.filename for entry in entries)
    assert len({entry.date_time for entry in entries}) == 1
    assert {entry.external_attr >> 16 for entry in entries} == {0o100644}


@pytest.fixture(scope="module")
def without_git(host_only_pyz: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from an unpacked release with the same wheels, beside a file that was built before."""
    tree = copy_of_the_tree(tmp_path_factory.mktemp("release") / "tree", ".git")
    for path in tree.rglob("*"):
        os.utime(path, (1, 1))
    dist = tmp_path_factory.mktemp("without-git")
    (dist / "nightcrier-slim.pyz").write_bytes(b"")
    (dist / "SHA256SUMS").write_text(f"{OTHER_SUM}{'1' * 64}  nightcrier.pyz\n")
    options = ("--host-only", "--offline", "--wheels", WHEELS)
    environment = {"SOURCE_DATE_EPOCH": EPOCH, "TMPDIR": "/nonexistent"}
    return built(dist / "nightcrier.pyz", *options, tree=tree, **environment)


def test_a_tree_without_git_gives_a_file_without_a_commit(without_git: Path) -> None:
    account = account_of(without_git)

    assert account.COMMIT == ""
    assert bill_of(without_git)["metadata"]["timestamp"] == account.SOURCE_DATE
    assert account.SOURCE_DATE == "2023-11-14T22:13:20Z"
    with zipfile.ZipFile(without_git) as archive:
        assert archive.infolist()[0].date_time == (2023, 11, 14, 22, 13, 20)


@pytest.fixture
def account_of_a_tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """account.py, with a tree of which git refuses to tell anything."""
    monkeypatch.syspath_prepend(ROOT / "zipapp")
    monkeypatch.delenv("SOURCE_DATE_EPOCH", raising=False)
    import account

    (tmp_path / ".git").mkdir()
    monkeypatch.setattr(account, "ROOT", tmp_path)
    account.checkout.cache_clear()
    yield account
    account.checkout.cache_clear()


def test_a_checkout_that_git_does_not_tell_of_is_warned_of(
    account_of_a_tree: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert (account_of_a_tree.checkout(), account_of_a_tree.source_date()) == (("", 0), 0)
    [line] = capsys.readouterr().err.splitlines()
    begin = "WARNING: the file will not know its commit and the time of it: "
    assert line.startswith(f"{begin}fatal: not a git repository")

    monkeypatch.setenv("PATH", "/nonexistent")
    account_of_a_tree.checkout.cache_clear()
    assert account_of_a_tree.checkout() == ("", 0)
    assert "No such file or directory: 'git'" in capsys.readouterr().err


@pytest.mark.parametrize("given", ["yesterday", "-1", "4354819200"])
def test_a_source_date_that_no_archive_can_have_is_refused(
    account_of_a_tree: Any, monkeypatch: pytest.MonkeyPatch, given: str
) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", given)

    with pytest.raises(RuntimeError, match=f"no time that a zip archive can have: {given}"):
        account_of_a_tree.source_date()


def test_it_is_built_beside_the_output_and_leaves_nothing_else_there(without_git: Path) -> None:
    """Not in /tmp, where programs may not be allowed to run."""
    files = {path.name for path in without_git.parent.iterdir()}

    assert files == {"nightcrier.pyz", "nightcrier-slim.pyz", "SHA256SUMS"}


def test_its_checksum_is_beside_it_among_those_of_other_files(without_git: Path) -> None:
    digest = hashlib.sha256(without_git.read_bytes()).hexdigest()

    sums = without_git.with_name("SHA256SUMS")
    assert sums.read_text() == f"{OTHER_SUM}{digest}  nightcrier.pyz\n"
    subprocess.run(["sha256sum", "--quiet", "-c", sums.name], cwd=sums.parent, check=True)


# ---- What it says of itself ----


def test_it_knows_its_commit(pyz: Path) -> None:
    git = ["git", "-C", str(ROOT)]
    if subprocess.call([*git, "rev-parse", "--git-dir"], stdout=-3, stderr=-3):
        pytest.skip("this is no checkout")
    commit = subprocess.check_output([*git, "rev-parse", "HEAD"], text=True).strip()
    seconds = subprocess.check_output([*git, "log", "-1", "--format=%ct"], text=True)

    account = account_of(pyz)
    assert account.COMMIT in (commit, f"{commit}-dirty")
    if "SOURCE_DATE_EPOCH" not in os.environ:
        moment = re.findall(r"\d+", account.SOURCE_DATE)
        utc = subprocess.check_output(["date", "-u", f"-d@{seconds.strip()}", "+%Y %m %d %H %M %S"])
        assert moment == utc.decode().split()


def test_it_knows_its_sqlite_targets_and_packages(pyz: Path) -> None:
    account = account_of(pyz)
    platform = this_target().partition("-")[2]

    assert tuple(f"cp3{minor}-{platform}" for minor in range(11, 16)) == account.TARGETS
    assert sorted(account.TARGETS) == sorted(target for target, _, _ in native_modules(pyz))
    assert account.PACKAGES == LOCKED
    ask = "import apsw; print(apsw.sqlite_lib_version(), *apsw.compile_options, sep='\\n')"
    printed = subprocess.check_output(
        [sys.executable, "-I", "-S", "-c", f"import sys; sys.path[0:0] = [{str(pyz)!r}]; {ask}"],
        text=True,
    )
    assert [account.SQLITE, *account.SQLITE_OPTIONS] == printed.splitlines()


def test_it_has_bytecode_of_one_python_for_each_version_that_is_here(pyz: Path) -> None:
    account = account_of(pyz)
    minors = [version.rsplit(".", 1)[0] for version in account.BYTECODE]
    ours = sys.version.split()[0]

    assert ours in account.BYTECODE  # it built the file, and comes before a newer one
    assert len(set(minors)) == len(minors)
    with zipfile.ZipFile(pyz) as archive:
        names = archive.namelist()
    tags = {name.split("/")[1] for name in names if name.startswith("_pyc/cpython")}
    assert {f"cpython-{minor.replace('.', '')}" for minor in minors} == tags


def test_what_is_built_for_this_host_alone_has_one_target_and_one_bytecode(
    host_only_pyz: Path,
) -> None:
    account = account_of(host_only_pyz)

    assert (this_target(),) == account.TARGETS
    assert (sys.version.split()[0],) == account.BYTECODE
    assert host_only_pyz.stat().st_size < 4_000_000


def test_it_holds_the_licence_of_everything_in_it(pyz: Path) -> None:
    texts = {name: text.decode() for name, text in content_of(pyz) if "/LICENSES/" in name}

    assert {name.split("/")[2] for name in texts} == {"nightcrier", "SQLite", *LOCKED}
    assert all(text.strip() for text in texts.values())
    assert "May you do good and not evil." in texts["nightcrier_build/LICENSES/SQLite/NOTICE.txt"]


def test_the_bill_of_materials_is_cyclonedx(pyz: Path) -> None:
    bill = bill_of(pyz)

    assert (bill["bomFormat"], bill["specVersion"], bill["version"]) == ("CycloneDX", "1.6", 1)
    assert set(bill) <= {"$schema", *(["bomFormat", "specVersion", "version", "metadata"])} | {
        "components",
        "dependencies",
    }
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", bill["metadata"]["timestamp"])
    everything = [bill["metadata"]["component"], *bill["components"]]
    for component in everything:
        assert component["type"] in ("application", "library")
        assert isinstance(component["name"], str)
        for licence in component["licenses"]:
            assert re.fullmatch(r"[A-Za-z0-9.-]+", licence["license"]["id"])
        for reference in component.get("externalReferences", []):
            assert set(reference) == {"type", "url", "hashes"}
            [digest] = reference["hashes"]
            assert digest["alg"] == "SHA-256"
            assert re.fullmatch("[0-9a-f]{64}", digest["content"])
    references = [component["bom-ref"] for component in everything]
    assert len(set(references)) == len(references)
    assert {entry["ref"] for entry in bill["dependencies"]} == set(references)
    assert {ref for entry in bill["dependencies"] for ref in entry["dependsOn"]} <= set(references)


def test_the_bill_of_materials_names_what_is_inside(pyz: Path) -> None:
    bill = bill_of(pyz)
    components = {component["name"]: component for component in bill["components"]}
    depends = {entry["ref"]: entry["dependsOn"] for entry in bill["dependencies"]}
    lock = (ROOT / "requirements.lock").read_text()

    assert {n: c["version"] for n, c in components.items()} == {
        **LOCKED,
        "SQLite": account_of(pyz).SQLITE,
    }
    for name in LOCKED:
        wheels = components[name]["externalReferences"]
        assert len(wheels) == (5 if name == "apsw" else 1)
        for wheel in wheels:
            content = (WHEELS / wheel["url"]).read_bytes()
            digest = hashlib.sha256(content).hexdigest()
            assert digest == wheel["hashes"][0]["content"]
            assert digest in lock
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    needed = {re.split("[>=~]", text)[0].lower() for text in project["dependencies"]}
    assert {ref.split("/")[1].split("@")[0] for ref in depends["nightcrier"]} == needed
    scramp = components["scramp"]["bom-ref"]
    assert scramp in depends[components["pg8000"]["bom-ref"]]
    assert depends[scramp] == [components["asn1crypto"]["bom-ref"]]
    assert depends[components["apsw"]["bom-ref"]] == [components["SQLite"]["bom-ref"]]


# ---- What cannot be built ----


@pytest.mark.parametrize("damage", ["altered", "half"])
def test_a_wheel_that_is_not_in_the_lock_is_not_packed(
    host_only_pyz: Path, tmp_path: Path, damage: str
) -> None:
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    for wheel in WHEELS.glob("*.whl"):
        (wheels / wheel.name).symlink_to(wheel)
    [h11] = wheels.glob("h11-*.whl")
    content = h11.read_bytes()
    h11.unlink()
    h11.write_bytes(content[: len(content) // 2] if damage == "half" else content + b"\0")
    old = tmp_path / "out.pyz"
    old.write_bytes(b"")

    result = build(old, "--host-only", "--offline", "--wheels", wheels)

    assert f"{wheels} lacks wheels of requirements.lock: h11 {LOCKED['h11']}:" in refusal(result)
    assert not old.exists()


def test_without_network_and_wheels_it_says_all_that_is_missing(tmp_path: Path) -> None:
    result = build(
        tmp_path / "out.pyz", "--targets", "cp31[23]-macos-arm64", "--offline", "--wheels", tmp_path
    )

    line = refusal(result)
    assert f"apsw {LOCKED['apsw']} (cp312-macos-arm64, cp313-macos-arm64)" in line
    for name, version in LOCKED.items():
        assert f"{name} {version}" in line
    assert "build without --offline, or put them there" in line


def test_a_package_index_that_cannot_be_reached_is_one_line(tmp_path: Path) -> None:
    nowhere = {"PIP_INDEX_URL": "http://127.0.0.1:9/", "PIP_RETRIES": "1"}
    nowhere["PIP_CONFIG_FILE"] = os.devnull
    result = build(tmp_path / "out.pyz", "--host-only", "--wheels", tmp_path, **nowhere)

    assert "no connection to the package index" in refusal(result)
    assert list(tmp_path.iterdir()) == []


def test_a_python_without_pip_is_told_so(tmp_path: Path) -> None:
    venv.create(tmp_path / "venv", with_pip=False)
    python = tmp_path / "venv" / "bin" / "python"
    result = build(
        tmp_path / "out.pyz", "--host-only", "--wheels", tmp_path / "none", "--python", python
    )

    assert f"{python} has no pip" in refusal(result)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--targets", "cp310-*"], "no target is cp310-*; there are: cp311-linux-gnu-x86_64, "),
        (["--bytecode", "/bin/false"], "/bin/false is no CPython that runs"),
    ],
)
def test_a_choice_that_makes_no_sense_is_one_line(
    pyz: Path, tmp_path: Path, options: list[str], reason: str
) -> None:
    targets = [] if "--targets" in options else ["--targets", this_target()]
    result = build(tmp_path / "out.pyz", "--offline", *targets, *options)

    assert reason in refusal(result)


def test_the_python_that_builds_comes_before_those_named_and_these_before_the_newest(
    tmp_path: Path,
) -> None:
    found = {"builder": "3.11.2", "named": "3.12.1"}
    found |= {"newest": "3.12.9", "newer": "3.11.9", "old": "3.13.0", "new": "3.13.2"}
    code = f"""if True:
        import argparse, json, sys
        sys.path.insert(0, {str(ROOT / "zipapp")!r})
        import pack
        sys.executable = "builder"
        found = {found!r}
        def ask(path):
            return pack.Python(int(found[path].replace(".", "")), found[path], path)
        pack.ask, pack.places = ask, lambda: set(found) - {{"builder", "named"}}
        targets = ["cp311-macos-arm64", "cp312-macos-arm64", "cp313-macos-arm64"]
        options = argparse.Namespace(bytecode=["named"], host_only=False)
        for served in (targets, targets[1:2]):
            print(*[python.executable for python in pack.chosen_pythons(served, options)])
    """
    printed = subprocess.check_output([sys.executable, "-B", "-c", code], text=True, cwd=tmp_path)

    assert printed.splitlines() == ["builder named new", "named"]


# ---- The release ----


@pytest.mark.slow
def test_the_release_serves_thirty_targets_in_seventeen_megabytes(tmp_path: Path) -> None:
    first = built(tmp_path / "first" / "nightcrier.pyz")
    tree = copy_of_the_tree(tmp_path / "another")
    second = tmp_path / "second" / "nightcrier.pyz"
    built(second, "--offline", "--wheels", WHEELS, tree=tree, **ELSEWHERE)

    assert first.read_bytes() == second.read_bytes()
    assert first.stat().st_size <= 17_000_000
    assert len(account_of(first).TARGETS) == 30
    sizes: Counter[str] = Counter()
    with zipfile.ZipFile(first) as archive:
        for entry in archive.infolist():
            top, _, rest = entry.filename.partition("/")
            kind = f"{top}/{rest.partition('/')[0]}" if top in ("_native", "_pyc") else top
            sizes[kind] += entry.compress_size
    print(json.dumps(sizes, indent=1))
    wheels = {
        wheel["hashes"][0]["content"]: wheel["url"]
        for component in bill_of(first)["components"]
        for wheel in component.get("externalReferences", [])
    }
    recorded = {digest for name in wheels.values() for digest in native_digests(WHEELS / name)}
    modules = list(native_modules(first))
    assert len(modules) == 30
    for target, digest, content in modules:
        assert hashlib.sha256(content).hexdigest() == digest, target
        assert digest in recorded, target


def native_digests(wheel: Path) -> Iterator[str]:
    """The SHA-256 of apsw's module as the wheel's own RECORD has it."""
    with zipfile.ZipFile(wheel) as archive:
        [record] = [name for name in archive.namelist() if name.endswith(".dist-info/RECORD")]
        for name, digest, _ in csv.reader(io.StringIO(archive.read(record).decode())):
            if re.match(r"apsw/__init__\..+\.so$", name):
                text = digest.removeprefix("sha256=")
                yield base64.urlsafe_b64decode(text + "=" * (-len(text) % 4)).hex()


@pytest.mark.slow
def test_what_is_built_for_glibc_alone_has_less_than_ten_megabytes(tmp_path: Path) -> None:
    slim = built(tmp_path / "nightcrier.pyz", "--slim")

    assert slim.stat().st_size < 10_000_000
    assert {target.split("-")[2] for target in account_of(slim).TARGETS} == {"gnu"}
    assert len(account_of(slim).TARGETS) == 10


@pytest.mark.slow
def test_a_build_can_compare_itself_with_a_second_one(tmp_path: Path) -> None:
    result = build(tmp_path / "nightcrier.pyz", "--host-only", "--twice")

    assert result.returncode == 0, result.stderr
    assert "building again, to compare" in result.stdout
