"""The gate's share is a property of the schedule; the weight is explicit, or measured and then
frozen.
"""

import pytest
import torch

from lpl_pretrain.config.diffusion import WeightingConfig
from lpl_pretrain.config.lpl import GateConfig, LPLConfig
from lpl_pretrain.config.schema import Prediction, ScheduleKind, TimestepConfig
from lpl_pretrain.diffusion.schedule import make_schedule
from lpl_pretrain.errors import ConfigError, NonFiniteError
from lpl_pretrain.losses.lpl.gate import gate_fraction, gate_weights, max_noise_level
from lpl_pretrain.losses.lpl.weight import LPLWeight


def means(diffusion, perceptual):
    return torch.tensor([diffusion, perceptual], dtype=torch.float64)


UNIFORM, LOGIT_NORMAL = TimestepConfig(), TimestepConfig(distribution="logit_normal")


@pytest.mark.parametrize(
    "kind, gate, timesteps, share",
    [
        ("scaled_linear", {"noise_level_below": 3}, UNIFORM, 0.674),
        ("scaled_linear", {"snr_above": 3}, UNIFORM, 0.203),
        ("scaled_linear", {"snr_above": 6}, UNIFORM, 0.129),
        ("scaled_linear", {"timestep_below": 200}, UNIFORM, 0.200),
        ("rectified_flow", {"noise_level_below": 3}, UNIFORM, 0.75),
        ("rectified_flow", {"snr_above": 3}, UNIFORM, 0.366),
        ("rectified_flow", {"noise_level_below": 3}, LOGIT_NORMAL, 0.864),
        ("rectified_flow", {"snr_above": 3}, LOGIT_NORMAL, 0.291),
    ],
)
def test_published_gate_fractions(kind, gate, timesteps, share):
    schedule = make_schedule(ScheduleKind(kind))
    assert gate_fraction(
        max_noise_level(GateConfig(**gate), schedule), schedule, timesteps
    ) == pytest.approx(share, abs=6e-4)


def test_timestep_below_is_exclusive():
    schedule = make_schedule(ScheduleKind.SCALED_LINEAR)
    threshold = max_noise_level(GateConfig(timestep_below=200), schedule)
    levels = schedule.noise_level(torch.tensor([0.199, 0.200]))
    assert levels[0] <= threshold < levels[1]


def test_a_gate_that_never_opens_is_refused():
    schedule = make_schedule(ScheduleKind.SCALED_LINEAR)
    with pytest.raises(ConfigError, match="no sample can pass"):
        gate_fraction(max_noise_level(GateConfig(snr_above=1e9), schedule), schedule, UNIFORM)


def test_a_gate_that_is_always_open():
    schedule = make_schedule(ScheduleKind.SCALED_LINEAR)
    assert gate_fraction(1e9, schedule, UNIFORM) == 1.0


def test_explicit_weight_with_start_and_ramp():
    weight = LPLWeight(LPLConfig(weight=4.0, start_step=10, ramp_steps=4))
    assert [weight.value(step) for step in (9, 10, 11, 12, 13, 100)] == [
        0.0,
        1.0,
        2.0,
        3.0,
        4.0,
        4.0,
    ]
    assert not weight.active(9) and weight.active(10) and not weight.calibrating(10)


def test_target_fraction_is_reached_and_frozen():
    weight = LPLWeight(LPLConfig(target_fraction=0.2, start_step=5, calibration_steps=3))
    assert [weight.observe(step, means(0.5, 0.02)) for step in (5, 6)] == [False, False]
    assert weight.value(6) == 0.0 and weight.observe(7, means(0.5, 0.02))
    w = weight.value(8)
    assert w * 0.02 / (0.5 + w * 0.02) == pytest.approx(0.2)
    assert not weight.calibrating(8)


def test_calibration_survives_a_restart():
    config = LPLConfig(target_fraction=0.2, calibration_steps=3)
    whole, first, second = LPLWeight(config), LPLWeight(config), LPLWeight(config)
    for step, lpl in enumerate((0.01, 0.03, 0.02)):
        whole.observe(step, means(0.5, lpl))
    first.observe(0, means(0.5, 0.01))
    second.load_state(first.state())
    second.observe(1, means(0.5, 0.03))
    second.observe(2, means(0.5, 0.02))
    assert second.value(3) == whole.value(3) > 0


def test_calibration_on_nothing_is_an_error():
    weight = LPLWeight(LPLConfig(target_fraction=0.2, calibration_steps=1))
    with pytest.raises(NonFiniteError, match="set lpl.weight"):
        weight.observe(0, means(0.5, 0.0))


@pytest.mark.parametrize(
    "prediction, wanted",
    [
        ("eps", [5 / 16, 1.0, 0.0]),
        ("v", [5 / 17, 4 / 5, 0.0]),
        ("flow", [5 * 0.2**2, 4 * (1 / 3) ** 2, 0.0]),
    ],
)
def test_noise_weighting_is_min_snr(prediction, wanted):
    """SNR 16, 4 and 1 with gamma 5: min(SNR, 5) on the error of z0, restated for what is predicted
    (arXiv 2303.09556).
    """
    noise_level = torch.tensor([0.25, 0.5, 1.0])
    weights = gate_weights(
        noise_level, 0.6, WeightingConfig(kind="min_snr"), Prediction(prediction)
    )
    torch.testing.assert_close(weights, torch.tensor(wanted))
    assert gate_weights(noise_level, 0.6, WeightingConfig(), Prediction(prediction)).tolist() == [
        1.0,
        1.0,
        0.0,
    ]
