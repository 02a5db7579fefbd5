"""The last line of a job's script: what an attempt came to, and whether the job goes on.

    python -m launch.epilog RUN/launch STATUS

The scheduler requeues what it preempts by force and what its nodes lose; a job that ended by itself
before that, because it was told in time, or because a rank died, is requeued here.  On a node that
was cut off and is back it may be that the job has long gone on elsewhere: then nothing is done.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from launch.exclude import exclude, requeue, unfit_nodes
from launch.folder import HUNG, JobFolder, current_job_id
from launch.profile import ClusterProfile
from launch.status import format_failure, last_logged_step, training_finished
from lpl_pretrain.config.rundir import RunDir
from lpl_pretrain.errors import BAD_INPUT, UNFIT, LPLError
from lpl_pretrain.runtime.source_hash import fingerprint

DONE, SUPERSEDED = "done", "the job has gone on without it"
EARLY_S = 60
"""By how much SLURM may announce the end of the time too early."""


@dataclass(frozen=True)
class AttemptResult:
    """Facts about an attempt that has ended."""

    status: int
    """Of the rank that ended badly first; 0 when all ended well."""
    over: bool
    """There is nothing left to do."""
    cancelled: bool
    timed_out: bool
    steps: tuple[int, int]
    """Newest complete checkpoint before and after."""
    unfit: dict[str, str] = field(default_factory=dict)
    """Nodes that cannot train, and why."""
    logged: int = 0
    """Newest step that was logged."""
    failed_to_start: int = 0
    """Attempts just before this one that could not even begin, nor tell of it: there was no room on
    the disk.
    """


@dataclass(frozen=True)
class Decision:
    requeue: bool
    reason: str


def decide(
    result: AttemptResult,
    earlier: list[dict[str, Any]],
    *,
    max_timeouts: int,
    max_failures: int,
    on_unfit_node: str = "exclude",
    on_hang: str = "requeue",
) -> Decision:
    """`earlier`: attempts of the same job, the oldest first."""
    if result.over:
        return Decision(False, DONE)
    if result.cancelled:
        return Decision(False, "cancelled")
    unfit = "; ".join(f"{node} is unfit: {why}" for node, why in result.unfit.items())
    if unfit and on_unfit_node == "stop":
        return Decision(False, unfit)
    if unfit:
        failures = consecutive_failures(result, earlier)
        return Decision(failures <= max_failures, f"{unfit}, {failures} of {max_failures} in a row")
    if result.status == BAD_INPUT:
        return Decision(False, "refused its input: see the log")
    if result.status == 0:
        if not result.timed_out:
            return Decision(True, "stopped in time")
        times = 1 + sum(attempt["reason"].startswith("time limit") for attempt in earlier)
        return Decision(times <= max_timeouts, f"time limit, {times} of {max_timeouts}")
    what = (
        f"hung after step {result.logged:,}"
        if result.status == HUNG
        else f"failed with status {result.status}"
    )
    if result.status == HUNG and on_hang == "stop":
        return Decision(False, what)
    failures = consecutive_failures(result, earlier)
    return Decision(failures <= max_failures, f"{what}, {failures} of {max_failures} in a row")


def consecutive_failures(result: AttemptResult, earlier: list[dict[str, Any]]) -> int:
    """Failures, this one included, since something ended well or a checkpoint was made."""
    if result.steps[1] > result.steps[0]:
        return 1
    failures = 1 + result.failed_to_start
    for attempt in reversed(earlier):
        if attempt["status"] == 0 or attempt["steps"][1] > attempt["steps"][0]:
            break
        failures += 1
    return failures


def main(folder: JobFolder, status: int) -> Decision:
    record, job = folder.read_raw_record(), current_job_id()
    profile = ClusterProfile.model_validate(record["profile"])
    attempt, run_dir = (
        int(os.environ.get("SLURM_RESTART_COUNT", "0")),
        RunDir(Path(record["run_dir"])),
    )
    earlier = [found for found in folder.read_attempts() if found["job"] == job]
    shown = scontrol_show_job(job)
    if folder.last_started_attempt(job) > attempt:
        print(f"launch: attempt {attempt} ended: {SUPERSEDED}", flush=True)
        return Decision(False, SUPERSEDED)
    exits = folder.exits(job, attempt)
    bad = sorted(
        (found for found in exits if found["status"]), key=lambda found: found["status"] != UNFIT
    )
    complete = run_dir.complete_checkpoints()
    before = earlier[-1]["steps"][1] if earlier else record["step"]
    result = AttemptResult(
        status=bad[0]["status"] if bad else status,
        over=training_finished(run_dir)
        if record["kind"] == "train"
        else status == 0 and not any(found["stopped"] for found in exits),
        cancelled=folder.cancelled.exists() or parse_fields(shown).get("JobState") == "CANCELLED",
        timed_out=reached_time_limit(shown, profile.signal_s),
        steps=(before, complete[-1] if complete else 0),
        unfit=unfit_nodes(exits, run_dir),
        logged=(last_logged_step(run_dir.metrics) or {"step": 0})["step"],
        failed_to_start=folder.failed_to_start(
            job, range(earlier[-1]["attempt"] + 1 if earlier else 0, attempt)
        ),
    )
    limits = profile.model_dump(
        include={"max_timeouts", "max_failures", "on_unfit_node", "on_hang"}
    )
    decision = decide(result, earlier, **limits)
    excluding = decision.requeue and bool(result.unfit)
    if excluding and (
        words := exclude(
            folder,
            job,
            result.unfit,
            parse_fields(shown).get("ExcNodeList", "").replace("(null)", ""),
        )
    ):
        decision = Decision(False, f"{decision.reason}; without it the scheduler says: {words}")
    found = {
        "job": job,
        "attempt": attempt,
        "status": result.status,
        "reason": decision.reason,
        "requeued": decision.requeue,
        "steps": list(result.steps),
        "code": fingerprint(),
        "time_s": time.time(),
        **(first_failed_rank(bad) if bad else {}),
    }
    with suppress(OSError):  # a full disk is no reason not to go on
        folder.append_attempt(found)
        folder.drop_empty_stacks(job)
        then = "goes on" if decision.requeue else "ends here"
        print(
            f"launch: attempt {attempt} ended: {decision.reason}{format_failure(found)}; {then}",
            flush=True,
        )
    asked_already = (
        int(parse_fields(shown).get("Restarts", attempt)) > attempt
    )  # by a person, or a preemption
    if decision.requeue and (excluding or not asked_already):
        requeue(job, folder.read_raw_record()["profile"]["exclude"] if excluding else [])
    return decision


def first_failed_rank(bad: list[dict[str, Any]]) -> dict[str, Any]:
    """Who ended badly first; of a hang, which all ranks see, who wrote no stacks: it was stopped,
    or its machine was.

    Most are silent for the rank that looked before others were being ended, which wakes those that
    were stopped.
    """
    if bad[0]["status"] == HUNG:
        return {"silent_ranks": max((found.get("silent_ranks", []) for found in bad), key=len)}
    return {"rank": bad[0]["rank"], "host": bad[0]["host"]}


def scontrol_show_job(job: str) -> str:
    """What the scheduler says of it; "" where it says nothing."""
    found = subprocess.run(
        ["scontrol", "show", "job", job, "--oneliner"], capture_output=True, text=True, check=False
    )
    return found.stdout


def parse_fields(shown: str) -> dict[str, str]:
    """What `scontrol show job` says, by name.  The first of a name counts: paths, which may hold
    anything, come last.
    """
    found: dict[str, str] = {}
    for word in shown.split():
        name, separator, value = word.partition("=")
        if separator:
            found.setdefault(name, value)
    return found


def reached_time_limit(shown: str, signal_s: int) -> bool:
    """The attempt ended so close to its limit that the limit was the reason."""
    found = parse_fields(shown)
    try:
        used, limit = (parse_seconds(found[name]) for name in ("RunTime", "TimeLimit"))
    except (KeyError, ValueError):
        return False
    return used >= limit - signal_s - EARLY_S


def parse_seconds(text: str) -> int:
    """Of [days-]hours:minutes:seconds.  Raises ValueError for UNLIMITED and its kin."""
    days, _, clock = text.rpartition("-")
    hours, minutes, rest = (int(part) for part in clock.split(":"))
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + rest


if __name__ == "__main__":
    try:
        ended = main(JobFolder(Path(sys.argv[1])), int(sys.argv[2]))
    except LPLError as error:  # a damaged job.json: the scheduler's own word is what is left
        print(f"launch: {type(error).__name__}: {error}", flush=True)
        sys.exit(int(sys.argv[2]) or 1)
    sys.exit(0 if ended.reason == DONE else int(sys.argv[2]) or 1)  # what other jobs depend on
