"""Normalisation of feature maps before comparison: both branches by the statistics of one, or each
by its own.

Shapes: features (B, C, H, W) float32; statistics broadcast against them.  The paper's choice is
mean and standard deviation over the space of each channel, of the PREDICTED features, for both
branches, with gradient through them (arXiv 2411.04873; a replication that detached them kept 16-39
% of the gain).  The public implementation divides by the L2 norm over channels at each position.
When both branches share their statistics the shift cancels in the difference, so it is never
subtracted.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lpl_pretrain.config.lpl import NormalizeConfig

FLOOR = 1e-8
"""Variance, or squared norm, below which the contribution is exactly 0."""
DIMS = {"space": (2, 3), "channels": (1,), "batch": (0, 2, 3)}


@dataclass(frozen=True, slots=True)
class Statistics:
    """Statistics that normalise x to (x - shift) / sqrt(var)."""

    shift: Tensor
    var: Tensor
    """Biased variance, or sum of squares."""

    @classmethod
    def of(cls, features: Tensor, over: str = "space", kind: str = "std") -> Statistics:
        if kind == "l2_norm":
            square = features.square().sum(dim=DIMS[over], keepdim=True)
            return cls(torch.zeros_like(square), square)
        variance, mean = torch.var_mean(features, dim=DIMS[over], keepdim=True, correction=0)
        return cls(mean, variance)

    def detach(self) -> Statistics:
        return Statistics(self.shift.detach(), self.var.detach())

    @property
    def std(self) -> Tensor:
        """Square root of `var`, without gradient, for masks and reports."""
        return self.var.detach().sqrt()

    def inverse(self) -> Tensor:
        """1 / sqrt(var); 0 where that is below the floor, with a finite gradient."""
        informative = self.var > FLOOR
        return torch.where(informative, self.var, 1.0).rsqrt() * informative


def pick_statistics(
    config: NormalizeConfig, predicted: Statistics, target: Statistics
) -> tuple[Statistics, Statistics]:
    """Statistics that normalise (prediction, target)."""
    if not config.gradient:
        predicted, target = predicted.detach(), target.detach()
    return {
        "prediction": (predicted, predicted),
        "target": (target, target),
        "own": (predicted, target),
    }[config.source]
