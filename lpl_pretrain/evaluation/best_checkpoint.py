"""Keeps evaluations/best_<protocol>.json up to date, and warns when scores get worse."""

from __future__ import annotations

import os
from pathlib import Path

from lpl_pretrain.config.best import best_entry, find_best, read_best
from lpl_pretrain.config.protocol import EvaluateConfig
from lpl_pretrain.config.records import Record, read_records
from lpl_pretrain.config.rundir import RunDir
from lpl_pretrain.errors import DataError
from lpl_pretrain.runtime.atomic import atomic_write_json
from lpl_pretrain.runtime.log import log


def update_best(run_dir: RunDir, protocol: EvaluateConfig) -> list[str]:
    """Write the best-checkpoint file from all sound records; returns warnings.

    The order in which records were written does not matter.
    """
    if protocol.best is None:
        return []
    warnings: list[str] = []
    records = read_records(run_dir.path / "evaluations", protocol.name, warnings.append)
    best = find_best(records, protocol.best)
    if best is None:
        metrics = sorted({entry["metric"] for record in records for entry in record["results"]})
        return [
            *warnings,
            f"best={protocol.best}: no score has this name; the records have {', '.join(metrics)}",
        ]
    path = run_dir.best(protocol.name)
    if not _says(path, best):
        atomic_write_json(path, best)
    later = [
        record["step"]
        for record in records
        if record["step"] > best["step"] and best_entry(record, protocol.best)
    ]
    if len(later) >= protocol.patience:
        warnings.append(
            f"{protocol.best} has been worse than {best['value']:.4g} of step {best['step']} for "
            f"{len(later)} evaluations (now step {later[-1]}): the run may be diverging or "
            "overfitting"
        )
    return warnings


def repair_best(run_dir: RunDir, protocol: EvaluateConfig) -> None:
    """Rewrite the best-checkpoint file where the records disagree with it.

    An evaluator may have ended before it wrote the file.
    """
    path = run_dir.best(protocol.name)
    if protocol.best is not None and os.path.lexists(path):
        try:
            read_best(path)
        except DataError as error:
            log.warning("%s: it is rewritten from the records", error)
    if any(run_dir.path.glob(f"evaluations/step_*/{protocol.name}.json")):
        for warning in update_best(run_dir, protocol):
            log.warning("%s", warning)


def _says(path: Path, best: Record) -> bool:
    """Whether this best-checkpoint file exists, is sound, and names this score."""
    try:
        return read_best(path) == best
    except DataError:
        return False
