"""The average follows its closed form, and moves under updates that bf16 loses."""

from dataclasses import dataclass

import pytest
import torch

from lpl_pretrain.config.schema import EMAConfig
from lpl_pretrain.ema.profiles import decay_at
from lpl_pretrain.ema.tracker import EMATracker


@dataclass(frozen=True)
class APiece:
    """All that the tracker may know of a piece."""

    name: str
    tensor: torch.Tensor


def test_warm_up_is_a_minimum():
    assert [decay_at(step, 0.5, True) for step in (1, 2, 7, 8, 100)] == [2 / 11, 3 / 12, 8 / 17, 0.5, 0.5]
    assert decay_at(1, 0.999, False) == 0.999
    assert all(decay_at(step, 0.9999, True) < decay_at(step + 1, 0.9999, True) < 0.9999 for step in range(1, 1000))


@pytest.mark.parametrize("warmup", [True, False])
def test_equals_the_recursion(warmup):
    live = torch.randn(7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    tracker = EMATracker([APiece("a", live)], EMAConfig(decay=0.9, warmup=warmup))
    average = live.clone()
    for step in range(1, 20):
        live += step
        tracker.update(step)
        d = decay_at(step, 0.9, warmup)
        average = d * average + (1 - d) * live
    (piece,) = tracker.pieces()
    torch.testing.assert_close(piece.tensor, average, rtol=1e-13, atol=0)
    assert piece.name == "a" and piece.tensor.data_ptr() != live.data_ptr()


@pytest.mark.parametrize("dtype, moves", [(torch.float32, True), (torch.bfloat16, False)])
def test_ten_thousand_tiny_updates_move_it(dtype, moves):
    """Parameter and average near 1, steps of 1e-6: 60 000 times below what bf16 resolves.  The bf16 sibling stands still."""
    live = torch.ones(3, dtype=dtype)
    tracker = EMATracker([APiece("a", live)], EMAConfig(decay=0.999, warmup=False))
    for step in range(1, 10_001):
        live += 1e-6
        tracker.update(step)
    (piece,) = tracker.pieces()
    lag = 1e-6 * 0.999 / 0.001
    assert (piece.tensor > 1).all() == moves
    if moves:
        torch.testing.assert_close(piece.tensor, live - lag, rtol=0, atol=3e-4)  # of the 9e-3 it moved


def test_a_rank_may_own_nothing():
    tracker = EMATracker([], EMAConfig())
    tracker.update(1)
    assert list(tracker.pieces()) == []
