"""The DiT: shapes, zero at initialisation, a working patch round trip, conditions that matter,
fixed position embeddings.
"""

from dataclasses import replace

import pytest
import torch
from diffusers.models.embeddings import get_2d_sincos_pos_embed
from timm.layers import apply_rot_embed_cat

from lpl_pretrain.config.dataset import LatentEntry
from lpl_pretrain.config.model import DiTConfig
from lpl_pretrain.config.schema import ParallelConfig
from lpl_pretrain.config.text_layout import TextShape
from lpl_pretrain.models.build import build_denoiser
from lpl_pretrain.models.conditioning import Conditioning, class_conditioning
from lpl_pretrain.models.layers import rotary_embedding, sincos_position_embedding, unpatchify
from lpl_pretrain.parallel.build import make_strategy
from lpl_pretrain.planning.flops import count_flops
from tests.support.ranks import run_ranks
from tests.support.training import ROOT, ZERO_CONFIGS

LATENT = LatentEntry(channels=4, height=8, width=12, mean=[0.0] * 4, std=[1.0] * 4)


OPTIONS = ["qk_norm", "rope", "swiglu", "rms_norm"]


def tiny(seed=0, **options):
    return build_denoiser(
        DiTConfig(width=32, depth=2, heads=2, patch_size=2, **options),
        LATENT,
        num_classes=3,
        seed=seed,
    )


def awakened(**options):
    """Weights away from the zero initialisation, so that everything has an effect."""
    model = tiny(**options)
    torch.manual_seed(1)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


@pytest.fixture
def awake():
    return awakened()


def test_zero_at_initialisation():
    cond = Conditioning(torch.tensor([0, 3]))
    assert not tiny()(torch.randn(2, 4, 8, 12), torch.rand(2), cond).output.any()


def test_initial_weights_depend_on_the_seed_alone():
    a, _, b, c = tiny(), torch.rand(3), tiny(), tiny(seed=1)
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters()))
    assert any(not torch.equal(p, q) for p, q in zip(a.parameters(), c.parameters()))


def test_every_input_matters(awake):
    z_t, t, labels = torch.randn(1, 4, 8, 12), torch.tensor([0.3]), torch.tensor([1])
    out = awake(z_t, t, Conditioning(labels)).output
    assert out.shape == z_t.shape
    for other in (
        awake(z_t + 1, t, Conditioning(labels)),
        awake(z_t, t + 0.1, Conditioning(labels)),
        awake(z_t, t, Conditioning(labels * 3)),
    ):
        assert (out - other.output).abs().max() > 1e-3


def test_samples_do_not_see_each_other(awake):
    z_t, t, labels = torch.randn(3, 4, 8, 12), torch.rand(3), torch.tensor([0, 1, 3])
    together = awake(z_t, t, Conditioning(labels)).output
    alone = [
        awake(z_t[i : i + 1], t[i : i + 1], Conditioning(labels[i : i + 1])).output
        for i in range(3)
    ]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-4, atol=1e-5)


def test_unpatchify_inverts_patches():
    z = torch.randn(2, 3, 4, 6)
    tokens = z.unfold(2, 2, 2).unfold(3, 2, 2).permute(0, 2, 3, 4, 5, 1).reshape(2, 6, 12)
    assert torch.equal(unpatchify(tokens, 2, 2, 3), z)


def test_position_embedding_equals_diffusers():
    theirs = get_2d_sincos_pos_embed(32, 4, base_size=4, interpolation_scale=1.0, output_type="pt")
    torch.testing.assert_close(
        sincos_position_embedding(32, 4, 4)[0].double(), theirs.double(), rtol=1e-5, atol=1e-6
    )


def test_names_of_blocks_exist_and_positions_are_no_parameter():
    model = tiny()
    assert [model.get_submodule(name) for name in model.sharded_blocks()] == list(model.blocks)
    assert "pos_embed" not in dict(model.named_parameters()) and "pos_embed" in dict(
        model.named_buffers()
    )


def test_null_class():
    labels = torch.tensor([0, 2, -1, 1])
    assert class_conditioning(labels, 3).labels.tolist() == [0, 2, 3, 1]
    assert class_conditioning(
        labels, 3, torch.tensor([True, False, False, False])
    ).labels.tolist() == [3, 2, 3, 1]


@pytest.mark.parametrize(("height", "width"), [(8, 12), (12, 8), (4, 4), (2, 24)])
def test_other_shapes_are_those_of_a_model_built_for_them(awake, height, width):
    """Buckets: the same weights, and positions counted from the same corner."""
    latent = LATENT.model_copy(update={"height": height, "width": width})
    other = build_denoiser(
        DiTConfig(width=32, depth=2, heads=2, patch_size=2), latent, num_classes=3
    )
    other.load_state_dict(awake.state_dict())
    z_t, t, cond = (
        torch.randn(3, 4, height, width),
        torch.rand(3),
        Conditioning(torch.tensor([0, 1, 2])),
    )
    output = awake(z_t, t, cond).output
    assert torch.equal(output, other(z_t, t, cond).output)
    assert output.shape == z_t.shape


@pytest.mark.parametrize(
    ("size", "millions", "gmac"),
    [("S", 33, 6.06), ("B", 130, 23.01), ("L", 458, 80.71), ("XL", 675, 118.64)],
)
def test_published_sizes(size, millions, gmac):
    """Parameters and multiply-adds at 256 px, patch 2, learned sigma (arXiv 2212.09748, tables 1
    and 4).
    """
    latent = LATENT.model_copy(update={"height": 32, "width": 32})
    config = DiTConfig(size=size, patch_size=2, learned_sigma=True)
    with torch.device("meta"):
        model = build_denoiser(config, latent, num_classes=1000)
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, rel=0.01)
    z_t, t, labels = torch.empty(1, 4, 32, 32), torch.empty(1), torch.empty(1, dtype=torch.int64)
    flops = count_flops(
        lambda: model(z_t.to("meta"), t.to("meta"), Conditioning(labels.to("meta")))
    )
    assert flops / 2e9 == pytest.approx(gmac, rel=0.01)


