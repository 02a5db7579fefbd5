"""Builds the strategy that a configuration selects."""

from __future__ import annotations

import torch

from lpl_pretrain.config.schema import ParallelConfig, StrategyKind
from lpl_pretrain.parallel.strategy import Strategy
from lpl_pretrain.runtime.world import World


def needs_process_group(config: ParallelConfig) -> bool:
    """Whether the strategy needs a process group even with one process."""
    return config.strategy is not StrategyKind.LOCAL


def make_strategy(config: ParallelConfig, world: World, device: torch.device) -> Strategy:
    """Imports only the engine of the selected strategy.  Raises ConfigError."""
    if config.strategy is StrategyKind.LOCAL:
        from lpl_pretrain.parallel.local import LocalStrategy

        return LocalStrategy(config, world, device)
    if config.strategy is StrategyKind.DDP:
        from lpl_pretrain.parallel.ddp import DDPStrategy

        return DDPStrategy(config, world, device)
    if config.strategy is StrategyKind.FSDP2:
        from lpl_pretrain.parallel.fsdp2 import FSDP2Strategy

        return FSDP2Strategy(config, world, device)
    from lpl_pretrain.parallel.deepspeed_zero import ZeroStage0Strategy, ZeroStrategy, zero_stage

    if zero_stage(config) == 0:
        return ZeroStage0Strategy(config, world, device)
    return ZeroStrategy(config, world, device)
