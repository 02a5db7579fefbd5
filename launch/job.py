"""A job: what is submitted (JobSpec), and its record RUN/launch/job.json read back (JobRecord).

`launch resume` submits a record again, so every value of it is checked: only a command of this
package is ever run.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal, Optional

from pydantic import ConfigDict, Field, NonNegativeInt, PositiveInt

from launch.job_folder import JobFolder
from lpl_pretrain.config.base import Section
from lpl_pretrain.config.cluster import ClusterProfile
from lpl_pretrain.config.load import load_config, validate
from lpl_pretrain.config.schema import TrainConfig
from lpl_pretrain.errors import ConfigError

CONFIG_POSITION = {"train": 1, "encode": 1, "evaluate": 2, "watch": 2}
"""Index in a command of its configuration file; overrides follow, then options."""


@dataclass(frozen=True)
class JobSpec:
    """One job, or one task of an array, before it is submitted."""

    kind: str
    """train, encode, evaluate, sample or watch."""
    argv: list[str]
    """Arguments of `lpl-pretrain`, or of `python -m launch` for watch."""
    run_dir: Path
    nodes: int
    dependency: str | None = None
    """Dependency in sbatch's syntax; with `afterok:ID` the job starts once job ID has succeeded,
    and is removed from the queue if that fails.
    """
    part: str = ""
    """Folder below RUN/launch that separates jobs of one kind on one run."""
    split: tuple[int, int] = (0, 1)
    """(index, number) of the jobs that divide one piece of work; they need not run together."""
    config: str = ""
    """Resolved configuration that `argv` means, as YAML; "" for a command without one."""
    cwd: str = field(default_factory=os.getcwd)
    """Working directory of the job, which relative paths start from."""

    @property
    def module(self) -> str:
        return "launch" if self.kind == "watch" else "lpl_pretrain"

    @property
    def command(self) -> list[str]:
        """Arguments that the job runs: `argv` with the stored copy of its configuration.

        Edits of the configuration file after submission do not reach the job.
        """
        if not self.config:
            return self.argv
        at = CONFIG_POSITION[self.kind]
        options = [word for word in self.argv[at + 1 :] if word.startswith("--")]
        return [*self.argv[:at], str(self.folder.config), *options]

    @property
    def array_dir(self) -> Path:
        """Folder of the array that this job may be a task of: the sweep's, or the run's."""
        return self.run_dir.parent if self.kind == "train" else self.run_dir

    @property
    def folder(self) -> JobFolder:
        """RUN/launch for training, a folder below it for other work on the run."""
        parent = self.run_dir / "launch"
        return JobFolder(parent if self.kind == "train" else parent / (self.part or self.kind))


class JobRecord(Section):
    """Record of the newest submission, as `launch.submit.prepare_folders` writes it."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    job: Optional[Annotated[str, Field(pattern=r"^[0-9]+(_[0-9]+)?$")]]
    kind: Literal["train", "encode", "evaluate", "sample", "watch"] = "train"
    part: str = ""
    argv: Annotated[list[str], Field(min_length=1)]
    run_dir: str = ""
    cwd: str = ""
    """Absent in records of older versions: relative paths start where `resume` is called."""
    nodes: PositiveInt
    profile: ClusterProfile
    at_most: Optional[PositiveInt] = None
    """Array tasks that may run at a time; absent outside of arrays."""
    step: NonNegativeInt = 0
    """Newest complete checkpoint at submission."""


def read_record(folder: JobFolder) -> JobRecord:
    """Read and check job.json.  Raises ConfigError that names the file and the invalid value."""
    return validate(JobRecord, folder.read_raw_record(), where=str(folder.record_file))


def read_spec(folder: JobFolder) -> tuple[JobSpec, JobRecord]:
    """The job to submit again, and its record.

    Raises ConfigError for a record that belongs to another folder, to another user, or that is not
    a command of this package.
    """
    record = read_record(folder)
    if record.argv[0] != record.kind or any("\0" in word for word in record.argv):
        raise ConfigError(
            f"{folder.record_file}: argv={record.argv!r} with kind={record.kind}: wanted a command "
            "that begins with its kind"
        )
    _check_owner(folder.record_file)
    config = folder.config.read_text(encoding="utf-8") if folder.config.is_file() else ""
    spec = JobSpec(
        record.kind,
        record.argv,
        Path(record.run_dir),
        record.nodes,
        part=record.part,
        config=config,
        cwd=record.cwd or os.getcwd(),
    )
    if spec.folder.path != folder.path or (record.part and record.kind == "train"):
        raise ConfigError(
            f"{folder.record_file}: is the record of {spec.folder.path} "
            f"(run_dir={record.run_dir!r}, part={record.part!r}): was the run moved or copied?  "
            "Launch the command again in its new folder"
        )
    _check_run_dir(spec)
    return spec, record


def _check_run_dir(spec: JobSpec) -> None:
    """Raises ConfigError for a training whose configuration writes to another run."""
    if spec.kind != "train":
        return
    config = str(Path(spec.cwd, spec.command[1]))
    settings = load_config(TrainConfig, config, spec.command[2:])
    configured = Path(spec.cwd, settings.run_dir or f"runs/{settings.name}")
    if configured.resolve() != spec.run_dir.resolve():
        raise ConfigError(
            f"{spec.folder.record_file}: its command trains in {configured}, and not in "
            f"{spec.run_dir}: launch the command again"
        )


def _check_owner(path: Path) -> None:
    """Raises ConfigError for a record of another user: its profile's `setup` is shell code."""
    owner = path.stat().st_uid
    if owner not in (os.geteuid(), 0):
        raise ConfigError(
            f"{path}: belongs to another user ({owner}), whose profile holds shell commands: "
            "launch the command again with a profile of yours"
        )
