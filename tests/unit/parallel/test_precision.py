"""Precision of each strategy; dtypes that the model gets under autocast; loss scaling for fp16."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import nn

from lpl_pretrain.config.schema import ParallelConfig, Precision, StrategyKind
from lpl_pretrain.parallel.loss_scale import LossScale
from lpl_pretrain.parallel.precision import AutocastWrapper, PrecisionPolicy, precision_policy


@dataclass(frozen=True)
class Cond:
    labels: torch.Tensor
    tokens: torch.Tensor


class DtypeRecorder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 2)

    def forward(self, x, t, cond):
        self.input_dtypes = [x.dtype, t.dtype, cond.labels.dtype, cond.tokens.dtype]
        return self.linear(x)


@pytest.mark.parametrize("strategy", StrategyKind)
def test_master_weights_are_float32_under_every_precision(strategy):
    assert precision_policy(strategy, Precision.FP32) == PrecisionPolicy(torch.float32)
    sharded = strategy is StrategyKind.FSDP2 or strategy.is_zero
    compute_dtypes = {
        Precision.BF16: torch.bfloat16,
        Precision.FP8: torch.bfloat16,
        Precision.FP16: torch.float16,
    }
    for precision, dtype in compute_dtypes.items():
        assert precision_policy(strategy, precision) == PrecisionPolicy(
            torch.float32, dtype, dtype if sharded else None
        )


@pytest.mark.parametrize("precision", ["fp64", "fp8"])
def test_zero_refuses_fp64_and_fp8(precision):
    with pytest.raises(
        ValueError, match=f"precision='{precision}' with strategy='zero'.*use bf16, fp16 or fp32"
    ):
        ParallelConfig(strategy="zero", zero_config="configs/zero/zero2.json", precision=precision)


CPU = torch.device("cpu")
FINITE = torch.tensor(True)
OVERFLOW = torch.tensor(False)


def test_the_scale_is_halved_by_an_overflow_and_doubled_after_many_good_updates():
    scale = LossScale(CPU, dynamic=True)
    assert scale.update(finite=OVERFLOW) and scale.value == 2.0**15
    assert not any(scale.update(finite=FINITE) for _ in range(1999)) and scale.value == 2.0**15
    saved = scale.state()
    scale.update(finite=FINITE)
    assert scale.state() == {"value": 2.0**16, "dynamic": True, "good_updates": 0}
    resumed = LossScale(CPU, dynamic=True)
    resumed.load_state(saved)
    resumed.update(finite=FINITE)
    assert resumed.state() == scale.state()
    scale.load_state({"value": 2.0, "dynamic": True, "good_updates": 0})
    assert scale.update(finite=OVERFLOW) and not scale.update(finite=OVERFLOW)
    assert scale.value == 1.0


def test_without_fp16_there_is_no_scale():
    scale = LossScale(CPU)
    scale.load_state(LossScale(CPU, dynamic=True).state())
    assert not scale.update(finite=OVERFLOW) and scale.state() == LossScale(CPU).state()


@pytest.mark.parametrize(
    "precision, input_dtype, output_dtype",
    [
        ("fp32", torch.float32, torch.float32),
        ("bf16", torch.float32, torch.bfloat16),
        ("fp16", torch.float32, torch.float16),
        ("fp64", torch.float64, torch.float64),
    ],
)
def test_inputs_stay_float32_under_autocast(precision, input_dtype, output_dtype):
    model = DtypeRecorder().to(torch.float64 if precision == "fp64" else torch.float32)
    autocast_model = AutocastWrapper(
        model, precision_policy(StrategyKind.DDP, Precision(precision)), "cpu"
    )
    output = autocast_model(
        torch.ones(3, 2), torch.ones(3), Cond(torch.ones(3, dtype=torch.int64), torch.ones(3, 1))
    )
    assert model.input_dtypes == [input_dtype, input_dtype, torch.int64, input_dtype]
    assert output.dtype is output_dtype
