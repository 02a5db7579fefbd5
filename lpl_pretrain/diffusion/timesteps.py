"""Distribution of training times: stratified uniforms through a quantile function.

Stratum i of a global batch of B covers [i / B, (i + 1) / B): each t keeps exactly its configured
marginal, while the batch as a whole covers the noise levels evenly, which lowers the variance of
the loss and fixes how many samples pass the LPL gate (to within one).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lpl_pretrain.config.schema import TimestepConfig


def stratify(jitter: Tensor, permutation: Tensor) -> Tensor:
    """(B,) float64 in [0, 1): one draw per stratum, in the order of `permutation`; `jitter` (B,) is
    uniform in [0, 1).
    """
    return (permutation + jitter) / len(permutation)


def quantile(config: TimestepConfig, u: Tensor) -> Tensor:
    """(B,) float64 times t in [0, 1]: the inverse cumulative distribution at `u` in [0, 1);
    increasing in u.

    arXiv 2403.03206, section 3.1: logit-normal (equation 19), mode (20), cosmap (21).
    """
    t = {
        "uniform": lambda: u,
        "logit_normal": lambda: torch.sigmoid(config.mean + config.std * torch.special.ndtri(u)),
        "mode": lambda: (
            u - config.mode_scale * ((math.pi / 2 * (1 - u)).cos().square() - u)
        ),  # the paper's u is 1 - ours
        "cosmap": lambda: 1 - 1 / ((math.pi / 2 * u).tan() + 1),
    }[config.distribution]()
    return apply_shift(t, config.shift)


def apply_shift(t: Tensor, shift: float) -> Tensor:
    """Times at which an image with `shift`^2 times the pixels looks equally noisy.

    Source: arXiv 2403.03206, equation 23.
    """
    return t if shift == 1.0 else shift * t / (1 + (shift - 1) * t)
