"""What becomes of a job whose preflight found a node unfit; the scheduler's commands are scripts
that say what they were asked.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from launch.epilog import main
from launch.exclude import unfit_nodes
from launch.job_folder import JobFolder
from launch.profile import ClusterProfile
from launch.requeue import AttemptResult, Decision, decide
from lpl_pretrain.config.rundir import RunDir

SHOWN = "JobId=7 JobState=RUNNING ExcNodeList={excluded} RunTime=00:00:09 TimeLimit=01:00:00"
FINDING = {
    "check": "data",
    "host": "b",
    "ranks": [3],
    "found": "a\n  b",
    "wanted": "c",
    "remedy": "d",
    "fault": "node",
}
STATUSES = [(0, 0, "n1"), (2, 75, "n2"), (3, 75, "n2"), (1, 1, "n1")]


@pytest.fixture
def job(tmp_path, monkeypatch):
    """(folder, what the scheduler was asked, a way to set what it answers)."""
    run, programs, told = RunDir(tmp_path / "run"), tmp_path / "bin", tmp_path / "told"
    run.path.mkdir()
    programs.mkdir()
    run.preflight.write_text(
        json.dumps({"findings": [FINDING, {**FINDING, "fault": "none", "check": "clock"}]})
    )
    folder = JobFolder(run.path / "launch")
    profile = ClusterProfile(exclude=("n9",)).model_dump(mode="json")
    folder.write_record(
        {
            "job": "7",
            "kind": "train",
            "argv": ["train", "x.yaml"],
            "run_dir": str(run.path),
            "nodes": 2,
            "step": 0,
            "profile": profile,
        }
    )
    for name, value in {"SLURM_JOB_ID": "7", "PATH": f"{programs}:{os.environ['PATH']}"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("launch.requeue.signal.signal", lambda *arguments: None)

    def answers(excluded="(null)", sbatch="exit 0"):
        shown = SHOWN.format(excluded=excluded)
        scripts = {"scontrol": f'[ "$1" != show ] || {{ echo "{shown}"; exit; }}', "sbatch": ":"}
        for name, line in scripts.items():
            line += f'\necho "{name} $*" >> {told}\n{sbatch if name == "sbatch" else ""}\n'
            (programs / name).write_text(f"#!/bin/sh\n{line}")
            (programs / name).chmod(0o755)

    answers()
    return folder, lambda: told.read_text().splitlines() if told.exists() else [], answers


def note(folder, statuses):
    for rank, status, host in statuses:
        folder.write_exit("7", 0, rank, status, host, stopped=False)


@pytest.mark.parametrize("direction", [1, -1])
def test_an_unfit_node_is_found_whatever_ended_first(job, direction):
    """The one that was killed because of it too: srun ends the others, and they may be faster."""
    folder, told, _ = job
    note(folder, STATUSES[::direction])
    decision = main(folder, 75)
    assert decision == Decision(True, "n2 is unfit: data: found a b, wanted c, 1 of 3 in a row")
    (attempt,) = folder.read_attempts()
    assert attempt["host"] == "n2" and attempt["status"] == 75
    test_only = f"sbatch --test-only --exclude=n9,n2 {folder.path}/7_submission.sh"
    assert told() == [
        test_only,
        "scontrol requeue 7",
        "scontrol update jobid=7 ExcNodeList=n9,n2",
    ], "in this order: see requeue"
    assert ClusterProfile.model_validate(folder.read_raw_record()["profile"]).exclude == (
        "n9",
        "n2",
    ), "for `launch resume`"


def test_has_teeth(job):
    """A rank that fails in another way excludes nothing."""
    folder, told, _ = job
    note(folder, [(rank, status and 1, host) for rank, status, host in STATUSES])
    assert main(folder, 1) == Decision(True, "failed with status 1, 1 of 3 in a row")
    assert told() == ["scontrol requeue 7"]


def test_what_a_person_has_excluded_since_stays_so(job):
    folder, told, answers = job
    answers(excluded="n[7-9]")
    note(folder, STATUSES)
    main(folder, 75)
    assert told()[-1] == "scontrol update jobid=7 ExcNodeList=n[7-9],n2"


def test_a_job_that_could_never_start_ends_with_the_schedulers_words(job):
    folder, told, answers = job
    answers(
        sbatch="echo 'allocation failure: Requested node configuration is not available' "
        ">&2; exit 1"
    )
    note(folder, STATUSES)
    decision = main(folder, 75)
    assert not decision.requeue and decision.reason.endswith(
        "without it sbatch says: allocation failure: Requested node configuration is not available"
    )
    assert not [line for line in told() if line.startswith("scontrol")]
    assert folder.read_raw_record()["profile"]["exclude"] == ["n9"], (
        "a later `launch resume` is not refused for it"
    )


@pytest.mark.parametrize(
    ("policy", "earlier", "wanted"),
    [
        ("exclude", 0, Decision(True, "n2 is unfit: why, 1 of 2 in a row")),
        ("exclude", 2, Decision(False, "n2 is unfit: why, 3 of 2 in a row")),
        ("stop", 0, Decision(False, "n2 is unfit: why")),
    ],
)
def test_whether_a_job_goes_on_without_a_node(policy, earlier, wanted):
    ending = AttemptResult(
        75, finished=False, cancelled=False, timed_out=False, steps=(5, 5), unfit={"n2": "why"}
    )
    attempts = [{"status": 75, "steps": [5, 5], "reason": "n1 is unfit"}] * earlier
    assert decide(ending, attempts, max_timeouts=1, max_failures=2, on_unfit_node=policy) == wanted


def test_a_rank_that_says_so_is_believed_without_a_report(tmp_path):
    exits = [{"rank": 2, "status": 75, "host": "n2"}, {"rank": 0, "status": 1, "host": "n1"}]
    assert unfit_nodes(exits, RunDir(Path(tmp_path))) == {"n2": "see the log"}