def test_a_size_is_spelt_out_and_may_not_be_contradicted():
    config = DiTConfig(size="XL")
    assert (config.width, config.depth, config.heads) == (1152, 28, 16)
    assert DiTConfig.model_validate(config.model_dump()) == config
    with pytest.raises(
        ValueError, match="depth=3 with size=S, which has 12: leave one of the two out"
    ):
        DiTConfig(size="S", depth=3)
    with pytest.raises(ValueError, match="rope=true with heads of 6 channels"):
        DiTConfig(width=12, depth=1, heads=2, rope=True)


@pytest.mark.parametrize("option", OPTIONS)
def test_an_option_changes_the_output_and_starts_at_zero(option):
    inputs = torch.randn(2, 4, 8, 12), torch.rand(2), Conditioning(torch.tensor([0, 3]))
    assert not tiny(**{option: True})(*inputs).output.any()
    model = awakened(**{option: True})
    plain = awakened()
    shared = {
        name: tensor for name, tensor in model.state_dict().items() if name in plain.state_dict()
    }
    if option != "swiglu":
        plain.load_state_dict(shared)
    assert (model(*inputs).output - plain(*inputs).output).abs().max() > 1e-3
    model(*inputs).output.square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_swiglu_costs_as_many_parameters():
    with torch.device("meta"):
        models = [
            build_denoiser(DiTConfig(size="S", swiglu=swiglu), LATENT, num_classes=3)
            for swiglu in (False, True)
        ]
    plain, gated = (sum(p.numel() for p in model.blocks.parameters()) for model in models)
    assert gated == pytest.approx(plain, rel=0.002)


def test_rotated_queries_and_keys_know_distances_alone():
    """A shift by whole rows and columns leaves every product of a query and a key as it was."""
    rows, columns = 6, 5
    rope = rotary_embedding(16, rows, columns, torch.device("cpu"))
    query, key = torch.randn(2, 16).unbind()
    turned = [
        apply_rot_embed_cat(x.expand(rows * columns, 16), rope).view(rows, columns, 16)
        for x in (query, key)
    ]
    product = torch.einsum("rcd,RCd->rcRC", *turned)
    torch.testing.assert_close(product[1, 2, 3, 4], product[0, 1, 2, 3])
    torch.testing.assert_close(product[2, 0, 1, 1], product[5, 3, 4, 4])
    assert (product[0, 0, 0, 1] - product[0, 0, 1, 0]).abs() > 1e-4
    torch.testing.assert_close(turned[0].norm(dim=-1), query.norm().expand(rows, columns))


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2", "zero2", "zero3"])
def test_options_train_in_bf16_under_every_strategy(strategy):
    """Norms with weights of their own among bf16 and float32 tensors."""
    results = run_ranks(2, one_step, strategy)
    assert results[0] == pytest.approx(results[1]) and 0 < results[0] < 100


def one_step(world, device, strategy):
    parallel = {"strategy": strategy, "precision": "bf16"}
    if strategy in ZERO_CONFIGS:
        parallel |= {"strategy": "zero", "zero_config": str(ROOT / ZERO_CONFIGS[strategy])}
    model = tiny(**dict.fromkeys(OPTIONS, True))
    engine = make_strategy(ParallelConfig.model_validate(parallel), world, device)
    denoiser = engine.setup(
        model, model.sharded_blocks(), lambda p: torch.optim.AdamW(p.values(), lr=1.0, fused=True)
    )
    for _ in range(2):
        cond = Conditioning(torch.tensor([0, 3]))
        out = denoiser(torch.randn(2, 4, 8, 12), torch.rand(2), cond).output
        engine.backward((out.float() - 1).square().mean(), microbatch=0, of=1)
        report = engine.step(lr=1e-2, max_grad_norm=1.0)
    assert report.applied
    return report.grad_norm.item()


TEXT = TextShape(tokens=5, width=12, pooled_width=6)


def reads(text, **options):
    model = build_denoiser(
        DiTConfig(width=32, depth=2, heads=2, text=text, **options), LATENT, 3, text=TEXT
    )
    return model, [
        torch.randn(2, 4, 8, 12),
        torch.rand(2),
        Conditioning(torch.tensor([0, 3]), torch.randn(2, 5, 12), torch.randn(2, 6)),
    ]


@pytest.mark.parametrize("rope", [False, True])
@pytest.mark.parametrize("text", ["in_context", "cross_attention"])
def test_text_is_read(text, rope):
    """Zero at initialisation, then states and pooled vector matter, whatever their order (no
    positions), and all weights learn.
    """
    torch.manual_seed(0)
    model, (z_t, t, cond) = reads(text, rope=rope)
    assert not model(z_t, t, cond).output.any()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    out = model(z_t, t, cond).output
    assert out.shape == z_t.shape
    for other in (
        replace(cond, text=cond.text + 1),
        replace(cond, pooled=cond.pooled + 1),
        replace(cond, labels=cond.labels.flip(0)),
    ):
        assert (model(z_t, t, other).output - out).abs().max() > 1e-3
    reordered = model(z_t, t, replace(cond, text=cond.text.flip(1))).output
    torch.testing.assert_close(reordered, out, rtol=1e-3, atol=1e-4)
    out.square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
