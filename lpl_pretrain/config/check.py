"""Relations between sections, the data folder and the machines: whatever one value alone cannot get wrong.

All problems are listed at once.  Nothing here needs torch, so that a run is refused before it costs an allocation.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lpl_pretrain.config.dataset import DatasetIndex
from lpl_pretrain.config.identity import autoencoder_identity
from lpl_pretrain.config.load import differences, resolve_path
from lpl_pretrain.config.schema import Prediction, ScheduleKind, StrategyKind, TrainConfig
from lpl_pretrain.config.zero import read_zero_config
from lpl_pretrain.errors import ConfigError, DataError

FREE_TO_CHANGE = (
    "run_dir",
    "steps",
    "checkpoint",
    "log",
    "parallel",
    "batch.micro_batch_size",
    "autoencoder",
    "data.folder",
    "data.verify",
)
"""Keys that a run may change when it is continued: none of them changes what is learned up to a given step (a folder may
move; what lies in it is compared by fingerprint).  `steps` moves the end of a cosine, so it is free only without one."""


def grad_accum_steps(config: TrainConfig, dp_world_size: int) -> int:
    """Microbatches per rank per update."""
    total, micro = config.batch.global_batch_size, micro_batch_size(config, dp_world_size)
    if total % (micro * dp_world_size):
        raise ConfigError(
            f"batch.global_batch_size={total} is not a multiple of micro_batch_size={micro} x "
            f"dp_world_size={dp_world_size} = {micro * dp_world_size}"
        )
    return total // (micro * dp_world_size)


def micro_batch_size(config: TrainConfig, dp_world_size: int) -> int:
    """Samples per rank per forward."""
    if config.batch.micro_batch_size is not None:
        return config.batch.micro_batch_size
    if config.batch.global_batch_size % dp_world_size:
        raise ConfigError(
            f"batch.global_batch_size={config.batch.global_batch_size} is not a multiple of dp_world_size={dp_world_size}"
        )
    return config.batch.global_batch_size // dp_world_size


def check_run(config: TrainConfig, index: DatasetIndex, dp_world_size: int) -> None:
    """Raises ConfigError or DataError that lists everything that does not fit together."""
    grad_accum_steps(config, dp_world_size)
    if config.parallel.zero_config is not None:
        read_zero_config(config.parallel.zero_config)
    problems = [*_diffusion(config), *_lpl(config), *_model(config, index), *_strategy(config, dp_world_size)]
    if problems:
        raise ConfigError("\n".join(problems))
    _autoencoder(config, index)


def check_same_run(stored: TrainConfig, wanted: TrainConfig, where: Path) -> None:
    """Raises ConfigError naming the keys that make `wanted` another run than the one that lies in `where`."""
    free = tuple(key for key in FREE_TO_CHANGE if key != "steps" or stored.optimizer.decay == "constant")
    changed = {
        key: values
        for key, values in differences(stored, wanted).items()
        if not any(key == name or key.startswith(name + ".") for name in free)
    }
    if changed:
        lines = [f"  {key}: the run has {old!r}, you ask for {new!r}" for key, (old, new) in changed.items()]
        raise ConfigError(
            f"{where} belongs to another configuration:\n"
            + "\n".join(lines)
            + "\nset these back, or start a new run with another name or run_dir"
        )


def _diffusion(config: TrainConfig) -> list[str]:
    prediction, schedule = config.diffusion.prediction, config.diffusion.schedule
    if (prediction is Prediction.FLOW) != (schedule is ScheduleKind.RECTIFIED_FLOW):
        return [
            f"diffusion.schedule={schedule.value} with diffusion.prediction={prediction.value}: flow goes with rectified_flow; "
            "eps and v go with linear, scaled_linear or cosine"
        ]
    return []


def _lpl(config: TrainConfig) -> list[str]:
    problems: list[str] = []
    if config.lpl is None:
        return problems
    if config.lpl.gate.max_timestep is not None and config.diffusion.schedule is ScheduleKind.RECTIFIED_FLOW:
        problems.append(
            f"lpl.gate.max_timestep={config.lpl.gate.max_timestep}: rectified_flow has no integer timesteps; "
            "use lpl.gate.min_snr or lpl.gate.max_noise_level"
        )
    stages = decoder_stages(config.autoencoder)
    unknown = [stage for stage in config.lpl.stages or [] if stage not in stages]
    if unknown or config.lpl.stages == []:
        problems.append(f"lpl.stages={config.lpl.stages}: the decoder in {config.autoencoder} has {', '.join(stages)}")
    if config.lpl.outliers.enabled and config.lpl.outliers.first_stage >= len(stages):
        problems.append(
            f"lpl.outliers.first_stage={config.lpl.outliers.first_stage}: the decoder has {len(stages)} stages; "
            "use a smaller number, or outliers.enabled=false"
        )
    return problems


def _model(config: TrainConfig, index: DatasetIndex) -> list[str]:
    patch = config.model.patch_size
    return [
        f"model.patch_size={patch} does not divide the latent {side}={size} of {config.data.folder}: use a divisor of {size}"
        for side, size in (("height", index.latent.height), ("width", index.latent.width))
        if size % patch
    ]


def _strategy(config: TrainConfig, dp_world_size: int) -> list[str]:
    if config.parallel.strategy is StrategyKind.LOCAL and dp_world_size > 1:
        return [f"parallel.strategy=local with {dp_world_size} processes: use ddp, fsdp2 or zero, or start one process"]
    return []


def _autoencoder(config: TrainConfig, index: DatasetIndex) -> None:
    found = autoencoder_identity(resolve_path(config.autoencoder))
    if found != index.autoencoder.identity:
        raise DataError(
            f"data.folder={config.data.folder} was encoded by autoencoder {index.autoencoder.identity[:12]}, but "
            f"autoencoder={config.autoencoder} is {found[:12]}: name the autoencoder that made it, or encode again"
        )


def decoder_stages(autoencoder: str) -> list[str]:
    """Names of the decoder's stages in order: `mid`, `up0`, ... read from config.json alone."""
    settings: dict[str, Any] = json.loads((resolve_path(autoencoder) / "config.json").read_text())
    return ["mid", *(f"up{i}" for i in range(len(settings["up_block_types"])))]
