"""Distance of two feature maps of one decoder stage: normalise, mask, subtract, average.

Shapes: features (B, C, H, W) in the decoder's dtype, computed in float32 at least; distance (B,).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lpl_pretrain.config.lpl import LPLConfig
from lpl_pretrain.losses.lpl.inliers import inlier_mask
from lpl_pretrain.losses.lpl.normalization import Statistics, pick_statistics

StatisticsPair = tuple[Statistics, Statistics]
"""Statistics of (prediction, target)."""


@dataclass(frozen=True, slots=True)
class Difference:
    """Predicted minus target features, normalised: `values * factor`."""

    values: Tensor
    """(B, C, H, W)"""
    factor: Tensor | None
    """(B or 1, C, 1, 1), applied after the sum over positions; None: contained in `values`."""
    keep: Tensor | None
    """(B, C, H, W) bool; None: every position is kept."""
    std_ratio: Tensor
    """(B,) std over space of predicted / target features, mean over channels.  Below 1 the
    prediction is too smooth, which LPL counters.
    """

    def keep_fraction(self) -> Tensor:
        """(B,) fraction of positions that are kept."""
        if self.keep is None:
            return torch.ones_like(self.std_ratio)
        return self.keep.mean(dim=(1, 2, 3), dtype=self.std_ratio.dtype)


def difference(
    config: LPLConfig,
    stage: int,
    predicted: Tensor,
    target: Tensor,
    batch: StatisticsPair | None = None,
) -> Difference:
    """Difference with gradient at `predicted`.

    `batch`: statistics over the global batch, with `normalize.over: batch`.
    """
    dtype = torch.promote_types(predicted.dtype, torch.float32)
    # plain memory order: statistics, quantiles and masks all run along the positions of a channel
    predicted, target = (
        x.to(dtype, memory_format=torch.contiguous_format) for x in (predicted, target)
    )
    space_stats = (Statistics.of(predicted), Statistics.of(target))
    keep = _keep_mask(config, stage, predicted, target, space_stats)
    ratio = space_stats[0].std.mean(dim=(1, 2, 3)) / space_stats[1].std.mean(dim=(1, 2, 3)).clamp(
        min=1e-12
    )
    if config.normalize is None:
        return Difference(predicted - target, None, keep, ratio)
    predicted_stats, target_stats = pick_statistics(
        config.normalize, *(batch or _own_statistics(config, predicted, target, keep, space_stats))
    )
    if predicted_stats is not target_stats:
        values = (predicted - predicted_stats.shift) * predicted_stats.inverse() - (
            target - target_stats.shift
        ) * target_stats.inverse()
        return Difference(values, None, keep, ratio)
    factor = predicted_stats.inverse()
    if config.normalize.over == "channels":  # one number per position
        return Difference((predicted - target) * factor, None, keep, ratio)
    return Difference(predicted - target, factor, keep, ratio)


def pointwise(config: LPLConfig, diff: Difference) -> Tensor:
    """(B, C, H, W) contribution of every position before averaging."""
    return _penalty(config, diff.values, diff.keep) * _factor(config, diff)


def distance(config: LPLConfig, diff: Difference) -> Tensor:
    """(B,) mean over channels of the mean over positions."""
    total = _penalty(config, diff.values, diff.keep).sum(dim=(2, 3), keepdim=True) * _factor(
        config, diff
    )
    positions: Tensor | int = diff.values[0, 0].numel()
    if (
        diff.keep is not None
        and config.outliers is not None
        and config.outliers.mean_over == "kept"
    ):
        positions = diff.keep.sum(dim=(2, 3), keepdim=True).clamp(min=1)
    return (total / positions).mean(dim=(1, 2, 3))


def _keep_mask(
    config: LPLConfig, stage: int, predicted: Tensor, target: Tensor, space_stats: StatisticsPair
) -> Tensor | None:
    outliers = config.outliers
    if outliers is None or stage < outliers.first_stage:
        return None
    if outliers.source == "target":
        return inlier_mask(target, space_stats[1].std, outliers, stage)
    return inlier_mask(predicted.detach(), space_stats[0].std, outliers, stage)


def _own_statistics(
    config: LPLConfig,
    predicted: Tensor,
    target: Tensor,
    keep: Tensor | None,
    space_stats: StatisticsPair,
) -> StatisticsPair:
    """Statistics of these two feature maps; `space_stats` if the configuration asks for those."""
    normalize, outliers = config.normalize, config.outliers
    assert normalize is not None
    if keep is not None and outliers is not None and outliers.zeroed_in_statistics:
        if outliers.source == "target":
            target = target * keep
        else:
            predicted = predicted * keep
    elif (normalize.over, normalize.kind) == ("space", "std"):
        return space_stats
    predicted_stats, target_stats = (
        Statistics.of(x, normalize.over, normalize.kind) for x in (predicted, target)
    )
    return predicted_stats, target_stats


def _penalty(config: LPLConfig, values: Tensor, keep: Tensor | None) -> Tensor:
    if keep is not None:
        values = values * keep
    return values.abs() if config.distance == "l1" else values.square()


def _factor(config: LPLConfig, diff: Difference) -> Tensor | float:
    if diff.factor is None:
        return 1.0
    return diff.factor if config.distance == "l1" else diff.factor.square()
