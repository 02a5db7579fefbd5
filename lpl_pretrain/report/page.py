"""Renders a run's record as one self-contained HTML page.

Every section is either drawn or says in one line what is missing.  The template engine escapes all
text; only our own SVG is inserted as it is.
"""

from __future__ import annotations

import math
import statistics
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from lpl_pretrain.config.metrics import score_title
from lpl_pretrain.config.rundir import RunDir
from lpl_pretrain.errors import ConfigError
from lpl_pretrain.report import score_tables
from lpl_pretrain.report.charts import Chart, draw
from lpl_pretrain.report.embed import brief, embed_image, find_image
from lpl_pretrain.report.formatting import duration, evenly_spaced, number, utc_time
from lpl_pretrain.report.provenance import provenance
from lpl_pretrain.report.record import RESUMING_EVENTS, RunRecord, read_run
from lpl_pretrain.report.training_charts import training_charts
from lpl_pretrain.report.validate import MAX_TEXT_LENGTH, is_step
from lpl_pretrain.runtime.atomic import atomic_write

TEMPLATE = "page.html"
STYLE_SHEET = "page.css"
MAX_GRIDS = 6
MAX_LPL_PANELS = 4
MAX_EVENTS = 200
MAX_VALUE_LENGTH = 1_000
MAX_CONFIG_CHARACTERS = 100_000
RECENT_LINES = 20
"""Log lines over which the page averages LPL's fraction of the loss."""
LPL_SECTION = 1
"""Index of the section of `training_charts` that the LPL panels belong to."""
HERE = Path(__file__).resolve().parent


def is_run(run_dir: RunDir) -> bool:
    """Whether the folder has a run's configuration or log."""
    return run_dir.config.is_file() or run_dir.metrics.is_file()


def write_report(run_dir: RunDir, output: Path | None = None) -> Path:
    """Write report.html, or `output`; returns its path.  Raises ConfigError where no run is."""
    if not is_run(run_dir):
        raise ConfigError(
            f"{run_dir.path}: not a run directory: found neither config.yaml nor metrics.jsonl; "
            "start a run with `lpl-pretrain train`"
        )
    return write_page(output or run_dir.report, render(read_run(run_dir)))


def write_page(path: Path, page: str) -> Path:
    """Write a page, atomically; returns `path`.  Raises ConfigError where it cannot be written."""
    try:
        with atomic_write(path) as temporary:
            temporary.write_text(page, encoding="utf-8", errors="replace")
    except OSError as error:
        raise ConfigError(
            f"{path}: cannot be written ({error}): name another file with --output"
        ) from None
    return path


def render(record: RunRecord) -> str:
    """HTML of the report."""
    name = brief(str(record.settings.get("name") or record.run_dir.path.name), MAX_TEXT_LENGTH)
    return template(TEMPLATE).render(
        name=name,
        status=status(record),
        tiles=tiles(record),
        sections=sections(record),
        protocols=[protocol(record, *item) for item in record.protocols().items()],
        record=record,
        config_text=brief(record.config_text, MAX_CONFIG_CHARACTERS),
        events=record.events[-MAX_EVENTS:],
        provenance=provenance(record),
        source=record.run_dir.path,
    )


def template(name: str) -> jinja2.Template:
    """Load a template, with what every page uses: style sheet, filters, time."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        utc_time=utc_time,
        score="{:.4g}".format,
        brief=lambda value: brief(str(value), MAX_VALUE_LENGTH),
    )
    environment.globals.update(
        style=Markup((HERE / STYLE_SHEET).read_text()), written_at=datetime.now(timezone.utc)
    )
    return environment.get_template(name)


def status(record: RunRecord) -> tuple[str, str]:
    """(class for the style sheet, text) of the run's state."""
    last = last_step(record)
    wanted = wanted_steps(record)
    if not last:
        return "waiting", "no steps logged yet"
    if wanted and last >= wanted:
        return "complete", "complete"
    last_event = record.events[-1] if record.events else {}
    if last_event.get("event") == "stopped":
        return "stopped", f"stopped at step {last_event['step']:,}; the same command resumes"
    return "open", f"at step {last:,}, running or interrupted"


