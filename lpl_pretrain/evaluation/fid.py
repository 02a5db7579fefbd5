"""The Frechet distance between two Gaussians (arXiv 1706.08500, equation 6), in float64.

    |m_a - m_b|^2 + tr(C_a) + tr(C_b) - 2 tr((C_a C_b)^(1/2))

With C_b = R R^T, the eigenvalues of C_a C_b are those of the symmetric R^T C_a R, of which at most
N_a - 1 are not zero.  A square root turns a rounding error of 1e-16 into 1e-8, times every missing
rank, so the roots of eigenvalues count only while the rounding that they can carry is small.  Else
the trace is the sum of the singular values of R_b^T R_a, five times slower.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lpl_pretrain.evaluation.stats import FeatureStatistics

ROUNDING_TOLERANCE = 1e-7
"""How much of tr(C_a) + tr(C_b) the rounding of the eigenvalues may come to."""


def frechet_distance(
    a: FeatureStatistics, b: FeatureStatistics, *, distinct: int | None = None
) -> float:
    """`distinct`: how many of a's pictures there are where some were counted more than once."""
    if len(a.mean) != len(b.mean):
        raise ValueError(
            f"statistics of {len(a.mean)} and of {len(b.mean)} features: they come from unlike "
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
    """tr((C_few C_many)^(1/2)), a scalar; the covariance of `many` pictures is factored; the
    product has at most this rank.
    """
    a, b = few.covariance, many.covariance
    factor, failed = torch.linalg.cholesky_ex(b)
    if failed:
        factor = covariance_factor(b)
    rank = min(rank, factor.shape[1])
    roots = torch.linalg.eigvalsh(factor.T @ a @ factor)[factor.shape[1] - rank :].sqrt()
    rounding = torch.finfo(a.dtype).eps * a.norm() * b.norm()
    if (rounding / (2 * roots)).sum() <= ROUNDING_TOLERANCE * (
        a.trace() + b.trace()
    ):  # not so for the NaN that a negative eigenvalue gives
        return roots.sum()
    return torch.linalg.svdvals(covariance_factor(b).T @ covariance_factor(a)).sum()


def covariance_factor(covariance: Tensor) -> Tensor:
    """(D, rank) R with R R^T = `covariance`; directions whose variance is below rounding are left
    out.
    """
    variances, directions = torch.linalg.eigh(covariance)
    kept = variances > len(variances) * torch.finfo(variances.dtype).eps * variances[-1].clamp(
        min=0
    )
    return directions[:, kept] * variances[kept].sqrt()
