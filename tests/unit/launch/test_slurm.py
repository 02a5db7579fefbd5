"""Parsing of what SLURM's commands print."""

from __future__ import annotations

import pytest

from launch.slurm import current_job_id, parse_seconds, reached_time_limit, sbatch_error


@pytest.mark.parametrize(
    ("run_time", "reached"), [("00:08:20", False), ("00:08:50", True), ("1-00:00:00", True)]
)
def test_time_limit_is_distinguished_from_preemption(run_time, reached):
    fields = {"RunTime": run_time, "TimeLimit": "00:10:00"}
    assert reached_time_limit(fields, 10) is reached
    assert not reached_time_limit({}, 10)
    assert not reached_time_limit({**fields, "TimeLimit": "UNLIMITED"}, 10)
    assert parse_seconds("2-03:04:05") == 2 * 86400 + 3 * 3600 + 4 * 60 + 5


def test_message_of_sbatch_is_extracted():
    error = (
        "Command returned 1\nsbatch: error: invalid partition specified: x\nsbatch: error: "
        "Batch job submission failed\nTraceback"
    )
    assert (
        sbatch_error(error)
        == "error: invalid partition specified: x error: Batch job submission failed"
    )


def test_fields_inside_paths_are_ignored():
    from launch.slurm import parse_fields

    shown = (
        "JobId=7 JobState=RUNNING Restarts=0 StdErr=/runs/x JobState=CANCELLED "
        "Restarts=9/launch/7.err"
    )
    assert parse_fields(shown)["JobState"] == "RUNNING" and parse_fields(shown)["Restarts"] == "0"


def test_job_id_of_an_array_task(monkeypatch):
    """The plain number of a task may be the array's, by which all tasks would be requeued."""
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    monkeypatch.delenv("SLURM_ARRAY_TASK_ID", raising=False)
    assert current_job_id() == "4711"
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "4711")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "1")
    assert current_job_id() == "4711_1"
