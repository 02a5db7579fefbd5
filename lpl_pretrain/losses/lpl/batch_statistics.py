"""Mean and variance over all gated samples of a global batch, for a loss that sees it in chunks and
on many ranks.

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
    """Of one stage; statistics (1, C, 1, 1)."""

    predicted: Statistics
    target: Statistics
    count: Tensor  # gated samples of the global batch
    grad: Statistics | None = (
        None  # d loss / d (shift, var) of the prediction's statistics, over all ranks
    )

    def surrogate(self, predicted: Tensor, weights: Tensor) -> Tensor | float:
        """() whose gradient at `predicted` (K, C, H, W) is the part of the loss's gradient that
        goes through the statistics.
        """
        if self.grad is None:
            return 0.0
        mean, second = _moments(predicted)
        through = self.grad.shift * mean + self.grad.var * (
            second - 2 * self.predicted.shift * mean
        )
        return ((weights > 0).view(-1, 1, 1, 1) * through).sum() / self.count


@dataclass(frozen=True, slots=True)
class StageFeatures:
    """One stage of one chunk."""

    stage: str
    predicted: Tensor  # (K, C, H, W)
    target: Tensor
    weights: Tensor  # (K,) 0 for samples that do not count
    loss: Callable[
        [BatchStatistics], Tensor
    ]  # () weighted loss of the chunk under given statistics


def measure(
    observe: Callable[[], Iterable[StageFeatures]],
    *,
    through_statistics: bool,
    sum_over_ranks: Callable[[Tensor], Tensor],
) -> dict[str, BatchStatistics]:
    """Communicates through `sum_over_ranks`.  `observe` runs the decoder over all chunks, twice for
    `through_statistics`.
    """
    sums: dict[str, Tensor] = {}
    for stage_features in observe():
        _add(sums, stage_features.stage, _sums(stage_features))
        dtype = torch.promote_types(stage_features.predicted.dtype, torch.float32)
    found = {
        name: _statistics(total, dtype) for name, total in _reduce(sums, sum_over_ranks).items()
    }
    if not through_statistics:
        return found
    grads: dict[str, Tensor] = {}
    for stage_features in observe():
        _add(
            grads,
            stage_features.stage,
            _statistics_grad(stage_features, found[stage_features.stage]),
        )
    reduced = _reduce(grads, sum_over_ranks)
    return {
        name: replace(one, grad=Statistics(*reduced[name].to(dtype))) for name, one in found.items()
    }


def _moments(features: Tensor) -> tuple[Tensor, Tensor]:
    """(K, C, 1, 1) mean and mean square over space."""
    own = Statistics.of(features.to(torch.promote_types(features.dtype, torch.float32)))
    return own.shift, own.var + own.shift.square()


def _sums(stage_features: StageFeatures) -> Tensor:
    """(5, C) float64: the number of gated samples, then the sums over them of mean and mean square,
    of prediction and target.
    """
    gated = (stage_features.weights > 0).double()
    moments = [
        m[:, :, 0, 0].double()
        for features in (stage_features.predicted, stage_features.target)
        for m in _moments(features)
    ]
    rows = [(gated[:, None] * moment).sum(dim=0) for moment in moments]
    return torch.stack([gated.sum().expand_as(rows[0]), *rows])


def _statistics(sums: Tensor, dtype: torch.dtype) -> BatchStatistics:
    """V is a small difference of large numbers, hence float64 until here."""
    count = sums[0].clamp(min=1)
    mean, second = sums[1::2] / count, sums[2::2] / count
    variance = (second - mean.square()).clamp(min=0)
    both = [
        Statistics(*(x.to(dtype)[None, :, None, None] for x in pair))
        for pair in zip(mean, variance, strict=True)
    ]
    return BatchStatistics(both[0], both[1], count[0].to(dtype))


def _statistics_grad(stage_features: StageFeatures, at: BatchStatistics) -> Tensor:
    """(2, 1, C, 1, 1): how the chunk's loss depends on the prediction's mean and variance."""
    shift, var = (x.detach().requires_grad_() for x in (at.predicted.shift, at.predicted.var))
    with torch.enable_grad():
        loss = stage_features.loss(replace(at, predicted=Statistics(shift, var)))
        gradients = torch.autograd.grad(
            loss, (shift, var), allow_unused=True, materialize_grads=True
        )
    return torch.stack(gradients)


def _add(totals: dict[str, Tensor], name: str, value: Tensor) -> None:
    totals[name] = totals[name] + value if name in totals else value


def _reduce(
    tensors: dict[str, Tensor], sum_over_ranks: Callable[[Tensor], Tensor]
) -> dict[str, Tensor]:
    """One call for all stages."""
    total = sum_over_ranks(torch.cat([tensor.flatten().double() for tensor in tensors.values()]))
    pieces = total.split([tensor.numel() for tensor in tensors.values()])
    return {
        name: piece.view(tensor.shape)
        for (name, tensor), piece in zip(tensors.items(), pieces, strict=True)
    }
