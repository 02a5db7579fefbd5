"""Constants of the discrete noise schedules, for the schedule and for rules without torch."""

from __future__ import annotations

from lpl_pretrain.config.schema import ScheduleKind

BETA_RANGE: dict[ScheduleKind, tuple[float, float]] = {
    ScheduleKind.LINEAR: (1e-4, 0.02),  # arXiv 2006.11239, section 4
    ScheduleKind.SCALED_LINEAR: (0.00085, 0.012),  # latent diffusion, arXiv 2112.10752
}
"""First and last beta: `linear` interpolates them, `scaled_linear` their square roots."""
COSINE_OFFSET = 0.008
"""s of the cosine schedule (arXiv 2102.09672, equation 17)."""
MAX_COSINE_BETA = 0.999
"""Largest beta of the cosine schedule."""
