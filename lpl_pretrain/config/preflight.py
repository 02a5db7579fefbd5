"""What a node must have for training to begin on it (lpl_pretrain/preflight)."""

from __future__ import annotations

from typing import Annotated, Optional

from pydantic import Field, NonNegativeFloat, PositiveFloat

from lpl_pretrain.config.base import Section


class PreflightConfig(Section):
    min_free_gib: Optional[NonNegativeFloat] = None
    """Room in the run's folder; absent: what the checkpoints that are still to be written and kept
    will take.
    """
    max_clock_skew_s: PositiveFloat = 5.0
    """Between a node's clock and the median of all."""
    slow_node_factor: Annotated[float, Field(gt=1.0)] = 4.0
    """A node whose network is so many times slower than the median of all is a slow one."""
    min_bandwidth_mib_per_s: Optional[PositiveFloat] = None
    """And one that is slower than this, whatever the others are."""
    strict: bool = False
    """A wrong clock or a slow network makes a node unfit, instead of being reported."""
