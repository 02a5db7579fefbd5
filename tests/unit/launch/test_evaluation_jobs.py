"""The process that submits an evaluation for each checkpoint, with a simulated SLURM."""

from __future__ import annotations

import json
import os

import pytest

from launch import evaluation_jobs
from launch.evaluation_jobs import (
    MAX_ABSENCES,
    MAX_JOBS,
    MAX_REFUSALS,
    EvaluationWatcher,
    clear_job_environment,
)
from launch.job_folder import JobFolder
from lpl_pretrain.config.cluster import ClusterProfile
from lpl_pretrain.config.load import dump
from lpl_pretrain.config.rundir import MANIFEST, RunDir
from lpl_pretrain.errors import ConfigError
from lpl_pretrain.runtime.lease import Lease
from tests.support.configs import train_config


class Scheduler:
    """Simulated SLURM, which knows jobs until they end."""

    def __init__(self):
        self.jobs, self.specs, self.answers, self.refuses = {}, [], True, False

    def submit(self, spec, profile):
        if self.refuses:
            raise ConfigError("sbatch refused this job")
        job = str(100 + len(self.specs))
        spec.folder.path.mkdir(parents=True, exist_ok=True)
        spec.folder.write_record({"job": job})
        self.specs.append(spec)
        self.jobs[job] = spec
        return job

    def ask(self, job):
        return ("RUNNING" if job in self.jobs else "") if self.answers else None

    def end(self, job, reason="done"):
        folder = self.jobs.pop(job).folder
        folder.append_attempt({"job": job, "reason": reason, "requeued": False})

    @property
    def steps(self):
        return [int(spec.folder.path.name.removeprefix("step_")) for spec in self.specs]


@pytest.fixture
def scheduler(monkeypatch):
    fixture = Scheduler()
    monkeypatch.setattr(evaluation_jobs, "submit", fixture.submit)
    monkeypatch.setattr(evaluation_jobs, "job_state", fixture.ask)
    return fixture


@pytest.fixture
def run_dir(tmp_path):
    """Run of 40 steps, trained by job 1, which is running."""
    fixture = RunDir(tmp_path / "run")
    fixture.path.mkdir()
    fixture.config.write_text(dump(train_config(steps=40)))
    (fixture.path / "launch").mkdir()
    JobFolder(fixture.path / "launch").write_record({"job": "1"})
    return fixture


@pytest.fixture
def watcher(run_dir, scheduler):
    scheduler.jobs["1"] = None
    fixture = EvaluationWatcher(
        run_dir, ["quick.yaml"], "quick", ClusterProfile(), nodes=1, at_most=2
    )
    yield fixture
    fixture.hold_leases(())


def publish(run_dir, *steps):
    for step in steps:
        run_dir.checkpoint(step).mkdir(parents=True)
        (run_dir.checkpoint(step) / MANIFEST).write_text('{"files": {}}')


def score(run_dir, step):
    path = run_dir.evaluation(step, "quick")
    path.parent.mkdir(parents=True, exist_ok=True)
    entry = {"metric": "fid", "value": 1.0, "weights": "ema", "guidance_scale": 1.0}
    record = {"format_version": 2, "step": step, "protocol": {"name": "quick"}, "results": [entry]}
    path.write_text(json.dumps(record))


def test_one_job_for_each_checkpoint_and_at_most_two_at_a_time(watcher, run_dir, scheduler):
    assert not watcher.poll() and scheduler.specs == [], "there is no checkpoint yet"
    publish(run_dir, 10, 20, 30)
    for _ in range(3):
        assert not watcher.poll()
    assert scheduler.steps == [10, 20], "two at most"
    assert scheduler.specs[0].argv == [
        "evaluate",
        str(run_dir.path),
        "quick.yaml",
        "--step=10",
        "--pending",
    ]
    score(run_dir, 10)
    scheduler.end("100")
    watcher.poll()
    assert scheduler.steps == [10, 20, 30]
    publish(run_dir, 40)
    for step, job in ((20, "101"), (30, "102")):
        score(run_dir, step)
        scheduler.end(job)
    assert not watcher.poll() and scheduler.steps == [10, 20, 30, 40], (
        "training has ended, but not all checkpoints are scored"
    )
    score(run_dir, 40)
    assert watcher.poll()


