"""Explicit backward through a chain of frozen layers, with gradients injected between them.

Autograd would keep every feature map and every mask of a whole decoder until the last stage is
done.  Here the gradient of a stage is injected as soon as it is known, so only the input of each
layer (recomputed in backward), or its graph, stays in memory.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(slots=True)
class _Step:
    layer: Callable[[Tensor], Tensor]
    source: Tensor  # leaf
    result: Tensor | None  # None: compute it again


class Tape:
    def __init__(self, *, recompute: bool) -> None:
        self.recompute = recompute
        self._records: list[_Step | Tensor] = []

    def run(self, layer: Callable[[Tensor], Tensor], source: Tensor) -> Tensor:
        """Run and record a layer; the result has no graph."""
        leaf = source.detach().requires_grad_()
        with torch.set_grad_enabled(not self.recompute):
            result = layer(leaf)
        self._records.append(_Step(layer, leaf, None if self.recompute else result))
        return result.detach()

    def inject(self, gradient: Tensor) -> None:
        """Add a gradient at the last result, to that of later layers."""
        self._records.append(gradient)

    def backward(self) -> Tensor:
        """Gradient at the first source.  Each record is freed as soon as it is used."""
        gradient: Tensor | None = None
        while self._records:
            record = self._records.pop()
            if isinstance(record, Tensor):
                gradient = record if gradient is None else gradient + record
                continue
            assert gradient is not None, "nothing was injected after this layer"
            if record.result is None:
                with torch.enable_grad():
                    record.result = record.layer(record.source)
            (gradient,) = torch.autograd.grad(record.result, record.source, gradient)
        assert gradient is not None
        return gradient
