"""Whatever happens to a training, it ends with the weights of a run left alone; and the table of
what that costs.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.slurm.job import EVERY, STRATEGIES, Job, weights
from tests.slurm.troubles import (
    crash_rank_0,
    cut_another,
    cut_rank_0,
    kill_a_rank,
    kill_while_saving,
    no_room_at_all,
    no_room_for_a_checkpoint,
    preempt,
    requeue,
    time_limit,
)
from tests.support.commands import lpl

TROUBLES = {
    "a, preempted": preempt,
    "b, time limit": time_limit,
    "c, requeued": requeue,
    "d, rank killed": kill_a_rank,
    "e, node of rank 0 crashed": crash_rank_0,
    "f, network cut": cut_another,
    "g, killed while saving": kill_while_saving,
    "h, no room for a checkpoint": no_room_for_a_checkpoint,
    "h, no room at all": no_room_at_all,
}
WAYS = {"fsdp2": TROUBLES, "zero2": {**TROUBLES, "f, network cut": cut_rank_0}}
LIAR = "#!/bin/sh\necho 'JobID|State|NodeList'\nexec squeue -a -h -r -t all -o '%i|FAILED|%N'\n"


@pytest.fixture
def lying_sacct(cluster):
    """It calls every job FAILED."""
    sacct = cluster.folder / "bin" / "sacct"
    truthful = sacct.read_text()
    sacct.write_text(LIAR)
    yield
    sacct.write_text(truthful)


@pytest.mark.parametrize("way", WAYS)
def test_ends_with_the_weights_of_a_run_left_alone(cluster, folder, way, lying_sacct):
    """How many steps the troubles take nobody knows, so the run is ended, and has a little way to
    go from there.
    """
    run, seen = cluster.disk / f"{way} troubled", {}
    job = Job(cluster, folder, run, *STRATEGIES[way], "steps=100000")
    for name, trouble in WAYS[way].items():
        job.wait_steps(EVERY + 2)
        seen[name] = job.goes_on_after(trouble)
        print(
            f"\n{way}: {name}: {seen[name][0]} s until it went on, {seen[name][1]} steps "
            "made again",
            flush=True,
        )
    for look in job.afterwards:
        look()
    told = job.launch("status", run).stdout
    assert f"job         {job.id}: RUNNING" in told and f"restarts    {job.restarts()}\n" in told
    assert f"its job {job.id} is RUNNING" in job.launch("resume", run).stderr
    assert "resumed at step" in job.launch("logs", run).stdout
    job.launch("cancel", run)
    job.wait(
        lambda: cluster.job_state(job.id) == "FAILED",
        "its end, which is no good one for jobs that depend on it",
    )
    attempts, last = job.folder.read_attempts(), max(job.steps())
    whole = [*STRATEGIES[way], f"steps={last + EVERY}"]
    with ThreadPoolExecutor() as pool:
        alone = pool.submit(
            lpl, "train", folder / "train.yaml", f"run_dir={folder}/{way} alone", *whole, ranks=4
        )
        job = Job(cluster, folder, run, *whole)
        job.wait_end()
        alone.result()

    ours, other = weights(run, last + EVERY), folder / f"{way} alone"
    assert ours == weights(other, last + EVERY) and ours != weights(other, last // EVERY * EVERY), (
        "a few steps make a difference"
    )
    lost = {name[0]: steps for name, (_, steps) in seen.items()}
    assert lost["a"] == lost["b"] == lost["c"] == 0
    assert all(0 <= steps <= EVERY + 5 for steps in lost.values()), (
        "one checkpoint, and its writing"
    )
    assert follows_each_other(job.log()), "no line is anybody else's"
    told = lpl("audit", run).stdout
    assert (
        f"{last + EVERY} updates of 8 samples, {1 + len(job.resumes())} starts" in told
        and "none was read twice" in told
    )
    assert not job.ranks(), "no process is left"
    reasons = [found["reason"] for found in attempts]
    assert reasons[:2] == ["stopped in time", "time limit, 1 of 100"] and reasons[-1] == "cancelled"
    assert attempts[1]["status"] == 0 and attempts[1]["steps"][1] == job.resumes()[1]["step"], (
        "the time limit's checkpoint"
    )
    assert {137, -9} & {found["status"] for found in attempts}, "the killed ranks'"
    assert len(attempts) < 2 + len(TROUBLES), (
        "those of nodes that were lost or cut off do not decide what goes on"
    )
    assert job.folder.read_attempts()[-1]["reason"] == "done"


def follows_each_other(log):
    """Steps from wherever it was resumed."""
    step = 0
    for line in log:
        if "event" not in line and line["step"] != step + 1:
            return False
        step = line["step"]
    return True


def test_a_log_with_a_foreign_line_is_seen():
    own = [{"step": 1}, {"step": 2}, {"event": "resumed", "step": 1}, {"step": 2}]
    assert follows_each_other(own) and not follows_each_other([*own, {"step": 2}])
