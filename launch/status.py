"""What a job is doing.  The run's files come first: a scheduler's word may be late, wrong, or
absent.
"""

from __future__ import annotations

import json
import math
import shlex
import shutil
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from itertools import takewhile
from pathlib import Path
from typing import Any

from launch.folder import JobFolder, find_job_folders
from launch.record import read_record
from lpl_pretrain.config.load import load_run_config
from lpl_pretrain.config.rundir import MANIFEST, RunDir, step_name
from lpl_pretrain.errors import ConfigError

STRAGGLER = {"times", "measure", "rank", "host", "time_s"}
RECENT_S = 1800.0
"""A rank that stays slow is called so every 10 minutes."""


def status_report(folder: Path) -> str:
    """A few lines of text; of a sweep, one for each run.  Raises ConfigError where nothing was
    launched.
    """
    found = find_job_folders(folder)
    return run_summary(found[0]) if found[0].path == folder / "launch" else runs_table(found)


def runs_table(folders: Sequence[JobFolder]) -> str:
    rows = [("name", "job", "state", "step", "samples/s", "restarts", "last attempt")]
    for folder, state in zip(folders, job_states(folders), strict=True):
        job, last = folder.job, last_logged_step(RunDir(folder.run_dir).metrics) or {}
        mine = folder.history(job)
        wanted = (("step", ","), ("samples_per_s", ".1f"))
        step, rate = (
            f"{last[key]:{form}}" if is_number(last.get(key)) else "-" for key, form in wanted
        )
        restarts, reason = (
            sum(attempt["requeued"] for attempt in mine),
            mine[-1]["reason"] if mine else "-",
        )
        rows.append((folder.name, job or "-", state or "-", step, rate, str(restarts), reason))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def run_summary(folder: JobFolder) -> str:
    run_dir = RunDir(folder.run_dir)
    record = read_record(folder)
    mine = folder.history(record.job)
    state = job_states([folder])[0] or "not with the scheduler"
    lines = [
        f"job         {record.job}: {state}; {record.nodes} nodes",
        f"command     lpl-pretrain {printable(shlex.join(record.argv))}",
    ]
    if last := last_logged_step(run_dir.metrics):
        rate = (
            f", {last['samples_per_s']:.1f} samples/s"
            if is_number(last.get("samples_per_s"))
            else ""
        )
        when = f", {ago(last['time_s'])} ago" if is_number(last.get("time_s")) else ""
        lines.append(f"step        {last['step']:,}{rate}{when}")
    if complete := run_dir.complete_checkpoints():
        written = (run_dir.checkpoint(complete[-1]) / MANIFEST).stat().st_mtime
        lines.append(f"checkpoint  {complete[-1]:,}, {ago(written)} ago")
    if slow := last_straggler(run_dir.metrics):
        what = f"{slow['times']} times the median in `{slow['measure']}`"
        lines.append(
            f"straggler   rank {slow['rank']} on {slow['host']}: {what}, {ago(slow['time_s'])} ago"
        )
    lines.append(f"restarts    {sum(attempt['requeued'] for attempt in mine)}")
    lines += [
        f"  attempt {attempt['attempt']}: {attempt['reason']}{format_failure(attempt)}"
        for attempt in mine[-5:]
    ]
    if excluded := record.profile.exclude:
        lines.append(f"excluded    {', '.join(excluded)}")
    return "\n".join([*lines, *evaluation_progress(run_dir)])


def evaluation_progress(run_dir: RunDir) -> list[str]:
    """How far each protocol is that a job watches for, and what it scores next."""
    watched = sorted(path.parent.name for path in run_dir.path.glob("launch/watch/*/job.json"))
    if not watched:
        return [f"scores      {len(list(run_dir.path.glob('evaluations/step_*/*.json')))}"]
    lines = []
    for protocol in watched:
        complete, pending = run_dir.complete_checkpoints(), run_dir.pending_evaluations(protocol)
        line = (
            f"scores      {protocol}: {len(complete) - len(pending)} of {len(complete)} checkpoints"
        )
        if pending:
            folder = JobFolder(
                run_dir.path / "launch" / "evaluate" / protocol / step_name(pending[0])
            )
            job, (state,) = folder.job, job_states([folder])
            line += (
                f"; next step {pending[0]:,}: {f'job {job} {state}'.strip() if job else 'waits'}"
            )
        lines.append(line)
    return lines


def format_failure(attempt: dict[str, Any]) -> str:
    """The rank that ended badly first; of a hang, the ranks that left no stacks, and where those of
    the others are.
    """
    if "silent_ranks" in attempt:
        silent = ", ".join(
            f"rank {found['rank']} on {found['host']}" for found in attempt["silent_ranks"]
        )
        return (
            f" (silent: {silent or 'none'}; stacks: "
            f"launch/stacks_{attempt['job']}_{attempt['attempt']}_*.txt)"
        )
    return f" (rank {attempt['rank']} on {attempt['host']})" if "rank" in attempt else ""


