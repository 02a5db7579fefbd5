"""A hang: one rank stops, no process reports it, and all others wait for it."""

from __future__ import annotations

import os
import re
import signal
from pathlib import Path

from launch.job_folder import HUNG
from tests.slurm.job import STRATEGIES, Job

HANG = ["watchdog.at_least_s=4", "lpl=null", "steps=80"]


def stop_a_rank(job, node, stopped):
    """Stop a rank as a broken device or file system does: it exists, and handles no signal."""
    pid, command = job.ranks(node)[0]
    known = (
        command if command.startswith("RANK=") else Path(f"/proc/{pid}/environ").read_text()
    )  # by the fork server, or by Python
    stopped.append({"rank": int(re.search(r"\bRANK=(\d+)", known)[1]), "host": node})
    os.kill(pid, signal.SIGSTOP)


def test_hung_run_is_killed_and_requeued(cluster, folder):
    """The stacks of the other ranks are kept, and the rank without stacks is named."""
    job, stopped = Job(cluster, folder, "hung", *STRATEGIES["fsdp2"], *HANG), []
    job.wait_steps(25)
    node = next(
        node for node in cluster.names[::-1] if job.ranks(node)
    )  # not the one with rank 0 and the batch script
    seconds, _ = job.resumes_after(lambda job: stop_a_rank(job, node, stopped))
    job.wait(lambda: cluster.job_state(job.id) in ("COMPLETED", ""), "the end")
    print(f"\nseconds until it resumed: {seconds}")
    attempts = (
        job.folder.read_attempts()
    )  # a machine that is busy with other things makes a slow step a hang
    hung = next(attempt for attempt in attempts if attempt.get("silent_ranks"))
    assert (
        hung["status"] == HUNG
        and hung["reason"].startswith("hung after step ")
        and hung["requeued"]
    )
    assert hung["silent_ranks"] == stopped and attempts[-1]["reason"] == "done"
    others = {0, 1, 2, 3} - {rank["rank"] for rank in stopped}
    for rank in others:
        (stacks,) = job.folder.path.glob(f"stacks_{job.id}_{hung['attempt']}_rank_{rank:05d}_*.txt")
        assert "in loop" in stacks.read_text()
    assert not list(job.folder.path.glob(f"stacks_{job.id}_{attempts[-1]['attempt']}_*")), (
        "a successful attempt leaves none"
    )
    silent = (
        f"silent: rank {stopped[0]['rank']} on {node}; stacks: "
        f"launch/stacks_{job.id}_{hung['attempt']}_*.txt"
    )
    assert silent in job.launch("status", job.run).stdout
    assert not job.ranks(), "no process remains"
