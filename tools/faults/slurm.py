"""The series on a real scheduler: one training by `launch` on three nodes in namespaces, disturbed
over and over (needs root).
"""

from __future__ import annotations

import os
import random
import signal
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from tests.slurm import troubles
from tests.slurm.cluster import Cluster
from tests.slurm.job import EVERY, STRATEGIES, Job, prepare, weights
from tests.slurm.packages import missing
from tests.support.commands import lpl
from tools.faults.campaign import Tally, Violation

LPL_FROM = 60
"""lpl.start_step of the training."""
NAME, STRATEGY = "launch", STRATEGIES["fsdp2"]


def kill_step(job: Job) -> None:
    """All ranks at once, as a person does it."""
    job.cluster.run("scancel", "--signal=KILL", job.id)


def suspend_a_rank(job: Job) -> None:
    """For a second, in which the others wait for it; and then it is killed."""
    pid = troubles.one_of(job, which=1)
    for number in (signal.SIGSTOP, signal.SIGCONT, signal.SIGKILL):
        os.kill(pid, number)
        time.sleep(0.5)


KINDS: dict[str, Callable[[Job], None]] = {
    "requeue": troubles.requeue,
    "preempted": troubles.preempt,
    "SIGKILL": troubles.kill_a_rank,
    "SIGKILL of all": kill_step,
    "SIGKILL while saving": troubles.kill_while_saving,
    "SIGSTOP": suspend_a_rank,
    "node crashed": troubles.crash_rank_0,
    "network cut": troubles.cut_another,
    "disk full": troubles.no_room_for_a_checkpoint,
}


def run_launch(seed: int, until: Callable[[Tally], bool], tell: Callable[[str], None]) -> Tally:
    """Raises RuntimeError where no cluster can be brought up."""
    if reason := missing():
        raise RuntimeError(f"series {NAME}: {reason}")
    # not below a long name: that of munge's socket must fit into 107 characters
    with (
        tempfile.TemporaryDirectory(prefix="slurm-") as name,
        tempfile.TemporaryDirectory(prefix="chaos-") as material,
    ):
        cluster, folder = Cluster(Path(name)), Path(material)
        cluster.up()
        try:
            prepare(folder)
            return disturb(cluster, folder, seed, until, tell)
        finally:
            cluster.down()


def disturb(
    cluster: Cluster,
    folder: Path,
    seed: int,
    until: Callable[[Tally], bool],
    tell: Callable[[str], None],
) -> Tally:
    """One job, ended once there were enough faults; it then goes on to its end, as one that is left
    alone.
    """
    rng, tally, started = random.Random(f"{seed}/{NAME}"), Tally(), time.monotonic()
    run = cluster.disk / "disturbed"
    job = Job(cluster, folder, run, *STRATEGY, "steps=100000", changes=["max_failures=1000"])
    last_kind = "nothing"

    def violated(what: str) -> None:
        replay = f"python -m tools.chaos --series {NAME} --seed {seed}"
        tally.violations.append(
            Violation(NAME, 0, tally.faults.total(), f"{what} (after {last_kind})", [], replay)
        )
        tell(f"VIOLATION {tally.violations[-1]}")

    while not until(tally):
        job.wait_steps(rng.randint(1, EVERY + 2))
        last_kind = rng.choice(list(KINDS))
        try:
            job.goes_on_after(KINDS[last_kind])
        except AssertionError as error:
            violated(f"does not go on: {str(error)[-2000:]}")
            break
        tally.faults[last_kind] += 1
        tally.starts += 1
        tally.iterations = 1
        tally.seconds = time.monotonic() - started
    for what in ending(cluster, folder, job, run):
        violated(what)
    tally.recovered = int(not tally.violations)
    return tally


def ending(cluster: Cluster, folder: Path, job: Job, run: Path) -> list[str]:
    """What is wrong with the weights, the samples and the processes of the whole run."""
    job.launch("cancel", run)
    job.wait(lambda: cluster.job_state(job.id) in ("FAILED", "CANCELLED", ""), "its end")
    last = max(*job.steps(), LPL_FROM) + EVERY
    whole, other = [*STRATEGY, f"steps={last}"], folder / "alone"
    lpl("train", folder / "train.yaml", f"run_dir={other}", *whole, ranks=4)
    job = Job(cluster, folder, run, *whole)
    job.wait_end()
    problems = []
    if weights(run, last) != weights(other, last):
        problems.append(f"the weights of step {last} are not those of a run left alone")
    audit = lpl("audit", run, check=False)
    if audit.returncode or "none was seen twice" not in audit.stdout:
        problems.append(f"audit: {audit.stdout}{audit.stderr}")
    if left := job.ranks():
        problems.append(f"processes are left: {left}")
    hidden = [
        str(path.relative_to(run)) for path in run.rglob(".*") if not path.is_symlink()
    ]  # submitit keeps such links
    if hidden:
        problems.append(f"temporaries are left: {', '.join(hidden[:6])}")
    return problems
