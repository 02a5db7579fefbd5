"""One table says what every strategy computes in; the door casts what it must and nothing else."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import nn

from lpl_pretrain.config.schema import Precision, StrategyKind
from lpl_pretrain.errors import ConfigError
from lpl_pretrain.parallel.precision import Door, Recipe, recipe


@dataclass(frozen=True)
class Cond:
    labels: torch.Tensor
    tokens: torch.Tensor


class Asks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 2)

    def forward(self, x, t, cond):
        self.seen = [x.dtype, t.dtype, cond.labels.dtype, cond.tokens.dtype]
        return self.linear(x)


@pytest.mark.parametrize("strategy", StrategyKind)
def test_masters_are_wide_under_every_precision(strategy):
    for precision in (Precision.FP32, Precision.BF16):
        assert recipe(strategy, precision).master is torch.float32
    assert recipe(strategy, Precision.FP32) == Recipe(torch.float32)
    sharded = strategy in (StrategyKind.FSDP2, StrategyKind.ZERO)
    assert recipe(strategy, Precision.BF16).working is (torch.bfloat16 if sharded else None)


def test_zero_has_no_float64():
    with pytest.raises(ConfigError, match="fp64.*zero.*use fp32 or bf16"):
        recipe(StrategyKind.ZERO, Precision.FP64)


@pytest.mark.parametrize(
    "precision, inside, answer",
    [
        ("fp32", torch.float32, torch.float32),
        ("bf16", torch.float32, torch.bfloat16),
        ("fp64", torch.float64, torch.float64),
    ],
)
def test_what_the_model_sees(precision, inside, answer):
    model = Asks().to(torch.float64 if precision == "fp64" else torch.float32)
    door = Door(model, recipe(StrategyKind.DDP, Precision(precision)), "cpu")
    out = door(torch.ones(3, 2), torch.ones(3), Cond(torch.ones(3, dtype=torch.int64), torch.ones(3, 1)))
    assert model.seen == [inside, inside, torch.int64, inside]
    assert out.dtype is answer
