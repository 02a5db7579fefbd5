"""From a model's section of the configuration and the latents it will see to the network."""

from __future__ import annotations

import torch

from lpl_pretrain.config.dataset import LatentEntry
from lpl_pretrain.config.model import DiTConfig
from lpl_pretrain.models.dit import DiT


def build_denoiser(config: DiTConfig, latent: LatentEntry, num_classes: int, seed: int = 0) -> DiT:
    """Initial weights depend on `seed` alone; the global random state is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return DiT(config, latent.channels, latent.height, latent.width, num_classes)
