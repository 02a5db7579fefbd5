"""One optimizer update: loss terms and one backward per microbatch, then the strategy's step."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import reduce

import torch
from torch import Tensor

from lpl_pretrain.config.schema import TrainConfig
from lpl_pretrain.diffusion.objective import Denoising, denoise
from lpl_pretrain.diffusion.schedule import Schedule
from lpl_pretrain.losses.term import LossTerm
from lpl_pretrain.models.autoencoder import LatentScaling, sample_posterior
from lpl_pretrain.models.conditioning import (
    Conditioning,
    TextConditioner,
    class_conditioning,
    known_sizes,
)
from lpl_pretrain.parallel.strategy import Strategy, UpdateCheck
from lpl_pretrain.runtime.timer import Clock
from lpl_pretrain.trainer.batches import TrainBatch
from lpl_pretrain.trainer.lr import learning_rate
from lpl_pretrain.trainer.metrics import Meter
from lpl_pretrain.trainer.nonfinite import NonFiniteGuard, SkippedUpdate
from lpl_pretrain.trainer.spikes import Spike, SpikeGuard


@dataclass(frozen=True, slots=True)
class UpdateResult:
    """Result of one update, the same on all ranks."""

    grad_norm: Tensor
    """() float64 on the device: L2 norm before clipping; NaN if it was not finite."""
    spike: Spike | None = None
    """Reason why the update was rejected, if its gradient was finite."""
    calibrated: dict[str, float] = field(default_factory=dict)
    """Weights of loss terms whose calibration ended with this update."""


@dataclass(frozen=True, slots=True)
class Updater:
    config: TrainConfig
    denoiser: torch.nn.Module
    """The model as the strategy returned it."""
    num_classes: int
    text: TextConditioner | None
    strategy: Strategy
    schedule: Schedule
    scaling: LatentScaling
    terms: list[LossTerm]
    """The diffusion loss first."""
    nonfinite: NonFiniteGuard
    device: torch.device
    spikes: SpikeGuard | None = None
    """None with optimizer.on_spike=ignore."""

    def update(
        self, step: int, batches: Sequence[TrainBatch], meter: Meter, clock: Clock
    ) -> UpdateResult:
        """Collective. Make update number `step` (from 0), or skip it on all ranks alike.

        The host does not wait for the device (but for what DeepSpeed does, and to look for spikes);
        `skipped_updates` reads what was skipped.
        """
        terms = [term for term in self.terms if term.active(step)]
        calibrating = [term for term in terms if term.calibrating(step)]
        measured: dict[str, list[Tensor]] = {term.name: [] for term in calibrating}
        losses = []
        for microbatch, batch in enumerate(batches):
            with clock.device("forward"):
                out = self.denoise(batch, _hidden_blocks(terms))
            values = []
            for term in terms:
                with clock.device(term.name):
                    values.append(term(batch.draws, out, meter))
            weighted = [
                term.weight(step) * value.loss for term, value in zip(terms, values, strict=True)
            ]
            total = _sum(weighted)
            for term, value, summand in zip(terms, values, weighted, strict=True):
                meter.add(f"loss/{term.name}", value.loss)
                if term is not self.terms[0]:
                    meter.add(f"weighted/{term.name}", summand)
                if term in calibrating:
                    others = _sum([other for other in weighted if other is not summand])
                    measured[term.name].append(torch.stack([value.loss, others]).detach())
            meter.add("loss/total", total)
            with clock.device("backward"):
                self.strategy.backward(total, microbatch=microbatch, of=len(batches))
            if self.spikes is not None:
                self.spikes.observe(out.noise_level, out.mse.detach())
            losses.append(_sum([value.per_sample for value in values]))
        with clock.device("optimizer"):
            report = self.strategy.step(
                lr=learning_rate(self.config.optimizer, step, self.config.steps),
                max_grad_norm=self.config.optimizer.max_grad_norm,
                refuse=self.nonfinite.refuse,
                check=self._spike_check(step),
            )
        meter.end_update(applied=report.applied)
        sample_indices = [index for batch in batches for index in batch.draws.sample_indices]
        spike = None
        if self.spikes is not None:
            locations = [location for batch in batches for location in batch.latents.locations]
            spike = self.spikes.judge(step, report, sample_indices, locations)
        if spike is None:
            self.nonfinite.observe(step, report, sample_indices, torch.cat(losses))
        calibrated = {}
        for term in calibrating:
            means = torch.stack(measured[term.name]).mean(dim=0)
            own, others = torch.where(report.applied, means, 0.0)
            if (weight := term.calibrate(step, own, others)) is not None:
                calibrated[term.name] = weight
        return UpdateResult(report.grad_norm, spike, calibrated)

    def skipped_updates(self) -> list[SkippedUpdate]:
        """Collective. Updates skipped since the last call because something was not finite; waits
        for the device.  Raises NonFiniteError where the configuration wants to stop.
        """
        return self.nonfinite.check()

    def denoise(self, batch: TrainBatch, hidden_blocks: tuple[int, ...] = ()) -> Denoising:
        """Noise the latents of a microbatch and run the denoiser on them."""
        draws = batch.draws
        dtype = self.strategy.precision.master  # float32, or float64 in parity tests
        posterior = sample_posterior(batch.latents.moments, draws.posterior_noise)
        return denoise(
            self.denoiser,
            self.config.diffusion.prediction,
            self.scaling.normalize(posterior).to(dtype),
            draws.eps.to(dtype),
            draws.t,
            *self.schedule.coefficients(draws.t),
            self._condition(batch),
            hidden_blocks,
        )

    def _condition(self, batch: TrainBatch) -> Conditioning:
        latents, draws = batch.latents, batch.draws
        cond = class_conditioning(latents.labels, self.num_classes, draws.label_dropped)
        if self.text is None:
            return cond
        assert draws.text_dropped is not None
        text, pooled = self.text(latents.text, draws.text_dropped, latents.captions)
        return replace(cond, text=text, pooled=pooled, sizes=known_sizes(latents.sizes))

    def _spike_check(self, step: int) -> UpdateCheck | None:
        if self.spikes is None:
            return None
        return self.spikes.check(
            terms=[term.name for term in self.terms if term.active(step) and term.weight(step) > 0]
        )


def _hidden_blocks(terms: list[LossTerm]) -> tuple[int, ...]:
    """Blocks of the denoiser whose outputs `terms` read, each once, ascending."""
    return tuple(sorted({block for term in terms for block in term.needs_hidden}))


def _sum(values: list[Tensor]) -> Tensor:
    """Sum in order; torch.stack(...).sum() would round differently."""
    return reduce(operator.add, values)
