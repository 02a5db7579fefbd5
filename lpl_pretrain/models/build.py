"""From a model's section of the configuration and what it will see to the network."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeAlias

import torch

from lpl_pretrain.config.dataset import LatentEntry
from lpl_pretrain.config.model import DiTConfig, MMDiTConfig, UNetConfig
from lpl_pretrain.config.text import TextShape
from lpl_pretrain.models.dit import DiT
from lpl_pretrain.models.mmdit import MMDiT

if TYPE_CHECKING:
    from lpl_pretrain.models.unet import UNet

Denoiser: TypeAlias = "DiT | MMDiT | UNet"
Section = DiTConfig | MMDiTConfig | UNetConfig


def build_denoiser(
    config: Section, latent: LatentEntry, num_classes: int, seed: int = 0, *, text: TextShape | None = None
) -> Denoiser:
    """Initial weights depend on `seed` alone; the global random state is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if isinstance(config, MMDiTConfig):
            assert text is not None, "config/check.py asks for text"
            return MMDiT(config, latent.channels, latent.height, latent.width, text)
        if isinstance(config, UNetConfig):
            from lpl_pretrain.models.unet import UNet  # diffusers' costs seconds at start-up

            return UNet(config, latent.channels, latent.height, num_classes, text)
        return DiT(config, latent.channels, latent.height, latent.width, num_classes, text)
