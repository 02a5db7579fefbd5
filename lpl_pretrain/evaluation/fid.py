"""The Frechet distance between two Gaussians (arXiv 1706.08500, equation 6), in float64.

    |m_a - m_b|^2 + tr(C_a) + tr(C_b) - 2 tr((C_a C_b)^(1/2))

With C = R R^T, the eigenvalues of C_a C_b are those of the symmetric product R_a^T C_b R_a = (R_b^T R_a)^T (R_b^T R_a), so the last
trace is the sum of the singular values of R_b^T R_a.  Singular values, and not square roots of eigenvalues, because a square root
turns a rounding error of 1e-16 into 1e-8, times every missing rank: fewer pictures than dimensions is the common case.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lpl_pretrain.evaluation.stats import FeatureStatistics


def frechet_distance(a: FeatureStatistics, b: FeatureStatistics) -> float:
    if len(a.mean) != len(b.mean):
        raise ValueError(f"statistics of {len(a.mean)} and of {len(b.mean)} features: they come from unlike extractors")
    covariance_a, covariance_b = a.covariance, b.covariance
    cross = torch.linalg.svdvals(root(covariance_b).T @ root(covariance_a)).sum()
    distance = (a.mean - b.mean).square().sum() + covariance_a.trace() + covariance_b.trace() - 2 * cross
    return max(distance.item(), 0.0)  # equal statistics differ by rounding, to either side of zero


def root(covariance: Tensor) -> Tensor:
    """(D, rank) R with R R^T = `covariance`; directions whose variance is below rounding are left out."""
    variances, directions = torch.linalg.eigh(covariance)
    kept = variances > len(variances) * torch.finfo(variances.dtype).eps * variances[-1].clamp(min=0)
    return directions[:, kept] * variances[kept].sqrt()
