"""`--sweep key=value,value`: every combination of the values is a run of its own, named after them,
in the folder of the sweep.
"""

from __future__ import annotations

import hashlib
import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from launch.folder import JobFolder
from launch.script import resolved
from lpl_pretrain.cli.train import accepted
from lpl_pretrain.config.load import load_config
from lpl_pretrain.config.override import as_override
from lpl_pretrain.config.rundir import RunDir
from lpl_pretrain.config.schema import TrainConfig
from lpl_pretrain.errors import ConfigError, LPLError
from lpl_pretrain.runtime.world import World

NAMED_BY_US = ("name", "run_dir")
LONGEST_NAME = 180


@dataclass(frozen=True)
class PlannedRun:
    """One that has been checked."""

    run_dir: Path
    argv: list[str]
    """Behind `lpl-pretrain`."""
    settings: TrainConfig


def plan_runs(
    config: str, overrides: Sequence[str], sweeps: Sequence[str], ranks: int
) -> list[PlannedRun]:
    """One, or one for each combination.  Raises ConfigError that says of every wrong one what is
    wrong with it.
    """
    found, problems = [], []
    for changes in combinations(sweeps):
        try:
            settings = load_config(TrainConfig, config, [*overrides, *changes])
            folder = resolved(settings.run_dir or f"runs/{settings.name}", "run_dir")
            run_dir = folder / run_name(changes)
            settings = settings.model_copy(update={"run_dir": str(run_dir)})
            check_sweep_folder(folder, bool(sweeps))
            accepted(settings, RunDir(run_dir), World(world_size=ranks))
        except LPLError as problem:
            if not sweeps:
                raise
            problems.append(f"{run_name(changes)}: {problem}")
            continue
        run_dir_override = as_override("run_dir", str(run_dir))
        argv = ["train", str(Path(config).resolve()), *overrides, *changes, run_dir_override]
        found.append(PlannedRun(run_dir, argv, settings))
    if problems:
        raise ConfigError("\n".join(problems))
    return found


def check_sweep_folder(folder: Path, sweep: bool) -> None:
    """Raises ConfigError where a folder would be a run and hold a sweep's runs: commands on it
    could mean either.
    """
    if sweep and (
        RunDir(folder).config.is_file() or JobFolder(folder / "launch").record_file.is_file()
    ):
        raise ConfigError(
            f"{folder}: is a run itself: give the sweep a folder of its own, run_dir=..."
        )
    if not sweep and any(folder.glob("*/launch/job.json")):
        raise ConfigError(
            f"{folder}: holds the runs of a sweep: give this one a folder among them, "
            f"run_dir={folder}/NAME"
        )


def combinations(sweeps: Sequence[str]) -> list[tuple[str, ...]]:
    """Overrides of each; the last key changes fastest.  Without a sweep it is one that changes
    nothing.
    """
    axes = [axis(sweep) for sweep in sweeps]
    keys = [sweep.partition("=")[0] for sweep in sweeps]
    for key in keys:
        if key in NAMED_BY_US:
            raise ConfigError(f"--sweep {key}: not to be swept: each run is named after what is")
        if keys.count(key) > 1:
            raise ConfigError(
                f"--sweep {key}: given {keys.count(key)} times; give all its values at once: "
                f"{key}=1,2"
            )
    found = list(itertools.product(*axes))
    names = [run_name(changes) for changes in found]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise ConfigError(
            f"--sweep: {names.count(twice)} combinations would be called {twice}: leave all "
            "but one out"
        )
    return found


def axis(sweep: str) -> list[str]:
    """`key=value` for each value."""
    key, _, text = sweep.partition("=")
    values = split(text)
    if not key or not all(values):
        raise ConfigError(
            f"--sweep {sweep}: wanted key=value,value, such as lpl.target_share=0.1,0.2"
        )
    return [f"{key}={value}" for value in values]


def split(text: str) -> list[str]:
    """At the commas that are outside of brackets and quotes.  Raises ConfigError where one of these
    is left open.

    As in YAML, a quote opens at the beginning of a value only: `it's` has none.
    """
    parts, depth, quote, escaped = [""], 0, "", False
    for character in text:
        begins = parts[-1].rstrip()[-1:] in ("", "[", "{", ",", ":")
        if quote:
            closes = character == quote and not escaped
            escaped = quote == '"' and character == "\\" and not escaped
            quote = "" if closes else quote
        elif character in "'\"" and begins:
            quote = character
        else:
            depth += (character in "[{") - (character in "]}")
        if character == "," and not depth and not quote:
            parts.append("")
        else:
            parts[-1] += character
    if depth or quote:
        raise ConfigError(
            f"--sweep: {text!r}: {quote or 'a bracket'} is left open: close it, or put the value "
            "in quotes"
        )
    return [part.strip() for part in parts]


def run_name(changes: Sequence[str]) -> str:
    """Of a folder: `lpl.target_share=0.1,optimizer.lr=1e-4`, and whatever could trouble a shell or
    a file system is `_`.
    """
    words = (change.partition("=") for change in changes)
    name = ",".join(f"{plain(key)}={plain(value)}" for key, _, value in words)
    if len(name) > LONGEST_NAME:
        name = f"{name[: LONGEST_NAME - 9]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"
    return name


def plain(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9._+-]+", "_", text).strip("_")
