"""Faults for a running job; each function returns once its fault has happened."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from pathlib import Path


def preempt(job):
    """Submit a job of a higher partition that takes all nodes for two seconds."""
    job.cluster.run(
        "sbatch",
        "--partition=high",
        "--nodes=3",
        "--exclusive",
        "--output=/dev/null",
        "--wrap=sleep 2",
    )


def reach_time_limit(job):
    """Let the job reach a time limit of one minute within a collective.

    SLURM signals it up to half a minute earlier than the 30 seconds asked for.
    """
    ended = len(job.folder.read_attempts())
    pid = rank_on(job, node=1)
    os.kill(pid, signal.SIGSTOP)  # the other ranks wait for it
    job.cluster.run("scontrol", "update", f"jobid={job.id}", "timelimit=1")
    job.wait(lambda: has_pending(pid, signal.SIGUSR2), "SIGUSR2", timeout_s=60)
    os.kill(pid, signal.SIGCONT)
    job.wait(lambda: len(job.folder.read_attempts()) > ended, "the end of an attempt")
    job.cluster.run("scontrol", "update", f"jobid={job.id}", "timelimit=30")


def has_pending(pid, number):
    """Whether a signal is pending for a stopped process."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    pending = next(line for line in lines if line.startswith("ShdPnd:"))
    return int(pending.split()[1], 16) >> (number - 1) & 1


def requeue(job):
    job.cluster.run("scontrol", "requeue", job.id)


def kill_a_rank(job):
    os.kill(rank_on(job, node=1), signal.SIGKILL)


def rank_on(job, node):
    """Process id of a rank on the job's first node (0) or second (1)."""
    return job.ranks(job.nodes()[node])[0][0]


def kill_while_saving(job):
    """Kill a rank at the moment at which a checkpoint begins to be written."""
    pid = rank_on(job, node=0)
    deadline = time.monotonic() + 60
    while not list((job.run / "checkpoints").glob(".writing_*")):  # it exists for milliseconds
        assert time.monotonic() < deadline, "no checkpoint was written"
    os.kill(pid, signal.SIGKILL)


def crash_node_of_rank_0(job):
    """Crash and reboot the node that runs the batch script and the rendezvous."""
    crash(job, job.nodes()[0])


def crash(job, node):
    job.cluster.crash(node, mark_down=True)
    job.cluster.boot(node)


def disconnect_node_of_rank_0(job):
    """Disconnect the node of rank 0 from the network.

    Its ranks live on, unknown to SLURM, until rank 0 notices that another process owns the run.
    """
    node, surviving = disconnect(job, which=0)

    def finish():
        job.wait(lambda: len(surviving()) < 2, "rank 0 ends by itself", timeout_s=40)
        job.cluster.reconnect(node)
        job.wait(lambda: not surviving(), "the end of the old ranks", timeout_s=30)

    job.unfinished_faults.append(finish)


def disconnect_other_node(job):
    """Disconnect the node without rank 0, and reconnect it at once: SLURM ends its old ranks."""
    node, surviving = disconnect(job, which=1)
    job.cluster.reconnect(node)
    job.wait(lambda: not surviving(), "the end of the old ranks", timeout_s=30)


def disconnect(job, which):
    """Disconnect a node; return its name, and a function for its ranks that are alive.

    Returns once the job runs elsewhere: if the node came back earlier, SLURM could end a new
    attempt on it as a leftover of the old one.  The old ranks see the run's folder all the time, as
    where storage has a network of its own.
    """
    node = job.nodes()[which]
    restarts = job.restarts()
    before = {pid for pid, _ in job.ranks(node)}
    job.cluster.disconnect(node)
    job.wait(
        lambda: job.restarts() > restarts and job.cluster.job_state(job.id) == "RUNNING",
        "the restart of the job",
    )

    def surviving():
        return before & {pid for pid, _ in job.ranks(node)}

    assert len(surviving()) == 2, "without old ranks the test would show nothing"
    return node, surviving


def fill_disk_for_checkpoints(job):
    """Leave less space than a checkpoint needs.

    Its files use up the space for logs too.  The first write that is refused ends the attempt,
    which may leave no record.
    """
    restarts = job.restarts()
    with full_disk(job.run.parent, free_bytes=300_000):
        job.wait(lambda: job.restarts() > restarts, "the end of an attempt")


def fill_disk(job):
    """Leave no space at all, so that one attempt cannot even start, nor record that."""
    restarts = job.restarts()
    with full_disk(job.run.parent):
        job.wait(lambda: job.restarts() >= restarts + 2, "the end of an attempt without a start")


@contextlib.contextmanager
def full_disk(disk, free_bytes=0):
    """Fill the disk except for `free_bytes`."""
    ballast = disk / "ballast"
    with ballast.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        if free_bytes:  # in one step, so that there is never less
            free = os.statvfs(disk)
            os.posix_fallocate(file.fileno(), 0, free.f_bavail * free.f_frsize - free_bytes)
        while not free_bytes:
            file.write(bytes(4096))
    try:
        yield
    finally:
        ballast.unlink()
