"""Mean and variance over all gated samples of a global batch that is split into chunks and ranks.

Mean M and variance V of a channel over samples k and positions follow from those of single samples:
    M = sum_k mean_k / n,   V = sum_k (var_k + mean_k^2) / n - M^2.
A first pass measures M and V.  When gradient is to flow through them, a second pass measures how
the loss of ALL chunks depends on M and V; each chunk then adds to its own gradient what it
contributes to them.  Every pass ends in one sum over ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lpl_pretrain.losses.lpl.normalization import Statistics


@dataclass(frozen=True, slots=True)
class BatchStatistics:
    """Statistics (1, C, 1, 1) of one stage over the global batch."""

    predicted: Statistics
    target: Statistics
    count: Tensor
    """() gated samples of the global batch."""
    grad: Statistics | None = None
    """d loss / d (shift, var) of the prediction's statistics, summed over all ranks."""

    def surrogate(self, predicted: Tensor, weights: Tensor) -> Tensor | float:
        """() scalar whose gradient at `predicted` (K, C, H, W) is the part of the loss's gradient
        that flows through the statistics.
        """
        if self.grad is None:
            return 0.0
        mean, mean_square = _moments(predicted)
        per_sample = self.grad.shift * mean + self.grad.var * (
            mean_square - 2 * self.predicted.shift * mean
        )
        return ((weights > 0).view(-1, 1, 1, 1) * per_sample).sum() / self.count


@dataclass(frozen=True, slots=True)
class StageFeatures:
    """Features of one stage for one chunk of K samples."""

    stage: str
    predicted: Tensor
    """(K, C, H, W)"""
    target: Tensor
    """(K, C, H, W)"""
    weights: Tensor
    """(K,) 0 for samples that do not count."""
    loss: Callable[[BatchStatistics], Tensor]
    """() weighted loss of the chunk, normalised by the given statistics."""


def measure(
    observe: Callable[[], Iterable[StageFeatures]],
    *,
    through_statistics: bool,
    sum_over_ranks: Callable[[Tensor], Tensor],
) -> dict[str, BatchStatistics]:
    """Collective. Statistics of each stage, summed with `sum_over_ranks`.

    `observe` runs the decoder over all chunks.  It is called twice with `through_statistics`, which
    lets the gradient flow through the statistics.
    """
    sums: dict[str, Tensor] = {}
    for stage_features in observe():
        _add(sums, stage_features.stage, _sums(stage_features))
        dtype = torch.promote_types(stage_features.predicted.dtype, torch.float32)
    statistics = {
        name: _statistics(total, dtype) for name, total in _reduce(sums, sum_over_ranks).items()
    }
    if not through_statistics:
        return statistics
    grads: dict[str, Tensor] = {}
    for stage_features in observe():
        _add(
            grads,
            stage_features.stage,
            _statistics_grad(stage_features, statistics[stage_features.stage]),
        )
    reduced = _reduce(grads, sum_over_ranks)
    return {
        name: replace(stage_statistics, grad=Statistics(*reduced[name].to(dtype)))
        for name, stage_statistics in statistics.items()
    }


def _moments(features: Tensor) -> tuple[Tensor, Tensor]:
    """(K, C, 1, 1) mean and mean square over space."""
    statistics = Statistics.of(features.to(torch.promote_types(features.dtype, torch.float32)))
    return statistics.shift, statistics.var + statistics.shift.square()


def _sums(stage_features: StageFeatures) -> Tensor:
    """(5, C) float64: the number of gated samples, then the sums over them of mean and mean square,
    of prediction and target.
    """
    gated = (stage_features.weights > 0).double()
    moments = [
        moment[:, :, 0, 0].double()
        for features in (stage_features.predicted, stage_features.target)
        for moment in _moments(features)
    ]
    rows = [(gated[:, None] * moment).sum(dim=0) for moment in moments]
    return torch.stack([gated.sum().expand_as(rows[0]), *rows])


def _statistics(sums: Tensor, dtype: torch.dtype) -> BatchStatistics:
    """Statistics from the sums (5, C) of `_sums`.

    The variance is a small difference of large numbers, hence float64 until here.
    """
    count = sums[0].clamp(min=1)
    mean = sums[1::2] / count
    mean_square = sums[2::2] / count
    variance = (mean_square - mean.square()).clamp(min=0)
    predicted, target = [
        Statistics(*(x.to(dtype)[None, :, None, None] for x in pair))
        for pair in zip(mean, variance, strict=True)
    ]
    return BatchStatistics(predicted, target, count[0].to(dtype))


def _statistics_grad(stage_features: StageFeatures, statistics: BatchStatistics) -> Tensor:
    """(2, 1, C, 1, 1) gradient of the chunk's loss at the prediction's mean and variance."""
    shift = statistics.predicted.shift.detach().requires_grad_()
    var = statistics.predicted.var.detach().requires_grad_()
    with torch.enable_grad():
        loss = stage_features.loss(replace(statistics, predicted=Statistics(shift, var)))
        gradients = torch.autograd.grad(
            loss, (shift, var), allow_unused=True, materialize_grads=True
        )
    return torch.stack(gradients)


def _add(totals: dict[str, Tensor], name: str, value: Tensor) -> None:
    totals[name] = totals[name] + value if name in totals else value


def _reduce(
    tensors: dict[str, Tensor], sum_over_ranks: Callable[[Tensor], Tensor]
) -> dict[str, Tensor]:
    """Collective. Sum over ranks, with one call for all stages."""
    total = sum_over_ranks(torch.cat([tensor.flatten().double() for tensor in tensors.values()]))
    parts = total.split([tensor.numel() for tensor in tensors.values()])
    return {
        name: part.view(tensor.shape)
        for (name, tensor), part in zip(tensors.items(), parts, strict=True)
    }
