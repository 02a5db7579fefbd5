"""Data parallelism with whole replicas: every rank holds all parameters and owns, for EMA and
checkpoints, an equal share of each.

A share is ceil(numel / world_size) elements, so small parameters belong to the first ranks alone.
"""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from lpl_pretrain.parallel.precision import AutocastWrapper
from lpl_pretrain.parallel.torch_optimizer import NativeStrategy


class ReplicatedStrategy(NativeStrategy):
    """Who owns what, whoever averages the gradients."""

    def _owned(self, tensor: Tensor) -> tuple[int, Tensor]:
        flat, share = tensor.view(-1), self._share(tensor)
        start = min(self.world.rank * share, flat.numel())
        return start, flat[start : start + share]

    def _complete(self, tensor: Tensor) -> None:
        flat, share = tensor.view(-1), self._share(tensor)
        everyone = flat.new_empty(self.world.world_size * share)
        mine = flat.new_zeros(share)
        _, owned = self._owned(tensor)
        mine[: owned.numel()] = owned
        dist.all_gather(list(everyone.chunk(self.world.world_size)), mine)
        flat.copy_(everyone[: flat.numel()])

    def _share(self, tensor: Tensor) -> int:
        return -(-tensor.numel() // self.world.world_size)


class DDPStrategy(ReplicatedStrategy):
    def _wrap(self, door: AutocastWrapper, model: nn.Module, blocks: list[str]) -> nn.Module:
        self._ddp = DistributedDataParallel(door, init_sync=False, gradient_as_bucket_view=True)
        # Reduction is armed in `_backward`: DDP would arm it in forward, which does not know
        # whether its micro-batch is the last.
        self._ddp.require_backward_grad_sync = False
        # Forward goes past DDP, which would sort its buckets anew after the first step: sums over
        # four ranks and more would then be made in another order after a restart, and a resumed run
        # would differ in the last bits.
        return door

    def _backward(self, loss: Tensor, *, last: bool) -> None:
        if last:
            self._ddp.reducer.prepare_for_backward([])
        super()._backward(loss, last=last)
