"""Squared maximum mean discrepancies between two sets of features, in float64: KID and CMMD.

Features (N, D) and (M, D) of any float type.  Both kernels are functions of the inner product x.y
alone, and are summed over chunks of rows: the memory is that of CHUNK x max(N, M) numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from lpl_pretrain.config import metrics
from lpl_pretrain.evaluation.feature_checks import check_pair
from lpl_pretrain.evaluation.metric import Estimate, MetricInputs, MetricSpec
from lpl_pretrain.runtime import rng

CHUNK = 512
"""Rows whose kernel values are in memory at a time."""
NORMAL_95 = 1.959964
"""Half the width of a 95 % confidence interval of a normal distribution, in standard errors."""


def kernel_inception_distance(
    a: Tensor, b: Tensor, *, subsets: int = 100, subset_size: int = 1000, seed: int = 0
) -> Estimate:
    """KID (arXiv 1801.01401, section 4) over random subsets, each drawn without replacement.

    `subset_size` is lowered to the number of rows.  The interval covers the draw of subsets from
    these very images, not the draw of the images.
    """
    a, b = check_pair(a, b, at_least=2)
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
    """KID over given subsets: mean, standard deviation, and 95 % interval of the mean (normal).

    `picks`: for each subset the indices of its rows of `a` and of its rows of `b`.
    """
    values = torch.tensor(
        [polynomial_mmd2(a[rows_a], b[rows_b]) for rows_a, rows_b in picks], dtype=torch.float64
    )
    if len(values) < 2:
        raise ValueError(
            f"KID over {len(values)} subsets has no standard deviation: take at least 2 subsets"
        )
    mean = values.mean().item()
    std = values.std(correction=0).item()
    margin = NORMAL_95 * std / math.sqrt(len(values) - 1)
    return Estimate(mean, std=std, low=mean - margin, high=mean + margin)


def polynomial_mmd2(a: Tensor, b: Tensor) -> float:
    """Unbiased estimator of MMD^2 (Gretton et al., JMLR 2012, equation 3) with KID's kernel.

    No image is paired with itself.
    """
    a, b = check_pair(a, b, at_least=2)

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
    """CMMD (arXiv 2401.09603) of CLIP embeddings, which are normalised to length 1 here.

    As in the authors' code, the minimum-variance estimator (Gretton et al., JMLR 2012, equation 5):
    every image is paired with itself too.
    """
    a, b = (torch.nn.functional.normalize(x, dim=1) for x in check_pair(a, b, at_least=1))

    def mean(x: Tensor, y: Tensor) -> Tensor:
        return pair_sum(lambda inner: gaussian(inner, sigma), x, y) / (len(x) * len(y))

    return (scale * (mean(a, a) + mean(b, b) - 2 * mean(a, b))).item()


def gaussian(inner: Tensor, sigma: float) -> Tensor:
    """exp(-|x - y|^2 / (2 sigma^2)) of vectors of length 1, for which |x - y|^2 = 2 - 2 x.y."""
    return torch.exp((inner - 1) / sigma**2)


def pair_sum(kernel: Callable[[Tensor], Tensor], a: Tensor, b: Tensor) -> Tensor:
    """Sum of the kernel over all pairs of a row of `a` and a row of `b`, a scalar."""
    return torch.stack([kernel(rows @ b.T).sum() for rows in a.split(CHUNK)]).sum()


def _compute_kid(inputs: MetricInputs) -> list[Estimate]:
    protocol = inputs.protocol
    estimate = kernel_inception_distance(
        inputs.generated_features(),
        inputs.real_features(),
        subsets=protocol.kid_subsets,
        subset_size=protocol.kid_subset_size,
        seed=protocol.seed,
    )
    return [estimate]


def _compute_cmmd(inputs: MetricInputs) -> list[Estimate]:
    return [Estimate(cmmd(inputs.generated_features(), inputs.real_features()))]


KID = MetricSpec(metrics.KID, _compute_kid)
CMMD = MetricSpec(metrics.CMMD, _compute_cmmd)
