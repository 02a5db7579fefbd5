"""Outlier mask: decoder feature maps hold a few huge values, which would dominate the loss.

Per sample and channel keep q1 - m < f < q2 + m, with q1 and q2 the k-th smallest values, k =
int(0.02 N) and int(0.98 N), and m = margin x standard deviation; then holes of one or two positions
are closed (dilation) and larger ones widened (erosion) (second-hand reading of arXiv 2411.04873;
see docs/lpl.md).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lpl_pretrain.config.lpl import OutlierConfig


def inlier_mask(features: Tensor, std: Tensor, config: OutlierConfig, stage: int) -> Tensor:
    """(B, C, H, W) features and their (B, C, 1, 1) biased std over space -> True where kept."""
    with torch.no_grad():
        count = features[0, 0].numel()
        # the square root makes the standard deviation the unbiased one
        margin = config.margin * std * math.sqrt(count / max(1, count - 1))
        q1, q2 = (q[..., None] for q in _quantiles(features.flatten(2), *config.quantiles))
        keep = (features > q1 - margin) & (features < q2 + margin)
        dilate, erode = config.kernels[min(stage, len(config.kernels) - 1)]
        return ~_dilate(~_dilate(keep, dilate), erode)


def _quantiles(flat: Tensor, low: float, high: float) -> tuple[Tensor, Tensor]:
    """(B, C, N) -> the k-th smallest values, k = int(low N) and int(high N), at least 1; (B, C, 1)
    as a full sort gives them.
    """
    count = flat.shape[-1]
    low_rank, high_rank = max(1, int(low * count)), max(1, int(high * count))
    q1 = flat.topk(low_rank, dim=-1, largest=False, sorted=False).values.amax(dim=-1, keepdim=True)
    q2 = flat.topk(count - high_rank + 1, dim=-1, largest=True, sorted=False).values.amin(
        dim=-1, keepdim=True
    )
    return q1, q2


def _dilate(mask: Tensor, size: int) -> Tensor:
    """Dilate a mask by a size x size square, separably: rows, then columns."""
    for dim in (-2, -1):
        spread, length = mask.clone(), mask.shape[dim]
        for shift in range(1, min(size // 2, length - 1) + 1):
            rest = length - shift
            spread.narrow(dim, shift, rest).logical_or_(mask.narrow(dim, 0, rest))
            spread.narrow(dim, 0, rest).logical_or_(mask.narrow(dim, shift, rest))
        mask = spread
    return mask
