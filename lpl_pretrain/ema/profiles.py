"""Decay schedules of moving averages, and averages of any length reconstructed from stored ones.

Update number t (1 is the first) turns an average a into a + (1 - decay_t) (parameters - a).

Power-function averages (arXiv 2312.02696, section 3): decay_t = (1 - 1/t)^(gamma + 1).  Their
profile, the weight of the parameters after update i in the average after update t, is w(i) =
(i^(gamma+1) - (i-1)^(gamma+1)) / t^(gamma+1): it keeps its shape while it grows with t, and forgets
the initial weights at once.  `sigma_rel`, the standard deviation of that profile relative to t,
gives its length; 0.05 is short, 0.25 long.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np


def decay_at(step: int, decay: float, warmup: bool) -> float:
    """Fraction of the average that remains after update number `step` (1 is the first).

    With warm-up it is min(decay, (1 + step) / (10 + step)), so that the initial weights are
    forgotten within the first updates.
    """
    return min(decay, (1 + step) / (10 + step)) if warmup else decay


def power_decay_at(step: int, sigma_rel: float) -> float:
    """Decay of a power-function average at update number `step` (equation 4).

    The first update takes the parameters as they are.
    """
    return (1 - 1 / step) ** (gamma_of(sigma_rel) + 1)


def gamma_of(sigma_rel: float) -> float:
    """The exponent of the power-function profile with this relative standard deviation (appendix
    C.1).
    """
    assert 0 < sigma_rel < 12**-0.5, sigma_rel  # gamma = 0 is the flat average of everything
    roots = np.roots([1.0, 7.0, 16.0 - sigma_rel**-2, 12.0 - sigma_rel**-2])
    return float(roots.real.max())


def sigma_rel_of(gamma: float) -> float:
    """Relative standard deviation of the profile t^gamma on [0, 1] (equation 5)."""
    return math.sqrt(gamma + 1) / ((gamma + 2) * math.sqrt(gamma + 3))


def reconstruction(stored: Sequence[tuple[int, float]], wanted: tuple[int, float]) -> np.ndarray:
    """Coefficients that combine stored averages into another, by least squares between profiles
    (appendix C.3).

    `stored`: (step, sigma_rel) of each average; `wanted` likewise, at or before the last of them.
    The profiles are those of the discrete updates, summed exactly: a continuous profile is off by a
    few percent when there are few updates.
    """
    last = max(step for step, _ in [*stored, wanted])
    everything = [*stored, wanted]
    powers = [gamma_of(sigma_rel) + 1 for _, sigma_rel in everything]
    updates = np.arange(last + 1, dtype=np.float64) / last
    shapes = {power: np.diff(updates**power) for power in set(powers)}
    products = {(a, b): np.cumsum(shapes[a] * shapes[b]) for a in shapes for b in shapes}

    def overlap(i: int, j: int) -> float:
        """Inner product of the profiles of averages i and j over all updates."""
        (step_i, _), (step_j, _) = everything[i], everything[j]
        summed = products[powers[i], powers[j]][min(step_i, step_j) - 1]
        return float(summed * (last / step_i) ** powers[i] * (last / step_j) ** powers[j])

    count = len(stored)
    matrix = np.array([[overlap(i, j) for j in range(count)] for i in range(count)])
    target = np.array([overlap(i, count) for i in range(count)])
    # recent profiles are short and tall: equal norms keep the problem well conditioned
    scale = np.sqrt(np.diag(matrix))
    solved = np.linalg.lstsq(matrix / np.outer(scale, scale), target / scale, rcond=1e-12)[0]
    return solved / scale
