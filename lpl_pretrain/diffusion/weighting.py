"""Weight of each noise level in the diffusion loss.

Every kind is a weight on the squared error of eps or of z0: the first is SNR = alpha^2 / sigma^2
times the second.  The error of what is predicted becomes that of z0 by 1 / SNR for eps, 1 / (SNR +
1) for v, and sigma^2 for the flow velocity (alpha = 1 - sigma).
"""

from __future__ import annotations

import torch
from torch import Tensor

from lpl_pretrain.config.diffusion import WeightingConfig
from lpl_pretrain.config.schema import Prediction


def loss_weight(config: WeightingConfig, prediction: Prediction, noise_level: Tensor) -> Tensor:
    """(B,) factors for the per-sample mean squared errors of what is predicted.

    min_snr       on z0: min(SNR, gamma)                 arXiv 2303.09556, equation 7
    soft_min_snr  on z0: SNR gamma / (SNR + gamma)       arXiv 2401.11605, equation 6
    p2            on eps: 1 / (k + SNR)^power            arXiv 2204.00227, equation 8
    sigmoid       on eps: sigmoid(bias - log SNR)        arXiv 2303.00848, appendix K;
                                                         2410.19324, section 3.1
    """
    if config.kind == "uniform":
        return torch.ones_like(noise_level)
    snr = noise_level.clamp(min=1e-8) ** -2
    on_z0 = {
        "min_snr": lambda: snr.clamp(max=config.gamma),
        "soft_min_snr": lambda: snr * config.gamma / (snr + config.gamma),
        "p2": lambda: snr / (config.k + snr) ** config.power,
        "sigmoid": lambda: snr * torch.sigmoid(config.bias - snr.log()),
    }[config.kind]()
    if prediction is Prediction.EPS:
        return on_z0 / snr
    if prediction is Prediction.V:
        return on_z0 / (snr + 1)
    return on_z0 * (noise_level / (1 + noise_level)).square()
