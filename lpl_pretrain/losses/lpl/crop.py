"""Random crop of both latents, with a halo so that the compared part has the same surroundings as
in the whole latent.

`side` positions are compared; `halo` more on each side go through the decoder and are cut off every
feature map.  At the latent's border the window is shifted inwards: there the decoder's own padding
is the right surrounding.  The caller draws the positions.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lpl_pretrain.config.lpl import CropConfig


@dataclass(frozen=True, slots=True)
class Windows:
    """One window per sample, in latent positions; (K, 2) int64 are (row, column)."""

    start: Tensor
    """(K, 2) of the window, in the latent."""
    offset_in_window: Tensor
    """(K, 2) of the compared part, in the window."""
    height: int
    width: int
    side: int

    @classmethod
    def at(cls, crop_positions: Tensor, config: CropConfig, height: int, width: int) -> Windows:
        """Windows at `crop_positions` (K, 2) in [0, 1), fractions of the range in which the
        compared part may begin.
        """
        outer = config.side + 2 * config.halo
        sizes = torch.tensor([height, width], device=crop_positions.device)
        first = (crop_positions * (sizes - config.side + 1)).long()
        start = torch.minimum((first - config.halo).clamp(min=0), (sizes - outer).clamp(min=0))
        return cls(start, first - start, min(outer, height), min(outer, width), config.side)

    def cut(self, z: Tensor) -> Tensor:
        """(K, C, H, W) -> (K, C, height, width)."""
        return _take(z, self.start, self.height, self.width)

    def scatter(self, window: Tensor, height: int, width: int) -> Tensor:
        """Transpose of `cut`: the window at its position in zeros (K, C, height, width)."""
        whole = window.new_zeros(len(window), height, width, window.shape[1])
        whole[_index(self.start, self.height, self.width)] = window.movedim(1, -1)
        return whole.movedim(-1, 1).contiguous()

    def interior(self, features: Tensor) -> Tensor:
        """Compared part of a feature map of the windows, at any stage."""
        upscale = features.shape[-2] // self.height
        return _take(
            features, self.offset_in_window * upscale, self.side * upscale, self.side * upscale
        )

    def split(self, size: int) -> list[Windows]:
        pairs = zip(self.start.split(size), self.offset_in_window.split(size), strict=True)
        return [
            Windows(start, offset, self.height, self.width, self.side) for start, offset in pairs
        ]


def _take(x: Tensor, start: Tensor, height: int, width: int) -> Tensor:
    return x.movedim(1, -1)[_index(start, height, width)].movedim(-1, 1)


def _index(start: Tensor, height: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """(sample, row, column), broadcast to (K, height, width)."""
    sample = torch.arange(len(start), device=start.device)[:, None, None]
    row, column = (
        start[:, i, None] + torch.arange(n, device=start.device)
        for i, n in enumerate((height, width))
    )
    return sample, row[:, :, None], column[:, None, :]
