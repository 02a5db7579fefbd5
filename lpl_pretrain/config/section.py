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
    kind: Literal["uniform", "min_snr"] = "uniform"
    gamma: PositiveFloat = 5.0
    """Clamp of the SNR (min_snr; arXiv 2303.09556, equation 7)."""
