"""Schedules against closed forms and against diffusers' own, in float64."""

import pytest
import torch
from diffusers import DDPMScheduler
from diffusers.schedulers.scheduling_ddim import rescale_zero_terminal_snr

from lpl_pretrain.config.schema import ScheduleKind, TimestepConfig
from lpl_pretrain.diffusion.schedule import TIMESTEPS, make_schedule
from lpl_pretrain.diffusion.timesteps import quantile, stratify


@pytest.mark.parametrize(
    "kind, theirs",
    [
        ("linear", {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02}),
        (
            "scaled_linear",
            {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
        ),
        ("cosine", {"beta_schedule": "squaredcos_cap_v2"}),
    ],
)
def test_alphas_cumprod_equal_diffusers(kind, theirs):
    ours = make_schedule(ScheduleKind(kind)).alphas_cumprod
    assert ours.dtype == torch.float64
    torch.testing.assert_close(
        ours, DDPMScheduler(**theirs).alphas_cumprod.double(), rtol=2e-4, atol=1e-8
    )  # theirs is float32


@pytest.mark.parametrize("kind", list(ScheduleKind))
def test_coefficients(kind):
    schedule = make_schedule(kind)
    t = schedule.snap(torch.linspace(0.001, 0.998, 301, dtype=torch.float64))
    alpha_t, sigma_t = schedule.coefficients(t)
    together = alpha_t + sigma_t if kind is ScheduleKind.RECTIFIED_FLOW else alpha_t**2 + sigma_t**2
    torch.testing.assert_close(together, torch.ones_like(t))
    assert (schedule.noise_level(t).diff() >= 0).all(), (
        "noise grows with t: the gate and the batch planner rely on it"
    )


def test_every_timestep_is_hit_and_kept():
    schedule = make_schedule(ScheduleKind.LINEAR)
    every = torch.arange(TIMESTEPS)
    snapped = schedule.snap((every + 0.5) / TIMESTEPS)
    assert torch.equal(schedule.timestep(snapped), every)
    assert torch.equal(schedule.snap(snapped), snapped)
    assert schedule.timestep(schedule.snap(torch.tensor([0.0, 1.0]))).tolist() == [
        0,
        TIMESTEPS - 1,
    ]


def test_strata_cover_the_batch_and_keep_the_marginal():
    u = stratify(torch.rand(64, dtype=torch.float64), torch.randperm(64))
    assert torch.equal((u * 64).floor().long().sort().values, torch.arange(64))


@pytest.mark.parametrize("kind", ["linear", "scaled_linear", "cosine"])
def test_zero_terminal_snr_equals_diffusers(kind):
    rescaled = make_schedule(ScheduleKind(kind), zero_terminal_snr=True)
    plain = make_schedule(ScheduleKind(kind))
    theirs = 1 - rescale_zero_terminal_snr(plain.betas).double()
    torch.testing.assert_close(1 - rescaled.betas, theirs, rtol=1e-9, atol=1e-12)
    assert rescaled.alphas_cumprod[-1] == 0 and rescaled.alphas_cumprod[0] == pytest.approx(
        plain.alphas_cumprod[0].item()
    )
    assert torch.equal(plain.alphas_cumprod, make_schedule(ScheduleKind(kind)).alphas_cumprod)


U = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000


@pytest.mark.parametrize("scale", [-1.0, 0.5, 1.29, 1.75])
def test_mode_sampling(scale):
    """Increasing, and each u of the paper gives the paper's t."""
    t = quantile(TimestepConfig(distribution="mode", mode_scale=scale), U)
    paper = 1 - U - scale * ((torch.pi / 2 * U).cos() ** 2 - 1 + U)
    torch.testing.assert_close(t.flip(0), paper)
    assert (t.diff() > 0).all() and 0 <= t[0] < t[-1] <= 1


def test_cosmap_density():
    """2 / (pi - 2 pi t + 2 pi t^2) (arXiv 2403.03206, equation 21)."""
    t = quantile(TimestepConfig(distribution="cosmap"), U)
    density = 1e-5 / t.diff()
    middle = (t[1:] + t[:-1]) / 2
    torch.testing.assert_close(
        density, 2 / (torch.pi * (1 - 2 * middle + 2 * middle**2)), rtol=1e-4, atol=0
    )


def test_shift_keeps_the_noise_level_per_pixel():
    """Twice the side: the same noise level per pixel of the small image, so sigma / alpha is
    twice as large.
    """
    t, moved = (
        quantile(TimestepConfig(distribution="logit_normal", shift=shift), U)
        for shift in (1.0, 2.0)
    )
    torch.testing.assert_close(moved / (1 - moved), 2 * t / (1 - t))


def test_logit_normal_quantile():
    config = TimestepConfig(distribution="logit_normal", mean=0.3, std=0.8)
    t = quantile(config, (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000)
    logit = torch.log(t / (1 - t))
    assert logit.mean() == pytest.approx(0.3, abs=1e-3) and logit.std() == pytest.approx(
        0.8, abs=1e-3
    )
    assert (t.diff() > 0).all()
