"""The best checkpoint by a protocol's scores, and a word when they get worse."""

from __future__ import annotations

import json
from typing import Any

from lpl_pretrain.config.evaluation import higher_is_better
from lpl_pretrain.config.protocol import EvaluateConfig
from lpl_pretrain.config.rundir import RunDir
from lpl_pretrain.evaluation.files import publish_json


def note_best(run_dir: RunDir, protocol: EvaluateConfig) -> list[str]:
    """Writes evaluations/best_<protocol>.json from all records there are; returns warnings.  Order of arrival does not matter."""
    if protocol.best is None:
        return []
    records = [json.loads(path.read_text()) for path in run_dir.path.glob(f"evaluations/step_*/{protocol.name}.json")]
    scored = sorted((record["step"], best_of(record, protocol.best)) for record in records)
    found = [(step, entry) for step, entry in scored if entry is not None]
    if not found:
        metrics = sorted({entry["metric"] for record in records for entry in record["results"]})
        return [f"best={protocol.best}: no score is called so; there are {', '.join(metrics)}"]
    sign = -1 if higher_is_better(protocol.best) else 1
    step, entry = min(found, key=lambda pair: (sign * pair[1]["value"], pair[0]))
    keys = ("metric", "value", "weights", "guidance_scale")
    publish_json(run_dir.best(protocol.name), {"step": step, **{key: entry[key] for key in keys}})
    since = [later for later, _ in found if later > step]
    if len(since) < protocol.patience:
        return []
    return [
        f"{protocol.best} has been worse than {entry['value']:.4g} of step {step} for {len(since)} evaluations "
        f"(now step {since[-1]}): the run may be diverging or overfitting"
    ]


def best_of(record: dict[str, Any], metric: str) -> dict[str, Any] | None:
    """The best entry of one record, over weights and guidance scales."""
    sign = -1 if higher_is_better(metric) else 1
    return min((e for e in record["results"] if e["metric"] == metric), key=lambda e: sign * e["value"], default=None)
