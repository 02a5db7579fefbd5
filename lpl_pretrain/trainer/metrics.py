"""Metrics since the last log step: weighted sums kept on the device, reduced over ranks and read by
the host once per log step.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lpl_pretrain.runtime.dist import mean_over_ranks


class Meter:
    """Every rank adds the same names in the same order, so that one collective over one tensor
    reduces them all.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.sums: dict[str, Tensor] = {}
        self.update: dict[str, Tensor] = {}
        """Sums of the current update."""

    def add(self, name: str, values: Tensor, weights: Tensor | None = None) -> None:
        """Add to a weighted mean; a mean over weights that sum to 0 is reported as absent."""
        values = values.detach().double()
        weights = torch.ones_like(values) if weights is None else weights.detach().double()
        pair = torch.stack([torch.where(weights > 0, values * weights, 0.0).sum(), weights.sum()])
        self.update[name] = self.update[name] + pair if name in self.update else pair

    def end_update(self, *, applied: Tensor) -> None:
        """Keep the sums of the update if it was `applied` (() bool, on the device), else forget
        them: one skipped update would make every mean NaN.
        """
        for name, pair in self.update.items():
            kept = torch.where(applied, pair, 0.0)
            self.sums[name] = self.sums[name] + kept if name in self.sums else kept
        self.update = {}

    def flush(self) -> dict[str, float]:
        """Collective. Means over the global batches since the last flush; the host waits for the
        device.
        """
        if not self.sums:
            return {}
        reduced = mean_over_ranks(torch.stack(list(self.sums.values()))).tolist()
        names = list(self.sums)
        self.sums = {}
        return {
            name: total / weight
            for name, (total, weight) in zip(names, reduced, strict=True)
            if weight > 0
        }
