"""Number formats in which each strategy stores, computes and communicates, for every
`parallel.precision`.

    precision  strategy            master, moments, EMA  forward weights  matmuls   gradients
    fp32       all                 float32               float32          float32   float32
    bf16       local, ddp, zero 0  float32               float32          bf16      float32
    bf16       fsdp2               float32 shards        bf16, gathered   bf16      float32
    bf16       zero 1, 2, 3        float32 partitions    bf16             bf16      float32
    fp16       as bf16             as bf16               fp16 for bf16    fp16      float32, scaled
    fp8        as bf16, not zero   as bf16               as bf16          fp8, bf16 float32
    fp64       all but zero        float64               float64          float64   float64

"gradients" is the format of their accumulation and reduction; under fp16 they are those of the
scaled loss (loss_scale.py).  Autocast selects the 16-bit matmuls.  fp8 means e4m3 and e5m2 in the
blocks (float8.py), bf16 elsewhere.  fp64 serves parity tests.  Autocast is on in every row of 16 or
8 bits, so that the model's inputs stay float32: a timestep rounded to bf16 has 8 significant bits.
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
    """Dtype of the parameters that the optimizer updates."""
    autocast: torch.dtype | None = None
    """Dtype of matrix products in forward, when not the master's."""
    working: torch.dtype | None = None
    """Dtype of the weights that forward reads, when not the master's (fsdp2, zero)."""


def precision_policy(strategy: StrategyKind, precision: Precision) -> PrecisionPolicy:
    """Returns the row of the table above.  `strategy` zero means its stages 1 to 3; pass ddp for
    stage 0.
    """
    if precision is Precision.FP64:
        return PrecisionPolicy(torch.float64)
    if precision is Precision.FP32:
        return PrecisionPolicy(torch.float32)
    compute = torch.float16 if precision is Precision.FP16 else torch.bfloat16
    casts_weights = strategy is StrategyKind.FSDP2 or strategy.is_zero
    return PrecisionPolicy(torch.float32, compute, compute if casts_weights else None)


class AutocastWrapper(nn.Module):
    """Enters autocast around the model's forward.

    Engines wrap this module instead of the model, because DeepSpeed switches off an outer autocast.
    """

    def __init__(self, model: nn.Module, precision: PrecisionPolicy, device_type: str) -> None:
        super().__init__()
        self.model = model
        self._precision = precision
        self._device_type = device_type

    def forward(self, *inputs: Any, **options: Any) -> Any:
        if self._precision.master is torch.float64:
            inputs = tuple(_to_float64(value) for value in inputs)
        with torch.autocast(
            self._device_type,
            dtype=self._precision.autocast,
            enabled=self._precision.autocast is not None,
        ):
            return self.model(*inputs, **options)


def _to_float64(value: Any) -> Any:
    """Converts a floating tensor, or those in a dataclass of tensors; labels stay integers."""
    if isinstance(value, Tensor):
        return value.double() if value.is_floating_point() else value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.replace(
            value,
            **{
                field.name: _to_float64(getattr(value, field.name))
                for field in dataclasses.fields(value)
            },
        )
    return value
