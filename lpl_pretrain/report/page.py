"""What the report says and in which order: from a run's record to one HTML page that needs nothing
else.

Every section is either drawn or says in one line what is missing.  Text is escaped by the template
engine; only our own SVG is not.
"""

from __future__ import annotations

import json
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
from lpl_pretrain.report.embed import brief, find_picture, picture
from lpl_pretrain.report.record import TAKEN_UP, RunRecord, read_run
from lpl_pretrain.report.training_charts import training_charts
from lpl_pretrain.report.validate import LONGEST_TEXT, is_step
from lpl_pretrain.runtime.atomic import atomic_write

TEMPLATE, STYLE_SHEET = "page.html", "page.css"
MOST_GRIDS, MOST_LPL_PICTURES = 6, 4
MOST_DIFF_CHARACTERS = 40_000
IN_TABLE = ("step", "time_s", "config_changes")
"""Keys of a start that its details do not repeat."""
MOST_EVENTS, LONGEST_VALUE, MOST_CONFIG_CHARACTERS = 200, 1_000, 100_000
HERE = Path(__file__).resolve().parent


def is_run(run_dir: RunDir) -> bool:
    return run_dir.config.is_file() or run_dir.metrics.is_file()


def write_report(run_dir: RunDir, output: Path | None = None) -> Path:
    """Writes report.html, or `output`; returns its path.  Raises ConfigError where there is no run."""
    if not is_run(run_dir):
        raise ConfigError(
            f"{run_dir.path}: neither config.yaml nor metrics.jsonl in it: not a run directory; "
            "start one with `lpl-pretrain train`"
        )
    return write_page(output or run_dir.report, render(read_run(run_dir)))


def write_page(path: Path, page: str) -> Path:
    """Return `path`.  Raises ConfigError where it cannot be written."""
    try:
        with atomic_write(path) as temporary:
            temporary.write_text(page, encoding="utf-8", errors="replace")
    except OSError as problem:
        raise ConfigError(
            f"{path}: cannot be written ({problem}): name another file with --output"
        ) from None
    return path


def render(record: RunRecord) -> str:
    name = brief(str(record.settings.get("name") or record.run_dir.path.name), LONGEST_TEXT)
    return template(TEMPLATE).render(
        name=name,
        status=status(record),
        tiles=tiles(record),
        sections=sections(record),
        protocols=[protocol(record, *item) for item in record.protocols().items()],
        record=record,
        config_text=brief(record.config_text, MOST_CONFIG_CHARACTERS),
        events=record.events[-MOST_EVENTS:],
        provenance=provenance(record),
        source=record.run_dir.path,
    )


