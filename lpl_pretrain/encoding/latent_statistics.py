"""Mean and standard deviation per channel of the latents in a data folder."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np


class LatentStatistics:
    """Sums per channel, in float64, over samples and positions; those of several parts can be
    added.
    """

    def __init__(self, channels: int) -> None:
        self.positions = 0.0
        self.mean = np.zeros(channels)
        self.mean_square = np.zeros(channels)
        self.variance = np.zeros(channels)

    def add(self, moments: np.ndarray) -> None:
        """Adds the moments (2C, H, W) of one sample, of a floating-point type."""
        mean, std = np.split(moments.astype(np.float64), 2)
        self.positions += mean[0].size
        self.mean += mean.sum(axis=(1, 2))
        self.mean_square += np.square(mean).sum(axis=(1, 2))
        self.variance += np.square(std).sum(axis=(1, 2))

    def mean_and_std(self) -> tuple[np.ndarray, np.ndarray]:
        """(mean, standard deviation), each (C,), of a draw from the posterior: its variance is the
        variance of the means plus the mean of the variances.
        """
        mean = self.mean / self.positions
        return mean, np.sqrt(
            self.mean_square / self.positions - np.square(mean) + self.variance / self.positions
        )

    def to_lists(self) -> dict[str, list[float]]:
        """The sums as JSON."""
        sums = {"mean": self.mean, "mean_square": self.mean_square, "variance": self.variance}
        return {
            "positions": [self.positions],
            **{name: values.tolist() for name, values in sums.items()},
        }

    @classmethod
    def total(cls, parts: Iterable[dict[str, list[float]]]) -> LatentStatistics:
        """Sum over parts, given as `to_lists`; floating-point sums depend on the order of parts."""
        total: LatentStatistics | None = None
        for part in parts:
            total = total or cls(len(part["mean"]))
            total.positions += part["positions"][0]
            for name in ("mean", "mean_square", "variance"):
                setattr(total, name, getattr(total, name) + np.array(part[name]))
        assert total is not None, "no part"
        return total
