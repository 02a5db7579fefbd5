"""Which number format each strategy holds, computes and communicates in, for every
`parallel.precision`.

    precision  strategy            master, moments, EMA   forward weights     matmuls          gradient sum, reduction
    fp32       all                 float32                float32             float32          float32
    bf16       local, ddp, zero 0  float32                float32             bf16 (autocast)  float32
    bf16       fsdp2               float32 shards         bf16, gathered      bf16 (autocast)  float32
    bf16       zero 1, 2, 3        float32 partitions     bf16                bf16 (autocast)  float32
    fp16       as bf16             as bf16                fp16 for bf16       fp16 (autocast)  float32, of scaled losses
    fp8        as bf16, not zero   as bf16                as bf16             e4m3, e5m2 in blocks, else bf16   float32
    fp64       all but zero        float64                float64             float64          float64   (parity tests)

Scaled losses: loss_scale.py; e4m3 and e5m2: float8.py.  Autocast is on in every narrow row, so that
the model's inputs stay float32 at the door: a timestep rounded to bf16 has 8 bits.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

from lpl_pretrain.config.schema import Precision, StrategyKind


@dataclasses.dataclass(frozen=True)
class PrecisionPolicy:
    master: torch.dtype
    """Of parameters as the optimizer sees them."""
    autocast: torch.dtype | None = None
    """Of matrix products in forward, when not the master's."""
    working: torch.dtype | None = None
    """Of the weights that forward reads, when not the master's (fsdp2, zero)."""


def recipe(strategy: StrategyKind, precision: Precision) -> PrecisionPolicy:
    """`strategy` zero means its stages 1 to 3; stage 0 is ddp here."""
    if precision is Precision.FP64:
        return PrecisionPolicy(torch.float64)
    if precision is Precision.FP32:
        return PrecisionPolicy(torch.float32)
    narrow = torch.float16 if precision is Precision.FP16 else torch.bfloat16
    return PrecisionPolicy(
        torch.float32,
        narrow,
        narrow if strategy is StrategyKind.FSDP2 or strategy.is_zero else None,
    )


class AutocastWrapper(nn.Module):
    """What every engine wraps instead of the model: autocast is entered inside it, because
    DeepSpeed switches off an outer one.
    """

    def __init__(self, model: nn.Module, recipe: PrecisionPolicy, device_type: str) -> None:
        super().__init__()
        self.model, self._recipe, self._device_type = model, recipe, device_type

    def forward(self, *inputs: Any) -> Any:
        if self._recipe.master is torch.float64:
            inputs = tuple(_to_float64(value) for value in inputs)
        with torch.autocast(
            self._device_type,
            dtype=self._recipe.autocast,
            enabled=self._recipe.autocast is not None,
        ):
            return self.model(*inputs)


def _to_float64(value: Any) -> Any:
    """Floating tensors, and those in a record of tensors; labels stay integers."""
    if isinstance(value, Tensor):
        return value.double() if value.is_floating_point() else value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.replace(
            value,
            **{f.name: _to_float64(getattr(value, f.name)) for f in dataclasses.fields(value)},
        )
    return value
