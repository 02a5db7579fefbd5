"""Merged upsampling is the same map with the same gradient, and is taken only where it is."""

import pytest
import torch
from diffusers.models.upsampling import Upsample2D
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from lpl_pretrain.models.autoencoder import decoder_stages
from lpl_pretrain.models.upsampling import merge_upsampling
from tests.support.autoencoders import tiny_distilled, tiny_network

PAIRS = {
    "Upsample2D": lambda: [Upsample2D(6, use_conv=True, out_channels=5)],
    "Upsample, Conv2d": lambda: [
        nn.Upsample(scale_factor=2),
        nn.Conv2d(6, 5, 3, padding=1, bias=False),
    ],
}


@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("side", [1, 2, 5])
def test_same_map_and_gradient_for_fewer_flops(pair, side):
    pieces = nn.Sequential(*PAIRS[pair]()).double()
    merged = nn.Sequential(*merge_upsampling(list(pieces)))
    x = torch.randn(2, 6, side, side + 2, dtype=torch.float64, requires_grad=True)
    g = torch.randn(2, 5, 2 * side, 2 * side + 4, dtype=torch.float64)
    flops, results = [], []
    for module in (pieces, merged):
        with FlopCounterMode(display=False) as counter:
            y = module(x)
        flops.append(counter.get_total_flops())
        results.append((y, torch.autograd.grad(y, x, g)[0]))
    for got, wanted in zip(results[1], results[0]):
        torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-13)
    assert flops[1] * 9 == flops[0] * 4


def test_has_teeth_a_kernel_that_is_not_flipped():
    upsample, convolution = PAIRS["Upsample, Conv2d"]()
    (merged,) = merge_upsampling([upsample, convolution])
    merged.weight.data = merged.weight.data.flip(2, 3)
    x = torch.randn(1, 6, 4, 4)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(merged(x), convolution(upsample(x)), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize(
    "pieces",
    [
        [nn.Upsample(scale_factor=2, mode="bilinear"), nn.Conv2d(3, 3, 3, padding=1)],
        [nn.Upsample(scale_factor=4), nn.Conv2d(3, 3, 3, padding=1)],
        [nn.Upsample(scale_factor=2), nn.Conv2d(3, 3, 3, padding=1, padding_mode="reflect")],
        [nn.Upsample(scale_factor=2), nn.Conv2d(3, 3, 5, padding=2)],
        [Upsample2D(6, use_conv=False)],
    ],
    ids=str,
)
def test_others_are_left_alone(pieces):
    assert merge_upsampling(pieces) == pieces


@pytest.mark.parametrize(
    "make, count",
    [(lambda: tiny_network(levels=4), 3), (lambda: tiny_distilled(levels=4), 3)],
    ids=["kl", "tiny"],
)
def test_all_upsamplings_of_a_decoder_are_found(make, count):
    stages = decoder_stages(make()).map_layers(merge_upsampling)
    assert sum(isinstance(module, nn.ConvTranspose2d) for module in stages.modules()) == count
