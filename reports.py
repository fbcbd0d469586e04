"""Reports in Markdown: what people see first of one; nothing here knows of incidents.

Reports are untrusted text: none is an error, and none takes longer to read than its length allows.
nightcrier.py uses this module; it imports nothing from there.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Iterator, Sequence

# What the agent is told; below is how it is read.
REPORT_INSTRUCTIONS = """\
Write your report, in Markdown, to the file output/investigation.md below the working directory,
with these headings:

## Root Cause
One or two sentences, then the line `Confidence: HIGH`, `Confidence: MEDIUM` or `Confidence: LOW`.

## Evidence
What you looked at and what it shows.

## Recommendations
What a person should do, most important first.
"""

# No pattern can be led to try more than a bounded number of ways from one place.
_FENCE = re.compile(r"\s{0,3}(`{3,}|~{3,})\s{0,9}(\w{0,9})")
_HEADING = re.compile(r"\s{0,3}(#{1,6})\s")
_UNDERLINE = re.compile(r"\s{0,3}(={3,80}|-{3,80})\s{0,9}")
_BULLET = re.compile(r"^(?:[-+•]|\d{1,3}[.)])\s{1,9}")
_BOLD_LABEL = r"\*\*[^*]{1,80}(?:\*\*\s?:|:\s?\*\*)"
_LABEL = re.compile(  # **Label**: or **Label:** or, of the two that matter, Label:
    rf"[\s>*+-]*?(?:\d{{1,3}}[.)]\s)?(?:{_BOLD_LABEL}|(?:root cause|statement)\s?:)",
    re.IGNORECASE,
)
_NEXT_LABEL = re.compile(rf"\s{_BOLD_LABEL}")
_BOLD_TITLE = re.compile(r"\s{0,3}\*\*[^*]{1,80}\*\*\s{0,9}")  # alone in its line
_ROOT_CAUSE = re.compile(r"\broot cause\b", re.IGNORECASE)
_OTHER_CAUSES = re.compile(
    r"alternative|less likely|unlikely|ruled out|rejected|deprioriti|discarded"
    r"|other (?:hypothes|cause|possib)|\b(?:hypothesis |h)#?[2-9]\b",
    re.IGNORECASE,
)
_IN_WHAT = "level|is|in|of|for|this|the|my|root|cause|assessment|analysis|diagnosis|hypothesis"
_CONFIDENCE = re.compile(
    rf"confidence(?:\s{{1,3}}(?:{_IN_WHAT})){{0,6}}[\W\d]{{0,16}}"
    r"(?:(?:very\s)?(?P<after>HIGH|MEDIUM|LOW)\b|(?<=\d)\s?%)"  # a number is no word for it
    r"|\b(?P<before>HIGH|MEDIUM|LOW)\W{0,3}confidence\b",
    re.IGNORECASE,
)
_AT_THE_END = re.compile(rf"[\s(\[—–*`-]{{1,8}}(?:{_CONFIDENCE.pattern})\W{{0,4}}$", re.IGNORECASE)
_UNDERLINED = re.compile(r"\s{0,3}[^\s.!?|#>][^.!?|]{0,60}")  # a title: "…full.", ruler, is none
_FIELD = re.compile(r"root cause|confidence|hypothesis|statement", re.IGNORECASE)
_CELLS = 20  # of a row, that are looked at


def read_headline(markdown: str, limit: int = 300) -> tuple[str | None, str | None]:
    """Root cause and confidence (HIGH, MEDIUM, LOW) of a report; None for what it does not say.

    The root cause is the first paragraph below a heading that speaks of it, or behind such a label.
    The confidence is the first one named in that section, or else in the report, where it does not
    speak of other causes.
    """
    section: list[str] = []
    others: list[str] = []
    level = other_causes = 0
    for line in _plain_lines(markdown):
        title, depth = _title_of(line)
        if depth <= other_causes:
            other_causes = 0
        if depth <= level and any(section):
            level = 0
        if _ROOT_CAUSE.search(title) and not section:
            level, other_causes = min(depth, _ALONE), 0
            section.append("" if depth == _ALONE else line)
        elif _OTHER_CAUSES.search(title):
            other_causes = other_causes or (depth if depth <= _ALONE else 0)
        elif not other_causes:
            (section if level else others).append(line)
    found = _CONFIDENCE.search("\n".join(section)) or _CONFIDENCE.search("\n".join(others))
    confidence = (found["after"] or found["before"] or "").upper() if found else ""
    paragraph = _first_paragraph(section)
    if len(paragraph) > limit:
        paragraph = paragraph[: limit - 1].rsplit(" ", 1)[0] + "…"
    return paragraph or None, confidence or None


_ALONE, _LABELLED, _UNTITLED = 7, 8, 9  # below every heading, which are 1 to 6


def _title_of(line: str) -> tuple[str, int]:
    """The title in a line, and how deep it is."""
    if heading := _HEADING.match(line):
        return line, len(heading[1])
    if _BOLD_TITLE.fullmatch(line):
        return line, _ALONE
    if label := _LABEL.match(line):
        return label[0], _LABELLED if line[label.end() :].strip() else _ALONE
    return "", _UNTITLED


def _plain_lines(markdown: str) -> Iterator[str]:
    """The lines of a report without code; headings are marked by #, cells of tables are labels."""
    columns: list[str] = []
    for line, following in itertools.pairwise([*_without_code(markdown), ""]):
        if _is_ruler(line):
            continue
        if cells := _cells(line):
            if _is_ruler(following):
                columns = cells
                if not _FIELD.search(cells[0]) or _FIELD.search(cells[-1]):
                    continue  # it names the columns, and tells nothing itself
            yield from _labels(columns, cells)
            continue
        columns = []
        underline = _UNDERLINE.fullmatch(following)
        if underline and _UNDERLINED.fullmatch(line):
            yield f"{'#' if '=' in underline[0] else '##'} {line.strip()}"
        else:
            yield "" if _UNDERLINE.fullmatch(line) else line


