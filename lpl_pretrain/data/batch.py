"""What the trainer gets from the data: latents as stored, not yet sampled or normalised.

Shapes: moments (B, 2C, H, W) float32, the posterior's mean then its standard deviation;  labels, sample_indices (B,) int64.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class LatentBatch:
    moments: Tensor
    labels: Tensor
    """Class id; -1 is no class."""
    sample_indices: Tensor
    """Global sample counts: they name the random draws of each sample (runtime/rng.py)."""

    def to(self, device: torch.device | str) -> LatentBatch:
        """Does not wait for the copy when the batch is pinned."""
        return LatentBatch(*(tensor.to(device, non_blocking=True) for tensor in (self.moments, self.labels, self.sample_indices)))

    def pin_memory(self) -> LatentBatch:
        return LatentBatch(*(tensor.pin_memory() for tensor in (self.moments, self.labels, self.sample_indices)))
