"""Optimizers behind torch's interface: AdamW, SGD, and Muon with AdamW.

Muon takes the matrices of the blocks; biases, norms, embeddings, convolutions and the layers around
the blocks stay with AdamW.  Its updates are scaled to the root mean square of AdamW's, so that one
learning rate and one weight decay serve both.

All of them skip an update on the device, as torch's fused optimizers do: where the attribute
`found_inf` (() float32) is 1, `step` leaves parameters and state unchanged, and the host need not
know.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import AdamW, Optimizer

from lpl_pretrain.config.schema import OptimizerConfig
from lpl_pretrain.errors import ConfigError

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
"""Coefficients of the quintic iteration (arXiv 2502.16982, equation 2)."""
NEWTON_SCHULZ_STEPS = 5


def make_optimizer(
    config: OptimizerConfig, parameters: dict[str, nn.Parameter], blocks: Iterable[str] = ()
) -> Optimizer:
    """Build the configured optimizer; `blocks` are the modules whose matrices Muon takes.

    Raises ConfigError for Muon on a model whose blocks hold no matrices.
    """
    if config.kind == "sgd":
        return SGD(parameters.values(), config.lr, config.weight_decay)
    if config.kind == "adamw":
        return _adamw(config, parameters.values())
    inside = tuple(f"{block}." for block in blocks)
    matrices = {
        name: tensor
        for name, tensor in parameters.items()
        if tensor.ndim == 2 and name.startswith(inside)
    }
    others = [tensor for name, tensor in parameters.items() if name not in matrices]
    if not matrices:
        raise ConfigError(
            "optimizer.kind='muon': the blocks of this model hold no matrices: use adamw"
        )
    return CombinedOptimizer(
        Muon(matrices.values(), config.lr, config.momentum, config.weight_decay),
        _adamw(config, others),
    )


class SGD(Optimizer):
    """param -= lr * (grad + weight_decay * param); torch's fused SGD knows no DTensor."""

    def __init__(
        self, parameters: Iterable[nn.Parameter], lr: float, weight_decay: float = 0.0
    ) -> None:
        super().__init__(parameters, {"lr": lr, "weight_decay": weight_decay})
        self.found_inf: Tensor | None = None

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    slope = parameter.grad.add(parameter, alpha=group["weight_decay"])
                    updated = parameter.sub(slope, alpha=group["lr"])
                    parameter.copy_(_select(self.found_inf, old=parameter, new=updated))


class Muon(Optimizer):
    """Nesterov momentum, orthogonalised (arXiv 2502.16982, equations 1 and 4).

    Every rank orthogonalises whole matrices, gathered once in bf16, and takes its own rows, so the
    result does not depend on sharding.  torch.optim.Muon multiplies the shards: its sums differ
    with the layout, and between replicas.
    """

    def __init__(
        self, matrices: Iterable[nn.Parameter], lr: float, momentum: float, weight_decay: float
    ) -> None:
        super().__init__(matrices, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        self.found_inf: Tensor | None = None

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Collective if the matrices are sharded."""
        for group in self.param_groups:
            for matrix in group["params"]:
                if matrix.grad is not None:
                    self._update(matrix, matrix.grad, group)

    def _update(self, matrix: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        state = self.state[matrix]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(gradient)
        buffer = state["momentum_buffer"]
        average = buffer.lerp(gradient, 1 - group["momentum"])
        direction = gradient.lerp(average, group["momentum"]).bfloat16()
        if isinstance(direction, DTensor):
            whole = newton_schulz(direction.full_tensor())
            direction = distribute_tensor(
                whole, direction.device_mesh, direction.placements, src_data_rank=None
            )
        else:
            direction = newton_schulz(direction)
        updated = matrix * (1 - group["lr"] * group["weight_decay"])
        updated.add_(direction, alpha=-group["lr"] * 0.2 * math.sqrt(max(matrix.shape)))
        buffer.copy_(_select(self.found_inf, old=buffer, new=average))
        matrix.copy_(_select(self.found_inf, old=matrix, new=updated))


def newton_schulz(matrix: Tensor) -> Tensor:
    """Orthogonalise (M, N) bfloat16: the same singular vectors, singular values around 1 (arXiv
    2502.16982, equation 2).
    """
    a, b, c = NEWTON_SCHULZ
    wide = matrix.shape[0] <= matrix.shape[1]
    x = matrix if wide else matrix.T
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(NEWTON_SCHULZ_STEPS):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x if wide else x.T


class CombinedOptimizer(Optimizer):
    """Two optimizers of different parameters as one: groups concatenated, states merged."""

    def __init__(self, first: Optimizer, second: Optimizer) -> None:
        """Optimizer.__init__ is not called: all that it would keep is kept by the two."""
        self._parts = (first, second)
        self.found_inf: Tensor | None = None

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        return [group for part in self._parts for group in part.param_groups]

    @property
    def state(self) -> dict[Any, Any]:  # type: ignore[override]
        return dict(chain.from_iterable(part.state.items() for part in self._parts))

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for part in self._parts:
            part.found_inf = self.found_inf  # type: ignore[attr-defined]
            part.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        for part in self._parts:
            part.zero_grad(set_to_none)


def _select(found_inf: Tensor | None, *, old: Tensor, new: Tensor) -> Tensor:
    """`old` where the update is skipped, else `new`."""
    return new if found_inf is None else torch.where(found_inf > 0, old, new)


def _adamw(config: OptimizerConfig, parameters: Iterable[nn.Parameter]) -> Optimizer:
    decay = config.weight_decay
    return AdamW(
        parameters, config.lr, betas=config.betas, eps=config.eps, weight_decay=decay, fused=True
    )
