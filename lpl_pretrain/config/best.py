"""The best checkpoint by a protocol's scores: evaluations/best_<protocol>.json, read strictly, and
found in records.

{step, metric, value, weights, guidance_scale}
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lpl_pretrain.config.metrics import higher_is_better
from lpl_pretrain.config.records import (
    Record,
    Warn,
    entry_problem,
    is_scored,
    read_record,
    read_records,
)
from lpl_pretrain.config.steps import step_name
from lpl_pretrain.config.strict_json import JSONError, is_count, key_problem, read_json, shown
from lpl_pretrain.errors import DataError

BEST_KEYS = frozenset({"step", "metric", "value", "weights", "guidance_scale"})


def read_best(path: Path) -> Record:
    """The content of evaluations/best_<protocol>.json.  Raises DataError, also where the record of
    its step disagrees.
    """
    try:
        best = read_json(path)
    except JSONError as error:
        raise DataError(str(error)) from None
    if (problem := key_problem(best, BEST_KEYS)) is None:
        problem = entry_problem(best)
    if problem is None and not is_count(best["step"]):
        problem = f"step: found {shown(best['step'])}, wanted an integer from 0"
    if problem is not None:
        raise DataError(f"{path}: {problem}")
    record = path.parent / step_name(best["step"]) / f"{protocol_of(path)}.json"
    if is_scored(record):
        wanted = {key: best[key] for key in BEST_KEYS - {"step"}}
        if not any(wanted.items() <= entry.items() for entry in read_record(record)["results"]):
            raise DataError(
                f"{path}: {best['metric']}={best['value']:.4g} of step {best['step']} is not what "
                f"{record} says"
            )
    return best


def find_best(records: list[Record], metric: str) -> Record | None:
    """The content of a best-checkpoint file, of the records' entries of this metric; the earliest
    of equal ones.
    """
    sign = -1 if higher_is_better(metric) else 1
    found = [
        (record["step"], entry)
        for record in records
        if (entry := best_entry(record, metric)) is not None
    ]
    if not found:
        return None
    step, entry = min(found, key=lambda pair: (sign * pair[1]["value"], pair[0]))
    return {
        "step": step,
        **{key: entry[key] for key in ("metric", "value", "weights", "guidance_scale")},
    }


def best_entry(record: Record, metric: str) -> dict[str, Any] | None:
    """The best entry of one record, over weights and guidance scales."""
    sign = -1 if higher_is_better(metric) else 1
    entries = (entry for entry in record["results"] if entry["metric"] == metric)
    return min(entries, key=lambda entry: sign * entry["value"], default=None)


def load_best(path: Path, warn: Warn) -> Record | None:
    """Content of the file; if it is damaged, the best of the records, after a warning.  None: there
    is neither.
    """
    try:
        return read_best(path)
    except DataError as error:
        records = read_records(path.parent, protocol_of(path), warn)
        metrics = [record["protocol"].get("best") for record in records]
        metric = next((name for name in reversed(metrics) if isinstance(name, str)), None)
        best = None if metric is None else find_best(records, metric)
        source = (
            "no record names the best step"
            if best is None
            else f"the records say step {best['step']}"
        )
        warn(f"{error}: this file does not count; {source}")
        return best


def best_steps(paths: Iterable[Path], warn: Warn) -> set[int]:
    """Steps that these files call the best."""
    found = [load_best(path, warn) for path in paths]
    return {best["step"] for best in found if best is not None}


def protocol_of(path: Path) -> str:
    return path.stem.removeprefix("best_")
