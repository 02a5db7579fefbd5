"""Averages follow their closed forms, move under updates that bf16 loses, and can be made
afterwards in any length.
"""

import itertools
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from lpl_pretrain.config.schema import EMAConfig
from lpl_pretrain.ema.profiles import (
    decay_at,
    gamma_of,
    power_decay_at,
    reconstruction,
    sigma_rel_of,
)
from lpl_pretrain.ema.tracker import EMATracker


@dataclass(frozen=True)
class APiece:
    """All that the tracker may know of a piece."""

    name: str
    tensor: torch.Tensor


def test_warm_up_is_a_minimum():
    assert [decay_at(step, 0.5, True) for step in (1, 2, 7, 8, 100)] == [
        2 / 11,
        3 / 12,
        8 / 17,
        0.5,
        0.5,
    ]
    assert decay_at(1, 0.999, False) == 0.999
    assert all(
        decay_at(step, 0.9999, True) < decay_at(step + 1, 0.9999, True) < 0.9999
        for step in range(1, 1000)
    )


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
    ((_, piece),) = tracker.local_averages()
    torch.testing.assert_close(piece.tensor, average, rtol=1e-13, atol=0)
    assert piece.name == "a" and piece.tensor.data_ptr() != live.data_ptr()


@pytest.mark.parametrize("dtype, moves", [(torch.float32, True), (torch.bfloat16, False)])
def test_ten_thousand_tiny_updates_move_it(dtype, moves):
    """Parameter and average near 1, steps of 1e-6: 60 000 times below what bf16 resolves.  The bf16
    sibling stands still.
    """
    live = torch.ones(3, dtype=dtype)
    tracker = EMATracker([APiece("a", live)], EMAConfig(decay=0.999, warmup=False))
    for step in range(1, 10_001):
        live += 1e-6
        tracker.update(step)
    ((_, piece),) = tracker.local_averages()
    lag = 1e-6 * 0.999 / 0.001
    assert (piece.tensor > 1).all() == moves
    if moves:
        torch.testing.assert_close(
            piece.tensor, live - lag, rtol=0, atol=3e-4
        )  # of the 9e-3 it moved


def test_a_rank_may_own_nothing():
    tracker = EMATracker([], EMAConfig())
    tracker.update(1)
    assert list(tracker.local_averages()) == []


# --- power-function averages


@pytest.mark.parametrize("sigma_rel", [0.02, 0.05, 0.1, 0.2, 0.27])
def test_gamma_and_sigma_rel_are_inverse_and_measured(sigma_rel):
    assert sigma_rel_of(gamma_of(sigma_rel)) == pytest.approx(sigma_rel, rel=1e-9)
    t = (np.arange(1_000_000) + 0.5) / 1_000_000
    profile = t ** gamma_of(sigma_rel)
    mean = np.average(t, weights=profile)
    assert np.average((t - mean) ** 2, weights=profile) ** 0.5 == pytest.approx(sigma_rel, rel=1e-4)


def test_published_values():
    """Values that EDM2's paper names: gamma = 16.97 and 6.94 for 5 % and 10 %."""
    assert (gamma_of(0.05), gamma_of(0.10)) == (
        pytest.approx(16.97, abs=0.01),
        pytest.approx(6.94, abs=0.01),
    )


def test_profile_of_the_recursion_is_the_closed_form():
    steps, sigma_rel = 200, 0.1
    weights = np.zeros(steps)
    for step in range(1, steps + 1):
        decay = power_decay_at(step, sigma_rel)
        weights *= decay
        weights[step - 1] += 1 - decay
    power = gamma_of(sigma_rel) + 1
    np.testing.assert_allclose(
        weights, np.diff((np.arange(steps + 1) / steps) ** power), rtol=1e-9, atol=1e-15
    )
    assert power_decay_at(1, sigma_rel) == 0.0  # the initial weights are forgotten at once


def trained(lengths, steps=3000, every=50):
    """A drifting random walk; the averages tracked along it, and what snapshots would have kept."""
    generator = torch.Generator().manual_seed(0)
    live = torch.zeros(64, dtype=torch.float64)
    tracker = EMATracker([APiece("a", live)], EMAConfig(sigma_rel=lengths))
    kept = {}
    for step in range(1, steps + 1):
        live += torch.randn(64, generator=generator, dtype=torch.float64) / step**0.5 + 1e-3
        tracker.update(step)
        if step % every == 0:
            kept |= {
                (step, float(kind[-5:])): piece.tensor.clone()
                for kind, piece in tracker.local_averages(power_only=True)
            }
    return kept


def test_any_length_is_reconstructed_from_snapshots_of_two():
    lengths = (0.05, 0.1, 0.07, 0.12, 0.15, 0.2)
    kept = trained(lengths)
    stored = [key for key in kept if key[1] in (0.05, 0.1)]
    for step, length in itertools.product((3000, 1500), lengths[2:]):
        usable = [key for key in stored if key[0] <= step]
        coefficients = reconstruction(usable, (step, length))
        made = sum(c * kept[key] for c, key in zip(coefficients, usable, strict=True))
        error = (made - kept[step, length]).norm() / kept[step, length].norm()
        assert error < 1e-3, (step, length, error)
        assert coefficients.sum() == pytest.approx(1.0, abs=1e-3)


def test_has_teeth_the_nearest_stored_one_is_far_off():
    kept = trained((0.05, 0.1, 0.07))
    for length in (0.05, 0.1):
        assert (kept[3000, length] - kept[3000, 0.07]).norm() / kept[3000, 0.07].norm() > 3e-3


def test_a_stored_average_is_reconstructed_as_itself():
    stored = [(step, length) for step in (100, 200, 300) for length in (0.05, 0.1)]
    wanted = np.zeros(6)
    wanted[3] = 1.0
    np.testing.assert_allclose(reconstruction(stored, (200, 0.1)), wanted, atol=1e-6)


def test_lengths_that_make_no_sense():
    for wrong, message in (
        ({"sigma_rel": [0.3]}, "less than 0.28"),
        ({"snapshot_every_steps": 5}, "without sigma_rel"),
        ({"sigma_rel": [0.05, 0.0501]}, "differ by less than"),
    ):
        with pytest.raises(ValidationError, match=message):
            EMAConfig.model_validate(wrong)
