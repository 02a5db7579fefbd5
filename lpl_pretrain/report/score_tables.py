"""Charts and tables of the scores by one evaluation protocol, one of each a metric."""

from __future__ import annotations

from typing import Any

from lpl_pretrain.config.metrics import higher_is_better, score_title
from lpl_pretrain.report.charts import Chart
from lpl_pretrain.report.record import Series

Records = list[dict[str, Any]]
MAX_METRICS = 60


def metrics(records: Records) -> list[str]:
    """Names of the scores in these records; at most MAX_METRICS, for each takes a chart."""
    return list(
        dict.fromkeys(entry["metric"] for record in records for entry in record["results"])
    )[:MAX_METRICS]


def columns(records: Records) -> list[tuple[str, float]]:
    """(weights, guidance scale) of every curve."""
    return sorted(
        {
            (entry.get("weights", "ema"), entry["guidance_scale"])
            for record in records
            for entry in record["results"]
        }
    )


def heading(column: tuple[str, float], columns: list[tuple[str, float]]) -> str:
    """Heading of a column: its guidance scale w, and its weights where `columns` have several."""
    weights, scale = column
    if len({name for name, _ in columns}) == 1:
        return f"w = {scale:g}"
    return f"{weights}, w = {scale:g}"


def entry_of(
    record: dict[str, Any], metric: str, column: tuple[str, float]
) -> dict[str, Any] | None:
    """Score of a record, or None where it has no such score."""
    for entry in record["results"]:
        its_column = (entry.get("weights", "ema"), entry["guidance_scale"])
        if entry["metric"] == metric and its_column == column:
            return entry
    return None


def chart(records: Records, metric: str) -> Chart:
    """Scores over steps; error bars are 95 % intervals where recorded, else `std`."""
    shown = columns(records)
    lines = {heading(column, shown): series(records, metric, column) for column in shown}
    better = "higher" if higher_is_better(metric) else "lower"
    has_bars = any(any(line.bars or ()) for line in lines.values())
    bars = "; bars: 95 % interval or standard error" if has_bars else ""
    return Chart(
        score_title(metric),
        lines,
        unit="score",
        markers=True,
        note=f"{metric} by guidance scale w; {better} is better{bars}",
    )


def series(records: Records, metric: str, column: tuple[str, float]) -> Series:
    """Values of one curve, with error bars."""
    scored = [
        (record["step"], entry)
        for record in records
        if (entry := entry_of(record, metric, column)) is not None
    ]
    return Series(
        steps=[step for step, _ in scored],
        values=[entry["value"] for _, entry in scored],
        bars=[error_bar(entry) for _, entry in scored],
    )


def error_bar(entry: dict[str, Any]) -> tuple[float, float] | None:
    """Lengths (below, above) of a score's error bar; None where its uncertainty is unknown."""
    if "low" in entry and "high" in entry:
        return max(0.0, entry["value"] - entry["low"]), max(0.0, entry["high"] - entry["value"])
    return (abs(entry["std"]), abs(entry["std"])) if "std" in entry else None


def table(records: Records, metric: str) -> list[dict[str, Any]]:
    """One row a step; an entry is None where that step has no such score."""
    shown = columns(records)
    return [
        {"step": record["step"], "entries": [entry_of(record, metric, column) for column in shown]}
        for record in records
    ]


def main_metric(records: Records) -> str:
    """Score that the best checkpoint is chosen by, or the first."""
    names = metrics(records)
    best = records[-1]["protocol"].get("best")
    return best if best in names else names[0]


def best_entry(records: Records, metric: str) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """(record, entry) of the best score over steps, weights and guidance scales."""
    sign = -1 if higher_is_better(metric) else 1
    scored = [
        (record, entry)
        for record in records
        for entry in record["results"]
        if entry["metric"] == metric
    ]
    return min(scored, key=lambda pair: sign * pair[1]["value"], default=None)


def best_column(records: Records) -> tuple[tuple[str, float], list[float]]:
    """Column of the first metric that is best at the last step, and its values over steps."""
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
