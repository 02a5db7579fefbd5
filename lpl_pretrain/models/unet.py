"""diffusers' UNet2DConditionModel as a `Denoiser`.

Shapes: z_t (B, C, H, W) with sides that the levels halve evenly, t (B,) in [0, 1]; the output has
the shape of z_t.  ldm reads cond.labels as one token, sd cond.text (B, T, J), sdxl also
cond.pooled (B, P) and cond.sizes (B, 6) (arXiv 2307.01952, sections 2.1 and 2.2).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from lpl_pretrain.config.model import UNetConfig
from lpl_pretrain.config.text_layout import TextShape
from lpl_pretrain.diffusion.denoiser import Denoiser, DenoiserOutput, check_hidden_blocks
from lpl_pretrain.models.conditioning import Conditioning

SIZES = 6
"""Numbers in `cond.sizes`."""


class UNet(Denoiser):
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
        """Down blocks, the middle block, up blocks."""
        levels = range(len(self.network.down_blocks))
        return (
            [f"network.down_blocks.{i}" for i in levels]
            + ["network.mid_block"]
            + [f"network.up_blocks.{i}" for i in levels]
        )

    def forward(
        self, z_t: Tensor, t: Tensor, cond: Conditioning, hidden_blocks: tuple[int, ...] = ()
    ) -> DenoiserOutput:
        blocks = self.sharded_blocks()
        check_hidden_blocks(hidden_blocks, len(blocks))
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
        with _block_outputs(self, {index: blocks[index] for index in hidden_blocks}) as hidden:
            output = self.network(
                z_t.to(dtype),
                1000 * t.float(),
                encoder_hidden_states=context,
                added_cond_kwargs=added,
            ).sample
        return DenoiserOutput(output, hidden)


@contextmanager
def _block_outputs(model: nn.Module, names: dict[int, str]) -> Iterator[dict[int, Tensor]]:
    """Output (B, C_l, H_l, W_l) of each block in `names` that runs inside the `with`, by its index.

    diffusers' forward calls the blocks, so their calls are observed by hooks that last as long as
    the `with`.  A hook runs after the block's call: outside activation checkpointing and the
    compiled function, and after the hooks that FSDP2 and DeepSpeed registered before.
    """
    hidden: dict[int, Tensor] = {}

    def keep(index: int, output: Any) -> None:
        # down blocks return their output and the skip connections
        hidden[index] = output[0] if isinstance(output, tuple) else output

    handles = [
        model.get_submodule(name).register_forward_hook(
            lambda module, args, output, index=index: keep(index, output)
        )
        for index, name in names.items()
    ]
    try:
        yield hidden
    finally:
        for handle in handles:
            handle.remove()
