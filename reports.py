"""Reports in Markdown: what people see first of one; nothing here knows of incidents.

Reports are untrusted text: none is an error, and none takes longer to read than its length allows.
nightcrier.py uses this module; it imports nothing from there.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

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
_HEADING = re.compile(r"\s{0,3}(#{1,6})\s")
_LABEL = re.compile(  # **Label**: or **Label:** or, of the two that matter, Label:
    r"[\s>*+-]*?(?:\*\*[^*]{1,80}(?:\*\*\s?:|:\s?\*\*)|(?:root cause|statement)\s?:)",
    re.IGNORECASE,
)
_ROOT_CAUSE = re.compile(r"\broot cause\b", re.IGNORECASE)
_CONFIDENCE = re.compile(
    r"confidence(?:\s{1,3}(?:level|is)){0,2}[\W\d]{0,16}(?P<after>HIGH|MEDIUM|LOW)\b"
    r"|\b(?P<before>HIGH|MEDIUM|LOW)\W{0,3}confidence\b",
    re.IGNORECASE,
)


def read_headline(markdown: str, limit: int = 300) -> tuple[str | None, str | None]:
    """Root cause and confidence (HIGH, MEDIUM, LOW) of a report; None for what it does not say.

    The root cause is the first paragraph below a heading that speaks of it, or behind such a label.
    The confidence is the first one named in that section, or else in the whole report.
    """
    section: list[str] = []
    level = 0
    for line in markdown.splitlines():
        heading = _HEADING.match(line)
        title = heading or _LABEL.match(line)
        depth = len(heading[1]) if heading else 7  # a label is below every heading
        if section:
            if heading and depth <= level:
                break
            section.append(line)
        elif title and _ROOT_CAUSE.search(line if heading else title[0]):
            section, level = [line], depth
    found = _CONFIDENCE.search("\n".join(section)) or _CONFIDENCE.search(markdown)
    confidence = (found["after"] or found["before"]).upper() if found else None
    paragraph = _first_paragraph(section)
    if len(paragraph) > limit:
        paragraph = paragraph[: limit - 1].rsplit(" ", 1)[0] + "…"
    return paragraph or None, confidence


def _first_paragraph(lines: Iterable[str]) -> str:
    words: list[str] = []
    for line in lines:
        label = _LABEL.match(line)
        text = line[label.end() if label else 0 :].strip("*> \t")
        aside = _HEADING.match(line) or _CONFIDENCE.fullmatch(line.strip("`*>. \t"))
        if words and (label or aside or not text):
            break
        if text and not aside and not (label and "confidence" in label[0].lower()):
            words.append(text)
    return " ".join(words)
