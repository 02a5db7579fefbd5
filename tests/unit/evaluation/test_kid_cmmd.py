"""KID against torch-fidelity on its own subsets, CMMD against its authors' formula, and what both
owe to their estimators.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch_fidelity.metric_kid import kid_features_to_metric

from lpl_pretrain.errors import DataError
from lpl_pretrain.evaluation import kid_cmmd
from lpl_pretrain.evaluation.kid_cmmd import (
    cmmd,
    kernel_inception_distance,
    kid_of_subsets,
    polynomial_mmd2,
)

SIZES = [(300, 250, 24, 100), (2000, 2000, 64, 500)]


def features(count: int, dimension: int, seed: int, offset: float = 0.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, dimension, generator=generator) + offset


def agrees_with_torch_fidelity(count_a: int, count_b: int, dimension: int, size: int) -> None:
    a, b = (
        features(count_a, dimension, seed=0).double(),
        features(count_b, dimension, seed=1, offset=0.1).double(),
    )
    wanted = kid_features_to_metric(
        a, b, kid_subsets=10, kid_subset_size=size, rng_seed=7, verbose=False
    )
    draws = np.random.RandomState(7)
    picks = [
        tuple(
            torch.from_numpy(draws.choice(count, size, replace=False))
            for count in (count_a, count_b)
        )
        for _ in range(10)
    ]
    got = kid_of_subsets(a, b, picks)
    assert got.value == pytest.approx(wanted["kernel_inception_distance_mean"], rel=1e-9)
    assert got.std == pytest.approx(wanted["kernel_inception_distance_std"], rel=1e-9)


@pytest.mark.parametrize("sizes", SIZES)
def test_kid_equals_torch_fidelity(sizes):
    agrees_with_torch_fidelity(*sizes)


@pytest.mark.parametrize("broken", ["degree", "diagonal", "chunks"])
def test_kid_has_teeth(broken, monkeypatch):
    """A square for a cube; images paired with themselves; the last chunk of rows lost."""
    cube, total = kid_cmmd.polynomial, kid_cmmd.pair_sum
    if broken == "degree":
        monkeypatch.setattr(
            kid_cmmd, "polynomial", lambda inner, dimension: (inner / dimension + 1) ** 2
        )
    elif broken == "diagonal":
        monkeypatch.setattr(
            kid_cmmd,
            "polynomial",
            lambda inner, dimension: cube(inner, dimension) * (inner.ndim - 1),
        )
    else:
        monkeypatch.setattr(kid_cmmd, "CHUNK", 64)
        monkeypatch.setattr(
            kid_cmmd, "pair_sum", lambda of, a, b: total(of, a[: len(a) // 64 * 64], b)
        )
    with pytest.raises(AssertionError):
        agrees_with_torch_fidelity(*SIZES[0])


def test_chunks_change_nothing(monkeypatch):
    a, b = features(150, 12, seed=2), features(70, 12, seed=3)
    whole = polynomial_mmd2(a, b), cmmd(a, b)
    monkeypatch.setattr(kid_cmmd, "CHUNK", 32)
    assert (polynomial_mmd2(a, b), cmmd(a, b)) == pytest.approx(whole, rel=1e-10)


def by_pairs(a: np.ndarray, b: np.ndarray) -> float:
    """Gretton et al., JMLR 2012, equation 3, one pair at a time."""

    def mean(x: np.ndarray, y: np.ndarray, *, same: bool) -> float:
        pairs = [(i, j) for i in range(len(x)) for j in range(len(y)) if not (same and i == j)]
        return sum((x[i] @ y[j] / len(x[i]) + 1) ** 3 for i, j in pairs) / len(pairs)

    return mean(a, a, same=True) + mean(b, b, same=True) - 2 * mean(a, b, same=False)


def test_mmd_equals_a_sum_over_pairs():
    a, b = (
        features(9, 4, seed=4),
        features(13, 4, seed=5, offset=0.5),
    )  # unlike counts, which torch-fidelity does not take
    assert polynomial_mmd2(a, b) == pytest.approx(
        by_pairs(a.double().numpy(), b.double().numpy()), rel=1e-12
    )


def test_mmd_of_equal_distributions_is_zero_on_average():
    sets = [(features(20, 6, seed=2 * i), features(20, 6, seed=2 * i + 1)) for i in range(200)]
    values = torch.tensor([polynomial_mmd2(a, b) for a, b in sets])
    assert abs(values.mean()) < 3 * values.std() / 200**0.5
    biased = values + torch.tensor(
        [(1 + a.square().sum(dim=1) / 6).pow(3).mean() / 20 for a, _ in sets]
    )  # teeth
    assert abs(biased.mean()) > 3 * biased.std() / 200**0.5


def test_subsets_are_keyed_and_without_replacement(monkeypatch):
    a, b = features(60, 5, seed=6), features(40, 5, seed=7, offset=0.2)
    first = kernel_inception_distance(a, b, subsets=5, subset_size=30, seed=1)
    assert first == kernel_inception_distance(a, b, subsets=5, subset_size=30, seed=1)
    assert first != kernel_inception_distance(a, b, subsets=5, subset_size=30, seed=2)
    seen = []
    monkeypatch.setattr(kid_cmmd, "kid_of_subsets", lambda a, b, picks: seen.extend(picks))
    kernel_inception_distance(a, b, subsets=3)
    assert len(seen) == 3
    assert all(
        len(of_a.unique()) == 40 and sorted(of_b.tolist()) == list(range(40)) for of_a, of_b in seen
    )  # 1000 lowered to 40
    assert not torch.equal(seen[0][0], seen[1][0])


def test_the_interval_is_of_the_mean_over_subsets():
    a, b = features(200, 5, seed=8), features(200, 5, seed=9)
    estimate = kernel_inception_distance(a, b, subsets=50, subset_size=50)
    standard_error = estimate.std * (50 / 49) ** 0.5 / 50**0.5
    assert estimate.high - estimate.value == pytest.approx(1.96 * standard_error, rel=1e-4)
    assert estimate.value - estimate.low == pytest.approx(1.96 * standard_error, rel=1e-4)


def cmmd_of_authors(a: torch.Tensor, b: torch.Tensor, sigma: float = 10.0) -> float:
    """cmmd/distance.py of google-research on embeddings of length 1: means over all pairs of
    exp(-gamma |x - y|^2).
    """
    x, y = (rows.double() / rows.double().norm(dim=1, keepdim=True) for rows in (a, b))
    k_xx, k_xy, k_yy = (
        torch.exp(-((p[:, None] - q[None]) ** 2).sum(dim=2) / (2 * sigma**2)).mean()
        for p, q in ((x, x), (x, y), (y, y))
    )
    return (1000 * (k_xx + k_yy - 2 * k_xy)).item()


def test_cmmd_equals_its_authors_formula():
    a, b = features(120, 16, seed=10), 3 * features(90, 16, seed=11, offset=0.3)
    assert cmmd(a, b) == pytest.approx(cmmd_of_authors(a, b), rel=1e-9)
    assert cmmd(a, b, sigma=0.5, scale=1.0) == pytest.approx(
        cmmd_of_authors(a, b, sigma=0.5) / 1000, rel=1e-9
    )
    assert cmmd(a, a) == pytest.approx(0.0, abs=1e-9)


@pytest.mark.parametrize("broken", ["bandwidth", "length"])
def test_cmmd_has_teeth(broken, monkeypatch):
    """A kernel of sigma^2 for 2 sigma^2; embeddings that keep their lengths."""
    a, b = features(120, 16, seed=10), 3 * features(90, 16, seed=11, offset=0.3)
    wanted = cmmd_of_authors(a, b)
    if broken == "bandwidth":
        monkeypatch.setattr(
            kid_cmmd, "gaussian", lambda inner, sigma: torch.exp(2 * (inner - 1) / sigma**2)
        )
    else:
        monkeypatch.setattr(torch.nn.functional, "normalize", lambda rows, dim: rows)
    assert cmmd(a, b) != pytest.approx(wanted, rel=1e-2)


@pytest.mark.parametrize("score", [polynomial_mmd2, kernel_inception_distance, cmmd])
def test_bad_input_is_refused(score):
    with pytest.raises(
        ValueError, match="5 and 6 features an image: take both sets from one extractor"
    ):
        score(torch.zeros(9, 5), torch.zeros(9, 6))
    with pytest.raises(DataError, match="features of 0 images; this score needs at least"):
        score(torch.zeros(9, 5), torch.zeros(0, 5))
    spoilt = features(9, 5, seed=0)
    spoilt[3, 2] = float("inf")
    with pytest.raises(DataError, match=r"images \[3\] are not finite"):
        score(torch.zeros(9, 5), spoilt)


def test_one_subset_is_refused():
    with pytest.raises(
        ValueError, match="over 1 subsets has no standard deviation: take at least 2"
    ):
        kernel_inception_distance(torch.zeros(9, 5), torch.zeros(9, 5), subsets=1)
