"""FD against the number of images: the subsets, the line to infinity, the bootstrap."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from pytorch_fid.fid_score import calculate_frechet_distance

from lpl_pretrain.errors import DataError
from lpl_pretrain.evaluation import fd_infinity
from lpl_pretrain.evaluation.fd_infinity import frechet_at, frechet_infinity
from lpl_pretrain.evaluation.fid import bootstrap, frechet_from_features
from lpl_pretrain.evaluation.stats import FeatureStatistics
from lpl_pretrain.runtime import rng

DIMENSION = 12


def features(count: int, seed: int, offset: float = 0.0) -> torch.Tensor:
    return (
        torch.randn(
            count, DIMENSION, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
        )
        + offset
    )


def normal_reference() -> FeatureStatistics:
    """Exactly N(0, I), as if of infinitely many images."""
    statistics = FeatureStatistics(DIMENSION)
    statistics.count, statistics.scatter = 1001, 1000 * torch.eye(DIMENSION, dtype=torch.float64)
    return statistics


def by_pytorch_fid(rows: torch.Tensor) -> float:
    sample = rows.numpy()
    return float(
        calculate_frechet_distance(
            sample.mean(0), np.cov(sample, rowvar=False), np.zeros(DIMENSION), np.eye(DIMENSION)
        )
    )


def test_subsets_equal_pytorch_fid():
    rows = features(400, seed=0, offset=0.1)
    got = frechet_at(rows, normal_reference(), [200, 400], repeats=3, seed=5)
    assert got.shape == (2, 3)
    picks = [
        rng.numpy_generator(5, "frechet_subset", 200, repeat).choice(400, 200, replace=False)
        for repeat in range(3)
    ]
    assert got[0].tolist() == pytest.approx(
        [by_pytorch_fid(rows[pick]) for pick in picks], rel=1e-8
    )
    assert got[1].tolist() == pytest.approx(
        [by_pytorch_fid(rows)] * 3, rel=1e-8
    )  # all images, in any order


def test_fewer_images_score_worse_and_draws_are_keyed():
    rows, reference = features(800, seed=1), normal_reference()
    first = frechet_at(rows, reference, [100, 400, 800], repeats=2, seed=0)
    assert first.mean(dim=1).diff().max() < 0
    assert torch.equal(first, frechet_at(rows, reference, [100, 400, 800], repeats=2, seed=0))
    assert not torch.equal(first[:2], frechet_at(rows, reference, [100, 400], repeats=2, seed=1))


def test_a_straight_line_of_1_over_n_is_followed_to_its_end(monkeypatch):
    monkeypatch.setattr(
        fd_infinity, "frechet_from_features", lambda rows, reference: 3.0 + 70.0 / len(rows)
    )
    assert frechet_infinity(features(500, seed=2), normal_reference()) == pytest.approx(
        3.0, rel=1e-12
    )
    monkeypatch.setattr(
        fd_infinity, "frechet_from_features", lambda rows, reference: 3.0 + 70.0 / len(rows) ** 0.5
    )  # teeth: another law
    assert frechet_infinity(features(500, seed=2), normal_reference()) != pytest.approx(
        3.0, rel=0.1
    )


def test_the_smallest_subset_and_the_spacing(monkeypatch):
    counts = []
    monkeypatch.setattr(
        fd_infinity,
        "frechet_from_features",
        lambda rows, reference: counts.append(len(rows)) or 0.0,
    )
    frechet_infinity(features(500, seed=2), normal_reference(), points=4)
    frechet_infinity(features(500, seed=2), normal_reference(), points=3, smallest=100)
    assert counts == [50, 200, 350, 500, 100, 300, 500]


def test_infinity_is_nearer_to_the_truth_than_any_count():
    """Both sets N(0, I), so the truth is 0; over 8 draws, as the line's end has an error of its
    own.
    """
    reference, draws = normal_reference(), [features(1000, seed=10 + i) for i in range(8)]
    finite = np.mean([frechet_from_features(rows, reference) for rows in draws])
    infinite = np.mean([frechet_infinity(rows, reference) for rows in draws])
    assert finite > 0.01
    assert abs(infinite) < finite / 3


def test_bootstrap_standard_error_is_that_of_fresh_draws():
    reference = normal_reference()
    fresh = [
        frechet_from_features(features(500, seed=100 + i, offset=0.3), reference)
        for i in range(200)
    ]
    mean, error = bootstrap(features(500, seed=3, offset=0.3), reference, repeats=200, seed=0)
    assert error == pytest.approx(np.std(fresh, ddof=1), rel=0.25)
    assert mean > np.mean(fresh)  # resampling adds the bias of fewer images once more
    assert bootstrap(features(500, seed=3), reference, repeats=3, seed=1) == bootstrap(
        features(500, seed=3), reference, repeats=3, seed=1
    )


def test_bootstrap_without_replacement_is_noticed(monkeypatch):
    class Permuted:
        def integers(self, count, size):
            return np.random.default_rng(0).permutation(count)

    monkeypatch.setattr(rng, "numpy_generator", lambda *name: Permuted())
    _, error = bootstrap(features(500, seed=3, offset=0.3), normal_reference(), repeats=5, seed=0)
    assert error < 1e-10


def test_bad_input_is_refused():
    rows, reference = features(40, seed=4), normal_reference()
    with pytest.raises(
        DataError,
        match=r"subsets of \[20, 50\] images: every count must be from 2 to 40",
    ):
        frechet_at(rows, reference, [20, 50], repeats=1, seed=0)
    with pytest.raises(DataError, match="a line through 15 subsets of 40 to 40 images"):
        frechet_infinity(rows, reference, smallest=40)
    with pytest.raises(DataError, match="every count must be from 2"):
        frechet_infinity(rows[:15], reference)
    with pytest.raises(ValueError, match="take at least 2"):
        bootstrap(rows, reference, repeats=1, seed=0)
    with pytest.raises(ValueError, match="different extractors"):
        frechet_at(torch.zeros(40, 3), reference, [20], repeats=1, seed=0)
