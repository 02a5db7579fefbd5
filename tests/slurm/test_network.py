"""The cable of a node is pulled while its ranks train: SLURM begins the job again elsewhere, and the old ranks live on, unseen.

They see the run's folder all the time, as they would where storage has a network of its own.
"""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from tests.slurm import test_training
from tests.slurm.test_training import EVERY, STRATEGIES, Job
from tests.support.commands import lines, lpl

folder = test_training.folder
STEPS = 140


def test_goes_on_without_a_node_that_is_cut_off(cluster, folder):
    """First the node without rank 0, then the one with it; all that time nobody else writes to the run."""
    own = [*STRATEGIES["fsdp2"], f"steps={STEPS}"]
    job = Job(cluster, folder, "cut", *own)
    job.wait_steps(30)
    first, second = nodes_of(job)
    led, followed = ranks_of(job, first), ranks_of(job, second)
    assert len(led()) == len(followed()) == 2
    with ThreadPoolExecutor() as pool:  # while SLURM misses the node nothing else computes
        alone = pool.submit(lpl, "train", folder / "train.yaml", f"run_dir={folder}/alone", *own, ranks=4)
        seen = {"without a node": job.goes_on_after(partial(cut_until_it_runs_elsewhere, job, second, followed))}
        alone.result()
    job.wait_steps(20)
    first, _ = nodes_of(job)
    led = ranks_of(job, first)
    assert len(led()) == 2
    seen["without that of rank 0"] = job.goes_on_after(lambda: cluster.cut(first))
    began = time.monotonic()
    job.wait(lambda: len(led()) < 2, "rank 0 ends by itself when the run is another one's", timeout_s=30)
    seen["the old rank 0 ended after"] = round(time.monotonic() - began, 1)
    job.wait(lambda: cluster.job_state(job.id) in ("COMPLETED", ""), "the end")
    cluster.mend(first)
    job.wait(lambda: not led(), "the end of the old ranks", timeout_s=30)
    print(f"\nseconds until it went on, and steps lost: {seen}")
    ends_as(job, folder / "alone", STEPS)
    assert all(0 <= seen[name][1] <= EVERY + 5 for name in ("without a node", "without that of rank 0"))
    assert [found["reason"] for found in job.folder.read_attempts()] == ["done"], "what was cut off does not decide what goes on"


def cut_until_it_runs_elsewhere(job, node, alive):
    """And not until it would begin there again: SLURM may end the new attempt as a leftover of the old one."""
    job.cluster.cut(node)
    job.wait(lambda: restarts(job) == 1 and job.cluster.job_state(job.id) == "RUNNING", "the job begins again")
    assert len(alive()) == 2, "ranks live on, else this test shows nothing"
    job.cluster.mend(node)
    job.wait(lambda: not alive(), "the end of the old ranks", timeout_s=30)


def restarts(job):
    """As the scheduler counts them."""
    return int(job.cluster.run("squeue", "-h", "-j", job.id, "-O", "RestartCnt").stdout)


def nodes_of(job):
    """The one with the batch script and rank 0, and the other one."""
    first, listed = job.cluster.run("squeue", "-h", "-j", job.id, "-o", "%B %N").stdout.split()
    found = job.cluster.run("scontrol", "show", "hostnames", listed).stdout.split()
    return sorted(found, key=lambda node: node != first)


def ranks_of(job, node):
    """Asks which of those that train there now still live."""
    now = {pid for pid, _ in job.ranks(node)}
    return lambda: now & {pid for pid, _ in job.ranks(node)}


def ends_as(job, run, steps):
    """With the bytes of that run; and its log's steps follow each other from wherever it was resumed: no line is anybody else's."""
    ours, theirs = ((it / "checkpoints" / f"step_{steps:08d}").iterdir() for it in (job.run, run))
    assert bytes_of(ours) == bytes_of(theirs)
    step = 0
    for line in lines(job.run):
        if "event" not in line:
            assert line["step"] == step + 1, f"step {line['step']} was logged after step {step}"
        step = line["step"]
    assert step == steps


def bytes_of(files):
    return {file.name: file.read_bytes() for file in files if file.name != "manifest.json"}
