"""Loss scaling for fp16: lifts gradients that float16 would round to zero.

As in arXiv 1710.03740, section 3.2, with the constants of `torch.amp.GradScaler`.  The scale is
divided out again in float32, before clipping.  It lives on the device, where the gradient norm is
known, and is the same on every rank.  Without fp16 it is 1 and stays so.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

INITIAL_SCALE = 2.0**16
MIN_SCALE = 1.0
GROWTH_INTERVAL_STEPS = 2000


class LossScale:
    def __init__(self, device: torch.device, *, dynamic: bool = False) -> None:
        """`dynamic`: adapt the scale, for fp16."""
        self.dynamic = dynamic
        self._scale = torch.tensor(INITIAL_SCALE if dynamic else 1.0, device=device)
        self._good_updates = torch.zeros((), dtype=torch.int64, device=device)
        """Updates with a finite gradient since the scale last changed."""

    @property
    def factor(self) -> Tensor | float:
        """Scale by which a loss is multiplied: () float32 on the device, or 1."""
        return self._scale if self.dynamic else 1.0

    @property
    def value(self) -> float:
        """The scale on the host, which waits for the device with fp16."""
        return self._scale.item() if self.dynamic else 1.0

    def update(self, *, finite: Tensor) -> Tensor:
        """Adapts the scale to whether the gradient of an update was `finite` (() bool on the
        device); call after each one.

        Returns whether the scale was lowered, () bool.
        """
        if not self.dynamic:
            return torch.zeros_like(finite)
        good_updates = self._good_updates + 1
        grown = good_updates == GROWTH_INTERVAL_STEPS
        previous = self._scale
        lowered = (previous / 2).clamp(min=MIN_SCALE)
        self._scale = torch.where(finite, torch.where(grown, previous * 2, previous), lowered)
        self._good_updates = torch.where(finite & ~grown, good_updates, 0)
        return self._scale < previous

    def state(self) -> dict[str, Any]:
        """State for checkpoints; waits for the device."""
        return {
            "value": self.value,
            "dynamic": self.dynamic,
            "good_updates": int(self._good_updates) if self.dynamic else 0,
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Restores the scale of a run in fp16; a run in another precision keeps its own."""
        if self.dynamic and state["dynamic"]:
            self._scale = torch.full_like(self._scale, state["value"])
            self._good_updates = torch.full_like(self._good_updates, int(state["good_updates"]))
