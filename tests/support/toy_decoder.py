"""A decoder of three smooth stages in float64, with the resolutions of a real one (H, 2H, 4H)."""

import torch
from torch import nn

from lpl_pretrain.losses.lpl.features import DecoderFeatures
from lpl_pretrain.models.autoencoder import LatentScaling
from lpl_pretrain.models.decoder import DecoderStages


class Mid(nn.Module):
    def forward(self, x):
        return x.tanh() + x.roll(1, 1)


class Up(nn.Module):
    def forward(self, x):
        big = nn.functional.interpolate(x, scale_factor=2, mode="bilinear")
        return (big * big.roll(1, 2)).sin() + big


class Softplus(nn.Module):
    def forward(self, x):
        return x.exp().log1p()


def toy_decoder_features(stages: list[str] | None = None, channels: int = 3) -> DecoderFeatures:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        conv_in = nn.Conv2d(channels, channels, 1)
    decoder = DecoderStages(
        conv_in, {"mid": [Mid()], "up0": [Up()], "up1": [Up(), Softplus()]}, nn.Identity()
    )
    scaling = LatentScaling(torch.full((channels,), 0.1), torch.full((channels,), 1.5))
    return DecoderFeatures(decoder, scaling, stages, dtype=torch.float64)
