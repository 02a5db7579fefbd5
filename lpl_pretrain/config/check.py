"""Relations between sections, the data folder and the machines: whatever one value alone cannot get
wrong.

All problems are listed at once.  Nothing here needs torch, so that a run is refused before it costs
an allocation.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from lpl_pretrain.config.autoencoder import read_autoencoder
from lpl_pretrain.config.dataset import DatasetIndex
from lpl_pretrain.config.hashing import autoencoder_identity
from lpl_pretrain.config.init_from import initial_problems
from lpl_pretrain.config.load import differences, flatten, resolve_path
from lpl_pretrain.config.lpl_check import FIRST_BETA as FIRST_BETA
from lpl_pretrain.config.lpl_check import lpl_problems
from lpl_pretrain.config.model import DiTConfig
from lpl_pretrain.config.online_text import online_problems, stored_encoders, text_entries
from lpl_pretrain.config.renamed_keys import first_key
from lpl_pretrain.config.schema import (
    DataConfig,
    ParallelConfig,
    Prediction,
    ScheduleKind,
    StrategyKind,
    TrainConfig,
)
from lpl_pretrain.config.text_layout import caption_problems, text_problems
from lpl_pretrain.config.zero import zero_settings
from lpl_pretrain.errors import ConfigError, DataError

FREE_TO_CHANGE = (
    "run_dir",
    "steps",
    "checkpoint",
    "ema.snapshot_every_steps",
    "optimizer.on_nonfinite",
    "optimizer.max_skipped_updates",
    "optimizer.on_spike",
    "optimizer.spike",
    "inline_evaluation",
    "log",
    "preflight",
    "watchdog",
    "parallel",
    "batch.micro_batch_size",
    "autoencoder",
    "data.folder",
    "data.verify",
    "data.workers",
    "data.on_error",
    "data.max_skipped_fraction",
    "data.cache",
    "lpl.chunk_size",
    "lpl.activation_checkpointing",
    "lpl.compile",
)
"""Keys that a run may change when it is continued: none of them changes what is learned up to a
given step (a folder may move; what lies in it is compared by fingerprint).  `steps` moves the end
of a cosine, so it is free only without one.
"""


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
            f"batch.global_batch_size={config.batch.global_batch_size} is not a multiple of "
            f"dp_world_size={dp_world_size}"
        )
    return config.batch.global_batch_size // dp_world_size


def check_run(config: TrainConfig, index: DatasetIndex, dp_world_size: int) -> None:
    """Raises ConfigError or DataError that lists everything that does not fit together."""
    grad_accum_steps(config, dp_world_size)
    if config.parallel.strategy.is_zero:
        zero_settings(config.parallel)
    problems = [
        *data_problems(config.data, index, stored_encoders(config.conditioning)),
        *online_problems(config.conditioning, config.data.folder, index.captions),
        *text_problems(
            config.conditioning.text_encoders,
            text_entries(config.conditioning, index.text),
            config.data.folder,
            model=config.model,
        ),
        *caption_problems(
            config.conditioning.text_encoders,
            config.data.folder,
            captions=index.captions,
            samples=index.samples,
        ),
        *initial_problems(config.init_from),
        *objective_problems(config),
        *optimizer_problems(config),
        *lpl_problems(config, index, grad_accum_steps(config, dp_world_size)),
        *model_problems(config, index),
        *_strategy(config, dp_world_size),
    ]
    if problems:
        raise ConfigError("\n".join(problems))
    _autoencoder(config, index)


def check_same_run(stored: TrainConfig, wanted: TrainConfig, where: Path) -> None:
    """Raises ConfigError naming the keys that make `wanted` another run than the one that lies in
    `where`.
    """
    changed = {
        key: values
        for key, values in differences(stored, wanted).items()
        if not _is_free(key, stored)
    }
    if changed:
        lines = [
            f"  {key}: the run has {old!r}, you ask for {new!r}"
            for key, (old, new) in changed.items()
        ]
        if "lpl.start_step" in changed and stored.steps != wanted.steps:
            lines.append(
                f"  (a start as a fraction moves with steps, {stored.steps} then and "
                f"{wanted.steps} now: write lpl.start_step={changed['lpl.start_step'][0]})"
            )
        raise ConfigError(
            f"{where} belongs to another configuration:\n"
            + "\n".join(lines)
            + "\nset these back, or start a new run with another name or run_dir"
        )


def run_identity(config: TrainConfig) -> str:
    """sha256 over what the run learns by: all keys that may not change when it goes on and that are
    not at their default.

    Neither a key that a later version adds nor one that it renames changes it.
    """
    settings = flatten(config.model_dump(mode="json", exclude_defaults=True))
    kept = {
        first_key("TrainConfig", key): value
        for key, value in settings.items()
        if not _is_free(key, config)
    }
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()


def _is_free(key: str, config: TrainConfig) -> bool:
    if key == "steps":
        return config.optimizer.lr_schedule != "cosine"
    return any(key == name or key.startswith(name + ".") for name in FREE_TO_CHANGE)


def data_problems(data: DataConfig, index: DatasetIndex, text: Sequence[str] = ()) -> list[str]:
    """Problems with a data folder that lacks what a run needs; `text`: names of text encoders."""
    problems = [
        f"data.folder={data.folder}: has no embeddings by {name!r}, it has "
        f"{sorted(index.text) or 'none'}: encode it with that text encoder"
        for name in text
        if name not in index.text
    ]
    if data.flips and not index.flipped:
        problems.append(
            f"data.flips=true: {data.folder} holds no flipped latents: encode it with flips: true, "
            "or set data.flips=false"
        )
    return problems


def objective_problems(config: TrainConfig) -> list[str]:
    diffusion = config.diffusion
    prediction, schedule, shift = (
        diffusion.prediction,
        diffusion.schedule,
        diffusion.timesteps.shift,
    )
    problems = []
    if (prediction is Prediction.FLOW) != (schedule is ScheduleKind.RECTIFIED_FLOW):
        problems.append(
            f"diffusion.schedule={schedule.value} with diffusion.prediction={prediction.value}: "
            "flow goes with rectified_flow; eps and v go with linear, scaled_linear or cosine"
        )
    if prediction is Prediction.EPS and (
        schedule is ScheduleKind.COSINE or diffusion.zero_terminal_snr
    ):
        ending = "zero_terminal_snr=true" if diffusion.zero_terminal_snr else "schedule=cosine"
        problems.append(
            f"diffusion.prediction=eps with diffusion.{ending}: the last timesteps hold next to "
            "nothing of the data, so that no estimate of it follows from eps and sampling cannot "
            "start: use v"
        )
    if diffusion.zero_terminal_snr and schedule is ScheduleKind.RECTIFIED_FLOW:
        problems.append(
            "diffusion.zero_terminal_snr=true with schedule=rectified_flow: it ends in pure noise "
            "anyway; remove it"
        )
    if (
        isinstance(config.model, DiTConfig)
        and config.model.learned_sigma
        and schedule is ScheduleKind.RECTIFIED_FLOW
    ):
        problems.append(
            "model.learned_sigma=true with diffusion.schedule=rectified_flow: its steps have no "
            "variance; set false"
        )
    if shift != 1.0 and schedule is not ScheduleKind.RECTIFIED_FLOW:
        problems.append(
            f"diffusion.timesteps.shift={shift} with schedule={schedule.value}: it is for "
            "rectified_flow; set it to 1"
        )
    return problems


def optimizer_problems(config: TrainConfig) -> list[str]:
    parallel = config.parallel
    if config.optimizer.kind != "muon":
        return []
    if parallel.strategy.is_zero:
        return [
            f"optimizer.kind='muon' with parallel.strategy={parallel.strategy.value!r}: "
            "DeepSpeed hands an optimizer flat partitions, Muon wants matrices: use fsdp2, or adamw"
        ]
    if parallel.cpu_offload:
        return [
            "optimizer.kind='muon' with parallel.cpu_offload=true: its matrix products belong on "
            "the device: set one of them back"
        ]
    return []


def model_problems(config: TrainConfig, index: DatasetIndex) -> list[str]:
    multiple, kind = config.model.latent_multiple, config.model.kind
    what = (
        f"model.kind=unet halves latents to 1/{multiple}, which"
        if kind == "unet"
        else f"model.patch_size={multiple}"
    )
    return [
        f"{what} does not divide the latent {side}={size} of {config.data.folder}: wanted a "
        f"divisor of {size}"
        for side, size in sorted(
            {
                (side, getattr(bucket, side))
                for bucket in index.buckets
                for side in ("height", "width")
            }
        )
        if size % multiple
    ]


def _strategy(config: TrainConfig, dp_world_size: int) -> list[str]:
    if config.parallel.strategy is StrategyKind.LOCAL and dp_world_size > 1:
        return [
            f"parallel.strategy=local with {dp_world_size} processes: use ddp, fsdp2 or zero2, or "
            "start one process"
        ]
    try:
        check_shard_size(config.parallel, dp_world_size)
    except ConfigError as problem:
        return [str(problem)]
    return []


def check_shard_size(parallel: ParallelConfig, dp_world_size: int) -> None:
    """Raises ConfigError when ranks cannot be grouped."""
    if parallel.shard_size is not None and dp_world_size % parallel.shard_size:
        divisors = [size for size in range(1, dp_world_size + 1) if dp_world_size % size == 0]
        raise ConfigError(
            f"parallel.shard_size={parallel.shard_size} does not divide the {dp_world_size} "
            f"processes into equal groups: use one of {', '.join(map(str, divisors))}"
        )


def _autoencoder(config: TrainConfig, index: DatasetIndex) -> None:
    facts, stored = (
        read_autoencoder(config.autoencoder, resolve_path(config.autoencoder)),
        index.autoencoder,
    )
    found = autoencoder_identity(resolve_path(config.autoencoder))
    made = f"data.folder={config.data.folder} was encoded by autoencoder {stored.identity[:12]}"
    remedy = "name the autoencoder that made it, or encode again"
    if facts.scale is not None and (facts.shift, facts.scale) != (stored.shift, stored.scale):
        raise ConfigError(
            f"{made} with shift {stored.shift} and scale {stored.scale}, but "
            f"autoencoder={config.autoencoder} ({found[:12]}) has shift {facts.shift} and scale "
            f"{facts.scale}: {remedy}"
        )
    if found != stored.identity:
        raise DataError(f"{made}, but autoencoder={config.autoencoder} is {found[:12]}: {remedy}")
