"""Arranges provenance.json for reading: a table of all starts, and the newest one in detail."""

from __future__ import annotations

import json
from typing import Any

from lpl_pretrain.report.record import RunRecord

IN_TABLE = ("step", "time_s", "config_changes")
"""Keys of a start that its details do not repeat."""
MAX_DIFF_CHARACTERS = 40_000
CODE_DIGITS = 12


def provenance(record: RunRecord) -> dict[str, Any]:
    """Values for the template; keys that this version does not know are shown as they are."""
    rest = {key: value for key, value in record.provenance.items() if key not in IN_TABLE}
    diff = str(rest.pop("git_diff", None) or "")
    argv = rest.pop("argv", None)
    versions = rest.pop("versions", None)
    return {
        "command": " ".join(map(str, argv)) if isinstance(argv, list) else argv,
        "versions": versions if isinstance(versions, dict) else {},
        "diff": diff[:MAX_DIFF_CHARACTERS],
        "diff_cut": len(diff) > MAX_DIFF_CHARACTERS,
        "starts": [start_row(start) for start in record.starts],
        "details": {
            key: value if isinstance(value, str) else json.dumps(value)
            for key, value in rest.items()
        },
    }


def start_row(start: dict[str, Any]) -> dict[str, Any]:
    """One line of the table of starts; what an older version did not write is empty."""
    hosts = start.get("hosts")
    names = hosts if isinstance(hosts, list) else [start.get("host")]
    time_s = start.get("time_s")
    changes = start.get("config_changes")
    changed = changes.items() if isinstance(changes, dict) else ()
    return {
        "step": start.get("step"),
        "time_s": time_s if isinstance(time_s, (int, float)) else None,
        "strategy": start.get("strategy"),
        "world_size": start.get("world_size"),
        "hosts": ", ".join(str(name) for name in names if name),
        "code": str(start.get("code") or start.get("git_commit") or "")[:CODE_DIGITS],
        "changes": "; ".join(f"{key}: {_change(values)}" for key, values in changed),
    }


def _change(values: Any) -> str:
    """Old and new value of a configuration key: "ddp" → "fsdp2"."""
    return " → ".join(map(json.dumps, values)) if isinstance(values, list) else json.dumps(values)
