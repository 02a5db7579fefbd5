"""A frozen decoder as a list of stages: what to run between the latent and the picture, piece by
piece.

Every family of autoencoders comes down to an entrance, stages `mid`, `up0`, `up1`, ... (named in
config/autoencoder.py) made of pieces that run one after another, and an exit to pixels.  Going
through all of them is exactly `decode()`.  A piece is the unit of activation checkpointing and of
torch.compile: a resnet, an attention, an upsampler.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


class DecoderStages(nn.Module):
    """Raw latents (B, C, H, W) -> `entrance` -> each of `stages` in order -> `exit` -> pictures (B,
    3, H_px, W_px).
    """

    def __init__(
        self, entrance: nn.Module, stages: dict[str, list[nn.Module]], exit_: nn.Module
    ) -> None:
        super().__init__()
        self.entrance, self.exit = entrance, exit_
        self.stages = nn.ModuleDict(
            {name: nn.Sequential(*pieces) for name, pieces in stages.items()}
        )

    def forward(self, raw: Tensor) -> Tensor:
        hidden = self.entrance(raw)
        for stage in self.stages.values():
            hidden = stage(hidden)
        return self.exit(hidden)

    def cut_after(self, name: str) -> DecoderStages:
        """The same without what runs after stage `name`, the exit included: none of it is kept."""
        names = list(self.stages)
        kept = {n: list(self.stages[n].children()) for n in names[: names.index(name) + 1]}
        return DecoderStages(self.entrance, kept, nn.Identity())

    def changed(self, change: Callable[[list[nn.Module]], list[Any]]) -> DecoderStages:
        """The same with other pieces in each stage."""
        return DecoderStages(
            self.entrance,
            {name: change(list(run.children())) for name, run in self.stages.items()},
            self.exit,
        )


class Call(nn.Module):
    """A piece that diffusers calls with further arguments, or a piece of its `forward` that it has
    no module for.
    """

    def __init__(
        self, function: Callable[[Any, Tensor], Tensor], module: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.module, self.function = module, function

    def forward(self, hidden: Tensor) -> Tensor:
        return self.function(self.module, hidden)


def decoder_stages(network: Any) -> DecoderStages:
    """Of a diffusers autoencoder of a known family; shares its weights."""
    return {
        "AutoencoderKL": _kl,
        "AutoencoderKLFlux2": _kl,
        "AutoencoderTiny": _tiny,
        "AutoencoderDC": _dc,
    }[type(network).__name__](network)


def _kl(network: Any) -> DecoderStages:
    """`post_quant_conv`, where there is one, is part of `decode()`: SD and SDXL have it, SD3 and
    FLUX do not.
    """
    decoder = network.decoder
    entrance = nn.Sequential(network.post_quant_conv or nn.Identity(), decoder.conv_in)
    bodies = {
        "mid": decoder.mid_block,
        **{f"up{i}": block for i, block in enumerate(decoder.up_blocks)},
    }
    exit_ = nn.Sequential(decoder.conv_norm_out, decoder.conv_act, decoder.conv_out)
    return DecoderStages(entrance, {name: _kl_pieces(body) for name, body in bodies.items()}, exit_)


def _kl_pieces(body: Any) -> list[nn.Module]:
    """In the order in which diffusers runs them: the mid block starts with a resnet more than it
    has attentions.
    """
    resnets: list[nn.Module] = [Call(_without_embedding, resnet) for resnet in body.resnets]
    attentions = list(getattr(body, "attentions", []))
    surplus = len(resnets) - len(attentions) if attentions else len(resnets)
    pieces = resnets[:surplus]
    for attention, resnet in zip(attentions, resnets[surplus:], strict=True):
        pair = [attention, resnet] if surplus else [resnet, attention]
        pieces += [
            piece for piece in pair if piece is not None
        ]  # an autoencoder may have been built without attention
    return [*pieces, *(getattr(body, "upsamplers", None) or [])]


def _without_embedding(resnet: Any, hidden: Tensor) -> Tensor:
    return resnet(hidden, None)


def _tiny(network: Any) -> DecoderStages:
    """Stages end before each upsampling, after the blocks; the last convolution is the exit,
    stretched from [0, 1].
    """
    layers = list(network.decoder.layers)
    entrance = nn.Sequential(Call(_clamp), *layers[:2])
    runs: list[list[nn.Module]] = [[]]
    for layer in layers[2:-1]:
        if isinstance(layer, nn.Upsample):
            runs.append([])
        runs[-1].append(layer)
    names = ["mid", *(f"up{i}" for i in range(len(runs) - 1))]
    return DecoderStages(
        entrance, dict(zip(names, runs, strict=True)), nn.Sequential(layers[-1], Call(_to_signed))
    )


def _clamp(_: None, raw: Tensor) -> Tensor:
    return torch.tanh(raw / 3) * 3


def _to_signed(_: None, image: Tensor) -> Tensor:
    return image.mul(2).sub(1)


def _dc(network: Any) -> DecoderStages:
    """diffusers keeps `up_blocks` from the picture to the latent and runs them backwards."""
    decoder = network.decoder
    runs = [list(block) for block in reversed(decoder.up_blocks) if len(block)]
    names = ["mid", *(f"up{i}" for i in range(len(runs) - 1))]
    exit_ = nn.Sequential(
        Call(_norm_over_channels, decoder.norm_out), decoder.conv_act, decoder.conv_out
    )
    repeats = decoder.in_shortcut_repeats if decoder.in_shortcut else 0
    return DecoderStages(
        _DCEntrance(decoder.conv_in, repeats), dict(zip(names, runs, strict=True)), exit_
    )


class _DCEntrance(nn.Module):
    def __init__(self, conv_in: nn.Module, repeats: int) -> None:
        super().__init__()
        self.conv_in, self.repeats = conv_in, repeats

    def forward(self, raw: Tensor) -> Tensor:
        hidden = self.conv_in(raw)
        return hidden + raw.repeat_interleave(self.repeats, dim=1) if self.repeats else hidden


def _norm_over_channels(norm: Any, hidden: Tensor) -> Tensor:
    return norm(hidden.movedim(1, -1)).movedim(-1, 1)
