"""The frozen autoencoder: pictures to posterior moments, latents to pictures; any of diffusers' AutoencoderKL family.

Raw latents are what the encoder's posterior gives; z0 = (raw - shift) * scale is what the denoiser sees.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn

from lpl_pretrain.config.dataset import DatasetIndex
from lpl_pretrain.config.identity import autoencoder_identity
from lpl_pretrain.config.load import resolve_path
from lpl_pretrain.errors import ConfigError


class Autoencoder(nn.Module):
    """A diffusers AutoencoderKL, frozen, in eval mode, float32 unless moved."""

    def __init__(self, network: Any, identity: str) -> None:
        super().__init__()
        self.network = network.eval().requires_grad_(False)
        self.identity = identity
        self.downscale = 2 ** (len(network.config.block_out_channels) - 1)
        self.latent_channels = network.config.latent_channels
        self.shift = float(network.config.shift_factor or 0.0)
        self.scale = float(network.config.scaling_factor)

    def encode_moments(self, images: Tensor) -> Tensor:
        """(B, 3, H_px, W_px) in [-1, 1] -> (B, 2C, H, W) float32: the posterior's mean, then its standard deviation."""
        posterior = self.network.encode(images).latent_dist
        return torch.cat([posterior.mean, posterior.std], dim=1).float()

    def decode(self, raw: Tensor) -> Tensor:
        """Raw latents (B, C, H, W) -> pictures (B, 3, H_px, W_px), about [-1, 1]."""
        return self.network.decode(raw).sample


def load_autoencoder(folder: str) -> Autoencoder:
    """`folder` as diffusers' save_pretrained writes it, or `asset:NAME`.  Raises ConfigError."""
    path = resolve_path(folder)
    identity = autoencoder_identity(Path(path))
    try:
        network = AutoencoderKL.from_pretrained(path, local_files_only=True, torch_dtype=torch.float32, low_cpu_mem_usage=False)
    except (OSError, ValueError, RuntimeError, TypeError) as problem:
        raise ConfigError(f"autoencoder={folder}: diffusers cannot load it as an AutoencoderKL: {problem}") from None
    return Autoencoder(network, identity)


@dataclass(frozen=True, slots=True)
class LatentScaling:
    """Between raw latents and z0, per channel."""

    shift: Tensor  # (C,)
    scale: Tensor  # (C,)

    def normalize(self, raw: Tensor) -> Tensor:
        return (raw - self.shift.to(raw)[None, :, None, None]) * self.scale.to(raw)[None, :, None, None]

    def denormalize(self, z0: Tensor) -> Tensor:
        return z0 / self.scale.to(z0)[None, :, None, None] + self.shift.to(z0)[None, :, None, None]


def latent_scaling(kind: str, index: DatasetIndex) -> LatentScaling:
    """`autoencoder`: one shift and scale, as diffusers pipelines use; `per_channel`: mean 0 and std 1 for every channel."""
    if kind == "per_channel":
        return LatentScaling(torch.tensor(index.latent.mean), 1 / torch.tensor(index.latent.std))
    channels = index.latent.channels
    return LatentScaling(torch.full((channels,), index.autoencoder.shift), torch.full((channels,), index.autoencoder.scale))


def sample_posterior(moments: Tensor, noise: Tensor | None) -> Tensor:
    """(B, 2C, H, W) mean and std -> raw latents (B, C, H, W); the mean itself without `noise`."""
    mean, std = moments.chunk(2, dim=1)
    return mean if noise is None else mean + std * noise