def _without_code(markdown: str) -> Iterator[str]:
    fence = ""
    for line in markdown.splitlines():
        found = _FENCE.match(line)
        if not fence and found:
            # Some agents put the whole report into a block.
            fence = "" if found[2].lower() in ("markdown", "md") else found[1]
        elif not fence:
            yield line
        elif found and found[1].startswith(fence):
            fence = ""


def _is_ruler(line: str) -> bool:
    """The line below the names of a table's columns."""
    return "|" in line and "-" in line and not line.strip("|:- \t")


def _cells(line: str) -> list[str]:
    if not line.lstrip().startswith("|"):
        return []
    cells = line.strip().removesuffix("|").split("|", _CELLS)[1 : _CELLS + 1]
    return [cell.strip(" \t*`") for cell in cells]


def _labels(columns: Sequence[str], cells: Sequence[str]) -> Iterator[str]:
    """A row of a table: its first cell names the second, if the columns do not name both."""
    if len(cells) == 2 and not (columns and _FIELD.search(columns[1])):
        columns, cells = cells[:1], cells[1:]
    for column, cell in zip(columns, cells, strict=False):
        if cell and not cell.isdigit():
            yield f"**{column[:80].replace('*', '') or '-'}**: {cell}"


def _first_paragraph(lines: Iterable[str]) -> str:
    words: list[str] = []
    for line in lines:
        label = _LABEL.match(line)
        text = line[label.end() if label else 0 :].strip("*> \t")
        aside = _HEADING.match(line) or _CONFIDENCE.fullmatch(line.strip("`*>. \t"))
        if words and (label or aside or not text):
            break
        if text and not aside and not (label and "confidence" in label[0].lower()):
            cut = _NEXT_LABEL.search(text)
            words.append(_BULLET.sub("", text[: cut.start()] if cut else text, count=1))
            if cut:
                break
    return _AT_THE_END.sub("", " ".join(words)).strip("* ")
