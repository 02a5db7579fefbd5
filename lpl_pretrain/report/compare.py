"""Renders several runs side by side: differences of their configurations, scores, samples, losses.

A run keeps its colour and dashes throughout; a value that it lacks is left empty.
"""

from __future__ import annotations

import json
import os
import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from markupsafe import Markup

from lpl_pretrain.config.load import flatten
from lpl_pretrain.config.rundir import RunDir
from lpl_pretrain.errors import ConfigError
from lpl_pretrain.report import score_tables
from lpl_pretrain.report.charts import Chart, draw, smoothed, swatch
from lpl_pretrain.report.embed import clean
from lpl_pretrain.report.formatting import number
from lpl_pretrain.report.page import (
    is_run,
    last_step,
    samples,
    samples_file,
    status,
    template,
    wanted_steps,
    write_page,
)
from lpl_pretrain.report.record import RunRecord, Series, read_run
from lpl_pretrain.report.training_charts import MINIMISED

TEMPLATE = "compare.html"
NAMES_OF_RUNS = ("name", "run_dir")
"""Configuration keys that are not compared: they differ in any two runs."""
MAX_COLUMNS = 6
"""Differing keys in the table of runs; more go into a table of their own."""
MAX_LABEL_LENGTH = 60
NUMBER = re.compile(r"(\d+(?:\.\d+)?(?:e[+-]?\d+)?)")
CURVES = {
    "loss/diffusion": Chart(
        "Diffusion loss",
        {},
        unit="loss",
        log=True,
        note="mean squared error, weighted as each run is configured",
    ),
    "loss/total": Chart("Total loss", {}, unit="loss", log=True, note=MINIMISED),
    "loss/lpl": Chart("LPL", {}, unit="loss", log=True, note="unweighted, mean over the batch"),
    "lpl/weighted_share": Chart(
        "Weighted LPL / total loss", {}, unit="fraction", percent=True, from_zero=True
    ),
    "grad_norm": Chart("Gradient norm", {}, unit="L2 norm", log=True, note="before clipping"),
    "samples_per_s": Chart(
        "Throughput", {}, unit="samples / s", from_zero=True, note="all ranks together"
    ),
}
"""Metric of metrics.jsonl -> its chart, one line a run."""


@dataclass(frozen=True)
class Column:
    """A configuration key that differs, and its value in each run; None where a run lacks it."""

    key: str
    values: list[str | None]


def find_runs(folders: Sequence[Path]) -> list[RunDir]:
    """Runs of these folders, each once; a folder that is no run stands for the runs in it.

    Raises ConfigError where a folder has none.
    """
    runs_by_path: dict[Path, RunDir] = {}
    for folder in (folder.resolve() for folder in folders):
        inner = (
            sorted(folder.iterdir(), key=natural)
            if folder.is_dir() and not is_run(RunDir(folder))
            else [folder]
        )
        runs = [RunDir(path) for path in inner if is_run(RunDir(path))]
        if not runs:
            raise ConfigError(
                f"{folder}: no run and no folder of runs: found neither config.yaml nor "
                "metrics.jsonl; name a run directory, or the folder that contains several"
            )
        runs_by_path |= {run.path: run for run in runs}
    return list(runs_by_path.values())


def natural(path: Path) -> list[Any]:
    """Key for sorting by the numbers in names: lr=2 before lr=10."""
    return [float(part) if i % 2 else part for i, part in enumerate(NUMBER.split(path.name))]


def write_comparison(runs: Sequence[RunDir], output: Path | None = None) -> Path:
    """Write comparison.html into the folder of all runs, or `output`; returns its path."""
    parent = common_folder(runs)
    path = output or parent / "comparison.html"
    return write_page(path, render([read_run(run) for run in runs]))


def common_folder(runs: Sequence[RunDir]) -> Path:
    """Deepest folder that contains all runs."""
    return Path(os.path.commonpath([run.path.parent for run in runs]))


