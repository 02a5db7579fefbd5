"""Parameters, gradients and moments sharded by torch's `fully_shard`, in chunks of whole rows
(dimension 0).

Blocks are gathered one at a time and released after forward; gradients are reduced and kept sharded
in every micro-batch. With `shard_size` ranks form groups of that size, which shard within
themselves and replicate each other (HSDP): the chunk that replicas hold in common is cut once more,
so that for EMA and checkpoints every element still has one owner.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)
from torch.distributed.tensor import DTensor

from lpl_pretrain.config.check import check_shard_size
from lpl_pretrain.parallel.precision import AutocastWrapper
from lpl_pretrain.parallel.torch_optimizer import NativeStrategy


class FSDP2Strategy(NativeStrategy):
    def _wrap(self, door: AutocastWrapper, model: nn.Module, blocks: list[str]) -> nn.Module:
        check_shard_size(self.config, self.world.world_size)
        self._shards = self.config.shard_size or self.world.world_size
        self._replicas = self.world.world_size // self._shards
        mesh = init_device_mesh(
            self.device.type, (self._replicas, self._shards), mesh_dim_names=("replicate", "shard")
        )
        self._replica, self._shard_number = divmod(self.world.rank, self._shards)
        self._replica_group, self._shard_group = (
            mesh.get_group("replicate"),
            mesh.get_group("shard"),
        )
        # cast_forward_inputs would round z_t and t to bf16 at the root; autocast inside the door
        # casts where a product needs it
        policy = MixedPrecisionPolicy(
            param_dtype=self.recipe.working,
            reduce_dtype=self.recipe.master,
            cast_forward_inputs=False,
        )
        offload = (
            CPUOffloadPolicy(pin_memory=self.device.type == "cuda")
            if self.config.cpu_offload
            else OffloadPolicy()
        )
        used = mesh if self._replicas > 1 else mesh["shard"]
        for name in blocks:
            fully_shard(
                model.get_submodule(name),
                mesh=used,
                mp_policy=policy,
                offload_policy=offload,
                reshard_after_forward=self.config.reshard_after_forward,
            )
        fully_shard(door, mesh=used, mp_policy=policy, offload_policy=offload)
        return door

    def _owned(self, tensor: Tensor) -> tuple[int, Tensor]:
        local = self._local(tensor).view(-1)
        share = -(-local.numel() // self._replicas)
        first = min(self._replica * share, local.numel())
        return self._first_element(tensor) + first, local[first : first + share]

    def _first_element(self, tensor: Tensor) -> int:
        """Of this rank's chunk, in the flattened parameter."""
        rows, local = tensor.shape[0], self._local(tensor)
        rows_per_rank = -(
            -rows // self._shards
        )  # torch.chunk: the last ranks may get fewer, or none
        first = min(self._shard_number * rows_per_rank, rows)
        assert local.shape[0] == min(rows_per_rank, rows - first), (
            tuple(tensor.shape),
            tuple(local.shape),
        )
        return first * (tensor.numel() // rows)

    def _local(self, tensor: Tensor) -> Tensor:
        assert isinstance(tensor, DTensor)
        return tensor.to_local()

    def _sum_over_shards(self, value: Tensor) -> Tensor:
        """Replicas hold the same gradient: they are not summed."""
        value = value.to(self.device)  # offloaded gradients lie on the host
        dist.all_reduce(value, group=self._shard_group)
        return value

    def _complete(self, tensor: Tensor) -> None:
        local = self._local(tensor).view(-1)
        if self._replicas == 1 or not local.numel():
            return
        share = -(-local.numel() // self._replicas)
        everyone = torch.zeros(self._replicas * share, dtype=local.dtype, device=self.device)
        mine = torch.zeros(share, dtype=local.dtype, device=self.device)
        _, owned = self._owned(tensor)
        mine[: owned.numel()] = owned
        dist.all_gather(list(everyone.chunk(self._replicas)), mine, group=self._replica_group)
        local.copy_(everyone[: local.numel()])
