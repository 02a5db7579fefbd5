"""Requirements on nodes, checked before training begins (lpl_pretrain/preflight)."""

from __future__ import annotations

from typing import Annotated, Optional

from pydantic import Field, NonNegativeFloat, PositiveFloat

from lpl_pretrain.config.base import Section


class PreflightConfig(Section):
    min_free_gib: Optional[NonNegativeFloat] = None
    """Free space that the disk of the run's folder must have; absent: the size of the checkpoints
    that are still to be written and kept.
    """
    max_clock_skew_s: PositiveFloat = 5.0
    """Largest difference of a node's clock from the median."""
    slow_node_factor: Annotated[float, Field(gt=1.0)] = 4.0
    """A node is slow when its bandwidth is below the median divided by this."""
    min_bandwidth_mib_per_s: Optional[PositiveFloat] = None
    """A node is slow when its bandwidth is below this; absent: only the median counts."""
    strict: bool = False
    """Treat a node with a wrong clock or a slow network as unfit, instead of only reporting it."""
