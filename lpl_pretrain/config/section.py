"""What every section of a configuration is, and the pieces that several of them share."""

from __future__ import annotations

from enum import Enum
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat

Share = Annotated[float, Field(ge=0.0, le=1.0)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class OnError(str, Enum):
    """What becomes of a sample that cannot be read: an error that names it, or another sample in its place, counted and logged."""

    STOP = "stop"
    SKIP = "skip"


class WeightingConfig(Section):
    kind: Literal["uniform", "min_snr", "soft_min_snr", "p2", "sigmoid"] = "uniform"
    """Formulas and sources: diffusion/weighting.py."""
    gamma: PositiveFloat = 5.0
    """SNR from which min_snr stops growing, and around which soft_min_snr bends."""
    k: PositiveFloat = 1.0
    """p2: added to the SNR."""
    power: PositiveFloat = 1.0
    """p2: exponent of SNR + k."""
    bias: float = 0.0
    """sigmoid: log-SNR at which the weight is a half."""
