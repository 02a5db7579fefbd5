"""The optimizers that a run can ask for, all behind torch's interface.

Muon is for the matrices of the blocks; biases, norms, embeddings, convolutions and the layers
around the blocks stay with AdamW. Its updates are scaled to the root mean square of AdamW's, so
that one learning rate and one weight decay serve both.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import SGD, AdamW, Optimizer

from lpl_pretrain.config.schema import OptimizerConfig
from lpl_pretrain.errors import ConfigError

NEWTON_SCHULZ, STEPS = (3.4445, -4.7750, 2.0315), 5


def make_optimizer(
    config: OptimizerConfig, parameters: dict[str, nn.Parameter], blocks: Iterable[str] = ()
) -> Optimizer:
    """`blocks`: names of the modules whose matrices Muon takes."""
    if config.kind == "sgd":
        return SGD(parameters.values(), lr=config.lr, weight_decay=config.weight_decay)
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
    return Both(
        Muon(matrices.values(), config.lr, config.momentum, config.weight_decay),
        _adamw(config, others),
    )


class Muon(Optimizer):
    """Nesterov's momentum, made orthogonal (arXiv 2502.16982, equations 1 and 4).

    Every rank makes whole matrices orthogonal, gathered once in bf16, and takes its own rows:
    sharded or not, the numbers are the same.  torch.optim.Muon runs its products on the shards:
    their sums differ with the layout, and between replicas.
    """

    def __init__(
        self, matrices: Iterable[nn.Parameter], lr: float, momentum: float, weight_decay: float
    ) -> None:
        super().__init__(matrices, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Communicates if the matrices are sharded."""
        for group in self.param_groups:
            for matrix in group["params"]:
                if matrix.grad is not None:
                    self._update(matrix, matrix.grad, group)

    def _update(self, matrix: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        state = self.state[matrix]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(gradient)
        average = state["momentum_buffer"].lerp_(gradient, 1 - group["momentum"])
        direction = gradient.lerp(average, group["momentum"]).bfloat16()
        if isinstance(direction, DTensor):
            whole = orthogonal(direction.full_tensor())
            direction = distribute_tensor(
                whole, direction.device_mesh, direction.placements, src_data_rank=None
            )
        else:
            direction = orthogonal(direction)
        matrix.mul_(1 - group["lr"] * group["weight_decay"])
        matrix.add_(direction, alpha=-group["lr"] * 0.2 * math.sqrt(max(matrix.shape)))


def orthogonal(matrix: Tensor) -> Tensor:
    """(M, N) bfloat16: the same singular vectors, singular values around 1; Newton-Schulz steps
    (arXiv 2502.16982, equation 2).
    """
    a, b, c = NEWTON_SCHULZ
    wide = matrix.shape[0] <= matrix.shape[1]
    x = matrix if wide else matrix.T
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(STEPS):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x if wide else x.T


class Both(Optimizer):
    """Two optimizers of different parameters as one: their groups behind each other, their states
    side by side.
    """

    def __init__(self, first: Optimizer, second: Optimizer) -> None:
        """Optimizer.__init__ is not called: all that it would keep is kept by the two."""
        self._parts = first, second

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        return [group for part in self._parts for group in part.param_groups]

    @property
    def state(self) -> dict[Any, Any]:  # type: ignore[override]
        return dict(chain.from_iterable(part.state.items() for part in self._parts))

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for part in self._parts:
            part.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        for part in self._parts:
            part.zero_grad(set_to_none)


def _adamw(config: OptimizerConfig, parameters: Iterable[nn.Parameter]) -> Optimizer:
    decay = config.weight_decay
    return AdamW(
        parameters, config.lr, betas=config.betas, eps=config.eps, weight_decay=decay, fused=True
    )
