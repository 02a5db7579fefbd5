"""Dependence of a Frechet distance on the number of images, and its limit: FID-infinity.

Features (N, D) of generated images against statistics of real ones.  FD falls as images are added,
in about a straight line of 1/N (arXiv 1911.07023): scores of different N do not compare.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from lpl_pretrain.config import metrics
from lpl_pretrain.errors import DataError
from lpl_pretrain.evaluation.fid import frechet_from_features
from lpl_pretrain.evaluation.metric import Estimate, MetricInputs, MetricSpec
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
    """FD of random subsets, each drawn without replacement: (len(counts), repeats) float64.

    `counts`: images in a subset.
    """
    if not all(2 <= count <= len(features) for count in counts):
        raise DataError(
            f"subsets of {list(counts)} images: every count must be from 2 to {len(features)}, the "
            "number of generated images; generate more images"
        )

    def subset_distance(count: int, repeat: int) -> float:
        rows = rng.numpy_generator(seed, "frechet_subset", count, repeat).choice(
            len(features), count, replace=False
        )
        return frechet_from_features(features[torch.from_numpy(rows)], reference)

    return torch.tensor(
        [[subset_distance(count, repeat) for repeat in range(repeats)] for count in counts],
        dtype=torch.float64,
    )


def frechet_infinity(
    features: Tensor,
    reference: FeatureStatistics,
    *,
    points: int = 15,
    smallest: int | None = None,
    seed: int = 0,
) -> float:
    """FD extrapolated to infinitely many images by a straight line of 1/N (arXiv 1911.07023).

    `points` subsets, evenly spaced from `smallest` (a tenth of the images, as the paper's 5,000 of
    50,000) to all images.
    """
    smallest = len(features) // 10 if smallest is None else smallest
    if points < 2 or smallest >= len(features):
        raise DataError(
            f"a line through {points} subsets of {smallest} to {len(features)} images: it needs "
            "at least 2 subsets of different sizes"
        )
    counts = np.linspace(smallest, len(features), points).astype(int).tolist()
    distances = frechet_at(features, reference, counts, repeats=1, seed=seed)[:, 0]
    _, intercept = np.polyfit(1 / np.array(counts), distances.numpy(), deg=1)
    return float(intercept)


def _compute(inputs: MetricInputs) -> list[Estimate]:
    features = inputs.generated_features()
    real = inputs.real_statistics("pooled")
    return [Estimate(frechet_infinity(features, real, seed=inputs.protocol.seed))]


FD_INFINITY = MetricSpec(metrics.FD_INFINITY, _compute)
