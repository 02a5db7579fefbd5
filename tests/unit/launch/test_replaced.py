"""The end of an attempt that the scheduler had given up: its node was cut off, the job went on
elsewhere, and the node is back.
"""

from __future__ import annotations

import pytest

from launch.epilog import SUPERSEDED, main
from launch.job_folder import NO_RECORD, JobFolder
from launch.profile import ClusterProfile
from lpl_pretrain.runtime.atomic import atomic_write_json


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
    ("words", "later", "noted", "asks"),
    [
        ("Restarts=0", 1, False, False),
        ("Restarts=1", 0, True, False),
        ("Restarts=0", 0, True, True),
    ],
)
def test_only_the_newest_attempt_asks_for_another(
    tmp_path, monkeypatch, scheduler, words, later, noted, asks
):
    """And no more once a later one has begun, as the job's files have it, or when the scheduler was
    asked for one already.
    """
    says, asked = scheduler
    says(f"JobId=7 {words} RunTime=00:01:00 TimeLimit=01:00:00")
    folder = JobFolder(tmp_path)
    write_record(folder, ClusterProfile())
    atomic_write_json(folder.rendezvous("7", later), {})
    atomic_write_json(folder.rendezvous("77", 5), {})
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "0")
    decision = main(folder, 1)
    assert decision.requeue == noted and (decision.reason == SUPERSEDED) != noted
    assert asked() == (["show", "requeue"] if asks else ["show"])
    assert bool(folder.read_attempts()) == noted


def test_attempts_that_left_no_word_are_told(tmp_path):
    folder = JobFolder(tmp_path)
    for attempt in (1, 3):
        atomic_write_json(folder.rendezvous("7", attempt), {})
    for attempt, job in ((1, "7"), (2, "6")):
        folder.append_attempt(
            {"job": job, "attempt": attempt, "reason": "stopped in time", "requeued": True}
        )
    assert [attempt["reason"] for attempt in folder.history("7")] == [
        NO_RECORD,
        "stopped in time",
        NO_RECORD,
    ]
    assert folder.history("8") == folder.history(None) == []


@pytest.mark.parametrize(
    ("attempt", "begun", "goes_on"),
    [(3, [0, 1, 2], True), (3, [0, 1], True), (3, [0], False), (9, [0, 8], False)],
)
def test_attempts_that_could_not_begin_are_failures(
    tmp_path, monkeypatch, scheduler, attempt, begun, goes_on
):
    """Those that began and left no word were lost with their nodes, or preempted by force: these
    may be many.
    """
    says, _ = scheduler
    says(f"JobId=7 Restarts={attempt}")
    folder = JobFolder(tmp_path)
    write_record(folder, ClusterProfile(max_failures=2))
    for number in begun:
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
    assert decision.requeue == goes_on and decision.reason.endswith(
        f"{attempt - len(begun) + 1} of 2 in a row"
    )


def test_a_full_disk_is_no_reason_not_to_go_on(tmp_path, monkeypatch, scheduler):
    """That an attempt has ended cannot be noted: the next one is asked for all the same."""
    says, asked = scheduler
    says("JobId=7 Restarts=0")
    folder = JobFolder(tmp_path)
    write_record(folder, ClusterProfile())
    folder.attempts.symlink_to("/dev/full")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setattr(JobFolder, "read_attempts", lambda self: [])
    assert main(folder, 1).requeue and asked() == ["show", "requeue"]
