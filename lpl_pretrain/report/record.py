"""What a run directory says, read for people: missing or damaged parts are named, never fatal.

metrics.jsonl: after a resume, a rollback, or a restart from step 0, the steps beyond it are trained
again, so what was logged beyond it before is dropped; of equal steps the last line counts.  A line
cut by a kill is skipped and counted.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lpl_pretrain.config.renamed_keys import with_new_keys
from lpl_pretrain.config.rundir import RunDir
from lpl_pretrain.report.embed import MOST_CONFIG_BYTES, brief, read_text
from lpl_pretrain.report.validate import (
    LONGEST_TEXT,
    evaluation,
    is_number,
    is_step,
    parse_json,
    parse_yaml,
)

MOST_STAGES, LONGEST_PROBLEM = 24, 300

TAKEN_UP = ("resumed", "restarted")
"""Events after which training goes on from a checkpoint, or from step 0 because there was none."""


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
    starts: list[dict[str, Any]]
    """What provenance.json says of each start, the oldest first."""
    lines: list[dict[str, Any]]
    """Metric lines, ascending by step, one a step."""
    events: list[dict[str, Any]]
    evaluations: list[dict[str, Any]]
    """Ascending by protocol name, then step; each with the name of its `file`."""
    problems: list[str]
    resumes: int = 0
    """Starts that went on from a checkpoint, or anew, and made steps."""

    @property
    def provenance(self) -> dict[str, Any]:
        """Of the newest start; the uncommitted changes stand in the newest start in which they were
        not as in the one before.
        """
        if not self.starts:
            return {}
        diffs = [start["git_diff"] for start in self.starts if "git_diff" in start]
        return {"git_diff": diffs[-1] if diffs else None, **self.starts[-1]}

    def series(self, name: str) -> Series:
        found = [(line["step"], line[name]) for line in self.lines if name in line]
        return Series([step for step, _ in found], [float(value) for _, value in found])

    def stages(self, quantity: str) -> dict[str, Series]:
        """Decoder stage -> its `lpl/stage/<stage>/<quantity>`, in the order in which they are
        logged.
        """
        names = dict.fromkeys(key for line in self.lines for key in line)
        found = [
            name
            for name in names
            if name.startswith("lpl/stage/") and name.endswith(f"/{quantity}")
        ]
        return {name.split("/")[2]: self.series(name) for name in found[:MOST_STAGES]}

    def protocols(self) -> dict[str, list[dict[str, Any]]]:
        names = dict.fromkeys(record["protocol"]["name"] for record in self.evaluations)
        return {
            name: [record for record in self.evaluations if record["protocol"]["name"] == name]
            for name in names
        }


def read_run(run_dir: RunDir) -> RunRecord:
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
    found = _read_json(run_dir, run_dir.provenance, problems, wanted=(dict, list))
    if isinstance(found, dict):
        return [found] if found else []
    if odd := sum(not isinstance(start, dict) for start in found):
        problems.append(
            f"{run_dir.provenance.name}: not valid: {odd} of {len(found)} starts are no JSON "
            "objects; not shown"
        )
    return [start for start in found if isinstance(start, dict)]


def read_config(run_dir: RunDir, problems: list[str]) -> tuple[dict[str, Any], str]:
    """(plain data, text as it stands)."""
    text = read_text(run_dir.path, run_dir.config, problems, MOST_CONFIG_BYTES)
    try:
        settings = parse_yaml(text)
    except ValueError as problem:
        problems.append(
            f"{run_dir.config.name}: not valid YAML ({brief(str(problem), LONGEST_PROBLEM)})"
        )
        return {}, text
    if not isinstance(settings, dict):
        return {}, text
    return with_new_keys("TrainConfig", settings), text


def read_metrics(
    path: Path, problems: list[str]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]], int]:
    """(metric lines with what can be drawn, event lines, how often training was taken up again and
    made steps).
    """
    by_step: dict[int, dict[str, Any]] = {}
    events, skipped, resumes = [], 0, 0
    taken_up: int | None = None
    try:
        written = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    except OSError as problem:
        problems.append(f"{path.name}: cannot be read ({problem})")
        written = ""
    for text in written.splitlines():
        line = _parse_line(text)
        if line is None:
            skipped += 1
            continue
        if taken_up is not None and line["step"] > taken_up:
            resumes, taken_up = resumes + 1, None
        if "event" in line:
            events.append(line)
            if line["event"] in TAKEN_UP:
                taken_up = line["step"]
            if (kept := last_kept(line)) is not None:
                by_step = {step: metrics for step, metrics in by_step.items() if step <= kept}
        else:
            by_step[line["step"]] = {
                name: value
                for name, value in line.items()
                if is_number(value) and len(name) <= LONGEST_TEXT
            }
    if skipped:
        problems.append(
            f"{path.name}: {skipped} unreadable {'line' if skipped == 1 else 'lines'} skipped "
            "(a kill in the middle of a write leaves one)"
        )
    return [by_step[step] for step in sorted(by_step)], events, resumes


def last_kept(event: dict[str, Any]) -> int | None:
    """The step from which a resume or a rollback goes on; None for other events."""
    step = event["step"] if event["event"] in TAKEN_UP else event.get("to_step")
    return step if isinstance(step, int) else None


def read_evaluations(run_dir: RunDir, problems: list[str]) -> list[dict[str, Any]]:
    records = []
    for path in sorted(run_dir.path.glob("evaluations/step_*/*.json")):
        raw, file = _read_json(run_dir, path, problems), str(path.relative_to(run_dir.path))
        if {"step", "results", "protocol"} <= raw.keys() and raw["results"]:
            try:
                records.append({**evaluation(raw), "file": file})
            except ValueError as problem:
                problems.append(
                    f"{file}: damaged: {brief(str(problem), LONGEST_PROBLEM)}; not shown"
                )
        elif raw:
            problems.append(f"{file}: holds no score; evaluate that step again")
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
    """{} where there is no such file, or where `problems` says what is wrong with it."""
    before = len(problems)
    text = read_text(run_dir.path, path, problems)
    if not path.is_file() or len(problems) > before:
        return {}
    try:
        value = parse_json(text)
    except ValueError as problem:
        problems.append(
            f"{path.relative_to(run_dir.path)}: not valid JSON "
            f"({brief(str(problem), LONGEST_PROBLEM)})"
        )
        return {}
    if not isinstance(value, wanted):
        problems.append(
            f"{path.relative_to(run_dir.path)}: not valid: holds a {type(value).__name__}, wanted "
            "a JSON object"
        )
        return {}
    return value
