"""One optimizer update: from the latents of a step to both losses, one backward per microbatch, and
the strategy's step.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lpl_pretrain.config.schema import TrainConfig
from lpl_pretrain.data.batch import LatentBatch
from lpl_pretrain.diffusion.learned_sigma import variational_bound
from lpl_pretrain.diffusion.objective import Denoising, denoise
from lpl_pretrain.diffusion.schedule import DiscreteSchedule, Schedule
from lpl_pretrain.diffusion.weighting import loss_weight
from lpl_pretrain.losses.lpl.gate import gate_weights
from lpl_pretrain.losses.lpl.lpl import LatentPerceptualLoss, PerceptualTerm
from lpl_pretrain.losses.lpl.weight import LPLWeight
from lpl_pretrain.models.autoencoder import LatentScaling, sample_posterior
from lpl_pretrain.models.conditioning import TextConditioner, class_conditioning, known_sizes
from lpl_pretrain.parallel.strategy import Strategy
from lpl_pretrain.runtime import rng
from lpl_pretrain.runtime.dist import mean_over_ranks
from lpl_pretrain.runtime.timer import Clock
from lpl_pretrain.trainer.batch_plan import MicrobatchPlan
from lpl_pretrain.trainer.lr import learning_rate
from lpl_pretrain.trainer.metrics import Meter
from lpl_pretrain.trainer.nonfinite import NonFiniteGuard
from lpl_pretrain.trainer.spikes import Spike, SpikeGuard


@dataclass(frozen=True, slots=True)
class Perceptual:
    """The LPL half of a step."""

    loss: LatentPerceptualLoss
    weight: LPLWeight
    threshold: float  # largest noise level inside the gate
    # samples of each microbatch that go through the decoder: those that were chosen, and perhaps
    # one as padding
    prefix: int
    inclusion: float  # probability of a sample that the gate passes to be chosen
    flops: float  # of one decoded sample
    seen: LPLSnapshot


@dataclass(slots=True)
class LPLSnapshot:
    """What LPL compared last on this rank, for pictures."""

    z0: Tensor | None = None  # (K, C, H, W)
    z0_hat: Tensor | None = None
    noise_level: Tensor | None = None  # (K,)
    weights: Tensor | None = None  # (K,) 0 where the gate was shut


@dataclass(frozen=True, slots=True)
class UpdateResult:
    """Of one update; the same on all ranks."""

    left_out: str | None  # why nothing was changed: something was not finite
    grad_norm: float  # before clipping; NaN if it was not finite
    weight_frozen: bool  # LPL's weight was found in this update
    spike: Spike | None = None  # why nothing was changed, if the gradient was finite


@dataclass(frozen=True, slots=True)
class Updater:
    config: TrainConfig
    denoiser: torch.nn.Module  # as the strategy returned it
    num_classes: int
    text: TextConditioner | None
    strategy: Strategy
    schedule: Schedule
    scaling: LatentScaling
    perceptual: Perceptual | None
    health: NonFiniteGuard
    device: torch.device
    spikes: SpikeGuard | None = None  # with optimizer.on_spike=ignore

    def update(
        self,
        step: int,
        hands: list[MicrobatchPlan],
        batches: list[LatentBatch],
        meter: Meter,
        clock: Clock,
    ) -> UpdateResult:
        """Collective. Makes update number `step` (from 0), or leaves it out on all ranks."""
        means, losses = [], []
        for microbatch, (hand, batch) in enumerate(zip(hands, batches, strict=True)):
            with clock.device("forward"):
                seen, diffusion = self._diffusion(hand, batch.to(self.device), meter)
            loss, lpl, by_sample = diffusion, torch.zeros_like(diffusion), seen.loss.detach()
            if self.perceptual is not None and self.perceptual.weight.active(step):
                with clock.device("lpl"):
                    term = self._lpl(self.perceptual, hand, seen, meter)
                decoded, lpl = len(term.loss), term.loss.sum() / len(hand.t)
                # d/dz0_hat of lpl is known already: this inner product, of value 0, carries it into
                # the denoiser's one backward
                carrier = (term.gradient * seen.z0_hat[:decoded]).sum() / len(hand.t)
                loss = diffusion + self.perceptual.weight.value(step) * (
                    lpl + carrier - carrier.detach()
                )
                by_sample = torch.cat([by_sample[:decoded] + term.loss, by_sample[decoded:]])
                meter.add("loss/lpl", lpl)
            meter.add("loss/total", loss)
            with clock.device("backward"):
                self.strategy.backward(loss, microbatch=microbatch, of=len(hands))
            if self.spikes is not None:
                self.spikes.observe(seen.noise_level, seen.loss.detach())
            means.append(torch.stack([diffusion.detach(), lpl.detach()]))
            losses.append(by_sample)
        with clock.device("optimizer"):
            lr = learning_rate(self.config.optimizer, step, self.config.steps)
            check, most = None, self.config.optimizer.max_grad_norm
            if self.spikes is not None:
                check = self.spikes.check(with_lpl=self._with_lpl(step))
            report = self.strategy.step(lr=lr, max_grad_norm=most, check=check)
        meter.end_update(applied=report.applied)
        samples, spike, left_out = [hand.sample_indices for hand in hands], None, None
        if self.spikes is not None:
            locations = [location for batch in batches for location in batch.locations]
            spike = self.spikes.judge(step, report, sum(samples, []), locations)
        if spike is None:
            left_out = self.health.judge(step, report, samples, losses)
        frozen = report.applied and self._calibrate(step, torch.stack(means).mean(dim=0))
        return UpdateResult(left_out, report.grad_norm, frozen, spike)

    def _with_lpl(self, step: int) -> bool:
        return self.perceptual is not None and self.perceptual.weight.value(step) > 0

    def _diffusion(
        self, hand: MicrobatchPlan, batch: LatentBatch, meter: Meter
    ) -> tuple[Denoising, Tensor]:
        """What the denoiser made of one microbatch, and its mean diffusion loss.  Every draw is
        keyed by its sample's index.
        """
        config, ids = self.config, hand.sample_indices
        latent_shape = (batch.moments.shape[1] // 2, *batch.moments.shape[2:])
        posterior_noise = (
            rng.normal(config.seed, "posterior", ids, latent_shape).to(self.device)
            if config.data.posterior == "sample"
            else None
        )
        wide = self.strategy.precision.master  # float32, or float64 in parity tests
        z0 = self.scaling.normalize(sample_posterior(batch.moments, posterior_noise)).to(wide)
        eps = rng.normal(config.seed, "noise", ids, latent_shape).to(self.device, wide)
        dropped = (
            rng.uniform(config.seed, "label_dropout", ids).to(self.device)
            < config.conditioning.label_dropout
        )
        cond = class_conditioning(batch.labels, self.num_classes, dropped)
        if self.text is not None:
            bare = (
                rng.uniform(config.seed, "text_dropout", ids).to(self.device)
                < config.conditioning.text_dropout
            )
            text, pooled = self.text(batch.text, bare, batch.captions)
            cond = replace(cond, text=text, pooled=pooled, sizes=known_sizes(batch.sizes))
        t = hand.t.to(self.device)
        seen = denoise(
            self.denoiser,
            config.diffusion.prediction,
            z0,
            eps,
            t,
            *self.schedule.coefficients(t),
            cond,
        )
        diffusion = (
            loss_weight(config.diffusion.weighting, config.diffusion.prediction, seen.noise_level)
            * seen.loss
        ).mean()
        if seen.spread is not None:
            assert isinstance(self.schedule, DiscreteSchedule)
            bound = variational_bound(self.schedule, t, seen).mean()
            meter.add("loss/variational_bound", bound)
            diffusion = diffusion + bound
        meter.add("loss/diffusion", diffusion)
        return seen, diffusion

    def _lpl(
        self, perceptual: Perceptual, hand: MicrobatchPlan, seen: Denoising, meter: Meter
    ) -> PerceptualTerm:
        """LPL of the microbatch's prefix, which holds every sample that was chosen; no tensor is
        looked at on the host.
        """
        first, config = slice(perceptual.prefix), self.config
        ids, lpl = hand.sample_indices[first], perceptual.loss.config
        z0, z0_hat, noise_level = seen.z0[first], seen.z0_hat[first], seen.noise_level[first]
        weights = gate_weights(
            noise_level, perceptual.threshold, lpl.noise_weighting, config.diffusion.prediction
        )
        weights[hand.chosen :] = 0.0
        places = None
        if lpl.crop is not None:
            drawn = [
                rng.uniform(config.seed, purpose, ids)
                for purpose in ("lpl_crop_row", "lpl_crop_column")
            ]
            places = torch.stack(drawn, dim=1).to(self.device)
        term = perceptual.loss(z0, z0_hat, weights / perceptual.inclusion, places)
        if hand.chosen:  # the last microbatches of every step may hold padding alone
            perceptual.seen.z0, perceptual.seen.z0_hat = z0, z0_hat.detach()
            perceptual.seen.noise_level, perceptual.seen.weights = noise_level, weights
        meter.add("lpl/gated_share", (seen.noise_level <= perceptual.threshold).float())
        for name, stage in term.stages.items():
            meter.add(f"lpl/stage/{name}/contribution", stage.contribution, weights > 0)
            meter.add(f"lpl/stage/{name}/keep_fraction", stage.keep_fraction, weights > 0)
            meter.add(f"lpl/stage/{name}/std_ratio", stage.std_ratio, weights > 0)
        return term

    def _calibrate(self, step: int, means: Tensor) -> bool:
        """Collective while LPL's weight is being measured."""
        if self.perceptual is None or not self.perceptual.weight.calibrating(step):
            return False
        return self.perceptual.weight.observe(step, mean_over_ranks(means.double()))
