"""The variational bound that trains a learned variance (arXiv 2102.09672, section 3.1)."""

from __future__ import annotations

from lpl_pretrain.diffusion.learned_sigma import variational_bound
from lpl_pretrain.diffusion.objective import Denoising
from lpl_pretrain.diffusion.schedule import DiscreteSchedule
from lpl_pretrain.losses.term import Draws, LossTerm, Meter, TermContext, TermValue


class VariationalBound(LossTerm):
    """Mean over samples of the bound in bits a latent value; its gradient reaches the variance
    channels alone.
    """

    name = "variational_bound"

    def __init__(self, schedule: DiscreteSchedule) -> None:
        self.schedule = schedule

    def __call__(self, draws: Draws, out: Denoising, meter: Meter) -> TermValue:
        bound = variational_bound(self.schedule, draws.t, out)
        return TermValue(bound.mean(), bound.detach())


def build_variational_bound(context: TermContext) -> VariationalBound | None:
    """Build the term; None without `model.learned_sigma`."""
    if not getattr(context.config.model, "learned_sigma", False):
        return None
    assert isinstance(context.schedule, DiscreteSchedule)
    return VariationalBound(context.schedule)
