"""What a report shows of the scores by one evaluation protocol: a chart and a table for each
metric.
"""

from __future__ import annotations

from typing import Any

from lpl_pretrain.config.metrics import higher_is_better, score_title
from lpl_pretrain.report.charts import Chart
from lpl_pretrain.report.record import Series

Records = list[dict[str, Any]]
MOST_METRICS = 60


def metrics(records: Records) -> list[str]:
    """At most MOST_METRICS, of which each takes a chart."""
    return list(
        dict.fromkeys(entry["metric"] for record in records for entry in record["results"])
    )[:MOST_METRICS]


def columns(records: Records) -> list[tuple[str, float]]:
    """(weights, guidance scale) of every curve."""
    return sorted(
        {
            (entry.get("weights", "ema"), entry["guidance_scale"])
            for record in records
            for entry in record["results"]
        }
    )


def heading(column: tuple[str, float], among: list[tuple[str, float]]) -> str:
    weights, scale = column
    return (
        f"w = {scale:g}" if len({name for name, _ in among}) == 1 else f"{weights}, w = {scale:g}"
    )


def entry_of(
    record: dict[str, Any], metric: str, column: tuple[str, float]
) -> dict[str, Any] | None:
    found = (
        e
        for e in record["results"]
        if e["metric"] == metric and (e.get("weights", "ema"), e["guidance_scale"]) == column
    )
    return next(found, None)


def chart(records: Records, metric: str) -> Chart:
    """Scores over steps; bars are 95 % intervals where the record has them, one standard error
    otherwise.
    """
    asked = columns(records)
    lines = {heading(column, asked): series(records, metric, column) for column in asked}
    better = "higher" if higher_is_better(metric) else "lower"
    bars = (
        "; bars show its uncertainty"
        if any(any(line.bars or ()) for line in lines.values())
        else ""
    )
    return Chart(
        score_title(metric),
        lines,
        markers=True,
        note=f"{metric} by guidance scale w; {better} is better{bars}",
    )


def series(records: Records, metric: str, column: tuple[str, float]) -> Series:
    found = [
        (record["step"], entry)
        for record in records
        if (entry := entry_of(record, metric, column)) is not None
    ]
    return Series(
        [step for step, _ in found],
        [entry["value"] for _, entry in found],
        [bar(entry) for _, entry in found],
    )


def bar(entry: dict[str, Any]) -> tuple[float, float] | None:
    """How far below and above the value."""
    if "low" in entry and "high" in entry:
        return max(0.0, entry["value"] - entry["low"]), max(0.0, entry["high"] - entry["value"])
    return (abs(entry["std"]), abs(entry["std"])) if "std" in entry else None


def table(records: Records, metric: str) -> list[dict[str, Any]]:
    """A row for each step; a cell is None where that step has no such score."""
    asked = columns(records)
    return [
        {"step": record["step"], "entries": [entry_of(record, metric, column) for column in asked]}
        for record in records
    ]


def main_metric(records: Records) -> str:
    """The one that the best checkpoint is chosen by, or the first."""
    found = metrics(records)
    best = records[-1]["protocol"].get("best")
    return best if best in found else found[0]


def best_entry(records: Records, metric: str) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """(record, entry) of the best score at whatever step, weights and guidance scale."""
    sign = -1 if higher_is_better(metric) else 1
    found = [
        (record, entry)
        for record in records
        for entry in record["results"]
        if entry["metric"] == metric
    ]
    return min(found, key=lambda pair: sign * pair[1]["value"], default=None)


def best_column(records: Records) -> tuple[tuple[str, float], list[float]]:
    """Of the first metric: the column that is best at the last step, and its values over steps."""
    metric = records[-1]["results"][0]["metric"]
    sign = -1 if higher_is_better(metric) else 1
    entries = [entry for entry in records[-1]["results"] if entry["metric"] == metric]
    best = min(entries, key=lambda entry: sign * entry["value"])
    column = (best.get("weights", "ema"), best["guidance_scale"])
    return column, [
        entry["value"]
        for record in records
        if (entry := entry_of(record, metric, column)) is not None
    ]
