"""DiT weights in the published layout and in diffusers': the same outputs, and bit-equal round
trips.
"""

import pytest
import torch
from diffusers import DiTTransformer2DModel

from lpl_pretrain.config.dataset import LatentEntry
from lpl_pretrain.config.model import DiTConfig
from lpl_pretrain.errors import CheckpointError, ConfigError
from lpl_pretrain.models.build import build_denoiser
from lpl_pretrain.models.conditioning import Conditioning
from lpl_pretrain.models.convert_dit import from_diffusers, from_published, to_diffusers
from lpl_pretrain.models.layers import sincos_position_embedding

LATENT = LatentEntry(channels=4, height=8, width=8, mean=[0.0] * 4, std=[1.0] * 4)
CLASSES = 5
CONFIG = DiTConfig(
    width=48, depth=3, heads=3, patch_size=2, learned_sigma=True, timestep_frequencies="diffusers"
)


def random_model(config=CONFIG):
    model = build_denoiser(config, LATENT, CLASSES)
    torch.manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return model


def exported(model, config=CONFIG):
    return to_diffusers(model.state_dict(), config, channels=4, side=8, num_classes=CLASSES)


def diffusers_model(settings, state):
    theirs = DiTTransformer2DModel(**settings).eval()
    missing, unexpected = theirs.load_state_dict(state, strict=False)
    assert not unexpected and all("pos_embed.pos_embed" in name for name in missing), (
        missing,
        unexpected,
    )
    return theirs


@pytest.mark.parametrize("learned_sigma", [True, False])
def test_diffusers_gives_the_same_output(learned_sigma):
    config = CONFIG.model_copy(update={"learned_sigma": learned_sigma})
    model = random_model(config)
    theirs = diffusers_model(*exported(model, config))
    z_t, timesteps, labels = (
        torch.randn(4, 4, 8, 8),
        torch.tensor([0, 17, 500, 999]),
        torch.tensor([0, 3, 5, 4]),
    )
    with torch.no_grad():
        got = theirs(z_t, timestep=timesteps, class_labels=labels).sample
        wanted = model(z_t, timesteps / 1000, Conditioning(labels)).output
    assert got.shape == wanted.shape == (4, 8 if learned_sigma else 4, 8, 8)
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


def test_has_teeth_other_rates():
    """The published rates give other outputs with the same weights."""
    model = random_model()
    other = build_denoiser(
        CONFIG.model_copy(update={"timestep_frequencies": "dit"}), LATENT, CLASSES
    )
    other.load_state_dict(model.state_dict())
    inputs = torch.randn(1, 4, 8, 8), torch.tensor([0.5]), Conditioning(torch.tensor([1]))
    with pytest.raises(AssertionError):
        torch.testing.assert_close(
            other(*inputs).output, model(*inputs).output, rtol=1e-3, atol=1e-3
        )


def test_the_round_trip_is_bit_equal():
    """Published layout -> ours -> diffusers -> ours."""
    wanted = random_model().state_dict()
    published = {"pos_embed": sincos_position_embedding(48, 4, 4), **wanted}
    settings, state = to_diffusers(
        from_published(published), CONFIG, channels=4, side=8, num_classes=CLASSES
    )
    config, ours = from_diffusers(settings, state)
    assert config == CONFIG and ours.keys() == wanted.keys()
    assert all(torch.equal(ours[name], tensor) for name, tensor in wanted.items())
    diffusers_model(settings, state)


def test_the_published_names():
    """Names of DiT-XL-2-256x256.pt, for three blocks."""
    names = {
        "x_embedder.proj",
        "t_embedder.mlp.0",
        "t_embedder.mlp.2",
        "final_layer.linear",
        "final_layer.adaLN_modulation.1",
    }
    names |= {
        f"blocks.{i}.{part}"
        for i in range(3)
        for part in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2", "adaLN_modulation.1")
    }
    wanted = {f"{name}.{end}" for name in names for end in ("weight", "bias")} | {
        "y_embedder.embedding_table.weight"
    }
    assert set(random_model().state_dict()) == wanted


@pytest.mark.parametrize(
    "change, words",
    [
        ({"rope": True}, "model.rope: "),
        ({"timestep_frequencies": "dit"}, "timestep_frequencies=dit"),
    ],
)
def test_what_diffusers_cannot_express(change, words):
    config = CONFIG.model_copy(update=change)
    with pytest.raises(ConfigError, match=words):
        exported(random_model(config), config)


def test_copies_that_differ():
    settings, state = exported(random_model())
    state["transformer_blocks.1.norm1.emb.timestep_embedder.linear_1.bias"] += 1
    with pytest.raises(CheckpointError, match="blocks hold different copies"):
        from_diffusers(settings, state)
