"""Samplers against a closed form: for data N(m, s^2) the ideal denoiser is linear and the ODE's end
is known for every noise.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from lpl_pretrain.config.protocol import SamplerConfig
from lpl_pretrain.config.schema import Prediction, ScheduleKind
from lpl_pretrain.diffusion.denoiser import DenoiserOutput
from lpl_pretrain.diffusion.guidance import guided
from lpl_pretrain.diffusion.samplers import plan_sampler, sample
from lpl_pretrain.diffusion.schedule import make_schedule
from lpl_pretrain.errors import ConfigError

MEAN, STD = 0.7, 0.4
# prediction, schedule, kind, steps, largest error of a sample: about 6 / steps (linear) or 3 /
# steps (cosine, flow)
CASES = [
    ("eps", "linear", "ddim", 250, 0.03),
    ("eps", "scaled_linear", "ddim", 250, 0.04),
    ("v", "linear", "ddim", 250, 0.03),
    ("v", "cosine", "ddim", 250, 0.015),
    ("v", "linear", "ddim", 1000, 0.007),
    ("v", "linear", "ddim", 600, 0.013),
    ("v", "cosine", "ddim", 30, 0.12),
    ("eps", "scaled_linear", "dpmpp_2m", 250, 0.018),
    ("v", "cosine", "dpmpp_2m", 60, 0.003),
    ("flow", "rectified_flow", "euler", 250, 0.013),
    ("flow", "rectified_flow", "heun", 40, 0.001),
]


@dataclass(frozen=True)
class Labels:
    labels: torch.Tensor


def noise() -> torch.Tensor:
    draw = torch.randn(64, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    return (draw - draw.mean()) / draw.std()


def ideal(prediction: str, schedule, flip: float = 1.0):
    """E[target | z_t] for z0 ~ N(MEAN, STD^2)."""

    def model(z_t, t, cond):
        assert t.shape == (len(z_t),) and t.dtype == torch.float32
        a, s = (c.view(-1, 1, 1, 1) for c in schedule.coefficients(t))
        whitened = (z_t - a * MEAN) / (a**2 * STD**2 + s**2)
        eps, z0 = s * whitened, MEAN + a * STD**2 * whitened
        output = {"eps": eps, "v": a * eps - s * z0, "flow": eps - z0}[prediction]
        return DenoiserOutput(flip * output, {})

    return model


def run(prediction, kind, sampler_kind, steps, *, model_predicts=None, flip=1.0):
    """Samples, and what the ODE's exact solution makes of the same noise."""
    schedule, sampler, start = (
        make_schedule(ScheduleKind(kind)),
        SamplerConfig(kind=sampler_kind, steps=steps),
        noise(),
    )
    got = sample(
        ideal(model_predicts or prediction, schedule, flip),
        Prediction(prediction),
        schedule,
        sampler,
        start,
        Labels(torch.zeros(64, dtype=torch.int64)),
    )
    a, s = schedule.coefficients(
        torch.tensor([plan_sampler(Prediction(prediction), schedule, sampler).times[0]])
    )
    return got, MEAN + STD * (start - a * MEAN) / (a**2 * STD**2 + s**2).sqrt()


@pytest.mark.parametrize("prediction, schedule, kind, steps, tolerance", CASES)
def test_reaches_the_exact_solution(prediction, schedule, kind, steps, tolerance):
    got, wanted = run(prediction, schedule, kind, steps)
    torch.testing.assert_close(got, wanted, rtol=0, atol=tolerance)
    assert abs(got.mean() - MEAN) < 0.02 and abs(got.std() - STD) < tolerance


@pytest.mark.parametrize("broken", ["flipped_sign", "other_target"])
@pytest.mark.parametrize("prediction, schedule, kind, steps, tolerance", CASES)
def test_has_teeth(prediction, schedule, kind, steps, tolerance, broken):
    other = {"eps": "v", "v": "eps", "flow": "eps"}[prediction]
    wrong = {"flip": -1.0} if broken == "flipped_sign" else {"model_predicts": other}
    got, wanted = run(prediction, schedule, kind, steps, **wrong)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(got, wanted, rtol=0, atol=0.15)


@pytest.mark.parametrize(
    "prediction, schedule, kind, gain",
    [
        ("v", "cosine", "ddim", 1.7),
        ("flow", "rectified_flow", "euler", 1.7),
        ("flow", "rectified_flow", "heun", 3.0),
    ],
)
def test_order_of_convergence(prediction, schedule, kind, gain):
    """Twice the steps: half the error for first order, a quarter for second order."""
    coarse, fine = (
        (got - wanted).abs().max()
        for got, wanted in (run(prediction, schedule, kind, steps) for steps in (10, 20))
    )
    assert coarse / fine > gain


@pytest.mark.parametrize("steps", [1, 3, 7, 30, 600, 1000])
def test_ddim_visits_trailing_timesteps(steps):
    walk = plan_sampler(
        Prediction.V, make_schedule(ScheduleKind.LINEAR), SamplerConfig(kind="ddim", steps=steps)
    )
    assert len(walk.times) == steps == len(walk.scheduler.timesteps)
    assert walk.times[0] == 0.999 and all(
        a > b for a, b in zip(walk.times, walk.times[1:], strict=False)
    )


