"""Submit jobs and job arrays with sbatch, or print what would be submitted; submit jobs again."""

from __future__ import annotations

import shlex
import shutil
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import submitit
from submitit.core.utils import DelayedSubmission

from launch.batch_script import array_batch_script, batch_script, make_executor, make_worker
from launch.job import JobRecord, JobSpec, read_spec
from launch.job_folder import JobFolder
from launch.slurm import JOB_ID, job_states, sbatch_error
from lpl_pretrain import __version__
from lpl_pretrain.config.cluster import ClusterProfile
from lpl_pretrain.config.rundir import RunDir
from lpl_pretrain.errors import ConfigError
from lpl_pretrain.runtime.atomic import atomic_write


def submit(spec: JobSpec, profile: ClusterProfile) -> str:
    """Submit a job and return its id.  Raises ConfigError with sbatch's message when it refuses."""
    batch_script(spec, profile)  # raises before anything is written
    (record,) = prepare_folders([spec], profile)
    try:
        job = make_executor(spec, profile).submit(make_worker(spec, profile))
    except (
        submitit.core.utils.FailedJobError,
        submitit.core.utils.FailedSubmissionError,
    ) as error:
        raise sbatch_refusal(str(error)) from None
    spec.folder.write_record({**record, "job": job.job_id})
    return job.job_id


def submit_array(
    specs: Sequence[JobSpec], profile: ClusterProfile, at_most: int | None
) -> list[str]:
    """Submit `specs` as one array, whose n-th task runs the n-th spec, and return the tasks' ids.

    `specs` differ only in their runs or in their `split`.  Raises ConfigError with sbatch's message
    when it refuses.
    """
    parent = specs[0].array_dir / "launch"
    array_batch_script(specs, profile, at_most, parent / "array")  # raises before any write
    records = prepare_folders(specs, profile, at_most=at_most)
    parent.mkdir(parents=True, exist_ok=True, mode=0o750)
    links = Path(tempfile.mkdtemp(prefix="array_", dir=parent))
    for index, spec in enumerate(specs):
        (links / str(index)).symlink_to(spec.folder.path)
    script = links / "submission.sh"
    script.write_text(array_batch_script(specs, profile, at_most, links))
    array = _sbatch(script)
    tasks = [f"{array}_{index}" for index in range(len(specs))]
    for spec, task, record in zip(specs, tasks, records, strict=True):
        pickled = spec.folder.path / f"{task}_submitted.pkl"
        with atomic_write(pickled) as temporary:  # the task waits for this file
            DelayedSubmission(make_worker(spec, profile)).dump(temporary)
        # under the name that the script of a single job has
        (spec.folder.path / f"{task}_submission.sh").symlink_to(script)
        spec.folder.write_record({**record, "job": task})
    return tasks


