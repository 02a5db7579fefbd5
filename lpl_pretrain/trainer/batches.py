"""Batches from plans: prefetch threads read latents and draw random numbers, and each batch is
copied to the device once.

    BatchPlanner.plan(step) -> MicrobatchPlan -> TrainBatch -> pinned -> on the device
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from contextlib import closing
from dataclasses import dataclass

import torch
from torch import Tensor

from lpl_pretrain.config.schema import TrainConfig
from lpl_pretrain.data.batch import LatentBatch
from lpl_pretrain.data.prefetch import prefetch_map
from lpl_pretrain.data.stream import LatentStream
from lpl_pretrain.losses.term import Draws
from lpl_pretrain.runtime import rng
from lpl_pretrain.trainer.batch_plan import MicrobatchPlan

STEPS_PLANNED_AHEAD = 4


@dataclass(frozen=True, slots=True)
class TrainBatch:
    """One microbatch: stored latents and conditions, and its random draws."""

    latents: LatentBatch
    draws: Draws

    def to(self, device: torch.device | str) -> TrainBatch:
        """Copy to `device` without waiting for it if the batch is pinned; moments become float32
        there.
        """
        draws = self.draws.map(lambda tensor: tensor.to(device, non_blocking=True))
        return TrainBatch(self.latents.to(device), draws)

    def pin_memory(self) -> TrainBatch:
        return self.map(Tensor.pin_memory)

    def map(self, function: Callable[[Tensor], Tensor]) -> TrainBatch:
        """A copy with `function` applied to every tensor."""
        return TrainBatch(self.latents.map(function), self.draws.map(function))


@dataclass(frozen=True, slots=True)
class BatchReader:
    """Builds the batches of a run; thread-safe."""

    config: TrainConfig
    stream: LatentStream
    lpl_per_microbatch: int
    """Samples of a microbatch that LPL decodes."""

    def read(self, plan: MicrobatchPlan) -> TrainBatch:
        """Read the latents of a plan and make its draws.  Raises DataError."""
        latents = self.stream.read(plan.sample_indices)
        return TrainBatch(latents, self.draw(plan, latents))

    def draw(self, plan: MicrobatchPlan, latents: LatentBatch) -> Draws:
        """Random draws of a microbatch, keyed by (seed, purpose, sample index)."""
        seed = self.config.seed
        conditioning = self.config.conditioning
        indices = plan.sample_indices
        shape = (latents.moments.shape[1] // 2, *latents.moments.shape[2:])
        posterior_noise = None
        if self.config.data.posterior == "sample":
            posterior_noise = rng.normal(seed, "posterior", indices, shape)
        text_dropped = None
        if conditioning.text_encoders:
            text_dropped = rng.uniform(seed, "text_dropout", indices) < conditioning.text_dropout
        crop_positions = None
        if self.config.lpl is not None and self.config.lpl.crop is not None:
            decoded = indices[: self.lpl_per_microbatch]
            rows = rng.uniform(seed, "lpl_crop_row", decoded)
            columns = rng.uniform(seed, "lpl_crop_column", decoded)
            crop_positions = torch.stack([rows, columns], dim=1)
        return Draws(
            indices,
            plan.t,
            rng.normal(seed, "noise", indices, shape),
            rng.uniform(seed, "label_dropout", indices) < conditioning.label_dropout,
            posterior_noise=posterior_noise,
            text_dropped=text_dropped,
            num_lpl=plan.num_lpl,
            crop_positions=crop_positions,
        )

    def prefetch(
        self,
        plan_step: Callable[[int], list[MicrobatchPlan]],
        steps: Iterable[int],
        device: torch.device,
    ) -> Generator[TrainBatch, None, None]:
        """Batches of `steps` in order, on `device`; planned, read and drawn ahead of the consumer.

        `plan_step(step)`: this rank's microbatches of an update.  Closing the iterator joins the
        threads.
        """
        return self.stream.prefetch_with(self.read, _plans(plan_step, steps), device)


def _plans(
    plan_step: Callable[[int], list[MicrobatchPlan]], steps: Iterable[int]
) -> Generator[MicrobatchPlan, None, None]:
    """Plans of all microbatches, made on a thread of their own."""
    planned = prefetch_map(plan_step, steps, threads=1, buffer_size=STEPS_PLANNED_AHEAD)
    with closing(planned):
        for plans in planned:
            yield from plans
