"""How fast an exponential moving average forgets: pure functions of the step."""

from __future__ import annotations


def decay_at(step: int, decay: float, warmup: bool) -> float:
    """Share of the average that survives update number `step` (1 is the first).

    With warm-up it is min(decay, (1 + step) / (10 + step)), so that the initial weights are forgotten within the first updates.
    """
    return min(decay, (1 + step) / (10 + step)) if warmup else decay
