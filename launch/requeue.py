"""The requeue rule: whether a job that has ended is requeued, and the request to SLURM.

SLURM itself requeues what it preempts by force and what its nodes lose.  A job that ended by itself
before that, because a signal came in time or because a rank died, is requeued here.
"""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from launch.job_folder import HUNG
from lpl_pretrain.errors import BAD_INPUT

DONE = "done"


@dataclass(frozen=True)
class AttemptResult:
    """Result of an attempt, as far as the decision needs it."""

    status: int
    """Exit status of the rank that failed first; 0 when all succeeded."""
    finished: bool
    """Whether no work is left."""
    cancelled: bool
    timed_out: bool
    steps: tuple[int, int]
    """Newest complete checkpoint before and after the attempt."""
    unfit: dict[str, str] = field(default_factory=dict)
    """{node that cannot train: reason}."""
    logged: int = 0
    """Newest step in the log."""
    failed_to_start: int = 0
    """Number of attempts just before this one that neither started nor left a record: the disk was
    full.
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
    """Decide from the attempt's result; the limits are keys of the cluster profile.

    `earlier`: attempts of the same job, oldest first.  Preemptions are not limited, time limits by
    `max_timeouts`, failures without a new checkpoint in between by `max_failures`.
    """
    if result.finished:
        return Decision(False, DONE)
    if result.cancelled:
        return Decision(False, "cancelled")
    unfit = "; ".join(f"{node} is unfit: {reason}" for node, reason in result.unfit.items())
    if unfit and on_unfit_node == "stop":
        return Decision(False, unfit)
    failures = consecutive_failures(result, earlier)
    counted = f"{failures} of {max_failures} in a row"
    if unfit:
        return Decision(failures <= max_failures, f"{unfit}, {counted}")
    if result.status == BAD_INPUT:
        return Decision(False, "refused its input: see the log")
    if result.status == 0:
        if not result.timed_out:
            return Decision(True, "stopped in time")
        times = 1 + sum(attempt["reason"].startswith("time limit") for attempt in earlier)
        return Decision(times <= max_timeouts, f"time limit, {times} of {max_timeouts}")
    if result.status == HUNG:
        hung = f"hung after step {result.logged:,}"
        if on_hang == "stop":
            return Decision(False, hung)
        return Decision(failures <= max_failures, f"{hung}, {counted}")
    return Decision(failures <= max_failures, f"failed with status {result.status}, {counted}")


def consecutive_failures(result: AttemptResult, earlier: list[dict[str, Any]]) -> int:
    """Number of failures, this one included, since an attempt succeeded or made a checkpoint."""
    if result.steps[1] > result.steps[0]:
        return 1
    failures = 1 + result.failed_to_start
    for attempt in reversed(earlier):
        if attempt["status"] == 0 or attempt["steps"][1] > attempt["steps"][0]:
            break
        failures += 1
    return failures


def requeue(job: str, excluded: Sequence[str]) -> None:
    """Requeue the job around this process, without the nodes `excluded`.

    SLURM sets no excluded nodes for a running job, so they are set once it is pending again.  By
    then SLURM has begun to end this very process, which has KillWait seconds left.
    """
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    subprocess.run(["scontrol", "requeue", job], check=False)
    if excluded:
        update = ["scontrol", "update", f"jobid={job}", f"ExcNodeList={','.join(excluded)}"]
        subprocess.run(update, check=False)
