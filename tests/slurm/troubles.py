"""What happens to a job on a cluster; each function returns once it has happened, and the job may
go on.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from pathlib import Path


def preempt(job):
    """A job of a higher partition takes all nodes for two seconds."""
    job.cluster.run(
        "sbatch",
        "--partition=high",
        "--nodes=3",
        "--exclusive",
        "--output=/dev/null",
        "--wrap=sleep 2",
    )


def time_limit(job):
    """Of one minute, of whose end SLURM tells up to half a minute before the 30 seconds asked for:
    within a collective.
    """
    ended, pid = len(job.folder.read_attempts()), one_of(job, which=1)
    os.kill(pid, signal.SIGSTOP)  # the others wait for it
    job.cluster.run("scontrol", "update", f"jobid={job.id}", "timelimit=1")
    job.wait(lambda: waits_for(pid, signal.SIGUSR2), "the announcement", timeout_s=60)
    os.kill(pid, signal.SIGCONT)
    job.wait(lambda: len(job.folder.read_attempts()) > ended, "the end of an attempt")
    job.cluster.run("scontrol", "update", f"jobid={job.id}", "timelimit=30")


def waits_for(pid, number):
    """A signal has come to a process that is stopped."""
    pending = next(
        line
        for line in Path(f"/proc/{pid}/status").read_text().splitlines()
        if line.startswith("ShdPnd:")
    )
    return int(pending.split()[1], 16) >> (number - 1) & 1


def requeue(job):
    job.cluster.run("scontrol", "requeue", job.id)


def kill_a_rank(job):
    os.kill(one_of(job, which=1), signal.SIGKILL)


def one_of(job, which):
    """The ranks on its first node or its second; on a node that is cut off there may be others."""
    return job.ranks(job.nodes()[which])[0][0]


def kill_while_saving(job):
    """The moment that a checkpoint begins to be written."""
    pid, deadline = one_of(job, which=0), time.monotonic() + 60
    while not list((job.run / "checkpoints").glob(".writing_*")):  # it lasts for milliseconds
        assert time.monotonic() < deadline, "no checkpoint was written"
    os.kill(pid, signal.SIGKILL)


def crash_rank_0(job):
    """With the batch script and the rendezvous on it."""
    crash(job, job.nodes()[0])


def crash(job, node):
    job.cluster.crash(node, tell=True)
    job.cluster.boot(node)


def cut_rank_0(job):
    """The cable of rank 0's node is pulled: the old ranks live on, unseen, but rank 0 sees that the
    run is another one's.
    """
    node, old = cut(job, which=0)

    def afterwards():
        job.wait(lambda: len(old()) < 2, "rank 0 ends by itself", timeout_s=40)
        job.cluster.mend(node)
        job.wait(lambda: not old(), "the end of the old ranks", timeout_s=30)

    job.afterwards.append(afterwards)


def cut_another(job):
    """The same of a node without rank 0, which is mended at once: SLURM ends what is left there."""
    node, old = cut(job, which=1)
    job.cluster.mend(node)
    job.wait(lambda: not old(), "the end of the old ranks", timeout_s=30)


def cut(job, which):
    """The node, and a look at those of its ranks that live.

    Not mended before the job runs elsewhere: SLURM may end an attempt that begins on a node as it
    comes back, as a leftover. They see the run's folder all the time, as they would where storage
    has a network of its own.
    """
    node, restarts = job.nodes()[which], job.restarts()
    before = {pid for pid, _ in job.ranks(node)}
    job.cluster.cut(node)
    job.wait(
        lambda: job.restarts() > restarts and job.cluster.job_state(job.id) == "RUNNING",
        "the job begins again",
    )

    def old():
        return before & {pid for pid, _ in job.ranks(node)}

    assert len(old()) == 2, "ranks live on, else this shows nothing"
    return node, old


def no_room_for_a_checkpoint(job):
    """What is written of it takes the room of logs too: whichever is refused first ends the
    attempt, which may not be noted.
    """
    restarts = job.restarts()
    with filled(job.run.parent, room=300_000):
        job.wait(lambda: job.restarts() > restarts, "the end of an attempt")


def no_room_at_all(job):
    """For a line of a log, or for telling how an attempt has ended; one cannot even begin."""
    restarts = job.restarts()
    with filled(job.run.parent):
        job.wait(
            lambda: job.restarts() >= restarts + 2, "the end of an attempt that could not begin"
        )


@contextlib.contextmanager
def filled(disk, room=0):
    """But for so many bytes."""
    ballast = disk / "ballast"
    with ballast.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        if room:  # at no moment less
            free = os.statvfs(disk)
            os.posix_fallocate(file.fileno(), 0, free.f_bavail * free.f_frsize - room)
        while not room:
            file.write(bytes(4096))
    try:
        yield
    finally:
        ballast.unlink()
