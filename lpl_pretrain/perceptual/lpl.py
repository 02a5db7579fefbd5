"""The Latent Perceptual Loss (arXiv 2411.04873): decoder features of the one-step estimate against those of the clean latent.

    L_LPL = mean over samples of  gate * mean over stages l of  omega_l * mean over channels and positions of
            ( rho_l * (phi'_l - phihat'_l) )^2

phi are features of z0, phihat those of z0_hat, prime is normalisation, rho the keep mask, omega_l = H / H_l.  Means
everywhere, and gated-out samples count as zeros, so that the weight means the same for any batch and number of ranks.

Shapes: z0, z0_hat (K, C, H, W) float32; gate, loss (K,).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lpl_pretrain.config.schema import LPLConfig
from lpl_pretrain.perceptual.features import DecoderFeatures, stage_number
from lpl_pretrain.perceptual.normalize import Moments, normalized_difference
from lpl_pretrain.perceptual.outliers import keep_mask

COMPUTE = torch.float32
"""Features may come in bf16; distances are taken in this."""


@dataclass(frozen=True, slots=True)
class StageReport:
    """What one stage of the decoder did; each (K,), meaningful where the gate is open."""

    contribution: Tensor  # omega_l * distance / number of stages
    keep_fraction: Tensor  # share of positions that the outlier mask kept
    std_ratio: Tensor  # std over space of predicted / clean features, mean over channels: LPL counters its shrinking

    @classmethod
    def concatenate(cls, parts: list[StageReport]) -> StageReport:
        return cls(*(torch.cat([getattr(part, name) for part in parts]) for name in cls.__slots__))


@dataclass(frozen=True, slots=True)
class PerceptualTerm:
    loss: Tensor  # (K,) zero where the gate is shut
    gradient: Tensor  # (K, C, H, W) d loss.sum() / d z0_hat
    stages: dict[str, StageReport]


class LatentPerceptualLoss(nn.Module):
    """Holds the frozen decoder; knows nothing of schedules, steps or ranks."""

    def __init__(self, config: LPLConfig, features: DecoderFeatures) -> None:
        super().__init__()
        self.config, self.features = config, features

    def forward(self, z0: Tensor, z0_hat: Tensor, gate: Tensor) -> PerceptualTerm:
        """Loss and its gradient at `z0_hat`, `chunk_size` samples inside the decoder at a time.

        z0_hat is taken as a leaf: the caller sends `gradient` through the denoiser in its one backward.  Where `gate`
        (K,) bool is False a sample is compared with itself: finite, and exactly 0.
        """
        z0_hat = torch.where(gate.view(-1, 1, 1, 1), z0_hat.detach(), z0)
        inputs = zip(*(x.split(self.config.chunk_size) for x in (z0, z0_hat, gate)), strict=True)
        losses, gradients, reports = zip(*(self._chunk(*chunk) for chunk in inputs), strict=True)
        stages = {name: StageReport.concatenate([report[name] for report in reports]) for name in self.features.stages}
        return PerceptualTerm(torch.cat(losses), torch.cat(gradients), stages)

    def _chunk(self, z0: Tensor, z0_hat: Tensor, gate: Tensor) -> tuple[Tensor, Tensor, dict[str, StageReport]]:
        leaf = z0_hat.detach().requires_grad_()
        with torch.no_grad():
            clean = self.features(z0)
        with torch.enable_grad():
            loss, report = self.distance(self.features(leaf), clean, latent_side=z0.shape[-1])
            loss = loss * gate
            (gradient,) = torch.autograd.grad(loss.sum(), leaf)
        return loss.detach(), gradient, report

    def distance(
        self, predicted: dict[str, Tensor], clean: dict[str, Tensor], latent_side: int
    ) -> tuple[Tensor, dict[str, StageReport]]:
        """(K,) loss per sample and what each stage did."""
        reports = {}
        total = torch.zeros(())
        for name in predicted:
            # plain memory order: statistics, quantiles and masks all run along the positions of a channel
            phi_hat, phi = (x[name].to(COMPUTE, memory_format=torch.contiguous_format) for x in (predicted, clean))
            moments_hat, moments = Moments.of(phi_hat), Moments.of(phi)
            omega = latent_side / phi.shape[-1] if self.config.depth_weights == "inverse_resolution" else 1.0
            difference = normalized_difference(phi_hat, phi, self.config.normalize, moments_hat, moments)
            keep = self._keep(stage_number(name), phi_hat, phi, moments_hat, moments)
            contribution = omega / len(predicted) * (keep * difference).square().mean(dim=(1, 2, 3))
            total = total.to(contribution) + contribution
            ratio = moments_hat.std.mean(dim=(1, 2, 3)) / moments.std.mean(dim=(1, 2, 3)).clamp(min=1e-12)
            reports[name] = StageReport(contribution.detach(), keep.to(COMPUTE).mean(dim=(1, 2, 3)), ratio)
        return total, reports

    def _keep(self, stage: int, phi_hat: Tensor, phi: Tensor, moments_hat: Moments, moments: Moments) -> Tensor:
        outliers = self.config.outliers
        if not outliers.enabled or stage < outliers.first_stage:
            return torch.ones_like(phi, dtype=torch.bool)
        source, std = (phi, moments.std) if outliers.source == "target" else (phi_hat, moments_hat.std)
        return keep_mask(source, std, quantile=outliers.quantile, margin=outliers.margin, stage=stage)
