"""Fidelity and diversity by nearest neighbours, in float64: precision, recall, density, coverage.

Features (N, D) of any float type.  A set's manifold is the union of balls, one centred on each of
its images, whose radius is the distance to the k-th nearest other image of the set.  Balls are
taken CHUNK at a time: the memory is that of CHUNK x N numbers.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from lpl_pretrain.config import metrics
from lpl_pretrain.evaluation.feature_checks import check_pair
from lpl_pretrain.evaluation.metric import Estimate, MetricInputs, MetricSpec

CHUNK = 512
"""Balls whose distances to all points are in memory at a time."""


def precision_recall(generated: Tensor, real: Tensor, k: int = 3) -> tuple[float, float]:
    """Improved precision and recall (arXiv 1904.06991, equation 2).

    Precision: fraction of generated images inside the real manifold.  Recall: fraction of real
    images inside the generated manifold.
    """
    generated, real = prepared(generated, real, k)
    return fraction_inside(real, generated, k), fraction_inside(generated, real, k)


def density_coverage(generated: Tensor, real: Tensor, k: int = 5) -> tuple[float, float]:
    """Density and coverage (arXiv 2002.09797, section 3).

    Density: mean number of real balls that contain a generated image, over k.  Coverage: fraction
    of real balls that contain a generated image.  As in the authors' code, an image on the surface
    is outside.
    """
    generated, real = prepared(generated, real, k)
    pairs = 0
    covered = 0
    for distances, radii in balls(real, generated, k):
        inside = distances < radii
        pairs += int(inside.sum())
        covered += int(inside.any(dim=1).sum())
    return pairs / (k * len(generated)), covered / len(real)


def fraction_inside(centres: Tensor, points: Tensor, k: int) -> float:
    """Fraction of `points` inside the manifold of `centres`.

    As in the authors' code, an image on the surface is inside.
    """
    inside = torch.zeros(len(points), dtype=torch.bool, device=points.device)
    for distances, radii in balls(centres, points, k):
        inside |= (distances <= radii).any(dim=0)
    return inside.double().mean().item()


def balls(centres: Tensor, points: Tensor, k: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield squared distances (C, M) and squared radii (C, 1) of each chunk of C balls.

    `centres`: (N, D); `points`: (M, D).
    """
    for start in range(0, len(centres), CHUNK):
        rows = centres[start : start + CHUNK]
        others = without_self(squared_distances(rows, centres), start)
        yield squared_distances(rows, points), others.kthvalue(k, dim=1, keepdim=True).values


def squared_distances(a: Tensor, b: Tensor) -> Tensor:
    """|x - y|^2 of every row x of `a` (N, D) and y of `b` (M, D): (N, M)."""
    return (a.square().sum(dim=1)[:, None] + b.square().sum(dim=1) - 2 * a @ b.T).clamp(min=0)


def without_self(distances: Tensor, start: int) -> Tensor:
    """Set each image's distance to itself to infinity, in place.

    Row i is the image of column `start` + i.
    """
    distances.diagonal(offset=start).fill_(torch.inf)
    return distances


def prepared(generated: Tensor, real: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Subtract the real mean from both, which keeps distances and lowers their rounding error."""
    if k < 1:
        raise ValueError(f"k is {k}: the radius needs at least the 1st nearest neighbour")
    generated, real = check_pair(generated, real, at_least=k + 1)
    centre = real.mean(dim=0)
    return generated - centre, real - centre


def _compute_precision_recall(inputs: MetricInputs) -> list[Estimate]:
    values = precision_recall(inputs.generated_features(), inputs.real_features())
    return [Estimate(value) for value in values]


def _compute_density_coverage(inputs: MetricInputs) -> list[Estimate]:
    values = density_coverage(inputs.generated_features(), inputs.real_features())
    return [Estimate(value) for value in values]


PRECISION_RECALL = MetricSpec(metrics.PRECISION_RECALL, _compute_precision_recall)
DENSITY_COVERAGE = MetricSpec(metrics.DENSITY_COVERAGE, _compute_density_coverage)
