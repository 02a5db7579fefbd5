"""Stage features are those that `decode()` itself goes through, and nothing else of the autoencoder is kept."""

import pytest
import torch

from lpl_pretrain.perceptual.features import DecoderFeatures
from tests.support.autoencoders import scaling_of, tiny_autoencoder


def pixels_from_last_stage(autoencoder, hidden):
    decoder = autoencoder.network.decoder
    return decoder.conv_out(decoder.conv_act(decoder.conv_norm_out(hidden)))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"post_quant_conv": False},
        {"attention": False},
        {"latent_channels": 16, "shift_factor": 0.1},
        {"levels": 4},
        {"levels": 2},
    ],
    ids=str,
)
@pytest.mark.parametrize("checkpointing", [True, False])
def test_last_stage_leads_to_the_decoded_pixels(options, checkpointing):
    autoencoder = tiny_autoencoder(**options)
    raw = torch.randn(2, autoencoder.latent_channels, 8, 8)
    wanted = autoencoder.decode(raw)
    scaling = scaling_of(autoencoder)
    features = DecoderFeatures(autoencoder, scaling, None, activation_checkpointing=checkpointing)
    z0 = scaling.normalize(raw).requires_grad_()
    stages = features(z0)
    assert list(stages) == ["mid", *(f"up{i}" for i in range(len(autoencoder.network.decoder.up_blocks)))]
    torch.testing.assert_close(pixels_from_last_stage(autoencoder, stages[features.stages[-1]]), wanted, rtol=1e-5, atol=1e-5)


def test_has_teeth_without_post_quant_conv():
    """The public implementation skips it: its features are those of a wrong input."""
    autoencoder = tiny_autoencoder()
    raw = torch.randn(2, 4, 8, 8)
    wanted = autoencoder.decode(raw)
    features = DecoderFeatures(autoencoder, scaling_of(autoencoder), None)
    features.entrance[0] = torch.nn.Identity()
    wrong = pixels_from_last_stage(autoencoder, features(scaling_of(autoencoder).normalize(raw))["up2"])
    with pytest.raises(AssertionError):
        torch.testing.assert_close(wrong, wanted, rtol=1e-2, atol=1e-2)


def test_sides_and_channels_of_the_stages():
    features = DecoderFeatures(tiny_autoencoder(levels=4), scaling_of(tiny_autoencoder()), None)
    shapes = {name: tuple(x.shape[1:]) for name, x in features(torch.randn(1, 4, 8, 8)).items()}
    assert [s[1] for s in shapes.values()] == [8, 16, 32, 64, 64]


def test_decoder_stops_at_the_deepest_stage_asked_for():
    whole = DecoderFeatures(tiny_autoencoder(), scaling_of(tiny_autoencoder()), None)
    early = DecoderFeatures(tiny_autoencoder(), scaling_of(tiny_autoencoder()), ["up0"])
    assert list(early.bodies) == ["mid", "up0"]
    z0 = torch.randn(1, 4, 8, 8)
    assert list(early(z0)) == ["up0"]
    assert torch.equal(early(z0)["up0"], whole(z0)["up0"])


def test_encoder_is_not_kept_and_nothing_trains():
    autoencoder = tiny_autoencoder()
    features = DecoderFeatures(autoencoder, scaling_of(autoencoder), None)
    kept = {id(p) for p in features.parameters()}
    assert not kept & {id(p) for p in autoencoder.network.encoder.parameters()}
    assert not any(p.requires_grad for p in features.parameters())


def test_checkpointing_changes_no_gradient():
    grads = []
    for checkpointing in (True, False):
        features = DecoderFeatures(tiny_autoencoder(), scaling_of(tiny_autoencoder()), None, activation_checkpointing=checkpointing)
        torch.manual_seed(1)
        z0 = torch.randn(2, 4, 8, 8, requires_grad=True)
        sum(x.square().mean() for x in features(z0).values()).backward()
        grads.append(z0.grad)
    assert torch.equal(*grads)
