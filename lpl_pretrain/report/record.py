"""Reads a run directory for a report: missing or damaged parts are named, never fatal.

metrics.jsonl: after a resume, a rollback, or a restart from step 0, the steps beyond it are trained
again, so lines of those steps from before are dropped; of two lines of one step the last counts.  A
line cut by a kill is skipped and counted.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lpl_pretrain.config.renamed_keys import with_new_keys
from lpl_pretrain.config.rundir import RunDir
from lpl_pretrain.report.embed import MAX_CONFIG_BYTES, brief, read_text
from lpl_pretrain.report.validate import (
    MAX_TEXT_LENGTH,
    evaluation,
    is_number,
    is_step,
    parse_json,
    parse_yaml,
)

MAX_STAGES = 24
MAX_PROBLEM_LENGTH = 300

RESUMING_EVENTS = ("resumed", "restarted")
"""Events after which training goes on from a checkpoint, or from step 0 because there was none."""


@dataclass(frozen=True)
class Series:
    """Logged values of one quantity, by step."""

    steps: list[int]
    values: list[float]
    bars: list[tuple[float, float] | None] | None = None
    """Error bars, (below, above) each value, where known."""

    def __bool__(self) -> bool:
        return bool(self.steps)


@dataclass(frozen=True)
class RunRecord:
    run_dir: RunDir
    settings: dict[str, Any]
    """config.yaml as plain data; empty when it is missing."""
    config_text: str
    """config.yaml as it stands."""
    starts: list[dict[str, Any]]
    """Entries of provenance.json, one a start, the oldest first."""
    lines: list[dict[str, Any]]
    """Metric lines of metrics.jsonl, ascending by step, one a step."""
    events: list[dict[str, Any]]
    """Event lines of metrics.jsonl, in order."""
    evaluations: list[dict[str, Any]]
    """Evaluation records, each with its `file`, ascending by protocol name, then step."""
    problems: list[str]
    """Problems of the run's files, for the reader of the page."""
    resumes: int = 0
    """Number of resumes and restarts after which steps were trained."""

    @property
    def provenance(self) -> dict[str, Any]:
        """Entry of the newest start, with its uncommitted changes.

        These are written only in a start where they differ from the start before.
        """
        if not self.starts:
            return {}
        diffs = [start["git_diff"] for start in self.starts if "git_diff" in start]
        return {"git_diff": diffs[-1] if diffs else None, **self.starts[-1]}

    def series(self, name: str) -> Series:
        """Logged values of one metric."""
        lines = [line for line in self.lines if name in line]
        return Series([line["step"] for line in lines], [float(line[name]) for line in lines])

    def stages(self, quantity: str) -> dict[str, Series]:
        """Logged values of `lpl/stage/<stage>/<quantity>`, by decoder stage, in logged order."""
        names = dict.fromkeys(key for line in self.lines for key in line)
        stage_names = [
            name
            for name in names
            if name.startswith("lpl/stage/") and name.endswith(f"/{quantity}")
        ]
        return {name.split("/")[2]: self.series(name) for name in stage_names[:MAX_STAGES]}

    def protocols(self) -> dict[str, list[dict[str, Any]]]:
        """Evaluation records by protocol, ascending by step."""
        names = dict.fromkeys(record["protocol"]["name"] for record in self.evaluations)
        return {
            name: [record for record in self.evaluations if record["protocol"]["name"] == name]
            for name in names
        }


def read_run(run_dir: RunDir) -> RunRecord:
    """Read every file that a report shows."""
    problems: list[str] = []
    settings, config_text = read_config(run_dir, problems)
    starts = read_starts(run_dir, problems)
    lines, events, resumes = read_metrics(run_dir.metrics, problems)
    evaluations = read_evaluations(run_dir, problems)
    return RunRecord(
        run_dir, settings, config_text, starts, lines, events, evaluations, problems, resumes
    )


def read_starts(run_dir: RunDir, problems: list[str]) -> list[dict[str, Any]]:
    """Read provenance.json; an older version wrote one object, about the first start."""
    content = _read_json(run_dir, run_dir.provenance, problems, wanted=(dict, list))
    if isinstance(content, dict):
        return [content] if content else []
    starts = [start for start in content if isinstance(start, dict)]
    if len(starts) < len(content):
        problems.append(
            f"{run_dir.provenance.name}: not valid: {len(content) - len(starts)} of "
            f"{len(content)} starts are no JSON objects; not shown"
        )
    return starts


