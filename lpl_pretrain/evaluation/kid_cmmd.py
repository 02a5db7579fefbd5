"""Squared maximum mean discrepancies between two sets of features, in float64: KID and CMMD.

Features (N, D) and (M, D) of any float type.  Both kernels are functions of the inner product x.y
alone, and are summed over chunks of rows: the memory is that of CHUNK x max(N, M) numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from lpl_pretrain.errors import DataError
from lpl_pretrain.runtime import rng

CHUNK = 512
NORMAL_95 = 1.959964
"""Half the width of a 95 % confidence interval, in standard errors."""


@dataclass(frozen=True)
class Estimate:
    """Over subsets: mean, standard deviation, and the 95 % confidence interval of the mean by the
    normal approximation.
    """

    value: float
    std: float
    low: float
    high: float


def kernel_inception_distance(
    a: Tensor, b: Tensor, *, subsets: int = 100, subset_size: int = 1000, seed: int = 0
) -> Estimate:
    """KID (arXiv 1801.01401, section 4) over random subsets, each without replacement.

    `subset_size` is lowered to the rows that there are.  The interval is about the draw of subsets
    of these very pictures.
    """
    a, b = paired(a, b, at_least=2)
    size = min(subset_size, len(a), len(b))

    def pick(side: str, rows: int, subset: int) -> Tensor:
        return torch.from_numpy(
            rng.numpy_generator(seed, f"kid_subset_{side}", subset).choice(
                rows, size, replace=False
            )
        )

    return kid_of_subsets(
        a, b, ((pick("a", len(a), i), pick("b", len(b), i)) for i in range(subsets))
    )


def kid_of_subsets(a: Tensor, b: Tensor, picks: Iterable[tuple[Tensor, Tensor]]) -> Estimate:
    """KID over given subsets: for each, the indices of its rows of `a` and of its rows of `b`."""
    values = torch.tensor(
        [polynomial_mmd2(a[of_a], b[of_b]) for of_a, of_b in picks], dtype=torch.float64
    )
    if len(values) < 2:
        raise ValueError(
            f"KID over {len(values)} subsets has no standard deviation: take at least 2 subsets"
        )
    mean, std = values.mean().item(), values.std(correction=0).item()
    margin = NORMAL_95 * std / math.sqrt(len(values) - 1)
    return Estimate(mean, std, mean - margin, mean + margin)


def polynomial_mmd2(a: Tensor, b: Tensor) -> float:
    """The unbiased estimator (Gretton et al., JMLR 2012, equation 3) with KID's kernel: no picture
    is paired with itself.
    """
    a, b = paired(a, b, at_least=2)

    def kernel(inner: Tensor) -> Tensor:
        return polynomial(inner, a.shape[1])

    def within(x: Tensor) -> Tensor:
        return (pair_sum(kernel, x, x) - kernel(x.square().sum(dim=1)).sum()) / (
            len(x) * (len(x) - 1)
        )

    return (within(a) + within(b) - 2 * pair_sum(kernel, a, b) / (len(a) * len(b))).item()


def polynomial(inner: Tensor, dimension: int) -> Tensor:
    """(x.y / D + 1)^3 (arXiv 1801.01401, section 4)."""
    return (inner / dimension + 1) ** 3


def cmmd(a: Tensor, b: Tensor, *, sigma: float = 10.0, scale: float = 1000.0) -> float:
    """CMMD (arXiv 2401.09603) of CLIP embeddings, which are brought to length 1 here.

    As in the authors' code, the minimum-variance estimator (Gretton et al., JMLR 2012, equation 5):
    every picture is paired with itself too.
    """
    a, b = (torch.nn.functional.normalize(x, dim=1) for x in paired(a, b, at_least=1))

    def mean(x: Tensor, y: Tensor) -> Tensor:
        return pair_sum(lambda inner: gaussian(inner, sigma), x, y) / (len(x) * len(y))

    return (scale * (mean(a, a) + mean(b, b) - 2 * mean(a, b))).item()


def gaussian(inner: Tensor, sigma: float) -> Tensor:
    """exp(-|x - y|^2 / (2 sigma^2)) of vectors of length 1, for which |x - y|^2 = 2 - 2 x.y."""
    return torch.exp((inner - 1) / sigma**2)


def pair_sum(kernel: Callable[[Tensor], Tensor], a: Tensor, b: Tensor) -> Tensor:
    """The sum over all pairs of a row of `a` and a row of `b`."""
    return torch.stack([kernel(rows @ b.T).sum() for rows in a.split(CHUNK)]).sum()


def paired(a: Tensor, b: Tensor, *, at_least: int) -> tuple[Tensor, Tensor]:
    """Both in float64, where they lie, after checking that they can be compared."""
    if a.shape[1] != b.shape[1]:
        raise ValueError(
            f"{a.shape[1]} and {b.shape[1]} features a picture: take both sets from one extractor"
        )
    return checked(a, at_least=at_least), checked(b, at_least=at_least)


def checked(features: Tensor, *, at_least: int) -> Tensor:
    rows = features.detach().double()
    if len(rows) < at_least:
        raise DataError(
            f"features of {len(rows)} pictures; this score needs at least {at_least}: add pictures"
        )
    bad = (~rows.isfinite().all(dim=1)).nonzero().flatten().tolist()
    if bad:
        raise DataError(
            f"features of pictures {bad[:8]} are not finite: the pictures, or the extractor, hold "
            "NaN or infinity"
        )
    return rows