@pytest.mark.parametrize("kind", ["ddim", "dpmpp_2m"])
def test_zero_terminal_snr_starts_from_pure_noise(kind):
    """All that the first step can know is the mean, and the end is right all the same."""
    schedule = make_schedule(ScheduleKind.SCALED_LINEAR, zero_terminal_snr=True)
    got = sample(
        ideal("v", schedule),
        Prediction.V,
        schedule,
        SamplerConfig(kind=kind, steps=100),
        noise(),
        Labels(torch.zeros(64)),
    )
    assert got.isfinite().all() and abs(got.mean() - MEAN) < 0.02 and abs(got.std() - STD) < 0.03


@pytest.mark.parametrize("kind", ["euler", "heun"])
def test_shift_moves_the_times_and_not_the_end(kind):
    schedule, flow = make_schedule(ScheduleKind.RECTIFIED_FLOW), Prediction.FLOW
    plain, moved = (
        torch.tensor(
            plan_sampler(flow, schedule, SamplerConfig(kind=kind, steps=200, shift=shift)).times[
                1:-2
            ]
        )
        for shift in (1.0, 3.0)
    )
    torch.testing.assert_close(moved, 3 * plain / (1 + 2 * plain), atol=1e-3, rtol=0)
    sampler = SamplerConfig(kind=kind, steps=200, shift=3.0)
    got = sample(ideal("flow", schedule), flow, schedule, sampler, noise(), Labels(torch.zeros(64)))
    torch.testing.assert_close(got, MEAN + STD * noise(), rtol=0, atol=0.035)


@pytest.mark.parametrize("kind, forwards", [("euler", 5), ("heun", 9)])
def test_forwards_of_flow(kind, forwards):
    walk = plan_sampler(
        Prediction.FLOW,
        make_schedule(ScheduleKind.RECTIFIED_FLOW),
        SamplerConfig(kind=kind, steps=5),
    )
    assert len(walk.times) == forwards and walk.times[0] == 1.0


@pytest.mark.parametrize(
    "prediction, kind, steps",
    [
        ("eps", "euler", 5),
        ("v", "heun", 5),
        ("flow", "ddim", 5),
        ("flow", "dpmpp_2m", 5),
        ("v", "dpmpp_2m", 1001),
        ("eps", "ddim", 1001),
    ],
)
def test_refuses_a_sampler_that_does_not_fit(prediction, kind, steps):
    schedule = make_schedule(
        ScheduleKind.RECTIFIED_FLOW if prediction == "flow" else ScheduleKind.LINEAR
    )
    with pytest.raises(ConfigError, match="sampler"):
        plan_sampler(Prediction(prediction), schedule, SamplerConfig(kind=kind, steps=steps))


class Counting:
    """Answers the class id everywhere and counts rows."""

    def __init__(self):
        self.rows = []

    def __call__(self, z_t, t, cond):
        self.rows.append(len(z_t))
        output = cond.labels.view(-1, 1, 1, 1).to(torch.bfloat16).expand_as(z_t)
        return DenoiserOutput(output, {})


@pytest.mark.parametrize(
    "scale, rows, answer", [(1.0, 3, 2.0), (3.0, 6, 10.0 + 3.0 * (2.0 - 10.0))]
)
def test_guidance(scale, rows, answer):
    model, z_t = Counting(), torch.zeros(3, 1, 2, 2)
    cond, uncond = Labels(torch.full((3,), 2)), Labels(torch.full((3,), 10))
    out = guided(model, z_t, torch.zeros(3), cond, uncond, scale)
    assert model.rows == [rows] and out.dtype == torch.float32
    torch.testing.assert_close(out, torch.full_like(z_t, answer))


def test_autoguidance_asks_the_weaker_model_about_the_same_condition():
    strong, weak, z_t, cond = (
        Counting(),
        Counting(),
        torch.zeros(3, 1, 2, 2),
        Labels(torch.full((3,), 2)),
    )

    def guide(z_t, t, cond):
        return DenoiserOutput(weak(z_t, t, cond).output + 1, {})

    out = guided(strong, z_t, torch.zeros(3), cond, None, 3.0, guide)
    assert (strong.rows, weak.rows) == ([3], [3])
    torch.testing.assert_close(out, torch.full_like(z_t, 3.0 + 3.0 * (2.0 - 3.0)))


def test_guidance_inside_an_interval_only():
    """Noise levels of ten Euler steps are 1/0, 9, 4, ... 1/9: between 0.5 and 2.5 lie t = 0.7, 0.6,
    0.5 and 0.4.
    """
    model, cond = Counting(), Labels(torch.zeros(3, dtype=torch.int64))
    sampler = SamplerConfig(kind="euler", steps=10, guidance_interval=(0.5, 2.5))
    schedule = make_schedule(ScheduleKind.RECTIFIED_FLOW)
    sample(
        model,
        Prediction.FLOW,
        schedule,
        sampler,
        torch.zeros(3, 1, 2, 2),
        cond,
        uncond=cond,
        guidance_scale=2.0,
    )
    assert model.rows == [3, 3, 3, 6, 6, 6, 6, 3, 3, 3]
    with pytest.raises(ValueError, match="the lower noise level comes first"):
        SamplerConfig(kind="euler", guidance_interval=(2.0, 1.0))
