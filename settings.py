"""Settings of a program: options, and the places that give them; nothing here knows of incidents.

1. Readers: what a value must be. Each takes what a file, a variable or a flag holds, and returns
   the value or raises a ValueError that says what it must be.
2. Options: fields of a dataclass that say how they are read and how --help shows them.
3. The file: YAML that knows on which line a value stands.
4. Reading: flag over environment over file over default, with every mistake at once.

nightcrier.py uses this module; it imports nothing from there.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import os
import re
import shlex
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

# ============================================================================
# 1. Readers
# Their messages follow the name of the option.
# ============================================================================


# Makes a text from outside harmless for a message, and at most so many characters long.
OneLine = Callable[[str, int], str]


def number(
    kind: type[int] | type[float], minimum: float, maximum: float, unit: str = ""
) -> Callable[[object], Any]:
    what = "a whole number" if kind is int else "a number"

    def read(value: object) -> float:
        try:
            if isinstance(value, bool) or not isinstance(value, kind | int | str):
                raise ValueError
            found = kind(value)
        except ValueError:
            raise ValueError(f"must be {what}{unit and ' of' + unit}") from None
        if not minimum <= found <= maximum:  # also refuses nan
            raise ValueError(f"must be from {minimum:g} to {maximum:g}{unit}")
        return found

    return read


def integer(minimum: int, maximum: int = 2**31) -> Callable[[object], int]:
    return number(int, minimum, maximum)


def seconds(minimum: float, maximum: float = 30 * 86400.0) -> Callable[[object], float]:
    return number(float, minimum, maximum, " seconds")


def did_you_mean(word: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(word.lower(), [str(name) for name in known], n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def choice(*words: str) -> Callable[[object], str]:
    def read(value: object) -> str:
        if value in words:
            return str(value)
        raise ValueError(f"must be one of {', '.join(words)}{did_you_mean(str(value), words)}")

    return read


def text(value: object) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ValueError("must be a text that is not empty")
    if "\x00" in value:
        raise ValueError("must not hold a NUL character")
    return value


def boolean(value: object) -> bool:
    words = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
    if isinstance(value, bool):
        return value
    if isinstance(value, str) and value.lower() in words:
        return words[value.lower()]
    raise ValueError("must be true or false")


def path(value: object) -> Path:
    try:
        return Path(text(value)).expanduser()
    except RuntimeError as error:  # ~name, and nobody has that name
        raise ValueError(str(error)) from None


def argv(value: object) -> tuple[str, ...]:
    """A list of words, or one string that is split as a shell would split it (without a shell)."""
    if isinstance(value, str):
        try:
            words = shlex.split(value)
        except ValueError as error:
            raise ValueError(f"cannot be split into words: {error}") from None
    elif isinstance(value, list) and all(isinstance(word, str | int | float) for word in value):
        words = [str(word) for word in value]
    else:
        raise ValueError("must be a list of words")
    if not words:
        raise ValueError("must not be empty")
    return tuple(words)


def arguments(value: object) -> tuple[str, ...]:
    """As `argv`, and there may be none."""
    return () if value in ("", []) else argv(value)


def names(value: object) -> tuple[str, ...]:
    """A list of words; on the command line and in the environment separated by commas."""
    if isinstance(value, str):
        return tuple(word.strip() for word in value.split(",") if word.strip())
    if isinstance(value, list) and all(isinstance(word, str) for word in value):
        return tuple(value)
    raise ValueError("must be a list of words")


def http_url(example: str, password_option: str, one_line: OneLine) -> Callable[[object], str]:
    def read(value: object) -> str:
        url = text(value)
        try:
            parts = urlsplit(url)
            valid = parts.scheme in ("http", "https") and parts.hostname and (parts.port or 1)
        except ValueError:
            valid = None
        if not valid or re.search(r"[\s\x00-\x1f\x7f\ud800-\udfff]", url):
            raise ValueError(f"{one_line(url, 100)!r} must be a URL such as {example}")
        if parts.username or parts.password:
            raise ValueError(f"must not hold a password: use {password_option}")
        return url

    return read


def readable(value: object) -> Path:
    """The path of a file that is there."""
    named = path(value)
    if not os.path.isfile(named):  # unlike Path.is_file, never raises
        raise ValueError(f"{named} is not there")
    return named


def labels(value: object) -> dict[str, str]:
    if not isinstance(value, dict):
        raise ValueError("must be a mapping of texts")
    return {str(key): str(item) for key, item in value.items()}


# ============================================================================
# 2. Options
# YAML keys, environment, flags and --help are made from one list.
# ============================================================================


def option(
    read: Callable[[object], Any],
    default: Any,
    metavar: str,
    text: str,
    *,
    existing: bool = False,
    secret: bool = False,
    flag: bool | None = None,
) -> Any:
    """A field of a dataclass that is a setting: how it is read, its default, how --help shows it.

    `existing`: an older program has it too, and its variable is understood. `flag`: whether there
    is one; a secret has none unless it is asked for: `ps` shows the command line to everybody.
    """
    metadata = {"read": read, "metavar": metavar, "help": text, "secret": secret}
    metadata |= {"existing": existing, "flag": not secret if flag is None else flag}
    return field(default=default, repr=not secret, metadata=metadata)


@dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    """One setting: YAML key, `--flag` and PREFIX_VARIABLE have the same name."""

    key: str
    read: Callable[[object], Any]
    default: Any
    metavar: str
    help: str
    secret: bool
    flag: str | None
    variables: tuple[str, ...]  # of the environment; the first that is set counts


def options_of(kind: Any, *, prefix: str, older: Mapping[str, str]) -> tuple[Option, ...]:
    """The options among the fields of a dataclass.

    A variable is `prefix` and the key. The older program's is without the prefix, or is the one
    that `older` has for the key.
    """
    return tuple(
        _option_of(setting, prefix, older.get(setting.name, setting.name.upper()))
        for setting in dataclasses.fields(kind)
        if setting.metadata
    )


def _option_of(setting: dataclasses.Field[Any], prefix: str, older: str) -> Option:
    given = dict(setting.metadata)
    existing, flag = given.pop("existing"), given.pop("flag")
    return Option(
        key=setting.name,
        default=setting.default,
        flag="--" + setting.name.replace("_", "-") if flag else None,
        variables=(prefix + setting.name.upper(), *([older] if existing else [])),
        **given,
    )


def commented(options: Iterable[Option]) -> Iterator[str]:
    """The lines of a file that names every option and shows its default."""
    for option in options:
        default = option.default
        shown = json.dumps(list(default) if isinstance(default, tuple) else default, default=str)
        key = option.key + ("_file" if option.secret else "")
        yield from ("", f"# {option.help}", f"# {key}: {shown}")


# ============================================================================
# 3. The file
# Every mistake in it is a line that names the line.
# ============================================================================


class YAMLFile:
    """A parsed YAML file that knows on which line each value stands; without a path it is empty."""

    def __init__(self, path: Path | None, one_line: OneLine) -> None:
        self.path = path
        self.one_line = one_line
        self.problems: list[str] = []
        self._lines: dict[tuple[str | int, ...], int] = {}
        self.values: dict[str, Any] = {}
        if path is not None:
            self._read(path, self.problems)

    def _read(self, path: Path, problems: list[str]) -> None:
        import yaml

        try:
            # utf-8-sig: editors on Windows put a byte order mark in front
            text = path.read_text(encoding="utf-8-sig")
            loader = yaml.SafeLoader(text)
            try:
                if node := loader.get_single_node():
                    self._locate(node, ())
                    self._take(loader.construct_document(node))
            finally:
                loader.dispose()
        except OSError as error:
            problems.append(f"{path}: cannot be read: {error.strerror}")
        except UnicodeDecodeError:
            problems.append(f"{path}: is not UTF-8 text")
        except RecursionError:
            problems.append(f"{path}: is nested too deeply")
        except yaml.YAMLError as error:
            mark = getattr(error, "problem_mark", None)
            where = f":{mark.line + 1}:{mark.column + 1}" if mark else ""
            text = getattr(error, "problem", None) or str(error).partition("\n")[0]
            problems.append(f"{path}{where}: {self.one_line(text, 500)}")
        except Exception as error:  # a date that is none, `!!bool what`: PyYAML checks neither
            text = self.one_line(str(error), 500)
            problems.append(f"{path}: holds a value that cannot be read: {text}")

    def _locate(self, node: Any, place: tuple[str | int, ...]) -> None:
        self._lines[place] = node.start_mark.line + 1
        if node.id == "mapping":
            for key, value in node.value:
                inner = (*place, str(key.value))
                if inner in self._lines:
                    line = key.start_mark.line + 1
                    self.problems.append(
                        f"{self.path}:{line}: {key.value!r} is given twice (first on line "
                        f"{self._lines[inner]}): remove one"
                    )
                self._locate(value, inner)
                self._lines[inner] = key.start_mark.line + 1
        elif node.id == "sequence":
            for index, item in enumerate(node.value):
                self._locate(item, (*place, index))
        elif node.tag.endswith(":int") and len(node.value) > 40:
            raise ValueError("a number is too long")  # Python would not print it in a message

    def _take(self, document: object) -> None:
        if isinstance(document, dict):
            self.values = {str(key): value for key, value in document.items()}
        elif document is not None:
            self.problems.append(f"{self.path}:1: must hold settings, one `key: value` a line")

    def problem(self, text: str, *place: str | int) -> None:
        self.problems.append(f"{self.where(*place)}: {text}")

    def nested(
        self,
        place: tuple[str | int, ...],
        value: object,
        keys: Mapping[str, tuple[str, Callable[[object], Any]]],
        form: str,
    ) -> Iterator[tuple[str, Any]]:
        """Read a mapping that holds mappings, as `keys` says: by dotted key, a name and its reader.

        Yields name and value for each key that is given; None for a value that is a mistake.
        `form` says what the mapping must be.
        """
        sections = dict.fromkeys(key.rpartition(".")[0] for key in keys if "." in key)
        found: list[tuple[tuple[str, ...], object]] = [((), value)]
        while found:
            inner, value = found.pop(0)
            key = ".".join(inner)
            if value is None and inner:
                continue
            if not inner or key in sections:
                if isinstance(value, dict):
                    found += [((*inner, str(name)), item) for name, item in value.items()]
                else:
                    self.problem(f"{key or place[0]}: must be {form}", *place, *inner)
            elif key not in keys:
                hint = did_you_mean(key, [*keys, *sections])
                self.problem(f"{key}: unknown key{hint}", *place, *inner)
            else:
                name, read = keys[key]
                try:
                    yield name, read(value)
                except ValueError as error:
                    self.problem(f"{key}: {error}", *place, *inner)
                    yield name, None

    def where(self, *place: str | int) -> str:
        while place and place not in self._lines:
            place = place[:-1]
        return f"{self.path}:{self._lines.get(place, 1)}"


# ============================================================================
# 4. Reading
# A value is taken from the most important place that has one, and checked there.
# ============================================================================


class Reader:
    """Collects the value of every option: flag over environment over file over default."""

    def __init__(
        self,
        options: Collection[Option],
        flags: Mapping[str, Any],
        environment: Mapping[str, str],
        file: YAMLFile,
    ) -> None:
        self._options = options
        self._flags = flags
        self._environment = environment
        self._file = file
        self.problems = file.problems
        self.warnings: list[str] = []
        self.origin: dict[str, str] = {}  # key: the flag, variable or line; not of defaults

    def values(self) -> dict[str, Any]:
        """Key and value of every option; what is wrong is in `problems`."""
        return {option.key: self._value(option) for option in self._options}

    def check_keys(self, *, others: Collection[str], ignored: Mapping[str, str]) -> None:
        """Unknown keys of the file are mistakes; those to ignore are warnings that say why.

        `others` are keys of the file that are no options.
        """
        where = self._file.where
        known = {option.key for option in self._options} | set(others)
        known |= {option.key + "_file" for option in self._options if option.secret}
        for key in self._file.values:
            if key in ignored:
                self.warnings.append(f"{where(key)}: {key} has no effect: {ignored[key]}")
            elif key not in known:
                self.problems.append(f"{where(key)}: unknown key {key!r}{did_you_mean(key, known)}")

    def _candidates(self, option: Option) -> Iterator[tuple[str, object]]:
        """Where the option is given, most important first: (place, value)."""
        if self._flags.get(option.key) is not None:
            yield str(option.flag), self._flags[option.key]
        for name in option.variables:
            if self._environment.get(name):
                yield name, self._environment[name]
        if option.secret:
            yield from self._secret_files(option)
        if self._file.values.get(option.key) is not None:
            yield f"{self._file.where(option.key)}: {option.key}", self._file.values[option.key]

    def _secret_files(self, option: Option) -> Iterator[tuple[str, object]]:
        variable, key = option.variables[0] + "_FILE", option.key + "_file"
        given = {
            variable: self._environment.get(variable),
            f"{self._file.where(key)}: {key}": self._file.values.get(key),
        }
        for place, name in given.items():
            try:
                if name:
                    text = path(name).read_text(encoding="utf-8").strip()
                    if not text:  # though an empty value may be as good as none
                        raise ValueError("it is empty")
                    yield place, text
            except (OSError, ValueError) as error:
                self.problems.append(f"{place}: cannot be read: {error}")

    def _value(self, option: Option) -> Any:
        for place, value in self._candidates(option):
            self.origin[option.key] = place
            try:
                return option.read(value)
            except ValueError as error:
                shown = "" if option.secret else f"{self._file.one_line(str(value), 60)!r} "
                self.problems.append(f"{place}: {shown}{error}")
                return option.default
        return option.default
