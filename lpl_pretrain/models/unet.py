"""diffusers' UNet2DConditionModel behind our interface: t in [0, 1], our conditions, blocks by
name.

Shapes: z_t (B, C, H, W) with sides that the levels halve evenly, t (B,); the answer has the shape
of z_t.  ldm reads cond.labels as one token, sd cond.text (B, T, J), sdxl also cond.pooled (B, P)
and cond.sizes (B, 6) (arXiv 2307.01952, sections 2.1 and 2.2).
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from lpl_pretrain.config.model import UNetConfig
from lpl_pretrain.config.text_layout import TextShape
from lpl_pretrain.models.conditioning import Conditioning

SIZES = 6


class UNet(nn.Module):
    def __init__(
        self, config: UNetConfig, channels: int, side: int, num_classes: int, text: TextShape | None
    ) -> None:
        super().__init__()
        self.config = config
        settings = {
            **config.arguments,
            "in_channels": channels,
            "out_channels": channels,
            "sample_size": side,
        }
        if text is not None:
            settings["cross_attention_dim"] = text.width
        if config.preset == "sdxl":
            assert text is not None
            settings["projection_class_embeddings_input_dim"] = (
                text.pooled_width + SIZES * settings["addition_time_embed_dim"]
            )
        network: Any = UNet2DConditionModel(**settings)
        self.network = network
        if not config.reads_text:
            self.class_embedding = nn.Embedding(num_classes + 1, settings["cross_attention_dim"])

    def sharded_blocks(self) -> list[str]:
        """Names of the sub-modules that a strategy may shard, checkpoint or compile one by one."""
        levels = range(len(self.network.down_blocks))
        return (
            [f"network.down_blocks.{i}" for i in levels]
            + ["network.mid_block"]
            + [f"network.up_blocks.{i}" for i in levels]
        )

    def forward(self, z_t: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        dtype = self.network.conv_in.weight.dtype
        added = None
        if self.config.preset == "sdxl":
            assert cond.pooled is not None and cond.sizes is not None
            added = {"text_embeds": cond.pooled.to(dtype), "time_ids": cond.sizes.to(torch.float32)}
        if self.config.reads_text:
            assert cond.text is not None
            context = cond.text.to(dtype)
        else:
            context = self.class_embedding(cond.labels)[:, None]
        return self.network(
            z_t.to(dtype), 1000 * t.float(), encoder_hidden_states=context, added_cond_kwargs=added
        ).sample
