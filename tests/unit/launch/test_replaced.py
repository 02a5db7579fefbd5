"""The end of an attempt that the scheduler had given up: its node was cut off, the job went on elsewhere, and the node is back."""

from __future__ import annotations

import pytest

from launch.after import REPLACED, main
from launch.folder import JobFolder, publish_json
from launch.profile import ClusterProfile


@pytest.fixture
def scheduler(tmp_path, monkeypatch):
    """`scontrol` says what it is told to say, and notes what it is asked."""
    asked = tmp_path / "asked"

    def says(words):
        program = tmp_path / "bin" / "scontrol"
        program.parent.mkdir(exist_ok=True)
        program.write_text(f'#!/bin/sh\necho "$1" >> {asked}\necho "{words}"\n')
        program.chmod(0o755)

    monkeypatch.setenv("PATH", f"{tmp_path}/bin:/usr/bin:/bin")
    return says, lambda: asked.read_text().split()


@pytest.mark.parametrize(
    ("words", "later", "noted", "asks"),
    [("Restarts=0", 1, False, False), ("Restarts=1", 0, True, False), ("Restarts=0", 0, True, True)],
)
def test_only_the_newest_attempt_asks_for_another(tmp_path, monkeypatch, scheduler, words, later, noted, asks):
    """And no more once a later one has begun, as the job's files have it, or when the scheduler was asked for one already."""
    says, asked = scheduler
    says(f"JobId=7 {words} RunTime=00:01:00 TimeLimit=01:00:00")
    folder = JobFolder(tmp_path)
    folder.write_facts({"kind": "train", "run_dir": str(tmp_path), "step": 0, "profile": ClusterProfile().model_dump(mode="json")})
    publish_json(folder.rendezvous("7", later), {})
    publish_json(folder.rendezvous("77", 5), {})
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "0")
    decision = main(folder, 1)
    assert decision.requeue == noted and (decision.reason == REPLACED) != noted
    assert asked() == (["show", "requeue"] if asks else ["show"])
    assert bool(folder.read_attempts()) == noted


def test_a_full_disk_is_no_reason_not_to_go_on(tmp_path, monkeypatch, scheduler):
    """That an attempt has ended cannot be noted: the next one is asked for all the same."""
    says, asked = scheduler
    says("JobId=7 Restarts=0")
    folder = JobFolder(tmp_path)
    folder.write_facts({"kind": "train", "run_dir": str(tmp_path), "step": 0, "profile": ClusterProfile().model_dump(mode="json")})
    folder.attempts.symlink_to("/dev/full")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setattr(JobFolder, "read_attempts", lambda self: [])
    assert main(folder, 1).requeue and asked() == ["show", "requeue"]
