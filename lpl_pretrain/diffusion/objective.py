"""Training target of the denoiser for each prediction type, and the z0 estimate from its output.

Convention:  z_t = alpha_t * z0 + sigma_t * eps,  t in [0, 1],  t = 0 is data, t = 1 is noise.
Shapes:      latents (B, C, H, W) float32;  t, alpha_t, sigma_t, mse (B,) float32.
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
    """Denoiser's result for one microbatch; the input of every loss term."""

    z0: Tensor  # (B, C, H, W)  clean normalised latents
    z0_hat: Tensor  # (B, C, H, W)  the model's estimate of z0
    noise_level: Tensor  # (B,)          sigma_t / alpha_t
    mse: Tensor  # (B,)          mean squared error per sample, unweighted, unreduced
    variance_logits: Tensor | None  # (B, C, H, W)  with learned_sigma: see learned_sigma.py
    hidden: dict[int, Tensor]  # DenoiserOutput.hidden


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
    """Add noise to `z0`, run `model`, and compare its output with the target.

    Sources: eps 2006.11239 (14), v 2202.00512 (appendix D), flow 2209.03003.
    """
    a, s = (c.view(-1, 1, 1, 1) for c in (alpha_t, sigma_t))
    z_t = a * z0 + s * eps
    output, hidden = model(z_t, t, cond, hidden_blocks)
    out = output.to(z0.dtype)  # loss math is fp32 under any autocast
    variance_logits = None
    if out.shape[1] == 2 * z0.shape[1]:
        out, variance_logits = out.chunk(2, dim=1)
    target, z0_hat = {
        Prediction.EPS: lambda: (eps, (z_t - s * out) / a),
        Prediction.V: lambda: (a * eps - s * z0, a * z_t - s * out),  # needs alpha^2 + sigma^2 = 1
        Prediction.FLOW: lambda: (eps - z0, z_t - s * out),  # needs alpha + sigma = 1; u = dz_t/dt
    }[kind]()
    mse = (out - target).square().mean(dim=(1, 2, 3))
    return Denoising(z0, z0_hat, sigma_t / alpha_t, mse, variance_logits, hidden)
