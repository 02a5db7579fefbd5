"""Contract between the trainer and a sharding strategy (local, DDP, FSDP2, DeepSpeed ZeRO).

Whatever a strategy shards, each rank owns contiguous ranges of the row-major flattened parameters.
A `ParamRange` is one such range; EMA and checkpoints work on ranges alone and know no strategy.
Master weights, gradient accumulation and optimizer moments are float32 (float64 under fp64).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from lpl_pretrain.config.schema import ParallelConfig, Precision
from lpl_pretrain.errors import ConfigError
from lpl_pretrain.parallel.activation_checkpointing import prepare_blocks
from lpl_pretrain.parallel.float8 import use_float8
from lpl_pretrain.parallel.loss_scale import LossScale
from lpl_pretrain.parallel.precision import AutocastWrapper, PrecisionPolicy, precision_policy
from lpl_pretrain.runtime.dist import sum_over_ranks
from lpl_pretrain.runtime.world import World

MakeOptimizer = Callable[[dict[str, nn.Parameter]], Optimizer]


@dataclass(frozen=True)
class UpdateCheck:
    """Decides, between the gradient norm and the update, whether the update is applied."""

    values: Tensor
    """(n,) float64 on the device: this rank's summands; `accept` gets their sums over ranks."""
    accept: Callable[[float, list[float]], bool]
    """Gets the norm before clipping and the sums, both bit for bit the same on every rank."""


@dataclass(frozen=True)
class ParamRange:
    """Elements [start, stop) of one flattened parameter, or of its moment or moving average."""

    name: str
    shape: tuple[int, ...]
    """Shape of the whole parameter."""
    start: int
    tensor: Tensor
    """(stop - start,), never empty; writing to it writes to the live state."""

    @property
    def stop(self) -> int:
        return self.start + self.tensor.numel()


@dataclass(frozen=True)
class StepReport:
    """Result of one update, the same on all ranks.  Tensors are () on the device: the host reads
    them when it wants to know.
    """

    applied: Tensor
    """bool; False when the gradient was not finite, was rejected or the update was refused:
    parameters and moments are unchanged.
    """
    grad_norm: Tensor
    """float64 L2 norm of the gradient of the global batch, before clipping; NaN when it was not
    finite.
    """
    scale_lowered: Tensor
    """bool; fp16 only: the scaled loss overflowed float16, which is expected now and then; the next
    update uses half the scale.
    """
    rejected: bool = False
    """Whether the gradient was finite and the `UpdateCheck` did not accept it."""


@dataclass(frozen=True)
class Update:
    """Result of a strategy's `_update`; tensors () on the device."""

    norm: Tensor
    """float64, before clipping; may be infinite."""
    applied: Tensor
    """bool"""
    rejected: bool = False