def _sbatch(script: Path) -> str:
    """Submit a script and return the job's id."""
    done = subprocess.run(
        ["sbatch", "--parsable", str(script)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise sbatch_refusal(done.stderr)
    job = done.stdout.strip().partition(";")[0]
    if not JOB_ID.fullmatch(job):
        raise ConfigError(
            f"sbatch printed {done.stdout!r}, wanted the number of a job: look for it with "
            "`squeue --me`"
        )
    return job


def prepare_folders(
    specs: Sequence[JobSpec], profile: ClusterProfile, **more: Any
) -> list[dict[str, Any]]:
    """Create the job folders and write their records without a job id; return the records.

    Raises ConfigError without sbatch, and where a job of one of the folders is in the queue.
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
    return [_prepare_folder(spec, profile, more) for spec in specs]


def _prepare_folder(spec: JobSpec, profile: ClusterProfile, more: dict[str, Any]) -> dict[str, Any]:
    folder = spec.folder
    try:
        folder.path.mkdir(parents=True, exist_ok=True, mode=0o750)
    except OSError as error:
        raise ConfigError(
            f"{folder.path}: cannot be made from here: {error}: submit where the folder of "
            "runs is mounted, or set run_dir"
        ) from None
    folder.cancelled.unlink(missing_ok=True)
    folder.write_config(spec.config)
    complete = RunDir(spec.run_dir).complete_checkpoints()
    record: dict[str, Any] = {
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
    folder.write_record({**record, "job": None})
    return record


def sbatch_refusal(output: str) -> ConfigError:
    return ConfigError(
        f"sbatch refused this job: {sbatch_error(output)}: see `sinfo`, and the profile's keys"
    )


def submit_or_preview(
    spec: JobSpec, profile: ClusterProfile, *, dry_run: bool = False, settings: str = ""
) -> str:
    """Submit a job and return its id; or print its script and configuration, and return `ID`.

    `settings`: configuration to print for a job whose spec has none.
    """
    if dry_run:
        command = f"python -m {spec.module} {shlex.join(spec.argv)}"
        click.echo(
            f"{batch_script(spec, profile)}\n\n# The command of every process\n# {command}\n"
        )
        click.echo(f"# Its configuration\n{settings or spec.config}")
        return "ID"
    job = submit(spec, profile)
    if spec.kind in ("train", "watch"):
        hint = f"python -m launch status {shlex.quote(str(spec.run_dir))}"
    else:
        hint = f"logs in {spec.folder.path}"
    tasks = f"{spec.nodes} nodes x {profile.processes_per_node} processes"
    click.echo(f"job {job}, {spec.part or spec.kind}: {tasks}; {hint}")
    return job


def submit_or_preview_array(
    specs: Sequence[JobSpec],
    profile: ClusterProfile,
    at_most: int | None = None,
    *,
    dry_run: bool = False,
    settings: str = "",
) -> list[str]:
    """Submit specs that need the same nodes as one array, and return the tasks' ids; or print its
    script, with the configuration `settings`, and return `ID_0`, `ID_1` ...
    """
    folder = specs[0].array_dir
    if dry_run:
        click.echo(array_batch_script(specs, profile, at_most, folder / "launch" / "array"))
        click.echo("\n# The tasks")
        for index, spec in enumerate(specs):
            click.echo(f"# {index}: lpl-pretrain {shlex.join(spec.argv)}")
        click.echo(f"\n# Their configuration\n{settings}" if settings else "")
        return [f"ID_{index}" for index in range(len(specs))]
    jobs = submit_array(specs, profile, at_most)
    for job, spec in zip(jobs, specs, strict=True):
        click.echo(f"job {job}, {spec.part or spec.run_dir.name}")
    tasks = f"{specs[0].nodes} nodes x {profile.processes_per_node} processes"
    status = f"python -m launch status {shlex.quote(str(folder))}"
    click.echo(f"{len(specs)} jobs, each {tasks}; {status}")
    return jobs


def submit_or_preview_encoding(
    argv: list[str],
    output: Path,
    nodes: int,
    profile: ClusterProfile,
    settings: str,
    *,
    dry_run: bool = False,
) -> str:
    """Submit an encoding as an array of `nodes` jobs of one node, and return the array's id.

    Such jobs need not start together, and a preempted one stops no other.  `settings`: resolved
    configuration that they use, as YAML.
    """
    specs = [
        JobSpec(
            "encode",
            argv,
            output,
            1,
            part=f"encode/{index}",
            split=(index, nodes),
            config=settings,
        )
        for index in range(nodes)
    ]
    tasks = submit_or_preview_array(specs, profile, dry_run=dry_run, settings=settings)
    return tasks[0].partition("_")[0]


def resubmit(folder: JobFolder) -> None:
    """Submit the newest job of a folder again, unchanged."""
    spec, record = read_spec(folder)
    submit_or_preview(spec, record.profile)


def resubmit_array(folders: Sequence[JobFolder]) -> None:
    """Submit the newest jobs of a sweep's runs again: one array for each set of equal resources."""
    arrays: dict[str, tuple[JobRecord, list[JobSpec]]] = {}
    for folder in folders:
        spec, record = read_spec(folder)
        resources = record.model_dump_json(include={"profile", "nodes", "at_most", "cwd"})
        arrays.setdefault(resources, (record, []))[1].append(spec)
    for record, specs in arrays.values():
        submit_or_preview_array(specs, record.profile, record.at_most)
