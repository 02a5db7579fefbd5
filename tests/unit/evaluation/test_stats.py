"""Streaming statistics and the Frechet distance, against numpy, scipy, mpmath and closed forms."""

from __future__ import annotations

import mpmath
import numpy as np
import pytest
import scipy.linalg
import torch

from lpl_pretrain.errors import DataError
from lpl_pretrain.evaluation import fid
from lpl_pretrain.evaluation.fid import covariance_factor, frechet_distance
from lpl_pretrain.evaluation.stats import FeatureStatistics

TIGHT = {"rtol": 1e-10, "atol": 1e-10}


def features(count: int, dimension: int, seed: int, offset: float = 0.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    mix = (
        torch.randn(dimension, dimension, generator=generator, dtype=torch.float64) / dimension**0.5
    )
    return torch.randn(count, dimension, generator=generator, dtype=torch.float64) @ mix + offset


def of(rows: torch.Tensor) -> FeatureStatistics:
    statistics = FeatureStatistics(rows.shape[1])
    statistics.update(rows)
    return statistics


@pytest.mark.parametrize("split", [[40], [1] * 40, [7, 0, 20, 13], [39, 1]])
def test_any_split_gives_the_same(split):
    rows = features(40, 6, seed=0, offset=100.0)  # an offset: the case that E[x^2] - E[x]^2 loses
    streamed, merged = FeatureStatistics(6), FeatureStatistics(6)
    for part in rows.split(split):
        streamed.update(part)
    for part in reversed(rows.split(split)):
        piece = FeatureStatistics(6)
        piece.update(part)
        merged.merge(piece)
    for statistics in (streamed, merged):
        assert statistics.count == 40
        np.testing.assert_allclose(statistics.mean, rows.numpy().mean(axis=0), **TIGHT)
        np.testing.assert_allclose(
            statistics.covariance, np.cov(rows.numpy(), rowvar=False), **TIGHT
        )


def test_a_merge_without_the_mean_shift_is_noticed():
    class Broken(FeatureStatistics):
        def merge(self, other):
            delta = other.mean - self.mean
            self.count += other.count
            self.mean += delta * (other.count / self.count)
            self.scatter += other.scatter

    rows, broken = features(40, 6, seed=0), Broken(6)
    for part in rows.split([13, 27]):
        broken.update(part)
    with pytest.raises(AssertionError):
        np.testing.assert_allclose(
            broken.covariance, np.cov(rows.numpy(), rowvar=False), rtol=1e-3, atol=1e-3
        )


def test_a_non_finite_image_is_named():
    statistics = of(features(5, 3, seed=0))
    rows = torch.zeros(4, 3)
    rows[2, 1] = float("nan")
    with pytest.raises(DataError, match=r"\[7\]"):
        statistics.update(rows)


def test_tensors_round_trip():
    statistics = of(features(9, 4, seed=0))
    back = FeatureStatistics.from_tensors(statistics.tensors())
    assert (
        back.count == 9
        and torch.equal(back.mean, statistics.mean)
        and torch.equal(back.covariance, statistics.covariance)
    )


def by_scipy(a: FeatureStatistics, b: FeatureStatistics) -> float:
    product = scipy.linalg.sqrtm((a.covariance @ b.covariance).numpy())
    return float(
        (a.mean - b.mean).square().sum()
        + a.covariance.trace()
        + b.covariance.trace()
        - 2 * np.trace(product).real
    )


@pytest.mark.parametrize(
    "count_a, count_b, rtol", [(400, 300, 1e-9), (400, 12, 1e-5), (10, 12, 1e-5)]
)
def test_equals_scipy(count_a, count_b, rtol):
    """32 features: 12 images give rank 11, where sqrtm itself is exact to no more than 1e-5."""
    a, b = of(features(count_a, 32, seed=1)), of(features(count_b, 32, seed=2, offset=0.3))
    assert frechet_distance(a, b) == pytest.approx(by_scipy(a, b), rel=rtol)
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-10)


def rotated(count: int, seed: int, exponent: float, dimension: int = 16) -> torch.Tensor:
    """Standard deviations from 1 to 10^exponent, in a basis that is the same for every seed."""
    generator = torch.Generator().manual_seed(99)
    basis = torch.linalg.qr(
        torch.randn(dimension, dimension, generator=generator, dtype=torch.float64)
    ).Q
    rows = torch.randn(count, dimension, generator=generator.manual_seed(seed), dtype=torch.float64)
    return rows * torch.logspace(0, exponent, dimension, dtype=torch.float64) @ basis


HARD = {
    "full rank": (rotated(40, 1, 0) + 0.1, rotated(40, 2, 0), "eigenvalues"),
    "fewer pictures than features": (rotated(6, 1, 0), rotated(40, 2, 0), "eigenvalues"),
    "fewer on both sides": (rotated(6, 1, 0), rotated(7, 2, 0), "eigenvalues"),
    "one more than features": (rotated(17, 1, -2), rotated(17, 2, -2), "eigenvalues"),
    "unlike directions": (rotated(40, 1, -6), rotated(40, 2, 6), "eigenvalues"),
    "nearly singular": (rotated(40, 1, -6), rotated(40, 2, -6), "singular values"),
    "beyond float64": (rotated(40, 1, -12), rotated(40, 2, -12), "singular values"),
    "every picture twice": (rotated(6, 1, 0).repeat(2, 1), rotated(40, 2, 0), "singular values"),
}


