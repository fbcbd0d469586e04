"""reports.py: what is read from a report for its headline, and the page of it."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import html
import re
import textwrap
import time
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import nightcrier
from conftest import an_event, an_execution, an_incident
from logs import Redactor
from reports import read_headline, render_html

REPORTS = Path(__file__).parent / "reports"


def headline(text: str) -> tuple[str | None, str | None]:
    return read_headline(textwrap.dedent(text))


def test_the_report_that_the_prompt_asks_for_is_understood() -> None:
    report = """
        # CrashLoop of web-1

        ## Root Cause
        The disk of node-3 is full,
        so that the container cannot write its pid file.

        Confidence: HIGH

        ## Evidence
        Confidence: LOW, and more.
    """
    assert headline(report) == (
        "The disk of node-3 is full, so that the container cannot write its pid file.",
        "HIGH",
    )


@pytest.mark.parametrize(
    "heading",
    [
        "## Root Cause",
        "# ROOT CAUSE",
        "###### root cause",
        "## 3. Root Cause Analysis",
        "## 3.1) Root Cause:",
        "## **Root Cause**",
        "## Most Likely Root Cause ##",
        "## 🔍 Root Cause (primary)",
        "  ## Root Cause",
        "**Root Cause**:",
        "**Root Cause:**",
        "- **Root Cause**:",
        "> **Root Cause**:",
        "1. Summary\n\n**Most Likely Root Cause**:",
        "Root cause:",
        "**Root Cause**",
        "3. **Root Cause**:",
        "Root Cause\n==========",
        "Root Cause\n---",
    ],
)
def test_the_section_of_the_root_cause_is_found_however_it_is_headed(heading: str) -> None:
    report = f"# Report\n\nSome summary.\n\n{heading}\n\nThe disk is full.\n\n## Next\n\nNo.\n"
    assert read_headline(report) == ("The disk is full.", None)


@pytest.mark.parametrize(
    "line",
    [
        "**Statement**: The disk is full.",
        "**Statement:** The disk is full.",
        "- **Statement**: The disk is full.",
        "Statement: The disk is full.",
        "**Primary cause**: The disk is full.",
        "**The disk is full.**",
        "> The disk is full.",
        "### Statement\nThe disk is full.",
        "### Hypothesis 1\n\n**Statement**: The disk is full.",
        "**Confidence**: HIGH\n\nThe disk is full.",
        "**Confidence Level**: HIGH (95 %)\n**Statement**: The disk is full.",
        "**Statement**: The disk is full. **Evidence For**: df. **Confidence**: LOW",
        "The disk is full. (Confidence: HIGH)",
        "The disk is full. — **Confidence: High**",
        "The disk is full.\n---",
        "- The disk is full.",
        "1. The disk\n2. is full.",
        "| # | Hypothesis | Confidence |\n|---|:-:|--:|\n| 1 | The disk is full. | HIGH |",
        "| Field | Value |\n|---|---|\n| Statement | The disk is full. |\n| x | y |",
        "```\nsome code\n```\nThe disk is full.",
    ],
)
def test_labels_are_no_part_of_the_root_cause(line: str) -> None:
    assert read_headline(f"## Root Cause\n\n{line}\n")[0] == "The disk is full."


@pytest.mark.parametrize(
    "label",
    [
        "**Root Cause**: The disk is full.",
        "**Root Cause:** The disk is full.",
        "- **Root cause** : The disk is full.",
        "Root Cause: The disk is full.",
        "| Item | Finding |\n|---|---|\n| **Root Cause** | The disk is full. |",
        "| Root Cause | The disk is full. |\n|---|---|",
    ],
)
def test_the_root_cause_may_stand_behind_a_label_without_a_heading(label: str) -> None:
    report = f"Findings\n\n{label}\n**Confidence**: MEDIUM\n**Evidence**: much\n\n## Next\nLOW\n"
    assert read_headline(report) == ("The disk is full.", "MEDIUM")


def test_the_template_of_statement_and_evidence_is_understood() -> None:
    report = """
        ## 4. Root Cause Analysis

        ### Hypothesis 1 (HIGH confidence)
        **Statement**: The disk is full.
        **Evidence For**: df says so.
        **Evidence Against**: none.

        ### Hypothesis 2
        **Statement**: The image is broken.
        **Confidence**: LOW
    """
    assert headline(report) == ("The disk is full.", "HIGH")


@pytest.mark.parametrize(
    ("text", "confidence"),
    [
        ("Confidence: HIGH", "HIGH"),
        ("confidence: medium", "MEDIUM"),
        ("**Confidence**: LOW", "LOW"),
        ("**Confidence:** `LOW`", "LOW"),
        ("**Confidence Level**: **HIGH**", "HIGH"),
        ("Confidence level is HIGH", "HIGH"),
        ("Confidence is HIGH", "HIGH"),
        ("Confidence: 85 % (HIGH)", "HIGH"),
        ("Confidence — HIGH", "HIGH"),
        ("### Confidence\n\nHIGH", "HIGH"),
        ("| Confidence | HIGH |", "HIGH"),
        ("| Field | Value |\n|---|---|\n| **Confidence** | `HIGH` |", "HIGH"),
        ("| Cause | Confidence |\n|---|---|\n| disk | HIGH |\n| image | LOW |", "HIGH"),
        ("**Confidence**\n\nHIGH", "HIGH"),
        ("Confidence\n---\n\nHIGH", "HIGH"),
        ("Confidence: Very High (95 %)", "HIGH"),
        ("**Overall confidence**: high", "HIGH"),
        ("Confidence in this root cause analysis: HIGH", "HIGH"),
        ("Confidence: MEDIUM-HIGH", "MEDIUM"),
        ("Confidence: 85%", None),
        ("Confidence: 85", None),
        ("```\nConfidence: HIGH\n```", None),
        ("I say so with HIGH confidence.", "HIGH"),
        ("(HIGH confidence)", "HIGH"),
        ("high-confidence finding", "HIGH"),
        ("Confidence: LOW, since it is highly unusual", "LOW"),
        ("LOW confidence: it is highly unusual", "LOW"),
        ("It is highly likely; HIGHLY.", None),
        ("HIGH memory, LOW disk", None),
        ("Confidence: unknown", None),
        ("Confidence: HIGHEST", None),
        ("no word of it", None),
    ],
)
def test_the_confidence_is_read_wherever_it_stands(text: str, confidence: str | None) -> None:
    assert read_headline(f"## Root Cause\n\nThe disk.\n\n{text}\n")[1] == confidence
    assert read_headline(f"# R\n\n{text}\n\n## Root Cause\n\nThe disk.\n")[1] == confidence
    assert (
        read_headline(f"## Root Cause\n\nThe disk.\n\n## Assessment\n\n{text}\n")[1] == confidence
    )


@pytest.mark.parametrize(
    "report",
    [
        "## Root Cause (HIGH confidence)\n\nThe disk.\n\n## Others\n\nLOW confidence: the image.\n",
        "## Others\n\nLOW confidence: that.\n\n## Root Cause\n\nThe disk.\n\nConfidence: HIGH\n",
        "## Root Cause\n\nThe disk. Confidence: HIGH\n\n### Rejected\n\nConfidence: LOW\n",
        "## Root Cause\n\nThe disk.\n\n## Alternatives\n\nConfidence: LOW\n\n## Confidence\n\nHIGH",
        "## Root Cause\n\nDisk.\n\n### H2: image\n\nConfidence: LOW\n\n## Sum\n\nConfidence: HIGH",
        "**Ruled out**\n\nConfidence: LOW\n\n**Root Cause**: The disk.\n\n**Confidence**: HIGH\n",
        "**Confidence**: HIGH\n\n**Root Cause**: Disk.\n\n**Alternatives**:\n\n- Confidence: LOW",
        "## Root Cause\n\nDisk.\n\n**Alternative**: image, Confidence: LOW\n\nConfidence: HIGH\n",
    ],
)
def test_the_confidence_is_that_of_the_root_cause_not_of_another_hypothesis(report: str) -> None:
    assert read_headline(report)[1] == "HIGH"


@pytest.mark.parametrize(
    "report",
    [
        "",
        "x" * 200,
        "The root cause is not known.\n",
        "## Rooted causes\n\nNo.\n",
        "## Root Cause",
        "## Root Cause\n\n## Evidence\n\nMuch.\n",
        "#Root Cause\n\nno heading\n",
    ],
)
def test_a_report_that_does_not_say_has_no_headline(report: str) -> None:
    assert read_headline(report) == (None, None)


def test_a_number_is_not_replaced_by_the_confidence_of_something_else() -> None:
    report = "## Root Cause\n\nThe disk.\n\nConfidence: 85%\n\n## Next\n\nConfidence: LOW\n"
    assert read_headline(report) == ("The disk.", None)


@pytest.mark.parametrize(
    ("name", "root_cause", "confidence"),
    [
        (
            "numbered",
            "The image of release 4.2 starts the JVM with a heap of 600 MB, while the container "
            "may have 512 MiB.",
            "HIGH",
        ),
        (
            "statement",
            "The volume of ledger-0 is full, so that PostgreSQL stops at its first write.",
            "LOW",
        ),
        (
            "labels",
            "The command of the container ends with `exit 1` on purpose: its log says "
            '"Crashing intentionally...".',
            "HIGH",
        ),
        ("table", "The kubelet's client certificate expired at 02:00 UTC", "HIGH"),
        (
            "after_hypotheses",
            "The service account lost the role `objectAdmin` in yesterday's change. "
            "Nobody was told.",
            "HIGH",
        ),
        (
            "whole_in_a_block",
            "The registry answers 429: the daily limit of anonymous pulls is used up.",
            "MEDIUM",
        ),
    ],
)
def test_reports_as_agents_write_them_are_understood(
    name: str, root_cause: str, confidence: str
) -> None:
    report = (REPORTS / f"{name}.md").read_text(encoding="utf-8")
    assert read_headline(report) == (root_cause, confidence)


def test_a_long_root_cause_is_cut_between_words() -> None:
    text, _ = read_headline("## Root Cause\n\n" + "word " * 1000)
    assert text is not None
    assert text.endswith(" word…")
    assert len(text) <= 300
    text, _ = read_headline("## Root Cause\n\n" + "x" * 1000)
    assert text == "x" * 299 + "…"


def test_a_report_becomes_a_row() -> None:
    markdown = "## Root Cause\n\nThe disk is full.\n\nConfidence: LOW\n"
    incident = an_incident(an_event(fault_type="CrashLoop", cluster="prod-7"))
    report = nightcrier.make_report(markdown, incident, an_execution(incident))

    assert (report.root_cause, report.confidence) == ("The disk is full.", "LOW")
    assert report.report_markdown == markdown
    page = Page.of(report.report_html)
    assert page.title.startswith("CrashLoop: ")
    facts = page.facts
    assert (facts["Root cause"], facts["Confidence"]) == ("The disk is full.", "LOW")
    assert facts["Cluster"] == "prod-7"
    assert facts["Incident"].startswith(incident.incident_id)
    assert "<h2>Root Cause</h2>" in page.source


MEGABYTE = 1_000_000


@pytest.mark.parametrize(
    "text",
    [
        "*" * MEGABYTE,
        "#" * MEGABYTE,
        "# " + "#" * MEGABYTE + "x",
        "# " + " #" * (MEGABYTE // 2) + "x",
        "# " + "1." * (MEGABYTE // 2) + "x",
        "## Root Cause" + " " * MEGABYTE + "x",
        "## Root Cause\n" + "* " * (MEGABYTE // 2),
        "## Root Cause\n" + " " * MEGABYTE + "x",
        "## Root Cause\n" + ">" * MEGABYTE,
        "**" + "a" * MEGABYTE,
        "** " * (MEGABYTE // 3),
        "**a" * (MEGABYTE // 3),
        "**a**" + " " * MEGABYTE,
        "confidence" + " " * MEGABYTE,
        "confidence" * (MEGABYTE // 10),
        "confidence level " * (MEGABYTE // 17),
        ("confidence" + "1" * 20) * (MEGABYTE // 30),
        "HIGH " * (MEGABYTE // 5),
        "## Root Cause\n" + "confidence: " * (MEGABYTE // 12),
        "## Root Cause\n" * (MEGABYTE // 14),
        "**root cause**: a\n" * (MEGABYTE // 18),
        "\n" * MEGABYTE,
        "## Root Cause\n" + "a\n" * (MEGABYTE // 2),
        "\r\n\x0b\x0c\u2028\x85" * (MEGABYTE // 6),
        "## Root Cause\n" + "|" * MEGABYTE,
        "| root cause " * 20 + "|\n|-|\n" + "| a " * (MEGABYTE // 4),
        ("| a " * 20 + "\n|-|\n") * (MEGABYTE // 86),
        "a\n---\n" * (MEGABYTE // 6),
        "```\n" * (MEGABYTE // 4),
        "**root cause**\n" * (MEGABYTE // 15),
        "**alternative**:\n" * (MEGABYTE // 17),
        "## Root Cause\n" + "— confidence in this " * (MEGABYTE // 21),
        "## Root Cause\n" + "1. " * (MEGABYTE // 3),
        "confidence" + " is" * (MEGABYTE // 3),
    ],
    ids=lambda text: repr(text[:16]),
)
def test_a_hostile_report_is_read_as_fast_as_any(text: str) -> None:
    """A pattern that tries all ways through a megabyte would take hours."""
    before = time.process_time()
    root_cause, _ = read_headline(text)
    assert time.process_time() - before < 15
    assert root_cause is None or len(root_cause) <= 300


@given(
    st.lists(
        st.sampled_from(
            [
                *("## ", "Root Cause", "**", ":", "\n", "confidence", " HIGH", "LOW ", "> ", "x"),
                *("1. ", "|", "-", "```", "Alternative", "\n\n", "---"),
            ]
        ),
        max_size=40,
    ).map("".join)
)
def test_every_report_has_a_headline_that_the_database_takes(report: str) -> None:
    root_cause, confidence = read_headline(report)
    assert confidence in (None, "HIGH", "MEDIUM", "LOW")
    assert root_cause is None or (0 < len(root_cause) <= 300 and "\n" not in root_cause)


# --- the page -------------------------------------------------------------------------------------


@dataclasses.dataclass
class Page(HTMLParser):
    """A page as a browser reads it."""

    source: str

    def __post_init__(self) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, list[str]] = {}
        self._open: list[str] = []
        self.feed(self.source)
        self.close()

    @classmethod
    def of(cls, source: str | None) -> Page:
        assert source is not None
        return cls(source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in ("br", "hr", "meta"):
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag, "elements are nested as they should be"

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.texts.setdefault(self._open[-1] if self._open else "", []).append(data)

    def __getattr__(self, tag: str) -> str:
        return "".join(self.texts.get(tag, []))

    @property
    def facts(self) -> dict[str, str]:
        found = re.findall("<tr><th>(.*?)</th><td>(.*?)</td></tr>", self.source)
        return {html.unescape(name): html.unescape(value) for name, value in found}

    @property
    def links(self) -> list[str | None]:
        return [attributes["href"] for tag, attributes in self.elements if tag == "a"]


def page_of(markdown: str, title: str = "A title", **facts: str | None) -> Page:
    return Page(render_html(markdown, title=title, facts=facts))


def body_of(markdown: str) -> str:
    page = page_of(markdown).source
    return page.partition("<main>\n")[2].rpartition("\n</main>")[0].strip()


def test_a_page_is_markdown_with_tables() -> None:
    report = "# A\n\n- *b* `c`\n\n| d | e |\n|--:|---|\n| 1 | 2 |\n\n```sh\nf > g\n```\n"
    tags = [tag for tag, _ in Page(body_of(report)).elements]
    assert tags == [
        *("h1", "ul", "li", "em", "code", "table", "thead", "tr", "th", "th"),
        *("tbody", "tr", "td", "td", "pre", "code"),
    ]
    assert '<td class="right">1</td>\n<td>2</td>' in body_of(report)
    assert "<pre><code>f &gt; g\n</code></pre>" in body_of(report)


def test_a_page_may_do_nothing_but_look() -> None:
    page = page_of("text")
    first, policy, referrer, *_ = [attributes for tag, attributes in page.elements if tag == "meta"]
    assert page.source.startswith("<!DOCTYPE html>\n<html>\n<head>\n<meta charset=")
    assert first == {"charset": "utf-8"}
    digest = base64.b64encode(hashlib.sha256(page.style.encode()).digest()).decode()
    assert policy == {
        "http-equiv": "Content-Security-Policy",
        "content": f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; "
        "form-action 'none'",
    }
    assert referrer == {"name": "referrer", "content": "no-referrer"}
    assert page.source.index("Content-Security-Policy") < page.source.index("<style>")
    assert "url(" not in page.style


def test_title_and_facts_are_text() -> None:
    page = page_of("text", title="<b>&\"'", Resource="Pod/<i>'\"", Agent=None, Model="")
    assert page.title == page.h1 == "<b>&\"'"
    assert page.facts == {"Resource": "Pod/<i>'\""}


@pytest.mark.parametrize(
    "text",
    [
        "<script>alert(1)</script>",
        "<img src=x onerror=alert(1)>",
        "<svg/onload=alert(1)>",
        "a\n\n<div style='position:fixed'>\n\n<!-- hidden -->\n",
        "</main></body></html><script>",
        "&lt;script&gt;alert(1)&lt;/script&gt;",
        "&#60;script&#62;",
        "`</code><script>`",
        "```\n</pre><script>\n```",
        '```"><script>\nx\n```',
        '``` x" onload="alert(1)\nx\n```',
        "    <script>\n",
        "| <script> |\n|---|\n| <img src=x> |",
        "![x](https://a.example/x.png)",
        '[x](https://a.example/"onmouseover="alert(1))',
        "[x](<https://a.example/'onmouseover='alert(1)>)",
        '[x](https://a.example ""><script>")',
        "[<script>](https://a.example)",
        "<https://a.example>",
        "https://a.example www.a.example",
        "[x]\n\n[x]: javascript:alert(1)",
    ],
)
def test_nothing_of_a_report_becomes_markup_of_its_own(text: str) -> None:
    for tag, attributes in Page(body_of(text)).elements:
        assert tag not in ("script", "img", "svg", "div", "body")
        assert set(attributes) <= {"href", "rel"}
    assert "<!--" not in body_of(text)


def test_the_target_of_a_link_is_what_is_shown_and_what_is_clicked() -> None:
    assert body_of("see [the **bank**](https://evil.example/?a=1&b 'a title')!") == (
        "<p>see the <strong>bank</strong> "
        '&lt;<a href="https://evil.example/?a=1&amp;b" rel="noopener noreferrer nofollow">'
        "https://evil.example/?a=1&amp;b</a>&gt;!</p>"
    )
    # The first letter is a Cyrillic one.
    assert page_of("[x](https://\u0430pple.com)").links == ["https://xn--pple-43d.com"]
    assert page_of("[x](https://a.example/\u202egpj)").links == ["https://a.example/%E2%80%AEgpj"]


@pytest.mark.parametrize(
    "target",
    [
        *("http://a.example", "https://a.example:8443/x?y#z", "HTTPS://A.example/(x)"),
        *("mailto:team@a.example", "https://10.0.0.1/"),
    ],
)
def test_links_of_the_web_and_of_mail_are_links(target: str) -> None:
    assert [link.lower() for link in page_of(f"[x]({target})").links if link] == [target.lower()]


@pytest.mark.parametrize(
    "target",
    [
        *("javascript:alert(1)", "JaVaScRiPt:alert(1)", "&#106;avascript:alert(1)"),
        *("java\\script:alert(1)", "data:text/html,x", "vbscript:x", "file:///etc/passwd"),
        *("//a.example", "/x", "x.html", "#x", "https:a.example", "https:/a.example"),
        *("https://bank.example@a.example", "https://bank.example%40a.example", "ftp://a.example"),
        *("https:\\\\a.example", "mailto:a@b.example?body=x", "slack://x", "kubectl:delete"),
    ],
)
def test_other_links_are_text(target: str) -> None:
    page = page_of(f"[x]({target})")
    assert page.links == []
    assert html.unescape(f"[x]({target})".replace("\\\\", "\\")) in page.p.replace("\\\\", "\\")


def test_a_link_to_nothing_is_its_words() -> None:
    assert body_of("see [x]().") == "<p>see x.</p>"


@pytest.mark.parametrize(
    "character",
    [*"\0\x1b\x7f\x85\u200b\u200f\u202a\u202e\u2066\u2069\ufeff\U000e0041", "\ud800"],
    ids=ascii,
)
def test_what_cannot_be_seen_is_made_visible(character: str) -> None:
    shown = rf"a(\ufffd|\[U\+{ord(character):04X}\])b"
    for report in (f"a{character}b", f"`a{character}b`", f"a{character}b" + "x" * 200_000):
        page = page_of(report, title=f"a{character}b", fact=f"a{character}b")
        assert character not in page.source
        assert re.search(shown, page.source.partition("<main>")[2])
        assert re.fullmatch(shown, page.title)
        assert re.fullmatch(shown, page.facts["fact"])
    written_out = page_of(f"a&#x{ord(character):x};b").source
    assert character not in written_out
    written_out.encode()


def test_letters_and_emoji_of_the_world_stay_what_they_are() -> None:
    text = "Ursache: Größe – 根本原因 – שלום – 👩\u200d🔧 ⚠️ – می\u200cخواهم"
    assert body_of(text) == f"<p>{text}</p>"


@pytest.mark.parametrize(
    "report",
    [
        "<b>& *x*\n" * 15_000,
        "> " * 30 + "<b>& *x*",
        "- " * 30 + "<b>& *x*",
        "> - " * 9 + "> <b>& *x*",
        # Each costs the parser, in its way, the square of the length, or more.
        "<b>& *x*\n\n" + "\t```\n> *\n" * 10_000,
        "<b>& *x*\n\n" + "[a](```\n> ```\n" * 7_000,
        "<b>& *x*\n\n" + ("|a" * 250 + "|\n" + "|-" * 250 + "|\n" + "x\n" * 250 + "\n") * 50,
    ],
    ids=["long", "quotes", "lists", "both", "code in quotes", "text in quotes", "tables"],
)
def test_what_is_too_much_is_shown_as_it_was_written(report: str) -> None:
    page = Page(body_of(report))
    assert [tag for tag, _ in page.elements] == ["pre"]
    assert page.pre == report.rstrip("\n") or page.pre == report


def test_a_report_beyond_reading_is_cut_and_says_so() -> None:
    page = page_of("x" * 1_000_007)
    assert page.pre == "x" * 1_000_000
    assert "… and 7 characters more." in page.p


def test_a_mistake_of_the_library_costs_a_report_only_its_looks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("markdown_it.MarkdownIt.parse", lambda *_: 1 / 0)
    assert body_of("# A\n") == "<pre># A\n</pre>"


@pytest.mark.parametrize("text", ["[", "[a](", "<"])
def test_what_the_parser_tries_in_vain_at_each_character_is_text(text: str) -> None:
    report = text * (100_000 // len(text))
    assert page_of(report).p.endswith(report)


@given(
    st.lists(
        st.sampled_from(
            [
                *("<", ">", "&", '"', "'", "script", " onload=", "[", "](", ")", "https://a", "`"),
                *(
                    "```",
                    "\n",
                    "\n\n",
                    "    ",
                    "|",
                    "|-|\n",
                    "# ",
                    "- ",
                    "1. ",
                    "*",
                    "&lt;",
                    "&#0;",
                ),
                *("\\", "!", "javascript:", "data:", "\u202e", "\0", "<!--", "]]>", "x"),
            ]
        ),
        max_size=40,
    ).map("".join)
)
def test_every_report_becomes_a_page_of_the_elements_of_markdown(report: str) -> None:
    page = Page(body_of(report))
    allowed = {"p", "h1", "h2", "em", "strong", "code", "pre", "blockquote", "ul", "ol", "li", "hr"}
    allowed |= {"a", "br", "table", "thead", "tbody", "tr", "th", "td"}
    for tag, attributes in page.elements:
        assert tag in allowed
        assert set(attributes) <= {"a": {"href", "rel"}, "ol": {"start"}}.get(tag, {"class"})
        assert attributes.get("class") in (None, "left", "right", "center")
        assert re.match("https?://", attributes.get("href") or "https://")


def test_a_secret_that_markdown_had_hidden_is_not_in_the_page(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(nightcrier, "redact", Redactor(["sk_very_secret"]))
    incident = an_incident()
    report = nightcrier.make_report(
        "The key is sk\\_very\\_secret.", incident, an_execution(incident)
    )
    assert "The key is [redacted]." in (report.report_html or "")
