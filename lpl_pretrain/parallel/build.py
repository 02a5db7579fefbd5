"""From configuration to strategy."""

from __future__ import annotations

import torch

from lpl_pretrain.config.schema import ParallelConfig, StrategyKind
from lpl_pretrain.parallel.strategy import Strategy
from lpl_pretrain.runtime.world import World


def needs_group(config: ParallelConfig) -> bool:
    """Whether `runtime.dist.start` must make a process group even for one process."""
    return config.strategy is not StrategyKind.LOCAL


def make_strategy(config: ParallelConfig, world: World, device: torch.device) -> Strategy:
    """Imports only the engine that is asked for."""
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

    return (ZeroStrategy if zero_stage(config) else ZeroStage0Strategy)(config, world, device)
