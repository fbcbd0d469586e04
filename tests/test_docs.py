"""The README says what is: its table of options, commands and variables are the program's."""

from __future__ import annotations

import os
import re
import sqlite3
from pathlib import Path

import pytest

import nightcrier
from conftest import sqlite_store

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BEGIN, END = "<!-- options: made by tests/test_docs.py -->", "<!-- /options -->"


def option_table() -> str:
    """The table of the README; `python tests/test_docs.py` writes it."""
    rows = ["| key | default | what |", "| --- | --- | --- |"]
    for option in nightcrier.OPTIONS:
        default = option.default
        if isinstance(default, tuple):
            default = ",".join(default)
        shown = "" if default in (None, "") else f"`{default}`"
        rows.append(f"| `{option.key}` | {shown} | {option.help} |")
    return "\n".join(rows)


def test_the_table_of_options_is_the_programs() -> None:
    found = README.partition(BEGIN)[2].partition(END)[0].strip()
    assert found == option_table()


def test_every_command_is_in_the_readme_and_has_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        nightcrier.main(["--help"])
    listed = re.findall(r"^    (\w+) ", capsys.readouterr().out, re.MULTILINE)
    assert {"run", "demo", "init", "check", "migrate", "replay", "version"} <= set(listed)
    for command in listed:
        assert f"`{command}" in README, command
        with pytest.raises(SystemExit) as ended:
            nightcrier.main([command, "--help"])
        assert ended.value.code == 0
        assert "example" in capsys.readouterr().out


def test_every_flag_in_the_readme_is_one(capsys: pytest.CaptureFixture[str]) -> None:
    known = set()
    for command in ("run", "demo", "check", "migrate", "replay"):
        with pytest.raises(SystemExit):
            nightcrier.main([command, "--help"])
        known |= set(re.findall(r"--[a-z][a-z-]+", capsys.readouterr().out))
    others = {"--quiet", "--quick"}  # of pip, and of somebody's agent
    used = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", README))
    assert used - others <= known


def test_the_example_of_clusters_is_read(tmp_path: Path) -> None:
    example = re.search(r"```yaml\n(.*?)```", README, re.DOTALL)
    assert example
    text = example[1]
    for name in ("prod.token", "ca.pem", "prod.kubeconfig"):
        (tmp_path / name).write_text("x", encoding="utf-8")
        text = text.replace(f"/etc/nightcrier/{name}", str(tmp_path / name))
    path = tmp_path / "config.yaml"
    path.write_text(text, encoding="utf-8")
    config = nightcrier.load_config({"config": str(path)}, environment={})
    assert [cluster.name for cluster in config.clusters] == ["prod"]


def test_every_query_of_the_readme_runs(tmp_path: Path) -> None:
    path = tmp_path / "nightcrier.db"
    sqlite_store(path).close()
    queries = re.findall(r'^sqlite3 .*nightcrier\.db "(.*)"$', README, re.MULTILINE)
    assert len(queries) >= 5
    connection = sqlite3.connect(path)
    try:
        for query in queries:
            connection.execute(query).fetchall()
    finally:
        connection.close()


def test_the_two_commands_stand_in_the_readme_and_in_ci() -> None:
    ci = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    tests = "python3 -m venv .venv && .venv/bin/pip install --quiet '.[test]' && .venv/bin/pytest"
    assert tests in README
    assert tests in ci
    assert "./build_zipapp.sh && ./dist/nightcrier.pyz demo" in README
    assert os.access(ROOT / "build_zipapp.sh", os.X_OK)


if __name__ == "__main__":
    head, _, rest = README.partition(BEGIN)
    tail = rest.partition(END)[2]
    (ROOT / "README.md").write_text(
        f"{head}{BEGIN}\n{option_table()}\n{END}{tail}", encoding="utf-8"
    )
