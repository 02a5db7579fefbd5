"""Parameters, gradients and moments sharded over all ranks by torch's `fully_shard`, in chunks of whole rows (dimension 0).

Blocks are gathered one at a time and released after forward; gradients are reduced and kept sharded in every micro-batch.
"""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from lpl_pretrain.parallel.native import NativeStrategy
from lpl_pretrain.parallel.precision import Door


class FSDP2Strategy(NativeStrategy):
    def _wrap(self, door: Door, model: nn.Module, blocks: list[str]) -> nn.Module:
        mesh = init_device_mesh(self.device.type, (self.world.world_size,))
        # cast_forward_inputs would round z_t and t to bf16 at the root; autocast inside the door casts where a product needs it
        policy = MixedPrecisionPolicy(param_dtype=self.recipe.working, reduce_dtype=self.recipe.master, cast_forward_inputs=False)
        for name in blocks:
            fully_shard(model.get_submodule(name), mesh=mesh, mp_policy=policy)
        fully_shard(door, mesh=mesh, mp_policy=policy)
        return door

    def _owned(self, tensor: Tensor) -> tuple[int, Tensor]:
        local = self._local(tensor)
        rows = tensor.shape[0]
        rows_per_rank = -(-rows // self.world.world_size)  # torch.chunk: the last ranks may get fewer, or none
        first = min(self.world.rank * rows_per_rank, rows)
        assert local.shape[0] == min(rows_per_rank, rows - first), (tuple(tensor.shape), tuple(local.shape))
        return first * (tensor.numel() // rows), local.view(-1)

    def _local(self, tensor: Tensor) -> Tensor:
        assert isinstance(tensor, DTensor)
        return tensor.to_local()

    def _sum_over_shards(self, value: Tensor) -> Tensor:
        dist.all_reduce(value)
        return value
