"""Mean and covariance of features, streamed and merged: the same to rounding for any batches, any
split, any order of merging.

Features (N, D) of any float type; everything kept is float64 on CPU (float32 covariances give wrong
scores: torcheval issue 192).
"""

from __future__ import annotations

import torch
from torch import Tensor

from lpl_pretrain.errors import DataError


class FeatureStatistics:
    """Count, mean and scatter (the sum of outer products of deviations from the mean)."""

    def __init__(self, dimension: int) -> None:
        self.count = 0
        self.mean = torch.zeros(dimension, dtype=torch.float64)
        self.scatter = torch.zeros(dimension, dimension, dtype=torch.float64)

    def update(self, features: Tensor) -> None:
        """Raises DataError when a row is not finite: one such picture would make every score NaN."""
        rows = features.detach().to("cpu", torch.float64)
        bad = (~rows.isfinite().all(dim=1)).nonzero().flatten().tolist()
        if bad:
            raise DataError(
                f"features of pictures {[self.count + i for i in bad[:8]]} are not finite: the "
                "pictures, or the "
                "extractor, hold NaN or infinity"
            )
        if len(rows) == 0:
            return
        batch = FeatureStatistics(rows.shape[1])
        batch.count, batch.mean = len(rows), rows.mean(dim=0)
        centred = rows - batch.mean
        batch.scatter = centred.T @ centred
        self.merge(batch)

    def merge(self, other: FeatureStatistics) -> None:
        """Pairwise update of Chan, Golub and LeVeque (1983), equation 2.1, for covariances."""
        count = self.count + other.count
        if count == 0:
            return
        delta = other.mean - self.mean
        self.scatter += other.scatter + torch.outer(delta, delta) * (
            self.count * other.count / count
        )
        self.mean += delta * (other.count / count)
        self.count = count

    @property
    def covariance(self) -> Tensor:
        """(D, D), divided by N - 1 as numpy's and every FID tool's."""
        if self.count < 2:
            raise DataError(f"a covariance needs at least 2 pictures; found {self.count}")
        return self.scatter / (self.count - 1)

    def tensors(self) -> dict[str, Tensor]:
        """What a file needs to hold; `from_tensors` reads it back."""
        return {"count": torch.tensor(self.count), "mean": self.mean, "scatter": self.scatter}

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor]) -> FeatureStatistics:
        """Raises DataError for tensors that `tensors` cannot have given."""
        count, mean, scatter = (tensors[name] for name in ("count", "mean", "scatter"))
        wanted = (torch.int64, torch.float64, torch.float64)
        if (
            (count.dtype, mean.dtype, scatter.dtype) != wanted
            or count.dim()
            or mean.dim() != 1
            or not len(mean)
        ):
            raise DataError(
                f"count {count.dtype} {tuple(count.shape)}, mean {mean.dtype} {tuple(mean.shape)}: "
                "wanted () and (D,)"
            )
        if scatter.shape != 2 * mean.shape:
            raise DataError(
                f"scatter {tuple(scatter.shape)}, mean {tuple(mean.shape)}: wanted (D, D) and (D,)"
            )
        if (
            int(count) < 2
            or not mean.isfinite().all()
            or not scatter.isfinite().all()
            or (scatter.diagonal() < 0).any()
        ):
            raise DataError(
                f"count {int(count)}: wanted 2 at least, finite numbers, and no negative variance"
            )
        statistics = cls(len(mean))
        statistics.count, statistics.mean, statistics.scatter = int(count), mean, scatter
        return statistics
