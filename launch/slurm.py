"""SLURM's commands and variables: squeue, scontrol, sbatch's messages, the environment of a job."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from launch.job_folder import JobFolder

JOB_ID = re.compile(r"[0-9]+(_[0-9]+)?")
"""A job id as SLURM prints it: `4711`, or `4711_0` for a task of an array."""
EARLY_S = 60
"""SLURM may signal the time limit up to this much earlier than `--signal` asks for."""


def current_job_id() -> str:
    """Id of the job around this process, as squeue, scancel and scontrol take it.

    A task of an array is ARRAY_TASK: its plain number may be the array's own, and `scontrol
    requeue` of that number would requeue every task.
    """
    task = os.environ.get("SLURM_ARRAY_TASK_ID")
    if task is None:
        return os.environ["SLURM_JOB_ID"]
    return f"{os.environ['SLURM_ARRAY_JOB_ID']}_{task}"


def restart_count() -> int:
    """Index of this attempt: 0, and one more after each requeue."""
    return int(os.environ.get("SLURM_RESTART_COUNT", "0"))


def node_name() -> str:
    """SLURM's name of this node."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def job_states(folders: Sequence[JobFolder]) -> list[str]:
    """squeue's state of the newest job in each folder.

    "" where squeue does not know the job, or where there is no squeue.
    """
    jobs = [folder.job or "" for folder in folders]
    known = None
    if any(jobs) and shutil.which("squeue") is not None:
        known = squeue_states([job for job in jobs if job])
    return [(known or {}).get(job, "") for job in jobs]


def job_state(job: str) -> str | None:
    """squeue's state of a job: "" when squeue does not know it, None when squeue does not answer,
    which says nothing about the job.
    """
    known = squeue_states([job])
    return None if known is None else known.get(job, "")


def squeue_states(jobs: Sequence[str]) -> dict[str, str] | None:
    """{job id: state} of the jobs that squeue knows; None when squeue does not answer."""
    done = subprocess.run(
        ["squeue", "-h", "-r", "-j", ",".join(jobs), "-o", "%i %T"],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode and "Invalid job id" not in done.stderr:
        return None
    return dict(line.split() for line in done.stdout.splitlines())


def scontrol_show_job(job: str) -> dict[str, str]:
    """Fields of `scontrol show job`; empty when scontrol does not answer."""
    done = subprocess.run(
        ["scontrol", "show", "job", job, "--oneliner"], capture_output=True, text=True, check=False
    )
    return parse_fields(done.stdout)


def parse_fields(output: str) -> dict[str, str]:
    """{name: value} of scontrol's NAME=VALUE output.

    The first value of a name counts: paths, which may contain anything, come last.
    """
    fields: dict[str, str] = {}
    for word in output.split():
        name, separator, value = word.partition("=")
        if separator:
            fields.setdefault(name, value)
    return fields


def reached_time_limit(fields: dict[str, str], signal_s: int) -> bool:
    """Whether the attempt ended so close to its time limit that the limit was the reason."""
    try:
        used = parse_seconds(fields["RunTime"])
        limit = parse_seconds(fields["TimeLimit"])
    except (KeyError, ValueError):
        return False
    return used >= limit - signal_s - EARLY_S


def parse_seconds(text: str) -> int:
    """Seconds in [days-]hours:minutes:seconds.  Raises ValueError for UNLIMITED and its kin."""
    days, _, clock = text.rpartition("-")
    hours, minutes, seconds = (int(part) for part in clock.split(":"))
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds


def sbatch_error(output: str) -> str:
    """sbatch's own message in the output or traceback of a failed command."""
    lines = [line.strip() for line in output.splitlines()]
    messages = [
        line.removeprefix("sbatch:").strip() for line in lines if line.startswith("sbatch:")
    ]
    return " ".join(messages) or output.strip().splitlines()[-1]
