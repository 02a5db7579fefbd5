"""The Inception Score against torch-fidelity and closed forms."""

from __future__ import annotations

import pytest
import torch
from torch_fidelity.metric_isc import isc_features_to_metric

from lpl_pretrain.errors import DataError
from lpl_pretrain.evaluation import inception_score as module
from lpl_pretrain.evaluation.inception_score import inception_score


def logits(count: int, classes: int, seed: int = 0) -> torch.Tensor:
    return 3 * torch.randn(count, classes, generator=torch.Generator().manual_seed(seed))


def of_torch_fidelity(rows: torch.Tensor, splits: int) -> tuple[float, float]:
    metric = isc_features_to_metric(rows, splits=splits, shuffle=False)
    return metric["inception_score_mean"], metric["inception_score_std"]


@pytest.mark.parametrize(
    "count, classes, splits", [(300, 10, 10), (307, 10, 10), (2000, 64, 10), (50, 5, 1)]
)
def test_equals_torch_fidelity(count, classes, splits):
    rows = logits(count, classes)
    assert inception_score(rows, splits=splits, seed=None) == pytest.approx(
        of_torch_fidelity(rows, splits), rel=1e-9
    )


@pytest.mark.parametrize("broken", ["log_of_mean_logits", "reversed"])
def test_has_teeth(broken, monkeypatch):
    """The marginal as a mean of log-probabilities; KL(p(y) || p(y|x))."""
    rows = logits(300, 10)
    wanted = of_torch_fidelity(rows, 10)

    def wrong(part: torch.Tensor) -> torch.Tensor:
        log_p = part.log_softmax(dim=1)
        if broken == "log_of_mean_logits":
            return (log_p.exp() * (log_p - log_p.mean(dim=0))).sum(dim=1).mean().exp()
        marginal = log_p.exp().mean(dim=0)
        return (marginal * (marginal.log() - log_p)).sum(dim=1).mean().exp()

    monkeypatch.setattr(module, "score", wrong)
    assert inception_score(rows, seed=None) != pytest.approx(wanted, rel=1e-2)


def test_closed_forms():
    certain = 1e4 * torch.eye(10).repeat(
        20, 1
    )  # 20 of each class, beyond doubt: probabilities of the others underflow to 0
    assert inception_score(certain, splits=5, seed=None) == pytest.approx((10.0, 0.0), abs=1e-9)
    assert inception_score(torch.zeros(200, 10)) == pytest.approx((1.0, 0.0), abs=1e-12)


def test_the_shuffle_is_keyed_and_mends_rows_sorted_by_class():
    rows = 1e4 * torch.eye(10).repeat_interleave(100, dim=0)
    assert inception_score(rows, seed=None)[0] == pytest.approx(1.0)  # every part holds one class
    assert inception_score(rows)[0] > 9.0
    assert (
        inception_score(rows, seed=3)
        == inception_score(rows, seed=3)
        != inception_score(rows, seed=4)
    )


def test_bad_input_is_refused():
    with pytest.raises(
        DataError, match="features of 9 images; this score needs at least 10: add images"
    ):
        inception_score(torch.zeros(9, 5))
    with pytest.raises(DataError, match="not finite"):
        inception_score(torch.full((20, 5), float("nan")))
