"""Monitor the jobs of a run: status, the logs of all ranks as one stream, and cancel.

The run's files come first: SLURM's answer may be late, wrong, or missing.
"""

from __future__ import annotations

import json
import math
import re
import shlex
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from itertools import takewhile
from pathlib import Path
from typing import Any

from launch.job import read_record
from launch.job_folder import JobFolder, find_job_folders, single_job_folder
from launch.slurm import job_states
from lpl_pretrain.config.load import load_run_config
from lpl_pretrain.config.rundir import MANIFEST, RunDir, step_name

STRAGGLER_KEYS = {"times", "measure", "rank", "host", "time_s"}
RECENT_S = 1800.0
"""Age up to which a straggler is shown; a rank that stays slow is logged every 10 minutes."""
SHOWN_ATTEMPTS = 5
LOG_NAME = re.compile(r"_(\d+)_log\.(out|err)$")
LOG_POLL_S = 0.5
LOG_IDLE_POLL_S = 2.0
"""Interval between reads of logs that have no new lines."""


def status_report(folder: Path) -> str:
    """Text of `launch status`: a few lines for a run, a table for a sweep or an encoding.

    Raises ConfigError where nothing was launched.
    """
    folders = find_job_folders(folder)
    if folders[0].path == folder / "launch":
        return run_summary(folders[0])
    return jobs_table(folders)


