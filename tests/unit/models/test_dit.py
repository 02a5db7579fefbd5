"""The DiT: shapes, zero at initialisation, a working patch round trip, conditions that matter, fixed position embeddings."""

import pytest
import torch
from diffusers.models.embeddings import get_2d_sincos_pos_embed

from lpl_pretrain.config.dataset import LatentEntry
from lpl_pretrain.config.schema import DiTConfig
from lpl_pretrain.models.build import build_denoiser
from lpl_pretrain.models.conditioning import Conditioning, class_conditioning
from lpl_pretrain.models.layers import sincos_position_embedding, unpatchify

LATENT = LatentEntry(channels=4, height=8, width=12, mean=[0.0] * 4, std=[1.0] * 4)


def tiny(seed=0):
    return build_denoiser(DiTConfig(width=32, depth=2, heads=2, patch_size=2), LATENT, num_classes=3, seed=seed)


@pytest.fixture
def awake():
    """Weights away from the zero initialisation, so that everything has an effect."""
    model = tiny()
    torch.manual_seed(1)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


def test_zero_at_initialisation():
    assert not tiny()(torch.randn(2, 4, 8, 12), torch.rand(2), Conditioning(torch.tensor([0, 3]))).any()


def test_initial_weights_depend_on_the_seed_alone():
    a, _, b, c = tiny(), torch.rand(3), tiny(), tiny(seed=1)
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters()))
    assert any(not torch.equal(p, q) for p, q in zip(a.parameters(), c.parameters()))


def test_every_input_matters(awake):
    z_t, t, labels = torch.randn(1, 4, 8, 12), torch.tensor([0.3]), torch.tensor([1])
    out = awake(z_t, t, Conditioning(labels))
    assert out.shape == z_t.shape
    for other in (
        awake(z_t + 1, t, Conditioning(labels)),
        awake(z_t, t + 0.1, Conditioning(labels)),
        awake(z_t, t, Conditioning(labels * 3)),
    ):
        assert (out - other).abs().max() > 1e-3


def test_samples_do_not_see_each_other(awake):
    z_t, t, labels = torch.randn(3, 4, 8, 12), torch.rand(3), torch.tensor([0, 1, 3])
    together = awake(z_t, t, Conditioning(labels))
    alone = torch.cat([awake(z_t[i : i + 1], t[i : i + 1], Conditioning(labels[i : i + 1])) for i in range(3)])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)


def test_unpatchify_inverts_patches():
    z = torch.randn(2, 3, 4, 6)
    tokens = z.unfold(2, 2, 2).unfold(3, 2, 2).permute(0, 2, 3, 4, 5, 1).reshape(2, 6, 12)
    assert torch.equal(unpatchify(tokens, 2, 2, 3), z)


def test_position_embedding_equals_diffusers():
    theirs = get_2d_sincos_pos_embed(32, 4, base_size=4, interpolation_scale=1.0, output_type="pt")
    torch.testing.assert_close(sincos_position_embedding(32, 4, 4)[0].double(), theirs.double(), rtol=1e-5, atol=1e-6)


def test_names_of_blocks_exist_and_positions_are_no_parameter():
    model = tiny()
    assert [model.get_submodule(name) for name in model.sharded_blocks()] == list(model.blocks)
    assert "pos_embed" not in dict(model.named_parameters()) and "pos_embed" in dict(model.named_buffers())


def test_null_class():
    labels = torch.tensor([0, 2, -1, 1])
    assert class_conditioning(labels, 3).labels.tolist() == [0, 2, 3, 1]
    assert class_conditioning(labels, 3, torch.tensor([True, False, False, False])).labels.tolist() == [3, 2, 3, 1]


@pytest.mark.parametrize(("height", "width"), [(8, 12), (12, 8), (4, 4), (2, 24)])
def test_other_shapes_are_those_of_a_model_built_for_them(awake, height, width):
    """Buckets: the same weights, and positions counted from the same corner."""
    latent = LATENT.model_copy(update={"height": height, "width": width})
    other = build_denoiser(DiTConfig(width=32, depth=2, heads=2, patch_size=2), latent, num_classes=3)
    other.load_state_dict(awake.state_dict())
    z_t, t, cond = torch.randn(3, 4, height, width), torch.rand(3), Conditioning(torch.tensor([0, 1, 2]))
    assert torch.equal(awake(z_t, t, cond), other(z_t, t, cond)) and awake(z_t, t, cond).shape == z_t.shape
