"""One page on which several runs stand side by side: what differs in their configurations, and what
came of it.

A run keeps its colour and dashes throughout; what it lacks is left empty.
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
from lpl_pretrain.report.page import (
    is_run,
    last_step,
    number,
    samples,
    samples_file,
    status,
    template,
    wanted_steps,
    write_page,
)
from lpl_pretrain.report.record import RunRecord, Series, read_run

TEMPLATE = "compare.html"
NAMES_OF_RUNS = ("name", "run_dir")
MOST_COLUMNS, LONGEST_LABEL = 6, 60
NUMBER = re.compile(r"(\d+(?:\.\d+)?(?:e[+-]?\d+)?)")
CURVES = {
    "loss/diffusion": Chart(
        "Diffusion loss",
        {},
        log=True,
        note="mean squared error, weighted as each run is configured",
    ),
    "loss/total": Chart(
        "Total loss",
        {},
        log=True,
        note="what the optimizer minimises; its scale moves with LPL's weight",
    ),
    "loss/lpl": Chart("LPL", {}, log=True, note="unweighted, mean over the batch"),
    "lpl/weighted_share": Chart("LPL's share of the total loss", {}, percent=True, from_zero=True),
    "grad_norm": Chart("Gradient norm", {}, log=True, note="before clipping"),
    "samples_per_s": Chart("Throughput", {}, from_zero=True, note="samples per second, all ranks"),
}


@dataclass(frozen=True)
class Column:
    """A key in which configurations differ, and its value in each run: None where a run has no such
    key.
    """

    key: str
    values: list[str | None]


def find_runs(folders: Sequence[Path]) -> list[RunDir]:
    """Each once; a folder that is no run stands for the runs in it.  Raises ConfigError where there
    are none.
    """
    found: dict[Path, RunDir] = {}
    for folder in (folder.resolve() for folder in folders):
        inner = (
            sorted(folder.iterdir(), key=natural)
            if folder.is_dir() and not is_run(RunDir(folder))
            else [folder]
        )
        runs = [RunDir(path) for path in inner if is_run(RunDir(path))]
        if not runs:
            raise ConfigError(
                f"{folder}: no run and no folder of runs: none has a config.yaml or metrics.jsonl"
            )
        found |= {run.path: run for run in runs}
    return list(found.values())


def natural(path: Path) -> list[Any]:
    """Sorts names by the numbers in them."""
    return [float(word) if i % 2 else word for i, word in enumerate(NUMBER.split(path.name))]


def write_comparison(runs: Sequence[RunDir], output: Path | None = None) -> Path:
    """Writes comparison.html into the folder that holds all runs, or `output`; returns its path."""
    parent = common_folder(runs)
    path = output or parent / "comparison.html"
    return write_page(path, render([read_run(run) for run in runs]))


def common_folder(runs: Sequence[RunDir]) -> Path:
    return Path(os.path.commonpath([run.path.parent for run in runs]))


def render(records: Sequence[RunRecord]) -> str:
    parent = common_folder([record.run_dir for record in records])
    names = [clean(str(record.run_dir.path.relative_to(parent))) for record in records]
    columns = differing([record.settings for record in records])
    labels = labels_of(columns, names)
    scored = list(dict.fromkeys(name for record in records for name in record.protocols()))
    return template(TEMPLATE).render(
        name=parent.name,
        runs=[
            {"name": name, "label": label, "swatch": Markup(swatch(i)), **facts(record)}
            for i, (name, label, record) in enumerate(zip(names, labels, records, strict=True))
        ],
        columns=columns[:MOST_COLUMNS],
        more=columns[MOST_COLUMNS:],
        scores=[
            summary(name, [record.protocols().get(name, []) for record in records])
            for name in scored
        ],
        protocols=[protocol(name, records, labels) for name in scored],
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
    """A key is compared among the runs that have it; a section that some have switched off counts
    as a key: off or on.
    """
    flat = [flatten(each) if each else {} for each in settings]
    found = []
    for key in sorted({key for each in flat for key in each}):
        sections = [any(other.startswith(f"{key}.") for other in each) for each in flat]
        values = [
            ("on" if section else None)
            if key not in each
            else "off"
            if any(sections)
            else words(each[key])
            for each, section in zip(flat, sections, strict=True)
        ]
        if key not in NAMES_OF_RUNS and len({value for value in values if value is not None}) > 1:
            found.append(Column(key, values))
    return found


def words(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    return value if isinstance(value, str) else json.dumps(value)


def labels_of(columns: Sequence[Column], names: Sequence[str]) -> list[str]:
    """By what differs, if that is short and tells all runs apart; their names otherwise."""
    last = [column.key.rpartition(".")[2] for column in columns]
    short = [
        word if last.count(word) == 1 else column.key
        for word, column in zip(last, columns, strict=True)
    ]
    said = []
    for i in range(len(names)):
        values = zip(short, (column.values[i] for column in columns), strict=True)
        said.append(
            ", ".join(f"{word} {value}" for word, value in values if value not in (None, "on"))
        )
    good = all(said) and len(set(said)) == len(said) and max(map(len, said)) <= LONGEST_LABEL
    return said if good else list(names)


def facts(record: RunRecord) -> dict[str, Any]:
    """What a row of the table says beside the configuration and the scores."""
    wanted, speed = wanted_steps(record), record.series("samples_per_s").values
    return {
        "step": f"{last_step(record):,}",
        "of": f"{wanted:,}" if wanted and status(record)[0] != "complete" else "",
        "losses": [lately(record.series(key)) for key in ("loss/diffusion", "loss/lpl")],
        "rate": number(statistics.median(speed)) if speed else "–",
    }


def lately(series: Series) -> str:
    return number(smoothed(series.values)[-1] if series else None)


def lines(records: Sequence[RunRecord], labels: Sequence[str], key: str) -> dict[str, Series]:
    return {label: record.series(key) for label, record in zip(labels, records, strict=True)}


def drawn(charts: Sequence[Chart], records: Sequence[RunRecord]) -> list[dict[str, Any]]:
    """Those in which any run has a line."""
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
    """The two columns of the table that a protocol has: the newest score of each run, and its best."""
    metric = score_tables.main_metric([record for records in runs for record in records])
    cells, best = [], []
    for records in runs:
        asked = [record for record in records if metric in score_tables.metrics([record])]
        newest, found = (
            score_tables.best_entry(some, metric) if some else None for some in (asked[-1:], asked)
        )
        cells.append([cell(newest), cell(found)])
        best.append(found[1]["value"] if found else None)
    known = [value for value in best if value is not None]
    first = (max if score_tables.higher_is_better(metric) else min)(known)
    return {
        "protocol": name,
        "metric": metric,
        "cells": cells,
        "first": [value == first for value in best],
    }


def cell(found: tuple[dict[str, Any], dict[str, Any]] | None) -> dict[str, Any] | None:
    if found is None:
        return None
    record, entry = found
    return {
        "value": entry["value"],
        "std": entry.get("std"),
        "scale": entry["guidance_scale"],
        "step": record["step"],
    }


def protocol(name: str, records: Sequence[RunRecord], labels: Sequence[str]) -> dict[str, Any]:
    """Scores over steps, a chart for each metric and guidance scale, and the sample grids of all
    runs.
    """
    runs = [record.protocols().get(name, []) for record in records]
    together = [score for scored in runs for score in scored]
    asked = score_tables.columns(together)
    charts = []
    for metric in score_tables.metrics(together):
        chart = score_tables.chart(together, metric)
        for column in asked:
            found = {
                label: score_tables.series(scored, metric, column)
                for label, scored in zip(labels, runs, strict=True)
            }
            title = (
                f"{chart.title}, {score_tables.heading(column, asked)}"
                if len(asked) > 1
                else chart.title
            )
            charts.append(
                replace(
                    chart,
                    title=title,
                    lines=found,
                    note=chart.note.replace(" by guidance scale w", ""),
                )
            )
    settings = {json.dumps(score["protocol"], sort_keys=True) for score in together}
    grids, step = newest_grids(records, runs)
    return {
        "name": name,
        "charts": drawn(charts, records),
        "grids": grids,
        "step": step,
        "unlike": len(settings) > 1,
    }


def newest_grids(
    records: Sequence[RunRecord], runs: Sequence[score_tables.Records]
) -> tuple[list[dict[str, Any] | None], int | None]:
    """(grid of each run, the newest step at which all that have grids have one); without such a
    step each shows its own newest.
    """
    found = [
        {score["step"]: score for score in scored if samples_file(record, score) is not None}
        for record, scored in zip(records, runs, strict=True)
    ]
    steps = [set(each) for each in found if each]
    step = max(set.intersection(*steps), default=None) if steps else None
    shown: list[dict[str, Any] | None] = []
    for record, each in zip(records, found, strict=True):
        own = step if step is not None else max(each, default=None)
        grid = samples(record, each[own]) if own in each else None
        shown.append({"step": own, "picture": grid} if grid else None)
    return shown, step