def jobs_table(folders: Sequence[JobFolder]) -> str:
    rows = [("name", "job", "state", "step", "samples/s", "restarts", "last attempt")]
    for folder, state in zip(folders, job_states(folders), strict=True):
        job = folder.job
        last = last_logged_step(RunDir(folder.run_dir).metrics) or {}
        attempts = folder.history(job)
        restarts = sum(attempt["requeued"] for attempt in attempts)
        rows.append(
            (
                folder.name,
                job or "-",
                state or "-",
                f"{last['step']:,}" if is_number(last.get("step")) else "-",
                f"{last['samples_per_s']:.1f}" if is_number(last.get("samples_per_s")) else "-",
                str(restarts),
                attempts[-1]["reason"] if attempts else "-",
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def run_summary(folder: JobFolder) -> str:
    run_dir = RunDir(folder.run_dir)
    record = read_record(folder)
    attempts = folder.history(record.job)
    state = job_states([folder])[0] or "not in SLURM's queue"
    lines = [
        f"job         {record.job}: {state}; {record.nodes} nodes",
        f"command     lpl-pretrain {printable(shlex.join(record.argv))}",
    ]
    if last := last_logged_step(run_dir.metrics):
        rate = ""
        if is_number(last.get("samples_per_s")):
            rate = f", {last['samples_per_s']:.1f} samples/s"
        when = f", {ago(last['time_s'])}" if is_number(last.get("time_s")) else ""
        lines.append(f"step        {last['step']:,}{rate}{when}")
    if complete := run_dir.complete_checkpoints():
        written_s = (run_dir.checkpoint(complete[-1]) / MANIFEST).stat().st_mtime
        lines.append(f"checkpoint  {complete[-1]:,}, {ago(written_s)}")
    if slow := last_straggler(run_dir.metrics):
        what = f"{slow['times']} times the median in `{slow['measure']}`"
        rank = f"rank {slow['rank']} on {slow['host']}"
        lines.append(f"straggler   {rank}: {what}, {ago(slow['time_s'])}")
    lines.append(f"restarts    {sum(attempt['requeued'] for attempt in attempts)}")
    for attempt in attempts[-SHOWN_ATTEMPTS:]:
        failure = format_failure(attempt)
        lines.append(f"  attempt {attempt['attempt']}: {attempt['reason']}{failure}")
    if excluded := record.profile.exclude:
        lines.append(f"excluded    {', '.join(excluded)}")
    return "\n".join([*lines, *evaluation_progress(run_dir)])


def evaluation_progress(run_dir: RunDir) -> list[str]:
    """A line for each protocol whose checkpoints a job evaluates as they come: scored checkpoints,
    and the next one.
    """
    watched = sorted(path.parent.name for path in run_dir.path.glob("launch/watch/*/job.json"))
    if not watched:
        return [f"scores      {len(list(run_dir.path.glob('evaluations/step_*/*.json')))}"]
    lines = []
    for protocol in watched:
        complete = run_dir.complete_checkpoints()
        pending = run_dir.pending_evaluations(protocol)
        scored = f"{len(complete) - len(pending)} of {len(complete)} checkpoints"
        line = f"scores      {protocol}: {scored}"
        if pending:
            evaluations = run_dir.path / "launch" / "evaluate" / protocol
            folder = JobFolder(evaluations / step_name(pending[0]))
            state = f"job {folder.job} {job_states([folder])[0]}".strip() if folder.job else "waits"
            line += f"; next step {pending[0]:,}: {state}"
        lines.append(line)
    return lines


def format_failure(attempt: dict[str, Any]) -> str:
    """` (rank 1 on node2)`, the first failed rank; after a hang, the ranks without stacks and the
    files with the stacks of the others.
    """
    if "silent_ranks" in attempt:
        silent = ", ".join(
            f"rank {silent['rank']} on {silent['host']}" for silent in attempt["silent_ranks"]
        )
        stacks = f"launch/stacks_{attempt['job']}_{attempt['attempt']}_*.txt"
        return f" (silent: {silent or 'none'}; stacks: {stacks})"
    return f" (rank {attempt['rank']} on {attempt['host']})" if "rank" in attempt else ""


def training_finished(run_dir: RunDir) -> bool:
    """Whether the run has an intact checkpoint of its last step."""
    done = run_dir.last_intact_step()
    if done is None or not run_dir.config.is_file():
        return False
    return done >= load_run_config(run_dir).steps


def unfinished_runs(folders: Sequence[JobFolder]) -> list[JobFolder]:
    """Folders of runs that are not finished and have no job in SLURM's queue."""
    return [
        folder
        for folder, state in zip(folders, job_states(folders), strict=True)
        if not state and not training_finished(RunDir(folder.run_dir))
    ]


def cancel(folder: Path) -> str:
    """Cancel the job of a run, or all jobs of a sweep or an encoding; return what was done."""
    folders = find_job_folders(folder)
    if len(folders) == 1:
        return cancel_job(folders[0])
    queued = [each for each, state in zip(folders, job_states(folders), strict=True) if state]
    if not queued:
        return f"{folder}: none of its {len(folders)} jobs is in SLURM's queue"
    return "\n".join(map(cancel_job, queued))


def cancel_job(folder: JobFolder) -> str:
    """Signal the job to write a checkpoint and end; remove it from the queue if it is pending."""
    job = folder.job
    folder.cancelled.touch()
    done = subprocess.run(
        ["scancel", "--signal=USR2", str(job)], capture_output=True, text=True, check=False
    )
    if done.returncode or job_states([folder]) == ["PENDING"]:
        subprocess.run(["scancel", str(job)], capture_output=True, check=False)
    if folder.read_raw_record().get("kind") == "encode":
        return f"job {job}: ends now; `python -m launch encode` continues from there"
    return (
        f"job {job}: ends after a checkpoint; `python -m launch resume {folder.run_dir}` "
        "continues from there"
    )


def stream_logs(run: Path, *, follow: bool) -> Iterator[str]:
    """Yield `[rank] line` of all ranks of the newest job; with `follow`, until the job has left
    SLURM's queue.
    """
    folder = single_job_folder(run)
    job = str(folder.job)
    bytes_read: dict[Path, int] = {}
    while True:
        lines = list(new_lines(folder.path, job, bytes_read))
        yield from lines
        if not follow or (not lines and not any(job_states([folder]))):
            return
        time.sleep(LOG_POLL_S if lines else LOG_IDLE_POLL_S)


def new_lines(folder: Path, job: str, bytes_read: dict[Path, int]) -> Iterator[str]:
    """Complete lines of the job's logs after the first `bytes_read` bytes of each file, which it
    advances.
    """
    for path in sorted(folder.glob(f"{job}_*_log.*")):
        name = LOG_NAME.search(path.name)
        if name is None:
            continue
        with path.open("rb") as file:
            file.seek(bytes_read.get(path, 0))
            text = file.read()
        complete = text[: text.rfind(b"\n") + 1]
        bytes_read[path] = bytes_read.get(path, 0) + len(complete)
        for line in complete.decode(errors="replace").splitlines():
            yield f"[{name[1]}] {line}"


def last_logged_step(metrics: Path) -> dict[str, Any] | None:
    """Newest line of metrics.jsonl with a step's metrics, not an event."""
    lines = (line for line in newest_first(metrics) if "event" not in line)
    return next((line for line in lines if isinstance(line.get("step"), int)), None)


def last_straggler(metrics: Path) -> dict[str, Any] | None:
    """Newest straggler event of the last RECENT_S."""
    since = time.time() - RECENT_S
    recent = takewhile(
        lambda line: is_number(line.get("time_s")) and line["time_s"] > since, newest_first(metrics)
    )
    for line in recent:
        if line.get("event") == "straggler" and line.keys() >= STRAGGLER_KEYS:
            return line
    return None


def newest_first(metrics: Path) -> Iterator[dict[str, Any]]:
    """Lines of metrics.jsonl, newest first; lines that a kill cut short are skipped."""
    text = metrics.read_text(encoding="utf-8", errors="replace") if metrics.is_file() else ""
    for written in reversed(text.splitlines()):
        with suppress(ValueError, RecursionError):
            line = json.loads(written)
            if isinstance(line, dict):
                yield line


def is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def printable(text: str) -> str:
    """Escape control characters, so that a command cannot control the terminal."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def ago(then_s: float) -> str:
    """`90 s ago`, `5 min ago` or `3 h ago`."""
    seconds = max(0, int(time.time() - then_s))
    if seconds < 120:
        return f"{seconds} s ago"
    if seconds < 7200:
        return f"{seconds // 60} min ago"
    return f"{seconds // 3600} h ago"
