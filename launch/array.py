"""Several jobs as one array: one script, whose n-th task does the n-th run, or share of the work,
in that one's own folder.

A task is called ARRAY_TASK (`5_0`) wherever a job is named.  SLURM gives each a plain number too,
but one of them gets the array's own, and `scontrol requeue 5` would requeue them all.
"""

from __future__ import annotations

import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from submitit.core.utils import DelayedSubmission

from launch.folder import JOB
from launch.job_spec import JobSpec
from launch.profile import ClusterProfile
from launch.script import check_folder
from launch.submit import make_executor, make_task, prepare_folders, sbatch_refusal
from lpl_pretrain.errors import ConfigError
from lpl_pretrain.runtime.atomic import atomic_write


def submit_array(
    specs: Sequence[JobSpec], profile: ClusterProfile, at_most: int | None
) -> list[str]:
    """The tasks' names; `orders` differ in runs or shares only.  Raises ConfigError with the
    scheduler's words when it refuses.
    """
    parent = specs[0].array_dir / "launch"
    array_batch_script(
        specs, profile, at_most, parent / "array"
    )  # refused before anything is written
    records = prepare_folders(specs, profile, at_most=at_most)
    parent.mkdir(parents=True, exist_ok=True, mode=0o750)
    links = Path(tempfile.mkdtemp(prefix="array_", dir=parent))
    for number, spec in enumerate(specs):
        (links / str(number)).symlink_to(spec.folder.path)
    file = links / "submission.sh"
    file.write_text(array_batch_script(specs, profile, at_most, links))
    sent = subprocess.run(
        ["sbatch", "--parsable", str(file)], capture_output=True, text=True, check=False
    )
    if sent.returncode:
        raise sbatch_refusal(sent.stderr)
    array = sent.stdout.strip().partition(";")[0]
    if not JOB.fullmatch(array):
        raise ConfigError(
            f"sbatch said {sent.stdout!r}, wanted the number of a job: look for it with "
            "`squeue --me`"
        )
    tasks = [f"{array}_{number}" for number in range(len(specs))]
    for spec, task, known in zip(specs, tasks, records, strict=True):
        with atomic_write(
            spec.folder.path / f"{task}_submitted.pkl"
        ) as temporary:  # the task waits for it
            DelayedSubmission(make_task(spec, profile)).dump(temporary)
        (spec.folder.path / f"{task}_submission.sh").symlink_to(
            file
        )  # by the name of a single job's
        spec.folder.write_record({**known, "job": task})
    return tasks


def array_batch_script(
    specs: Sequence[JobSpec], profile: ClusterProfile, at_most: int | None, links: Path
) -> str:
    """What `submit_array` would hand to sbatch; `links`: a link for each task, by its number, to
    the folder of its order.
    """
    for spec in specs:
        check_folder(spec.folder.path)
    executor = make_executor(specs[0], profile, links)
    executor.update_parameters(array_parallelism=at_most or len(specs))
    executor.parameters["map_count"] = len(specs)
    return executor._make_submission_file_text(executor._submitit_command_str, "")
