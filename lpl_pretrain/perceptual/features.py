"""Where features come from: the stages of a frozen decoder, from the latent up to the deepest stage asked for.

Stages are named in the order they run: `mid`, `up0`, `up1`, ...; an SD decoder of latent side H gives sides H, 2H, 4H, 8H, 8H.
The encoder and the decoder's unused tail are not kept.  `post_quant_conv` runs first, as in `AutoencoderKL.decode`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lpl_pretrain.models.autoencoder import Autoencoder, LatentScaling


class DecoderFeatures(nn.Module):
    """z0 (B, C, H, W) -> {stage: features (B, C_l, H_l, W_l)} in the decoder's dtype."""

    def __init__(
        self,
        autoencoder: Autoencoder,
        scaling: LatentScaling,
        stages: list[str] | None,
        *,
        dtype: torch.dtype = torch.float32,
        activation_checkpointing: bool = True,
    ) -> None:
        super().__init__()
        decoder = autoencoder.network.decoder
        names = ["mid", *(f"up{i}" for i in range(len(decoder.up_blocks)))]
        self.stages = [name for name in names if stages is None or name in stages]
        self.scaling, self.activation_checkpointing = scaling, activation_checkpointing
        self.entrance = nn.Sequential(autoencoder.network.post_quant_conv or nn.Identity(), decoder.conv_in)
        self.bodies = nn.ModuleDict(dict(zip(names, [decoder.mid_block, *decoder.up_blocks], strict=True)))
        for name in names[names.index(self.stages[-1]) + 1 :]:
            del self.bodies[name]
        self.to(dtype).to(memory_format=torch.channels_last).requires_grad_(False)

    def forward(self, z0: Tensor) -> dict[str, Tensor]:
        raw = self.scaling.denormalize(z0).to(next(self.parameters()).dtype, memory_format=torch.channels_last)
        hidden = self.entrance(raw)
        features = {}
        for name, body in self.bodies.items():
            for piece in _pieces(body):
                hidden = self._run(piece, hidden)
            if name in self.stages:
                features[name] = hidden
        return features

    def _run(self, piece: Callable[[Tensor], Tensor], hidden: Tensor) -> Tensor:
        """Frozen weights need no gradient, so a checkpointed piece keeps its input alone."""
        if self.activation_checkpointing and hidden.requires_grad:
            return checkpoint(piece, hidden, use_reentrant=False, preserve_rng_state=False)
        return piece(hidden)


def stage_number(name: str) -> int:
    """Position in decoder order: mid is 0, up0 is 1, ..."""
    return 0 if name == "mid" else 1 + int(name.removeprefix("up"))


def _pieces(body: Any) -> list[Callable[[Tensor], Tensor]]:
    """The resnets, attentions and upsamplers of a mid or up block, in the order in which diffusers runs them."""
    resnets = [lambda hidden, resnet=resnet: resnet(hidden, None) for resnet in body.resnets]
    attentions = list(getattr(body, "attentions", []))
    if attentions:  # the mid block: resnet, then pairs of attention (None when the autoencoder has none) and resnet
        pairs = zip(attentions, resnets[1:], strict=True)
        return [resnets[0], *(piece for pair in pairs for piece in pair if piece is not None)]
    return [*resnets, *(getattr(body, "upsamplers", None) or [])]
