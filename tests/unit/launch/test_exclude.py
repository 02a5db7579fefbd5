"""Jobs whose preflight found a node unfit; SLURM's commands are scripts with a log."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from launch.epilog import main
from launch.exclude import unfit_nodes
from launch.job_folder import JobFolder
from launch.requeue import AttemptResult, Decision, decide
from lpl_pretrain.config.cluster import ClusterProfile
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
    """(job folder, function for the logged commands, function that sets their output)."""
    run, programs, commands = RunDir(tmp_path / "run"), tmp_path / "bin", tmp_path / "commands"
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

    def set_output(excluded="(null)", sbatch="exit 0"):
        shown = SHOWN.format(excluded=excluded)
        scripts = {"scontrol": f'[ "$1" != show ] || {{ echo "{shown}"; exit; }}', "sbatch": ":"}
        for name, line in scripts.items():
            line += f'\necho "{name} $*" >> {commands}\n{sbatch if name == "sbatch" else ""}\n'
            (programs / name).write_text(f"#!/bin/sh\n{line}")
            (programs / name).chmod(0o755)

    set_output()
    return (
        folder,
        lambda: commands.read_text().splitlines() if commands.exists() else [],
        set_output,
    )


def write_exits(folder, statuses):
    for rank, status, host in statuses:
        folder.write_exit("7", 0, rank, status, host, stopped=False)


@pytest.mark.parametrize("direction", [1, -1])
def test_unfit_node_is_excluded_whichever_rank_ended_first(job, direction):
    """srun ends the ranks of other nodes, which may record their exits earlier."""
    folder, commands, _ = job
    write_exits(folder, STATUSES[::direction])
    decision = main(folder, 75)
    assert decision == Decision(True, "n2 is unfit: data: found a b, wanted c, 1 of 3 in a row")
    (attempt,) = folder.read_attempts()
    assert attempt["host"] == "n2" and attempt["status"] == 75
    expected_test = f"sbatch --test-only --exclude=n9,n2 {folder.path}/7_submission.sh"
    assert commands() == [
        expected_test,
        "scontrol requeue 7",
        "scontrol update jobid=7 ExcNodeList=n9,n2",
    ], "in the order that launch.requeue.requeue explains"
    assert ClusterProfile.model_validate(folder.read_raw_record()["profile"]).exclude == (
        "n9",
        "n2",
    ), "`launch resume` excludes it too"


def test_other_failures_exclude_nothing(job):
    """Only the exit status UNFIT excludes a node."""
    folder, commands, _ = job
    write_exits(folder, [(rank, status and 1, host) for rank, status, host in STATUSES])
    assert main(folder, 1) == Decision(True, "failed with status 1, 1 of 3 in a row")
    assert commands() == ["scontrol requeue 7"]


def test_nodes_that_the_user_excluded_stay_excluded(job):
    folder, commands, set_output = job
    set_output(excluded="n[7-9]")
    write_exits(folder, STATUSES)
    main(folder, 75)
    assert commands()[-1] == "scontrol update jobid=7 ExcNodeList=n[7-9],n2"


def test_job_that_could_never_start_ends_with_the_message_of_sbatch(job):
    folder, commands, set_output = job
    set_output(
        sbatch="echo 'allocation failure: Requested node configuration is not available' "
        ">&2; exit 1"
    )
    write_exits(folder, STATUSES)
    decision = main(folder, 75)
    assert not decision.requeue and decision.reason.endswith(
        "without it sbatch says: allocation failure: Requested node configuration is not available"
    )
    assert not [line for line in commands() if line.startswith("scontrol")]
    assert folder.read_raw_record()["profile"]["exclude"] == ["n9"], (
        "so that sbatch does not refuse a later `launch resume`"
    )


@pytest.mark.parametrize(
    ("policy", "earlier", "wanted"),
    [
        ("exclude", 0, Decision(True, "n2 is unfit: why, 1 of 2 in a row")),
        ("exclude", 2, Decision(False, "n2 is unfit: why, 3 of 2 in a row")),
        ("stop", 0, Decision(False, "n2 is unfit: why")),
    ],
)
def test_requeue_rule_for_unfit_nodes(policy, earlier, wanted):
    result = AttemptResult(
        75, finished=False, cancelled=False, timed_out=False, steps=(5, 5), unfit={"n2": "why"}
    )
    attempts = [{"status": 75, "steps": [5, 5], "reason": "n1 is unfit"}] * earlier
    assert decide(result, attempts, max_timeouts=1, max_failures=2, on_unfit_node=policy) == wanted


def test_exit_status_counts_without_a_report(tmp_path):
    exits = [{"rank": 2, "status": 75, "host": "n2"}, {"rank": 0, "status": 1, "host": "n1"}]
    assert unfit_nodes(exits, RunDir(Path(tmp_path))) == {"n2": "see the log"}
