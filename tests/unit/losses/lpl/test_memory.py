"""LPL's memory does not grow with the number of samples: counted on the meta device, with a decoder
of SD's widths.
"""

import pytest
import torch
from diffusers import AutoencoderKL

from lpl_pretrain.config.lpl import LPLConfig
from lpl_pretrain.losses.lpl.features import DecoderFeatures
from lpl_pretrain.losses.lpl.loss import LatentPerceptualLoss
from lpl_pretrain.models.autoencoder import LatentScaling, decoder_stages
from lpl_pretrain.planning.live_bytes import LiveBytes


@pytest.fixture(scope="module")
def decoder():
    with torch.device("meta"):
        network = AutoencoderKL(
            block_out_channels=(128, 256, 512, 512),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=1,
            scaling_factor=0.18215,
        )
    return decoder_stages(network)


def peak(decoder, samples, *, dtype=torch.float32, **options):
    scaling = LatentScaling(torch.zeros(4, device="meta"), torch.ones(4, device="meta"))
    features = DecoderFeatures(decoder, scaling, options.pop("stages", None), dtype=dtype)
    loss = LatentPerceptualLoss(LPLConfig(weight=1.0, **options), features)
    z0, z0_hat = (torch.empty(samples, 4, 32, 32, device="meta") for _ in range(2))
    with LiveBytes() as live:
        loss(
            z0, z0_hat, torch.empty(samples, device="meta"), torch.empty(samples, 2, device="meta")
        )
    return live.peak


def test_the_peak_is_flat_in_the_number_of_samples(decoder):
    one, four, sixteen = (peak(decoder, samples, chunk_size=1) for samples in (1, 4, 16))
    assert one < four < sixteen < 1.05 * one


@pytest.mark.parametrize(
    "options",
    [
        {"activation_checkpointing": False},
        {"dtype": torch.bfloat16},
        {"normalize": {"over": "batch"}},
    ],
    ids=str,
)
def test_the_peak_is_flat_for_every_option(decoder, options):
    assert peak(decoder, 4, chunk_size=1, **options) < 1.01 * peak(
        decoder, 1, chunk_size=1, **options
    )


def test_has_teeth_one_chunk_for_all(decoder):
    assert peak(decoder, 4, chunk_size=4) > 3 * peak(decoder, 4, chunk_size=1)


def test_fewer_stages_crops_and_bf16_reduce_the_peak(decoder):
    whole = peak(decoder, 1, chunk_size=1)
    assert peak(decoder, 1, chunk_size=1, stages=["mid", "up0"]) < 0.2 * whole
    assert peak(decoder, 1, chunk_size=1, crop={"side": 12, "halo": 2}) < 0.4 * whole
    assert peak(decoder, 1, chunk_size=1, dtype=torch.bfloat16) < 0.8 * whole
    assert whole < 0.8 * peak(decoder, 1, chunk_size=1, activation_checkpointing=False)
