"""Whether a run can begin in a folder, or go on there: asked on the login node and by every rank."""

from __future__ import annotations

from typing import Any

import yaml

from lpl_pretrain.config.check import check_run, check_same_run
from lpl_pretrain.config.dataset import INDEX_NAME, DatasetIndex
from lpl_pretrain.config.load import load_run_config
from lpl_pretrain.config.rundir import RunDir
from lpl_pretrain.config.schema import TrainConfig
from lpl_pretrain.errors import ConfigError


def check_start(
    config: TrainConfig, run_dir: RunDir, index: DatasetIndex, dp_world_size: int
) -> None:
    """Raises ConfigError or DataError.  Of a run that was begun nothing is asked about where its
    first weights came from.
    """
    begun = bool(run_dir.complete_checkpoints())
    check_run(
        config.model_copy(update={"init_from": None}) if begun else config, index, dp_world_size
    )
    check_folder(config, run_dir)


def check_folder(config: TrainConfig, run_dir: RunDir) -> None:
    """Raises ConfigError where another run, or data, lie in the folder.

    A run that never made a step takes a corrected configuration.  One that logged steps and saved
    none does not, although it starts at step 0 again: its metrics are of the configuration that
    made them.
    """
    if not run_dir.config.is_file():
        if (run_dir.path / INDEX_NAME).is_file():
            raise ConfigError(
                f"run_dir={run_dir.path}: holds data ({INDEX_NAME}), wanted a folder for a run: "
                "name another one"
            )
    elif run_dir.complete_checkpoints():
        check_same_run(load_run_config(run_dir), config, run_dir.path)
    elif run_dir.has_logged_steps():
        try:
            check_same_run(load_run_config(run_dir), config, run_dir.path)
        except ConfigError as error:
            remedy = (
                "it logged steps under that configuration and saved no checkpoint: remove the "
                "folder to start over in it"
            )
            raise ConfigError(f"{error}; {remedy}") from None
    elif (name := stored_name(run_dir)) not in (None, config.name):
        raise ConfigError(
            f"run_dir={run_dir.path}: belongs to run {name!r}, which made no step yet; you start "
            f"{config.name!r}: "
            "name another folder, or remove this one"
        )


def finished(config: TrainConfig, run_dir: RunDir) -> str | None:
    """Words for a run that has made all steps that are asked for; None for any other.

    Raises ConfigError where the folder belongs to another configuration.
    """
    complete = run_dir.complete_checkpoints()
    if not complete or complete[-1] < config.steps:
        return None
    if run_dir.config.is_file():
        check_same_run(load_run_config(run_dir), config, run_dir.path)
    if complete[-1] > config.steps:
        return (
            f"complete: it has made {complete[-1]} steps, and steps={config.steps} asks for no "
            "more; nothing to do"
        )
    cosine = config.optimizer.lr_schedule == "cosine"
    more = (
        "a cosine ends with its steps: a longer run is a new one"
        if cosine
        else "raise steps to go on"
    )
    return f"complete: {complete[-1]} of {config.steps} steps; nothing to do ({more})"


def stored_name(run_dir: RunDir) -> Any:
    """None where config.yaml cannot be read: nothing is lost with it before the first step."""
    try:
        found = yaml.safe_load(run_dir.config.read_text())
    except (yaml.YAMLError, UnicodeDecodeError):
        return None
    return found.get("name") if isinstance(found, dict) else None
