"""Whether a run can begin in a folder, or go on there: asked on the login node and by every rank."""

from __future__ import annotations

from lpl_pretrain.config.check import check_run, check_same_run
from lpl_pretrain.config.dataset import DatasetIndex
from lpl_pretrain.config.load import load_run_config
from lpl_pretrain.config.rundir import RunDir
from lpl_pretrain.config.schema import TrainConfig


def check_start(config: TrainConfig, run_dir: RunDir, index: DatasetIndex, dp_world_size: int) -> None:
    """Raises ConfigError or DataError.  Of a run that was begun nothing is asked about where its first weights came from."""
    begun = bool(run_dir.complete_checkpoints())
    check_run(config.model_copy(update={"init_from": None}) if begun else config, index, dp_world_size)
    if run_dir.config.is_file():
        check_same_run(load_run_config(run_dir), config, run_dir.path)
