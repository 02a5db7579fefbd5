"""Schedules against closed forms and against diffusers' own, in float64."""

import pytest
import torch
from diffusers import DDPMScheduler

from lpl_pretrain.config.schema import ScheduleKind, TimestepConfig
from lpl_pretrain.diffusion.schedule import TIMESTEPS, make_schedule
from lpl_pretrain.diffusion.timesteps import quantile, stratify


@pytest.mark.parametrize(
    "kind, theirs",
    [
        ("linear", {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02}),
        ("scaled_linear", {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}),
        ("cosine", {"beta_schedule": "squaredcos_cap_v2"}),
    ],
)
def test_alphas_cumprod_equal_diffusers(kind, theirs):
    ours = make_schedule(ScheduleKind(kind)).alphas_cumprod
    assert ours.dtype == torch.float64
    torch.testing.assert_close(ours, DDPMScheduler(**theirs).alphas_cumprod.double(), rtol=2e-4, atol=1e-8)  # theirs is float32


@pytest.mark.parametrize("kind", list(ScheduleKind))
def test_coefficients(kind):
    schedule = make_schedule(kind)
    t = schedule.place(torch.linspace(0.001, 0.998, 301, dtype=torch.float64))
    alpha_t, sigma_t = schedule.coefficients(t)
    together = alpha_t + sigma_t if kind is ScheduleKind.RECTIFIED_FLOW else alpha_t**2 + sigma_t**2
    torch.testing.assert_close(together, torch.ones_like(t))
    assert (schedule.noise_level(t).diff() >= 0).all(), "noise grows with t: the gate and the dealing rest on it"


def test_every_timestep_is_hit_and_kept():
    schedule = make_schedule(ScheduleKind.LINEAR)
    every = torch.arange(TIMESTEPS)
    placed = schedule.place((every + 0.5) / TIMESTEPS)
    assert torch.equal(schedule.timestep(placed), every)
    assert torch.equal(schedule.place(placed), placed)
    assert schedule.timestep(schedule.place(torch.tensor([0.0, 1.0]))).tolist() == [0, TIMESTEPS - 1]


def test_strata_cover_the_batch_and_keep_the_marginal():
    u = stratify(torch.rand(64, dtype=torch.float64), torch.randperm(64))
    assert torch.equal((u * 64).floor().long().sort().values, torch.arange(64))


def test_logit_normal_quantile():
    config = TimestepConfig(distribution="logit_normal", mean=0.3, std=0.8)
    t = quantile(config, (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000)
    logit = torch.log(t / (1 - t))
    assert logit.mean() == pytest.approx(0.3, abs=1e-3) and logit.std() == pytest.approx(0.8, abs=1e-3)
    assert (t.diff() > 0).all()
