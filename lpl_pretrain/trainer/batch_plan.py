"""Plans of updates: which samples at which timesteps, in which microbatch of which rank.

`BatchPlanner.plan` draws t for the global batch, sorts it by noise level and assigns samples
round-robin to (microbatch, rank), so that every microbatch has the same number of LPL samples
(+-1), placed first.  Samples and timesteps are a function of (seed, step) alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lpl_pretrain.config.schema import TimestepConfig
from lpl_pretrain.diffusion.schedule import Schedule
from lpl_pretrain.diffusion.timesteps import quantile, stratify
from lpl_pretrain.losses.lpl.subset import LPLSubset
from lpl_pretrain.runtime import rng


@dataclass(frozen=True, slots=True)
class MicrobatchPlan:
    """One microbatch of one rank."""

    sample_indices: list[int]
    """Global sample indices."""
    t: Tensor
    """(micro_batch_size,) float32 in [0, 1]."""
    num_lpl: int
    """The first `num_lpl` samples are those that LPL may count."""


@dataclass(frozen=True, slots=True)
class BatchPlanner:
    """Plans the updates of a run.  The rule for LPL's samples: losses/lpl/subset.py."""

    seed: int
    global_batch_size: int
    timesteps: TimestepConfig
    schedule: Schedule
    subset: LPLSubset = LPLSubset(0, 0)
    """Without LPL: no samples."""

    def plan(self, step: int, num_microbatches: int) -> list[MicrobatchPlan]:
        """Plan update number `step` (from 0): microbatch m of rank r is element
        m * world_size + r.

        `num_microbatches`: over all ranks; it divides the global batch.
        """
        size = self.global_batch_size
        generator = rng.numpy_generator(self.seed, "timesteps", step)
        jitter = torch.from_numpy(generator.random(size))
        u = stratify(jitter, torch.from_numpy(generator.permutation(size)))
        t = self.schedule.snap(quantile(self.timesteps, u).float())
        order = self._lpl_first(torch.argsort(u), step)
        plans = []
        for microbatch in range(num_microbatches):
            positions = order[microbatch::num_microbatches]
            num_lpl = len(range(microbatch, self.subset.num_lpl, num_microbatches))
            plans.append(MicrobatchPlan((step * size + positions).tolist(), t[positions], num_lpl))
        return plans

    def _lpl_first(self, order: Tensor, step: int) -> Tensor:
        """Move LPL's samples to the front of `order`, which is sorted by noise level.

        Systematic sampling: every gated sample has the same chance, and those that are taken cover
        the noise levels evenly.
        """
        num_gated = self.subset.num_gated
        num_lpl = self.subset.num_lpl
        if num_lpl == num_gated:
            return order
        offset = rng.numpy_generator(self.seed, "lpl_samples", step).random()
        taken = torch.tensor(
            [min(int((i + offset) * num_gated / num_lpl), num_gated - 1) for i in range(num_lpl)]
        )
        rest = torch.ones(len(order), dtype=torch.bool)
        rest[taken] = False
        return torch.cat([order[taken], order[rest]])
