"""From a command and a profile to a job: checked here, on the login node, then handed to sbatch by
submitit.

submitit writes the script, pickles the task and names the logs; what it does about signals,
requeues and results is not used, for each process of the job is a task of ours (task.py) and the
last line of the script decides (after.py).
"""

from __future__ import annotations

import re
import shlex
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import submitit

from launch.job_spec import JobSpec
from launch.profile import ClusterProfile
from launch.script import check_folder, check_script, check_setup, check_working_directory
from launch.status import job_states
from launch.task import Task
from lpl_pretrain import __version__
from lpl_pretrain.config.rundir import RunDir
from lpl_pretrain.errors import ConfigError
from lpl_pretrain.runtime.source_hash import ROOT, fingerprint


class Executor(submitit.SlurmExecutor):
    """Also where there is no scheduler: a script can be shown anywhere."""

    @classmethod
    def affinity(cls) -> int:
        return 2

    def _make_submission_file_text(self, command: str, uid: str) -> str:
        """Raises ConfigError rather than write a line that is not ours."""
        text = super()._make_submission_file_text(command, uid)
        return check_script(text, {*self.parameters["setup"], *self.parameters["teardown"]})


def submit(spec: JobSpec, profile: ClusterProfile) -> str:
    """The job's id.  Raises ConfigError with the scheduler's own words when it refuses."""
    script(spec, profile)  # refused before anything is written
    (records,) = prepare_folders([spec], profile)
    try:
        job = make_executor(spec, profile).submit(make_task(spec, profile))
    except (
        submitit.core.utils.FailedJobError,
        submitit.core.utils.FailedSubmissionError,
    ) as refusal:
        raise sbatch_refusal(str(refusal)) from None
    spec.folder.write_record({**records, "job": job.job_id})
    return job.job_id


def prepare_folders(
    specs: Sequence[JobSpec], profile: ClusterProfile, **more: Any
) -> list[dict[str, Any]]:
    """The facts of each but its job, as its folder has them from now on.  Raises ConfigError when
    one is being worked on.
    """
    if shutil.which("sbatch") is None:
        raise ConfigError(
            "sbatch: not on the PATH: submit from a login node of the cluster, or start here "
            "with torchrun"
        )
    for spec, state in zip(specs, job_states([spec.folder for spec in specs]), strict=True):
        if state:
            raise ConfigError(
                f"{spec.run_dir}: its job {spec.folder.job} is {state}: wait for its end, or "
                "`python -m launch cancel` it"
            )
    found = []
    for spec in specs:
        folder = spec.folder
        try:
            folder.path.mkdir(parents=True, exist_ok=True, mode=0o750)
        except OSError as problem:
            raise ConfigError(
                f"{folder.path}: cannot be made from here: {problem}: submit where the folder of "
                "runs is mounted, or set run_dir"
            ) from None
        folder.cancelled.unlink(missing_ok=True)
        folder.write_config(spec.config)
        complete = RunDir(spec.run_dir).complete_checkpoints()
        records: dict[str, Any] = {
            "kind": spec.kind,
            "part": spec.part,
            "argv": spec.argv,
            "run_dir": str(spec.run_dir),
            "cwd": spec.cwd,
            "nodes": spec.nodes,
            "profile": profile.model_dump(mode="json"),
            "version": __version__,
            "step": complete[-1] if complete else 0,
            "submitted_at_s": time.time(),
            **more,
        }
        folder.write_record({**records, "job": None})
        found.append(records)
    return found


def script(spec: JobSpec, profile: ClusterProfile) -> str:
    """What `submit` would hand to sbatch."""
    executor = make_executor(spec, profile)
    return executor._make_submission_file_text(executor._submitit_command_str, "dry-run")


def make_task(spec: JobSpec, profile: ClusterProfile) -> Task:
    return Task(
        spec.command,
        str(spec.folder.path),
        list(profile.container),
        fingerprint(),
        profile.on_changed_code,
        spec.module,
        kill_on_hang=profile.on_hang != "wait" and spec.kind == "train",
        split=spec.split,
        cwd=spec.cwd,
    )


def make_executor(
    spec: JobSpec, profile: ClusterProfile, links: Path | None = None
) -> submitit.SlurmExecutor:
    """Nothing user-given reaches the script unquoted.  `links`: of an array, lead to the folders of
    its tasks.

    Raises ConfigError for what could not stand in a script.
    """
    python, folder = shlex.quote(profile.python or sys.executable), spec.folder.path
    check_folder(folder)
    check_working_directory(spec.cwd)
    check_setup(profile.setup)
    executor = Executor(folder=folder if links is None else links / "%a", python=python)
    here = (
        shlex.quote(str(folder))
        if links is None
        else f'{shlex.quote(str(links))}/"$SLURM_ARRAY_TASK_ID"'
    )
    exports = [f"export {name}={shlex.quote(value)}" for name, value in profile.environment.items()]
    exports.append(f'export PYTHONPATH={shlex.quote(str(ROOT))}"${{PYTHONPATH:+:$PYTHONPATH}}"')
    more: dict[str, Any] = {"requeue": True, "chdir": spec.cwd}
    if spec.after is not None:
        more |= {"dependency": spec.after, "kill-on-invalid-dep": "yes"}
    if profile.memory_gib_per_node is not None:
        more["mem"] = f"{int(1024 * profile.memory_gib_per_node)}M"
    asked = {
        "partition": profile.partition,
        "account": profile.account,
        "qos": profile.qos,
        "constraint": profile.constraint,
    }
    if profile.gpus_per_node:
        asked["gpus_per_node"] = str(profile.gpus_per_node)
    if profile.exclude:
        asked["exclude"] = ",".join(profile.exclude)
    executor.update_parameters(
        job_name=job_name(
            spec if links is None else replace(spec, run_dir=spec.array_dir, part="")
        ),
        nodes=spec.nodes,
        ntasks_per_node=profile.processes_per_node,
        cpus_per_task=profile.cpus_per_process,
        time=profile.time_limit_min,
        wckey=None,
        signal_delay_s=profile.signal_s,
        # bash would die of the signal that tells of the end, and not come to the last line
        setup=[*profile.setup, *exports, "trap : TERM"],
        srun_args=["--kill-on-bad-exit=1", "--wait=30"],
        teardown=[f"{python} -m launch.epilog {here} $?"],
        additional_parameters=more,
        **{key: value for key, value in asked.items() if value is not None},
    )
    return executor


def job_name(spec: JobSpec) -> str:
    """Of a run's folder; what a scheduler's listing could stumble over is left out."""
    return re.sub(r"[^A-Za-z0-9._-]+", "_", f"{spec.run_dir.name}-{spec.part or spec.kind}")[:100]


def sbatch_refusal(error: str) -> ConfigError:
    return ConfigError(
        f"sbatch refused this job: {sbatch_error(error)}: see `sinfo`, and the profile's keys"
    )


def sbatch_error(error: str) -> str:
    """The scheduler's, out of submitit's traceback of a failed command."""
    lines = [line.strip() for line in error.splitlines() if line.strip().startswith("sbatch:")]
    return (
        " ".join(line.removeprefix("sbatch:").strip() for line in lines)
        or error.strip().splitlines()[-1]
    )
