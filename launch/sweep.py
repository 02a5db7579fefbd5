"""`--sweep key=value,value`: a run for each combination of the values, named after them, in the
sweep's folder.
"""

from __future__ import annotations

import hashlib
import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from launch.job import JobSpec
from launch.job_folder import JobFolder
from launch.script_checks import resolve_path
from lpl_pretrain.cli.train import accepted
from lpl_pretrain.config.load import dump, load_config
from lpl_pretrain.config.override import as_override
from lpl_pretrain.config.resume import finished
from lpl_pretrain.config.rundir import RunDir
from lpl_pretrain.config.schema import TrainConfig
from lpl_pretrain.errors import ConfigError, LPLError
from lpl_pretrain.runtime.world import World

NOT_SWEPT = ("name", "run_dir")
LONGEST_NAME = 180


@dataclass(frozen=True)
class PlannedRun:
    """A training run whose configuration has been checked."""

    run_dir: Path
    argv: list[str]
    """Arguments of `lpl-pretrain`."""
    settings: TrainConfig

    def finished_message(self) -> str | None:
        """Message that the run has made all its steps; None when steps are left."""
        return finished(self.settings, RunDir(self.run_dir))

    def job_spec(self, nodes: int) -> JobSpec:
        return JobSpec("train", self.argv, self.run_dir, nodes, config=dump(self.settings))


def plan_runs(
    config: str, overrides: Sequence[str], sweeps: Sequence[str], ranks: int
) -> list[PlannedRun]:
    """Plan one run, or one for each combination of a sweep.

    Raises ConfigError that lists the problem of every combination that is refused.
    """
    runs = []
    problems = []
    for changes in combinations(sweeps):
        try:
            settings = load_config(TrainConfig, config, [*overrides, *changes])
            folder = resolve_path(settings.run_dir or f"runs/{settings.name}", "run_dir")
            run_dir = folder / run_name(changes)
            settings = settings.model_copy(update={"run_dir": str(run_dir)})
            check_sweep_folder(folder, bool(sweeps))
            accepted(settings, RunDir(run_dir), World(world_size=ranks))
        except LPLError as error:
            if not sweeps:
                raise
            problems.append(f"{run_name(changes)}: {error}")
            continue
        run_dir_override = as_override("run_dir", str(run_dir))
        argv = ["train", str(Path(config).resolve()), *overrides, *changes, run_dir_override]
        runs.append(PlannedRun(run_dir, argv, settings))
    if problems:
        raise ConfigError("\n".join(problems))
    return runs


def check_sweep_folder(folder: Path, sweep: bool) -> None:
    """Raises ConfigError where a folder would be both a run and the folder of a sweep: commands on
    it could mean either.
    """
    if sweep:
        run = RunDir(folder).config
        record = JobFolder(folder / "launch").record_file
        if run.is_file() or record.is_file():
            raise ConfigError(
                f"{folder}: is a run itself: give the sweep a folder of its own, run_dir=..."
            )
    elif any(folder.glob("*/launch/job.json")):
        raise ConfigError(
            f"{folder}: holds the runs of a sweep: give this one a folder among them, "
            f"run_dir={folder}/NAME"
        )


def combinations(sweeps: Sequence[str]) -> list[tuple[str, ...]]:
    """Overrides of each run; the last key changes fastest.  One run without overrides when there is
    no sweep.
    """
    axes = [parse_axis(sweep) for sweep in sweeps]
    keys = [sweep.partition("=")[0] for sweep in sweeps]
    for key in keys:
        if key in NOT_SWEPT:
            raise ConfigError(f"--sweep {key}: cannot be swept: runs are named after their values")
        if keys.count(key) > 1:
            raise ConfigError(
                f"--sweep {key}: given {keys.count(key)} times; give all its values at once: "
                f"{key}=1,2"
            )
    runs = list(itertools.product(*axes))
    names = [run_name(changes) for changes in runs]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(
                f"--sweep: {names.count(name)} combinations would be called {name}: remove all "
                "but one"
            )
    return runs


def parse_axis(sweep: str) -> list[str]:
    """One override `key=value` for each value."""
    key, _, text = sweep.partition("=")
    values = split_values(text)
    if not key or not all(values):
        raise ConfigError(
            f"--sweep {sweep}: wanted key=value,value, such as lpl.target_fraction=0.1,0.2"
        )
    return [f"{key}={value}" for value in values]


def split_values(text: str) -> list[str]:
    """Split at the commas outside of brackets and quotes.

    Raises ConfigError for a bracket or quote that is not closed.  As in YAML, a quote opens at the
    beginning of a value only: `it's` has none.
    """
    values = [""]
    depth = 0
    quote = ""
    escaped = False
    for character in text:
        at_start = values[-1].rstrip()[-1:] in ("", "[", "{", ",", ":")
        if quote:
            closes = character == quote and not escaped
            escaped = quote == '"' and character == "\\" and not escaped
            quote = "" if closes else quote
        elif character in "'\"" and at_start:
            quote = character
        else:
            depth += (character in "[{") - (character in "]}")
        if character == "," and not depth and not quote:
            values.append("")
        else:
            values[-1] += character
    if depth or quote:
        raise ConfigError(
            f"--sweep: {text!r}: {quote or 'a bracket'} is left open: close it, or put the value "
            "in quotes"
        )
    return [value.strip() for value in values]


def run_name(changes: Sequence[str]) -> str:
    """Folder name `lpl.target_fraction=0.1,optimizer.lr=1e-4`, with `_` for characters that are
    special to a shell or a file system.
    """
    pairs = (change.partition("=") for change in changes)
    name = ",".join(f"{sanitize(key)}={sanitize(value)}" for key, _, value in pairs)
    if len(name) > LONGEST_NAME:
        name = f"{name[: LONGEST_NAME - 9]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"
    return name


def sanitize(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9._+-]+", "_", text).strip("_")
