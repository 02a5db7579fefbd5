"""The one door to local, DDP, FSDP2 and DeepSpeed ZeRO training: what a strategy promises, whatever
it shards.

Every sharding behind it gives a rank a contiguous range of the row-major flattened parameter; a
`Piece` is such a range, and EMA and checkpoints are built on pieces alone, so they know no
strategy.  Master weights, gradients' accumulation and optimizer moments are float32 (float64 under
fp64).
"""

from __future__ import annotations

import math
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
from lpl_pretrain.parallel.precision import AutocastWrapper, PrecisionPolicy, recipe
from lpl_pretrain.runtime.dist import sum_over_ranks
from lpl_pretrain.runtime.world import World

MakeOptimizer = Callable[[dict[str, nn.Parameter]], Optimizer]


@dataclass(frozen=True)
class UpdateCheck:
    """Decides, between the gradient norm and the update, whether the update is made."""

    values: Tensor
    """(n,) float64 on the device: this rank's summands of what `accept` gets, summed over ranks."""
    accept: Callable[[float, list[float]], bool]
    """Gets the norm before clipping and the sums, both bit for bit the same on every rank."""


@dataclass(frozen=True)
class Piece:
    """Elements [start, stop) of one flattened parameter, or of a tensor that goes with it (a
    moment, an average).
    """

    name: str
    shape: tuple[int, ...]  # of the whole parameter
    start: int
    tensor: Tensor  # 1-D, never empty; writing to it writes to the live state

    @property
    def stop(self) -> int:
        return self.start + self.tensor.numel()


@dataclass(frozen=True)
class StepReport:
    """Of one update; the same on all ranks."""

    applied: bool
    """False when the gradient was not finite or was rejected: nothing but the norm is new."""
    grad_norm: float
    """L2 norm of the whole gradient of the global batch, before clipping; NaN when it was not
    finite.
    """
    scale_lowered: bool = False
    """fp16: the loss was scaled too high for float16, which happens now and then; the next update
    tries half of it.
    """

    @property
    def rejected(self) -> bool:
        """Whether the gradient was finite and the `UpdateCheck` did not accept it."""
        return not self.applied and math.isfinite(self.grad_norm)


class Strategy(ABC):
    """Contract, the same for every implementation (tests/distributed/test_strategies.py):

    - after `step`, parameters equal those of one process that saw the whole global batch;
    - `backward` takes the MEAN loss of one micro-batch; dividing by accumulation and by ranks is
      done here, once;
    - a loss or gradient that is not finite, on any rank, is found before the update, which is then
      left out on all of them;
    - every method is collective unless it says otherwise: all ranks call it, in the same order, or
      none does.
    """

    def __init__(self, config: ParallelConfig, world: World, device: torch.device) -> None:
        self.config, self.world, self.device = config, world, device
        self.recipe: PrecisionPolicy = recipe(config.strategy, config.precision)
        self.loss_scale = LossScale.fp16() if config.precision is Precision.FP16 else LossScale()
        self.shapes: dict[str, tuple[int, ...]] = {}
        """Name and shape of every parameter, in the model's order: the same on all ranks and under
        all strategies.
        """
        self.optimizer_steps = 0
        """Updates applied; a refused one does not count."""

    def setup(
        self, model: nn.Module, blocks: list[str], make_optimizer: MakeOptimizer
    ) -> nn.Module:
        """Shard at the sub-modules named in `blocks`, which the model names; returns what to call
        in forward.

        Training starts from rank 0's weights.  Only trainable parameters may be inside: frozen
        networks stay outside a strategy. `make_optimizer` gets the parameters by name, in the order
        of `shapes`.
        """
        frozen = [
            name for name, parameter in model.named_parameters() if not parameter.requires_grad
        ]
        if frozen:
            raise ConfigError(
                f"model: {len(frozen)} parameters do not require gradients "
                f"({', '.join(frozen[:3])} ...); a strategy "
                "shards trainable ones only: register fixed tensors as buffers, keep frozen "
                "networks outside"
            )
        model.to(device=self.device, dtype=self.recipe.master)
        self.shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
        if dist.is_initialized():
            for tensor in [*model.parameters(), *model.buffers()]:
                dist.broadcast(tensor.detach(), src=0)
        if self.config.precision is Precision.FP8:
            use_float8(model, blocks, self.device)
        prepare_blocks(model, blocks, self.config)
        return self._shard(
            AutocastWrapper(model, self.recipe, self.device.type), model, blocks, make_optimizer
        )

    def backward(self, loss: Tensor, *, microbatch: int, of: int) -> None:
        """Add the gradient of micro-batch `microbatch` (0 .. of-1) of this update; `loss` is its
        mean over this rank's samples.
        """
        assert loss.ndim == 0 and 0 <= microbatch < of, (loss.shape, microbatch, of)
        # A loss can overflow where its gradient does not; NaN in the gradient is what every rank
        # will find, in one check.
        loss = loss * torch.where(loss.detach().isfinite(), 1.0, torch.nan)
        self._backward(loss / of, last=microbatch == of - 1)

    def step(
        self,
        *,
        lr: float,
        max_grad_norm: float,
        check: UpdateCheck | None = None,
    ) -> StepReport:
        """Clip to the global norm `max_grad_norm` and update; or change nothing, on every rank, and
        say so.

        `check` may reject a finite gradient: one reduction more, no further wait for the device.
        """
        norm, applied = self._update(lr, max_grad_norm, check)
        self.optimizer_steps += applied
        lowered = self.loss_scale.update(finite=math.isfinite(norm))
        return StepReport(applied, norm if math.isfinite(norm) else math.nan, lowered)

    @abstractmethod
    def local_params(self) -> Iterator[Piece]:
        """Not collective: the pieces of master parameters that this rank owns, in the order of
        `shapes`; all ranks' tile them.
        """

    @abstractmethod
    def local_optimizer_state(self) -> Iterator[tuple[str, Piece]]:
        """Not collective: (state name, piece), as ("exp_avg", ...), on the ranges of
        `local_params`; exists from setup on.
        """

    @abstractmethod
    def accept_loaded(self, optimizer_steps: int) -> None:
        """Call after writing into the pieces: working copies of parameters and moments follow them,
        and so does the step count.
        """

    @abstractmethod
    def _shard(
        self,
        door: AutocastWrapper,
        model: nn.Module,
        blocks: list[str],
        make_optimizer: MakeOptimizer,
    ) -> nn.Module:
        """Wrap `door` (which holds `model`), make the optimizer and its state."""

    @abstractmethod
    def _backward(self, loss: Tensor, *, last: bool) -> None:
        """Backward, at `loss_scale`, of a loss that is already divided by the number of
        micro-batches; averages over ranks.
        """

    @abstractmethod
    def _update(
        self,
        lr: float,
        max_grad_norm: float,
        check: UpdateCheck | None,
    ) -> tuple[float, bool]:
        """Update and forget the gradient: (its norm, whether it was applied).

        It is not applied when its norm is not finite, or `check` does not accept it.
        """

    def _read(self, norm: Tensor, check: UpdateCheck) -> tuple[float, float, list[float]]:
        """Collective.  (this rank's `norm`, its mean over ranks, sums of `check.values`).

        One copy to the host.  Ranks may compute a norm that differs in the last bit; the reduction
        gives all of them the same bits.
        """
        mine = norm.detach().reshape(1).to(check.values)
        shared = sum_over_ranks(torch.cat([mine / self.world.world_size, check.values]))
        own, mean, *sums = torch.cat([mine, shared]).tolist()
        return own, mean, sums
