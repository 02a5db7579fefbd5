"""What a Frechet distance owes to the number of pictures, and to which pictures they were.

Features (N, D) of generated pictures against statistics of real ones.  FD falls as pictures are
added, in about a straight line of 1/N (arXiv 1911.07023): scores of unlike N do not compare.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from lpl_pretrain.errors import DataError
from lpl_pretrain.evaluation.fid import frechet_distance
from lpl_pretrain.evaluation.stats import FeatureStatistics
from lpl_pretrain.runtime import rng


def frechet_at(
    features: Tensor,
    reference: FeatureStatistics,
    counts: Sequence[int],
    *,
    repeats: int,
    seed: int,
) -> Tensor:
    """(len(counts), repeats) float64: FD of random subsets of so many pictures, each without
    replacement.
    """
    if not all(2 <= count <= len(features) for count in counts):
        raise DataError(
            f"subsets of {list(counts)} pictures: every count must be 2 to the {len(features)} "
            "there are; add pictures"
        )

    def one(count: int, repeat: int) -> float:
        rows = rng.numpy_generator(seed, "frechet_subset", count, repeat).choice(
            len(features), count, replace=False
        )
        return distance(features[torch.from_numpy(rows)], reference)

    return torch.tensor(
        [[one(count, repeat) for repeat in range(repeats)] for count in counts], dtype=torch.float64
    )


def frechet_infinity(
    features: Tensor,
    reference: FeatureStatistics,
    *,
    points: int = 15,
    smallest: int | None = None,
    seed: int = 0,
) -> float:
    """FD extrapolated to infinitely many pictures by a straight line of 1/N: FID-infinity (arXiv
    1911.07023).

    `points` subsets evenly spaced from `smallest` (a tenth of the pictures, the paper's 5,000 of
    50,000) to all pictures.
    """
    smallest = len(features) // 10 if smallest is None else smallest
    if points < 2 or smallest >= len(features):
        raise DataError(
            f"a line through {points} subsets of {smallest} to {len(features)} pictures: it needs "
            "at least 2 subsets of unlike size"
        )
    counts = np.linspace(smallest, len(features), points).astype(int).tolist()
    scores = frechet_at(features, reference, counts, repeats=1, seed=seed)[:, 0]
    _, intercept = np.polyfit(1 / np.array(counts), scores.numpy(), deg=1)
    return float(intercept)


def bootstrap(
    features: Tensor, reference: FeatureStatistics, *, repeats: int, seed: int
) -> tuple[float, float]:
    """Mean and standard error of FD over resamples of the pictures, with replacement (Efron, 1979).

    Doubled pictures lower the covariance's rank, so the mean is above the FD of the pictures
    themselves: use it for its error.
    """
    if repeats < 2:
        raise ValueError(f"{repeats} resamples have no standard error: take at least 2")
    scores = []
    for repeat in range(repeats):
        rows = rng.numpy_generator(seed, "frechet_bootstrap", repeat).integers(
            len(features), size=len(features)
        )
        scores.append(
            distance(features[torch.from_numpy(rows)], reference, distinct=len(np.unique(rows)))
        )
    return float(np.mean(scores)), float(np.std(scores, ddof=1))


def distance(
    features: Tensor, reference: FeatureStatistics, *, distinct: int | None = None
) -> float:
    statistics = FeatureStatistics(features.shape[1])
    statistics.update(features)
    return frechet_distance(statistics, reference, distinct=distinct)
