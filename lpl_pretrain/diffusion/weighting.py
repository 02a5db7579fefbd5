"""How much each noise level counts in the diffusion loss."""

from __future__ import annotations

import torch
from torch import Tensor

from lpl_pretrain.config.schema import Prediction
from lpl_pretrain.config.section import WeightingConfig


def loss_weight(config: WeightingConfig, prediction: Prediction, noise_level: Tensor) -> Tensor:
    """(B,) factors for the per-sample mean squared errors.

    min_snr: min(SNR, gamma) on the error of z0 (arXiv 2303.09556, equation 7), restated for what the denoiser predicts:
    eps divides by SNR, v by SNR + 1, and the flow velocity (z0 error = sigma^2 x error of u, alpha = 1 / (1 + noise_level))
    multiplies by sigma^2.
    """
    if config.kind == "uniform":
        return torch.ones_like(noise_level)
    snr = noise_level.clamp(min=1e-8) ** -2
    on_z0 = snr.clamp(max=config.gamma)
    if prediction is Prediction.EPS:
        return on_z0 / snr
    if prediction is Prediction.V:
        return on_z0 / (snr + 1)
    return on_z0 * (noise_level / (1 + noise_level)).square()
