"""The samples of a global batch that LPL is computed on."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class LPLSubset:
    """Numbers of samples of a global batch that LPL is computed on.  The whole rule:

    1. The gate passes samples whose noise level sigma_t / alpha_t is at most a threshold
       (losses/lpl/gate.py).  Timesteps are stratified, so at most `num_gated` =
       ceil(B * gate fraction) samples of a global batch of B can pass: those with the smallest t.
    2. Of these, `num_lpl` = ceil(num_gated * lpl.sample_fraction) are taken by systematic sampling
       over the sorted t: each with the same `inclusion_probability`, spread evenly over the noise
       levels (trainer/batch_plan.py).  Their losses are divided by that probability, which keeps
       the sum over the batch unbiased.
    3. The batch is sorted: the LPL samples first, then the rest, each by noise level.  Samples are
       assigned round-robin to the (microbatch, rank) pairs, so every microbatch has the same number
       of LPL samples (+-1), placed first.
    4. Every microbatch decodes its first `per_microbatch` samples.  That number is the same on all
       ranks, so shapes and collectives agree; where the last of them is no LPL sample, or where the
       gate does not pass a sample after all, its weight is 0: it is decoded and does not count.
    """

    num_gated: int
    num_lpl: int

    @classmethod
    def of(cls, global_batch_size: int, gate_fraction: float, sample_fraction: float) -> LPLSubset:
        """Apply rules 1 and 2 to a configuration; both fractions lie in (0, 1]."""
        num_gated = math.ceil(global_batch_size * gate_fraction)
        return cls(num_gated, max(1, math.ceil(num_gated * sample_fraction)))

    @property
    def inclusion_probability(self) -> float:
        """Probability that a gated sample is one of LPL's samples."""
        return self.num_lpl / self.num_gated

    def per_microbatch(self, num_microbatches: int) -> int:
        """Samples that each of `num_microbatches` microbatches (over all ranks) decodes."""
        return math.ceil(self.num_lpl / num_microbatches)
