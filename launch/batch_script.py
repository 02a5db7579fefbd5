"""The batch script of a job, or of an array of jobs, written by submitit.

submitit writes the script, pickles the worker and names the logs.  Its own handling of signals,
requeues and results is not used: each task of the job is a Worker (launch/worker.py), and the last
line of the script decides about a requeue (launch/epilog.py).
"""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import submitit

from launch.job import JobSpec
from launch.script_checks import (
    check_folder,
    check_script,
    check_setup,
    check_working_directory,
)
from launch.worker import Worker
from lpl_pretrain.config.cluster import ClusterProfile
from lpl_pretrain.runtime.source_hash import ROOT, source_hash

LONGEST_JOB_NAME = 100


class Executor(submitit.SlurmExecutor):
    """submitit's executor, with checks, and available where SLURM is not: a dry run needs none."""

    @classmethod
    def affinity(cls) -> int:
        return 2

    def _make_submission_file_text(self, command: str, uid: str) -> str:
        """Raises ConfigError rather than write a line that is not ours."""
        text = super()._make_submission_file_text(command, uid)
        return check_script(text, {*self.parameters["setup"], *self.parameters["teardown"]})


def batch_script(spec: JobSpec, profile: ClusterProfile) -> str:
    """The script that `submit` passes to sbatch."""
    executor = make_executor(spec, profile)
    return executor._make_submission_file_text(executor._submitit_command_str, "dry-run")


def array_batch_script(
    specs: Sequence[JobSpec], profile: ClusterProfile, at_most: int | None, links: Path
) -> str:
    """The script that `submit_array` passes to sbatch.

    `links`: folder with one link per array index, to the job folder of that task.
    """
    for spec in specs:
        check_folder(spec.folder.path)
    executor = make_executor(specs[0], profile, links)
    executor.update_parameters(array_parallelism=at_most or len(specs))
    executor.parameters["map_count"] = len(specs)
    return executor._make_submission_file_text(executor._submitit_command_str, "")


def make_worker(spec: JobSpec, profile: ClusterProfile) -> Worker:
    """The callable that every task of the job runs."""
    return Worker(
        spec.command,
        str(spec.folder.path),
        list(profile.container),
        source_hash(),
        profile.on_changed_code,
        spec.module,
        kill_on_hang=profile.on_hang != "wait" and spec.kind == "train",
        split=spec.split,
        cwd=spec.cwd,
    )


def make_executor(
    spec: JobSpec, profile: ClusterProfile, links: Path | None = None
) -> submitit.SlurmExecutor:
    """submitit's executor for a job, or for an array with `links`; no user input reaches the script
    unquoted.

    Raises ConfigError for values that a script cannot hold.
    """
    check_folder(spec.folder.path)
    check_working_directory(spec.cwd)
    check_setup(profile.setup)
    python = shlex.quote(profile.python or sys.executable)
    if links is None:
        logs = spec.folder.path
        epilog_folder = shlex.quote(str(spec.folder.path))
        named = spec
    else:
        logs = links / "%a"
        epilog_folder = f'{shlex.quote(str(links))}/"$SLURM_ARRAY_TASK_ID"'
        named = replace(spec, run_dir=spec.array_dir, part="")
    exports = [f"export {name}={shlex.quote(value)}" for name, value in profile.environment.items()]
    exports.append(f'export PYTHONPATH={shlex.quote(str(ROOT))}"${{PYTHONPATH:+:$PYTHONPATH}}"')
    executor = Executor(folder=logs, python=python)
    executor.update_parameters(
        job_name=job_name(named),
        nodes=spec.nodes,
        ntasks_per_node=profile.processes_per_node,
        cpus_per_task=profile.cpus_per_process,
        time=profile.time_limit_min,
        wckey=None,
        signal_delay_s=profile.signal_s,
        # bash would die of SIGTERM at the time limit and not reach the epilog
        setup=[*profile.setup, *exports, "trap : TERM"],
        srun_args=["--kill-on-bad-exit=1", "--wait=30"],
        teardown=[f"{python} -m launch.epilog {epilog_folder} $?"],
        additional_parameters=_additional_options(spec, profile),
        **_resource_options(profile),
    )
    return executor


def _resource_options(profile: ClusterProfile) -> dict[str, str]:
    """sbatch options that submitit has parameters for."""
    options = {
        "partition": profile.partition,
        "account": profile.account,
        "qos": profile.qos,
        "constraint": profile.constraint,
    }
    if profile.gpus_per_node:
        options["gpus_per_node"] = str(profile.gpus_per_node)
    if profile.exclude:
        options["exclude"] = ",".join(profile.exclude)
    return {name: value for name, value in options.items() if value is not None}


def _additional_options(spec: JobSpec, profile: ClusterProfile) -> dict[str, Any]:
    """sbatch options that submitit does not know."""
    options: dict[str, Any] = {"requeue": True, "chdir": spec.cwd}
    if spec.dependency is not None:
        options |= {"dependency": spec.dependency, "kill-on-invalid-dep": "yes"}
    if profile.memory_gib_per_node is not None:
        options["mem"] = f"{int(1024 * profile.memory_gib_per_node)}M"
    return options


def job_name(spec: JobSpec) -> str:
    """RUN-KIND without characters that could break the output of squeue."""
    name = f"{spec.run_dir.name}-{spec.part or spec.kind}"
    return re.sub(r"[^A-Za-z0-9._-]+", "_", name)[:LONGEST_JOB_NAME]