def template(name: str) -> jinja2.Template:
    """With what every page has: style sheet, filters, time."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        when=when, score="{:.4g}".format, brief=lambda value: brief(str(value), LONGEST_VALUE)
    )
    environment.globals.update(
        style=Markup((HERE / STYLE_SHEET).read_text()), written_at=datetime.now(timezone.utc)
    )
    return environment.get_template(name)


def status(record: RunRecord) -> tuple[str, str]:
    """(kind for the style sheet, words)."""
    last, wanted = last_step(record), wanted_steps(record)
    if not last:
        return "waiting", "no steps logged yet"
    if wanted and last >= wanted:
        return "complete", "complete"
    last_event = record.events[-1] if record.events else {}
    if last_event.get("event") == "stopped":
        return "stopped", f"stopped at step {last_event['step']:,}; the same command resumes"
    return "open", f"at step {last:,}, running or interrupted"


def wanted_steps(record: RunRecord) -> int | None:
    steps = record.settings.get("steps")
    return steps if is_step(steps) else None


def tiles(record: RunRecord) -> list[tuple[str, str, str]]:
    """(label, value, small print)."""
    last, wanted = last_step(record), wanted_steps(record)
    speed = record.series("samples_per_s").values
    found = [("steps", f"{last:,}", f"of {wanted:,}" if wanted and wanted >= last else "")]
    if seen := record.series("samples_seen").values:
        found.append(("samples seen", number(seen[-1]), epochs(record, seen[-1])))
    if speed:
        found.append(("samples / s", number(statistics.median(speed)), "median"))
    if duration := training_seconds(record):
        found.append(("training time", clock(duration), sessions(record)))
    for name, records in record.protocols().items():
        (_, scale), values = score_tables.best_column(records)
        ends = values if len(values) == 1 else [values[0], values[-1]]
        first = score_title(records[-1]["results"][0]["metric"])
        found.append((first, " → ".join(map(number, ends)), f"{name}, guidance {scale:g}"))
    if spikes := distinct_spikes(record):
        rollbacks = sum(action == "rollback" for _, action, _ in spikes)
        found.append(("spikes", f"{len(spikes):,}", f"{rollbacks:,} rolled back"))
    if share := record.series("lpl/weighted_share").values:
        found.append(("LPL share of loss", f"{100 * statistics.mean(share[-20:]):.1f}%", "lately"))
    return found


def sections(record: RunRecord) -> list[dict[str, Any]]:
    """Titles with their charts, or with the one line that says why there are none."""
    if not record.lines:
        return [
            {
                "title": "Training",
                "charts": [],
                "pictures": [],
                "missing": "Nothing logged yet: metrics.jsonl is missing or empty.",
            }
        ]
    events = interruptions(record)

    def section(title: str, missing: str, charts: list[Chart]) -> dict[str, Any]:
        drawn = [chart for chart in charts if any(chart.lines.values())]
        last = last_step(record)
        return {
            "title": title,
            "missing": "" if drawn else missing,
            "charts": [
                {"title": c.title, "note": c.note, "svg": Markup(draw(c, events, last))}
                for c in drawn
            ],
            "pictures": [],
        }

    found = [section(title, missing, charts) for title, missing, charts in training_charts(record)]
    found[1]["pictures"] = [shown for shown in lpl_pictures(record) if shown["picture"]]
    return found


def lpl_pictures(record: RunRecord) -> list[dict[str, Any]]:
    """What LPL compared at some checkpoints."""
    folder, found = record.run_dir.path, list(record.run_dir.lpl_pictures().items())
    return [
        {
            "step": step,
            "picture": picture(
                folder, "lpl", str(path.relative_to(folder)), "lpl", record.problems
            ),
        }
        for step, path in spread(found, MOST_LPL_PICTURES)
    ]


def protocol(record: RunRecord, name: str, records: list[dict[str, Any]]) -> dict[str, Any]:
    """One evaluation protocol: a chart and a table of each metric, sample grids over steps, real
    pictures beside the last one.
    """
    last, folder = records[-1], record.run_dir.path
    asked, events, end = (
        score_tables.columns(records),
        interruptions(record),
        max(last_step(record), last["step"]),
    )
    shown = []
    for metric in score_tables.metrics(records):
        chart = score_tables.chart(records, metric)
        rows = score_tables.table(records, metric)
        shown.append(
            {
                "name": metric,
                "title": chart.title,
                "svg": Markup(draw(chart, events, end)),
                "note": chart.note,
                "rows": rows,
            }
        )
    dimensions = [extractor["dimension"] for extractor in last.get("extractors", {}).values()]
    images, reference = last["results"][0]["images"], last.get("reference", {})
    grids = [
        {"step": each["step"], "picture": samples(record, each)}
        for each in spread(records, MOST_GRIDS)
    ]
    real = reference.get("grid") and f"evaluations/{reference['grid']}"
    return {
        "name": name,
        "images": images,
        "weights": ", ".join(dict.fromkeys(weights for weights, _ in asked)),
        "metrics": shown,
        "headings": [score_tables.heading(column, asked) for column in asked],
        "sampler": last["protocol"].get("sampler"),
        "shown_scale": max(scale for _, scale in asked),
        "biased": bool(dimensions) and images <= max(dimensions),
        "dimension": max(dimensions, default=0),
        "reference": reference,
        "real": picture(folder, "evaluations", real, last["file"], record.problems),
        "grids": [grid for grid in grids if grid["picture"]],
    }


def samples(record: RunRecord, score: dict[str, Any]) -> str | None:
    """The sample grid of one evaluation as a data URI; None where there is none, or where the
    page's problems say why.
    """
    return picture(
        record.run_dir.path,
        "samples",
        score.get("samples"),
        score.get("file", "evaluations"),
        record.problems,
    )


def samples_file(record: RunRecord, score: dict[str, Any]) -> Path | None:
    """The file of that grid, before it is read."""
    source = score.get("file", "evaluations")
    return find_picture(
        record.run_dir.path, "samples", score.get("samples"), source, record.problems
    )


def provenance(record: RunRecord) -> dict[str, Any]:
    """What provenance.json holds, sorted for reading; keys that this version does not know are
    shown as they are.

    All starts in a table, and the newest one in detail.
    """
    rest = {key: value for key, value in record.provenance.items() if key not in IN_TABLE}
    diff = str(rest.pop("git_diff", None) or "")
    argv, versions = rest.pop("argv", None), rest.pop("versions", None)
    return {
        "command": " ".join(map(str, argv)) if isinstance(argv, list) else argv,
        "versions": versions if isinstance(versions, dict) else {},
        "diff": diff[:MOST_DIFF_CHARACTERS],
        "diff_cut": len(diff) > MOST_DIFF_CHARACTERS,
        "starts": [start_row(start) for start in record.starts],
        "facts": {
            key: value if isinstance(value, str) else json.dumps(value)
            for key, value in rest.items()
        },
    }


def start_row(start: dict[str, Any]) -> dict[str, Any]:
    """A line of the table; what an older version did not write is empty."""
    hosts, changes, time_s = start.get("hosts"), start.get("config_changes"), start.get("time_s")
    names = hosts if isinstance(hosts, list) else [start.get("host")]
    changed = changes.items() if isinstance(changes, dict) else ()
    return {
        "step": start.get("step"),
        "time_s": time_s if isinstance(time_s, (int, float)) else None,
        "strategy": start.get("strategy"),
        "world_size": start.get("world_size"),
        "hosts": ", ".join(str(name) for name in names if name),
        "code": str(start.get("code") or start.get("git_commit") or "")[:12],
        "changes": "; ".join(f"{key}: {change_words(values)}" for key, values in changed),
    }


def change_words(values: Any) -> str:
    return " → ".join(map(json.dumps, values)) if isinstance(values, list) else json.dumps(values)


def interruptions(record: RunRecord) -> list[int]:
    """Steps that the charts mark: the last ones, where there are very many."""
    marked = ("stopped", *TAKEN_UP, "spike")
    steps = {event["step"] for event in record.events if event["event"] in marked}
    return sorted(steps)[-MOST_EVENTS:]


def distinct_spikes(record: RunRecord) -> set[tuple[int, str, int]]:
    """(step, action, updates jumped over): a run that is resumed before a spike meets it again."""
    spikes = [event for event in record.events if event["event"] == "spike"]
    return {(e["step"], str(e.get("action")), e.get("jump_updates", 0)) for e in spikes}


def last_step(record: RunRecord) -> int:
    return record.lines[-1]["step"] if record.lines else 0


def training_seconds(record: RunRecord) -> float:
    """Time spent on the steps that count: samples between log lines over the rate of that stretch."""
    seconds, before = 0.0, 0
    for line in record.lines:
        seen, rate = line.get("samples_seen"), line.get("samples_per_s")
        if seen is None or not rate or not math.isfinite(rate):
            return 0.0
        seconds, before = seconds + (seen - before) / rate, seen
    return seconds


def sessions(record: RunRecord) -> str:
    if not record.resumes:
        return "without interruption"
    return "resumed once" if record.resumes == 1 else f"resumed {record.resumes} times"


def epochs(record: RunRecord, seen: float) -> str:
    samples = record.provenance.get("data_samples")
    return f"{seen / samples:,.1f} times the data" if is_step(samples) and samples else ""


def spread(records: list[Any], count: int) -> list[Any]:
    """At most `count`, evenly, the first and the last among them."""
    if len(records) <= count:
        return records
    return [records[round(i * (len(records) - 1) / (count - 1))] for i in range(count)]


def number(value: float | None) -> str:
    """Three or four digits: 96,000; 1.73M; 212; 0.0412."""
    if value is None or not math.isfinite(value):
        return "–"
    for limit, unit in ((1e9, "B"), (1e6, "M")):
        if abs(value) >= limit:
            return f"{value / limit:.3g}{unit}"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def clock(seconds: float) -> str:
    hours, minutes = divmod(round(seconds / 60), 60)
    return (
        f"{hours} h {minutes:02d} min"
        if hours
        else f"{minutes} min"
        if seconds >= 60
        else f"{seconds:.0f} s"
    )


def when(timestamp: Any) -> str:
    """A time in UTC; "" for what is none."""
    try:
        moment = (
            timestamp
            if isinstance(timestamp, datetime)
            else datetime.fromtimestamp(timestamp, timezone.utc)
        )
    except (TypeError, ValueError, OverflowError, OSError):
        return ""
    return moment.strftime("%Y-%m-%d %H:%M:%S UTC")
