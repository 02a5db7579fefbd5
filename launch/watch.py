"""Evaluation jobs as checkpoints arrive: one for each, at most so many at a time, until no more can
come.

One process of one CPU that looks at files and asks the scheduler: a job of its own, or a terminal
on a login node.  What it knows is in the run's folder, so it may die and begin again.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from dataclasses import dataclass, field

from launch.epilog import DONE
from launch.folder import JobFolder
from launch.job_spec import JobSpec
from launch.profile import ClusterProfile
from launch.status import job_state, training_finished
from launch.submit import submit
from lpl_pretrain.config.rundir import RunDir, step_name
from lpl_pretrain.errors import ConfigError
from lpl_pretrain.runtime.lease import Lease, is_stale

POLL_S = 10.0
MOST_JOBS = 3
"""For one checkpoint, when a job has ended without its score and does not say why."""
ABSENCES = 3
"""So many looks in a row without a trace of a job mean that it is gone."""
MOST_REFUSALS = 30
"""In a row, by a scheduler that may be away for a while."""
OF_A_JOB = ("SLURM_", "SBATCH_", "SRUN_", "PMI")


@dataclass
class EvaluationWatcher:
    run_dir: RunDir
    argv: list[str]
    """Behind `lpl-pretrain evaluate RUN`: the protocol's file and its overrides."""
    protocol: str
    """Its name."""
    profile: ClusterProfile
    nodes: int
    at_most: int
    config: str = ""
    """The resolved protocol as YAML, which all evaluation jobs use."""
    absences: dict[str, int] = field(default_factory=dict)
    submitted: dict[int, int] = field(default_factory=dict)
    refusals: int = 0
    leases: dict[int, Lease] = field(default_factory=dict)

    def run(self, poll_s: float = POLL_S) -> list[int]:
        """Returns when training has ended and no evaluation can come any more: the steps that have
        no score.
        """
        clear_job_environment()
        try:
            while not self.look():
                time.sleep(poll_s)
        finally:
            self.keep(())
        return self.run_dir.pending_evaluations(self.protocol)

    def look(self) -> bool:
        """Submits what is due; True when that was all."""
        over = (
            self.training_finished()
        )  # asked first: a checkpoint that comes meanwhile is seen below
        states = {
            step: self.state(step) for step in self.run_dir.pending_evaluations(self.protocol)
        }
        self.keep(step for step, state in states.items() if state != "given up")
        free = self.at_most - sum(state == "alive" for state in states.values())
        for step in [step for step, state in states.items() if state == "none"][: max(free, 0)]:
            self.submit(step)
        return over and all(state == "given up" for state in states.values())

    def submit(self, step: int) -> None:
        """Raises ConfigError when the scheduler has refused for too long."""
        try:
            job = submit(self.spec(step), self.profile)
        except ConfigError as refusal:
            self.refusals += 1
            if self.refusals > MOST_REFUSALS:
                raise
            print(f"step {step:,}: {refusal}", flush=True)
        else:
            self.refusals, self.submitted[step] = 0, self.submitted.get(step, 0) + 1
            print(f"step {step:,}: job {job} scores it", flush=True)

    def spec(self, step: int) -> JobSpec:
        argv = ["evaluate", str(self.run_dir.path), *self.argv, f"--step={step}", "--pending"]
        part = f"evaluate/{self.protocol}/{step_name(step)}"
        return JobSpec(
            "evaluate", argv, self.run_dir.path, self.nodes, part=part, config=self.config
        )

    def state(self, step: int) -> str:
        """Of a checkpoint without a score: none (nobody works on it), alive, or given up."""
        lease, folder = self.run_dir.evaluation_lease(step, self.protocol), self.spec(step).folder
        if lease.is_file() and not is_stale(lease):
            return "alive"
        job = folder.job
        if job is None:
            return "none"
        ended = final_reason(folder, job)
        if ended is None and not self.is_gone(job):
            return "alive"
        if ended in (None, DONE) and self.submitted.get(step, 0) < MOST_JOBS:
            return "none"
        return "given up"

    def training_finished(self) -> bool:
        """All steps are made, or its job went no further."""
        if training_finished(self.run_dir):
            return True
        folder = JobFolder(self.run_dir.path / "launch")
        job = folder.job
        return job is not None and (final_reason(folder, job) is not None or self.is_gone(job))

    def is_gone(self, job: str) -> bool:
        """The scheduler answers, and does not know it any more."""
        self.absences[job] = self.absences.get(job, 0) + 1 if job_state(job) == "" else 0
        return self.absences[job] >= ABSENCES

    def keep(self, steps: Iterable[int]) -> None:
        """Retention leaves these checkpoints, which wait for their scores, and no others of before."""
        wanted = set(steps)
        for step in wanted - self.leases.keys():
            self.leases[step] = Lease(self.run_dir.queue_lease(step, self.protocol))
            self.leases[step].take()
        for step in self.leases.keys() - wanted:
            self.leases.pop(step).release()


def final_reason(folder: JobFolder, job: str) -> str | None:
    """Why a job has ended for good; None as long as it, or the scheduler, may go on with it."""
    mine = [attempt for attempt in folder.read_attempts() if attempt["job"] == job]
    return mine[-1]["reason"] if mine and not mine[-1]["requeued"] else None


def clear_job_environment() -> None:
    """What the environment says of the job around us would be taken for options of those that we
    submit.
    """
    for name in list(os.environ):
        if name.startswith(OF_A_JOB) and name != "SLURM_CONF":
            del os.environ[name]
