"""Tiny, randomly initialised autoencoders of diffusers' AutoencoderKL family."""

from pathlib import Path

import torch
from diffusers import AutoencoderKL

from lpl_pretrain.models.autoencoder import Autoencoder, LatentScaling


def tiny_network(
    *,
    seed: int = 0,
    post_quant_conv: bool = True,
    attention: bool = True,
    latent_channels: int = 4,
    levels: int = 3,
    shift_factor: float | None = None,
) -> AutoencoderKL:
    torch.manual_seed(seed)
    return AutoencoderKL(
        block_out_channels=(8, 16, 16, 16)[:levels],
        layers_per_block=1,
        latent_channels=latent_channels,
        norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        use_post_quant_conv=post_quant_conv,
        use_quant_conv=post_quant_conv,
        mid_block_add_attention=attention,
        scaling_factor=0.5,
        shift_factor=shift_factor,
    )


def tiny_autoencoder(**options) -> Autoencoder:
    return Autoencoder(tiny_network(**options), identity="0" * 64)


def tiny_folder(folder: Path, **options) -> str:
    tiny_network(**options).save_pretrained(folder)
    return str(folder)


def scaling_of(autoencoder: Autoencoder) -> LatentScaling:
    channels = autoencoder.latent_channels
    return LatentScaling(torch.full((channels,), autoencoder.shift), torch.full((channels,), autoencoder.scale))