def job_states(folders: Sequence[JobFolder]) -> list[str]:
    """Of the newest job of each, as squeue has it; "" when it does not know the job, or there is no
    squeue.
    """
    jobs = [folder.job or "" for folder in folders]
    known = (
        squeue_states([job for job in jobs if job])
        if any(jobs) and shutil.which("squeue") is not None
        else None
    )
    return [(known or {}).get(job, "") for job in jobs]


def job_state(job: str) -> str | None:
    """The state of a job, "" when squeue does not know it, None where it does not answer: that says
    nothing about the job.
    """
    known = squeue_states([job])
    return None if known is None else known.get(job, "")


def squeue_states(jobs: Sequence[str]) -> dict[str, str] | None:
    """States of those jobs that squeue knows, by name; None where it does not answer."""
    found = subprocess.run(
        ["squeue", "-h", "-r", "-j", ",".join(jobs), "-o", "%i %T"],
        capture_output=True,
        text=True,
        check=False,
    )
    if found.returncode and "Invalid job id" not in found.stderr:
        return None
    return dict(line.split() for line in found.stdout.splitlines())


def training_finished(run_dir: RunDir) -> bool:
    complete = run_dir.complete_checkpoints()
    return (
        run_dir.config.is_file()
        and bool(complete)
        and complete[-1] >= load_run_config(run_dir).steps
    )


def unfinished_runs(folders: Sequence[JobFolder]) -> list[JobFolder]:
    """Those of runs that no job works on and that are not at their end."""
    live = job_states(folders)
    found = zip(folders, live, strict=True)
    return [
        folder
        for folder, state in found
        if not state and not training_finished(RunDir(folder.run_dir))
    ]


def cancel(folder: Path) -> str:
    """The job of a run, or those of all runs of a sweep, or of an encoding, that have one."""
    found = find_job_folders(folder)
    if len(found) == 1:
        return cancel_job(found[0])
    live = [each for each, state in zip(found, job_states(found), strict=True) if state]
    return (
        "\n".join(map(cancel_job, live))
        or f"{folder}: none of its {len(found)} jobs is with the scheduler"
    )


def cancel_job(folder: JobFolder) -> str:
    job = folder.job
    folder.cancelled.touch()
    done = subprocess.run(
        ["scancel", "--signal=USR2", str(job)], capture_output=True, text=True, check=False
    )
    if done.returncode or job_states([folder]) == ["PENDING"]:
        subprocess.run(["scancel", str(job)], capture_output=True, check=False)
    if folder.read_raw_record().get("kind") == "encode":
        return f"job {job}: told to end; `python -m launch encode` goes on from there"
    return (
        f"job {job}: told to end after a checkpoint; `python -m launch resume {folder.run_dir}` "
        "goes on from there"
    )


def single_job_folder(run: Path) -> JobFolder:
    """Raises ConfigError where nothing was launched, or several jobs were."""
    found = find_job_folders(run)
    if len(found) > 1:
        raise ConfigError(
            f"{run}: holds {len(found)} jobs: name one of them, such as {found[0].path}"
        )
    return found[0]


def last_logged_step(metrics: Path) -> dict[str, Any] | None:
    """Of what was logged; events are no such line."""
    lines = (line for line in newest_first(metrics) if "event" not in line)
    return next((line for line in lines if isinstance(line.get("step"), int)), None)


def last_straggler(metrics: Path) -> dict[str, Any] | None:
    """The newest that was called slow in the last RECENT_S."""
    since = time.time() - RECENT_S
    recent = takewhile(
        lambda line: is_number(line.get("time_s")) and line["time_s"] > since, newest_first(metrics)
    )
    return next(
        (line for line in recent if line.get("event") == "straggler" and line.keys() >= STRAGGLER),
        None,
    )


def newest_first(metrics: Path) -> Iterator[dict[str, Any]]:
    text = metrics.read_text(encoding="utf-8", errors="replace") if metrics.is_file() else ""
    for written in reversed(text.splitlines()):
        with suppress(ValueError, RecursionError):  # torn by a kill
            line = json.loads(written)
            if isinstance(line, dict):
                yield line


def is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def printable(text: str) -> str:
    """For a terminal, which characters of a command must not control."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def ago(then_s: float) -> str:
    gone = max(0, int(time.time() - then_s))
    return (
        f"{gone} s" if gone < 120 else f"{gone // 60} min" if gone < 7200 else f"{gone // 3600} h"
    )
