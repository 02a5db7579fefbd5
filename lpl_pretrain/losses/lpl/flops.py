"""FLOPs of LPL, counted on meta tensors."""

from __future__ import annotations

import torch

from lpl_pretrain.config.dataset import DatasetIndex
from lpl_pretrain.config.lpl import LPLConfig
from lpl_pretrain.losses.lpl.features import DecoderFeatures
from lpl_pretrain.losses.lpl.loss import LatentPerceptualLoss
from lpl_pretrain.planning.flops import mean_over_buckets, on_meta


def lpl_flops(config: LPLConfig, features: DecoderFeatures, index: DatasetIndex) -> float:
    """FLOPs of a sample: both branches and the gradient at z0_hat, averaged over the buckets'
    samples.  `features` are not compiled yet.
    """
    uncheckpointed = config.model_copy(update={"activation_checkpointing": False})
    loss = LatentPerceptualLoss(uncheckpointed, on_meta(features))
    weights = torch.empty(1, device="meta")
    crop_positions = torch.empty(1, 2, device="meta")

    def sample(height: int, width: int) -> None:
        z0, z0_hat = torch.empty(2, 1, index.latent.channels, height, width, device="meta")
        loss(z0, z0_hat, weights, crop_positions)

    return mean_over_buckets(index, sample)
