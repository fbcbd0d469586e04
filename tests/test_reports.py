"""reports.py: what is read from a report for its headline."""

from __future__ import annotations

import textwrap
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import nightcrier
from reports import read_headline

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
    report = nightcrier.make_report(markdown)
    assert (report.root_cause, report.confidence) == ("The disk is full.", "LOW")
    assert report.report_markdown == markdown


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
