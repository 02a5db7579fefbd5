"""One optimizer update: from the latents of a step to both losses, one backward per microbatch, and the strategy's step."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lpl_pretrain.config.schema import TrainConfig
from lpl_pretrain.data.batch import LatentBatch
from lpl_pretrain.diffusion.objective import Denoising, denoise
from lpl_pretrain.diffusion.schedule import Schedule
from lpl_pretrain.diffusion.weighting import loss_weight
from lpl_pretrain.models.autoencoder import LatentScaling, sample_posterior
from lpl_pretrain.models.conditioning import class_conditioning
from lpl_pretrain.parallel.strategy import StepReport, Strategy
from lpl_pretrain.perceptual.gate import gate_weights
from lpl_pretrain.perceptual.lpl import LatentPerceptualLoss, PerceptualTerm
from lpl_pretrain.perceptual.weight import LPLWeight
from lpl_pretrain.runtime import rng
from lpl_pretrain.runtime.dist import mean_over_ranks
from lpl_pretrain.runtime.timer import DeviceTimer
from lpl_pretrain.trainer.deal import Hand
from lpl_pretrain.trainer.lr import learning_rate
from lpl_pretrain.trainer.metrics import Meter


@dataclass(frozen=True, slots=True)
class Perceptual:
    """The LPL half of a step."""

    loss: LatentPerceptualLoss
    weight: LPLWeight
    threshold: float  # largest noise level inside the gate
    prefix: int  # samples of each microbatch that go through the decoder: those that were chosen, and perhaps one as padding
    inclusion: float  # probability of a sample that the gate passes to be chosen
    timer: DeviceTimer
    seen: LastSeen


@dataclass(slots=True)
class LastSeen:
    """What LPL compared last on this rank, for pictures."""

    z0: Tensor | None = None  # (K, C, H, W)
    z0_hat: Tensor | None = None
    noise_level: Tensor | None = None  # (K,)
    weights: Tensor | None = None  # (K,) 0 where the gate was shut


@dataclass(frozen=True, slots=True)
class Updater:
    config: TrainConfig
    denoiser: torch.nn.Module  # as the strategy returned it
    num_classes: int
    strategy: Strategy
    schedule: Schedule
    scaling: LatentScaling
    perceptual: Perceptual | None
    device: torch.device

    def update(self, step: int, hands: list[Hand], batches: list[LatentBatch], meter: Meter) -> tuple[StepReport, bool]:
        """Collective. Applies update number `step` (from 0); the bool says that LPL's weight was frozen in it."""
        means = []
        for microbatch, (hand, batch) in enumerate(zip(hands, batches, strict=True)):
            seen, diffusion = self._diffusion(hand, batch.to(self.device), meter)
            loss, lpl, weight = diffusion, torch.zeros_like(diffusion), 0.0
            if self.perceptual is not None and self.perceptual.weight.active(step):
                weight, term = self.perceptual.weight.value(step), self._lpl(self.perceptual, hand, seen, meter)
                lpl = term.loss.sum() / len(hand.t)
                # d/dz0_hat of weight * lpl is known already: this inner product carries it into the denoiser's one backward
                loss = loss + weight * (term.gradient * seen.z0_hat[: len(term.loss)]).sum() / len(hand.t)
                meter.add("loss/lpl", lpl)
            meter.add("loss/total", diffusion + weight * lpl)
            self.strategy.backward(loss, microbatch=microbatch, of=len(hands))
            means.append(torch.stack([diffusion.detach(), lpl.detach()]))
        frozen = self._calibrate(step, torch.stack(means).mean(dim=0))
        lr = learning_rate(self.config.optimizer, step, self.config.steps)
        return self.strategy.step(lr=lr, max_grad_norm=self.config.optimizer.max_grad_norm), frozen

    def _diffusion(self, hand: Hand, batch: LatentBatch, meter: Meter) -> tuple[Denoising, Tensor]:
        """What the denoiser made of one microbatch, and its mean diffusion loss.  Every draw is keyed by its sample's index."""
        config, ids = self.config, hand.sample_indices
        latent_shape = (batch.moments.shape[1] // 2, *batch.moments.shape[2:])
        posterior_noise = (
            rng.normal(config.seed, "posterior", ids, latent_shape).to(self.device) if config.data.posterior == "sample" else None
        )
        wide = self.strategy.recipe.master  # float32, or float64 in parity tests
        z0 = self.scaling.normalize(sample_posterior(batch.moments, posterior_noise)).to(wide)
        eps = rng.normal(config.seed, "noise", ids, latent_shape).to(self.device, wide)
        dropped = rng.uniform(config.seed, "label_dropout", ids).to(self.device) < config.conditioning.label_dropout
        cond = class_conditioning(batch.labels, self.num_classes, dropped)
        t = hand.t.to(self.device)
        seen = denoise(self.denoiser, config.diffusion.prediction, z0, eps, t, *self.schedule.coefficients(t), cond)
        diffusion = (loss_weight(config.diffusion.weighting, config.diffusion.prediction, seen.noise_level) * seen.loss).mean()
        meter.add("loss/diffusion", diffusion)
        return seen, diffusion

    def _lpl(self, perceptual: Perceptual, hand: Hand, seen: Denoising, meter: Meter) -> PerceptualTerm:
        """LPL of the microbatch's prefix, which holds every sample that was chosen; no tensor is looked at on the host."""
        first, config = slice(perceptual.prefix), self.config
        ids, lpl = hand.sample_indices[first], perceptual.loss.config
        z0, z0_hat, noise_level = seen.z0[first], seen.z0_hat[first], seen.noise_level[first]
        weights = gate_weights(noise_level, perceptual.threshold, lpl.noise_weighting, config.diffusion.prediction)
        weights[hand.chosen :] = 0.0
        places = None
        if lpl.crop is not None:
            drawn = [rng.uniform(config.seed, purpose, ids) for purpose in ("lpl_crop_row", "lpl_crop_column")]
            places = torch.stack(drawn, dim=1).to(self.device)
        with perceptual.timer:
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
