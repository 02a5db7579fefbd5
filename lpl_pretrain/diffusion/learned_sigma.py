"""The variance of a sampling step, learned beside the mean: what its channels say, and their part
of the loss.

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


def variational_bound(schedule: DiscreteSchedule, t: Tensor, seen: Denoising) -> Tensor:
    """(B,) KL(q(z_{t-1} | z_t, z0) || p(z_{t-1} | z_t)) in bits a latent value; gradient through
    `seen.spread` alone.
    """
    assert seen.spread is not None
    timestep = schedule.timestep(t)
    log_true, log_max, on_z0 = (
        values[timestep].view(-1, 1, 1, 1) for values in _of_a_step(schedule, t.device)
    )
    share = (seen.spread.double() + 1) / 2
    log_variance = share * log_max + (1 - share) * log_true
    # means differ by their share of z0 alone: both weigh z_t alike
    difference = on_z0 * (seen.z0_hat.detach() - seen.z0).double()
    kl = 0.5 * (
        log_variance
        - log_true
        + (log_true - log_variance).exp()
        + difference.square() * (-log_variance).exp()
        - 1
    )
    return (kl.mean(dim=(1, 2, 3)) / math.log(2)).to(seen.loss.dtype)


@lru_cache(maxsize=4)  # once a run, not a copy to the device in every microbatch
def _of_a_step(schedule: DiscreteSchedule, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Each (1000,) float64: log beta_tilde (at t = 0 that of 1), log beta, z0's weight in the
    posterior's mean (2006.11239, 7).
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
