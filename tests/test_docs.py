"""The README says what is: its table of options, commands and variables are the program's."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import sqlite3
from pathlib import Path

import pytest

import nightcrier
import sql_database
from conftest import a_schema, postgres_store, query, sqlite_store

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
    for command in ("run", "demo", "check", "migrate", "replay", "version"):
        with pytest.raises(SystemExit):
            nightcrier.main([command, "--help"])
        known |= set(re.findall(r"--[a-z][a-z-]+", capsys.readouterr().out))
    known |= set(re.findall(r"--[a-z][a-z-]+", (ROOT / "build_zipapp.sh").read_text()))
    others = {"--quiet", "--quick", "--fallback-model", "--sandbox"}  # of pip, and of agents
    used = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", README))
    assert used - others <= known


def code_blocks(kind: str = "") -> list[str]:
    found: list[str] = re.findall(rf"^```{kind}\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)
    return found


def with_files(text: str, folder: Path) -> str:
    """The text, with the files of /etc/nightcrier that it names in a folder, and there."""
    for name in re.findall(r"/etc/nightcrier/([\w.]+)", text):
        (folder / name).write_text("x", encoding="utf-8")
    return text.replace("/etc/nightcrier/", f"{folder}/")


def test_every_command_line_of_the_readme_is_understood() -> None:
    lines = "\n".join(code_blocks()).replace("\\\n", " ").splitlines()
    found = 0
    for line in lines:
        words = shlex.split(line, comments=True) if "nightcrier.pyz" in line else []
        while "./dist/nightcrier.pyz" in words:
            words = words[words.index("./dist/nightcrier.pyz") + 1 :]
            given = [word for word in words if word != "&"]
            if given[:1] and given[0].startswith("-"):
                given.insert(0, "run")
            nightcrier.build_parser().parse_args(given)  # ends the test if it does not
            found += 1
    assert found >= 10
    for command in nightcrier.COMMANDS.values():
        for example in command.example.splitlines():
            nightcrier.build_parser().parse_args(shlex.split(example)[1:])


def test_the_examples_of_a_configuration_are_read(tmp_path: Path) -> None:
    examples = code_blocks("yaml")
    assert len(examples) == 2
    for names, text in zip((["prod"], ["prod", "staging"]), examples, strict=True):
        path = tmp_path / "config.yaml"
        path.write_text(with_files(text, tmp_path), encoding="utf-8")
        config = nightcrier.load_config({"config": str(path)}, environment={})
        assert [cluster.name for cluster in config.clusters] == names


def test_every_connection_string_of_the_readme_is_read(tmp_path: Path) -> None:
    examples = re.findall(r"postgresql://[^\s`|]*", README)
    assert len(examples) >= 8
    for text in examples:
        sql_database.parse_dsn(with_files(text, tmp_path), environment={})


def test_the_table_of_connection_parameters_is_the_programs() -> None:
    table = README.partition("| parameter | variable |")[2].partition("\n\n")[0]
    rows = [row.split("|")[1:3] for row in table.splitlines()[2:]]
    names, variables = (re.findall(r"\w+", " ".join(column)) for column in zip(*rows, strict=True))
    assert dict(zip(names, variables, strict=True)) == sql_database._PARAMETERS
    for mode in (*sql_database.SSL_MODES, *sql_database.SESSION_ATTRIBUTES):
        assert f"`{mode}`" in table
    for name, value in sql_database._SESSION_SETTINGS.items():
        assert f"`{name}` {value}".removesuffix("s") in README


def test_every_variable_of_the_readme_is_one() -> None:
    known = {f"NIGHTCRIER_{option.key.upper()}" for option in nightcrier.OPTIONS}
    known |= {"NIGHTCRIER_CONFIG", "NIGHTCRIER_CACHE", "NIGHTCRIER_TEST_POSTGRES_DSN"}
    assert set(re.findall(r"NIGHTCRIER_[A-Z_]*[A-Z]", README)) <= known
    known = {*sql_database._PARAMETERS.values(), "PGSERVICE"}
    assert set(re.findall(r"\bPG[A-Z_]+\b", README)) == known


def queries_for(program: str) -> list[str]:
    found: list[str] = re.findall(rf'^{program} .*"(select .*)"$', README, re.MULTILINE)
    assert len(found) >= 5
    return found


def test_every_query_of_the_readme_runs(tmp_path: Path) -> None:
    path = tmp_path / "nightcrier.db"
    sqlite_store(path).close()
    with contextlib.closing(sqlite3.connect(path)) as connection:
        for statement in queries_for("sqlite3"):
            connection.execute(statement).fetchall()


def test_every_query_of_the_readme_runs_on_postgresql(postgres_dsn: str) -> None:
    with a_schema(postgres_dsn) as dsn, contextlib.closing(postgres_store(dsn)) as store:
        for statement in queries_for("sqlite3") + queries_for("psql"):
            query(store, statement)


def test_the_json_columns_of_the_readme_are_those_of_postgresql(postgres_dsn: str) -> None:
    with a_schema(postgres_dsn) as dsn, contextlib.closing(postgres_store(dsn)) as store:
        rows = query(
            store,
            """select t.table_name, c.column_name
               from information_schema.columns c join information_schema.tables t
                 on (c.table_schema, c.table_name) = (t.table_schema, t.table_name)
               where t.table_schema = current_schema() and t.table_type = 'BASE TABLE'
                 and c.data_type = 'jsonb'""",
        )
    said = README.partition("`jsonb` for ")[2].partition(".\n")[0]
    named, table = set(), ""
    for name in re.findall(r"`([\w.]+)`", said):
        table = name.partition(".")[0] or table  # `.usage`: of the table before
        named.add((table, name.rpartition(".")[2]))
    assert named == set(map(tuple, rows))


def test_every_script_of_the_readme_is_there() -> None:
    scripts = re.findall(r"python (tests/[\w/]+\.py)", README)
    assert len(scripts) >= 5
    for script in scripts:
        assert (ROOT / script).is_file(), script


def test_the_two_commands_stand_in_the_readme_and_in_ci() -> None:
    ci = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    tests = "python3 -m venv .venv && .venv/bin/pip install --quiet '.[test]' && .venv/bin/pytest"
    assert tests in README
    assert tests in ci
    assert "./build_zipapp.sh --host-only && ./dist/nightcrier.pyz demo" in README
    assert os.access(ROOT / "build_zipapp.sh", os.X_OK)


if __name__ == "__main__":
    head, _, rest = README.partition(BEGIN)
    tail = rest.partition(END)[2]
    (ROOT / "README.md").write_text(
        f"{head}{BEGIN}\n{option_table()}\n{END}{tail}", encoding="utf-8"
    )
