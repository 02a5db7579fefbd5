"""A job's record, RUN/launch/job.json, read back: nothing in it is run that is not a command of
ours.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Literal, Optional

from pydantic import ConfigDict, Field, PositiveInt

from launch.folder import JobFolder
from launch.job_spec import JobSpec
from launch.profile import ClusterProfile
from lpl_pretrain.config.base import Section
from lpl_pretrain.config.load import load_config, validate
from lpl_pretrain.config.schema import TrainConfig
from lpl_pretrain.errors import ConfigError


class JobRecord(Section):
    """The newest submission, as `launch.submit.begin` writes it."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    job: Optional[Annotated[str, Field(pattern=r"^[0-9]+(_[0-9]+)?$")]]
    kind: Literal["train", "encode", "evaluate", "sample", "watch"] = "train"
    part: str = ""
    argv: Annotated[list[str], Field(min_length=1)]
    run_dir: str = ""
    cwd: str = ""
    """Absent before this key was known: relative paths begin where `resume` is called."""
    nodes: PositiveInt
    profile: ClusterProfile
    at_most: Optional[PositiveInt] = None


def read_record(folder: JobFolder) -> JobRecord:
    """Raises ConfigError that names the file and what is wrong with it."""
    return validate(JobRecord, folder.read_raw_record(), where=str(folder.record_file))


def read_spec(folder: JobFolder) -> tuple[JobSpec, JobRecord]:
    """What to submit again.  Raises ConfigError for a record that is not of this folder or not of
    our making.
    """
    record = read_record(folder)
    if record.argv[0] != record.kind or any("\0" in word for word in record.argv):
        raise ConfigError(
            f"{folder.record_file}: argv={record.argv!r} with kind={record.kind}: wanted a command that "
            "begins with its kind"
        )
    _refuse_foreign_owner(folder.record_file)
    config = folder.config.read_text(encoding="utf-8") if folder.config.is_file() else ""
    cwd = record.cwd or os.getcwd()
    spec = JobSpec(
        record.kind,
        record.argv,
        Path(record.run_dir),
        record.nodes,
        part=record.part,
        config=config,
        cwd=cwd,
    )
    if spec.folder.path != folder.path or (record.part and record.kind == "train"):
        raise ConfigError(
            f"{folder.record_file}: is the record of {spec.folder.path} (run_dir={record.run_dir!r}, "
            f"part={record.part!r}): "
            "was the run moved or copied?  Launch the command again in its new place"
        )
    _check_run_dir(spec)
    return spec, record


def _check_run_dir(spec: JobSpec) -> None:
    """A training says itself where it writes: that has to be this run."""
    if spec.kind != "train":
        return
    config, *overrides = [str(Path(spec.cwd, spec.command[1])), *spec.command[2:]]
    settings = load_config(TrainConfig, config, overrides)
    said = Path(spec.cwd, settings.run_dir or f"runs/{settings.name}")
    if said.resolve() != spec.run_dir.resolve():
        raise ConfigError(
            f"{spec.folder.record_file}: its command trains in {said}, and not in {spec.run_dir}: "
            "launch the command again"
        )


def _refuse_foreign_owner(path: Path) -> None:
    """A record holds lines of shell, the profile's `setup`: those of other users are not run."""
    owner = path.stat().st_uid
    if owner not in (os.geteuid(), 0):
        raise ConfigError(
            f"{path}: belongs to another user ({owner}), whose profile holds shell commands: "
            "launch the command again with a profile of yours"
        )
