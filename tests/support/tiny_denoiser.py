"""A tiny denoiser for tests of sharding, and its data, a function of (step, sample).

No world size divides its widths, which exercises padding and uneven shards.  `gain` has one
element, so of two ranks one owns none of it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

CLASSES, CHANNELS, WIDTH, HIDDEN = 3, 3, 5, 7
GLOBAL_BATCH = 16


@dataclass(frozen=True)
class Cond:
    labels: Tensor  # (B,) int64


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(x)))


class TinyDenoiser(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(CLASSES, WIDTH)
        self.inner = nn.Linear(CHANNELS + 1, WIDTH)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(WIDTH, CHANNELS)
        self.gain = nn.Parameter(torch.ones(1))
        self.register_buffer("shift", torch.linspace(0, 1, WIDTH), persistent=False)

    def forward(self, z_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        x = self.inner(torch.cat([z_t, t[:, None]], dim=1)) + self.embed(cond.labels) + self.shift
        for block in self.blocks:
            x = block(x)
        return self.gain * self.head(x)


BLOCKS = ["blocks.0", "blocks.1"]


def tiny_denoiser(seed: int = 0) -> TinyDenoiser:
    torch.manual_seed(seed)
    return TinyDenoiser()


def batch(step: int, samples: range, device: torch.device) -> tuple[Tensor, Tensor, Cond, Tensor]:
    """(z_t, t, cond, target) of these samples of a global batch."""
    rows = [
        torch.randn(2 * CHANNELS, generator=torch.Generator().manual_seed(1000 * step + i))
        for i in samples
    ]
    values = torch.stack(rows).to(device)
    t = torch.tensor([(7 * i + step) % 11 / 11 for i in samples], device=device)
    return (
        values[:, :CHANNELS],
        t,
        Cond(torch.tensor([(i + step) % CLASSES for i in samples], device=device)),
        values[:, CHANNELS:],
    )
