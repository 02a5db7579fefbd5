"""The `ema`, `checkpoint`, `log` and `watchdog` sections: averages of the weights, what a run
writes and when, and when it counts as hung.
"""

from __future__ import annotations

from typing import Annotated, Literal, Optional

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from lpl_pretrain.config.base import Name, Section


class EMAConfig(Section):
    """Averages of the parameters: one exponential, and any number of power-function averages."""

    decay: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.999
    """Decay of the exponential average per update."""
    warmup: bool = True
    """Use min(decay, (1 + step) / (10 + step)), so that early averages are not dominated by the
    initial weights.
    """
    sigma_rel: tuple[Annotated[float, Field(gt=0.01, lt=0.28)], ...] = ()
    """Relative standard deviations of power-function averages that are tracked too (arXiv
    2312.02696, section 3).
    """
    snapshot_every_steps: Optional[PositiveInt] = None
    """Keep the power-function averages at multiples of this step for good: `export --sigma-rel`
    reconstructs averages of any length from them.
    """

    @model_validator(mode="after")
    def _averages_are_there_and_differ(self) -> EMAConfig:
        if self.snapshot_every_steps is not None and not self.sigma_rel:
            raise ValueError(
                f"snapshot_every_steps={self.snapshot_every_steps} without sigma_rel: there is "
                "nothing to keep; add sigma_rel: [0.05, 0.10]"
            )
        if len({power_kind(sigma_rel) for sigma_rel in self.sigma_rel}) < len(self.sigma_rel):
            raise ValueError(
                f"sigma_rel={list(self.sigma_rel)}: two differ by less than 0.001; leave one out"
            )
        return self


def power_kind(sigma_rel: float) -> str:
    """Name of a power-function average in checkpoints and in the key `weights`."""
    return f"ema_power_{sigma_rel:.3f}"


class CheckpointConfig(Section):
    """Times at which checkpoints are saved, and which are kept."""

    every_steps: PositiveInt = 1000
    """Updates between two checkpoints."""
    asynchronous: bool = True
    """Copy the state to host memory (16 bytes a parameter that the rank owns) and train on while it
    is written.
    """
    keep_last: PositiveInt = 3
    """Newest checkpoints that are kept."""
    keep_every_steps: Optional[PositiveInt] = None
    """Checkpoints at multiples of this are never removed."""


TrackerName = Literal["tensorboard", "wandb"]


class WandbConfig(Section):
    """Weights & Biases."""

    mode: Literal["disabled", "online", "offline"] = "disabled"
    """online uploads while training; offline writes files for `wandb sync`."""
    project: Name = "lpl-pretrain"
    """Project of the run."""
    entity: Optional[Name] = None
    """User or team that owns the project; absent: the user's default."""


class LogConfig(Section):
    """Metrics and logs."""

    every_steps: PositiveInt = 50
    """Updates between two lines of metrics."""
    sample_indices: bool = False
    """Log which samples each update trained on too; `lpl-pretrain audit` compares them with the
    planned ones.
    """
    trackers: tuple[TrackerName, ...] = ()
    """Trackers beside metrics.jsonl, which is always written."""
    wandb: WandbConfig = WandbConfig()
    """Weights & Biases."""

    @property
    def active_trackers(self) -> tuple[TrackerName, ...]:
        """Trackers in use: `trackers`, and wandb where its mode says so."""
        if self.wandb.mode == "disabled" or "wandb" in self.trackers:
            return self.trackers
        return (*self.trackers, "wandb")

    @model_validator(mode="after")
    def _wandb_is_not_disabled(self) -> LogConfig:
        if "wandb" in self.trackers and self.wandb.mode == "disabled":
            raise ValueError("trackers names wandb, but wandb.mode=disabled: set online or offline")
        return self


class WatchdogConfig(Section):
    """Definition of a hang: no step has ended for `factor` times the median of the last ones, and
    for at least `at_least_s`.

    Every rank then writes the stacks of its threads (runtime/watchdog.py), and a job of `launch`
    does what `on_hang` of its cluster profile says.
    """

    factor: Annotated[float, Field(gt=1.0)] = 20.0
    """Multiple of the median duration of a step."""
    at_least_s: PositiveFloat = 480.0
    """Shortest time that counts as a hang: less than the 10 minutes after which NCCL aborts without
    stacks, more than the longest step, such as one that saves.
    """