def read_config(run_dir: RunDir, problems: list[str]) -> tuple[dict[str, Any], str]:
    """config.yaml as (plain data, text)."""
    text = read_text(run_dir.path, run_dir.config, problems, MAX_CONFIG_BYTES)
    try:
        settings = parse_yaml(text)
    except ValueError as error:
        problems.append(
            f"{run_dir.config.name}: not valid YAML ({brief(str(error), MAX_PROBLEM_LENGTH)})"
        )
        return {}, text
    if not isinstance(settings, dict):
        return {}, text
    return with_new_keys("TrainConfig", settings), text


def read_metrics(
    path: Path, problems: list[str]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]], int]:
    """metrics.jsonl as (metric lines, event lines, number of resumes that trained steps).

    Metric lines keep the values that a chart can draw.
    """
    by_step: dict[int, dict[str, Any]] = {}
    events = []
    skipped = 0
    resumes = 0
    resumed_from: int | None = None
    text = ""
    try:
        if path.is_file():
            text = path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        problems.append(f"{path.name}: cannot be read ({error})")
    for line_text in text.splitlines():
        line = _parse_line(line_text)
        if line is None:
            skipped += 1
            continue
        if resumed_from is not None and line["step"] > resumed_from:
            resumes += 1
            resumed_from = None
        if "event" in line:
            events.append(line)
            if line["event"] in RESUMING_EVENTS:
                resumed_from = line["step"]
            if (kept := last_kept(line)) is not None:
                by_step = {step: metrics for step, metrics in by_step.items() if step <= kept}
        else:
            by_step[line["step"]] = {
                name: value
                for name, value in line.items()
                if is_number(value) and len(name) <= MAX_TEXT_LENGTH
            }
    if skipped:
        problems.append(
            f"{path.name}: {skipped} unreadable {'line' if skipped == 1 else 'lines'} skipped "
            "(a kill in the middle of a write leaves one)"
        )
    return [by_step[step] for step in sorted(by_step)], events, resumes


def last_kept(event: dict[str, Any]) -> int | None:
    """Step that training continues from after a resume or a rollback; None for other events."""
    step = event["step"] if event["event"] in RESUMING_EVENTS else event.get("to_step")
    return step if isinstance(step, int) else None


def read_evaluations(run_dir: RunDir, problems: list[str]) -> list[dict[str, Any]]:
    """Sound evaluation records, ascending by protocol name, then step."""
    records = []
    for path in sorted(run_dir.path.glob("evaluations/step_*/*.json")):
        raw = _read_json(run_dir, path, problems)
        file = str(path.relative_to(run_dir.path))
        if {"step", "results", "protocol"} <= raw.keys() and raw["results"]:
            try:
                records.append({**evaluation(raw), "file": file})
            except ValueError as error:
                problems.append(
                    f"{file}: damaged: {brief(str(error), MAX_PROBLEM_LENGTH)}; not shown"
                )
        elif raw:
            problems.append(f"{file}: has no score; evaluate that step again")
    return sorted(records, key=lambda record: (record["protocol"]["name"], record["step"]))


def _parse_line(text: str) -> dict[str, Any] | None:
    try:
        line = parse_json(text)
    except ValueError:
        return None
    return line if isinstance(line, dict) and is_step(line.get("step")) else None


def _read_json(
    run_dir: RunDir, path: Path, problems: list[str], wanted: tuple[type, ...] = (dict,)
) -> Any:
    """Content of a JSON file; {} where it is absent or damaged.

    The reason is then appended to `problems`.
    """
    problems_before = len(problems)
    text = read_text(run_dir.path, path, problems)
    if not path.is_file() or len(problems) > problems_before:
        return {}
    try:
        value = parse_json(text)
    except ValueError as error:
        problems.append(
            f"{path.relative_to(run_dir.path)}: not valid JSON "
            f"({brief(str(error), MAX_PROBLEM_LENGTH)})"
        )
        return {}
    if not isinstance(value, wanted):
        problems.append(
            f"{path.relative_to(run_dir.path)}: not valid: found a {type(value).__name__}, wanted "
            "a JSON object"
        )
        return {}
    return value
