"""The Inception Score (arXiv 1606.03498, section 4), in float64: exp of the mean KL(p(y|x) ||
p(y)).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lpl_pretrain.evaluation.kid_cmmd import checked
from lpl_pretrain.runtime import rng


def inception_score(
    logits: Tensor, *, splits: int = 10, seed: int | None = 0
) -> tuple[float, float]:
    """Mean and standard deviation over `splits` equal parts of logits (N, classes).

    The order is shuffled, so that no part holds neighbouring classes; `seed` None keeps it.
    """
    logits = checked(logits, at_least=splits)
    if seed is not None:
        logits = logits[
            torch.from_numpy(rng.numpy_generator(seed, "inception_score").permutation(len(logits)))
        ]
    bounds = [i * len(logits) // splits for i in range(splits + 1)]
    scores = torch.stack(
        [score(logits[low:high]) for low, high in zip(bounds, bounds[1:], strict=False)]
    )
    return scores.mean().item(), scores.std(correction=0).item()


def score(logits: Tensor) -> Tensor:
    log_p = logits.log_softmax(dim=1)
    log_marginal = log_p.logsumexp(dim=0) - math.log(len(log_p))
    return (log_p.exp() * (log_p - log_marginal)).sum(dim=1).mean().exp()
