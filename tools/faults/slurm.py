"""Fault series on a real SLURM cluster: one training by `launch` on three nodes, with one fault
after another.  Needs root.
"""

from __future__ import annotations

import os
import random
import signal
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from tests.slurm import faults
from tests.slurm.cluster import Cluster
from tests.slurm.job import EVERY, STRATEGIES, Job, prepare, weights
from tests.slurm.packages import missing
from tests.support.commands import lpl
from tools.faults.campaign import Tally, Violation

LPL_FROM = 60
"""lpl.start_step of the training."""
NAME, STRATEGY = "launch", STRATEGIES["fsdp2"]


def kill_step(job: Job) -> None:
    """Kill all ranks at once, as `scancel` does."""
    job.cluster.run("scancel", "--signal=KILL", job.id)


def suspend_a_rank(job: Job) -> None:
    """Suspend a rank for a second, in which the others wait for it, then kill it."""
    pid = faults.rank_on(job, node=1)
    for number in (signal.SIGSTOP, signal.SIGCONT, signal.SIGKILL):
        os.kill(pid, number)
        time.sleep(0.5)


KINDS: dict[str, Callable[[Job], None]] = {
    "requeue": faults.requeue,
    "preempted": faults.preempt,
    "SIGKILL": faults.kill_a_rank,
    "SIGKILL of all": kill_step,
    "SIGKILL while saving": faults.kill_while_saving,
    "SIGSTOP": suspend_a_rank,
    "node crashed": faults.crash_node_of_rank_0,
    "network cut": faults.disconnect_other_node,
    "disk full": faults.fill_disk_for_checkpoints,
}


def run_launch(seed: int, until: Callable[[Tally], bool], report: Callable[[str], None]) -> Tally:
    """Raises RuntimeError where no cluster can be started."""
    if reason := missing():
        raise RuntimeError(f"series {NAME}: {reason}")
    # a short path, because the path of munge's socket must fit into 107 characters
    with (
        tempfile.TemporaryDirectory(prefix="slurm-") as name,
        tempfile.TemporaryDirectory(prefix="chaos-") as material,
    ):
        cluster, folder = Cluster(Path(name)), Path(material)
        cluster.up()
        try:
            prepare(folder)
            return disturb(cluster, folder, seed, until, report)
        finally:
            cluster.down()


def disturb(
    cluster: Cluster,
    folder: Path,
    seed: int,
    until: Callable[[Tally], bool],
    report: Callable[[str], None],
) -> Tally:
    """Apply faults to one job until `until(tally)`, then compare it with a run without faults."""
    rng, tally, started = random.Random(f"{seed}/{NAME}"), Tally(), time.monotonic()
    run = cluster.disk / "disturbed"
    job = Job(cluster, folder, run, *STRATEGY, "steps=100000", changes=["max_failures=1000"])
    last_kind = "nothing"

    def violated(what: str) -> None:
        replay = f"python -m tools.chaos --series {NAME} --seed {seed}"
        tally.violations.append(
            Violation(NAME, 0, tally.faults.total(), f"{what} (after {last_kind})", [], replay)
        )
        report(f"VIOLATION {tally.violations[-1]}")

    while not until(tally):
        job.wait_steps(rng.randint(1, EVERY + 2))
        last_kind = rng.choice(list(KINDS))
        try:
            job.resumes_after(KINDS[last_kind])
        except AssertionError as error:
            violated(f"does not resume: {str(error)[-2000:]}")
            break
        tally.faults[last_kind] += 1
        tally.starts += 1
        tally.iterations = 1
        tally.seconds = time.monotonic() - started
    for what in problems_at_end(cluster, folder, job, run):
        violated(what)
    tally.recovered = int(not tally.violations)
    return tally


def problems_at_end(cluster: Cluster, folder: Path, job: Job, run: Path) -> list[str]:
    """Problems with the weights, the samples and the processes of the whole run."""
    job.launch("cancel", run)
    job.wait(lambda: cluster.job_state(job.id) in ("FAILED", "CANCELLED", ""), "its end")
    last = max(*job.steps(), LPL_FROM) + EVERY
    whole, other = [*STRATEGY, f"steps={last}"], folder / "alone"
    lpl("train", folder / "train.yaml", f"run_dir={other}", *whole, ranks=4)
    job = Job(cluster, folder, run, *whole)
    job.wait_end()
    problems = []
    if weights(run, last) != weights(other, last):
        problems.append(f"the weights of step {last} are not those of a run without faults")
    audit = lpl("audit", run, check=False)
    if audit.returncode or "none was read twice" not in audit.stdout:
        problems.append(f"audit: {audit.stdout}{audit.stderr}")
    if left := job.ranks():
        problems.append(f"processes remain: {left}")
    hidden = [
        str(path.relative_to(run)) for path in run.rglob(".*") if not path.is_symlink()
    ]  # submitit keeps such links
    if hidden:
        problems.append(f"temporary files remain: {', '.join(hidden[:6])}")
    return problems
