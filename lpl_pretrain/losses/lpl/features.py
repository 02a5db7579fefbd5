"""Decoder features: the stages of a frozen decoder, from the latent to the deepest stage in use.

An SD decoder of latent side H has stages `mid`, `up0` .. `up3` of sides H, 2H, 4H, 8H, 8H.  Layers
after the deepest stage in use are not kept, and neither is the encoder.  Upsampling is
merged into the convolution after it (models/upsampling.py): equal up to rounding, and cheaper.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from lpl_pretrain.errors import ConfigError
from lpl_pretrain.models.autoencoder import LatentScaling
from lpl_pretrain.models.decoder import DecoderStages
from lpl_pretrain.models.upsampling import merge_upsampling

Layer = Callable[[Tensor], Tensor]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp64": torch.float64}
"""Value of `lpl.decoder_precision` -> dtype."""


class DecoderFeatures(nn.Module):
    """z0 (B, C, H, W) -> {stage: features (B, C_l, H_l, W_l)} in the decoder's dtype."""

    def __init__(
        self,
        decoder: DecoderStages,
        scaling: LatentScaling,
        stages: list[str] | None = None,
        *,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.stages = [name for name in decoder.stages if stages is None or name in stages]
        self.decoder = decoder.truncate(self.stages[-1]).map_layers(merge_upsampling)
        self.shift = nn.Buffer(scaling.shift.clone())
        self.scale = nn.Buffer(scaling.scale.clone())
        self.decoder.to(dtype).to(memory_format=torch.channels_last).requires_grad_(False)

    def compile_layers(self, num_shapes: int = 1) -> DecoderFeatures:
        """Compile the layers in place, for static shapes; each compiles when it first runs.

        `num_shapes`: latent shapes that will be decoded, one per bucket.
        """
        num_layers = sum(len(list(stage.children())) for stage in self.decoder.stages.values())
        # Layers of a kind share their code.  It is compiled for each of them and each shape, with
        # gradient and without, and for a last chunk; beyond the limits dynamo would stop compiling.
        num_graphs = 4 * num_layers * num_shapes
        limits = torch._dynamo.config
        limits.recompile_limit = max(limits.recompile_limit, num_graphs)
        limits.accumulated_recompile_limit = max(limits.accumulated_recompile_limit, num_graphs)
        self.decoder = self.decoder.map_layers(
            lambda layers: [torch.compile(layer, dynamic=False) for layer in layers]
        )
        return self

    def first_layer(self, z0: Tensor) -> Tensor:
        """Denormalise `z0`, cast it to the decoder's dtype and layout, run conv_in."""
        raw = LatentScaling(self.shift, self.scale).denormalize(z0)
        return self.decoder.conv_in(raw.to(self.dtype, memory_format=torch.channels_last))

    def named_layers(self) -> Iterator[tuple[str | None, Layer]]:
        """All layers in order, each with the name of the stage that it completes, or None."""
        yield None, self.first_layer
        for name, layers in self.decoder.stages.items():
            *inner, last = layers.children()
            yield from ((None, layer) for layer in inner)
            yield (name if name in self.stages else None), last

    def forward(self, z0: Tensor) -> dict[str, Tensor]:
        features, hidden = {}, z0
        for name, layer in self.named_layers():
            hidden = layer(hidden)
            if name is not None:
                features[name] = hidden
        return features

    @property
    def dtype(self) -> torch.dtype:
        return next(self.decoder.parameters()).dtype

    @torch.no_grad()
    def check(self, channels: int, height: int, width: int) -> None:
        """Raise ConfigError when a stage is not finite for z0 = 0, the mean latent."""
        for name, features in self(
            torch.zeros(1, channels, height, width, device=self.scale.device)
        ).items():
            if not features.isfinite().all():
                raise ConfigError(
                    f"lpl: stage {name} of the decoder is not finite for z0 = 0 in {self.dtype}: "
                    "use another lpl.decoder_precision, or an autoencoder whose weights are whole"
                )


def stage_number(name: str) -> int:
    """Position in decoder order: mid is 0, up0 is 1, ..."""
    return 0 if name == "mid" else 1 + int(name.removeprefix("up"))
