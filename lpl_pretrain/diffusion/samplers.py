"""Sampling from noise to latents along the probability-flow ODE, with diffusers' schedulers.

Convention:  t in [0, 1], 0 = data, 1 = noise; a denoiser gets t, never a scheduler's own timestep.
Shapes:      noise, z_t, z0 (B, C, H, W) float32;  t (B,) float32.
Steps:       `ddim`, `dpmpp_2m` and `euler` make `steps` forwards; `heun` makes 2 steps - 1 (its
             last, tiny step is an Euler step).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
)
from torch import Tensor

from lpl_pretrain.config.evaluation import check_sampler
from lpl_pretrain.config.protocol import SamplerConfig
from lpl_pretrain.config.schema import Prediction
from lpl_pretrain.diffusion.denoiser import DenoiserOutput
from lpl_pretrain.diffusion.guidance import guided
from lpl_pretrain.diffusion.schedule import TIMESTEPS, DiscreteSchedule, Schedule
from lpl_pretrain.diffusion.timesteps import apply_shift

PREDICTION_TYPES = {Prediction.EPS: "epsilon", Prediction.V: "v_prediction"}


@dataclass(frozen=True)
class SamplerPlan:
    """A diffusers scheduler and the times of its denoiser calls, in order."""

    scheduler: Any
    times: list[float]


@torch.no_grad()
def sample(
    model: Callable[..., DenoiserOutput],
    prediction: Prediction,
    schedule: Schedule,
    sampler: SamplerConfig,
    noise: Tensor,
    cond: Any,
    *,
    uncond: Any = None,
    guidance_scale: float = 1.0,
    guide: Callable[..., DenoiserOutput] | None = None,
) -> Tensor:
    """Integrate from `noise` to z0.

    A `guidance_scale` other than 1 extrapolates away from `model`'s output for `uncond`, or from
    the output of `guide` for `cond` where there is one (diffusion/guidance.py).  Raises ConfigError
    for a sampler that does not fit the prediction.
    """
    plan = plan_sampler(prediction, schedule, sampler)
    z_t = noise
    for timestep, time in zip(plan.scheduler.timesteps, plan.times, strict=True):
        t = torch.full((len(noise),), time, dtype=torch.float32, device=noise.device)
        scale = guidance_scale if guidance_active(sampler, schedule, time) else 1.0
        output = guided(model, z_t, t, cond, uncond, scale, guide)
        z_t = plan.scheduler.step(output, timestep, z_t).prev_sample
    return z_t


def guidance_active(sampler: SamplerConfig, schedule: Schedule, time: float) -> bool:
    """Whether the noise level at `time` lies in `sampler.guidance_interval`."""
    if sampler.guidance_interval is None:
        return True
    low, high = sampler.guidance_interval
    return low <= schedule.noise_level(torch.tensor([time], dtype=torch.float64)).item() <= high


def plan_sampler(prediction: Prediction, schedule: Schedule, sampler: SamplerConfig) -> SamplerPlan:
    """Raises ConfigError for a sampler that does not fit the prediction."""
    check_sampler(prediction, sampler)
    if isinstance(schedule, DiscreteSchedule):
        return (_ddim if sampler.kind == "ddim" else _dpmpp)(prediction, schedule, sampler.steps)
    return (_euler if sampler.kind == "euler" else _heun)(sampler.steps, sampler.shift)


def _ddim(prediction: Prediction, schedule: DiscreteSchedule, steps: int) -> SamplerPlan:
    """DDIM (arXiv 2010.02502, equation 12, eta 0) on the `steps` timesteps of trailing spacing
    (arXiv 2305.08891, table 2).

    The scheduler is built on those timesteps alone.  Built on all 1,000 it steps from t to t - 1000
    // steps, which is not the next timestep unless `steps` divides 1,000, and it multiplies betas
    up in float32; ours are float64 and taken as they are.
    """
    kept = [round(TIMESTEPS * (i + 1) / steps) - 1 for i in range(steps)]
    scheduler: Any = DDIMScheduler(
        num_train_timesteps=steps,
        clip_sample=False,
        timestep_spacing="trailing",
        prediction_type=PREDICTION_TYPES[prediction],
    )
    scheduler.alphas_cumprod = schedule.alphas_cumprod[kept]
    scheduler.set_timesteps(steps)
    return SamplerPlan(scheduler, [timestep / TIMESTEPS for timestep in reversed(kept)])


def _dpmpp(prediction: Prediction, schedule: DiscreteSchedule, steps: int) -> SamplerPlan:
    """DPM-Solver++(2M) (arXiv 2211.01095, algorithm 2) on trailing timesteps, down to no noise."""
    scheduler: Any = DPMSolverMultistepScheduler(
        solver_order=2,
        algorithm_type="dpmsolver++",
        timestep_spacing="trailing",
        final_sigmas_type="zero",
        prediction_type=PREDICTION_TYPES[prediction],
    )
    # the scheduler takes the logarithm, which pure noise would make infinite
    scheduler.alphas_cumprod = schedule.alphas_cumprod.clamp(min=2.0**-24)
    scheduler.set_timesteps(steps)
    return SamplerPlan(
        scheduler, [timestep / TIMESTEPS for timestep in scheduler.timesteps.tolist()]
    )


def _euler(steps: int, shift: float) -> SamplerPlan:
    """Equal steps from t = 1 to 0, before the shift.

    diffusers' default would spend the last step on t = 0.001.
    """
    scheduler: Any = FlowMatchEulerDiscreteScheduler()
    sigmas = 1 - torch.arange(steps, dtype=torch.float64) / steps
    scheduler.set_timesteps(sigmas=apply_shift(sigmas, shift).tolist())
    return SamplerPlan(scheduler, _times(scheduler))


def _heun(steps: int, shift: float) -> SamplerPlan:
    """Heun's method (arXiv 2206.00364, algorithm 1) from t = 1 to 0.001 before the shift, then one
    Euler step to 0.

    The scheduler's own shift is not used: it would be applied twice to the times in between.
    """
    scheduler: Any = FlowMatchHeunDiscreteScheduler()
    scheduler.set_timesteps(steps)
    scheduler.sigmas = apply_shift(scheduler.sigmas, shift)
    scheduler.timesteps = apply_shift(scheduler.timesteps / TIMESTEPS, shift) * TIMESTEPS
    return SamplerPlan(scheduler, _times(scheduler))


def _times(scheduler: Any) -> list[float]:
    return [
        timestep / scheduler.config.num_train_timesteps for timestep in scheduler.timesteps.tolist()
    ]
