"""The `optimizer` section: update rule, learning rate, clipping, and what to do about updates that
are not finite or spike.
"""

from __future__ import annotations

from enum import Enum
from typing import Annotated, Literal, Optional

from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from lpl_pretrain.config.base import OnError, Section, UnitInterval


class OnSpike(str, Enum):
    """Reaction to an update whose gradient norm or loss spikes (trainer/spikes.py)."""

    IGNORE = "ignore"
    STOP = "stop"
    SKIP = "skip"
    ROLLBACK = "rollback"


class SpikeConfig(Section):
    """Definition of a spike, and how many a run may have; unused with optimizer.on_spike=ignore."""

    window_updates: PositiveInt = 128
    """Last applied updates whose median and MAD (median absolute deviation) give the bound."""
    min_updates: Annotated[int, Field(ge=8)] = 32
    """No update is a spike while the window holds fewer than this."""
    threshold_mads: PositiveFloat = 8.0
    """A spike is this many 1.4826 * MAD above the median, both of logarithms."""
    min_factor: Annotated[float, Field(gt=1.0)] = 2.0
    """A spike is also at least this many times the median."""
    noise_levels: Annotated[int, Field(ge=1, le=64)] = 8
    """Equal parts of the timestep distribution whose losses are watched separately."""
    skip_updates: PositiveInt = 1
    """rollback: updates, from that of the spike on, whose samples are skipped."""
    max_events: NonNegativeInt = 20
    """skip and rollback: stop the run after more spikes than this."""

    @model_validator(mode="after")
    def _window_can_fill(self) -> SpikeConfig:
        if self.min_updates > self.window_updates:
            raise ValueError(
                f"min_updates={self.min_updates} with window_updates={self.window_updates}: "
                "the window would never hold enough; lower min_updates or raise window_updates"
            )
        return self


class OptimizerConfig(Section):
    """Optimizer, learning-rate schedule, gradient clipping and guards."""

    kind: Literal["adamw", "muon", "sgd"] = "adamw"
    """muon: Muon for matrices of the blocks, AdamW for everything else (trainer/optimizer.py)."""
    lr: PositiveFloat = 1e-4
    """Learning rate after the warm-up."""
    betas: tuple[UnitInterval, UnitInterval] = (0.9, 0.999)
    """AdamW: decay rates of the first and second moment."""
    eps: PositiveFloat = 1e-8
    """AdamW: constant added to the denominator."""
    momentum: UnitInterval = 0.95
    """muon: decay rate of the momentum."""
    weight_decay: NonNegativeFloat = 0.0
    """Decoupled weight decay, times the learning rate at each update; for sgd an L2 penalty."""
    max_grad_norm: PositiveFloat = 1.0
    """Global norm that gradients are clipped to; a large number switches clipping off."""
    warmup_steps: NonNegativeInt = 0
    """Updates over which the learning rate grows linearly to `lr`."""
    lr_schedule: Literal["constant", "cosine", "inverse_sqrt"] = "constant"
    """Learning rate after the warm-up: constant, a cosine to zero at `steps`, or 1 / sqrt of the
    step from `decay_from_steps` on.
    """
    decay_from_steps: Optional[PositiveInt] = None
    """inverse_sqrt: lr / sqrt(max(step / this, 1)) (arXiv 2312.02696, equation 67)."""
    on_nonfinite: OnError = OnError.STOP
    """Reaction to a loss or gradient that is not finite: stop, with the parameters before that
    update, or skip the update, log it and go on.
    """
    max_skipped_updates: NonNegativeInt = 10
    """Largest number of skipped updates of a run that on_nonfinite skip accepts."""
    on_spike: OnSpike = OnSpike.IGNORE
    """Reaction to a gradient norm or loss far above those of the last updates: ignore it; stop,
    with the parameters before that update; skip that update; rollback: restore the newest
    checkpoint and skip the samples of that update.
    """
    spike: SpikeConfig = SpikeConfig()
    """Definition of a spike."""

    @model_validator(mode="after")
    def _inverse_sqrt_has_its_start(self) -> OptimizerConfig:
        if (self.lr_schedule == "inverse_sqrt") != (self.decay_from_steps is not None):
            raise ValueError(
                f"decay_from_steps={self.decay_from_steps} with lr_schedule={self.lr_schedule}: "
                "set it with inverse_sqrt and only with it"
            )
        return self
