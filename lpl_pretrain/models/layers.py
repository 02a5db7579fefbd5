"""Layers of the transformers, among them timm's patch embedding, attention and MLP.

Tokens are (B, N, D), in row-major order of the image's patches.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from timm.layers import GELUTanh, Mlp, PatchEmbed, SwiGLU, build_rotary_pos_embed
from timm.layers.attention import AttentionRope
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from lpl_pretrain.config.model import TransformerConfig
from lpl_pretrain.diffusion.denoiser import Denoiser

__all__ = [
    "CrossAttention",
    "PatchEmbed",
    "PatchTransformer",
    "TimestepEmbedder",
    "attention",
    "mlp",
    "modulate",
    "norm",
    "rotary_embedding",
    "sincos_position_embedding",
    "unpatchify",
]


class TimestepEmbedder(nn.Module):
    """Sinusoids of 1000 t, then an MLP (arXiv 2006.11239, appendix B; frequencies as in arXiv
    2212.09748).
    """

    rates: Tensor  # (frequencies / 2,)

    def __init__(
        self, width: int, frequencies: int = 256, *, last_rate_is_slowest: bool = False
    ) -> None:
        """Rates fall from 1 towards 1/10,000.

        The last rate reaches it with `last_rate_is_slowest` (diffusers' DiT).
        """
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(frequencies, width), nn.SiLU(), nn.Linear(width, width))
        half = frequencies // 2
        rates = torch.exp(
            -math.log(10_000)
            * torch.arange(half, dtype=torch.float64)
            / (half - last_rate_is_slowest)
        )
        self.register_buffer("rates", rates.float(), persistent=False)

    def forward(self, t: Tensor) -> Tensor:
        angles = 1000 * t.float()[:, None] * self.rates.float()
        sinusoids = torch.cat([angles.cos(), angles.sin()], dim=1)
        return self.mlp(sinusoids.to(next(self.mlp.parameters()).dtype))


class PatchTransformer(Denoiser):
    """Base of DiT and MMDiT: patch positions and the list of blocks."""

    config: TransformerConfig
    blocks: nn.ModuleList
    pos_embed: Tensor  # (1, tokens, width)

    def set_latent_grid(self, config: TransformerConfig, height: int, width: int) -> None:
        """Set the patch grid from the sides of the most common latents; buckets may have others."""
        self.config, self.patch = config, config.patch_size
        self.rows, self.columns = height // config.patch_size, width // config.patch_size
        # a buffer, not a parameter: sharding would pad it to the world size
        self.register_buffer(
            "pos_embed", self._positions_of(self.rows, self.columns), persistent=False
        )

    def sharded_blocks(self) -> list[str]:
        return [f"blocks.{i}" for i in range(len(self.blocks))]

    def positions(self, rows: int, columns: int) -> Tensor:
        """(1, rows * columns, width) position embedding.

        Buckets of other shapes count their patches from the same corner, at the same distance.
        """
        if (rows, columns) == (self.rows, self.columns):
            return self.pos_embed
        return self._positions_of(rows, columns).to(self.pos_embed)

    def _positions_of(self, rows: int, columns: int) -> Tensor:
        distance = (self.config.position_side or self.rows) / self.rows
        return sincos_position_embedding(self.config.width, rows, columns, distance)


def norm(width: int, *, rms: bool) -> nn.Module:
    """Norm without learned scale and shift: those come from the condition."""
    return (nn.RMSNorm if rms else nn.LayerNorm)(width, elementwise_affine=False, eps=1e-6)


def attention(
    width: int, heads: int, *, qk_norm: bool, rms: bool, num_prefix_tokens: int = 0
) -> AttentionRope:
    """Self-attention; `rope` rotates all tokens but the first `num_prefix_tokens`."""
    per_head: Any = partial(nn.RMSNorm if rms else nn.LayerNorm, eps=1e-6)
    return AttentionRope(
        width, heads, num_prefix_tokens=num_prefix_tokens, qk_norm=qk_norm, norm_layer=per_head
    )


class CrossAttention(nn.Module):
    """Attention from image tokens to text tokens of the same width.

    As in PixArt (arXiv 2310.00426, section 2.3).
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(width, 2 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, tokens: Tensor, text: Tensor) -> Tensor:
        query = self.q(tokens).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        key, value = (
            self.kv(text.to(tokens.dtype))
            .unflatten(-1, (2, self.heads, -1))
            .permute(2, 0, 3, 1, 4)
            .unbind(0)
        )
        return self.proj(scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2))


def mlp(width: int, ratio: float, *, swiglu: bool) -> nn.Module:
    hidden = int(width * ratio)
    return (
        SwiGLU(width, hidden * 2 // 3, align_to=16)
        if swiglu
        else Mlp(width, hidden, act_layer=GELUTanh)
    )


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x (B, N, D), shift and scale (B, D)."""
    return x * (1 + scale[:, None]) + shift[:, None]


def sincos_position_embedding(width: int, rows: int, columns: int, distance: float = 1.0) -> Tensor:
    """(1, rows * columns, width) float32, as in the published DiT.

    Half of the width encodes the column, half the row.  `distance` is that between neighbours;
    below 1, more of them lie in the range that a model has learnt.
    """
    quarter = width // 4
    rates = 1.0 / 10_000 ** (torch.arange(quarter, dtype=torch.float64) / quarter)
    along = [distance * torch.arange(count, dtype=torch.float64) for count in (rows, columns)]
    row, column = torch.meshgrid(*along, indexing="ij")
    parts = [
        f(axis.reshape(-1, 1) * rates) for axis in (column, row) for f in (torch.sin, torch.cos)
    ]
    return torch.cat(parts, dim=1).float()[None]


def rotary_embedding(head_width: int, rows: int, columns: int, device: torch.device) -> Tensor:
    """(rows * columns, 2 * head_width), as timm's attention takes it.

    Half of a head rotates with the row, half with the column.
    """
    sine, cosine = build_rotary_pos_embed(
        [rows, columns], dim=head_width, in_pixels=False, device=device
    )
    return torch.cat([sine, cosine], dim=-1)


def unpatchify(tokens: Tensor, patch: int, rows: int, columns: int) -> Tensor:
    """(B, rows * columns, patch * patch * C) -> (B, C, rows * patch, columns * patch)."""
    channels = tokens.shape[-1] // patch**2
    grid = tokens.unflatten(1, (rows, columns)).unflatten(-1, (patch, patch, channels))
    return torch.einsum("brcpqz->bzrpcq", grid).reshape(
        len(tokens), channels, rows * patch, columns * patch
    )
