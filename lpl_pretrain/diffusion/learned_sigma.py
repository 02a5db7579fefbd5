"""Learned variance of a sampling step: the meaning of its channels and its term of the loss.

arXiv 2102.09672, section 3.1: a channel in [-1, 1] interpolates log variances between beta_tilde_t
and beta_t (equation 15) and is trained by the variational bound alone, no gradient reaching the
mean (equation 16).  The last term, of t = 0, is the same divergence with the variance of t = 1:
latents have no bins that a likelihood could be summed over.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

from lpl_pretrain.diffusion.objective import Denoising
from lpl_pretrain.diffusion.schedule import DiscreteSchedule


def variational_bound(schedule: DiscreteSchedule, t: Tensor, denoised: Denoising) -> Tensor:
    """(B,) KL(q(z_{t-1} | z_t, z0) || p(z_{t-1} | z_t)) in bits a latent value; gradient through
    `denoised.variance_logits` alone.
    """
    assert denoised.variance_logits is not None
    timestep = schedule.timestep(t)
    log_true, log_max, on_z0 = (
        values[timestep].view(-1, 1, 1, 1) for values in _posterior_by_timestep(schedule, t.device)
    )
    fraction = (denoised.variance_logits.double() + 1) / 2
    log_variance = fraction * log_max + (1 - fraction) * log_true
    # both means weigh z_t alike, so they differ in their z0 terms alone
    difference = on_z0 * (denoised.z0_hat.detach() - denoised.z0).double()
    kl = 0.5 * (
        log_variance
        - log_true
        + (log_true - log_variance).exp()
        + difference.square() * (-log_variance).exp()
        - 1
    )
    return (kl.mean(dim=(1, 2, 3)) / math.log(2)).to(denoised.mse.dtype)


@lru_cache(maxsize=4)  # once a run, not a copy to the device in every microbatch
def _posterior_by_timestep(
    schedule: DiscreteSchedule, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Constants of the posterior, each (1000,) float64 and indexed by timestep.

    Log beta_tilde (at t = 0 that of t = 1), log beta, and the weight of z0 in the posterior's mean
    (arXiv 2006.11239, equation 7).
    """
    betas, now = schedule.betas, schedule.alphas_cumprod
    before = torch.cat([torch.ones(1, dtype=torch.float64), now[:-1]])
    posterior = betas * (1 - before) / (1 - now)
    log_posterior = torch.cat([posterior[1:2], posterior[1:]]).log()
    return (
        log_posterior.to(device),
        betas.log().to(device),
        (betas * before.sqrt() / (1 - now)).to(device),
    )
