"""The fraction of training samples inside LPL's gate, without torch, for checks before a run.

The arithmetic of losses/lpl/gate.py in plain floats; a test compares the two functions
`gate_fraction`.
"""

from __future__ import annotations

import math
from functools import lru_cache
from itertools import accumulate
from statistics import NormalDist

from lpl_pretrain.config.betas import BETA_RANGE, COSINE_OFFSET, MAX_COSINE_BETA
from lpl_pretrain.config.lpl import GateConfig
from lpl_pretrain.config.schema import DiffusionConfig, ScheduleKind, TimestepConfig

TIMESTEPS = 1000
BISECTIONS = 50


def gate_fraction(gate: GateConfig, diffusion: DiffusionConfig) -> float:
    """Fraction in [0, 1], by bisection: noise grows with t, and t with its uniform u."""
    levels = _noise_levels(diffusion.schedule, diffusion.zero_terminal_snr)
    limit = _max_noise_level(gate, levels)
    low, high = 0.0, 1.0
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        passes = _noise_level(_quantile(diffusion.timesteps, middle), levels) <= limit
        low, high = (middle, high) if passes else (low, middle)
    return low


def _max_noise_level(gate: GateConfig, levels: tuple[float, ...]) -> float:
    if gate.noise_level_below is not None:
        return gate.noise_level_below
    if gate.snr_above is not None:
        return gate.snr_above**-0.5
    assert gate.timestep_below is not None
    if not levels:
        return 0.0
    last_in, first_out = (
        min(step, TIMESTEPS - 1) for step in (gate.timestep_below - 1, gate.timestep_below)
    )
    return (levels[last_in] + levels[first_out]) / 2


def _noise_level(t: float, levels: tuple[float, ...]) -> float:
    """sigma_t / alpha_t at t in [0, 1]."""
    if levels:
        return levels[min(max(int(t * TIMESTEPS + 1e-4), 0), TIMESTEPS - 1)]
    return t / (1 - t) if t < 1 else math.inf


def _quantile(timesteps: TimestepConfig, u: float) -> float:
    """Quantile of t at `u` in [0, 1], as in diffusion/timesteps.py."""
    t = u
    if timesteps.distribution == "logit_normal":
        logit = timesteps.mean + timesteps.std * NormalDist().inv_cdf(u)
        t = 1 / (1 + math.exp(-logit)) if logit > -700 else 0.0
    elif timesteps.distribution == "mode":
        t = u - timesteps.mode_scale * (math.cos(math.pi / 2 * (1 - u)) ** 2 - u)
    elif timesteps.distribution == "cosmap":
        t = 1 - 1 / (math.tan(math.pi / 2 * u) + 1)
    return timesteps.shift * t / (1 + (timesteps.shift - 1) * t)


@lru_cache(maxsize=8)
def _noise_levels(kind: ScheduleKind, zero_terminal_snr: bool) -> tuple[float, ...]:
    """Noise level of each timestep of a discrete schedule (diffusion/schedule.py); empty for a
    continuous one.
    """
    if kind is ScheduleKind.RECTIFIED_FLOW:
        return ()
    steps = range(TIMESTEPS)
    if kind is ScheduleKind.COSINE:
        squared = [
            math.cos((step / TIMESTEPS + COSINE_OFFSET) / (1 + COSINE_OFFSET) * math.pi / 2) ** 2
            for step in range(TIMESTEPS + 1)
        ]
        betas = [min(1 - squared[step + 1] / squared[step], MAX_COSINE_BETA) for step in steps]
    else:
        power = 1 if kind is ScheduleKind.LINEAR else 2
        first, last = (beta ** (1 / power) for beta in BETA_RANGE[kind])
        betas = [(first + (last - first) * step / (TIMESTEPS - 1)) ** power for step in steps]
    alphas = [
        product**0.5 for product in accumulate((1 - beta for beta in betas), lambda a, b: a * b)
    ]
    if zero_terminal_snr:
        first, last = alphas[0], alphas[-1]
        alphas = [(alpha - last) * first / (first - last) for alpha in alphas]
    return tuple((1 - alpha**2) ** 0.5 / alpha if alpha > 0 else math.inf for alpha in alphas)