def wanted_steps(record: RunRecord) -> int | None:
    """Number of updates that the configuration asks for."""
    steps = record.settings.get("steps")
    return steps if is_step(steps) else None


def tiles(record: RunRecord) -> list[tuple[str, str, str]]:
    """(label, value, small print) of the figures at the top of the page."""
    last = last_step(record)
    wanted = wanted_steps(record)
    tiles = [("steps", f"{last:,}", f"of {wanted:,}" if wanted and wanted >= last else "")]
    if samples_seen := record.series("samples_seen").values:
        tiles.append(("samples seen", number(samples_seen[-1]), epochs(record, samples_seen[-1])))
    if throughput := record.series("samples_per_s").values:
        tiles.append(("samples / s", number(statistics.median(throughput)), "median"))
    if seconds := training_seconds(record):
        tiles.append(("training time", duration(seconds), resumes(record)))
    for name, records in record.protocols().items():
        (_, scale), values = score_tables.best_column(records)
        ends = values if len(values) == 1 else [values[0], values[-1]]
        title = score_title(records[-1]["results"][0]["metric"])
        tiles.append((title, " → ".join(map(number, ends)), f"{name}, guidance {scale:g}"))
    if spikes := distinct_spikes(record):
        rollbacks = sum(action == "rollback" for _, action, _ in spikes)
        tiles.append(("spikes", f"{len(spikes):,}", f"{rollbacks:,} rolled back"))
    if fractions := record.series("lpl/weighted_share").values:
        recent = statistics.mean(fractions[-RECENT_LINES:])
        tiles.append(("LPL, fraction of total loss", f"{100 * recent:.1f}%", "recent mean"))
    return tiles


def sections(record: RunRecord) -> list[dict[str, Any]]:
    """Sections on training: titles with charts, or with one line that says why there are none."""
    if not record.lines:
        missing = "Nothing logged yet: metrics.jsonl is missing or empty."
        return [{"title": "Training", "charts": [], "panels": [], "missing": missing}]
    drawn = [_section(record, *section) for section in training_charts(record)]
    drawn[LPL_SECTION]["panels"] = [panel for panel in lpl_panels(record) if panel["image"]]
    return drawn


def _section(record: RunRecord, title: str, missing: str, charts: list[Chart]) -> dict[str, Any]:
    drawn = [chart for chart in charts if any(chart.lines.values())]
    events = interruptions(record)
    last = last_step(record)
    return {
        "title": title,
        "missing": "" if drawn else missing,
        "charts": [
            {"title": chart.title, "note": chart.note, "svg": Markup(draw(chart, events, last))}
            for chart in drawn
        ],
        "panels": [],
    }


def lpl_panels(record: RunRecord) -> list[dict[str, Any]]:
    """Panels of what LPL compared, at checkpoints that are spread over the run."""
    folder = record.run_dir.path
    paths = list(record.run_dir.lpl_panels().items())
    return [
        {
            "step": step,
            "image": embed_image(
                folder, "lpl", str(path.relative_to(folder)), "lpl", record.problems
            ),
        }
        for step, path in evenly_spaced(paths, MAX_LPL_PANELS)
    ]


