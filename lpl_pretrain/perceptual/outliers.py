"""Which positions of a feature map are kept: decoders hide a few huge values in their maps, which would drown the rest.

Per sample and channel keep q1 - m < f < q2 + m, with q1 and q2 the k-th smallest values, k = int(q N) and int((1 - q) N), and
m = margin x standard deviation; then holes of one or two positions are closed and larger ones widened by one
(second-hand reading of arXiv 2411.04873; see docs/lpl.md).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def keep_mask(features: Tensor, std: Tensor, *, quantile: float, margin: float, stage: int) -> Tensor:
    """(B, C, H, W) float32 features and their (B, C, 1, 1) biased std over space -> True where kept."""
    with torch.no_grad():
        count = features[0, 0].numel()
        reach = margin * std * math.sqrt(count / (count - 1))  # the unbiased standard deviation
        q1, q2 = _quantiles(features.flatten(2), quantile)
        keep = (features > q1[..., None] - reach) & (features < q2[..., None] + reach)
        dilate, erode = (3, 5) if stage > 2 else (1, 3)  # the first three stages have small maps
        return ~_dilate(~_dilate(keep, dilate), erode)


def _quantiles(flat: Tensor, quantile: float) -> tuple[Tensor, Tensor]:
    """(B, C, N) -> the k-th smallest values at either end, each (B, C, 1), as a full sort would give them."""
    count = flat.shape[-1]
    lower_rank = max(1, int(quantile * count))
    upper_rank = max(1, int((1 - quantile) * count))
    q1 = flat.topk(lower_rank, dim=-1, largest=False, sorted=False).values.amax(dim=-1, keepdim=True)
    q2 = flat.topk(count - upper_rank + 1, dim=-1, largest=True, sorted=False).values.amin(dim=-1, keepdim=True)
    return q1, q2


def _dilate(mask: Tensor, size: int) -> Tensor:
    """True where any position of the size x size neighbourhood is; rows, then columns, on bytes."""
    for dim in (-2, -1):
        spread, length = mask.clone(), mask.shape[dim]
        for shift in range(1, min(size // 2, length - 1) + 1):
            rest = length - shift
            spread.narrow(dim, shift, rest).logical_or_(mask.narrow(dim, 0, rest))
            spread.narrow(dim, 0, rest).logical_or_(mask.narrow(dim, shift, rest))
        mask = spread
    return mask
