"""Specs of the autoencoder families, with the cuts of their decoders into stages."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lpl_pretrain.config.autoencoder import AutoencoderInfo
from lpl_pretrain.models.decoder import DecoderStages, Lambda
from lpl_pretrain.models.spec import AutoencoderSpec


def _kl(network: Any) -> DecoderStages:
    """SD, SDXL, SD3, FLUX and FLUX.2.

    `post_quant_conv` is part of `decode()`: SD and SDXL have it, SD3 and FLUX do not.
    """
    decoder = network.decoder
    conv_in = nn.Sequential(network.post_quant_conv or nn.Identity(), decoder.conv_in)
    bodies = {
        "mid": decoder.mid_block,
        **{f"up{i}": block for i, block in enumerate(decoder.up_blocks)},
    }
    conv_out = nn.Sequential(decoder.conv_norm_out, decoder.conv_act, decoder.conv_out)
    return DecoderStages(
        conv_in, {name: _kl_layers(body) for name, body in bodies.items()}, conv_out
    )


def _kl_layers(body: Any) -> list[nn.Module]:
    """Layers of a block in diffusers' order: the mid block starts with a resnet more than it has
    attentions.
    """
    resnets: list[nn.Module] = [Lambda(_without_embedding, resnet) for resnet in body.resnets]
    attentions = list(getattr(body, "attentions", []))
    surplus = len(resnets) - len(attentions) if attentions else len(resnets)
    layers = resnets[:surplus]
    for attention, resnet in zip(attentions, resnets[surplus:], strict=True):
        pair = [attention, resnet] if surplus else [resnet, attention]
        # an autoencoder may have been built without attention
        layers += [layer for layer in pair if layer is not None]
    return [*layers, *(getattr(body, "upsamplers", None) or [])]


def _without_embedding(resnet: Any, hidden: Tensor) -> Tensor:
    return resnet(hidden, None)


def _tiny(network: Any) -> DecoderStages:
    """TAESD: a stage ends before each upsampling; `conv_out` also maps [0, 1] to [-1, 1]."""
    layers = list(network.decoder.layers)
    conv_in = nn.Sequential(Lambda(_clamp), *layers[:2])
    stages: list[list[nn.Module]] = [[]]
    for layer in layers[2:-1]:
        if isinstance(layer, nn.Upsample):
            stages.append([])
        stages[-1].append(layer)
    names = ["mid", *(f"up{i}" for i in range(len(stages) - 1))]
    return DecoderStages(
        conv_in,
        dict(zip(names, stages, strict=True)),
        nn.Sequential(layers[-1], Lambda(_to_signed)),
    )


def _clamp(_: None, raw: Tensor) -> Tensor:
    return torch.tanh(raw / 3) * 3


def _to_signed(_: None, image: Tensor) -> Tensor:
    return image.mul(2).sub(1)


def _dc(network: Any) -> DecoderStages:
    """SANA: diffusers lists `up_blocks` from the image to the latent and runs them backwards."""
    decoder = network.decoder
    stages = [list(block) for block in reversed(decoder.up_blocks) if len(block)]
    names = ["mid", *(f"up{i}" for i in range(len(stages) - 1))]
    conv_out = nn.Sequential(
        Lambda(_norm_over_channels, decoder.norm_out), decoder.conv_act, decoder.conv_out
    )
    repeats = decoder.in_shortcut_repeats if decoder.in_shortcut else 0
    return DecoderStages(
        _DCConvIn(decoder.conv_in, repeats), dict(zip(names, stages, strict=True)), conv_out
    )


class _DCConvIn(nn.Module):
    def __init__(self, conv_in: nn.Module, repeats: int) -> None:
        super().__init__()
        self.conv_in = conv_in
        self.repeats = repeats

    def forward(self, raw: Tensor) -> Tensor:
        hidden = self.conv_in(raw)
        return hidden + raw.repeat_interleave(self.repeats, dim=1) if self.repeats else hidden


def _norm_over_channels(norm: Any, hidden: Tensor) -> Tensor:
    return norm(hidden.movedim(1, -1)).movedim(-1, 1)


def _flux2_shift_and_scale(network: Any, facts: AutoencoderInfo) -> tuple[float, float]:
    """Overall mean and standard deviation of the running statistics of FLUX.2's patched latents.

    FLUX.2 has no scaling factor.
    """
    mean = network.bn.running_mean.double()
    variance = network.bn.running_var.double()
    overall = variance.mean() + mean.var(correction=0) + network.config.batch_norm_eps
    return mean.mean().item(), overall.rsqrt().item()


KL = AutoencoderSpec("AutoencoderKL", _kl)
KL_FLUX2 = AutoencoderSpec("AutoencoderKLFlux2", _kl, _flux2_shift_and_scale)
TINY = AutoencoderSpec("AutoencoderTiny", _tiny)
DC = AutoencoderSpec("AutoencoderDC", _dc)
