"""Who trains on what: which samples at which noise levels make up a step, and which rank takes them in which microbatch.

The first is a function of (seed, step) alone.  The second sorts the global batch by noise level and deals it out like
cards to the slots (microbatch, rank), so that every slot holds the same number of samples inside the LPL gate (to within
one), and holds them FIRST: LPL runs on a fixed prefix of each microbatch, on every rank alike.
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
class Hand:
    """What one rank trains on in one microbatch; noise grows along it."""

    sample_indices: list[int]  # global sample indices
    t: Tensor  # (micro_batch_size,) float32


@dataclass(frozen=True, slots=True)
class Dealer:
    seed: int
    global_batch_size: int
    timesteps: TimestepConfig
    schedule: Schedule

    def deal(self, step: int, slots: int) -> list[Hand]:
        """The hands of one step, one per slot; `slots` divides the global batch."""
        size = self.global_batch_size
        draw = rng.numpy_generator(self.seed, "timesteps", step)
        u = stratify(torch.from_numpy(draw.random(size)), torch.from_numpy(draw.permutation(size)))
        t = self.schedule.place(quantile(self.timesteps, u).float())
        order = torch.argsort(u)
        return [Hand((step * size + order[slot::slots]).tolist(), t[order[slot::slots]]) for slot in range(slots)]

    def gated_prefix(self, share: float, slots: int) -> int:
        """Samples of each hand that can be inside a gate which passes `share` of the noise levels."""
        return math.ceil(math.ceil(self.global_batch_size * share) / slots)