class Strategy(ABC):
    """Contract, the same for every implementation (tests/distributed/test_strategies.py):

    - after `step`, parameters equal those of one process that trained on the whole global batch;
    - `backward` takes the MEAN loss of one micro-batch; dividing by the number of micro-batches and
      by the number of ranks is done here, once;
    - a loss or gradient that is not finite, on any rank, is detected before the update, and every
      rank then skips the update;
    - every method is collective unless its docstring says otherwise: all ranks call it, in the same
      order, or none does.
    """

    def __init__(self, config: ParallelConfig, world: World, device: torch.device) -> None:
        self.config = config
        self.world = world
        self.device = device
        self.precision: PrecisionPolicy = precision_policy(config.strategy, config.precision)
        self.loss_scale = LossScale(device, dynamic=config.precision is Precision.FP16)
        self.shapes: dict[str, tuple[int, ...]] = {}
        """Name and shape of every parameter, in the model's order: the same on all ranks and under
        all strategies.
        """
        self._optimizer_steps = torch.zeros((), dtype=torch.int64, device=device)

    def setup(
        self, model: nn.Module, blocks: list[str], make_optimizer: MakeOptimizer
    ) -> nn.Module:
        """Collective.  Shards `model` at the sub-modules named in `blocks`; returns the module to
        call in forward.

        Training starts from rank 0's weights.  Every parameter must be trainable: frozen networks
        stay outside a strategy.  `make_optimizer` gets the parameters by name, in the order of
        `shapes`.  Raises ConfigError.
        """
        _require_trainable(model)
        model.to(device=self.device, dtype=self.precision.master)
        self.shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
        if dist.is_initialized():
            for tensor in [*model.parameters(), *model.buffers()]:
                dist.broadcast(tensor.detach(), src=0)
        if self.config.precision is Precision.FP8:
            use_float8(model, blocks, self.device)
        prepare_blocks(model, blocks, self.config)
        autocast_model = AutocastWrapper(model, self.precision, self.device.type)
        return self._shard(autocast_model, model, blocks, make_optimizer)

    def backward(self, loss: Tensor, *, microbatch: int, of: int) -> None:
        """Collective.  Adds the gradient of micro-batch `microbatch` (0 .. of-1) of this update;
        `loss` is its mean over this rank's samples.
        """
        assert loss.ndim == 0 and 0 <= microbatch < of, (loss.shape, microbatch, of)
        # A loss can overflow where its gradient does not.  NaN in the gradient reaches every rank,
        # so one check of the gradient norm finds both.
        loss = loss * torch.where(loss.detach().isfinite(), 1.0, torch.nan)
        self._backward(loss / of, last=microbatch == of - 1)

    @property
    def optimizer_steps(self) -> int:
        """Updates applied; a skipped one does not count.  Waits for the device."""
        return int(self._optimizer_steps)

    def step(
        self,
        *,
        lr: float,
        max_grad_norm: float,
        refuse: Tensor | None = None,
        check: UpdateCheck | None = None,
    ) -> StepReport:
        """Collective.  Clips to the global norm `max_grad_norm` and updates, or leaves parameters
        and moments unchanged on every rank; the report says which.

        The host does not wait for the device, but under ZeRO, whose engine reads the norm.
        `refuse` (() bool, the same on all ranks): skip the update, whatever its gradient.  `check`
        may reject a finite gradient; it costs one more reduction and one copy to the host.
        """
        update = self._update(lr, max_grad_norm, refuse, check)
        self._optimizer_steps += update.applied
        finite = update.norm.isfinite()
        scale_lowered = self.loss_scale.update(finite=finite)
        norm = torch.where(finite, update.norm, torch.nan)
        return StepReport(update.applied, norm, scale_lowered, update.rejected)

    @abstractmethod
    def local_params(self) -> Iterator[ParamRange]:
        """Ranges of the master parameters that this rank owns, in the order of `shapes`.  Not
        collective.

        The ranges of all ranks tile every parameter.
        """

    @abstractmethod
    def local_optimizer_state(self) -> Iterator[tuple[str, ParamRange]]:
        """(state name, range), as ("exp_avg", ...), on the ranges of `local_params`; exists from
        `setup` on.  Not collective.
        """

    @abstractmethod
    def sync_after_load(self, optimizer_steps: int) -> None:
        """Collective.  Call after writing into the ranges: updates the working copies of parameters
        and moments from them, and sets the step count.
        """

    @abstractmethod
    def _shard(
        self,
        autocast_model: AutocastWrapper,
        model: nn.Module,
        blocks: list[str],
        make_optimizer: MakeOptimizer,
    ) -> nn.Module:
        """Collective.  Wraps `autocast_model` (which holds `model`), makes the optimizer and its
        state.
        """

    @abstractmethod
    def _backward(self, loss: Tensor, *, last: bool) -> None:
        """Collective.  Runs backward, at `loss_scale`, of a loss that is already divided by the
        number of micro-batches; averages the gradient over ranks.
        """

    @abstractmethod
    def _update(
        self,
        lr: float,
        max_grad_norm: float,
        refuse: Tensor | None,
        check: UpdateCheck | None,
    ) -> Update:
        """Collective.  Updates and clears the gradient.

        The update is not applied when the norm is not finite, when it is refused, or when `check`
        does not accept it.
        """

    def _reduce_norm(self, norm: Tensor, check: UpdateCheck) -> tuple[float, float, list[float]]:
        """Collective.  (this rank's `norm`, its mean over ranks, sums of `check.values`).

        Ranks may compute a norm that differs in the last bit; the reduction gives all of them the
        same bits.  Waits for the device once.
        """
        local_norm = norm.detach().reshape(1).to(check.values)
        summands = torch.cat([local_norm / self.world.world_size, check.values])
        own, mean, *sums = torch.cat([local_norm, sum_over_ranks(summands)]).tolist()
        return own, mean, sums


def _require_trainable(model: nn.Module) -> None:
    """Raises ConfigError if a parameter of `model` does not require a gradient."""
    frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    if frozen:
        raise ConfigError(
            f"model: {len(frozen)} parameters do not require gradients "
            f"({', '.join(frozen[:3])} ...); a strategy shards trainable ones only: register fixed "
            "tensors as buffers, keep frozen networks outside"
        )
