"""Who trains on what: which samples at which noise levels make up a step, and which rank takes them
in which microbatch.

The first is a function of (seed, step) alone.  The second sorts the global batch by noise level and
deals it out like cards to the slots (microbatch, rank), so that every slot holds the same number of
samples for LPL (to within one), and holds them FIRST: LPL runs on a fixed prefix of each
microbatch, on every rank alike.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lpl_pretrain.config.schema import TimestepConfig
from lpl_pretrain.diffusion.schedule import Schedule
from lpl_pretrain.diffusion.timesteps import quantile, stratify
from lpl_pretrain.runtime import rng


@dataclass(frozen=True, slots=True)
class MicrobatchPlan:
    """What one rank trains on in one microbatch."""

    sample_indices: list[int]  # global sample indices
    t: Tensor  # (micro_batch_size,) float32
    chosen: int  # the first so many are for LPL, if the gate passes them


@dataclass(frozen=True, slots=True)
class LPLSubset:
    """How many of a global batch LPL looks at: `chosen` at random of the `candidates` that a gate
    can pass.
    """

    candidates: int
    chosen: int

    @classmethod
    def of(cls, global_batch_size: int, gate_share: float, sample_fraction: float) -> LPLSubset:
        candidates = math.ceil(global_batch_size * gate_share)
        return cls(candidates, max(1, math.ceil(candidates * sample_fraction)))

    @property
    def inclusion(self) -> float:
        """The probability of each candidate to be chosen; its inverse keeps the sum unbiased."""
        return self.chosen / self.candidates

    def prefix(self, slots: int) -> int:
        """Samples of each hand that go through the decoder: the same number everywhere, the last
        may be padding.
        """
        return math.ceil(self.chosen / slots)


@dataclass(frozen=True, slots=True)
class BatchPlanner:
    seed: int
    global_batch_size: int
    timesteps: TimestepConfig
    schedule: Schedule
    choice: LPLSubset = LPLSubset(0, 0)  # no LPL

    def deal(self, step: int, slots: int) -> list[MicrobatchPlan]:
        """The hands of one step, one per slot; `slots` divides the global batch."""
        size = self.global_batch_size
        draw = rng.numpy_generator(self.seed, "timesteps", step)
        u = stratify(torch.from_numpy(draw.random(size)), torch.from_numpy(draw.permutation(size)))
        t = self.schedule.place(quantile(self.timesteps, u).float())
        order = self._chosen_first(torch.argsort(u), step)
        return [
            MicrobatchPlan(
                (step * size + order[slot::slots]).tolist(),
                t[order[slot::slots]],
                chosen=len(range(slot, self.choice.chosen, slots)),
            )
            for slot in range(slots)
        ]

    def _chosen_first(self, order: Tensor, step: int) -> Tensor:
        """Systematic sampling: every candidate has the same chance, and those that are chosen cover
        the noise levels evenly.
        """
        candidates, chosen = self.choice.candidates, self.choice.chosen
        if chosen == candidates:
            return order
        offset = rng.numpy_generator(self.seed, "lpl_samples", step).random()
        picked = torch.tensor(
            [min(int((i + offset) * candidates / chosen), candidates - 1) for i in range(chosen)]
        )
        rest = torch.ones(len(order), dtype=torch.bool)
        rest[picked] = False
        return torch.cat([order[picked], order[rest]])
