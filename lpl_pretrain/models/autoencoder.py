"""The frozen autoencoder: images to posterior moments, latents to images.

Raw latents are samples of the encoder's posterior; the denoiser gets z0 = (raw - shift) * scale.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lpl_pretrain.config.autoencoder import AutoencoderInfo, read_autoencoder
from lpl_pretrain.config.dataset import AutoencoderEntry, DatasetIndex
from lpl_pretrain.config.hashing import autoencoder_identity
from lpl_pretrain.config.load import resolve_path
from lpl_pretrain.errors import ConfigError, transient_reason
from lpl_pretrain.models.decoder import DecoderStages
from lpl_pretrain.models.registry import AUTOENCODERS

for name in (
    "torch.utils._pytree",
    "diffusers.quantizers.torchao",
):  # where torchao is installed, diffusers imports it and complains
    logging.getLogger(name).setLevel(logging.ERROR)


class Autoencoder(nn.Module):
    """A diffusers autoencoder, frozen, in eval mode, float32 unless moved."""

    def __init__(self, network: Any, identity: str, facts: AutoencoderInfo) -> None:
        super().__init__()
        self.network = network.eval().requires_grad_(False)
        self.identity = identity
        self.downscale = facts.downscale
        self.latent_channels = facts.latent_channels
        self.shift, self.scale = AUTOENCODERS[facts.family].shift_and_scale(network, facts)

    def encode_moments(self, images: Tensor) -> Tensor:
        """(B, 3, H_px, W_px) in [-1, 1] -> (B, 2C, H, W) float32: the posterior's mean, then its
        standard deviation.

        Families without a posterior (tiny, DC) have a standard deviation of 0.
        """
        encoded = self.network.encode(images)
        if "latent_dist" not in encoded:
            latents = encoded[0].float()
            return torch.cat([latents, torch.zeros_like(latents)], dim=1)
        return torch.cat([encoded.latent_dist.mean, encoded.latent_dist.std], dim=1).float()

    def decode(self, raw: Tensor) -> Tensor:
        """Raw latents (B, C, H, W) -> images (B, 3, H_px, W_px), about [-1, 1]."""
        return self.network.decode(raw).sample


def load_autoencoder(folder: str) -> Autoencoder:
    """Load `folder`, as diffusers' save_pretrained writes it, or `asset:NAME`.

    Raises ConfigError, also for weights that are not finite.
    """
    path = resolve_path(folder)
    facts = read_autoencoder(folder, path)
    identity = autoencoder_identity(path)
    import diffusers  # takes seconds, which a run without LPL need not spend

    try:
        network = getattr(diffusers, facts.family).from_pretrained(
            path,
            local_files_only=True,
            torch_dtype=torch.float32,
            low_cpu_mem_usage=False,
            # safetensors' own reader takes every error for a file that is missing
            disable_mmap=True,
        )
    except (OSError, ValueError, RuntimeError, TypeError) as error:
        reason = transient_reason(error)  # missing from diffusers' message
        message = str(error)
        if reason is not None and reason not in message:
            message = f"{reason} ({message})"
        raise ConfigError(
            f"autoencoder={folder}: diffusers cannot load it as an {facts.family}: {message}"
        ) from None
    broken = [name for name, weight in network.named_parameters() if not weight.isfinite().all()]
    if broken:
        raise ConfigError(
            f"autoencoder={folder}: NaN or infinity in "
            f"{', '.join(broken[:3])}{' ...' if len(broken) > 3 else ''}: copy the file again from "
            "where it is whole"
        )
    return Autoencoder(network, identity, facts)


def decoder_stages(network: Any) -> DecoderStages:
    """Cut the decoder of a diffusers autoencoder of a known family; the weights are shared."""
    return AUTOENCODERS[type(network).__name__].decoder_stages(network)


@dataclass(frozen=True, slots=True)
class LatentScaling:
    """Affine map between raw latents and z0, per channel."""

    shift: Tensor  # (C,)
    scale: Tensor  # (C,)

    def to(self, device: torch.device) -> LatentScaling:
        return LatentScaling(self.shift.to(device), self.scale.to(device))

    def normalize(self, raw: Tensor) -> Tensor:
        return (raw - self.shift.to(raw)[None, :, None, None]) * self.scale.to(raw)[
            None, :, None, None
        ]

    def denormalize(self, z0: Tensor) -> Tensor:
        return z0 / self.scale.to(z0)[None, :, None, None] + self.shift.to(z0)[None, :, None, None]


def latent_scaling(kind: str, index: DatasetIndex) -> LatentScaling:
    """Scaling of `data.scaling`.

    `autoencoder`: one shift and scale, as diffusers pipelines use; `per_channel`: mean 0 and
    standard deviation 1 for every channel.
    """
    if kind == "per_channel":
        return LatentScaling(torch.tensor(index.latent.mean), 1 / torch.tensor(index.latent.std))
    channels = index.latent.channels
    return LatentScaling(
        torch.full((channels,), index.autoencoder.shift),
        torch.full((channels,), index.autoencoder.scale),
    )


def compose_scaling(
    scaling: LatentScaling, own: Autoencoder | AutoencoderEntry, other: Autoencoder
) -> LatentScaling:
    """Scaling between z0 of `scaling` and the raw latents of `other`.

    Both autoencoders must agree on z0: TAESD decodes latents that SD's factor has scaled.
    """
    shift = (scaling.shift - own.shift) * own.scale / other.scale + other.shift
    return LatentScaling(shift, scaling.scale * other.scale / own.scale)


def sample_posterior(moments: Tensor, noise: Tensor | None) -> Tensor:
    """(B, 2C, H, W) mean and std -> raw latents (B, C, H, W); the mean itself without `noise`."""
    mean, std = moments.chunk(2, dim=1)
    return mean if noise is None else mean + std * noise
