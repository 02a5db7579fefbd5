"""Every known family, run stage by stage, is exactly `decode()`; and what config.json says of the
stages is what they do.
"""

import json

import pytest
import torch
from diffusers import AutoencoderKLFlux2

from lpl_pretrain.config.autoencoder import read_autoencoder
from lpl_pretrain.errors import ConfigError
from lpl_pretrain.models.autoencoder import decoder_stages, load_autoencoder
from tests.support.autoencoders import tiny_dc, tiny_distilled, tiny_network, wrap

FAMILIES = {
    "SD, SDXL": lambda: tiny_network(levels=4),
    "SD without attention": lambda: tiny_network(attention=False),
    "VQ-f16": lambda: tiny_network(up_block="AttnUpDecoderBlock2D"),
    "SD3, FLUX": lambda: tiny_network(post_quant_conv=False, latent_channels=16, shift_factor=0.1),
    "FLUX.2": lambda: tiny_network(latent_channels=32, family=AutoencoderKLFlux2),
    "one level": lambda: tiny_network(levels=1),
    "TAESD": lambda: tiny_distilled(levels=4),
    "TAEF1": lambda: tiny_distilled(latent_channels=16, levels=2),
    "SANA": lambda: tiny_dc(),
    "SANA, exit upsamples": lambda: tiny_dc(layers=(0, 2, 1)),
    "SANA, no shortcut": lambda: tiny_dc(
        decoder_in_shortcut=False, upsample_block_type="interpolate"
    ),
}


@pytest.fixture(params=FAMILIES, ids=str)
def network(request):
    return FAMILIES[request.param]().eval()


def test_all_stages_are_decode(network):
    raw = torch.randn(2, network.config.latent_channels, 6, 10)
    with torch.no_grad():
        assert torch.equal(decoder_stages(network)(raw), network.decode(raw).sample)


def test_stages_and_sides_are_what_the_configuration_says(network, tmp_path):
    """Read from config.json alone, on a login node."""
    network.save_pretrained(tmp_path)
    facts = read_autoencoder("x", tmp_path)
    stages, hidden = decoder_stages(network), torch.randn(1, facts.latent_channels, 4, 4)
    hidden = stages.conv_in(hidden)
    found = {}
    for name, stage in stages.stages.items():
        hidden = stage(hidden)
        found[name] = hidden.shape[-1] // 4
    assert found == facts.upscales
    assert stages.conv_out(hidden).shape[-1] == 4 * facts.downscale


def test_encodes_and_decodes_through_one_door(network, tmp_path):
    network.save_pretrained(tmp_path)
    autoencoder = load_autoencoder(str(tmp_path))
    images = torch.rand(1, 3, 4 * autoencoder.downscale, 4 * autoencoder.downscale) * 2 - 1
    moments = autoencoder.encode_moments(images)
    assert moments.shape == (1, 2 * autoencoder.latent_channels, 4, 4) and moments.isfinite().all()
    assert autoencoder.decode(moments[:, : autoencoder.latent_channels]).shape == images.shape
    assert autoencoder.scale > 0


@pytest.mark.parametrize("damage", ["skips post_quant_conv", "skips a piece", "forgets the order"])
def test_has_teeth(damage):
    network = tiny_network(levels=4).eval()
    stages, raw = decoder_stages(network), torch.randn(1, 4, 6, 6)
    if damage == "skips post_quant_conv":  # as the public implementation does
        stages.conv_in[0] = torch.nn.Identity()
    elif damage == "skips a piece":
        stages.stages["up1"] = torch.nn.Sequential(*list(stages.stages["up1"])[1:])
    else:
        stages.stages["mid"] = torch.nn.Sequential(*reversed(stages.stages["mid"]))
    with torch.no_grad(), pytest.raises((AssertionError, RuntimeError)):
        torch.testing.assert_close(stages(raw), network.decode(raw).sample, rtol=1e-2, atol=1e-2)


def test_flux2_latents_have_unit_scale_on_the_whole():
    """FLUX.2's config.json has no scaling factor; its batch norm's running statistics are used."""
    network = tiny_network(latent_channels=32, family=AutoencoderKLFlux2)
    mean, std = network.bn.running_mean, network.bn.running_var.sqrt()
    patches = mean[:, None] + std[:, None] * torch.randn(128, 100_000)
    autoencoder = wrap(network)
    z0 = (patches - autoencoder.shift) * autoencoder.scale
    assert abs(z0.mean()) < 0.01 and abs(z0.std() - 1) < 0.01


def test_an_unknown_decoder_is_refused_with_those_that_are_known(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "AutoencoderOobleck"}))
    with pytest.raises(ConfigError) as error:
        read_autoencoder("some/folder", tmp_path)
    for word in (
        "some/folder",
        "AutoencoderOobleck",
        "AutoencoderKL,",
        "AutoencoderTiny",
        "AutoencoderDC",
        "AutoencoderKLFlux2",
    ):
        assert word in str(error.value)


def test_an_unknown_block_is_refused(tmp_path):
    tiny_network().save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(
        json.dumps({**settings, "up_block_types": ["UpDecoderBlock2D", "Strange"]})
    )
    with pytest.raises(ConfigError, match="Strange; known are UpDecoderBlock2D"):
        read_autoencoder("x", tmp_path)


def test_weights_with_nan_are_refused(tmp_path):
    network = tiny_network()
    network.decoder.conv_in.weight.data[0, 0, 0, 0] = torch.nan
    network.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="NaN or infinity in decoder.conv_in.weight"):
        load_autoencoder(str(tmp_path))
