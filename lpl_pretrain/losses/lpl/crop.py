"""The same random window of both latents, with a halo that gives its inside the surroundings it has
in the whole latent.

`side` positions are compared; `halo` more on each side go through the decoder and are cut off every
feature map.  At the latent's border the window is shifted inwards: there the decoder's own padding
is the right surrounding.  Places are given, not drawn.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lpl_pretrain.config.lpl import CropConfig


@dataclass(frozen=True, slots=True)
class Windows:
    """One window per sample, in latent positions; (K, 2) int64 are (row, column)."""

    start: Tensor  # (K, 2) in the latent
    offset_in_window: Tensor  # (K, 2) of what is compared, in the window
    height: int
    width: int
    side: int

    @classmethod
    def at(cls, places: Tensor, config: CropConfig, height: int, width: int) -> Windows:
        """`places` (K, 2) in [0, 1): where in the range of possible positions the compared part
        begins.
        """
        outer = config.side + 2 * config.halo
        sizes = torch.tensor([height, width], device=places.device)
        first = (places * (sizes - config.side + 1)).long()
        start = torch.minimum((first - config.halo).clamp(min=0), (sizes - outer).clamp(min=0))
        return cls(start, first - start, min(outer, height), min(outer, width), config.side)

    def cut(self, z: Tensor) -> Tensor:
        """(K, C, H, W) -> (K, C, height, width)."""
        return _take(z, self.start, self.height, self.width)

    def scatter(self, window: Tensor, height: int, width: int) -> Tensor:
        """The transpose of `cut`: zeros (K, C, height, width) with the window in its place."""
        whole = window.new_zeros(len(window), height, width, window.shape[1])
        whole[_index(self.start, self.height, self.width)] = window.movedim(1, -1)
        return whole.movedim(-1, 1).contiguous()

    def interior(self, features: Tensor) -> Tensor:
        """Of a feature map of the windows (any stage): the part that is compared."""
        upscale = features.shape[-2] // self.height
        return _take(
            features, self.offset_in_window * upscale, self.side * upscale, self.side * upscale
        )

    def split(self, size: int) -> list[Windows]:
        pairs = zip(self.start.split(size), self.offset_in_window.split(size), strict=True)
        return [
            Windows(start, inside, self.height, self.width, self.side) for start, inside in pairs
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
