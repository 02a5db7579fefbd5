"""The `diffusion` and `conditioning` sections: what the denoiser predicts, along which schedule, at
which timesteps, with which loss weights, and given which condition.
"""

from __future__ import annotations

import math
from enum import Enum
from typing import Annotated, Literal, Union

from pydantic import Field, PositiveFloat

from lpl_pretrain.config.base import Name, Section, UnitInterval
from lpl_pretrain.config.encode import TextEncoderConfig


class Prediction(str, Enum):
    """Target of the denoiser (diffusion/objective.py)."""

    EPS = "eps"
    V = "v"
    FLOW = "flow"


class ScheduleKind(str, Enum):
    """Path from data to noise (diffusion/schedule.py)."""

    RECTIFIED_FLOW = "rectified_flow"
    LINEAR = "linear"
    SCALED_LINEAR = "scaled_linear"
    COSINE = "cosine"


class TimestepConfig(Section):
    """Distribution of timesteps, drawn by strata over the global batch (diffusion/timesteps.py)."""

    distribution: Literal["uniform", "logit_normal", "mode", "cosmap"] = "uniform"
    """Distribution of t (arXiv 2403.03206, section 3.1)."""
    mean: float = 0.0
    """logit_normal: mean of the normal variable whose logistic function is t."""
    std: PositiveFloat = 1.0
    """logit_normal: standard deviation of that normal variable."""
    mode_scale: Annotated[float, Field(ge=-1.0, le=2 / (math.pi - 2))] = 1.29
    """mode: above 0 favours the middle of t, below 0 its ends (arXiv 2403.03206, equation 20)."""
    shift: PositiveFloat = 1.0
    """rectified_flow: above 1 trains at more noise, as larger images need:
    sqrt(pixels / pixels of the reference) (arXiv 2403.03206, equation 23).
    """


class WeightingConfig(Section):
    """Loss weight as a function of the noise level (diffusion/weighting.py)."""

    kind: Literal["uniform", "min_snr", "soft_min_snr", "p2", "sigmoid"] = "uniform"
    """Weight function; formulas and sources: diffusion/weighting.py."""
    gamma: PositiveFloat = 5.0
    """min_snr: SNR above which the weight is constant; soft_min_snr: SNR at which it bends."""
    k: PositiveFloat = 1.0
    """p2: constant added to the SNR."""
    power: PositiveFloat = 1.0
    """p2: exponent of SNR + k."""
    bias: float = 0.0
    """sigmoid: log-SNR at which the weight is one half."""


class DiffusionConfig(Section):
    """Diffusion process and its loss."""

    prediction: Prediction
    """Target of the denoiser."""
    schedule: ScheduleKind
    """Path from data to noise."""
    timesteps: TimestepConfig = TimestepConfig()
    """Distribution of the timesteps that are trained."""
    weighting: WeightingConfig = WeightingConfig()
    """Weight of each noise level in the diffusion loss."""
    zero_terminal_snr: bool = False
    """Rescale a discrete schedule so that its last timestep is pure noise (arXiv 2305.08891,
    algorithm 1); for v-prediction only.
    """


class ConditioningConfig(Section):
    """Class labels and text that the denoiser is conditioned on."""

    label_dropout: UnitInterval = 0.1
    """Fraction of samples trained with the null class, for classifier-free guidance (arXiv
    2207.12598).
    """
    text_encoders: tuple[Union[Name, tuple[Name, ...]], ...] = ()
    """Text encoders whose embeddings the model reads, concatenated along the sequence; those of an
    inner list along the channels: [[clip_l, clip_g], t5].
    """
    online_encoders: dict[Name, TextEncoderConfig] = {}
    """Text encoders of `text_encoders` that run during training, on the data's captions, by name;
    the embeddings of the others are read from the data folder.
    """
    text_dropout: UnitInterval = 0.1
    """Fraction of samples trained with the null text, the embeddings of the empty caption."""
