"""What happens to a job on a cluster; each function returns once it has happened, and the job may go on."""

from __future__ import annotations

import contextlib
import os
import signal
import time


def preempt(job):
    """A job of a higher partition takes all nodes for two seconds."""
    job.cluster.run("sbatch", "--partition=high", "--nodes=3", "--exclusive", "--output=/dev/null", "--wrap=sleep 2")


def time_limit(job):
    """Of one minute, whose end SLURM announces up to half a minute before the 30 seconds asked for."""
    ended = len(job.folder.read_attempts())
    job.cluster.run("scontrol", "update", f"jobid={job.id}", "timelimit=1")
    job.wait(lambda: len(job.folder.read_attempts()) > ended, "the end of the time")
    job.cluster.run("scontrol", "update", f"jobid={job.id}", "timelimit=30")


def requeue(job):
    job.cluster.run("scontrol", "requeue", job.id)


def kill_a_rank(job):
    os.kill(job.ranks()[0][0], signal.SIGKILL)


def kill_while_saving(job):
    """The moment that a checkpoint begins to be written."""
    deadline = time.monotonic() + 60
    while not list((job.run / "checkpoints").glob(".writing_*")):  # it lasts for milliseconds
        assert time.monotonic() < deadline, "no checkpoint was written"
    kill_a_rank(job)


def crash_rank_0(job):
    """With the batch script and the rendezvous on it."""
    crash(job, job.nodes()[0])


def crash(job, node):
    job.cluster.crash(node, tell=True)
    job.cluster.boot(node)


def cut_rank_0(job):
    """The cable of rank 0's node is pulled: the old ranks live on, unseen, until they see that the run is another one's."""
    node, old = cut(job, which=0)
    job.wait(lambda: len(old()) < 2, "rank 0 ends by itself", timeout_s=40)
    job.cluster.mend(node)
    job.wait(lambda: not old(), "the end of the old ranks", timeout_s=30)


def cut_another(job):
    """The same of a node without rank 0, which is mended at once: SLURM ends what is left there."""
    node, old = cut(job, which=1)
    job.cluster.mend(node)
    job.wait(lambda: not old(), "the end of the old ranks", timeout_s=30)


def cut(job, which):
    """The node, and a look at those of its ranks that live.

    Not mended before the job runs elsewhere: SLURM may end an attempt that begins on a node as it comes back, as a leftover.
    They see the run's folder all the time, as they would where storage has a network of its own.
    """
    node, restarts = job.nodes()[which], job.restarts()
    before = {pid for pid, _ in job.ranks(node)}
    job.cluster.cut(node)
    job.wait(lambda: job.restarts() > restarts and job.cluster.job_state(job.id) == "RUNNING", "the job begins again")

    def old():
        return before & {pid for pid, _ in job.ranks(node)}

    assert len(old()) == 2, "ranks live on, else this shows nothing"
    return node, old


def no_room_for_a_checkpoint(job):
    ended = len(job.folder.read_attempts())
    with filled(job.run.parent, room=300_000):
        job.wait(lambda: len(job.folder.read_attempts()) > ended, "the end of an attempt")


def no_room_at_all(job):
    """For a line of a log, or for telling how an attempt has ended; one cannot even begin."""
    restarts = job.restarts()
    with filled(job.run.parent):
        job.wait(lambda: job.restarts() >= restarts + 2, "the end of an attempt that could not begin")


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
    yield
    ballast.unlink()
