"""What a run directory says, read for people: missing or damaged parts are named, never fatal.

metrics.jsonl: after a resume the steps beyond it are trained again, so what was logged beyond it before is dropped; of equal
steps the last line counts.  A line cut by a kill is skipped and counted.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lpl_pretrain.config.rundir import RunDir
from lpl_pretrain.report.checked import LONGEST_TEXT, evaluation, is_number, is_step, parse_json, parse_yaml
from lpl_pretrain.report.embed import MOST_CONFIG_BYTES, brief, read_text

MOST_STAGES, LONGEST_PROBLEM = 24, 300


@dataclass(frozen=True)
class Series:
    """One logged quantity; None and non-numbers are left out."""

    steps: list[int]
    values: list[float]
    bars: list[tuple[float, float] | None] | None = None
    """How far each may be below and above, where that is known."""

    def __bool__(self) -> bool:
        return bool(self.steps)


@dataclass(frozen=True)
class RunRecord:
    run_dir: RunDir
    settings: dict[str, Any]
    """config.yaml as plain data; empty when it is missing."""
    config_text: str
    provenance: dict[str, Any]
    lines: list[dict[str, Any]]
    """Metric lines, ascending by step, one a step."""
    events: list[dict[str, Any]]
    evaluations: list[dict[str, Any]]
    """Ascending by protocol name, then step; each with the name of its `file`."""
    problems: list[str]

    def series(self, name: str) -> Series:
        found = [(line["step"], line[name]) for line in self.lines if name in line]
        return Series([step for step, _ in found], [float(value) for _, value in found])

    def stages(self, quantity: str) -> dict[str, Series]:
        """Decoder stage -> its `lpl/stage/<stage>/<quantity>`, in the order in which they are logged."""
        names = dict.fromkeys(key for line in self.lines for key in line)
        found = [name for name in names if name.startswith("lpl/stage/") and name.endswith(f"/{quantity}")]
        return {name.split("/")[2]: self.series(name) for name in found[:MOST_STAGES]}

    def protocols(self) -> dict[str, list[dict[str, Any]]]:
        names = dict.fromkeys(record["protocol"]["name"] for record in self.evaluations)
        return {name: [record for record in self.evaluations if record["protocol"]["name"] == name] for name in names}


def read_run(run_dir: RunDir) -> RunRecord:
    problems: list[str] = []
    settings, config_text = read_config(run_dir, problems)
    provenance = _read_json(run_dir, run_dir.provenance, problems)
    lines, events = read_metrics(run_dir.metrics, problems)
    return RunRecord(run_dir, settings, config_text, provenance, lines, events, read_evaluations(run_dir, problems), problems)


def read_config(run_dir: RunDir, problems: list[str]) -> tuple[dict[str, Any], str]:
    """(plain data, text as it stands)."""
    text = read_text(run_dir.path, run_dir.config, problems, MOST_CONFIG_BYTES)
    try:
        settings = parse_yaml(text)
    except ValueError as problem:
        problems.append(f"{run_dir.config.name}: not valid YAML ({brief(str(problem), LONGEST_PROBLEM)})")
        return {}, text
    return settings if isinstance(settings, dict) else {}, text


def read_metrics(path: Path, problems: list[str]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(metric lines with what can be drawn, event lines)."""
    by_step: dict[int, dict[str, Any]] = {}
    events, skipped = [], 0
    try:
        written = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    except OSError as problem:
        problems.append(f"{path.name}: cannot be read ({problem})")
        written = ""
    for text in written.splitlines():
        line = _parse_line(text)
        if line is None:
            skipped += 1
        elif "event" in line:
            events.append(line)
            if line["event"] == "resumed":
                by_step = {step: metrics for step, metrics in by_step.items() if step <= line["step"]}
        else:
            by_step[line["step"]] = {name: value for name, value in line.items() if is_number(value) and len(name) <= LONGEST_TEXT}
    if skipped:
        problems.append(
            f"{path.name}: {skipped} unreadable {'line' if skipped == 1 else 'lines'} skipped "
            "(a kill in the middle of a write leaves one)"
        )
    return [by_step[step] for step in sorted(by_step)], events


def read_evaluations(run_dir: RunDir, problems: list[str]) -> list[dict[str, Any]]:
    records = []
    for path in sorted(run_dir.path.glob("evaluations/step_*/*.json")):
        raw, file = _read_json(run_dir, path, problems), str(path.relative_to(run_dir.path))
        if {"step", "results", "protocol"} <= raw.keys() and raw["results"]:
            try:
                records.append({**evaluation(raw), "file": file})
            except ValueError as problem:
                problems.append(f"{file}: damaged: {brief(str(problem), LONGEST_PROBLEM)}; not shown")
        elif raw:
            problems.append(f"{file}: holds no score; evaluate that step again")
    return sorted(records, key=lambda record: (record["protocol"]["name"], record["step"]))


def _parse_line(text: str) -> dict[str, Any] | None:
    try:
        line = parse_json(text)
    except ValueError:
        return None
    return line if isinstance(line, dict) and is_step(line.get("step")) else None


def _read_json(run_dir: RunDir, path: Path, problems: list[str]) -> dict[str, Any]:
    """{} where there is no such file, or where `problems` says what is wrong with it."""
    before = len(problems)
    text = read_text(run_dir.path, path, problems)
    if not path.is_file() or len(problems) > before:
        return {}
    try:
        value = parse_json(text)
    except ValueError as problem:
        problems.append(f"{path.relative_to(run_dir.path)}: not valid JSON ({brief(str(problem), LONGEST_PROBLEM)})")
        return {}
    if not isinstance(value, dict):
        problems.append(f"{path.relative_to(run_dir.path)}: not valid: holds a {type(value).__name__}, wanted a JSON object")
        return {}
    return value
