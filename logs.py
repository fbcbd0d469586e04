"""The log of a program: one event, one line; nothing here knows of incidents.

No secret, and no control character from outside, gets into a line. nightcrier.py uses this module;
it imports nothing from there.
"""

from __future__ import annotations

import json
import logging
import re
import sys
import time
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from typing import Any

_CONTROL = re.compile(
    r"[\x00-\x1f\x7f-\x9f\u061c\u2028\u2029\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
)


def one_line(text: str, limit: int = 500) -> str:
    """Text for a log line, a terminal or an error: control characters become visible escapes."""
    text = text if len(text) <= limit else text[: limit - 1] + "…"
    return _CONTROL.sub(lambda found: ascii(found[0])[1:-1], text)


class Redactor:
    """Removes known secret values from text that leaves the process or is stored."""

    def __init__(self, secret_values: Iterable[str] = ()) -> None:
        self._pattern: re.Pattern[str] | None = None
        self._values: set[str] = set()
        self.add(secret_values)

    def add(self, secret_values: Iterable[str]) -> None:
        # Very short values would blank out ordinary words.
        plain = {value for value in secret_values if len(value) >= 6}
        self._values |= plain | {json.dumps(value)[1:-1] for value in plain}  # as in JSON lines
        longest_first = sorted(self._values, key=len, reverse=True)
        if longest_first:
            self._pattern = re.compile("|".join(re.escape(value) for value in longest_first))

    def __call__(self, text: str) -> str:
        return text if self._pattern is None else self._pattern.sub("[redacted]", text)


redact = Redactor()

_STANDARD_FIELDS = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


def _extra_fields(record: logging.LogRecord) -> dict[str, Any]:
    return {
        key: value
        for key, value in vars(record).items()
        if key not in _STANDARD_FIELDS and value is not None
    }


class _TextFormatter(logging.Formatter):
    """`03:00:00 WARNING stream lost  cluster=prod` for a person at a terminal."""

    def format(self, record: logging.LogRecord) -> str:
        clock = time.strftime("%H:%M:%S", time.localtime(record.created))
        fields = "".join(
            f"  {key}={one_line(redact(str(value)))}"  # first: a secret cut in half would pass
            for key, value in _extra_fields(record).items()
        )
        message = one_line(redact(record.getMessage()), 2000)
        trace = self.formatException(record.exc_info).splitlines() if record.exc_info else []
        lines = [f"{clock} {record.levelname:<7} {message}{fields}"]
        return "\n".join(lines + [one_line(redact(line), 2000) for line in trace])


class _JSONFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        moment = datetime.fromtimestamp(record.created, UTC)
        entry = {
            "time": moment.isoformat(timespec="microseconds").replace("+00:00", "Z"),
            "level": record.levelname.lower(),
            "message": record.getMessage(),
            **_extra_fields(record),
        }
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        return redact(json.dumps(entry, default=str))


def setup_logging(level: str, log_format: str, *, name: str = "nightcrier") -> None:
    """Send the log of that name, and those below it, to stderr; stdout is for results."""
    log = logging.getLogger(name)
    handler = logging.StreamHandler(sys.stderr)
    text = log_format == "text" or (log_format == "auto" and sys.stderr.isatty())
    handler.setFormatter(_TextFormatter() if text else _JSONFormatter())
    log.handlers[:] = [handler]
    log.setLevel(level.upper())
    log.propagate = False


class Throttle:
    """Lets the first of repeated messages through, then one a minute with the number left out."""

    def __init__(self, interval: float = 60.0, clock: Callable[[], float] = time.monotonic) -> None:
        self._interval = interval
        self._clock = clock
        self._seen: dict[str, tuple[float, int]] = {}

    def admit(self, subject: str) -> int | None:
        """None: be quiet. Otherwise how many messages on `subject` were left out since the last."""
        now = self._clock()
        last, left_out = self._seen.get(subject, (None, 0))
        if last is not None and now - last < self._interval:
            self._seen[subject] = (last, left_out + 1)
            return None
        if len(self._seen) > 100:  # subjects may come from outside
            self._seen.clear()
        self._seen[subject] = (now, 0)
        return left_out
