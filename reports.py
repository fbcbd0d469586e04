"""Reports in Markdown: the headline of one, and the page that people open; no incidents in here.

Reports are untrusted text: none is an error, and none takes longer to read than its length allows.
nightcrier.py uses this module; it imports nothing from there.

1. Headline: root cause and confidence.
2. Page: HTML that loads nothing and runs nothing.
"""

from __future__ import annotations

import base64
import hashlib
import itertools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from markdown_it import MarkdownIt

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


# ============================================================================
# 1. Headline
# No pattern can be led to try more than a bounded number of ways from one place.
# ============================================================================


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


# ============================================================================
# 2. Page
# Nothing of a report becomes markup but what its Markdown means, and what is clicked is what is
# shown. Were all that wrong, the page's policy would still let it load and run nothing.
# ============================================================================


_RENDERED = 100_000  # characters; of more than that nobody reads all
_STEPS = 400_000  # one for each line, word or cell, and some more; a long report takes 50,000
_NESTING = 20  # the parser leaves out what is deeper
_SHOWN = 1_000_000  # characters: a browser shows that at once
_OFF = ("autolink", "html_block", "html_inline", "image", "reference")

# Spelled out, and without a user: https://a.bank@elsewhere is elsewhere. Other alphabets in the
# name of a host come here as xn--….
_LINK = re.compile(
    r"https?://[a-z0-9.-]{1,253}(?::\d{1,5})?(?:[/?#][!-~]{0,2000})?"
    r"|mailto:[a-z0-9._+-]{1,64}@[a-z0-9.-]{1,253}",
    re.IGNORECASE | re.ASCII,
)
# Characters that are not seen, or change the order of others; not those that join letters or emoji.
_UNSEEN = re.compile(
    r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u061c\u180e\u200b\u200e\u200f\u2028-\u202e"
    r"\u2060-\u206f\ufeff\ufff9-\ufffb\ud800-\udfff\U000e0000-\U000e007f]"
)

_STYLE = """
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 52em; margin: 2em auto; padding: 0 1em;
  overflow-wrap: anywhere; }
h1, h2, h3, h4 { line-height: 1.25; margin: 1.4em 0 .5em; break-after: avoid; }
main { border-top: 1px solid #8888; }
pre, code { font: .9em/1.4 ui-monospace, monospace; background: #8882; }
pre { padding: .8em; white-space: pre-wrap; }
code { padding: .1em .2em; }
pre code { padding: 0; background: none; }
blockquote { margin-left: 0; padding-left: 1em; border-left: 3px solid #8888; }
table { border-collapse: collapse; }
th, td { border: 1px solid #8888; padding: .3em .6em; text-align: left; vertical-align: top; }
.center { text-align: center; }
.right { text-align: right; }
.note { font-size: .9em; opacity: .8; }
@media print {
  body { font-size: 11pt; max-width: none; margin: 0; }
  tr, pre { break-inside: avoid; }
}
"""
_PAGE = """\
<!DOCTYPE html>
<html>
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="referrer" content="no-referrer">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<h1>{title}</h1>
<table>
{facts}
</table>
<p class="note">An AI agent wrote what follows. It had read text from the cluster, which anybody may
have put there: check it before you act, and look where a link leads.</p>
<main>
{body}
</main>
</body>
</html>
"""


def render_html(markdown: str, *, title: str, facts: Mapping[str, str | None]) -> str:
    """A report as a page of its own, which loads nothing and runs nothing; facts stand above it.

    Takes a few seconds at most: a long report, or a deeply nested one, is shown as it was written.
    """
    from html import escape

    digest = base64.b64encode(hashlib.sha256(_STYLE.encode()).digest()).decode()
    rows = (
        f"<tr><th>{escape(name)}</th><td>{escape(value)}</td></tr>"
        for name, value in facts.items()
        if value
    )
    page = _PAGE.format(
        policy=f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; "
        "form-action 'none'",
        style=_STYLE,
        title=escape(title),
        facts="\n".join(rows),
        body=_rendered(markdown) or _as_written(markdown),
    )
    # At the end: a report can also write a character as &#x202e;.
    return _UNSEEN.sub(lambda found: f"[U+{ord(found[0]):04X}]", page)


def _as_written(markdown: str) -> str:
    from html import escape

    left_out = len(markdown) - _SHOWN
    more = f"<p>… and {left_out} characters more.</p>\n" if left_out > 0 else ""
    return f"<pre>{escape(markdown[:_SHOWN], quote=False)}</pre>\n{more}"


def _rendered(markdown: str) -> str | None:
    """The HTML of a report; None if it is not to be had."""
    if len(markdown) > _RENDERED:
        return None
    try:
        parser = _parser()  # one for each report: it is not made to be shared by threads
        tokens = parser.parse(markdown)
        if any(token.level >= _NESTING - 1 for token in tokens):
            return None
        for token in tokens:
            token.info = ""  # the language of a block of code: it would be a class
            if align := token.attrs.pop("style", None):  # of a cell: the policy allows no style
                token.attrs["class"] = str(align).removeprefix("text-align:")
        return str(parser.renderer.render(tokens, parser.options, {}))
    except Exception:  # a mistake of the library costs a report its looks, and nothing more
        return None


def _parser() -> MarkdownIt:
    from markdown_it import MarkdownIt

    parser = MarkdownIt("commonmark", {"html": False, "maxNesting": _NESTING})
    parser.enable("table").disable(_OFF)
    _limit(parser)
    parser.validateLink = lambda url: bool(_LINK.fullmatch(url))  # type: ignore[method-assign]
    parser.add_render_rule("link_open", _link_open)
    parser.add_render_rule("link_close", _link_close)
    return parser


def _limit(parser: MarkdownIt) -> None:
    """Let a parser give up: a quote of unfinished code costs the square of its length, for one."""
    steps = itertools.count()

    def step(state: Any, *_: Any) -> bool:
        """A rule that matches nothing, and is tried before any other."""
        if next(steps) + len(state.tokens) > _STEPS:
            raise RuntimeError("too much work")
        return False

    everywhere = ["paragraph", "reference", "blockquote", "list"]
    parser.block.ruler.before("table", "step", step, {"alt": everywhere})
    parser.inline.ruler.before("text", "step", step)


def _link_open(_renderer: Any, tokens: Any, index: int, _options: Any, env: Any) -> str:
    env["href"] = tokens[index].attrs["href"]
    return ""


def _link_close(_renderer: Any, _tokens: Any, _index: int, _options: Any, env: Any) -> str:
    """The link is its target, behind the words that were to be the link: those can say anything."""
    from html import escape

    href = escape(env["href"])
    if not href:  # of [words]()
        return ""
    return f' &lt;<a href="{href}" rel="noopener noreferrer nofollow">{href}</a>&gt;'
