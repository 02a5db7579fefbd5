"""The Frechet distance between two Gaussians (arXiv 1706.08500, equation 6), in float64.

    |m_a - m_b|^2 + tr(C_a) + tr(C_b) - 2 tr((C_a C_b)^(1/2))

With C_b = R R^T, the eigenvalues of C_a C_b are those of the symmetric R^T C_a R, of which at most
N_a - 1 are not zero.  A square root turns a rounding error of 1e-16 into 1e-8, times every missing
rank, so the roots of eigenvalues are used only while the rounding that they can carry is small.
Otherwise the trace is the sum of the singular values of R_b^T R_a, which is five times slower.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from lpl_pretrain.config import metrics
from lpl_pretrain.evaluation.metric import Estimate, MetricInputs, MetricSpec
from lpl_pretrain.evaluation.stats import FeatureStatistics
from lpl_pretrain.runtime import rng

ROUNDING_TOLERANCE = 1e-7
"""Largest rounding error of the eigenvalues' roots, relative to tr(C_a) + tr(C_b)."""


def frechet_distance(
    a: FeatureStatistics, b: FeatureStatistics, *, distinct: int | None = None
) -> float:
    """Frechet distance; `distinct`: number of different images in `a`, where some count twice."""
    if len(a.mean) != len(b.mean):
        raise ValueError(
            f"statistics of {len(a.mean)} and of {len(b.mean)} features: they come from different "
            "extractors"
        )
    rank = min(a.count if distinct is None else distinct, b.count) - 1
    few, many = sorted((a, b), key=lambda statistics: statistics.count)
    distance = (
        (a.mean - b.mean).square().sum()
        + few.covariance.trace()
        + many.covariance.trace()
        - 2 * cross_term(few, many, rank)
    )
    return max(distance.item(), 0.0)  # equal statistics differ by rounding, to either side of zero


def cross_term(few: FeatureStatistics, many: FeatureStatistics, rank: int) -> Tensor:
    """tr((C_few C_many)^(1/2)), a scalar; the covariance of more images is the one factored.

    `rank`: upper bound of the product's rank.
    """
    a = few.covariance
    b = many.covariance
    factor, failed = torch.linalg.cholesky_ex(b)
    if failed:
        factor = covariance_factor(b)
    rank = min(rank, factor.shape[1])
    roots = torch.linalg.eigvalsh(factor.T @ a @ factor)[factor.shape[1] - rank :].sqrt()
    rounding = torch.finfo(a.dtype).eps * a.norm() * b.norm()
    # False too for the NaN that a negative eigenvalue gives
    if (rounding / (2 * roots)).sum() <= ROUNDING_TOLERANCE * (a.trace() + b.trace()):
        return roots.sum()
    return torch.linalg.svdvals(covariance_factor(b).T @ covariance_factor(a)).sum()


def covariance_factor(covariance: Tensor) -> Tensor:
    """(D, rank) R with R R^T = `covariance`, without directions of a variance below rounding."""
    variances, directions = torch.linalg.eigh(covariance)
    kept = variances > len(variances) * torch.finfo(variances.dtype).eps * variances[-1].clamp(
        min=0
    )
    return directions[:, kept] * variances[kept].sqrt()


def frechet_from_features(
    features: Tensor, reference: FeatureStatistics, *, distinct: int | None = None
) -> float:
    """Frechet distance of features (N, D) to a reference; `distinct` as in `frechet_distance`."""
    statistics = FeatureStatistics(features.shape[1])
    statistics.update(features)
    return frechet_distance(statistics, reference, distinct=distinct)


def bootstrap(
    features: Tensor, reference: FeatureStatistics, *, repeats: int, seed: int
) -> tuple[float, float]:
    """Mean and standard error of the distance over resamples of the images, with replacement.

    Efron (1979).  Repeated images lower the covariance's rank, so the mean is above the distance of
    the images themselves: use this for its standard error.
    """
    if repeats < 2:
        raise ValueError(f"{repeats} resamples have no standard error: take at least 2")
    distances = []
    for repeat in range(repeats):
        rows = rng.numpy_generator(seed, "frechet_bootstrap", repeat).integers(
            len(features), size=len(features)
        )
        distances.append(
            frechet_from_features(
                features[torch.from_numpy(rows)], reference, distinct=len(np.unique(rows))
            )
        )
    return float(np.mean(distances)), float(np.std(distances, ddof=1))


def _compute_fd(inputs: MetricInputs) -> list[Estimate]:
    return [_estimate(inputs, "pooled")]


def _compute_spatial_fd(inputs: MetricInputs) -> list[Estimate]:
    return [_estimate(inputs, "spatial")]


def _estimate(inputs: MetricInputs, kind: str) -> Estimate:
    real = inputs.real_statistics(kind)
    value = frechet_distance(inputs.generated_statistics(kind), real)
    at_half = None
    if len(inputs.generated.batches) > 1:
        at_half = frechet_distance(inputs.generated_statistics(kind, fraction=0.5), real)
    std = None
    if resamples := inputs.protocol.bootstrap:
        features = inputs.generated_features(kind)
        _, std = bootstrap(features, real, repeats=resamples, seed=inputs.protocol.seed)
    return Estimate(value, at_half=at_half, std=std)


FD = MetricSpec(metrics.FD, _compute_fd)
SPATIAL_FD = MetricSpec(metrics.SPATIAL_FD, _compute_spatial_fd)
