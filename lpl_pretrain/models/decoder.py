"""Stages of a frozen decoder, layer by layer, from the latent to the image.

The decoder of every autoencoder family is cut into `conv_in`, stages `mid`, `up0`, `up1`, ...
(named in config/autoencoder.py), each a sequence of layers, and `conv_out`.  Running all of them
equals `decode()`.  A layer (a resnet, an attention, an upsampler) is the unit of activation checkpointing
and of torch.compile.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


class DecoderStages(nn.Module):
    """Raw latents (B, C, H, W) -> `conv_in` -> `stages` in order -> `conv_out` -> images
    (B, 3, H_px, W_px).
    """

    def __init__(
        self, conv_in: nn.Module, stages: dict[str, list[nn.Module]], conv_out: nn.Module
    ) -> None:
        super().__init__()
        self.conv_in = conv_in
        self.conv_out = conv_out
        self.stages = nn.ModuleDict(
            {name: nn.Sequential(*layers) for name, layers in stages.items()}
        )

    def forward(self, raw: Tensor) -> Tensor:
        hidden = self.conv_in(raw)
        for stage in self.stages.values():
            hidden = stage(hidden)
        return self.conv_out(hidden)

    def truncate(self, name: str) -> DecoderStages:
        """Return the decoder up to stage `name`, without any layer that runs after it."""
        names = list(self.stages)
        kept = {n: list(self.stages[n].children()) for n in names[: names.index(name) + 1]}
        return DecoderStages(self.conv_in, kept, nn.Identity())

    def map_layers(self, function: Callable[[list[nn.Module]], list[Any]]) -> DecoderStages:
        """Return the decoder with `function(layers)` as the layers of each stage."""
        stages = {name: function(list(stage.children())) for name, stage in self.stages.items()}
        return DecoderStages(self.conv_in, stages, self.conv_out)


class Lambda(nn.Module):
    """`function(module, hidden)` as a layer.

    For a module that diffusers calls with further arguments, and for operations of its `forward`
    that have no module.
    """

    def __init__(
        self, function: Callable[[Any, Tensor], Tensor], module: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.module = module
        self.function = function

    def forward(self, hidden: Tensor) -> Tensor:
        return self.function(self.module, hidden)


def decoder_stages(network: Any) -> DecoderStages:
    """Cut the decoder of a diffusers autoencoder of a known family; the weights are shared."""
    return {
        "AutoencoderKL": _kl,
        "AutoencoderKLFlux2": _kl,
        "AutoencoderTiny": _tiny,
        "AutoencoderDC": _dc,
    }[type(network).__name__](network)


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
