"""What local, DDP and FSDP2 share: a torch optimizer that steps the module's own parameters,
clipped by one global norm.

Also `materialize_state`, which gives any torch optimizer its moments before the first update: a
checkpoint is read into them.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lpl_pretrain.parallel.precision import AutocastWrapper
from lpl_pretrain.parallel.strategy import MakeOptimizer, Piece, Strategy, UpdateCheck

STEP = "step"


class NativeStrategy(Strategy):
    def _shard(
        self,
        door: AutocastWrapper,
        model: nn.Module,
        blocks: list[str],
        make_optimizer: MakeOptimizer,
    ) -> nn.Module:
        wrapped = self._wrap(door, model, blocks)
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
        gradients = [self._local(p.grad) for p in self._parameters.values() if p.grad is not None]
        squared = self._sum_over_shards(_squared_norm(gradients, self.device))
        norm, applied = self._judge(squared, check)
        if applied:
            factor = min(1.0, max_grad_norm / (norm + 1e-6)) / self.loss_scale.value
            if factor != 1.0:
                torch._foreach_mul_(gradients, factor)
            for group in self._optimizer.param_groups:
                group["lr"] = lr
            self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return norm, applied

    def _judge(self, squared: Tensor, check: UpdateCheck | None) -> tuple[float, bool]:
        """Collective.  (norm, whether to apply), from the squared norm of the scaled gradient."""
        if check is None:
            norm = math.sqrt(squared.item()) / self.loss_scale.value
            return norm, math.isfinite(norm)
        own, mean, sums = self._read(squared, check)
        norm, agreed = (math.sqrt(value) / self.loss_scale.value for value in (own, mean))
        if not math.isfinite(agreed):
            return math.nan, False
        return norm, check.accept(agreed, sums)

    def local_params(self) -> Iterator[Piece]:
        for name, parameter in self._parameters.items():
            yield from self._piece(name, parameter)

    def local_optimizer_state(self) -> Iterator[tuple[str, Piece]]:
        for name, parameter in self._parameters.items():
            for key, value in self._optimizer.state[parameter].items():
                if key != STEP:
                    for piece in self._piece(name, value):
                        yield key, piece

    @torch.no_grad()
    def accept_loaded(self, optimizer_steps: int) -> None:
        for parameter in self._parameters.values():
            moments = [
                value for key, value in self._optimizer.state[parameter].items() if key != STEP
            ]
            for tensor in [parameter.detach(), *moments]:
                self._complete(tensor)
        set_steps(self._optimizer, optimizer_steps)
        self.optimizer_steps = optimizer_steps

    def _piece(self, name: str, tensor: Tensor) -> Iterator[Piece]:
        start, owned = self._owned(tensor.detach())
        if owned.numel():
            yield Piece(name, self.shapes[name], start, owned)

    @abstractmethod
    def _wrap(self, door: AutocastWrapper, model: nn.Module, blocks: list[str]) -> nn.Module:
        """Before the optimizer is made, because sharding replaces parameters."""

    @abstractmethod
    def _owned(self, tensor: Tensor) -> tuple[int, Tensor]:
        """Start and live 1-D view of this rank's range of a parameter, or of a moment laid out like
        it.
        """

    def _local(self, tensor: Tensor) -> Tensor:
        """The part of a reduced gradient, or of a parameter, that is in this rank's memory."""
        return tensor

    def _sum_over_shards(self, value: Tensor) -> Tensor:
        """Communicates if gradients are sharded."""
        return value

    def _complete(self, tensor: Tensor) -> None:
        """Communicates if ranks hold more than they own: fills `tensor` from the owners' ranges."""


def _squared_norm(tensors: list[Tensor], device: torch.device) -> Tensor:
    """Sum of squares, () float64: the sums of single tensors keep their own precision, their total
    must not depend on the order.
    """
    norms = torch._foreach_norm([tensor for tensor in tensors if tensor.numel()])
    return (
        torch.stack(norms).double().square().sum()
        if norms
        else torch.zeros((), dtype=torch.float64, device=device)
    )


@torch.no_grad()
def materialize_state(optimizer: Optimizer) -> None:
    """Create the moments as the first update would, at zero, and change nothing else: a zero
    gradient at a zero learning rate.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    rates, gradients = (
        [group["lr"] for group in optimizer.param_groups],
        [parameter.grad for parameter in parameters],
    )
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    optimizer.step()
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient  # None, or a buffer that an engine has put there
    for state in optimizer.state.values():
        for value in state.values():
            if isinstance(value, Tensor):
                value.zero_()  # weight decay may have reached a moment; and one update was counted


def set_steps(optimizer: Optimizer, steps: int) -> None:
    """Adam's bias correction counts updates in a tensor per parameter."""
    for state in optimizer.state.values():
        if STEP in state:
            state[STEP].fill_(steps)
