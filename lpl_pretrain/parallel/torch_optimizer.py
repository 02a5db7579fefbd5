"""Base of local, DDP and FSDP2: a torch optimizer steps the module's own parameters, with the
gradient clipped to one global norm.

`materialize_state` gives any torch optimizer its moments before the first update: a checkpoint is
loaded into them.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lpl_pretrain.parallel.precision import AutocastWrapper
from lpl_pretrain.parallel.strategy import (
    MakeOptimizer,
    ParamRange,
    Strategy,
    Update,
    UpdateCheck,
)

STEP = "step"
"""Key of the update count in the state of torch's optimizers."""


class TorchOptimizerStrategy(Strategy):
    def _shard(
        self,
        autocast_model: AutocastWrapper,
        model: nn.Module,
        blocks: list[str],
        make_optimizer: MakeOptimizer,
    ) -> nn.Module:
        wrapped = self._wrap(autocast_model, model, blocks)
        self._parameters = dict(model.named_parameters())
        self._optimizer = make_optimizer(self._parameters)
        materialize_state(self._optimizer)
        return wrapped

    def _backward(self, loss: Tensor, *, last: bool) -> None:
        (loss * self.loss_scale.factor).backward()

    @torch.no_grad()
    def _update(
        self,
        lr: float,
        max_grad_norm: float,
        refuse: Tensor | None,
        check: UpdateCheck | None,
    ) -> Update:
        gradients = [
            self._local_shard(parameter.grad)
            for parameter in self._parameters.values()
            if parameter.grad is not None
        ]
        squared_norm = self._sum_over_shards(_squared_norm(gradients, self.device))
        norm = squared_norm.sqrt() / self.loss_scale.factor
        applied = norm.isfinite()
        rejected = False
        if refuse is not None:
            applied = applied & ~refuse
        if check is not None:
            finite, accepted = self._ask(squared_norm, check)
            applied = applied & torch.full_like(applied, accepted)
            rejected = finite and not accepted
        self._apply(gradients, norm, applied, lr, max_grad_norm)
        self._optimizer.zero_grad(set_to_none=True)
        return Update(norm, applied, rejected)

    def _ask(self, squared_norm: Tensor, check: UpdateCheck) -> tuple[bool, bool]:
        """Collective.  (whether the norm is finite, whether `check` accepts it), the same on all
        ranks; waits for the device.
        """
        _, mean_squared, sums = self._reduce_norm(squared_norm, check)
        agreed_norm = math.sqrt(mean_squared) / self.loss_scale.value
        finite = math.isfinite(agreed_norm)
        return finite, finite and check.accept(agreed_norm, sums)

    def _apply(
        self,
        gradients: list[Tensor],
        norm: Tensor,
        applied: Tensor,
        lr: float,
        max_grad_norm: float,
    ) -> None:
        """Clips and steps; the optimizer skips the update on the device if `applied` is False."""
        if gradients:
            clip = (max_grad_norm / (norm + 1e-6)).clamp(max=1.0) / self.loss_scale.factor
            torch._foreach_mul_(gradients, clip.to(gradients[0]))
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        self._optimizer.found_inf = (~applied).float()  # type: ignore[attr-defined]
        self._optimizer.step()

    def local_params(self) -> Iterator[ParamRange]:
        for name, parameter in self._parameters.items():
            yield from self._owned_range(name, parameter)

    def local_optimizer_state(self) -> Iterator[tuple[str, ParamRange]]:
        for name, parameter in self._parameters.items():
            for key, moment in self._moments(parameter).items():
                for param_range in self._owned_range(name, moment):
                    yield key, param_range

    @torch.no_grad()
    def sync_after_load(self, optimizer_steps: int) -> None:
        for parameter in self._parameters.values():
            for tensor in [parameter.detach(), *self._moments(parameter).values()]:
                self._all_gather_replicas(tensor)
        set_steps(self._optimizer, optimizer_steps)
        self._optimizer_steps.fill_(optimizer_steps)

    def _moments(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        """Optimizer state of `parameter` by name, without the step count."""
        state = self._optimizer.state[parameter]
        return {key: value for key, value in state.items() if key != STEP}

    def _owned_range(self, name: str, tensor: Tensor) -> Iterator[ParamRange]:
        """Yields this rank's range of `tensor`, or nothing if it owns no element."""
        start, owned = self._owned(tensor.detach())
        if owned.numel():
            yield ParamRange(name, self.shapes[name], start, owned)

    @abstractmethod
    def _wrap(
        self, autocast_model: AutocastWrapper, model: nn.Module, blocks: list[str]
    ) -> nn.Module:
        """Collective.  Runs before the optimizer is made, because sharding replaces parameters."""

    @abstractmethod
    def _owned(self, tensor: Tensor) -> tuple[int, Tensor]:
        """(start, live 1-D view) of this rank's range of a parameter, or of a moment laid out like
        it.
        """

    def _local_shard(self, tensor: Tensor) -> Tensor:
        """Returns the part of a reduced gradient, or of a parameter, that this rank stores."""
        return tensor

    def _sum_over_shards(self, value: Tensor) -> Tensor:
        """Collective if gradients are sharded.  Sums `value` over the ranks that shard them."""
        return value

    def _all_gather_replicas(self, tensor: Tensor) -> None:
        """Collective if ranks store more than they own.  Fills `tensor` from its owners' ranges."""


def _squared_norm(tensors: list[Tensor], device: torch.device) -> Tensor:
    """Sum of squares, () float64.

    Each tensor's norm keeps the tensor's own precision; their total must not depend on the order.
    """
    norms = torch._foreach_norm([tensor for tensor in tensors if tensor.numel()])
    if not norms:
        return torch.zeros((), dtype=torch.float64, device=device)
    return torch.stack(norms).double().square().sum()


@torch.no_grad()
def materialize_state(optimizer: Optimizer) -> None:
    """Creates the moments as the first update would, at zero, and changes nothing else.

    Runs one update with zero gradients at learning rate zero.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    learning_rates = [group["lr"] for group in optimizer.param_groups]
    gradients = [parameter.grad for parameter in parameters]
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    optimizer.step()
    for group, learning_rate in zip(optimizer.param_groups, learning_rates, strict=True):
        group["lr"] = learning_rate
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient  # None, or a buffer that an engine has put there
    for state in optimizer.state.values():
        for value in state.values():
            if isinstance(value, Tensor):
                value.zero_()  # weight decay may have reached a moment; and one update was counted


def set_steps(optimizer: Optimizer, steps: int) -> None:
    """Sets the number of updates that Adam's bias correction counts, in a tensor per parameter."""
    for state in optimizer.state.values():
        if STEP in state:
            state[STEP].fill_(steps)
