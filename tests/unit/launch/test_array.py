"""Job arrays: folders and environment of the tasks, status, cancel."""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path

import pytest
import yaml
from submitit.core.utils import DelayedSubmission

from launch import epilog, monitor
from launch.job import JobSpec
from launch.job_folder import (
    JobFolder,
    find_job_folders,
    single_job_folder,
)
from launch.submit import submit_array, submit_or_preview_encoding
from launch.worker import Allocation
from lpl_pretrain.config.cluster import ClusterProfile
from lpl_pretrain.config.rundir import RunDir
from lpl_pretrain.errors import ConfigError
from tests.support.configs import train_config


def specs(folder, count=2):
    return [
        JobSpec("train", ["train", "x.yaml", f"n={n}"], folder / f"n={n}", 4) for n in range(count)
    ]


@pytest.mark.parametrize("number", [0, 1])
def test_each_task_finds_its_folder(slurm_programs, number):
    """A real shell runs the script, with programs that print their arguments as srun and python."""
    sweep = slurm_programs / "a sweep with 'marks' and $(touch hacked)"
    tasks = submit_array(specs(sweep), ClusterProfile(python="echo"), None)
    assert (
        tasks == ["4711_0", "4711_1"]
        and [JobFolder(o.run_dir / "launch").job for o in specs(sweep)] == tasks
    )
    (slurm_programs / "bin" / "srun").write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    (slurm_programs / "bin" / "srun").chmod(0o755)
    done = subprocess.run(
        ["bash", slurm_programs / "submitted.sh"],
        env={"PATH": os.environ["PATH"], "SLURM_ARRAY_TASK_ID": str(number)},
        capture_output=True,
        text=True,
        cwd=slurm_programs,
    )
    assert done.returncode == 0 and not list(slurm_programs.rglob("hacked")), done.stderr
    words = done.stdout.splitlines()
    of_task = Path(words[words.index("submitit.core._submit") + 1].replace("%a", str(number)))
    assert of_task.resolve() == sweep / f"n={number}" / "launch", (
        "submitit looks for the task and writes logs there"
    )
    assert (of_task / f"4711_{number}_submitted.pkl").is_file()
    assert (of_task / f"4711_{number}_submission.sh").read_text() == (
        slurm_programs / "submitted.sh"
    ).read_text(), "the epilog passes it to sbatch --test-only"
    (epilog_line,) = [line for line in words if "launch.epilog" in line]
    rows = Path(epilog_line.partition("launch.epilog ")[2].removesuffix(" 0"))
    assert JobFolder(rows).read_raw_record()["argv"] == ["train", "x.yaml", f"n={number}"]


def test_encoding_is_an_array_of_jobs_of_one_node(slurm_programs, capsys, monkeypatch):
    """Two jobs of two processes form a world of four ranks; each has its own folder."""
    latents = slurm_programs / "some latents"
    argv = ["encode", "some.yaml", "x=1"]
    profile = ClusterProfile(processes_per_node=2)
    assert submit_or_preview_encoding(argv, latents, 2, profile, "") == "4711"
    submitted = (slurm_programs / "submitted.sh").read_text()
    assert "#SBATCH --array=0-1%2" in submitted and "#SBATCH --nodes=1\n" in submitted
    assert "#SBATCH --job-name=some_latents-encode\n" in submitted
    assert capsys.readouterr().out.splitlines()[1] == "job 4711_1, encode/1"
    (links,) = (latents / "launch").glob("array_*")
    for name, value in {
        "JOB_ID": "4712",
        "ARRAY_JOB_ID": "4711",
        "ARRAY_TASK_ID": "1",
        "NTASKS": "2",
        "LOCALID": "0",
    }.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    environments = []
    for number in range(2):
        folder = JobFolder(latents / "launch" / "encode" / str(number))
        assert (links / str(number)).resolve() == folder.path and folder.read_raw_record()["argv"][
            -1
        ] == "x=1"
        task = DelayedSubmission.load(folder.path / f"4711_{number}_submitted.pkl").function
        for rank in range(2):
            monkeypatch.setenv("SLURM_PROCID", str(rank))
            environments.append(task.rank_env(Allocation.from_environment()))
    rows = [line.split()[:3] for line in monitor.status_report(latents).splitlines()[1:]]
    assert rows == [["encode/0", "4711_0", "RUNNING"], ["encode/1", "4711_1", "PENDING"]]
    assert monitor.status_report(latents / "launch" / "encode" / "1").splitlines()[1].split()[
        :2
    ] == [
        "encode/1",
        "4711_1",
    ]
    assert monitor.cancel(latents).count("`python -m launch encode` continues from there") == 2
    assert [ranks["RANK"] for ranks in environments] == ["0", "1", "2", "3"]
    assert {ranks["WORLD_SIZE"] for ranks in environments} == {"4"}


