"""On which scale two feature maps are compared: both branches shifted and scaled by ONE set of statistics per channel.

Shapes: features (B, C, H, W) float32, statistics (B, C, 1, 1).  The paper's choice is `prediction`: mean and standard
deviation over space of the predicted features, for both branches, with gradient through them (arXiv 2411.04873; a replication
that detached them kept 16-39 % of the gain).  When both branches share their statistics the mean cancels in the difference, so it
is never subtracted.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

VARIANCE_FLOOR = 1e-8
"""A channel whose variance over space is below this says nothing: it contributes exactly 0."""


@dataclass(frozen=True, slots=True)
class Moments:
    """Over the positions of each channel; the variance is the biased one."""

    mean: Tensor
    variance: Tensor

    @classmethod
    def of(cls, features: Tensor) -> Moments:
        variance, mean = torch.var_mean(features, dim=(2, 3), keepdim=True, correction=0)
        return cls(mean, variance)

    @property
    def std(self) -> Tensor:
        """No gradient: for masks and reports."""
        return self.variance.detach().sqrt()


def normalized_difference(predicted: Tensor, target: Tensor, kind: str, of_predicted: Moments, of_target: Moments) -> Tensor:
    """Predicted minus target, each normalised by the statistics that `kind` (`LPLConfig.normalize`) names."""
    if kind == "none":
        return predicted - target
    if kind == "own":
        return (predicted - of_predicted.mean) * _inverse_std(of_predicted.variance) - (target - of_target.mean) * _inverse_std(
            of_target.variance
        )
    variance = {
        "prediction": of_predicted.variance,
        "prediction_detached": of_predicted.variance.detach(),
        "target": of_target.variance,
    }[kind]
    return (predicted - target) * _inverse_std(variance)


def _inverse_std(variance: Tensor) -> Tensor:
    """0 for a constant channel, with a finite gradient."""
    informative = variance > VARIANCE_FLOOR
    return torch.where(informative, variance, 1.0).rsqrt() * informative
