"""Weight of LPL at a step: configured, or calibrated so that LPL is a given fraction of the total
loss.

For a target fraction s the weight is  w = s / (1 - s) * E[L_diff] / E[gate * L_LPL]  over
`calibration_steps` steps from `start_step` on.  Until then it is 0; afterwards it is constant (but
for the ramp), saved in every checkpoint and never measured again.
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
    calibrated: float | None = field(init=False)
    """The weight without its ramp; None until it is known."""
    sums: Tensor = field(default_factory=lambda: torch.zeros(2, dtype=torch.float64))
    """Sums of the other terms and of LPL since `start_step`; on the device, and read by the host
    when the calibration ends and at checkpoints.
    """

    def __post_init__(self) -> None:
        assert isinstance(self.config.start_step, int), (
            "TrainConfig resolves a fraction of its steps"
        )
        self.calibrated = self.config.weight

    def active(self, step: int) -> bool:
        """Whether the decoder runs at all in this step (from 0)."""
        return step >= self.config.start_step

    def calibrating(self, step: int) -> bool:
        return self.calibrated is None and self.active(step)

    def value(self, step: int) -> float:
        if self.calibrated is None or not self.active(step):
            return 0.0
        first = self.config.first_weighted_step
        ramp_steps = self.config.ramp_steps
        ramp = min(1.0, (step - first + 1) / ramp_steps) if ramp_steps else 1.0
        return self.calibrated * ramp

    def observe(self, step: int, means: Tensor) -> bool:
        """Add the means of one step; True at the step that ends the calibration.

        `means` (2,) float64: weighted sum of the other terms, and LPL, over the global batch
        (gated-out samples as zeros); both 0 for a skipped update.  Raises NonFiniteError when no
        weight can give LPL its fraction.
        """
        self.sums = self.sums.to(means.device) + means
        if step + 1 < self.config.first_weighted_step:
            return False
        others, lpl = self.sums.tolist()
        if others == lpl == 0.0:  # all updates so far were skipped
            return False
        if not lpl > 0.0:
            raise NonFiniteError(
                f"lpl.target_fraction={self.config.target_fraction}: LPL summed to {lpl} over "
                f"{self.config.calibration_steps} calibration steps, so no weight gives it a "
                "share: open lpl.gate, raise lpl.calibration_steps, or set lpl.weight"
            )
        fraction = self.config.target_fraction
        assert fraction is not None
        self.calibrated = fraction / (1 - fraction) * others / lpl
        return True

    def state(self) -> dict[str, Any]:
        others, lpl = self.sums.tolist()
        return {"frozen": self.calibrated, "diffusion_sum": others, "perceptual_sum": lpl}

    def load_state(self, state: dict[str, Any]) -> None:
        self.calibrated = state["frozen"]
        self.sums = torch.tensor(
            [state["diffusion_sum"], state["perceptual_sum"]], dtype=torch.float64
        )
