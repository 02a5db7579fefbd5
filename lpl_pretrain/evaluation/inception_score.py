"""Inception Score, exp of the mean KL(p(y|x) || p(y)), float64 (arXiv 1606.03498, section 4)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lpl_pretrain.config import metrics
from lpl_pretrain.evaluation.feature_checks import check_features
from lpl_pretrain.evaluation.metric import Estimate, MetricInputs, MetricSpec
from lpl_pretrain.runtime import rng


def inception_score(
    logits: Tensor, *, splits: int = 10, seed: int | None = 0
) -> tuple[float, float]:
    """Mean and standard deviation over `splits` equal parts of logits (N, classes).

    The images are shuffled first, so that no part holds neighbouring classes; `seed` None keeps
    their order.
    """
    logits = check_features(logits, at_least=splits)
    if seed is not None:
        order = rng.numpy_generator(seed, "inception_score").permutation(len(logits))
        logits = logits[torch.from_numpy(order)]
    bounds = [i * len(logits) // splits for i in range(splits + 1)]
    scores = torch.stack(
        [score(logits[low:high]) for low, high in zip(bounds, bounds[1:], strict=False)]
    )
    return scores.mean().item(), scores.std(correction=0).item()


def score(logits: Tensor) -> Tensor:
    """Inception Score of one part, a scalar."""
    log_p = logits.log_softmax(dim=1)
    log_marginal = log_p.logsumexp(dim=0) - math.log(len(log_p))
    return (log_p.exp() * (log_p - log_marginal)).sum(dim=1).mean().exp()


def _compute(inputs: MetricInputs) -> list[Estimate]:
    mean, std = inception_score(inputs.generated_features("logits"), seed=inputs.protocol.seed)
    return [Estimate(mean, std=std)]


INCEPTION_SCORE = MetricSpec(metrics.INCEPTION_SCORE, _compute)
