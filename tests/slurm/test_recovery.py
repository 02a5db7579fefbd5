"""Recovery: a run with faults ends with the weights of a run without, and what each fault costs."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.slurm.faults import (
    crash_node_of_rank_0,
    disconnect_node_of_rank_0,
    disconnect_other_node,
    fill_disk,
    fill_disk_for_checkpoints,
    kill_a_rank,
    kill_while_saving,
    preempt,
    reach_time_limit,
    requeue,
)
from tests.slurm.job import EVERY, STRATEGIES, Job, weights
from tests.support.commands import lpl

FAULTS = {
    "a, preemption": preempt,
    "b, time limit": reach_time_limit,
    "c, requeue": requeue,
    "d, rank killed": kill_a_rank,
    "e, node of rank 0 crashes": crash_node_of_rank_0,
    "f, node disconnected": disconnect_other_node,
    "g, killed while saving": kill_while_saving,
    "h, disk full for checkpoints": fill_disk_for_checkpoints,
    "h, disk full": fill_disk,
}
FAULTS_OF = {
    "fsdp2": FAULTS,
    "zero2": {**FAULTS, "f, node disconnected": disconnect_node_of_rank_0},
}
WRONG_SACCT = (
    "#!/bin/sh\necho 'JobID|State|NodeList'\nexec squeue -a -h -r -t all -o '%i|FAILED|%N'\n"
)


@pytest.fixture
def wrong_sacct(cluster):
    """sacct that reports every job as FAILED."""
    sacct = cluster.folder / "bin" / "sacct"
    correct = sacct.read_text()
    sacct.write_text(WRONG_SACCT)
    yield
    sacct.write_text(correct)


@pytest.mark.parametrize("strategy", FAULTS_OF)
def test_run_with_faults_ends_with_the_weights_of_a_run_without(
    cluster, folder, strategy, wrong_sacct
):
    """The number of steps until all faults have happened is unknown: the run is cancelled then, and
    resumed with `steps` a little larger.
    """
    run, costs = cluster.disk / f"{strategy} with faults", {}
    job = Job(cluster, folder, run, *STRATEGIES[strategy], "steps=100000")
    for name, fault in FAULTS_OF[strategy].items():
        job.wait_steps(EVERY + 2)
        costs[name] = job.resumes_after(fault)
        print(
            f"\n{strategy}: {name}: {costs[name][0]} s until it resumed, {costs[name][1]} steps "
            "repeated",
            flush=True,
        )
    for finish in job.unfinished_faults:
        finish()
    output = job.launch("status", run).stdout
    assert (
        f"job         {job.id}: RUNNING" in output and f"restarts    {job.restarts()}\n" in output
    )
    assert f"its job {job.id} is RUNNING" in job.launch("resume", run).stderr
    assert "resumed at step" in job.launch("logs", run).stdout
    job.launch("cancel", run)
    job.wait(
        lambda: cluster.job_state(job.id) == "FAILED",
        "its end, as FAILED for jobs that depend on it",
    )
    attempts, last = job.folder.read_attempts(), max(job.steps())
    whole = [*STRATEGIES[strategy], f"steps={last + EVERY}"]
    with ThreadPoolExecutor() as pool:
        alone = pool.submit(
            lpl,
            "train",
            folder / "train.yaml",
            f"run_dir={folder}/{strategy} alone",
            *whole,
            ranks=4,
        )
        job = Job(cluster, folder, run, *whole)
        job.wait_end()
        alone.result()

    ours, other = weights(run, last + EVERY), folder / f"{strategy} alone"
    assert ours == weights(other, last + EVERY) and ours != weights(other, last // EVERY * EVERY), (
        "a few steps change the weights"
    )
    lost = {name[0]: steps for name, (_, steps) in costs.items()}
    assert lost["a"] == lost["b"] == lost["c"] == 0
    assert all(0 <= steps <= EVERY + 5 for steps in lost.values()), (
        "at most one checkpoint interval, and the time to write it"
    )
    assert steps_are_consecutive(job.log()), "no line is from another process"
    output = lpl("audit", run).stdout
    assert (
        f"{last + EVERY} updates of 8 samples, {1 + len(job.resumes())} starts" in output
        and "none was read twice" in output
    )
    assert not job.ranks(), "no process remains"
    reasons = [attempt["reason"] for attempt in attempts]
    assert reasons[:2] == ["stopped in time", "time limit, 1 of 100"] and reasons[-1] == "cancelled"
    assert attempts[1]["status"] == 0 and attempts[1]["steps"][1] == job.resumes()[1]["step"], (
        "the time limit's checkpoint"
    )
    assert {137, -9} & {attempt["status"] for attempt in attempts}, "of the killed ranks"
    assert len(attempts) < 2 + len(FAULTS), "attempts on lost or disconnected nodes leave no record"
    assert job.folder.read_attempts()[-1]["reason"] == "done"


def steps_are_consecutive(log):
    """Whether each step follows the one before it, or the resumed one."""
    step = 0
    for line in log:
        if "event" not in line and line["step"] != step + 1:
            return False
        step = line["step"]
    return True


def test_log_with_a_line_of_another_process_is_detected():
    own = [{"step": 1}, {"step": 2}, {"event": "resumed", "step": 1}, {"step": 2}]
    assert steps_are_consecutive(own) and not steps_are_consecutive([*own, {"step": 2}])
