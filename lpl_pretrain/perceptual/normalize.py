"""On which scale two feature maps are compared: both branches shifted and scaled by ONE set of statistics per channel.

Shapes: features (B, C, H, W) float32.  The paper's choice is `prediction`: mean and standard deviation over space of the
predicted features, for both branches, with gradient through them (arXiv 2411.04873; a replication that detached them kept
16-39 % of the gain).
"""
from __future__ import annotations

import torch
from torch import Tensor

VARIANCE_FLOOR = 1e-8
"""A channel whose variance over space is below this says nothing: it is mapped to 0 and contributes exactly 0."""


def normalize(predicted: Tensor, target: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """Both branches, normalised by the statistics that `kind` names (`LPLConfig.normalize`)."""
    if kind == "none":
        return predicted, target
    if kind == "own":
        return _apply(predicted, *_statistics(predicted)), _apply(target, *_statistics(target))
    source = {"prediction": predicted, "prediction_detached": predicted.detach(), "target": target}[kind]
    mean, inverse_std = _statistics(source)
    return _apply(predicted, mean, inverse_std), _apply(target, mean, inverse_std)


def _statistics(features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and 1 / std over space, (B, C, 1, 1); the second is 0 for a constant channel, with a finite gradient."""
    variance, mean = torch.var_mean(features, dim=(2, 3), keepdim=True, correction=0)
    informative = variance > VARIANCE_FLOOR
    return mean, torch.where(informative, variance, 1.0).rsqrt() * informative


def _apply(features: Tensor, mean: Tensor, inverse_std: Tensor) -> Tensor:
    return (features - mean) * inverse_std
