"""The frozen autoencoder: moments in, pictures out, scaling there and back, and who it is."""

import json

import pytest
import torch
from diffusers.models import model_loading_utils

from lpl_pretrain.config.hashing import autoencoder_identity
from lpl_pretrain.config.load import resolve_path
from lpl_pretrain.errors import ConfigError, exit_status
from lpl_pretrain.models.autoencoder import (
    LatentScaling,
    latent_scaling,
    load_autoencoder,
    sample_posterior,
)
from tests.support.autoencoders import tiny_folder
from tests.support.configs import dataset_index


def test_moments_and_decode(tmp_path):
    autoencoder = load_autoencoder(tiny_folder(tmp_path, shift_factor=0.25))
    assert (
        autoencoder.downscale,
        autoencoder.latent_channels,
        autoencoder.scale,
        autoencoder.shift,
    ) == (4, 4, 0.5, 0.25)
    images = torch.rand(2, 3, 32, 16) * 2 - 1
    moments = autoencoder.encode_moments(images)
    assert moments.shape == (2, 8, 8, 4) and (moments[:, 4:] > 0).all()
    posterior = autoencoder.network.encode(images).latent_dist
    assert torch.equal(sample_posterior(moments, None), posterior.mean)
    noise = torch.randn_like(posterior.mean)
    torch.testing.assert_close(
        sample_posterior(moments, noise), posterior.mean + posterior.std * noise
    )
    assert autoencoder.decode(posterior.mean).shape == images.shape
    assert not any(p.requires_grad for p in autoencoder.parameters())


def test_identity_follows_weights_and_config(tmp_path):
    a, b, c = (
        autoencoder_identity(resolve_path(tiny_folder(tmp_path / name, seed=seed)))
        for name, seed in (("a", 0), ("b", 0), ("c", 1))
    )
    assert a == b != c
    config = tmp_path / "b" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "scaling_factor": 0.7}))
    autoencoder_identity.cache_clear()
    assert autoencoder_identity(tmp_path / "b") != a


def test_folder_that_is_no_autoencoder(tmp_path):
    with pytest.raises(ConfigError, match="config.json not found"):
        load_autoencoder(str(tmp_path))
    folder = tiny_folder(tmp_path / "x")
    (tmp_path / "x" / "diffusion_pytorch_model.safetensors").write_bytes(b"nonsense")
    with pytest.raises(ConfigError, match="cannot load it"):
        load_autoencoder(folder)


def test_weights_that_cannot_be_read_now_say_why(tmp_path, monkeypatch):
    """diffusers takes them for missing, and tells nothing of the disk."""
    folder = tiny_folder(tmp_path)
    load_autoencoder(folder)

    def refused(path, *args, **kwargs):
        if str(path).endswith(".safetensors") and refuses:
            refuses.pop()
            raise OSError(116, "Stale file handle", str(path))
        return real(path, *args, **kwargs)

    real, refuses = open, [True]
    monkeypatch.setattr(model_loading_utils, "open", refused, raising=False)
    with pytest.raises(
        ConfigError, match="cannot load it as an AutoencoderKL: Stale file handle"
    ) as error:
        load_autoencoder(folder)
    assert not refuses and exit_status(error.value) == 1, "another try may find them"


def test_scaling_there_and_back():
    raw = torch.randn(2, 4, 3, 3)
    scaling = LatentScaling(torch.tensor([0.1, 0.2, 0.3, 0.4]), torch.tensor([1.0, 2.0, 3.0, 4.0]))
    torch.testing.assert_close(scaling.denormalize(scaling.normalize(raw)), raw)
    torch.testing.assert_close(scaling.normalize(raw)[:, 1], (raw[:, 1] - 0.2) * 2)


def test_scaling_kinds():
    index = dataset_index()
    index = index.model_copy(
        update={
            "latent": index.latent.model_copy(update={"std": [2.0] * 4, "mean": [1.0] * 4}),
            "autoencoder": index.autoencoder.model_copy(update={"scale": 0.5, "shift": 0.25}),
        }
    )
    assert latent_scaling("per_channel", index).scale.tolist() == [0.5] * 4
    assert latent_scaling("per_channel", index).shift.tolist() == [1.0] * 4
    assert latent_scaling("autoencoder", index).shift.tolist() == [0.25] * 4


def test_the_shipped_autoencoder_loads():
    autoencoder = load_autoencoder("asset:autoencoder_emoji")
    assert (autoencoder.downscale, autoencoder.latent_channels) == (4, 4)
    assert sum(p.numel() for p in autoencoder.parameters()) <= 3_000_000
    assert (
        json.loads((resolve_path("asset:autoencoder_emoji") / "quality.json").read_text())[
            "held_out_psnr_db"
        ]
        >= 29.0
    )