def by_mpmath(rows_a: torch.Tensor, rows_b: torch.Tensor) -> tuple[float, float]:
    """50 digits, from the features themselves: tr((C_a C_b)^(1/2)) is the sum of the singular
    values of A B^T; and the traces.
    """
    with mpmath.workdps(50):
        (a, mean_a), (b, mean_b) = (
            centred(mpmath.matrix(rows.tolist())) for rows in (rows_a, rows_b)
        )
        traces = sum(x * x for x in a) + sum(x * x for x in b)
        cross = mpmath.fsum(mpmath.svd_r(a * b.T, compute_uv=False))
        return float(sum((x - y) ** 2 for x, y in zip(mean_a, mean_b)) + traces - 2 * cross), float(
            traces
        )


def centred(rows: mpmath.matrix) -> tuple[mpmath.matrix, list]:
    """Less the mean, over (N - 1)^(1/2); and the mean."""
    mean = [mpmath.fsum(rows[:, j]) / rows.rows for j in range(rows.cols)]
    scale = mpmath.sqrt(rows.rows - 1)
    return mpmath.matrix(
        [[(rows[i, j] - mean[j]) / scale for j in range(rows.cols)] for i in range(rows.rows)]
    ), mean


@pytest.mark.parametrize("case", HARD)
def test_equals_mpmath(case, monkeypatch):
    rows_a, rows_b, way = HARD[case]
    singular_values, calls = torch.linalg.svdvals, []
    monkeypatch.setattr(
        torch.linalg, "svdvals", lambda matrix: calls.append(1) or singular_values(matrix)
    )
    wanted, traces = by_mpmath(rows_a, rows_b)
    assert frechet_distance(of(rows_a), of(rows_b)) == pytest.approx(wanted, abs=1e-12 * traces)
    assert frechet_distance(of(rows_b), of(rows_a)) == pytest.approx(wanted, abs=1e-12 * traces)
    assert calls == ([] if way == "eigenvalues" else [1, 1])


@pytest.mark.parametrize("broken", ["never_in_doubt", "rank_unknown", "rank_too_small"])
def test_mpmath_has_teeth(broken, monkeypatch):
    """Broken: no limit on rounding; a rank that is not bounded by the count; one rank too few."""
    rows_a, rows_b, _ = HARD[
        "every picture twice" if broken == "never_in_doubt" else "fewer pictures than features"
    ]
    wanted, traces = by_mpmath(rows_a, rows_b)
    eigenvalues = torch.linalg.eigvalsh
    monkeypatch.setattr(fid, "ROUNDING_TOLERANCE", float("inf"))
    monkeypatch.setattr(torch.linalg, "eigvalsh", lambda matrix: eigenvalues(matrix).abs())
    few = of(rows_a)
    if broken != "never_in_doubt":
        few.scatter, few.count = (
            few.covariance * (24 if broken == "rank_unknown" else 4),
            25 if broken == "rank_unknown" else 5,
        )
    assert frechet_distance(few, of(rows_b)) != pytest.approx(wanted, abs=1e-9 * traces)


def diagonal(variances: list[float], mean: float = 0.0) -> FeatureStatistics:
    statistics = FeatureStatistics(len(variances))
    statistics.count, statistics.mean = (
        101,
        torch.full((len(variances),), mean, dtype=torch.float64),
    )
    statistics.scatter = torch.tensor(variances, dtype=torch.float64).diag() * 100
    return statistics


@pytest.mark.parametrize(
    "variances_a, variances_b",
    [
        ([1.0, 4.0, 9.0], [4.0, 1.0, 9.0]),
        ([1.0, 0.0, 9.0], [0.0, 4.0, 4.0]),
        ([0.0, 0.0, 0.0], [1.0, 2.0, 3.0]),
        ([1e-6, 1.0, 1e6], [1e6, 1e-6, 1.0]),
    ],
)
def test_closed_form(variances_a, variances_b):
    wanted = 3 * 0.5**2 + sum(
        (a**0.5 - b**0.5) ** 2 for a, b in zip(variances_a, variances_b, strict=True)
    )
    assert frechet_distance(
        diagonal(variances_a, mean=0.5), diagonal(variances_b)
    ) == pytest.approx(wanted, rel=1e-12)


def test_rank_deficient_statistics_are_at_distance_zero_from_themselves():
    statistics = of(features(20, 200, seed=3))
    assert frechet_distance(statistics, statistics) < 1e-10 * statistics.covariance.trace()


def test_unlike_dimensions_are_refused():
    with pytest.raises(ValueError, match="different extractors"):
        frechet_distance(of(features(9, 3, seed=0)), of(features(9, 4, seed=0)))


@pytest.mark.parametrize("broken", ["no_square_root", "elementwise", "root_of_noise"])
def test_has_teeth(broken):
    """The cross term as the trace of the product; with roots entry by entry; with square roots of
    rounding noise.
    """
    a, b = of(features(20, 200, seed=4)), of(features(20, 200, seed=5))
    exact = torch.linalg.svdvals(
        covariance_factor(b.covariance).T @ covariance_factor(a.covariance)
    ).sum()
    product = a.covariance @ b.covariance
    wrong = {
        "no_square_root": lambda: product.trace(),
        "elementwise": lambda: product.abs().sqrt().trace(),
        "root_of_noise": lambda: torch.linalg.eigvals(product).abs().sqrt().sum(),
    }[broken]()
    assert wrong.item() != pytest.approx(exact.item(), rel=1e-7)
