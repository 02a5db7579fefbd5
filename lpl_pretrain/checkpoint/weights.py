"""Whole weights of a run by name: averages, parameters, and averages of any length rebuilt from its snapshots."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from lpl_pretrain.checkpoint.manifest import damage
from lpl_pretrain.checkpoint.store import Reader, read_full
from lpl_pretrain.config.rundir import RunDir
from lpl_pretrain.config.schema import power_kind
from lpl_pretrain.ema.profiles import reconstruction
from lpl_pretrain.errors import CheckpointError, ConfigError

POSTHOC = "posthoc_"
Weights = tuple[dict[str, Tensor], dict[str, str]]
"""Tensors by name, and what they are."""


def stored(run_dir: RunDir, weights: str, step: int | None) -> Weights:
    """As they lie in a checkpoint: `ema`, `raw`, `ema_power_...`.  Raises CheckpointError."""
    step = run_dir.complete_step(step)
    _check_sound(run_dir.checkpoint(step))
    return read_full(run_dir.checkpoint(step), "param" if weights == "raw" else weights), {"weights": weights, "step": str(step)}


def reconstructed(run_dir: RunDir, lengths: tuple[float, ...], sigma_rel: float, step: int | None) -> Weights:
    """A power-function average of any length, from all snapshots up to `step` (arXiv 2312.02696, section 3.2)."""
    if not 0.01 < sigma_rel < 0.28:
        raise ConfigError(f"sigma_rel={sigma_rel}: wanted 0.01 to 0.28")
    steps = [found for found in run_dir.complete_snapshots() if step is None or found <= step]
    if not steps or (step is not None and steps[-1] != step):
        have = ", ".join(map(str, run_dir.complete_snapshots())) or "none"
        raise CheckpointError(
            f"{run_dir.path}: no snapshot of step {step or 'any'}, there are: {have}; set ema.power and ema.snapshot_every_steps"
        )
    kept = [(found, length) for found in steps for length in lengths]
    coefficients = reconstruction(kept, (steps[-1], sigma_rel))
    for found in steps:
        _check_sound(run_dir.snapshot(found))
    readers = {found: Reader(run_dir.snapshot(found)) for found in steps}
    tensors = {}
    for name in readers[steps[-1]].index[power_kind(lengths[0])]:
        total = torch.zeros((), dtype=torch.float64)
        for (found, length), coefficient in zip(kept, coefficients.tolist(), strict=True):
            total = total + coefficient * readers[found].whole(power_kind(length), name).double()
        tensors[name] = total.to(torch.float32)
    return tensors, {"weights": power_kind(sigma_rel), "step": str(steps[-1]), "snapshots": str(len(steps))}


def _check_sound(folder: Path) -> None:
    if trouble := damage(folder):
        raise CheckpointError(f"{trouble}: bring it back, or name another --step")