def protocol(record: RunRecord, name: str, records: list[dict[str, Any]]) -> dict[str, Any]:
    """One evaluation protocol: charts and tables of its metrics, and sample grids over steps.

    Real images are shown beside the newest grid.
    """
    newest = records[-1]
    columns = score_tables.columns(records)
    extractors = newest.get("extractors", {}).values()
    dimension = max((extractor["dimension"] for extractor in extractors), default=0)
    images = newest["results"][0]["images"]
    reference = newest.get("reference", {})
    grids = [
        {"step": each["step"], "image": samples(record, each)}
        for each in evenly_spaced(records, MAX_GRIDS)
    ]
    real = reference.get("grid") and f"evaluations/{reference['grid']}"
    return {
        "name": name,
        "images": images,
        "weights": ", ".join(dict.fromkeys(weights for weights, _ in columns)),
        "metrics": [_metric(record, records, metric) for metric in score_tables.metrics(records)],
        "headings": [score_tables.heading(column, columns) for column in columns],
        "sampler": newest["protocol"].get("sampler"),
        "shown_scale": max(scale for _, scale in columns),
        "biased": bool(extractors) and images <= dimension,
        "dimension": dimension,
        "reference": reference,
        "real": embed_image(
            record.run_dir.path, "evaluations", real, newest["file"], record.problems
        ),
        "grids": [grid for grid in grids if grid["image"]],
    }


def _metric(record: RunRecord, records: list[dict[str, Any]], metric: str) -> dict[str, Any]:
    """Chart and table of one metric."""
    chart = score_tables.chart(records, metric)
    end = max(last_step(record), records[-1]["step"])
    return {
        "name": metric,
        "title": chart.title,
        "svg": Markup(draw(chart, interruptions(record), end)),
        "note": chart.note,
        "rows": score_tables.table(records, metric),
    }


def samples(record: RunRecord, score: dict[str, Any]) -> str | None:
    """Sample grid of one evaluation as a data URI; None where it is absent or may not be shown.

    The record's problems then say why it may not.
    """
    return embed_image(
        record.run_dir.path,
        "samples",
        score.get("samples"),
        score.get("file", "evaluations"),
        record.problems,
    )


def samples_file(record: RunRecord, score: dict[str, Any]) -> Path | None:
    """File of the sample grid of one evaluation, without reading it."""
    source = score.get("file", "evaluations")
    return find_image(record.run_dir.path, "samples", score.get("samples"), source, record.problems)


def interruptions(record: RunRecord) -> list[int]:
    """Steps that the charts mark: stops, resumes and spikes; at most the last MAX_EVENTS."""
    marked = ("stopped", *RESUMING_EVENTS, "spike")
    steps = {event["step"] for event in record.events if event["event"] in marked}
    return sorted(steps)[-MAX_EVENTS:]


def distinct_spikes(record: RunRecord) -> set[tuple[int, str, int]]:
    """(step, action, skipped updates) of every spike, once.

    A run that is resumed from before a spike meets the same spike again.
    """
    spikes = [event for event in record.events if event["event"] == "spike"]
    return {(e["step"], str(e.get("action")), e.get("jump_updates", 0)) for e in spikes}


def last_step(record: RunRecord) -> int:
    """Newest logged step; 0 where nothing is logged."""
    return record.lines[-1]["step"] if record.lines else 0


def training_seconds(record: RunRecord) -> float:
    """Seconds spent on the steps that remain: samples between two log lines over their throughput.

    0 where a line lacks one of the two.
    """
    seconds = 0.0
    samples_before = 0
    for line in record.lines:
        samples_seen = line.get("samples_seen")
        throughput = line.get("samples_per_s")
        if samples_seen is None or not throughput or not math.isfinite(throughput):
            return 0.0
        seconds += (samples_seen - samples_before) / throughput
        samples_before = samples_seen
    return seconds


def resumes(record: RunRecord) -> str:
    """Number of resumes, in words."""
    if not record.resumes:
        return "without interruption"
    return "resumed once" if record.resumes == 1 else f"resumed {record.resumes} times"


def epochs(record: RunRecord, samples_seen: float) -> str:
    """Passes over the data, in words; "" where the size of the data is unknown."""
    data_samples = record.provenance.get("data_samples")
    if not is_step(data_samples) or not data_samples:
        return ""
    return f"{samples_seen / data_samples:,.1f} epochs"
