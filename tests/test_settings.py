"""settings.py by itself: options of another program, with what nightcrier's own do not show."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

import settings
from logs import one_line


@dataclass(frozen=True, kw_only=True)
class Backup:
    hosts: tuple[str, ...] = ()  # no option
    keep: int = settings.option(settings.integer(1, 99), 7, "N", "copies to keep", existing=True)
    key: str | None = settings.option(settings.text, None, "KEY", "the key", secret=True)
    target: str | None = settings.option(
        settings.text, None, "URL", "where copies go", existing=True, secret=True, flag=True
    )


OPTIONS = settings.options_of(Backup, prefix="BACKUP_", older={"target": "TARGET_URL"})


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "backup.yaml"


def a_reader(
    file: Path, text: str = "", *, environment: dict[str, str] | None = None, **flags: str
) -> settings.Reader:
    file.write_text(text)
    source = settings.YAMLFile(file, one_line)
    return settings.Reader(OPTIONS, flags, environment or {}, source)


def test_flags_and_variables_follow_from_the_fields() -> None:
    assert [(option.key, option.flag, option.variables) for option in OPTIONS] == [
        ("keep", "--keep", ("BACKUP_KEEP", "KEEP")),
        ("key", None, ("BACKUP_KEY",)),
        ("target", "--target", ("BACKUP_TARGET", "TARGET_URL")),
    ]


def test_a_secret_that_has_a_flag_is_a_secret_all_the_same(file: Path) -> None:
    reader = a_reader(file, target="\x00hush")

    assert reader.values()["target"] is None
    assert reader.problems == ["--target: must not hold a NUL character"]
    assert "hush" not in repr(Backup(target="hush"))


def test_a_reader_tells_where_each_value_came_from(file: Path) -> None:
    (file.parent / "key").write_text("from-a-file")
    text = f"keep: 3\ntarget: file-url\nkey_file: {file.parent / 'key'}\n"

    reader = a_reader(file, text)
    assert reader.values() == {"keep": 3, "key": "from-a-file", "target": "file-url"}
    assert reader.origin == {
        "keep": f"{file}:1: keep",
        "key": f"{file}:3: key_file",
        "target": f"{file}:2: target",
    }

    reader = a_reader(file, text, environment={"TARGET_URL": "variable-url"})
    assert reader.values()["target"] == "variable-url"
    assert reader.origin["target"] == "TARGET_URL"

    reader = a_reader(file, text, environment={"TARGET_URL": "variable-url"}, target="flag-url")
    assert reader.values()["target"] == "flag-url"
    assert reader.origin["target"] == "--target"


def test_a_default_came_from_nowhere(file: Path) -> None:
    reader = a_reader(file)
    assert reader.values() == {"keep": 7, "key": None, "target": None}
    assert reader.origin == {}


def test_keys_that_are_no_options_are_known_or_ignored_or_mistakes(file: Path) -> None:
    reader = a_reader(file, "hosts: []\nkey_file: ~\ntargt: x\nsize: 5\n")
    reader.check_keys(others=("hosts",), ignored={"size": "copies are whole"})

    assert reader.warnings == [f"{file}:4: size has no effect: copies are whole"]
    assert reader.problems == [f"{file}:3: unknown key 'targt'; did you mean 'target'?"]
