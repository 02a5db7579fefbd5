"""Which noise levels a global batch is trained at: stratified uniforms, pushed through a distribution's quantile function.

Stratum i of a global batch of B covers [i / B, (i + 1) / B): each t keeps exactly its configured marginal, while the
batch as a whole covers the noise levels evenly, which lowers the variance of the loss and fixes how many samples pass
the LPL gate (to within one).
"""

from __future__ import annotations

import torch
from torch import Tensor

from lpl_pretrain.config.schema import TimestepConfig


def stratify(jitter: Tensor, permutation: Tensor) -> Tensor:
    """(B,) float64 in [0, 1): one draw per stratum, in the order of `permutation`; `jitter` (B,) is uniform in [0, 1)."""
    return (permutation + jitter) / len(permutation)


def quantile(config: TimestepConfig, u: Tensor) -> Tensor:
    """(B,) float64 times t in [0, 1]: the inverse cumulative distribution at `u` in [0, 1); increasing in u."""
    if config.distribution == "uniform":
        return u
    return torch.sigmoid(config.mean + config.std * torch.special.ndtri(u))
