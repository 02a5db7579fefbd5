"""Whether a run may start or resume in a folder; checked on the login node and by every rank."""

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
    """Raises ConfigError or DataError.  Once a run has a checkpoint, its initial weights need not
    exist any more.
    """
    checked = config
    if run_dir.complete_checkpoints():
        checked = config.model_copy(update={"init_from": None})
    check_run(checked, index, dp_world_size)
    check_folder(config, run_dir)


def check_folder(config: TrainConfig, run_dir: RunDir) -> None:
    """Raises ConfigError if the folder holds another run, or data.

    A run that never made a step may start with a corrected configuration.  A run that logged steps
    and saved no checkpoint may not, although it starts at step 0 again: its metrics belong to the
    configuration that they were logged under.
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
            f"{config.name!r}: name another folder, or remove this one"
        )


def finished(config: TrainConfig, run_dir: RunDir) -> str | None:
    """Message about a run that has made all of its steps; None for any other run, also where the
    checkpoint of its last step has lost files: training resumes from the one before.

    Raises ConfigError if the folder belongs to another configuration.
    """
    done = run_dir.last_intact_step()
    if done is None or done < config.steps:
        return None
    if run_dir.config.is_file():
        check_same_run(load_run_config(run_dir), config, run_dir.path)
    if done > config.steps:
        return (
            f"complete: it has made {done} steps, and steps={config.steps} asks for no more; "
            "nothing to do"
        )
    if config.optimizer.lr_schedule == "cosine":
        remedy = "a cosine ends with its steps: a longer run is a new one"
    else:
        remedy = "raise steps to go on"
    return f"complete: {done} of {config.steps} steps; nothing to do ({remedy})"


def stored_name(run_dir: RunDir) -> Any:
    """Name in config.yaml; None where it cannot be read: before the first step nothing is lost."""
    try:
        stored = yaml.safe_load(run_dir.config.read_text())
    except (yaml.YAMLError, UnicodeDecodeError):
        return None
    return stored.get("name") if isinstance(stored, dict) else None
