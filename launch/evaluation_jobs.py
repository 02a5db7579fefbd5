"""Evaluation jobs: one for each checkpoint of a run, as it comes, until training has ended.

One process on one CPU, a job of its own or a terminal on a login node, watches the run's folder and
SLURM's queue, and submits them.  All its state is in that folder, so it may be restarted.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import click

from launch.job import JobSpec
from launch.job_folder import JobFolder
from launch.monitor import training_finished
from launch.requeue import DONE
from launch.script_checks import check_setup
from launch.slurm import job_state
from launch.submit import submit, submit_or_preview
from lpl_pretrain.config.cluster import ClusterProfile
from lpl_pretrain.config.evaluation import check_protocol
from lpl_pretrain.config.load import dump, load_config
from lpl_pretrain.config.protocol import EvaluateConfig
from lpl_pretrain.config.rundir import RunDir, step_name
from lpl_pretrain.errors import ConfigError
from lpl_pretrain.runtime.lease import Lease, is_stale

POLL_S = 10.0
MAX_JOBS = 3
"""Jobs for one checkpoint, where they end without a score and without a reason."""
MAX_ABSENCES = 3
"""A job that squeue does not list this many times in a row has ended."""
MAX_REFUSALS = 30
"""Refusals by sbatch in a row, for SLURM may be down for a while."""
JOB_VARIABLES = ("SLURM_", "SBATCH_", "SRUN_", "PMI")
"""Prefixes of the variables that describe the job around a process."""


@dataclass(frozen=True)
class EvaluationLauncher:
    """Settings of the jobs that evaluate a run's checkpoints.

    Raises ConfigError for a protocol or a profile that could not run.
    """

    protocol: str
    overrides: tuple[str, ...]
    cluster: str
    changes: tuple[str, ...]
    at_most: int = 1
    """Evaluation jobs at a time."""
    nodes: int = 1

    def __post_init__(self) -> None:
        check_protocol(self.settings)
        if self.settings.name == "launch":
            raise ConfigError(
                "name=launch: the folders of jobs have this name: give the protocol another one"
            )
        check_setup(self.profile.setup)

    @cached_property
    def settings(self) -> EvaluateConfig:
        return load_config(EvaluateConfig, self.protocol, self.overrides)

    @cached_property
    def profile(self) -> ClusterProfile:
        return load_config(ClusterProfile, self.cluster, self.changes)

    @property
    def argv(self) -> list[str]:
        """Arguments of `lpl-pretrain evaluate RUN`."""
        return [str(Path(self.protocol).resolve()), *self.overrides]

    def submit_watcher(
        self, run_dir: Path, *, dependency: str | None = None, dry_run: bool = False
    ) -> None:
        """Submit the job of one process that watches the run and submits its evaluations."""
        options = [
            f"--cluster={Path(self.cluster).resolve()}",
            f"--at-most={self.at_most}",
            f"--nodes={self.nodes}",
            *(f"--set={change}" for change in self.changes),
        ]
        argv = ["watch", str(run_dir), *self.argv, *options]
        # outside of a container, where sbatch is
        profile = self.profile.of_one_process().model_copy(update={"container": ()})
        part = f"watch/{self.settings.name}"
        spec = JobSpec("watch", argv, run_dir, 1, dependency, part, config=dump(self.settings))
        submit_or_preview(spec, profile, dry_run=dry_run)

    def watch(self, run_dir: Path) -> None:
        """Watch the run in this process until training has ended and its checkpoints are scored."""
        if shutil.which("squeue") is None:
            raise ConfigError(
                "squeue: not on the PATH: watch from a node of the cluster, or use `lpl-pretrain "
                "evaluate --watch`"
            )
        watcher = EvaluationWatcher(
            RunDir(run_dir),
            self.argv,
            self.settings.name,
            self.profile,
            self.nodes,
            self.at_most,
            dump(self.settings),
        )
        missing = watcher.run()
        if missing:
            click.echo(f"training has ended; without a score: {missing}")
        else:
            click.echo("training has ended and all checkpoints are scored")


@dataclass
class EvaluationWatcher:
    """Submits an evaluation job for each checkpoint that has neither a score nor a job."""

    run_dir: RunDir
    argv: list[str]
    """Arguments of `lpl-pretrain evaluate RUN`: the protocol's file and its overrides."""
    protocol: str
    """The protocol's name."""
    profile: ClusterProfile
    nodes: int
    at_most: int
    config: str = ""
    """Resolved protocol as YAML, which all evaluation jobs use."""
    absences: dict[str, int] = field(default_factory=dict)
    """{job: number of times in a row that squeue did not list it}."""
    submitted: dict[int, int] = field(default_factory=dict)
    """{step: number of jobs submitted for it}."""
    refusals: int = 0
    leases: dict[int, Lease] = field(default_factory=dict)
    """{step: lease that keeps its checkpoint from removal until it is scored}."""

    def run(self, poll_s: float = POLL_S) -> list[int]:
        """Watch until no evaluation can come any more; return the steps without a score."""
        clear_job_environment()
        try:
            while not self.poll():
                time.sleep(poll_s)
        finally:
            self.hold_leases(())
        return self.run_dir.pending_evaluations(self.protocol)

    def poll(self) -> bool:
        """Submit the jobs that are due.  True when training has ended and no job is left."""
        # before the checkpoints are listed: one that is published meanwhile is not missed
        over = self.training_ended()
        pending = self.run_dir.pending_evaluations(self.protocol)
        states = {step: self.state(step) for step in pending}
        self.hold_leases(step for step, state in states.items() if state != "given up")
        free = self.at_most - sum(state == "running" for state in states.values())
        due = [step for step, state in states.items() if state == "unassigned"]
        for step in due[: max(free, 0)]:
            self.submit(step)
        return over and all(state == "given up" for state in states.values())

    def submit(self, step: int) -> None:
        """Raises ConfigError when sbatch has refused MAX_REFUSALS times in a row."""
        try:
            job = submit(self.job_spec(step), self.profile)
        except ConfigError as error:
            self.refusals += 1
            if self.refusals > MAX_REFUSALS:
                raise
            print(f"step {step:,}: {error}", flush=True)
            return
        self.refusals = 0
        self.submitted[step] = self.submitted.get(step, 0) + 1
        print(f"step {step:,}: job {job} scores it", flush=True)

    def job_spec(self, step: int) -> JobSpec:
        argv = ["evaluate", str(self.run_dir.path), *self.argv, f"--step={step}", "--pending"]
        part = f"evaluate/{self.protocol}/{step_name(step)}"
        run_dir = self.run_dir.path
        return JobSpec("evaluate", argv, run_dir, self.nodes, part=part, config=self.config)

    def state(self, step: int) -> str:
        """State of a checkpoint without a score: unassigned, running, or given up."""
        lease = self.run_dir.evaluation_lease(step, self.protocol)
        if lease.is_file() and not is_stale(lease):
            return "running"
        folder = self.job_spec(step).folder
        job = folder.job
        if job is None:
            return "unassigned"
        reason = final_reason(folder, job)
        if reason is None and not self.has_vanished(job):
            return "running"
        if reason in (None, DONE) and self.submitted.get(step, 0) < MAX_JOBS:
            return "unassigned"
        return "given up"

    def training_ended(self) -> bool:
        """Whether all steps are made, or the training job has ended for good."""
        if training_finished(self.run_dir):
            return True
        folder = JobFolder(self.run_dir.path / "launch")
        job = folder.job
        if job is None:
            return False
        return final_reason(folder, job) is not None or self.has_vanished(job)

    def has_vanished(self, job: str) -> bool:
        """Whether squeue answers and has not listed the job MAX_ABSENCES times in a row."""
        self.absences[job] = self.absences.get(job, 0) + 1 if job_state(job) == "" else 0
        return self.absences[job] >= MAX_ABSENCES

    def hold_leases(self, steps: Iterable[int]) -> None:
        """Keep the checkpoints of these steps from removal, and no others."""
        wanted = set(steps)
        for step in wanted - self.leases.keys():
            self.leases[step] = Lease(self.run_dir.queue_lease(step, self.protocol))
            self.leases[step].take()
        for step in self.leases.keys() - wanted:
            self.leases.pop(step).release()


def final_reason(folder: JobFolder, job: str) -> str | None:
    """Reason why a job has ended for good; None while it may be requeued."""
    attempts = [attempt for attempt in folder.read_attempts() if attempt["job"] == job]
    return attempts[-1]["reason"] if attempts and not attempts[-1]["requeued"] else None


def clear_job_environment() -> None:
    """Remove the variables of the job around this process: sbatch would take them for options."""
    for name in list(os.environ):
        if name.startswith(JOB_VARIABLES) and name != "SLURM_CONF":
            del os.environ[name]
