"""How much LPL counts at a step: an explicit weight, or one measured so that LPL is a given share
of the total loss.

With a target share s the weight is  w = s / (1 - s) * E[L_diff] / E[gate * L_LPL]  over
`calibration_steps` steps from `start_step` on; until then it is 0, afterwards it is frozen, saved
in every checkpoint and never measured again.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lpl_pretrain.config.lpl import LPLConfig
from lpl_pretrain.errors import NonFiniteError


@dataclass
class LPLWeight:
    config: LPLConfig
    frozen: float | None = field(init=False)
    sums: Tensor = field(default_factory=lambda: torch.zeros(2, dtype=torch.float64))
    """Of the diffusion loss and of LPL since `start_step`; on the device, and looked at when the
    weight is frozen or saved.
    """

    def __post_init__(self) -> None:
        assert isinstance(self.config.start_step, int), (
            "TrainConfig resolves a fraction of its steps"
        )
        self.frozen = self.config.weight

    def active(self, step: int) -> bool:
        """Whether the decoder runs at all in this step (0-based)."""
        return step >= self.config.start_step

    def calibrating(self, step: int) -> bool:
        return self.frozen is None and self.active(step)

    def value(self, step: int) -> float:
        if self.frozen is None or not self.active(step):
            return 0.0
        first = self.config.first_weighted_step
        ramp = (
            min(1.0, (step - first + 1) / self.config.ramp_steps) if self.config.ramp_steps else 1.0
        )
        return self.frozen * ramp

    def observe(self, step: int, means: Tensor) -> bool:
        """`means` (2,) float64: diffusion loss and LPL of one step over the global batch (gated-out
        samples as zeros).

        True at the step that freezes the weight.
        """
        self.sums = self.sums.to(means.device) + means
        if step + 1 < self.config.first_weighted_step:
            return False
        diffusion, perceptual = self.sums.tolist()
        if not perceptual > 0.0:
            raise NonFiniteError(
                f"lpl.target_fraction={self.config.target_fraction}: LPL summed to {perceptual} "
                "over "
                f"{self.config.calibration_steps} calibration steps, so no weight gives it a "
                "share: open lpl.gate, "
                "raise lpl.calibration_steps, or set lpl.weight"
            )
        share = self.config.target_fraction
        assert share is not None
        self.frozen = share / (1 - share) * diffusion / perceptual
        return True

    def state(self) -> dict[str, Any]:
        diffusion, perceptual = self.sums.tolist()
        return {"frozen": self.frozen, "diffusion_sum": diffusion, "perceptual_sum": perceptual}

    def load_state(self, state: dict[str, Any]) -> None:
        self.frozen = state["frozen"]
        self.sums = torch.tensor(
            [state["diffusion_sum"], state["perceptual_sum"]], dtype=torch.float64
        )
