"""Mean and covariance of features, streamed and merged.

Equal up to rounding for any batches, any split over processes and any order of merging.  Features
are (N, D) of any float type; everything kept is float64 on the CPU (float32 covariances give wrong
scores: torcheval issue 192).
"""

from __future__ import annotations

import torch
from torch import Tensor

from lpl_pretrain.errors import DataError
from lpl_pretrain.evaluation.feature_checks import MAX_NAMED_ROWS, nonfinite_rows


class FeatureStatistics:
    """Count, mean and scatter (the sum of outer products of deviations from the mean)."""

    def __init__(self, dimension: int) -> None:
        self.count = 0
        self.mean = torch.zeros(dimension, dtype=torch.float64)
        self.scatter = torch.zeros(dimension, dimension, dtype=torch.float64)

    def update(self, features: Tensor) -> None:
        """Add rows (N, D).

        Raises DataError when a row is not finite: one such image would make every score NaN.
        """
        rows = features.detach().to("cpu", torch.float64)
        if bad := nonfinite_rows(rows):
            raise DataError(
                f"features of images {[self.count + i for i in bad[:MAX_NAMED_ROWS]]} are not "
                "finite: the images, or the extractor's outputs, contain NaN or infinity"
            )
        if len(rows) == 0:
            return
        batch = FeatureStatistics(rows.shape[1])
        batch.count = len(rows)
        batch.mean = rows.mean(dim=0)
        centred = rows - batch.mean
        batch.scatter = centred.T @ centred
        self.merge(batch)

    def merge(self, other: FeatureStatistics) -> None:
        """Add another set's statistics: the pairwise update of Chan, Golub and LeVeque (1983),
        equation 2.1, for covariances.
        """
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
        """(D, D), divided by N - 1 like numpy's and every FID tool's."""
        if self.count < 2:
            raise DataError(f"a covariance needs at least 2 images; found {self.count}")
        return self.scatter / (self.count - 1)

    def tensors(self) -> dict[str, Tensor]:
        """Tensors for a file; `from_tensors` reads them back."""
        return {"count": torch.tensor(self.count), "mean": self.mean, "scatter": self.scatter}

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor]) -> FeatureStatistics:
        """Inverse of `tensors`.  Raises DataError for tensors that it cannot have returned."""
        count = tensors["count"]
        mean = tensors["mean"]
        scatter = tensors["scatter"]
        dtypes = (count.dtype, mean.dtype, scatter.dtype)
        if (
            dtypes != (torch.int64, torch.float64, torch.float64)
            or count.dim()
            or mean.dim() != 1
            or not len(mean)
        ):
            raise DataError(
                f"count {count.dtype} {tuple(count.shape)}, mean {mean.dtype} {tuple(mean.shape)}: "
                "wanted int64 () and float64 (D,)"
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
        statistics.count = int(count)
        statistics.mean = mean
        statistics.scatter = scatter
        return statistics
