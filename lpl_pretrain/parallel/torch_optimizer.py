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
from lpl_pretrain.parallel.strategy import MakeOptimizer, ParamRange, Strategy, UpdateCheck

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
        (loss * self.loss_scale.value).backward()

    @torch.no_grad()
    def _update(
        self,
        lr: float,
        max_grad_norm: float,
        check: UpdateCheck | None,
    ) -> tuple[float, bool]:
        gradients = [
            self._local_shard(parameter.grad)
            for parameter in self._parameters.values()
            if parameter.grad is not None
        ]
        squared_norm = self._sum_over_shards(_squared_norm(gradients, self.device))
        norm, applied = self._check_norm(squared_norm, check)
        if applied:
            factor = min(1.0, max_grad_norm / (norm + 1e-6)) / self.loss_scale.value
            if factor != 1.0:
                torch._foreach_mul_(gradients, factor)
            for group in self._optimizer.param_groups:
                group["lr"] = lr
            self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return norm, applied

    def _check_norm(self, squared_norm: Tensor, check: UpdateCheck | None) -> tuple[float, bool]:
        """Collective.  (norm, whether to apply the update), from the squared norm of the scaled
        gradient.
        """
        scale = self.loss_scale.value
        if check is None:
            norm = math.sqrt(squared_norm.item()) / scale
            return norm, math.isfinite(norm)
        own_squared, mean_squared, sums = self._reduce_norm(squared_norm, check)
        agreed_norm = math.sqrt(mean_squared) / scale
        if not math.isfinite(agreed_norm):
            return math.nan, False
        return math.sqrt(own_squared) / scale, check.accept(agreed_norm, sums)

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
        self.optimizer_steps = optimizer_steps

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
