"""logs.py: one event, one line; no secret, no control character gets into it."""

from __future__ import annotations

import json
import logging
import re
import sys
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import logs
import nightcrier
import sql_database

TEXT, JSON = "text", "json"


@pytest.fixture(autouse=True)
def untouched(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Other tests keep their logger and their (empty) list of secrets."""
    monkeypatch.setattr(logs, "redact", logs.Redactor())
    log = nightcrier.log
    before = log.handlers[:], log.level, log.propagate
    yield
    log.handlers[:], log.level, log.propagate = before


def line_of(kind: str, message: str, *args: object, error: Any = None, **extra: object) -> str:
    """What the program would write for a warning."""
    logs.setup_logging("info", kind)
    record = nightcrier.log.makeRecord(
        "nightcrier", logging.WARNING, "file", 1, message, args, error, extra=extra
    )
    line: str = nightcrier.log.handlers[0].format(record)
    return line


def an_error(text: str) -> Any:
    try:
        raise ValueError(text)
    except ValueError:
        return sys.exc_info()


def test_text_is_for_people_and_json_for_machines() -> None:
    text = line_of(TEXT, "lost %s", "a", cluster="prod", nothing=None)
    assert text[8:] == " WARNING lost a  cluster=prod"
    entry = json.loads(line_of(JSON, "lost %s", "a", cluster="prod", nothing=None))
    assert sql_database.parse_time(entry.pop("time"))
    assert entry == {"level": "warning", "message": "lost a", "cluster": "prod"}


@given(st.text(alphabet=st.characters(), max_size=80))
def test_whatever_is_logged_stays_on_its_line(hostile: str) -> None:
    for kind in (TEXT, JSON):
        line = line_of(kind, "%s", hostile, field=hostile)
        assert len(line.splitlines()) == 1
        line.encode("utf-8")
        assert not set(line) & {"\x1b", "\u202e", "\x9b", "\x00"}


def test_the_trace_of_an_error_cannot_forge_colours_or_overwrite_the_terminal() -> None:
    line = line_of(TEXT, "failed", error=an_error("\x1b[2Jgone\u202e"))
    assert "\x1b" not in line
    assert r"ValueError: \x1b[2Jgone\u202e" in line
    assert "ValueError" in json.loads(line_of(JSON, "failed", error=an_error("x")))["exception"]


@pytest.mark.parametrize("kind", [TEXT, JSON])
@pytest.mark.parametrize("secret", ["sk-ant-secret", 'quo"ted\\secret', "gehe\u00efm-wort"])
def test_a_secret_is_redacted_wherever_it_appears(kind: str, secret: str) -> None:
    logs.redact.add([secret])
    line = line_of(kind, "key %s", secret, field=f"x{secret}y", error=an_error(f"bad key {secret}"))
    assert secret not in line
    assert json.dumps(secret)[1:-1] not in line
    assert line.count("[redacted]") == 3


def test_a_secret_that_would_be_cut_off_does_not_show_its_beginning() -> None:
    logs.redact.add(["sk-ant-secret"])
    for kind in (TEXT, JSON):
        line = line_of(kind, "m" * 1990 + "sk-ant-secret", field="f" * 490 + "sk-ant-secret")
        assert "sk-ant" not in line


def test_of_two_secrets_the_longer_is_redacted_whole_and_short_words_are_left() -> None:
    redact = logs.Redactor(["secret-key", "secret-key-2", "a", ""])
    assert redact("secret-key-2 secret-key a banana") == "[redacted] [redacted] a banana"
    assert logs.Redactor()("nothing to hide") == "nothing to hide"


def test_repeated_messages_are_let_through_once_a_minute_with_a_count() -> None:
    now = 0.0
    throttle = logs.Throttle(clock=lambda: now)
    assert throttle.admit("a") == 0
    assert [throttle.admit("a") for _ in range(3)] == [None] * 3
    assert throttle.admit("b") == 0
    now = 60.0
    assert throttle.admit("a") == 3
    assert throttle.admit("a") is None


@given(st.text(alphabet=st.characters(), max_size=50))
def test_one_line_is_one_printable_line(text: str) -> None:
    line = logs.one_line(text)

    line.encode("utf-8")
    assert len(line.splitlines()) <= 1
    assert not re.search(r"[\x00-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", line)


def test_one_line_shows_escapes_instead_of_obeying_them() -> None:
    assert logs.one_line("a\x1b[31mred\nb\u202ec") == r"a\x1b[31mred\nb\u202ec"
    assert logs.one_line("x" * 600) == "x" * 499 + "…"
