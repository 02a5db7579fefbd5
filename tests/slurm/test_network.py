"""The cable of a node is pulled while its ranks train: SLURM begins the job again elsewhere, and the old ranks live on, unseen.

They see the run's folder all the time, as they would where storage has a network of its own.
"""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest

from tests.slurm import test_training
from tests.slurm.test_training import EVERY, STRATEGIES, Job
from tests.support.commands import lines, lpl

folder = test_training.folder
STEPS = 100


@pytest.mark.parametrize(("way", "led"), [("fsdp2", False), ("zero2", True)], ids=["fsdp2, not of rank 0", "zero2, of rank 0"])
def test_goes_on_without_a_node_that_is_cut_off(cluster, folder, way, led):
    """`led`: rank 0 and the batch script are on it.  All that time nobody else writes to the run."""
    own = [*STRATEGIES[way], f"steps={STEPS}", "lpl=null"]
    job, alone = Job(cluster, folder, f"cut_{way}", *own), folder / f"alone_{way}"
    job.wait_steps(30)
    node = nodes_of(job)[not led]
    old = ranks_of(job, node)
    assert len(old()) == 2
    with ThreadPoolExecutor() as pool:  # while SLURM misses the node nothing else computes
        reference = pool.submit(lpl, "train", folder / "train.yaml", f"run_dir={alone}", *own, ranks=4)
        seen = job.goes_on_after(partial(cut, job, node, old, led))
        reference.result()
    if led:
        began = time.monotonic()
        job.wait(lambda: len(old()) < 2, "rank 0 ends by itself when the run is another one's", timeout_s=30)
        print(f"\nthe old rank 0 ended by itself {time.monotonic() - began:.1f} s after the run had gone on")
    job.wait(lambda: cluster.job_state(job.id) in ("COMPLETED", ""), "the end")
    cluster.mend(node)
    job.wait(lambda: not old(), "the end of the old ranks", timeout_s=30)
    print(f"\n{way}, cut off {'with' if led else 'without'} rank 0: seconds until it went on, and steps lost: {seen}")
    ends_as(job, alone, STEPS)
    assert 0 <= seen[1] <= EVERY + 5
    assert [found["reason"] for found in job.folder.read_attempts()] == ["done"], "what was cut off does not decide what goes on"


def cut(job, node, alive, led):
    """A node is mended once the job runs elsewhere; that of rank 0 later, for its end by itself is to be seen.

    Not before: SLURM may end an attempt that begins on a node as it comes back, as a leftover of the old one.
    """
    job.cluster.cut(node)
    job.wait(lambda: restarts(job) == 1 and job.cluster.job_state(job.id) == "RUNNING", "the job begins again")
    assert len(alive()) == 2, "ranks live on, else this test shows nothing"
    if not led:
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
