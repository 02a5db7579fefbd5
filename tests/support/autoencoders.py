"""Tiny, randomly initialised autoencoders of every supported family."""

from pathlib import Path

import torch
from diffusers import AutoencoderDC, AutoencoderKL, AutoencoderKLFlux2, AutoencoderTiny

from lpl_pretrain.config.autoencoder import FAMILIES
from lpl_pretrain.config.model_json import ModelJSON
from lpl_pretrain.losses.lpl.features import DecoderFeatures
from lpl_pretrain.models.autoencoder import Autoencoder, LatentScaling, decoder_stages


def tiny_network(
    *,
    seed: int = 0,
    post_quant_conv: bool = True,
    attention: bool = True,
    latent_channels: int = 4,
    levels: int = 3,
    shift_factor: float | None = None,
    up_block: str = "UpDecoderBlock2D",
    family: type[AutoencoderKL] | type[AutoencoderKLFlux2] = AutoencoderKL,
):
    torch.manual_seed(seed)
    factors = (
        {"scaling_factor": 0.5, "shift_factor": shift_factor} if family is AutoencoderKL else {}
    )
    network = family(
        block_out_channels=(8, 16, 16, 16)[:levels],
        layers_per_block=1,
        latent_channels=latent_channels,
        norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=(up_block,) * levels,
        use_post_quant_conv=post_quant_conv,
        use_quant_conv=post_quant_conv,
        mid_block_add_attention=attention,
        **factors,
    )
    if family is AutoencoderKLFlux2:
        network.bn.running_mean.normal_()
        network.bn.running_var.uniform_(0.5, 2.0)
    return network


def tiny_distilled(
    *, seed: int = 0, latent_channels: int = 4, levels: int = 3, **options
) -> AutoencoderTiny:
    """TAESD-like autoencoder: without norms and attention, so its receptive field is local."""
    torch.manual_seed(seed)
    blocks = (1,) * levels
    return AutoencoderTiny(
        latent_channels=latent_channels,
        encoder_block_out_channels=(8,) * levels,
        decoder_block_out_channels=(8,) * levels,
        num_encoder_blocks=blocks,
        num_decoder_blocks=blocks,
        **options,
    )


def tiny_dc(
    *, seed: int = 0, latent_channels: int = 4, layers: tuple[int, ...] = (1, 2, 1), **options
) -> AutoencoderDC:
    """SANA-like autoencoder (DC-AE), with residual and linear-attention blocks."""
    torch.manual_seed(seed)
    return AutoencoderDC(
        latent_channels=latent_channels,
        attention_head_dim=4,
        encoder_block_types=("ResBlock", "ResBlock", "EfficientViTBlock"),
        decoder_block_types=("ResBlock", "ResBlock", "EfficientViTBlock"),
        encoder_block_out_channels=(8, 16, 16),
        decoder_block_out_channels=(8, 16, 16),
        encoder_layers_per_block=(1, 1, 1),
        decoder_layers_per_block=layers,
        encoder_qkv_multiscales=((), (), (3,)),
        decoder_qkv_multiscales=((), (), (3,)),
        scaling_factor=0.4,
        **options,
    )


def wrap(network) -> Autoencoder:
    name = type(network).__name__
    return Autoencoder(
        network,
        identity="0" * 64,
        facts=FAMILIES[name](ModelJSON(name, {**network.config, "_class_name": name})),
    )


def tiny_autoencoder(**options) -> Autoencoder:
    return wrap(tiny_network(**options))


def tiny_folder(folder: Path, **options) -> str:
    tiny_network(**options).save_pretrained(folder)
    return str(folder)


def scaling_of(autoencoder: Autoencoder) -> LatentScaling:
    channels = autoencoder.latent_channels
    return LatentScaling(
        torch.full((channels,), autoencoder.shift), torch.full((channels,), autoencoder.scale)
    )


def features_of(
    autoencoder: Autoencoder, stages: list[str] | None = None, **options
) -> DecoderFeatures:
    return DecoderFeatures(
        decoder_stages(autoencoder.network), scaling_of(autoencoder), stages, **options
    )
