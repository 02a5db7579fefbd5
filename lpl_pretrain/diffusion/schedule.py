"""Noise schedules: the coefficients of data and noise in a noised latent at time t.

Convention:  z_t = alpha_t * z0 + sigma_t * eps,  t in [0, 1],  t = 0 is data, t = 1 is noise.
Shapes:      t, alpha_t, sigma_t (B,) float32.
Discrete schedules have 1,000 timesteps and t = timestep / 1000.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor

from lpl_pretrain.config.betas import BETA_RANGE, COSINE_OFFSET, MAX_COSINE_BETA
from lpl_pretrain.config.schema import ScheduleKind

TIMESTEPS = 1000


class Schedule(ABC):
    @abstractmethod
    def snap(self, t: Tensor) -> Tensor:
        """Round times in [0, 1] to times of the schedule.

        A continuous schedule returns them as they are, a discrete one rounds down to a timestep.
        """

    @abstractmethod
    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """(alpha_t, sigma_t), each (B,) float32, at times that `snap` returned."""

    def noise_level(self, t: Tensor) -> Tensor:
        """sigma_t / alpha_t, (B,)."""
        alpha_t, sigma_t = self.coefficients(t)
        return sigma_t / alpha_t


class RectifiedFlow(Schedule):
    """alpha = 1 - t, sigma = t (arXiv 2209.03003)."""

    def snap(self, t: Tensor) -> Tensor:
        return t

    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return 1 - t, t


class DiscreteSchedule(Schedule):
    """Variance preserving: alpha^2 = alphas_cumprod, sigma^2 = 1 - alphas_cumprod (arXiv
    2006.11239, equation 4).
    """

    def __init__(self, betas: Tensor) -> None:
        """`betas`: (1000,) float64."""
        self.betas = betas
        self.alphas_cumprod = torch.cumprod(1 - betas, dim=0)

    def timestep(self, t: Tensor) -> Tensor:
        """(B,) int64 index of a time that `snap` returned."""
        return (t * TIMESTEPS).round().long().clamp(0, TIMESTEPS - 1)

    def snap(self, t: Tensor) -> Tensor:
        return (
            (t.double() * TIMESTEPS + 1e-4)
            .floor()
            .clamp(0, TIMESTEPS - 1)
            .div(TIMESTEPS)
            .to(t.dtype)
        )

    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor]:
        alphas_cumprod = self.alphas_cumprod.to(t.device)[self.timestep(t)]
        return alphas_cumprod.sqrt().to(t.dtype), (1 - alphas_cumprod).sqrt().to(t.dtype)


def make_schedule(kind: ScheduleKind, *, zero_terminal_snr: bool = False) -> Schedule:
    if kind is ScheduleKind.RECTIFIED_FLOW:
        return RectifiedFlow()
    betas = _betas(kind)
    return DiscreteSchedule(rescale_to_zero_terminal_snr(betas) if zero_terminal_snr else betas)


def rescale_to_zero_terminal_snr(betas: Tensor) -> Tensor:
    """(1000,) betas whose first sqrt(alphas_cumprod) is as before and whose last is 0 (arXiv
    2305.08891, algorithm 1).
    """
    alpha = torch.cumprod(1 - betas, dim=0).sqrt()
    alpha = (alpha - alpha[-1]) * alpha[0] / (alpha[0] - alpha[-1])
    alphas_cumprod = alpha.square()
    return 1 - torch.cat([alphas_cumprod[:1], alphas_cumprod[1:] / alphas_cumprod[:-1]])


def _betas(kind: ScheduleKind) -> Tensor:
    """(1000,) float64."""
    if kind is ScheduleKind.COSINE:
        times = torch.arange(TIMESTEPS + 1, dtype=torch.float64) / TIMESTEPS
        angles = (times + COSINE_OFFSET) / (1 + COSINE_OFFSET) * math.pi / 2
        squared_cosine = torch.cos(angles).square()
        return (1 - squared_cosine[1:] / squared_cosine[:-1]).clamp(max=MAX_COSINE_BETA)
    first, last = BETA_RANGE[kind]
    if kind is ScheduleKind.LINEAR:
        return torch.linspace(first, last, TIMESTEPS, dtype=torch.float64)
    return torch.linspace(first**0.5, last**0.5, TIMESTEPS, dtype=torch.float64).square()
