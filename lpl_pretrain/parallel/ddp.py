"""Data parallelism with whole replicas: every rank holds all parameters and owns, for EMA and
checkpoints, an equal part of each.

A part is ceil(numel / world_size) elements, so small parameters belong to the first ranks alone.
"""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from lpl_pretrain.parallel.precision import AutocastWrapper
from lpl_pretrain.parallel.torch_optimizer import TorchOptimizerStrategy


class ReplicatedStrategy(TorchOptimizerStrategy):
    """Assigns the ranges of replicated parameters to ranks; a subclass averages the gradients."""

    def _owned(self, tensor: Tensor) -> tuple[int, Tensor]:
        flat = tensor.view(-1)
        length = self._owned_length(tensor)
        start = min(self.world.rank * length, flat.numel())
        return start, flat[start : start + length]

    def _all_gather_replicas(self, tensor: Tensor) -> None:
        flat = tensor.view(-1)
        length = self._owned_length(tensor)
        gathered = flat.new_empty(self.world.world_size * length)
        padded = flat.new_zeros(length)
        _, owned = self._owned(tensor)
        padded[: owned.numel()] = owned
        dist.all_gather(list(gathered.chunk(self.world.world_size)), padded)
        flat.copy_(gathered[: flat.numel()])

    def _owned_length(self, tensor: Tensor) -> int:
        """Elements per rank; the last ranks may own fewer, or none."""
        return -(-tensor.numel() // self.world.world_size)


class DDPStrategy(ReplicatedStrategy):
    def _wrap(
        self, autocast_model: AutocastWrapper, model: nn.Module, blocks: list[str]
    ) -> nn.Module:
        self._ddp = DistributedDataParallel(
            autocast_model, init_sync=False, gradient_as_bucket_view=True
        )
        # Reduction is armed in `_backward`: DDP would arm it in forward, which does not know
        # whether its micro-batch is the last.
        self._ddp.require_backward_grad_sync = False
        # Forward bypasses DDP, which would rebuild its buckets after the first step: sums over four
        # ranks and more would then be made in another order after a restart, and a resumed run
        # would differ in the last bits.
        return autocast_model

    def _backward(self, loss: Tensor, *, last: bool) -> None:
        if last:
            self._ddp.reducer.prepare_for_backward([])
        super()._backward(loss, last=last)
