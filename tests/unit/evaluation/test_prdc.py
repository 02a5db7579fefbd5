"""Precision and recall against torch-fidelity; density and coverage against a brute force over full
distance matrices.
"""

from __future__ import annotations

import pytest
import torch
from torch_fidelity.metric_prc import prc_features_to_metric

from lpl_pretrain.errors import DataError
from lpl_pretrain.evaluation import prdc
from lpl_pretrain.evaluation.prdc import density_coverage, precision_recall


def features(
    count: int, dimension: int, seed: int, *, spread: float = 1.0, offset: float = 0.0
) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return spread * torch.randn(count, dimension, generator=generator, dtype=torch.float64) + offset


CASES = {
    "like": (features(300, 8, seed=0), features(250, 8, seed=1)),
    "narrow": (features(200, 8, seed=2, spread=0.7, offset=0.2), features(300, 8, seed=3)),
    "far": (features(300, 6, seed=4, offset=1000.0), features(300, 6, seed=5, offset=1000.3)),
    "two_chunks": (features(600, 16, seed=6, spread=0.9), features(700, 16, seed=7)),
}


def precision_recall_of_torch_fidelity(
    generated: torch.Tensor, real: torch.Tensor, k: int
) -> tuple[float, float]:
    metric = prc_features_to_metric(generated, real, prc_neighborhood=k, verbose=False)
    return metric["precision"], metric["recall"]


def brute_force(generated: torch.Tensor, real: torch.Tensor, k: int) -> tuple[float, float]:
    """arXiv 2002.09797 by loops: the k-th smallest of an image's distances to the others; strictly
    inside.
    """
    density = covered = 0.0
    for i, centre in enumerate(real):
        others = torch.cat([real[:i], real[i + 1 :]])
        radius = (others - centre).square().sum(dim=1).sqrt().sort().values[k - 1]
        inside = int(((generated - centre).square().sum(dim=1).sqrt() < radius).sum())
        density, covered = density + inside, covered + (inside > 0)
    return density / (k * len(generated)), covered / len(real)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("k", [1, 3])
def test_precision_and_recall_equal_torch_fidelity(case, k):
    generated, real = CASES[case]
    wanted = precision_recall_of_torch_fidelity(generated, real, k)
    assert precision_recall(generated, real, k) == pytest.approx(
        wanted, rel=1e-6
    )  # torch-fidelity's means are float32
    assert precision_recall(real, generated, k) == pytest.approx(wanted[::-1], rel=1e-6)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("k", [1, 5])
def test_density_and_coverage_equal_a_brute_force(case, k):
    generated, real = CASES[case]
    assert density_coverage(generated, real, k) == brute_force(generated, real, k)


def test_two_thousand_images():
    generated, real = features(2000, 64, seed=8, spread=0.95), features(2000, 64, seed=9)
    assert precision_recall(generated, real) == pytest.approx(
        precision_recall_of_torch_fidelity(generated, real, 3), rel=1e-6
    )
    assert density_coverage(generated, real) == brute_force(generated, real, 5)


@pytest.mark.parametrize(
    "broken", ["self_is_a_neighbour", "first_chunk_only", "half_the_cross_term"]
)
def test_has_teeth(broken, monkeypatch):
    """Every image its own first neighbour; the diagonal of later chunks missed; |x|^2 + |y|^2 -
    x.y.
    """
    generated, real = CASES["two_chunks"]
    wanted = precision_recall_of_torch_fidelity(generated, real, 3), brute_force(generated, real, 5)
    without_self, cross = prdc.without_self, prdc.squared_distances
    if broken == "self_is_a_neighbour":
        monkeypatch.setattr(prdc, "without_self", lambda distances, start: distances)
    elif broken == "first_chunk_only":
        monkeypatch.setattr(
            prdc, "without_self", lambda distances, start: without_self(distances, 0)
        )
    else:
        monkeypatch.setattr(prdc, "squared_distances", lambda a, b: cross(a, b) + a @ b.T)
    assert precision_recall(generated, real, 3) != pytest.approx(wanted[0], rel=1e-4)
    assert density_coverage(generated, real, 5) != wanted[1]


def test_chunks_change_nothing(monkeypatch):
    generated, real = CASES["narrow"]
    whole = precision_recall(generated, real), density_coverage(generated, real)
    monkeypatch.setattr(prdc, "CHUNK", 70)
    assert (precision_recall(generated, real), density_coverage(generated, real)) == whole


def test_a_set_covers_itself():
    rows = CASES["like"][0]
    assert precision_recall(rows, rows) == (1.0, 1.0)
    assert density_coverage(rows, rows) == (1.0, 1.0)  # each ball holds its centre and k - 1 others
    assert precision_recall(rows, rows + 100) == (0.0, 0.0)
    assert density_coverage(rows, rows + 100) == (0.0, 0.0)


def test_far_generated_images_raise_recall_and_not_coverage():
    """Coverage resists outliers: the balls of two far generated images contain all real images."""
    real, far = CASES["like"][1], torch.full((1, 8), 50.0, dtype=torch.float64)
    generated = torch.cat([features(2, 8, seed=10, spread=0.01), far, -far])
    assert precision_recall(generated, real)[1] == 1.0
    assert density_coverage(generated, real, k=3)[1] < 0.5


@pytest.mark.parametrize("score", [precision_recall, density_coverage])
def test_bad_input_is_refused(score):
    with pytest.raises(
        ValueError, match="5 and 6 features an image: take both sets from one extractor"
    ):
        score(torch.zeros(9, 5), torch.zeros(9, 6))
    with pytest.raises(
        DataError, match="features of 4 images; this score needs at least 5: add images"
    ):
        score(torch.zeros(9, 5), torch.zeros(4, 5), k=4)
    with pytest.raises(ValueError, match="k is 0"):
        score(torch.zeros(9, 5), torch.zeros(9, 5), k=0)
    with pytest.raises(DataError, match="not finite"):
        score(torch.full((9, 5), float("nan")), torch.zeros(9, 5))
