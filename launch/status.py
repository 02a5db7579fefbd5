"""What a job is doing.  The run's files come first: a scheduler's word may be late, wrong, or absent."""

from __future__ import annotations

import json
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import suppress
from itertools import takewhile
from pathlib import Path
from typing import Any

from launch.folder import JobFolder
from lpl_pretrain.config.rundir import MANIFEST, RunDir, step_name
from lpl_pretrain.errors import ConfigError

RECENT_S = 1800.0
"""A rank that stays slow is called so every 10 minutes."""


def report(run: Path) -> str:
    """A few lines of text.  Raises ConfigError where nothing was launched."""
    folder, run_dir = open_folder(run), RunDir(run)
    facts, attempts = folder.read_facts(), folder.read_attempts()
    mine = [attempt for attempt in attempts if attempt["job"] == facts["job"]]
    state = state_of(facts["job"]) or "not with the scheduler"
    lines = [f"job         {facts['job']}: {state}; {facts['nodes']} nodes", f"command     lpl-pretrain {' '.join(facts['argv'])}"]
    if last := last_line(run_dir.metrics):
        rate = f", {last['samples_per_s']:.1f} samples/s" if "samples_per_s" in last else ""
        lines.append(f"step        {last['step']:,}{rate}, {age(last['time_s'])} ago")
    if complete := run_dir.complete_checkpoints():
        written = (run_dir.checkpoint(complete[-1]) / MANIFEST).stat().st_mtime
        lines.append(f"checkpoint  {complete[-1]:,}, {age(written)} ago")
    if slow := last_straggler(run_dir.metrics):
        what = f"{slow['times']} times the median in `{slow['measure']}`"
        lines.append(f"straggler   rank {slow['rank']} on {slow['host']}: {what}, {age(slow['time_s'])} ago")
    lines.append(f"restarts    {sum(attempt['requeued'] for attempt in mine)}")
    lines += [f"  attempt {attempt['attempt']}: {attempt['reason']}{where(attempt)}" for attempt in mine[-5:]]
    if excluded := facts["profile"]["exclude"]:
        lines.append(f"excluded    {', '.join(excluded)}")
    return "\n".join([*lines, *scores(run_dir)])


def scores(run_dir: RunDir) -> list[str]:
    """How far each protocol is that a job watches for, and what it scores next."""
    watched = sorted(path.parent.name for path in run_dir.path.glob("launch/watch/*/job.json"))
    if not watched:
        return [f"scores      {len(list(run_dir.path.glob('evaluations/step_*/*.json')))}"]
    lines = []
    for protocol in watched:
        complete, pending = run_dir.complete_checkpoints(), run_dir.pending_evaluations(protocol)
        line = f"scores      {protocol}: {len(complete) - len(pending)} of {len(complete)} checkpoints"
        if pending:
            folder = JobFolder(run_dir.path / "launch" / "evaluate" / protocol / step_name(pending[0]))
            job = folder.read_facts()["job"] if folder.facts.is_file() else None
            line += f"; next step {pending[0]:,}: {f'job {job} {state_of(job)}'.strip() if job else 'waits'}"
        lines.append(line)
    return lines


def where(attempt: dict[str, Any]) -> str:
    """The rank that ended badly first; of a hang, the ranks that left no stacks, and where those of the others are."""
    if "silent_ranks" in attempt:
        silent = ", ".join(f"rank {found['rank']} on {found['host']}" for found in attempt["silent_ranks"])
        return f" (silent: {silent or 'none'}; stacks: launch/stacks_{attempt['job']}_{attempt['attempt']}_*.txt)"
    return f" (rank {attempt['rank']} on {attempt['host']})" if "rank" in attempt else ""


def state_of(job: str | None) -> str:
    """As squeue has it; "" when it does not know the job, or there is no squeue."""
    return ask(job) or "" if job is not None and shutil.which("squeue") is not None else ""


def ask(job: str) -> str | None:
    """The same, but None where the scheduler does not answer: that says nothing about the job."""
    found = subprocess.run(["squeue", "-h", "-j", job, "-o", "%T"], capture_output=True, text=True, check=False)
    if found.returncode and "Invalid job id" not in found.stderr:
        return None
    return found.stdout.strip()


def cancel_job(run: Path) -> str:
    folder = open_folder(run)
    job = folder.read_facts()["job"]
    folder.cancelled.touch()
    done = subprocess.run(["scancel", "--signal=USR2", str(job)], capture_output=True, text=True, check=False)
    if done.returncode or state_of(job) == "PENDING":
        subprocess.run(["scancel", str(job)], capture_output=True, check=False)
    return f"job {job}: told to end after a checkpoint; `python -m launch resume {run}` goes on from there"


def open_folder(run: Path) -> JobFolder:
    folder = JobFolder(run / "launch")
    if not folder.facts.is_file():
        raise ConfigError(f"{folder.facts}: not there: nothing was launched for this run")
    return folder


def last_line(metrics: Path) -> dict[str, Any] | None:
    """Of what was logged; events are no such line."""
    return next((line for line in newest_first(metrics) if "event" not in line), None)


def last_straggler(metrics: Path) -> dict[str, Any] | None:
    """The newest that was called slow in the last RECENT_S."""
    recent = takewhile(lambda line: line["time_s"] > time.time() - RECENT_S, newest_first(metrics))
    return next((line for line in recent if line.get("event") == "straggler"), None)


def newest_first(metrics: Path) -> Iterator[dict[str, Any]]:
    for line in reversed(metrics.read_text().splitlines() if metrics.is_file() else []):
        with suppress(ValueError):  # torn by a kill
            yield json.loads(line)


def age(then_s: float) -> str:
    gone = max(0, int(time.time() - then_s))
    return f"{gone} s" if gone < 120 else f"{gone // 60} min" if gone < 7200 else f"{gone // 3600} h"
