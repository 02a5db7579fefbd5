"""Relations of the `lpl` section with the rest of a run: LPL that never runs, decoders that do not
fit.
"""

from __future__ import annotations

import math

from lpl_pretrain.config.autoencoder import read_autoencoder
from lpl_pretrain.config.betas import BETA_RANGE, COSINE_OFFSET
from lpl_pretrain.config.dataset import DatasetIndex
from lpl_pretrain.config.gate import gate_fraction
from lpl_pretrain.config.load import resolve_path
from lpl_pretrain.config.lpl import LPLConfig
from lpl_pretrain.config.schema import ScheduleKind, TrainConfig

FIRST_BETA = {
    **{kind: first for kind, (first, _) in BETA_RANGE.items()},
    ScheduleKind.COSINE: 1
    - (
        math.cos((0.001 + COSINE_OFFSET) / (1 + COSINE_OFFSET) * math.pi / 2)
        / math.cos(COSINE_OFFSET / (1 + COSINE_OFFSET) * math.pi / 2)
    )
    ** 2,
}
"""sigma^2 of the least noisy timestep of each discrete schedule (diffusion/schedule.py)."""


def lpl_problems(config: TrainConfig, index: DatasetIndex, microbatches: int) -> list[str]:
    """Problems of the `lpl` section with the run, its data or its decoder; one line each."""
    lpl = config.lpl
    if lpl is None:
        return []
    problems = _never_runs(config, lpl)
    if (
        lpl.gate.timestep_below is not None
        and config.diffusion.schedule is ScheduleKind.RECTIFIED_FLOW
    ):
        problems.append(
            f"lpl.gate.timestep_below={lpl.gate.timestep_below}: rectified_flow has no integer "
            "timesteps; use lpl.gate.snr_above or lpl.gate.noise_level_below"
        )
    limit = lpl.gate.noise_level_below or (
        lpl.gate.snr_above**-0.5 if lpl.gate.snr_above else math.inf
    )
    beta = FIRST_BETA.get(config.diffusion.schedule, 0.0)
    least = (beta / (1 - beta)) ** 0.5
    if limit < least:
        problems = [
            problem for problem in problems if "lpl.gate" not in problem
        ]  # said in more detail here
        problems.append(
            f"lpl.gate: no sample can pass a noise level of {limit:.4g}; the least noisy one of "
            f"{config.diffusion.schedule.value} has {least:.4g}: open the gate, or set lpl=null"
        )
    folder = lpl.decoder or config.autoencoder
    decoder = read_autoencoder(folder, resolve_path(folder))
    problems += _stage_problems(lpl, folder, decoder.stages)
    if decoder.latent_channels != index.latent.channels:
        problems.append(
            f"lpl.decoder={folder}: takes latents of {decoder.latent_channels} channels, "
            f"{config.data.folder} has {index.latent.channels}: name a decoder for the same "
            "latents"
        )
    smallest = min(min(bucket.height, bucket.width) for bucket in index.buckets)
    if lpl.crop is not None and lpl.crop.side > smallest:
        problems.append(
            f"lpl.crop.side={lpl.crop.side}: latents of {config.data.folder} have {smallest} "
            "positions a side: use less"
        )
    if lpl.normalize is not None and lpl.normalize.over == "batch" and microbatches > 1:
        problems.append(
            f"lpl.normalize.over=batch with {microbatches} microbatches an update: statistics "
            "would depend on how the batch is split; raise batch.micro_batch_size, or use "
            "over=space"
        )
    return problems


def _never_runs(config: TrainConfig, lpl: LPLConfig) -> list[str]:
    """Problems by which LPL is configured and yet never part of the loss."""
    steps, start = config.steps, lpl.start_step
    if start >= steps:
        return [
            f"lpl.start_step={start} with steps={steps}: LPL never runs; start below steps, such "
            f"as lpl.start_step={steps * 7 // 8} or a fraction such as 0.875, or set lpl=null"
        ]
    if lpl.first_weighted_step >= steps:
        return [
            f"lpl.start_step={start} with lpl.calibration_steps={lpl.calibration_steps} and "
            f"steps={steps}: the weight of lpl.target_fraction={lpl.target_fraction} is known "
            f"after step {lpl.first_weighted_step}, so that LPL never is a part of the loss; start "
            "earlier, calibrate over fewer steps, or set lpl.weight"
        ]
    if (
        lpl.gate.timestep_below is not None
        and config.diffusion.schedule is ScheduleKind.RECTIFIED_FLOW
    ):
        return []  # refused for that
    fraction = gate_fraction(lpl.gate, config.diffusion)
    expected = fraction * config.batch.global_batch_size * (steps - lpl.first_weighted_step)
    if expected < 1:
        return [
            f"lpl.gate: {fraction:.2g} of the samples pass it under diffusion.timesteps, "
            f"{expected:.2g} over all steps with LPL, so that LPL never runs: open the gate, or "
            "set lpl=null"
        ]
    return []


def _stage_problems(lpl: LPLConfig, folder: str, stages: list[str]) -> list[str]:
    """Problems with the stages of `lpl`; `stages`: those of the decoder in `folder`."""
    problems: list[str] = []
    unknown = [stage for stage in lpl.stages or [] if stage not in stages]
    if unknown or lpl.stages == []:
        problems.append(f"lpl.stages={lpl.stages}: the decoder in {folder} has {', '.join(stages)}")
    compared = [stage for stage in stages if lpl.stages is None or stage in lpl.stages]
    if isinstance(lpl.depth_weights, tuple) and len(lpl.depth_weights) != len(compared):
        problems.append(
            f"lpl.depth_weights={list(lpl.depth_weights)}: {len(lpl.depth_weights)} numbers for "
            f"the {len(compared)} compared stages {', '.join(compared)}: give one for each"
        )
    if isinstance(lpl.depth_weights, tuple) and not any(lpl.depth_weights):
        problems.append(
            f"lpl.depth_weights={list(lpl.depth_weights)}: nothing is left of the loss; set "
            "lpl=null instead"
        )
    if lpl.outliers is not None and lpl.outliers.first_stage >= len(stages):
        problems.append(
            f"lpl.outliers.first_stage={lpl.outliers.first_stage}: the decoder has {len(stages)} "
            "stages; use a smaller number, or lpl.outliers=null"
        )
    return problems