@pytest.mark.parametrize("broken", [False, True])
def test_task_requeues_itself_alone(slurm_programs, monkeypatch, broken):
    """The plain number of a task would requeue the whole array, and find no attempts."""
    for name, value in {
        "JOB_ID": "4711",
        "ARRAY_JOB_ID": "4711",
        "ARRAY_TASK_ID": "1",
        "RESTART_COUNT": "1",
    }.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    (slurm_programs / "bin" / "scontrol").write_text(
        f'#!/bin/sh\necho "$@" >> {slurm_programs}/asked.txt\n'
    )
    (slurm_programs / "bin" / "scontrol").chmod(0o755)
    submit_array(specs(slurm_programs / "sweep"), ClusterProfile(max_failures=2), None)
    folder = JobFolder(slurm_programs / "sweep" / "n=1" / "launch")
    folder.write_exit("4711_1", 1, 0, 9, "node1", stopped=False)
    if broken:
        monkeypatch.setattr(epilog, "current_job_id", lambda: os.environ["SLURM_JOB_ID"])
    decision = epilog.main(folder, 1)
    asked = (slurm_programs / "asked.txt").read_text().splitlines()
    assert ("requeue 4711_1" in asked) is not broken and ("requeue 4711" in asked) is broken
    assert ("status 9" in decision.reason) is not broken


def test_nothing_is_submitted_while_one_run_has_a_job(slurm_programs):
    sweep = slurm_programs / "sweep"
    submit_array(specs(sweep, 2), ClusterProfile(), None)
    (slurm_programs / "submitted.sh").unlink()
    with pytest.raises(ConfigError, match="n=0: its job 4711_0 is RUNNING"):
        submit_array(specs(sweep, 3), ClusterProfile(), None)
    assert not (slurm_programs / "submitted.sh").exists() and not (sweep / "n=2").exists()


def test_status_has_a_line_for_each_run(slurm_programs):
    sweep = slurm_programs / "sweep"
    submit_array(specs(sweep, 3), ClusterProfile(), None)
    assert [folder.run_dir for folder in find_job_folders(sweep)] == [
        sweep / f"n={n}" for n in range(3)
    ]
    assert [folder.run_dir for folder in find_job_folders(sweep / "n=1")] == [sweep / "n=1"]
    RunDir(sweep / "n=0").metrics.write_text(
        json.dumps({"step": 1200, "samples_per_s": 51.24}) + "\n"
    )
    attempt = {
        "job": "4711_2",
        "attempt": 0,
        "requeued": False,
        "reason": "refused its input: see the log",
    }
    JobFolder(sweep / "n=2" / "launch").append_attempt(attempt)
    head, *rows = (re.split(r"\s{2,}", line) for line in monitor.status_report(sweep).splitlines())
    assert head == ["name", "job", "state", "step", "samples/s", "restarts", "last attempt"]
    assert rows == [
        ["n=0", "4711_0", "RUNNING", "1,200", "51.2", "0", "-"],
        ["n=1", "4711_1", "PENDING", "-", "-", "0", "-"],
        ["n=2", "4711_2", "-", "-", "-", "0", "refused its input: see the log"],
    ]
    with pytest.raises(ConfigError, match="holds 3 jobs: name one of them, such as .*n=0"):
        single_job_folder(sweep)


def test_cancel_acts_on_queued_runs_and_resume_on_the_others(slurm_programs):
    sweep = slurm_programs / "sweep"
    submit_array(specs(sweep, 4), ClusterProfile(), None)
    finished = RunDir(sweep / "n=3")
    finished.config.write_text(yaml.safe_dump(train_config(steps=6).model_dump(mode="json")))
    finished.checkpoint(6).mkdir(parents=True)
    (finished.checkpoint(6) / "manifest.json").write_text('{"files": {}}')
    assert [folder.name for folder in monitor.unfinished_runs(find_job_folders(sweep))] == ["n=2"]
    (finished.checkpoint(6) / "manifest.json").unlink()
    assert [folder.name for folder in monitor.unfinished_runs(find_job_folders(sweep))] == [
        "n=2",
        "n=3",
    ]
    assert [line.partition(":")[0] for line in monitor.cancel(sweep).splitlines()] == [
        "job 4711_0",
        "job 4711_1",
    ]
    assert [JobFolder(sweep / f"n={n}" / "launch").cancelled.exists() for n in range(4)] == [
        True,
        True,
        False,
        False,
    ]
