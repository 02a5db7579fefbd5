"""Which positions of a feature map are kept: decoders hide a few huge values in their maps, which would drown the rest.

Per sample and channel keep q1 - m < f < q2 + m, with q1 and q2 the k-th smallest values, k = int(q N) and int((1 - q) N), and
m = margin x standard deviation; then holes of one or two positions are closed and larger ones widened by one
(second-hand reading of arXiv 2411.04873; see docs/lpl.md).
"""
from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def keep_mask(features: Tensor, *, quantile: float, margin: float, stage: int) -> Tensor:
    """(B, C, H, W) float32 features -> same shape, 1 where kept and 0 where not; no gradient."""
    with torch.no_grad():
        low, high = _thresholds(features.flatten(2), quantile, margin)
        keep = ((features > low[..., None]) & (features < high[..., None])).to(features.dtype)
        dilate, erode = (3, 5) if stage > 2 else (1, 3)  # the first three stages have small maps
        keep = F.max_pool2d(keep, dilate, stride=1, padding=dilate // 2)
        return -F.max_pool2d(-keep, erode, stride=1, padding=erode // 2)


def _thresholds(flat: Tensor, quantile: float, margin: float) -> tuple[Tensor, Tensor]:
    """(B, C, N) -> lower and upper bound, each (B, C, 1).  Reads the two tails only: the same values as a full sort."""
    count = flat.shape[-1]
    lower_rank = max(1, int(quantile * count))
    upper_rank = max(1, int((1 - quantile) * count))
    q1 = flat.topk(lower_rank, dim=-1, largest=False, sorted=True).values[..., -1:]
    q2 = flat.topk(count - upper_rank + 1, dim=-1, largest=True, sorted=True).values[..., -1:]
    reach = margin * flat.std(dim=-1, keepdim=True)
    return q1 - reach, q2 + reach
