"""What the denoiser is asked to predict, and how its answer maps back to clean latents.

Convention:  z_t = alpha_t * z0 + sigma_t * eps,  t in [0, 1],  t = 0 is data, t = 1 is noise.
Shapes:      latents (B, C, H, W) float32;  t, alpha_t, sigma_t, loss (B,) float32.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lpl_pretrain.config.schema import Prediction
from lpl_pretrain.diffusion.denoiser import DenoiserOutput


@dataclass(frozen=True, slots=True)
class Denoising:
    """One microbatch, seen by every loss term. LPL reads z0 and z0_hat; it never re-derives them."""

    z0: Tensor  # (B, C, H, W)  clean normalised latents
    z0_hat: Tensor  # (B, C, H, W)  the model's estimate of z0
    noise_level: Tensor  # (B,)          sigma_t / alpha_t
    loss: Tensor  # (B,)          mean squared error per sample, unweighted, unreduced
    spread: Tensor | None  # (B, C, H, W)  what a model with learned_sigma says of its variance
    hidden: dict[int, Tensor]  # as DenoiserOutput has them


def denoise(
    model: Callable[..., DenoiserOutput],
    kind: Prediction,
    z0: Tensor,
    eps: Tensor,
    t: Tensor,
    alpha_t: Tensor,
    sigma_t: Tensor,
    cond: Any,
    hidden_blocks: tuple[int, ...] = (),
) -> Denoising:
    """Noise `z0`, ask `model`, and compare.  Sources: eps 2006.11239 (14), v 2202.00512 (appendix
    D), flow 2209.03003.
    """
    a, s = (c.view(-1, 1, 1, 1) for c in (alpha_t, sigma_t))
    z_t = a * z0 + s * eps
    output, hidden = model(z_t, t, cond, hidden_blocks)
    out, spread = output.to(z0.dtype), None  # loss math is fp32 under any autocast
    if out.shape[1] == 2 * z0.shape[1]:
        out, spread = out.chunk(2, dim=1)
    target, z0_hat = {
        Prediction.EPS: lambda: (eps, (z_t - s * out) / a),
        Prediction.V: lambda: (a * eps - s * z0, a * z_t - s * out),  # needs alpha^2 + sigma^2 = 1
        Prediction.FLOW: lambda: (eps - z0, z_t - s * out),  # needs alpha + sigma = 1; u = dz_t/dt
    }[kind]()
    return Denoising(
        z0, z0_hat, sigma_t / alpha_t, (out - target).square().mean(dim=(1, 2, 3)), spread, hidden
    )
