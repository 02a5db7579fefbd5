"""The epilog: later attempts, lost attempts, full disks, tasks of an array."""

from __future__ import annotations

import subprocess
import sys

import pytest

from launch.epilog import SUPERSEDED, main
from launch.job_folder import JobFolder
from lpl_pretrain.config.cluster import ClusterProfile
from lpl_pretrain.runtime.atomic import atomic_write_json
from tests.support.commands import ROOT


@pytest.fixture
def scheduler(tmp_path, monkeypatch):
    """A `scontrol` with a settable output, which logs its subcommands."""
    commands = tmp_path / "commands"

    def set_output(output):
        program = tmp_path / "bin" / "scontrol"
        program.parent.mkdir(exist_ok=True)
        program.write_text(f'#!/bin/sh\necho "$1" >> {commands}\necho "{output}"\n')
        program.chmod(0o755)

    monkeypatch.setenv("PATH", f"{tmp_path}/bin:/usr/bin:/bin")
    return set_output, lambda: commands.read_text().split()


def write_record(folder, profile):
    folder.write_record(
        {
            "job": "7",
            "kind": "train",
            "argv": ["train", "x.yaml"],
            "run_dir": str(folder.path),
            "nodes": 1,
            "step": 0,
            "profile": profile.model_dump(mode="json"),
        }
    )


@pytest.mark.parametrize(
    ("output", "later", "recorded", "requeues"),
    [
        ("Restarts=0", 1, False, False),
        ("Restarts=1", 0, True, False),
        ("Restarts=0", 0, True, True),
    ],
)
def test_only_the_newest_attempt_requeues(
    tmp_path, monkeypatch, scheduler, output, later, recorded, requeues
):
    """An attempt that is followed by another one, or that SLURM has requeued, does not."""
    set_output, commands = scheduler
    set_output(f"JobId=7 {output} RunTime=00:01:00 TimeLimit=01:00:00")
    folder = JobFolder(tmp_path)
    write_record(folder, ClusterProfile())
    atomic_write_json(folder.rendezvous("7", later), {})
    atomic_write_json(folder.rendezvous("77", 5), {})
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "0")
    decision = main(folder, 1)
    assert decision.requeue == recorded and (decision.reason == SUPERSEDED) != recorded
    assert commands() == (["show", "requeue"] if requeues else ["show"])
    assert bool(folder.read_attempts()) == recorded


@pytest.mark.parametrize(
    ("attempt", "started", "requeues"),
    [(3, [0, 1, 2], True), (3, [0, 1], True), (3, [0], False), (9, [0, 8], False)],
)
def test_attempts_that_failed_to_start_count_as_failures(
    tmp_path, monkeypatch, scheduler, attempt, started, requeues
):
    """Attempts that started and left no record, lost with a node or preempted, do not count."""
    set_output, _ = scheduler
    set_output(f"JobId=7 Restarts={attempt}")
    folder = JobFolder(tmp_path)
    write_record(folder, ClusterProfile(max_failures=2))
    for number in started:
        atomic_write_json(folder.rendezvous("7", number), {})
    folder.append_attempt(
        {
            "job": "7",
            "attempt": 0,
            "status": 0,
            "steps": [0, 0],
            "reason": "stopped in time",
            "requeued": True,
        }
    )
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_RESTART_COUNT", str(attempt))
    decision = main(folder, 1)
    assert decision.requeue == requeues and decision.reason.endswith(
        f"{attempt - len(started) + 1} of 2 in a row"
    )


def test_full_disk_does_not_prevent_a_requeue(tmp_path, monkeypatch, scheduler):
    """The job is requeued although its attempt cannot be recorded."""
    set_output, commands = scheduler
    set_output("JobId=7 Restarts=0")
    folder = JobFolder(tmp_path)
    write_record(folder, ClusterProfile())
    folder.attempts.symlink_to("/dev/full")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setattr(JobFolder, "read_attempts", lambda self: [])
    assert main(folder, 1).requeue and commands() == ["show", "requeue"]


def test_damaged_record_gives_one_line_and_the_status_of_srun(tmp_path):
    (tmp_path / "launch").mkdir()
    (tmp_path / "launch" / "job.json").write_text("{")
    command = [sys.executable, "-m", "launch.epilog", str(tmp_path / "launch"), "3"]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (
        ended.returncode == 3
        and "job.json: cannot be read" in ended.stdout
        and "Traceback" not in ended.stderr
    )
