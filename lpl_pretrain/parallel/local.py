"""Training on one process: the reference that every other strategy must equal."""

from __future__ import annotations

from torch import Tensor, nn

from lpl_pretrain.errors import ConfigError
from lpl_pretrain.parallel.precision import AutocastWrapper
from lpl_pretrain.parallel.torch_optimizer import TorchOptimizerStrategy


class LocalStrategy(TorchOptimizerStrategy):
    def _wrap(
        self, autocast_model: AutocastWrapper, model: nn.Module, blocks: list[str]
    ) -> nn.Module:
        if self.world.world_size > 1:
            raise ConfigError(
                f"parallel.strategy='local' with {self.world.world_size} processes: each would "
                "train its own model; use ddp, fsdp2 or zero, or start one process"
            )
        return autocast_model

    def _owned(self, tensor: Tensor) -> tuple[int, Tensor]:
        return 0, tensor.view(-1)
