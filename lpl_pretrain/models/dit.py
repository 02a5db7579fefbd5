"""Diffusion transformer with adaLN-Zero (arXiv 2212.09748), with the published parameter names.

It is conditioned on classes, and optionally on text.

Shapes: z_t (B, C, H, W) with H and W divisible by the patch size, t (B,) in [0, 1]; the output has
the shape of z_t, with `learned_sigma` twice its channels (the second half:
diffusion/learned_sigma.py).  At initialisation the output is exactly zero.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lpl_pretrain.config.model import DiTConfig
from lpl_pretrain.config.text_layout import TextShape
from lpl_pretrain.diffusion.denoiser import DenoiserOutput, check_hidden_blocks
from lpl_pretrain.models.conditioning import Conditioning
from lpl_pretrain.models.layers import (
    CrossAttention,
    PatchEmbed,
    PatchTransformer,
    TimestepEmbedder,
    attention,
    mlp,
    modulate,
    norm,
    rotary_embedding,
    unpatchify,
)


class DiT(PatchTransformer):
    config: DiTConfig

    def __init__(
        self,
        config: DiTConfig,
        channels: int,
        height: int,
        width: int,
        num_classes: int,
        text: TextShape | None = None,
    ) -> None:
        super().__init__()
        self.set_latent_grid(config, height, width)
        self.x_embedder = PatchEmbed(
            None, config.patch_size, channels, config.width, strict_img_size=False
        )
        self.t_embedder = TimestepEmbedder(
            config.width, last_rate_is_slowest=config.timestep_frequencies == "diffusers"
        )
        self.y_embedder = LabelEmbedder(num_classes, config.width)
        self.text_embedder = self.pooled_embedder = None
        if config.text is not None:
            assert text is not None
            self.text_embedder = nn.Linear(text.width, config.width)
            if text.pooled_width:
                self.pooled_embedder = nn.Linear(text.pooled_width, config.width)
        in_context = text is not None and config.text == "in_context"
        num_prefix_tokens = text.tokens if text is not None and in_context else 0
        self.blocks = nn.ModuleList(
            Block(config, num_prefix_tokens=num_prefix_tokens) for _ in range(config.depth)
        )
        self.final_layer = FinalLayer(
            config, config.patch_size**2 * channels * (1 + config.learned_sigma)
        )
        self._initialise()

    def forward(
        self, z_t: Tensor, t: Tensor, cond: Conditioning, hidden_blocks: tuple[int, ...] = ()
    ) -> DenoiserOutput:
        check_hidden_blocks(hidden_blocks, len(self.blocks))
        rows, columns = z_t.shape[-2] // self.patch, z_t.shape[-1] // self.patch
        tokens = self.x_embedder(z_t.to(self.x_embedder.proj.weight.dtype)) + self.positions(
            rows, columns
        )
        condition = self.t_embedder(t) + self.y_embedder(cond.labels)
        rope = self._rotations(rows, columns, tokens)
        text = None
        if self.text_embedder is not None:
            assert cond.text is not None and cond.pooled is not None
            text = self.text_embedder(cond.text.to(self.text_embedder.weight.dtype))
            if self.pooled_embedder is not None:
                condition = condition + self.pooled_embedder(
                    cond.pooled.to(self.pooled_embedder.weight.dtype)
                )
            if self.config.text == "in_context":
                tokens, text = torch.cat([text.to(tokens.dtype), tokens], dim=1), None
        first_image_token = tokens.shape[1] - rows * columns
        hidden = {}
        for index, block in enumerate(self.blocks):
            tokens = block(tokens, condition, rope, text)
            if index in hidden_blocks:
                hidden[index] = tokens[:, first_image_token:]
        output = self.final_layer(tokens[:, first_image_token:], condition)
        return DenoiserOutput(unpatchify(output, self.patch, rows, columns), hidden)

    def _rotations(self, rows: int, columns: int, tokens: Tensor) -> Tensor | None:
        if not self.config.rope:
            return None
        return rotary_embedding(
            self.config.width // self.config.heads, rows, columns, tokens.device
        ).to(tokens.dtype)

    def _initialise(self) -> None:
        """Initialise as published.

        Xavier for matrices, normal(0.02) for embeddings, zero for every gate and for the output.
        """
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        parameters = dict(self.named_parameters())
        nn.init.xavier_uniform_(parameters["x_embedder.proj.weight"].data.flatten(1))
        nn.init.zeros_(parameters["x_embedder.proj.bias"])
        for name in (
            "y_embedder.embedding_table.weight",
            "t_embedder.mlp.0.weight",
            "t_embedder.mlp.2.weight",
        ):
            nn.init.normal_(parameters[name], std=0.02)
        for name, parameter in parameters.items():
            if (
                "adaLN_modulation" in name
                or "cross_attn.proj" in name
                or name.startswith("final_layer.linear")
            ):
                nn.init.zeros_(parameter)


class Block(nn.Module):
    def __init__(self, config: DiTConfig, *, num_prefix_tokens: int = 0) -> None:
        """`num_prefix_tokens`: text tokens before those of the image; they are not rotated."""
        super().__init__()
        width = config.width
        self.norm1 = norm(width, rms=config.rms_norm)
        self.attn = attention(
            width,
            config.heads,
            qk_norm=config.qk_norm,
            rms=config.rms_norm,
            num_prefix_tokens=num_prefix_tokens,
        )
        self.norm_cross = self.cross_attn = None
        if config.text == "cross_attention":
            self.norm_cross = norm(width, rms=config.rms_norm)
            self.cross_attn = CrossAttention(width, config.heads)
        self.norm2 = norm(width, rms=config.rms_norm)
        self.mlp = mlp(width, config.mlp_ratio, swiglu=config.swiglu)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(
        self,
        tokens: Tensor,
        condition: Tensor,
        rope: Tensor | None = None,
        text: Tensor | None = None,
    ) -> Tensor:
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.adaLN_modulation(condition).chunk(
            6, dim=1
        )
        tokens = tokens + gate_a[:, None] * self.attn(
            modulate(self.norm1(tokens), shift_a, scale_a), rope=rope
        )
        if self.norm_cross is not None and self.cross_attn is not None and text is not None:
            tokens = tokens + self.cross_attn(self.norm_cross(tokens), text)
        return tokens + gate_m[:, None] * self.mlp(modulate(self.norm2(tokens), shift_m, scale_m))


class FinalLayer(nn.Module):
    def __init__(self, config: DiTConfig, outputs: int) -> None:
        super().__init__()
        width = config.width
        self.norm_final = norm(width, rms=config.rms_norm)
        self.linear = nn.Linear(width, outputs)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, tokens: Tensor, condition: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(condition).chunk(2, dim=1)
        return self.linear(modulate(self.norm_final(tokens), shift, scale))


class LabelEmbedder(nn.Module):
    """Embedding with a row per class and a last one for the null class."""

    def __init__(self, num_classes: int, width: int) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + 1, width)

    def forward(self, labels: Tensor) -> Tensor:
        return self.embedding_table(labels)