def render(records: Sequence[RunRecord]) -> str:
    """HTML of the comparison."""
    parent = common_folder([record.run_dir for record in records])
    names = [clean(str(record.run_dir.path.relative_to(parent))) for record in records]
    columns = differing([record.settings for record in records])
    labels = labels_of(columns, names)
    protocol_names = list(dict.fromkeys(name for record in records for name in record.protocols()))
    return template(TEMPLATE).render(
        name=parent.name,
        runs=[
            {"name": name, "label": label, "swatch": Markup(swatch(i)), **training_cells(record)}
            for i, (name, label, record) in enumerate(zip(names, labels, records, strict=True))
        ],
        columns=columns[:MAX_COLUMNS],
        more=columns[MAX_COLUMNS:],
        scores=[
            summary(name, [record.protocols().get(name, []) for record in records])
            for name in protocol_names
        ],
        protocols=[protocol(name, records, labels) for name in protocol_names],
        charts=drawn(
            [replace(chart, lines=lines(records, labels, key)) for key, chart in CURVES.items()],
            records,
        ),
        problems=[
            f"{name}: {text}"
            for name, record in zip(names, records, strict=True)
            for text in record.problems
        ],
        source=parent,
    )


def differing(settings: Sequence[dict[str, Any]]) -> list[Column]:
    """Keys whose values differ among the runs that have them.

    A section that some runs have switched off counts as a key, with values on and off.
    """
    flat = [flatten(each) if each else {} for each in settings]
    columns = []
    for key in sorted({key for each in flat for key in each}):
        sections = [any(other.startswith(f"{key}.") for other in each) for each in flat]
        values = []
        for each, is_section in zip(flat, sections, strict=True):
            if key not in each:
                values.append("on" if is_section else None)
            else:
                values.append("off" if any(sections) else as_text(each[key]))
        if key not in NAMES_OF_RUNS and len({value for value in values if value is not None}) > 1:
            columns.append(Column(key, values))
    return columns


def as_text(value: Any) -> str:
    """A configuration value as a table shows it."""
    if isinstance(value, float):
        return f"{value:g}"
    return value if isinstance(value, str) else json.dumps(value)


def labels_of(columns: Sequence[Column], names: Sequence[str]) -> list[str]:
    """Label each run by its differing values, if that is short and unique; else by its name."""
    last_parts = [column.key.rpartition(".")[2] for column in columns]
    short_keys = [
        part if last_parts.count(part) == 1 else column.key
        for part, column in zip(last_parts, columns, strict=True)
    ]
    labels = []
    for i in range(len(names)):
        values = zip(short_keys, (column.values[i] for column in columns), strict=True)
        labels.append(
            ", ".join(f"{key} {value}" for key, value in values if value not in (None, "on"))
        )
    usable = (
        all(labels)
        and len(set(labels)) == len(labels)
        and max(map(len, labels)) <= MAX_LABEL_LENGTH
    )
    return labels if usable else list(names)


def training_cells(record: RunRecord) -> dict[str, Any]:
    """Cells of a run's row beside the configuration and the scores."""
    wanted = wanted_steps(record)
    throughput = record.series("samples_per_s").values
    return {
        "step": f"{last_step(record):,}",
        "of": f"{wanted:,}" if wanted and status(record)[0] != "complete" else "",
        "losses": [recent_mean(record.series(key)) for key in ("loss/diffusion", "loss/lpl")],
        "throughput": number(statistics.median(throughput)) if throughput else "–",
    }


def recent_mean(series: Series) -> str:
    """Running mean at the newest step."""
    return number(smoothed(series.values)[-1] if series else None)


def lines(records: Sequence[RunRecord], labels: Sequence[str], key: str) -> dict[str, Series]:
    """One line a run, of a metric in metrics.jsonl."""
    return {label: record.series(key) for label, record in zip(labels, records, strict=True)}


