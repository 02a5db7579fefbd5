"""Keeps an exponential moving average of the parameter pieces that this rank owns.

The average has the pieces' own precision (float32 masters, never their bf16 copies, so it moves however small the updates are) and
their ranges, so nothing is ever gathered.  A piece is any dataclass with a live `tensor`: this room knows no strategy and no file.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

import torch

from lpl_pretrain.config.schema import EMAConfig
from lpl_pretrain.ema.profiles import decay_at


class EMATracker:
    def __init__(self, pieces: Iterable[Any], config: EMAConfig) -> None:
        """Starts at the current values of `pieces` (strategy.local_params() after setup)."""
        self.config = config
        self._live = list(pieces)
        self._averages = [replace(piece, tensor=piece.tensor.detach().clone()) for piece in self._live]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Not collective: average <- average + (1 - decay) (parameter - average), after update number `step` (1 is the first)."""
        if self._live:
            weight = 1.0 - decay_at(step, self.config.decay, self.config.warmup)
            torch._foreach_lerp_([piece.tensor for piece in self._averages], [piece.tensor for piece in self._live], weight)

    def pieces(self) -> Iterator[Any]:
        """The average, on the ranges of the live pieces; writing to the tensors restores it."""
        return iter(self._averages)
