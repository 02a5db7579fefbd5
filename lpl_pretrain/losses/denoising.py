"""The diffusion loss: weighted squared error of the prediction (eps, v or flow velocity)."""

from __future__ import annotations

from lpl_pretrain.config.schema import DiffusionConfig
from lpl_pretrain.diffusion.objective import Denoising
from lpl_pretrain.diffusion.weighting import loss_weight
from lpl_pretrain.losses.term import Draws, LossTerm, Meter, TermContext, TermValue


class DenoisingLoss(LossTerm):
    """Mean over samples of  weight(noise level) * mean squared error."""

    name = "diffusion"

    def __init__(self, config: DiffusionConfig) -> None:
        self.config = config

    def __call__(self, draws: Draws, out: Denoising, meter: Meter) -> TermValue:
        weight = loss_weight(self.config.weighting, self.config.prediction, out.noise_level)
        return TermValue((weight * out.mse).mean(), out.mse.detach())


def build_denoising(context: TermContext) -> DenoisingLoss:
    return DenoisingLoss(context.config.diffusion)