def drawn(charts: Sequence[Chart], records: Sequence[RunRecord]) -> list[dict[str, Any]]:
    """Draw the charts in which any run has a line."""
    last = max(
        max(last_step(record), *(score["step"] for score in record.evaluations), 0)
        for record in records
    )
    shown = [
        replace(chart, raw=False, legend=False) for chart in charts if any(chart.lines.values())
    ]
    return [
        {"title": chart.title, "note": chart.note, "svg": Markup(draw(chart, [], last))}
        for chart in shown
    ]


def summary(name: str, runs: Sequence[score_tables.Records]) -> dict[str, Any]:
    """Columns of the table for one protocol: newest score of each run, and best score of each."""
    metric = score_tables.main_metric([record for records in runs for record in records])
    cells = []
    best_values = []
    for records in runs:
        scored = [record for record in records if metric in score_tables.metrics([record])]
        newest = score_tables.best_entry(scored[-1:], metric)
        best = score_tables.best_entry(scored, metric)
        cells.append([cell(newest), cell(best)])
        best_values.append(best[1]["value"] if best else None)
    known = [value for value in best_values if value is not None]
    best_of_all = (max if score_tables.higher_is_better(metric) else min)(known)
    return {
        "protocol": name,
        "metric": metric,
        "cells": cells,
        "is_best": [value == best_of_all for value in best_values],
    }


def cell(scored: tuple[dict[str, Any], dict[str, Any]] | None) -> dict[str, Any] | None:
    """Values of one score for the template."""
    if scored is None:
        return None
    record, entry = scored
    return {
        "value": entry["value"],
        "std": entry.get("std"),
        "scale": entry["guidance_scale"],
        "step": record["step"],
    }


def protocol(name: str, records: Sequence[RunRecord], labels: Sequence[str]) -> dict[str, Any]:
    """One protocol: charts of its metrics, and the sample grids of all runs."""
    runs = [record.protocols().get(name, []) for record in records]
    all_records = [score for scored in runs for score in scored]
    settings = {json.dumps(score["protocol"], sort_keys=True) for score in all_records}
    grids, step = newest_grids(records, runs)
    return {
        "name": name,
        "charts": drawn(score_charts(runs, labels), records),
        "grids": grids,
        "step": step,
        "differ": len(settings) > 1,
    }


def score_charts(runs: Sequence[score_tables.Records], labels: Sequence[str]) -> list[Chart]:
    """One chart for each metric, weights and guidance scale, with one line a run."""
    all_records = [score for scored in runs for score in scored]
    columns = score_tables.columns(all_records)
    charts = []
    for metric in score_tables.metrics(all_records):
        chart = score_tables.chart(all_records, metric)
        for column in columns:
            title = chart.title
            if len(columns) > 1:
                title = f"{title}, {score_tables.heading(column, columns)}"
            charts.append(
                replace(
                    chart,
                    title=title,
                    lines={
                        label: score_tables.series(scored, metric, column)
                        for label, scored in zip(labels, runs, strict=True)
                    },
                    note=chart.note.replace(" by guidance scale w", ""),
                )
            )
    return charts


def newest_grids(
    records: Sequence[RunRecord], runs: Sequence[score_tables.Records]
) -> tuple[list[dict[str, Any] | None], int | None]:
    """(grid of each run, newest step at which all runs with grids have one).

    Where there is no such step, it is None, and each run shows its own newest grid.
    """
    by_step = [
        {score["step"]: score for score in scored if samples_file(record, score) is not None}
        for record, scored in zip(records, runs, strict=True)
    ]
    steps = [set(each) for each in by_step if each]
    step = max(set.intersection(*steps), default=None) if steps else None
    shown: list[dict[str, Any] | None] = []
    for record, each in zip(records, by_step, strict=True):
        own = step if step is not None else max(each, default=None)
        grid = samples(record, each[own]) if own in each else None
        shown.append({"step": own, "image": grid} if grid else None)
    return shown, step
