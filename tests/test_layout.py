"""The laws that keep the modules readable: direction, privacy, size, and SQL."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import nightcrier

ROOT = Path(__file__).parents[1]
BANNER = re.compile(r"^# (\d+)\. (.+)$", re.MULTILINE)

# From bottom to top. A module may import those of the layers below its own, and none of its own.
LAYERS = (
    (  # these know no incidents
        *("settings", "older_config", "logs", "sql_database", "fair_queue", "watch_leases"),
        *("mcp_client", "agent_process", "reports", "notifications"),
        *("demo_script", "about"),
    ),
    ("incidents",),
    ("state_store",),
    ("nightcrier",),
)
NAMES = [name for layer in LAYERS for name in layer]

MODULES = pytest.mark.parametrize("path", [ROOT / f"{name}.py" for name in NAMES], ids=NAMES)
Function = ast.FunctionDef | ast.AsyncFunctionDef


def bound_names(node: ast.stmt) -> Iterator[str]:
    """The names that a statement at the level of the module makes."""
    if isinstance(node, ast.ClassDef | Function):
        yield node.name
    elif isinstance(node, ast.Assign | ast.AnnAssign):
        for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
            yield from (name.id for name in ast.walk(target) if isinstance(name, ast.Name))


def violations(text: str) -> list[str]:
    """Uses of names of later sections, and of private names of other sections."""
    banners = [(text.count("\n", 0, m.start()) + 1, int(m[1])) for m in BANNER.finditer(text)]

    def section(line: int) -> int:
        return max((number for start, number in banners if start <= line), default=0)

    tree = ast.parse(text)
    home = {name: section(node.lineno) for node in tree.body for name in bound_names(node)}
    found = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.Name) or node.id not in home:
            continue
        here, there = section(node.lineno), home[node.id]
        if there > here:
            found.append(f"line {node.lineno}: {node.id} is of section {there}, below")
        elif node.id.startswith("_") and not node.id.startswith("__") and here != there:
            found.append(f"line {node.lineno}: {node.id} is private to section {there}")
    return found


@MODULES
def test_sections_are_numbered_in_order_and_named_as_the_top_of_the_file_names_them(
    path: Path,
) -> None:
    text = path.read_text()
    sections = [(int(m[1]), m[2]) for m in BANNER.finditer(text)]

    assert [number for number, _ in sections] == list(range(1, len(sections) + 1))
    top = str(ast.get_docstring(ast.parse(text)))
    for number, name in sections:
        line = rf"\b{number}\.? (\w+ ){{0,2}}{re.escape(name)}"  # 2. A small HTTP server
        assert re.search(line, top, re.IGNORECASE), name


def test_texts_do_not_call_sections_by_their_numbers() -> None:
    """Which change when one moves to a module of its own: a name can still be found."""
    places = ("*.py", "*.md", "tests/**/*.py", "zipapp/*.py")
    files = {path for place in places for path in ROOT.glob(place)} - {Path(__file__)}
    found = [
        f"{path.name}: {line}"
        for path in sorted(files)
        for line in re.findall(r".*\bsections? \d+.*", path.read_text(), re.IGNORECASE)
    ]
    assert found == []


@MODULES
def test_sections_use_only_the_sections_above_them_and_private_names_stay_in_theirs(
    path: Path,
) -> None:
    assert violations(path.read_text()) == []


def test_the_check_of_the_sections_finds_what_it_is_there_for() -> None:
    planted = (
        "# 1. One\nA = 1\n_B = 2\ndef f():\n    return C\n"
        "# 2. Two\nC = _B\nclass D:\n    x: int = A\n"
    )
    assert violations(planted) == [
        "line 7: _B is private to section 1",
        "line 5: C is of section 2, below",
    ]


@MODULES
def test_functions_have_at_most_50_lines_and_classes_350(path: Path) -> None:
    tree = ast.parse(path.read_text())
    long = [
        f"line {node.lineno}: {node.name} has {length} lines"
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef | Function)
        and (length := (node.end_lineno or 0) - node.lineno + 1)
        > (350 if isinstance(node, ast.ClassDef) else 50)
    ]
    assert long == []


@MODULES
def test_a_module_has_at_most_4500_lines(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 4500


def test_every_exported_name_is_there() -> None:
    exported = nightcrier.__all__

    assert [name for name in exported if not hasattr(nightcrier, name)] == []
    assert len(set(exported)) == len(exported)


def imported_modules(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            yield str(node.module).partition(".")[0]


def breaches(name: str, text: str) -> list[str]:
    """Imports of modules that are not below a module, and uses of what is private to others."""
    [own] = [number for number, layer in enumerate(LAYERS) if name in layer]
    below = {module for layer in LAYERS[:own] for module in layer}
    others = set(NAMES) - {name}
    tree = ast.parse(text)
    found = [
        f"{module} is not below" for module in imported_modules(tree) if module in others - below
    ]
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module in others:
            used = [alias.name for alias in node.names]
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            used = [node.attr] if node.value.id in others else []
        else:
            continue
        found += [f"{private} is private" for private in used if private.startswith("_")]
    return found


@MODULES
def test_modules_import_only_modules_below_them_and_private_names_stay_in_theirs(
    path: Path,
) -> None:
    assert breaches(path.stem, path.read_text()) == []


def test_the_check_of_the_modules_finds_what_it_is_there_for() -> None:
    planted = (
        "import logs\nfrom sql_database import utc_now, _ALPHABET\n"
        "def f():\n    import nightcrier\n    return logs._format\n"
    )
    private = ["_ALPHABET is private", "_format is private"]
    assert breaches("state_store", planted) == ["nightcrier is not below", *private]
    assert breaches("incidents", "import incidents, state_store") == ["state_store is not below"]
    assert breaches("settings", "import logs") == ["logs is not below"]


def test_every_module_has_its_layer_and_its_line_in_the_readme() -> None:
    assert sorted(NAMES) == sorted(path.stem for path in ROOT.glob("*.py"))
    assert re.findall(r"^\| `(\w+)\.py` \|", (ROOT / "README.md").read_text(), re.M) == NAMES


@MODULES
def test_modules_do_not_assign_the_same_name_twice(path: Path) -> None:
    """Somebody who searches for a name finds one definition."""
    names = [name for node in ast.parse(path.read_text()).body for name in bound_names(node)]
    assert sorted({name for name in names if names.count(name) > 1}) == []


# --- SQL ----------------------------------------------------------------------------------------
# Values are parameters. What is put into a statement's text must come from names of the module
# (constants, and functions that put statements together), from the class's own constants, or from
# local lists of conditions that a function of the module made; never from an argument's attribute.

# Clauses of an engine.
LOCKS = {"tx.lock_rows", "tx.lock_free_rows", "tx.each_value"}
SAFE_LOCALS = {"names", "conditions", "condition", "columns", "table", "key", "statement", "name"}


def interpolated(sql: ast.expr) -> Iterator[ast.expr]:
    """The expressions that are put into the text of a statement."""
    if isinstance(sql, ast.JoinedStr):
        for part in sql.values:
            if isinstance(part, ast.FormattedValue):
                yield part.value
    elif isinstance(sql, ast.BinOp):
        if isinstance(sql.op, ast.Mod):
            yield sql
        yield from interpolated(sql.left)
        yield from interpolated(sql.right)
    elif isinstance(sql, ast.Call) and isinstance(sql.func, ast.Attribute):
        yield sql  # .format, .replace, .join: none of them belongs around a statement
    elif not isinstance(sql, ast.Constant):
        yield sql


def suspicious_sql(text: str) -> list[str]:
    tree = ast.parse(text)
    constants = {name for node in tree.body for name in bound_names(node)}
    found = []
    for node in ast.walk(tree):
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.args):
            continue
        owner = ast.unparse(node.func.value)
        runs = node.func.attr in ("run", "run_many", "execute", "executemany")
        if not runs or not re.search(r"(tx|transaction|connection|target)$", owner):
            continue
        for part in interpolated(node.args[0]):
            used = {name.id for name in ast.walk(part) if isinstance(name, ast.Name)}
            attributes = [n for n in ast.walk(part) if isinstance(n, ast.Attribute)]
            loose = (
                used - constants - SAFE_LOCALS - ({"tx"} if ast.unparse(part) in LOCKS else set())
            )
            joined = all(n.attr == "join" or ast.unparse(n) in LOCKS for n in attributes)
            if loose - {"sql"} or not joined:
                found.append(f"line {node.lineno}: {ast.unparse(part)}")
    return found


@MODULES
def test_values_reach_sql_as_parameters_only(path: Path) -> None:
    found = suspicious_sql(path.read_text())
    # The one script that is run as a whole is a migration file.
    assert [line for line in found if "migration.up" not in line] == []


def test_the_check_of_sql_finds_what_it_is_there_for() -> None:
    planted = """
tx.run(f"select {incident_id}")
tx.run("select '%s'" % worker)
tx.run("select " + event.cluster)
tx.run("select {}".format(worker))
tx.run("select :a", a=worker)
"""
    assert {line.partition(":")[0] for line in suspicious_sql(planted)} == {
        "line 2",
        "line 3",
        "line 4",
        "line 5",
    }
