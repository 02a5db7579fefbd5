"""Keeps exponential moving averages of the parameter ranges that this rank owns.

The averages have the precision of the ranges (float32 masters, never their bf16 copies, so that
small updates count), and nothing is ever gathered.  A range is any dataclass with a live `tensor`,
such as `ParamRange`: this package knows no strategy and no file.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

import torch

from lpl_pretrain.config.schema import EMAConfig, power_kind
from lpl_pretrain.ema.profiles import decay_at, power_decay_at

MAIN = "ema"


class EMATracker:
    def __init__(self, ranges: Iterable[Any], config: EMAConfig) -> None:
        """Starts at the current values of `ranges` (strategy.local_params() after setup)."""
        self.config = config
        self._live = list(ranges)
        kinds = [MAIN, *(power_kind(sigma_rel) for sigma_rel in config.sigma_rel)]
        self._averages = {
            kind: [replace(part, tensor=part.tensor.detach().clone()) for part in self._live]
            for kind in kinds
        }

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Not collective: average <- average + (1 - decay) (parameter - average), after update
        number `step` (1 is the first).
        """
        decays = {MAIN: decay_at(step, self.config.decay, self.config.warmup)}
        decays |= {
            power_kind(sigma_rel): power_decay_at(step, sigma_rel)
            for sigma_rel in self.config.sigma_rel
        }
        if not self._live:
            return
        for kind, decay in decays.items():
            averages = [part.tensor for part in self._averages[kind]]
            torch._foreach_lerp_(averages, [part.tensor for part in self._live], 1.0 - decay)

    def local_averages(self, *, power_only: bool = False) -> Iterator[tuple[str, Any]]:
        """(kind, range of that average), on the ranges of the live ranges; writing to the tensors
        restores it.
        """
        for kind, averages in self._averages.items():
            if kind != MAIN or not power_only:
                yield from ((kind, part) for part in averages)
