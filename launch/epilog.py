"""The last line of a job's batch script: records how the attempt ended, and requeues the job.

    python -m launch.epilog RUN/launch STATUS

launch/requeue.py has the rule.  On a node that was cut off and is back, the job may long have been
restarted on other nodes: then nothing is done.
"""

from __future__ import annotations

import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from launch.exclude import exclude, unfit_nodes
from launch.job import JobRecord, read_record
from launch.job_folder import HUNG, JobFolder
from launch.monitor import format_failure, last_logged_step, training_finished
from launch.requeue import DONE, AttemptResult, Decision, decide, requeue
from launch.slurm import (
    current_job_id,
    reached_time_limit,
    restart_count,
    scontrol_show_job,
)
from lpl_pretrain.config.rundir import RunDir
from lpl_pretrain.errors import UNFIT, LPLError
from lpl_pretrain.runtime.source_hash import source_hash

SUPERSEDED = "a later attempt has started"


def main(folder: JobFolder, status: int) -> Decision:
    """`status`: exit status of srun, which counts where no rank recorded its own."""
    record = read_record(folder)
    job = current_job_id()
    attempt = restart_count()
    fields = scontrol_show_job(job)
    if folder.last_started_attempt(job) > attempt:
        print(f"launch: attempt {attempt} ended: {SUPERSEDED}", flush=True)
        return Decision(False, SUPERSEDED)
    earlier = [previous for previous in folder.read_attempts() if previous["job"] == job]
    exits = folder.exits(job, attempt)
    result = attempt_result(folder, record, status, exits, fields, earlier)
    limits = record.profile.model_dump(
        include={"max_timeouts", "max_failures", "on_unfit_node", "on_hang"}
    )
    decision = decide(result, earlier, **limits)
    excluding = decision.requeue and bool(result.unfit)
    if excluding:
        excluded_in_slurm = fields.get("ExcNodeList", "").replace("(null)", "")
        error = exclude(folder, job, result.unfit, excluded_in_slurm)
        if error is not None:
            decision = Decision(False, f"{decision.reason}; without it sbatch says: {error}")
    record_attempt(folder, job, result, decision, failed_exits(exits))
    # by a user's `scontrol requeue`, or for a preemption
    requeued_already = int(fields.get("Restarts", attempt)) > attempt
    if decision.requeue and (excluding or not requeued_already):
        requeue(job, read_record(folder).profile.exclude if excluding else [])
    return decision


def attempt_result(
    folder: JobFolder,
    record: JobRecord,
    status: int,
    exits: list[dict[str, Any]],
    fields: dict[str, str],
    earlier: list[dict[str, Any]],
) -> AttemptResult:
    """Collect what the requeue rule needs from the job's files and from SLURM (`fields`)."""
    run_dir = RunDir(Path(record.run_dir))
    failed = failed_exits(exits)
    if record.kind == "train":
        finished = training_finished(run_dir)
    else:
        finished = status == 0 and not any(rank_exit["stopped"] for rank_exit in exits)
    complete = run_dir.complete_checkpoints()
    before = earlier[-1]["steps"][1] if earlier else record.step
    first_without_record = earlier[-1]["attempt"] + 1 if earlier else 0
    return AttemptResult(
        status=failed[0]["status"] if failed else status,
        finished=finished,
        cancelled=folder.cancelled.exists() or fields.get("JobState") == "CANCELLED",
        timed_out=reached_time_limit(fields, record.profile.signal_s),
        steps=(before, complete[-1] if complete else 0),
        unfit=unfit_nodes(exits, run_dir),
        logged=(last_logged_step(run_dir.metrics) or {"step": 0})["step"],
        failed_to_start=folder.failed_to_start(
            current_job_id(), range(first_without_record, restart_count())
        ),
    )


def record_attempt(
    folder: JobFolder,
    job: str,
    result: AttemptResult,
    decision: Decision,
    failed: list[dict[str, Any]],
) -> None:
    """Append the attempt to attempts.jsonl and print it; a full disk, which prevents that, is no
    reason not to requeue the job.
    """
    attempt = {
        "job": job,
        "attempt": restart_count(),
        "status": result.status,
        "reason": decision.reason,
        "requeued": decision.requeue,
        "steps": list(result.steps),
        "code": source_hash(),
        "time_s": time.time(),
        **first_failed_rank(failed),
    }
    with suppress(OSError):
        folder.append_attempt(attempt)
        folder.remove_empty_stacks(job)
        print(
            f"launch: attempt {restart_count()} ended: {decision.reason}"
            f"{format_failure(attempt)}; {'requeued' if decision.requeue else 'not requeued'}",
            flush=True,
        )


def failed_exits(exits: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Exits with a failure, first one first; those on unfit nodes come before all others, which
    srun may have ended because of them.
    """
    failed = [rank_exit for rank_exit in exits if rank_exit["status"]]
    return sorted(failed, key=lambda rank_exit: rank_exit["status"] != UNFIT)


def first_failed_rank(failed: list[dict[str, Any]]) -> dict[str, Any]:
    """Rank and host of the first failure; after a hang, which all ranks see, the silent ranks.

    A silent rank dumped no stacks: it, or its machine, was stopped.  The rank that looked first
    lists most of them, for ending the others wakes those that were stopped.
    """
    if not failed:
        return {}
    if failed[0]["status"] == HUNG:
        silent = (rank_exit.get("silent_ranks", []) for rank_exit in failed)
        return {"silent_ranks": max(silent, key=len)}
    return {"rank": failed[0]["rank"], "host": failed[0]["host"]}


if __name__ == "__main__":
    try:
        decided = main(JobFolder(Path(sys.argv[1])), int(sys.argv[2]))
    except LPLError as error:  # a damaged job.json: srun's exit status is what is left
        print(f"launch: {type(error).__name__}: {error}", flush=True)
        sys.exit(int(sys.argv[2]) or 1)
    # jobs that depend on this one start, or not, by this exit status
    sys.exit(0 if decided.reason == DONE else int(sys.argv[2]) or 1)
