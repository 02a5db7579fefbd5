"""Generates images from a trained denoiser; image i is a function of (seed, i) alone.

It does not depend on the batch, the rank or the other images.  Noise: rng.normal(seed,
"sample_noise", i).  Class: a keyed uniform through the training class frequencies.  Shapes: z0
(B, C, H, W) float32; images (B, 3, H_px, W_px) float32, about [-1, 1]; pixels the same in uint8.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lpl_pretrain.config.protocol import SamplerConfig
from lpl_pretrain.config.schema import Prediction
from lpl_pretrain.diffusion.denoiser import DenoiserOutput
from lpl_pretrain.diffusion.samplers import sample
from lpl_pretrain.diffusion.schedule import Schedule
from lpl_pretrain.errors import NonFiniteError
from lpl_pretrain.evaluation.captions import Captions
from lpl_pretrain.models.conditioning import Conditioning
from lpl_pretrain.runtime import rng

RULES = {
    "noise": "standard normal float32, keyed by (seed, 'sample_noise', i)",
    "classes": "training class frequencies, drawn by a uniform keyed by (seed, 'sample_class', i)",
    "captions": "of training sample number floor(samples * u), u a uniform keyed by (seed, "
    "'sample_caption', i)",
    "uint8": "round(clamp((x + 1) * 127.5, 0, 255)), half to even",
}
"""Conventions that a score depends on besides its protocol; recorded with every score."""
MAX_NAMED_IMAGES = 8


@dataclass(frozen=True)
class Generator:
    """Denoiser, sampler and decoder on one device: from (seed, i) to image i."""

    denoiser: nn.Module
    decode: Callable[[Tensor], Tensor]
    """z0 (B, C, H, W) -> images (B, 3, H_px, W_px), float32."""
    prediction: Prediction
    schedule: Schedule
    latent_shape: tuple[int, int, int]
    """(C, H, W)."""
    class_counts: Sequence[int]
    """Training samples of each class; empty when there are no classes."""
    device: torch.device
    guide: nn.Module | None = None
    """A weaker denoiser, trained with the same conditions, to guide away from."""
    captions: Captions | None = None
    """Captions for a text-conditioned denoiser."""

    @torch.no_grad()
    def images(
        self,
        indices: Sequence[int],
        *,
        seed: int,
        sampler: SamplerConfig,
        guidance_scale: float,
        precision: str = "fp32",
    ) -> Tensor:
        """Generate images `indices`, (B, 3, H_px, W_px) float32.

        `precision` is the denoiser's; the decoder stays in float32.
        """
        noise = rng.normal(seed, "sample_noise", indices, self.latent_shape).to(self.device)
        cond, uncond = self._conditions(seed, indices)

        def at_precision(denoiser: nn.Module) -> Callable[..., DenoiserOutput]:
            def predict(z_t: Tensor, t: Tensor, cond: Conditioning) -> DenoiserOutput:
                with torch.autocast(
                    self.device.type, dtype=torch.bfloat16, enabled=precision == "bf16"
                ):
                    return denoiser(z_t, t, cond)

            return predict

        return self.decode(
            sample(
                at_precision(self.denoiser),
                self.prediction,
                self.schedule,
                sampler,
                noise,
                cond,
                uncond=uncond,
                guidance_scale=guidance_scale,
                guide=None if self.guide is None else at_precision(self.guide),
            )
        )

    def _conditions(self, seed: int, indices: Sequence[int]) -> tuple[Conditioning, Conditioning]:
        """Conditions of these images, and the null condition, each of batch size len(indices)."""
        labels = draw_classes(seed, indices, self.class_counts).to(self.device)
        null = torch.full_like(labels, len(self.class_counts))  # the class after the last one
        if self.captions is None:
            return Conditioning(labels), Conditioning(null)
        _, text, pooled = self.captions.draw(seed, indices)
        nothing = self.captions.conditioner.null(len(indices), self.device)
        sizes = self.captions.sizes.to(self.device).expand(len(indices), -1)
        cond = Conditioning(labels, text.to(self.device), pooled.to(self.device), sizes)
        return cond, Conditioning(null, *nothing, sizes)

    def pixels(
        self,
        indices: range,
        *,
        seed: int,
        sampler: SamplerConfig,
        guidance_scale: float,
        precision: str = "fp32",
    ) -> Tensor:
        """Generate images `indices` as uint8, on this device.

        Raises NonFiniteError that names images with NaN or infinity.
        """
        images = self.images(
            indices, seed=seed, sampler=sampler, guidance_scale=guidance_scale, precision=precision
        )
        return to_uint8(images, indices.start)


def draw_classes(seed: int, indices: Sequence[int], class_counts: Sequence[int]) -> Tensor:
    """Draw classes, (len(indices),) int64; class k with probability class_counts[k] / sum.

    Without classes all are 0, which is the null class then.
    """
    if sum(class_counts) == 0:
        return torch.full((len(indices),), len(class_counts), dtype=torch.int64)
    edges = torch.tensor(class_counts, dtype=torch.float64).cumsum(0)
    return torch.searchsorted(
        edges, rng.uniform(seed, "sample_class", indices) * edges[-1], right=True
    )


def to_uint8(images: Tensor, first: int = 0) -> Tensor:
    """Round float images as RULES["uint8"] says; no other code of this project does.

    Raises NonFiniteError that names images with NaN or infinity; `first`: index of the first image.
    """
    bad = (~images.flatten(1).isfinite().all(dim=1)).nonzero().flatten().tolist()
    if bad:
        raise NonFiniteError(
            f"generated images {[first + i for i in bad[:MAX_NAMED_IMAGES]]} contain NaN or "
            "infinity: these weights cannot be scored; try precision=fp32, or an earlier checkpoint"
        )
    return ((images.float() + 1) * 127.5).clamp(0, 255).round().to(torch.uint8)
