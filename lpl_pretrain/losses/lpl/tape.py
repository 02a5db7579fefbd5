"""Backward through a chain of frozen layers, by hand, with gradients that enter between them.

Autograd would keep every feature map and every mask of a whole decoder until the last stage is
done.  Here a stage hands in its gradient as soon as it is known, so what stays is the input of each
layer (recomputed in backward), or its graph.
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
        """layer(source), without a graph on the outside."""
        leaf = source.detach().requires_grad_()
        with torch.set_grad_enabled(not self.recompute):
            result = layer(leaf)
        self._records.append(_Step(layer, leaf, None if self.recompute else result))
        return result.detach()

    def inject(self, gradient: Tensor) -> None:
        """The gradient that the last result has of its own, beside what later layers will bring."""
        self._records.append(gradient)

    def backward(self) -> Tensor:
        """The gradient at the first source.  Each record is let go as soon as it is used."""
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
