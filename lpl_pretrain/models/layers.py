"""The pieces that transformers are built of: timm's patch embedding, attention and MLP, under one roof.

Tokens are (B, N, D); images of tokens are row-major.
"""

from __future__ import annotations

import math

import torch
from timm.layers import GELUTanh, Mlp, PatchEmbed
from timm.layers.attention import Attention
from torch import Tensor, nn

__all__ = ["Attention", "GELUTanh", "Mlp", "PatchEmbed", "TimestepEmbedder", "modulate", "sincos_position_embedding", "unpatchify"]


class TimestepEmbedder(nn.Module):
    """Sinusoids of 1000 t, then an MLP (arXiv 2006.11239, appendix B; frequencies as in arXiv 2212.09748)."""

    rates: Tensor  # (frequencies / 2,)

    def __init__(self, width: int, frequencies: int = 256) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(frequencies, width), nn.SiLU(), nn.Linear(width, width))
        half = frequencies // 2
        rates = torch.exp(-math.log(10_000) * torch.arange(half, dtype=torch.float64) / half)
        self.register_buffer("rates", rates.float(), persistent=False)

    def forward(self, t: Tensor) -> Tensor:
        angles = 1000 * t.float()[:, None] * self.rates.float()
        sinusoids = torch.cat([angles.cos(), angles.sin()], dim=1)
        return self.mlp(sinusoids.to(next(self.mlp.parameters()).dtype))


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x (B, N, D), shift and scale (B, D)."""
    return x * (1 + scale[:, None]) + shift[:, None]


def sincos_position_embedding(width: int, rows: int, columns: int) -> Tensor:
    """(1, rows * columns, width) float32: half of the width encodes the column, half the row, as in the published DiT."""
    quarter = width // 4
    rates = 1.0 / 10_000 ** (torch.arange(quarter, dtype=torch.float64) / quarter)
    row, column = torch.meshgrid(torch.arange(rows, dtype=torch.float64), torch.arange(columns, dtype=torch.float64), indexing="ij")
    parts = [f(axis.reshape(-1, 1) * rates) for axis in (column, row) for f in (torch.sin, torch.cos)]
    return torch.cat(parts, dim=1).float()[None]


def unpatchify(tokens: Tensor, patch: int, rows: int, columns: int) -> Tensor:
    """(B, rows * columns, patch * patch * C) -> (B, C, rows * patch, columns * patch)."""
    channels = tokens.shape[-1] // patch**2
    grid = tokens.unflatten(1, (rows, columns)).unflatten(-1, (patch, patch, channels))
    return torch.einsum("brcpqz->bzrpcq", grid).reshape(len(tokens), channels, rows * patch, columns * patch)
