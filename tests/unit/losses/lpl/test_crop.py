"""A window with a halo sees inside what the whole latent shows there, and its gradient goes back to
its place.
"""

import pytest
import torch

from lpl_pretrain.config.lpl import CropConfig, LPLConfig
from lpl_pretrain.losses.lpl.crop import Windows
from lpl_pretrain.losses.lpl.loss import LatentPerceptualLoss
from tests.support.autoencoders import features_of, tiny_autoencoder, tiny_distilled, wrap
from tests.support.toy_decoder import toy_decoder_features
from tests.unit.losses.lpl.reference import reference_loss

RECEPTIVE = 9  # of the tiny distilled decoder, in latent positions, rounded up


def corner_places(count=3):
    return torch.tensor([[0.0, 0.0], [0.5, 0.999], [0.999, 0.3]])[:count]


@pytest.mark.parametrize("stage", ["mid", "up0", "up1"])
def test_the_interior_of_a_crop_is_exact_on_a_decoder_without_attention(stage):
    """Decoders of the TAESD family have no norm and no attention, so a halo as wide as their
    receptive field makes the crop exact.
    """
    features = features_of(wrap(tiny_distilled()), dtype=torch.float64)
    z0, config = torch.randn(3, 4, 40, 32, dtype=torch.float64), CropConfig(side=6, halo=RECEPTIVE)
    windows = Windows.at(corner_places(), config, 40, 32)
    whole, cut = features(z0)[stage], features(windows.cut(z0))[stage]
    upscale = whole.shape[-1] // 32
    for i in range(3):
        y, x = ((windows.start + windows.offset_in_window)[i] * upscale).tolist()
        expected = whole[i, :, y : y + 6 * upscale, x : x + 6 * upscale]
        torch.testing.assert_close(windows.interior(cut)[i], expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("broken", ["halo too small", "attention and norms see the whole"])
def test_has_teeth(broken):
    make = tiny_autoencoder if broken.startswith("attention") else lambda: wrap(tiny_distilled())
    features = features_of(make(), dtype=torch.float64)
    z0 = torch.randn(1, 4, 32, 32, dtype=torch.float64)
    windows = Windows.at(
        torch.tensor([[0.5, 0.5]]),
        CropConfig(side=6, halo=1 if broken.startswith("halo") else RECEPTIVE),
        32,
        32,
    )
    y, x = (4 * (windows.start + windows.offset_in_window)[0]).tolist()
    with pytest.raises(AssertionError):
        expected = features(z0)["up1"][:, :, y : y + 24, x : x + 24]
        torch.testing.assert_close(
            windows.interior(features(windows.cut(z0))["up1"]), expected, rtol=1e-3, atol=1e-4
        )


@pytest.mark.parametrize("size", [(12, 12), (8, 17)])
@pytest.mark.parametrize("side, halo", [(4, 0), (4, 2), (8, 4), (7, 100)])
def test_crops_cover_every_position_and_stay_inside(size, side, halo):
    height, width = size
    places = torch.rand(4000, 2, generator=torch.Generator().manual_seed(0))
    windows = Windows.at(places, CropConfig(side=side, halo=halo), height, width)
    first = windows.start + windows.offset_in_window
    limits = torch.tensor([height, width])
    assert (windows.start >= 0).all() and (
        windows.start + torch.tensor([windows.height, windows.width]) <= limits
    ).all()
    assert (
        (windows.offset_in_window >= 0).all()
        and (first.amin(0) == 0).all()
        and (first.amax(0) == limits - side).all()
    )
    surrounded = torch.minimum(first, limits - side - first).clamp(max=halo)
    assert (windows.offset_in_window >= surrounded).all()


def test_gradient_is_that_of_the_windows():
    """Compares with the reference loss on windows that are cut one by one."""
    torch.manual_seed(0)
    z0 = torch.randn(3, 3, 8, 10, dtype=torch.float64)
    z0_hat, weights = (
        z0 + 0.4 * torch.randn_like(z0),
        torch.tensor([1.0, 0.0, 2.0], dtype=torch.float64),
    )
    config = LPLConfig(weight=1.0, crop={"side": 4, "halo": 1}, chunk_size=2)
    term = LatentPerceptualLoss(config, toy_decoder_features())(
        z0, z0_hat, weights, corner_places()
    )
    leaf, windows, features = (
        z0_hat.clone().requires_grad_(),
        Windows.at(corner_places(), config.crop, 8, 10),
        toy_decoder_features(),
    )
    clean, predicted = [], []
    for i in range(3):
        (y, x), (dy, dx) = windows.start[i].tolist(), windows.offset_in_window[i].tolist()
        for whole, kept in ((z0, clean), (leaf, predicted)):
            maps = features(whole[i : i + 1, :, y : y + 6, x : x + 6])
            kept.append(
                {
                    n: m[:, :, s * dy : s * (dy + 4), s * dx : s * (dx + 4)]
                    for (n, m), s in zip(maps.items(), (1, 2, 4))
                }
            )
    join = lambda parts: {name: torch.cat([part[name] for part in parts]) for name in parts[0]}  # noqa: E731
    loss = reference_loss(config, join(clean), join(predicted), weights, 4)
    loss.sum().backward()
    torch.testing.assert_close(term.loss, loss.detach(), rtol=1e-10, atol=1e-13)
    torch.testing.assert_close(term.gradient, leaf.grad, rtol=1e-8, atol=1e-13)


def test_a_crop_of_the_whole_latent_changes_nothing():
    torch.manual_seed(0)
    z0 = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    z0_hat, weights = z0 + 0.4 * torch.randn_like(z0), torch.ones(2, dtype=torch.float64)
    terms = [
        LatentPerceptualLoss(LPLConfig(weight=1.0, crop=crop), toy_decoder_features())(
            z0, z0_hat, weights, torch.rand(2, 2)
        )
        for crop in (None, {"side": 8})
    ]
    assert torch.equal(terms[0].loss, terms[1].loss)
    torch.testing.assert_close(terms[0].gradient, terms[1].gradient, rtol=1e-12, atol=1e-15)
