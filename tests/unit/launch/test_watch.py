"""The process that submits an evaluation for each checkpoint, against a made-up scheduler; the real
one is in tests/slurm.
"""

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
from launch.profile import ClusterProfile
from lpl_pretrain.config.load import dump
from lpl_pretrain.config.rundir import MANIFEST, RunDir
from lpl_pretrain.errors import ConfigError
from lpl_pretrain.runtime.lease import Lease
from tests.support.configs import train_config


class Scheduler:
    """Knows jobs until they end."""

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
    found = Scheduler()
    monkeypatch.setattr(evaluation_jobs, "submit", found.submit)
    monkeypatch.setattr(evaluation_jobs, "job_state", found.ask)
    return found


@pytest.fixture
def run_dir(tmp_path):
    """Of a training of 40 steps, job 1, that runs."""
    found = RunDir(tmp_path / "run")
    found.path.mkdir()
    found.config.write_text(dump(train_config(steps=40)))
    (found.path / "launch").mkdir()
    JobFolder(found.path / "launch").write_record({"job": "1"})
    return found


@pytest.fixture
def watching(run_dir, scheduler):
    scheduler.jobs["1"] = None
    found = EvaluationWatcher(
        run_dir, ["quick.yaml"], "quick", ClusterProfile(), nodes=1, at_most=2
    )
    yield found
    found.hold_leases(())


def publish(run_dir, *steps):
    for step in steps:
        run_dir.checkpoint(step).mkdir(parents=True)
        (run_dir.checkpoint(step) / MANIFEST).touch()


def score(run_dir, step):
    path = run_dir.evaluation(step, "quick")
    path.parent.mkdir(parents=True, exist_ok=True)
    entry = {"metric": "fid", "value": 1.0, "weights": "ema", "guidance_scale": 1.0}
    record = {"format_version": 2, "step": step, "protocol": {"name": "quick"}, "results": [entry]}
    path.write_text(json.dumps(record))


def test_each_checkpoint_has_one_job_and_no_more_than_asked_at_a_time(watching, run_dir, scheduler):
    assert not watching.poll() and scheduler.specs == [], "nothing is there yet"
    publish(run_dir, 10, 20, 30)
    for _ in range(3):
        assert not watching.poll()
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
    watching.poll()
    assert scheduler.steps == [10, 20, 30]
    publish(run_dir, 40)
    for step, job in ((20, "101"), (30, "102")):
        score(run_dir, step)
        scheduler.end(job)
    assert not watching.poll() and scheduler.steps == [10, 20, 30, 40], (
        "training has ended, but not all is scored"
    )
    score(run_dir, 40)
    assert watching.poll()


def test_one_that_begins_again_knows_what_was_submitted(watching, run_dir, scheduler):
    publish(run_dir, 10, 20)
    watching.poll()
    watching.hold_leases(())
    again = EvaluationWatcher(run_dir, watching.argv, "quick", ClusterProfile(), nodes=1, at_most=5)
    assert not again.poll() and scheduler.steps == [10, 20]
    again.hold_leases(())


@pytest.mark.parametrize("how", ["given up", "cancelled", "lost"])
def test_training_that_goes_no_further_ends_it(watching, run_dir, scheduler, how):
    publish(run_dir, 10)
    score(run_dir, 10)
    assert not watching.poll()
    folder = JobFolder(run_dir.path / "launch")
    folder.append_attempt({"job": "1", "reason": "stopped in time", "requeued": True})
    del scheduler.jobs["1"]
    assert not watching.poll(), "an attempt that goes on"
    if how == "lost":
        assert [watching.poll() for _ in range(MAX_ABSENCES - 1)] == [False] * (
            MAX_ABSENCES - 2
        ) + [True]
        return
    folder.append_attempt({"job": "1", "reason": how, "requeued": False})
    assert watching.poll()
    folder.write_record({"job": "2"})
    scheduler.jobs["2"] = None
    assert not watching.poll(), "resumed: another job, of which nothing has ended"


def test_a_scheduler_that_does_not_answer_says_nothing(watching, run_dir, scheduler):
    publish(run_dir, 10)
    watching.poll()
    scheduler.answers = False
    for _ in range(2 * MAX_ABSENCES):
        assert not watching.poll()
    assert scheduler.steps == [10]
    scheduler.answers, scheduler.refuses = True, True
    publish(run_dir, 20)
    with pytest.raises(ConfigError, match="refused"):
        for _ in range(MAX_REFUSALS + 1):
            assert not watching.poll()
    scheduler.refuses = False
    watching.poll()
    assert scheduler.steps == [10, 20] and watching.refusals == 0


@pytest.mark.parametrize(
    ("reason", "jobs"),
    [("done", MAX_JOBS), (None, MAX_JOBS), ("failed with status 1", 1), ("cancelled", 1)],
)
def test_jobs_that_end_without_a_score(watching, run_dir, scheduler, reason, jobs):
    """Without a word they are tried again, a few times; what was decided stays so, and the others
    are scored.
    """
    publish(run_dir, 40)
    for _ in range(MAX_JOBS * (MAX_ABSENCES + 2)):
        over = watching.poll()
        for job in [job for job, spec in scheduler.jobs.items() if spec is not None]:
            if reason is None:
                del scheduler.jobs[job]
            else:
                scheduler.end(job, reason)
    assert scheduler.steps == [40] * jobs and over
    assert watching.leases == {}, "not kept any longer"


def test_what_another_evaluator_works_on_is_left_to_it(watching, run_dir, scheduler):
    publish(run_dir, 10)
    with Lease(run_dir.evaluation_lease(10, "quick")):
        assert not watching.poll() and scheduler.specs == []
    watching.poll()
    assert scheduler.steps == [10]


def test_waiting_checkpoints_are_kept_from_retention(watching, run_dir, scheduler):
    """As long as they wait: their leases are those that checkpoint/manager.py asks for."""
    publish(run_dir, 10, 20, 30)
    watching.poll()
    assert sorted(step for step, _ in run_dir.evaluation_leases()) == [10, 20, 30]
    score(run_dir, 20)
    watching.poll()
    assert sorted(step for step, _ in run_dir.evaluation_leases()) == [10, 30]


def test_the_job_around_it_is_forgotten(monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SBATCH_PARTITION", "gpu")
    monkeypatch.setenv("SLURM_CONF", "/etc/slurm.conf")
    clear_job_environment()

    assert (
        "SLURM_JOB_ID" not in os.environ
        and "SBATCH_PARTITION" not in os.environ
        and os.environ["SLURM_CONF"]
    )
