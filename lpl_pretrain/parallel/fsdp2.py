"""Parameters, gradients and moments sharded by torch's `fully_shard`, in chunks of whole rows
(dimension 0).

Blocks are gathered one at a time and released after forward; gradients are reduced and kept sharded
in every micro-batch.  With `shard_size`, ranks form groups of that size, which shard within
themselves and replicate each other (HSDP): each shard is divided once more among its replicas, so
that for EMA and checkpoints every element still has one owner.
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
from lpl_pretrain.parallel.torch_optimizer import TorchOptimizerStrategy


class FSDP2Strategy(TorchOptimizerStrategy):
    def _wrap(
        self, autocast_model: AutocastWrapper, model: nn.Module, blocks: list[str]
    ) -> nn.Module:
        check_shard_size(self.config, self.world.world_size)
        self._num_shards = self.config.shard_size or self.world.world_size
        self._num_replicas = self.world.world_size // self._num_shards
        mesh = init_device_mesh(
            self.device.type,
            (self._num_replicas, self._num_shards),
            mesh_dim_names=("replicate", "shard"),
        )
        self._replica_index, self._shard_index = divmod(self.world.rank, self._num_shards)
        self._replica_group = mesh.get_group("replicate")
        self._shard_group = mesh.get_group("shard")
        used_mesh = mesh if self._num_replicas > 1 else mesh["shard"]
        # cast_forward_inputs would round z_t and t to bf16 at the root; autocast inside the
        # wrapper casts where a product needs it.
        policy = MixedPrecisionPolicy(
            param_dtype=self.precision.working,
            reduce_dtype=self.precision.master,
            cast_forward_inputs=False,
        )
        offload = OffloadPolicy()
        if self.config.cpu_offload:
            offload = CPUOffloadPolicy(pin_memory=self.device.type == "cuda")
        for name in blocks:
            fully_shard(
                model.get_submodule(name),
                mesh=used_mesh,
                mp_policy=policy,
                offload_policy=offload,
                reshard_after_forward=self.config.reshard_after_forward,
            )
        fully_shard(autocast_model, mesh=used_mesh, mp_policy=policy, offload_policy=offload)
        return autocast_model

    def _owned(self, tensor: Tensor) -> tuple[int, Tensor]:
        shard = self._local_shard(tensor).view(-1)
        length = self._owned_length(shard)
        offset = min(self._replica_index * length, shard.numel())
        return self._shard_start(tensor) + offset, shard[offset : offset + length]

    def _owned_length(self, shard: Tensor) -> int:
        """Elements of a shard that each of its replicas owns; the last may own fewer, or none."""
        return -(-shard.numel() // self._num_replicas)

    def _shard_start(self, tensor: Tensor) -> int:
        """Index of the first element of this rank's shard in the flattened parameter."""
        rows = tensor.shape[0]
        shard = self._local_shard(tensor)
        # As torch.chunk divides: the last ranks may get fewer rows, or none.
        rows_per_rank = -(-rows // self._num_shards)
        first_row = min(self._shard_index * rows_per_rank, rows)
        shapes = (tuple(tensor.shape), tuple(shard.shape))
        assert shard.shape[0] == min(rows_per_rank, rows - first_row), shapes
        return first_row * (tensor.numel() // rows)

    def _local_shard(self, tensor: Tensor) -> Tensor:
        assert isinstance(tensor, DTensor)
        return tensor.to_local()

    def _sum_over_shards(self, value: Tensor) -> Tensor:
        """Collective.  Sums over the shards of one replica: all replicas hold the same gradient."""
        value = value.to(self.device)  # offloaded gradients are on the host
        dist.all_reduce(value, group=self._shard_group)
        return value

    def _all_gather_replicas(self, tensor: Tensor) -> None:
        shard = self._local_shard(tensor).view(-1)
        if self._num_replicas == 1 or not shard.numel():
            return
        length = self._owned_length(shard)
        gathered = torch.zeros(self._num_replicas * length, dtype=shard.dtype, device=self.device)
        padded = torch.zeros(length, dtype=shard.dtype, device=self.device)
        _, owned = self._owned(tensor)
        padded[: owned.numel()] = owned
        dist.all_gather(list(gathered.chunk(self._num_replicas)), padded, group=self._replica_group)
        shard.copy_(gathered[: shard.numel()])
