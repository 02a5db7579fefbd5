"""From a command and a profile to a job: checked here, on the login node, then handed to sbatch by submitit.

submitit writes the script, pickles the task and names the logs; what it does about signals, requeues and results is not used, for
each process of the job is a task of ours (task.py) and the last line of the script decides (after.py).
"""

from __future__ import annotations

import re
import shlex
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import submitit

from launch.folder import JobFolder
from launch.profile import ClusterProfile
from launch.status import state_of
from launch.task import Task
from lpl_pretrain import __version__
from lpl_pretrain.config.rundir import RunDir
from lpl_pretrain.errors import ConfigError
from lpl_pretrain.runtime.code import ROOT, fingerprint


@dataclass(frozen=True)
class Order:
    """A job to be."""

    kind: str
    """train, encode, evaluate or watch."""
    argv: list[str]
    """Behind `lpl-pretrain`, or behind `python -m launch` for watch."""
    run_dir: Path
    nodes: int
    after: str | None = None
    """A dependency in sbatch's words: `afterok:ID` begins when that job has ended well, and never if it has not."""
    part: str = ""
    """Tells work of one kind on one run from another's."""

    @property
    def module(self) -> str:
        return "launch" if self.kind == "watch" else "lpl_pretrain"

    @property
    def folder(self) -> JobFolder:
        """Of training it is RUN/launch; other work on a run has folders beside each other."""
        parent = self.run_dir / "launch"
        return JobFolder(parent if self.kind == "train" else parent / (self.part or self.kind))


class Executor(submitit.SlurmExecutor):
    """Also where there is no scheduler: a script can be shown anywhere."""

    @classmethod
    def affinity(cls) -> int:
        return 2


def submit(order: Order, profile: ClusterProfile) -> str:
    """The job's id.  Raises ConfigError with the scheduler's own words when it refuses."""
    if shutil.which("sbatch") is None:
        raise ConfigError("sbatch: not on the PATH: submit from a login node of the cluster, or start here with torchrun")
    folder = order.folder
    if folder.facts.is_file() and (state := state_of(job := folder.read_facts()["job"])):
        raise ConfigError(f"{order.run_dir}: its job {job} is {state}: wait for its end, or `python -m launch cancel` it")
    folder.path.mkdir(parents=True, exist_ok=True, mode=0o750)
    folder.cancelled.unlink(missing_ok=True)
    complete = RunDir(order.run_dir).complete_checkpoints()
    facts: dict[str, Any] = {
        "kind": order.kind,
        "part": order.part,
        "argv": order.argv,
        "run_dir": str(order.run_dir),
        "nodes": order.nodes,
        "profile": profile.model_dump(mode="json"),
        "version": __version__,
        "step": complete[-1] if complete else 0,
        "submitted_at_s": time.time(),
    }
    folder.write_facts({**facts, "job": None})
    try:
        job = executor_of(order, profile).submit(task_of(order, profile))
    except (submitit.core.utils.FailedJobError, submitit.core.utils.FailedSubmissionError) as refusal:
        raise ConfigError(f"sbatch refused this job: {words_of(str(refusal))}: see `sinfo`, and the profile's keys") from None
    folder.write_facts({**facts, "job": job.job_id})
    return job.job_id


def script(order: Order, profile: ClusterProfile) -> str:
    """What `submit` would hand to sbatch."""
    executor = executor_of(order, profile)
    return executor._make_submission_file_text(executor._submitit_command_str, "dry-run")


def task_of(order: Order, profile: ClusterProfile) -> Task:
    return Task(
        order.argv,
        str(order.folder.path),
        list(profile.container),
        fingerprint(),
        profile.on_changed_code,
        order.module,
        patient=profile.on_hang == "wait" or order.kind != "train",
    )


def executor_of(order: Order, profile: ClusterProfile) -> submitit.SlurmExecutor:
    """Nothing user-given reaches the script unquoted."""
    python, folder = shlex.quote(profile.python or sys.executable), order.folder.path
    executor = Executor(folder=folder, python=python)
    exports = [f"export {name}={shlex.quote(value)}" for name, value in profile.environment.items()]
    exports.append(f'export PYTHONPATH={shlex.quote(str(ROOT))}"${{PYTHONPATH:+:$PYTHONPATH}}"')
    more: dict[str, Any] = {"requeue": True}
    if order.after is not None:
        more |= {"dependency": order.after, "kill-on-invalid-dep": "yes"}
    if profile.memory_gib_per_node is not None:
        more["mem"] = f"{int(1024 * profile.memory_gib_per_node)}M"
    asked = {"partition": profile.partition, "account": profile.account, "qos": profile.qos, "constraint": profile.constraint}
    if profile.gpus_per_node:
        asked["gpus_per_node"] = str(profile.gpus_per_node)
    if profile.exclude:
        asked["exclude"] = ",".join(profile.exclude)
    executor.update_parameters(
        job_name=job_name(order),
        nodes=order.nodes,
        ntasks_per_node=profile.processes_per_node,
        cpus_per_task=profile.cpus_per_process,
        time=profile.time_limit_min,
        wckey=None,
        signal_delay_s=profile.signal_s,
        # bash would die of the signal that tells of the end, and not come to the last line
        setup=[*profile.setup, *exports, "trap : TERM"],
        srun_args=["--kill-on-bad-exit=1", "--wait=30"],
        teardown=[f"{python} -m launch.after {shlex.quote(str(folder))} $?"],
        additional_parameters=more,
        **{key: value for key, value in asked.items() if value is not None},
    )
    return executor


def job_name(order: Order) -> str:
    """Of a run's folder; what a scheduler's listing could stumble over is left out."""
    return re.sub(r"[^A-Za-z0-9._-]+", "_", f"{order.run_dir.name}-{order.part or order.kind}")[:100]


def words_of(error: str) -> str:
    """The scheduler's, out of submitit's traceback of a failed command."""
    lines = [line.strip() for line in error.splitlines() if line.strip().startswith("sbatch:")]
    return " ".join(line.removeprefix("sbatch:").strip() for line in lines) or error.strip().splitlines()[-1]
