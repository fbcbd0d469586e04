"""What the demo plays and shows: faults of simulated clusters, a stub of an agent, a table.

The stub knows what any agent knows, the file incident.json. nightcrier.py uses this module; it
imports nothing from there.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Sequence
from pathlib import Path

# What happens in the demo: (cluster, fault type, kind, namespace, name, severity, context).
DEMO_SCRIPT: tuple[tuple[str, ...], ...] = (
    ("alpha", "CrashLoop", "Pod", "shop", "cart-6f7d", "critical", "last exit code: 1"),
    ("beta", "NodeUnhealthy", "Node", "", "node-7", "warning", "Ready=Unknown for 40 s"),
    ("alpha", "PodCrash", "Pod", "shop", "search-0", "warning", "OOMKilled, limit 256Mi"),
    ("alpha", "CrashLoop", "Pod", "shop", "cart-6f7d", "critical", "the same fault again"),
    ("beta",),  # its connection is cut
    ("beta", "JobFailure", "Job", "batch", "nightly-28", "critical", "BackoffLimitExceeded"),
    ("alpha", "ImagePull", "Pod", "shop", "ads-1", "info", "pulled after 3 retries"),
    ("beta", "DeploymentFailure", "Deployment", "web", "front", "critical", "0 of 3 ready"),
)


def _stub_agent() -> None:
    """Stands in for an AI agent in the demo; runs by itself in a bare interpreter."""
    import json
    import time

    with open("incident.json", encoding="utf-8") as file:
        incident = json.load(file)
    time.sleep(0.5)  # an agent takes minutes
    resource = incident["resource"]
    name = f"{resource['kind']} {resource['namespace']}/{resource['name']}".replace(" /", " ")
    with open("output/investigation.md", "w", encoding="utf-8") as file:
        file.write(
            f"# {incident['faultType']} of {name}\n\n"
            "## Root Cause\n\n"
            f"{name} reported {incident['faultType']}: {incident['context']}.\n\n"
            "Confidence: HIGH\n\n"
            "## Evidence\n\nNone: the demo's stub agent only reads incident.json.\n\n"
            "## Recommendations\n\nConfigure a real agent with agent_cli.\n"
        )


def stub_agent_command() -> tuple[str, ...]:
    source = inspect.getsource(_stub_agent)
    return (sys.executable, "-I", "-S", "-c", f"{source}\n_stub_agent()\n")


DEMO_QUERIES = (
    "select status, severity, cluster, fault_type, root_cause from v_incidents",
    "select cluster, connection_state, events_total, gaps, gap_seconds from v_clusters",
    "select incident_id, seq, from_status, to_status, at, reason from incident_transitions",
)


def new_path(path: Path) -> Path:
    """The path itself, or with a number, such that nothing is there."""
    number = 1
    while (candidate := path if number == 1 else path.with_stem(f"{path.stem}-{number}")).exists():
        number += 1
    return candidate


def text_table(rows: Sequence[Sequence[str]]) -> str:
    """Columns as wide as they need to be."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )


def coloured(code: str, text: str) -> str:
    return f"\x1b[{code}m{text}\x1b[0m" if sys.stdout.isatty() else text
