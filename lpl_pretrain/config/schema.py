"""The training configuration: frozen pydantic models, unknown keys refused, units in the names.

Suffixes: `_steps` optimizer updates, `_samples` training samples over all ranks, `_px` pixels,
`_mib` mebibytes, `_s` seconds.  Nothing here imports torch: a configuration is checked on a login
node, before a job asks for accelerators.
"""

from __future__ import annotations

from typing import Optional

from pydantic import (
    NonNegativeInt,
    PositiveInt,
    ValidationInfo,
    field_validator,
)

from lpl_pretrain.config.base import Name, PathText, Section
from lpl_pretrain.config.data import CacheConfig, DataConfig
from lpl_pretrain.config.diffusion import (
    ConditioningConfig,
    DiffusionConfig,
    Prediction,
    ScheduleKind,
    TimestepConfig,
    WeightingConfig,
)
from lpl_pretrain.config.init_from import InitConfig
from lpl_pretrain.config.lpl import LPLConfig
from lpl_pretrain.config.model import ModelConfig
from lpl_pretrain.config.optimizer import OnSpike, OptimizerConfig, SpikeConfig
from lpl_pretrain.config.parallel import (
    ActivationCheckpointing,
    ParallelConfig,
    Precision,
    StrategyKind,
)
from lpl_pretrain.config.preflight import PreflightConfig
from lpl_pretrain.config.tracking import (
    CheckpointConfig,
    EMAConfig,
    LogConfig,
    WandbConfig,
    WatchdogConfig,
    power_kind,
)

__all__ = [
    "ActivationCheckpointing",
    "BatchConfig",
    "CacheConfig",
    "CheckpointConfig",
    "ConditioningConfig",
    "DataConfig",
    "DiffusionConfig",
    "EMAConfig",
    "LogConfig",
    "OnSpike",
    "OptimizerConfig",
    "ParallelConfig",
    "Precision",
    "Prediction",
    "ScheduleKind",
    "SpikeConfig",
    "StrategyKind",
    "TimestepConfig",
    "TrainConfig",
    "WandbConfig",
    "WatchdogConfig",
    "WeightingConfig",
    "power_kind",
]


class BatchConfig(Section):
    """Samples per update and per forward."""

    global_batch_size: PositiveInt
    """Samples per optimizer update, over all ranks."""
    micro_batch_size: Optional[PositiveInt] = None
    """Samples per rank per forward; absent: all of a rank's samples of an update.  Gradient
    accumulation follows from the two and the number of ranks.
    """


class TrainConfig(Section):
    """One training run (configs/train/*.yaml)."""

    name: Name
    """Name of the run, and of its folder."""
    run_dir: Optional[PathText] = None
    """Folder of everything that the run writes; absent: runs/<name>."""
    seed: NonNegativeInt = 0
    """Seed of every random draw."""
    steps: PositiveInt
    """Optimizer updates in total."""
    autoencoder: PathText
    """Folder of a diffusers autoencoder (families: config/autoencoder.py), or `asset:NAME` for one
    that ships with the package.
    """
    data: DataConfig
    """Encoded latents and how they are read."""
    model: ModelConfig
    """Denoiser; `kind` selects the family: dit (the default), mmdit or unet."""
    init_from: Optional[InitConfig] = None
    """Initial weights of the denoiser; absent: random ones."""
    conditioning: ConditioningConfig = ConditioningConfig()
    """Class labels and text that the denoiser is conditioned on."""
    diffusion: DiffusionConfig
    """Diffusion process and its loss."""
    lpl: Optional[LPLConfig] = None
    """Latent Perceptual Loss; null, or a target_fraction of 0: without it."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """Optimizer, learning-rate schedule, gradient clipping and guards."""
    batch: BatchConfig
    """Samples per update and per forward."""
    parallel: ParallelConfig = ParallelConfig()
    """Sharding, precision and memory of the denoiser's training."""
    ema: EMAConfig = EMAConfig()
    """Averages of the parameters."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """Times at which checkpoints are saved, and which are kept."""
    inline_evaluation: Optional[PathText] = None
    """Evaluation protocol (configs/evaluate/*.yaml) that scores every checkpoint while training
    waits; for single machines.  Elsewhere `lpl-pretrain evaluate --watch` scores them in processes
    of its own.
    """
    log: LogConfig = LogConfig()
    """Metrics and logs."""
    preflight: Optional[PreflightConfig] = PreflightConfig()
    """Checks of the nodes before training; null: none."""
    watchdog: Optional[WatchdogConfig] = WatchdogConfig()
    """Detection of hangs; null: none."""

    @field_validator("lpl")
    @classmethod
    def _resolve_lpl(cls, lpl: Optional[LPLConfig], fields: ValidationInfo) -> Optional[LPLConfig]:
        """Replaces a target_fraction of 0 (the baseline of a sweep) by no LPL, and a start as a
        fraction of `steps` by a number of steps.
        """
        if lpl is None or lpl.target_fraction == 0:
            return None
        if "steps" not in fields.data:
            return lpl
        return lpl.starting_within(fields.data["steps"])
