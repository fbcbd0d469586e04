"""Keys of the existing nightcrier's configuration; nothing here knows of incidents.

They have another name in this one, or no effect, and a message says why. nightcrier.py uses this
module; it imports nothing from there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any
from urllib.parse import quote

IGNORED: Mapping[str, str] = {
    key: reason
    for reason, keys in {
        "every fault event is one incident": "severity_threshold dedup_window_seconds",
        "the queue is the database: nothing overflows, reading pauses": (
            "queue_overflow_policy global_queue_size cluster_queue_size"
        ),
        "reconnecting is built in (full jitter, 1 to 60 s), and a quiet stream is healthy": (
            "sse_reconnect_initial_backoff sse_reconnect_max_backoff sse_read_timeout"
        ),
        "agents are started directly, on this host, with their own configuration": (
            "agent_script_path agent_image agent_verbose skills tuning"
        ),
        "reports are in the database, everything else in the workspace": (
            "azure_storage_connection_string azure_storage_account azure_storage_key "
            "azure_storage_container azure_sas_expiry upload_failed_investigations"
        ),
    }.items()
    for key in keys.split()
}

_RENAMED = {
    "type": "state_store",
    "sqlite_path": "sqlite",
    "postgres_connection_string": "postgres_dsn",
}  # of state_storage
_DSN_PARTS = tuple(f"postgres_{part}" for part in ("user", "password", "host", "port", "database"))
_BUILT_IN = "the schema is part of the program"


def take_state_storage(
    values: dict[str, Any], where: Callable[..., str], problem: Callable[..., None]
) -> list[str]:
    """Give what is in the file's `state_storage` the names that it has here; returns warnings.

    `where(*place)` names a line of the file, `problem(text, *place)` notes a mistake there.
    """
    storage = values.pop("state_storage", None)
    if storage is not None and not isinstance(storage, dict):
        problem("state_storage: must be a mapping", "state_storage")
        return []
    storage = storage or {}
    kind = storage.get("type", "postgres")
    warnings = []
    for key, value in storage.items():
        place = where("state_storage", str(key))
        if key == "type" and value == "postgres":
            continue  # the connection says so
        if str(key).startswith("postgres_") and kind != "postgres":
            warnings.append(f"{place}: state_storage.{key} has no effect: the type is {kind}")
        elif new := _RENAMED.get(key):
            values.setdefault(new, value)
            warnings.append(f"{place}: state_storage.{key} is now called {new}")
        elif key not in _DSN_PARTS:
            warnings.append(f"{place}: state_storage.{key} has no effect: {_BUILT_IN}")
    if kind == "postgres" and (dsn := _dsn_of(storage)):
        values.setdefault("postgres_dsn", dsn)
        place = where("state_storage")
        warnings.append(f"{place}: state_storage.postgres_… are now one setting, postgres_dsn")
    if storage.get("type") == "postgres" and not values.get("postgres_dsn"):
        problem("state_storage: type postgres needs a connection: postgres_dsn", "state_storage")
    return warnings


def _dsn_of(storage: Mapping[str, Any]) -> str | None:
    """The connection string that the existing nightcrier makes of its separate settings."""
    if not any(storage.get(part) for part in _DSN_PARTS):
        return None
    user, password, host, port, database = (
        quote(str(storage.get(part) or ""), safe="") for part in _DSN_PARTS
    )
    who = f"{user}:{password}@" if password else f"{user}@" if user else ""
    return f"postgresql://{who}{host}{port and ':' + port}/{database}"
