"""Fidelity and diversity by nearest neighbours, in float64: precision, recall, density, coverage.

Features (N, D) of any float type.  A set's manifold is the union of balls about its pictures, each
of which reaches to the k-th nearest other picture of the set.  Balls are taken CHUNK at a time: the
memory is that of CHUNK x N numbers.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from lpl_pretrain.evaluation.kid_cmmd import CHUNK, paired


def precision_recall(generated: Tensor, real: Tensor, k: int = 3) -> tuple[float, float]:
    """Improved precision and recall (arXiv 1904.06991, equation 2): the share of pictures inside
    the other set's manifold.
    """
    generated, real = prepared(generated, real, k)
    return fraction_inside(real, generated, k), fraction_inside(generated, real, k)


def density_coverage(generated: Tensor, real: Tensor, k: int = 5) -> tuple[float, float]:
    """Density and coverage (arXiv 2002.09797, section 3).

    Density: how many real balls a generated picture is inside, over k.  Coverage: the share of real
    balls that hold a generated picture.  As in the authors' code, a picture on the surface is
    outside.
    """
    generated, real = prepared(generated, real, k)
    pairs = covered = 0
    for distances, radii in balls(real, generated, k):
        inside = distances < radii
        pairs += int(inside.sum())
        covered += int(inside.any(dim=1).sum())
    return pairs / (k * len(generated)), covered / len(real)


def fraction_inside(centres: Tensor, points: Tensor, k: int) -> float:
    """As in the authors' code, a picture on the surface is inside."""
    inside = torch.zeros(len(points), dtype=torch.bool, device=points.device)
    for distances, radii in balls(centres, points, k):
        inside |= (distances <= radii).any(dim=0)
    return inside.double().mean().item()


def balls(centres: Tensor, points: Tensor, k: int) -> Iterator[tuple[Tensor, Tensor]]:
    """For each chunk of centres (N, D): squared distances to points (M, D), of (C, M), and the
    balls' squared radii (C, 1).
    """
    for start in range(0, len(centres), CHUNK):
        rows = centres[start : start + CHUNK]
        others = without_self(squared_distances(rows, centres), start)
        yield squared_distances(rows, points), others.kthvalue(k, dim=1, keepdim=True).values


def squared_distances(a: Tensor, b: Tensor) -> Tensor:
    return (a.square().sum(dim=1)[:, None] + b.square().sum(dim=1) - 2 * a @ b.T).clamp(min=0)


def without_self(distances: Tensor, start: int) -> Tensor:
    """Rows are pictures `start`, `start` + 1 ... of the columns' set: none is its own neighbour."""
    distances.diagonal(offset=start).fill_(torch.inf)
    return distances


def prepared(generated: Tensor, real: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Both less the real mean, which leaves distances as they are and their rounding small."""
    if k < 1:
        raise ValueError(f"k is {k}: the radius needs at least the 1st nearest neighbour")
    generated, real = paired(generated, real, at_least=k + 1)
    centre = real.mean(dim=0)
    return generated - centre, real - centre