def test_restarted_watcher_knows_the_submitted_jobs(watcher, run_dir, scheduler):
    publish(run_dir, 10, 20)
    watcher.poll()
    watcher.hold_leases(())
    again = EvaluationWatcher(run_dir, watcher.argv, "quick", ClusterProfile(), nodes=1, at_most=5)
    assert not again.poll() and scheduler.steps == [10, 20]
    again.hold_leases(())


@pytest.mark.parametrize("how", ["given up", "cancelled", "lost"])
def test_watcher_ends_when_training_has_ended(watcher, run_dir, scheduler, how):
    publish(run_dir, 10)
    score(run_dir, 10)
    assert not watcher.poll()
    folder = JobFolder(run_dir.path / "launch")
    folder.append_attempt({"job": "1", "reason": "stopped in time", "requeued": True})
    del scheduler.jobs["1"]
    assert not watcher.poll(), "the attempt is requeued"
    if how == "lost":
        assert [watcher.poll() for _ in range(MAX_ABSENCES - 1)] == [False] * (MAX_ABSENCES - 2) + [
            True
        ]
        return
    folder.append_attempt({"job": "1", "reason": how, "requeued": False})
    assert watcher.poll()
    folder.write_record({"job": "2"})
    scheduler.jobs["2"] = None
    assert not watcher.poll(), "resumed: the new job has not ended"


def test_silent_slurm_says_nothing_about_jobs(watcher, run_dir, scheduler):
    publish(run_dir, 10)
    watcher.poll()
    scheduler.answers = False
    for _ in range(2 * MAX_ABSENCES):
        assert not watcher.poll()
    assert scheduler.steps == [10]
    scheduler.answers, scheduler.refuses = True, True
    publish(run_dir, 20)
    with pytest.raises(ConfigError, match="refused"):
        for _ in range(MAX_REFUSALS + 1):
            assert not watcher.poll()
    scheduler.refuses = False
    watcher.poll()
    assert scheduler.steps == [10, 20] and watcher.refusals == 0


@pytest.mark.parametrize(
    ("reason", "jobs"),
    [("done", MAX_JOBS), (None, MAX_JOBS), ("failed with status 1", 1), ("cancelled", 1)],
)
def test_jobs_that_end_without_a_score_are_retried(watcher, run_dir, scheduler, reason, jobs):
    """Jobs without a recorded reason are retried a few times; jobs that failed are not."""
    publish(run_dir, 40)
    for _ in range(MAX_JOBS * (MAX_ABSENCES + 2)):
        over = watcher.poll()
        for job in [job for job, spec in scheduler.jobs.items() if spec is not None]:
            if reason is None:
                del scheduler.jobs[job]
            else:
                scheduler.end(job, reason)
    assert scheduler.steps == [40] * jobs and over
    assert watcher.leases == {}, "no lease is held any longer"


def test_checkpoint_of_another_evaluator_is_skipped(watcher, run_dir, scheduler):
    publish(run_dir, 10)
    with Lease(run_dir.evaluation_lease(10, "quick")):
        assert not watcher.poll() and scheduler.specs == []
    watcher.poll()
    assert scheduler.steps == [10]


def test_waiting_checkpoints_are_kept_from_removal(watcher, run_dir, scheduler):
    """The leases of waiting checkpoints are those that checkpoint/manager.py checks."""
    publish(run_dir, 10, 20, 30)
    watcher.poll()
    assert sorted(step for step, _ in run_dir.evaluation_leases()) == [10, 20, 30]
    score(run_dir, 20)
    watcher.poll()
    assert sorted(step for step, _ in run_dir.evaluation_leases()) == [10, 30]


def test_variables_of_the_surrounding_job_are_removed(monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SBATCH_PARTITION", "gpu")
    monkeypatch.setenv("SLURM_CONF", "/etc/slurm.conf")
    clear_job_environment()

    assert (
        "SLURM_JOB_ID" not in os.environ
        and "SBATCH_PARTITION" not in os.environ
        and os.environ["SLURM_CONF"]
    )
