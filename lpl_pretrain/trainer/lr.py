"""Learning rate schedules: linear warm-up, then constant, cosine or inverse square root."""

from __future__ import annotations

import math

from lpl_pretrain.config.schema import OptimizerConfig


def learning_rate(config: OptimizerConfig, step: int, total_steps: int) -> float:
    """Learning rate of update number `step`, counted from 0."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    if config.lr_schedule == "constant":
        return config.lr
    if config.lr_schedule == "inverse_sqrt":
        assert config.decay_from_steps is not None
        return config.lr / math.sqrt(max(1.0, (step + 1) / config.decay_from_steps))
    progress = (step - config.warmup_steps) / max(1, total_steps - config.warmup_steps)
    return config.lr * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
