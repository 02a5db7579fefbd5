"""The requeue rule, with and without limits reached."""

from __future__ import annotations

import pytest

from launch.job_folder import HUNG
from launch.requeue import AttemptResult, Decision, decide


def result_with(**changes):
    return AttemptResult(
        **{
            "status": 0,
            "finished": False,
            "cancelled": False,
            "timed_out": False,
            "steps": (10, 20),
            **changes,
        }
    )


def attempt(status=0, steps=(0, 0), reason="stopped in time"):
    return {"status": status, "steps": list(steps), "reason": reason}


@pytest.mark.parametrize(
    ("result", "earlier", "decision"),
    [
        (result_with(finished=True), [], Decision(False, "done")),
        (result_with(cancelled=True), [], Decision(False, "cancelled")),
        (
            result_with(status=2, steps=(0, 0)),
            [],
            Decision(False, "refused its input: see the log"),
        ),
        (result_with(), [attempt()] * 500, Decision(True, "stopped in time")),
        (result_with(timed_out=True), [], Decision(True, "time limit, 1 of 2")),
        (
            result_with(timed_out=True),
            [attempt(reason="time limit, 1 of 2"), attempt()],
            Decision(True, "time limit, 2 of 2"),
        ),
        (
            result_with(timed_out=True),
            [attempt(reason="time limit")] * 2,
            Decision(False, "time limit, 3 of 2"),
        ),
        (
            result_with(status=HUNG, logged=1234),
            [],
            Decision(True, "hung after step 1,234, 1 of 2 in a row"),
        ),
        (
            result_with(status=HUNG, steps=(5, 5)),
            [attempt(HUNG, (5, 5))] * 2,
            Decision(False, "hung after step 0, 3 of 2 in a row"),
        ),
        (
            result_with(status=137),
            [attempt(1, (0, 0))] * 9,
            Decision(True, "failed with status 137, 1 of 2 in a row"),
        ),
        (
            result_with(status=1, steps=(5, 5)),
            [attempt(1, (5, 5))],
            Decision(True, "failed with status 1, 2 of 2 in a row"),
        ),
        (
            result_with(status=1, steps=(5, 5)),
            [attempt(1, (5, 5))] * 2,
            Decision(False, "failed with status 1, 3 of 2 in a row"),
        ),
        (
            result_with(status=1, steps=(5, 5)),
            [attempt(1, (5, 5)), attempt(0)],
            Decision(True, "failed with status 1, 1 of 2 in a row"),
        ),
    ],
)
def test_requeue_rule(result, earlier, decision):
    """Preemptions are not limited, time limits are, and failures without a new checkpoint are."""
    assert decide(result, earlier, max_timeouts=2, max_failures=2, on_hang="requeue") == decision
    stopped = decide(result, earlier, max_timeouts=2, max_failures=2, on_hang="stop")
    assert (
        stopped == decision
        if result.status != HUNG
        else not stopped.requeue and "in a row" not in stopped.reason
    )
