"""The gate of LPL: only samples with little noise count, whose one-step estimate is a usable image.

All three forms of `lpl.gate` are converted to one number, the largest noise level
sigma_t / alpha_t that passes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lpl_pretrain.config.diffusion import WeightingConfig
from lpl_pretrain.config.lpl import GateConfig
from lpl_pretrain.config.schema import Prediction, TimestepConfig
from lpl_pretrain.diffusion.schedule import TIMESTEPS, Schedule
from lpl_pretrain.diffusion.timesteps import quantile
from lpl_pretrain.diffusion.weighting import loss_weight
from lpl_pretrain.errors import ConfigError


def max_noise_level(gate: GateConfig, schedule: Schedule) -> float:
    """Largest noise level sigma_t / alpha_t that passes the gate."""
    if gate.noise_level_below is not None:
        return gate.noise_level_below
    if gate.snr_above is not None:
        return gate.snr_above**-0.5
    assert gate.timestep_below is not None
    last_in, first_out = (
        min(timestep, TIMESTEPS - 1) / TIMESTEPS
        for timestep in (gate.timestep_below - 1, gate.timestep_below)
    )
    return (
        schedule.noise_level(torch.tensor([last_in, first_out], dtype=torch.float64)).mean().item()
    )


def gate_weights(
    noise_level: Tensor, threshold: float, weighting: WeightingConfig, prediction: Prediction
) -> Tensor:
    """(B,) weight of each sample in LPL: 0 outside the gate, by `lpl.noise_weighting` inside it."""
    return (noise_level <= threshold) * loss_weight(weighting, prediction, noise_level)


def gate_fraction(threshold: float, schedule: Schedule, timesteps: TimestepConfig) -> float:
    """Fraction of training samples inside the gate.

    Found by bisection: the noise level grows with t, and t with the uniform u it is drawn from.

    Raises ConfigError when no sample can ever pass.
    """

    def passes(u: float) -> bool:
        t = schedule.snap(quantile(timesteps, torch.tensor([u], dtype=torch.float64)))
        return schedule.noise_level(t).item() <= threshold

    low, high = 0.0, 1.0
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if passes(middle) else (low, middle)
    if low == 0.0:
        least = schedule.noise_level(schedule.snap(torch.zeros(1, dtype=torch.float64))).item()
        raise ConfigError(
            f"lpl.gate: no sample can pass a noise level of {threshold:.4g}; the least noisy one "
            f"of this schedule has {least:.4g}: open the gate, or set lpl=null"
        )
    return low if not passes(1.0 - 2.0**-53) else 1.0
