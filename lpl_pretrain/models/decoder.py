"""Stages of a frozen decoder, layer by layer, from the latent to the image.

The decoder of every autoencoder family is cut into `conv_in`, stages `mid`, `up0`, `up1`, ...
(named in config/autoencoder.py), each a sequence of layers, and `conv_out`.  Running all of them
equals `decode()`.  A layer (a resnet, an attention, an upsampler) is the unit of activation
checkpointing and of torch.compile.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

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
