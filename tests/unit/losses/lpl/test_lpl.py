"""LPL against a slow, obvious float64 reference: value and gradient, for every option."""

import itertools
import math

import pytest
import torch

from lpl_pretrain.config.lpl import LPLConfig, OutlierConfig
from lpl_pretrain.losses.lpl.distance import difference, distance
from lpl_pretrain.losses.lpl.inliers import inlier_mask
from lpl_pretrain.losses.lpl.loss import LatentPerceptualLoss
from lpl_pretrain.losses.lpl.normalization import FLOOR, Statistics
from tests.support.autoencoders import features_of, tiny_autoencoder
from tests.support.toy_decoder import toy_decoder_features
from tests.unit.losses.lpl.reference import reference_keep, reference_loss

TEETH = {"outliers": {"margin": 0.5}}  # a margin at which the mask matters


def config_of(**options):
    return LPLConfig(weight=1.0, **options)


def inputs(count=3):
    torch.manual_seed(0)
    z0 = torch.randn(count, 3, 8, 8, dtype=torch.float64)
    z0[0, 0, 3, 3] = 40.0  # an outlier
    weights = torch.tensor([1.0, 0.5, 0.0, 2.0, 1.0], dtype=torch.float64)[:count]
    return z0, z0 + 0.4 * torch.randn_like(z0), weights


def wanted(config, z0, z0_hat, weights):
    """Loss and gradient of the reference, through one graph over the whole batch."""
    features = toy_decoder_features(config.stages)
    leaf = z0_hat.clone().requires_grad_()
    loss = reference_loss(config, features(z0), features(leaf), weights, z0.shape[-1])
    (gradient,) = torch.autograd.grad(loss.sum(), leaf)
    return loss.detach(), gradient


NORMALIZATIONS = [
    {"over": over, "source": source, "gradient": gradient, "kind": kind}
    for over, source, gradient, kind in itertools.product(
        ("space", "channels", "batch"),
        ("prediction", "target", "own"),
        (True, False),
        ("std", "l2_norm"),
    )
    if (over, kind) != ("batch", "l2_norm")
]
OPTIONS = [
    {},
    {"preset": "diffusers_script"},
    {"preset": "diffusers_script", "normalize": {"source": "own"}, "distance": "l1"},
    {"normalize": None},
    {"normalize": None, "distance": "l1"},
    {"distance": "l1"},
    {"distance": "l1", "normalize": {"source": "own"}},
    {"depth_weights": "uniform"},
    {"depth_weights": [0.0, 2.0, 0.5]},
    {"outliers": None},
    {"outliers": {"source": "prediction"}},
    {"outliers": {"quantiles": [0.1, 0.7], "margin": 0.1}},
    {"outliers": {"first_stage": 2}},
    {"outliers": {"margin": 0.3, "kernels": [[3, 5]]}},
    {"outliers": {"margin": 0.3, "mean_over": "kept"}},
    {"outliers": {"margin": 0.3, "zeroed_in_statistics": True}},
    {"outliers": {"margin": 0.3, "zeroed_in_statistics": True, "source": "prediction"}},
    {
        "outliers": {"margin": 0.3, "zeroed_in_statistics": True},
        "normalize": {"over": "channels", "kind": "l2_norm", "source": "own"},
    },
    {"stages": ["up0"]},
    {"stages": ["mid", "up1"]},
    {"activation_checkpointing": False},
    *({"normalize": normalize} for normalize in NORMALIZATIONS),
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_value_and_gradient(options):
    config = config_of(**options, chunk_size=2)
    z0, z0_hat, weights = inputs()
    term = LatentPerceptualLoss(config, toy_decoder_features(config.stages))(z0, z0_hat, weights)
    loss, gradient = wanted(config, z0, z0_hat, weights)
    torch.testing.assert_close(term.loss, loss, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(term.gradient, gradient, rtol=1e-8, atol=1e-12)
    assert term.loss[2] == 0 and not term.gradient[2].any()


@pytest.mark.parametrize(
    "wrong",
    [
        {"preset": "diffusers_script"},
        {"distance": "l1"},
        {"normalize": None},
        {"normalize": {"gradient": False}},
        {"normalize": {"source": "target"}},
        {"normalize": {"source": "own"}},
        {"normalize": {"over": "channels"}},
        {"normalize": {"over": "batch"}},
        {"normalize": {"kind": "l2_norm"}},
        {"depth_weights": "uniform"},
        {"depth_weights": [1.0, 0.5, 0.3]},
        {"outliers": None},
        {"outliers": {"margin": 0.5, "source": "prediction"}},
        {"outliers": {"margin": 0.5, "mean_over": "kept"}},
        {
            "outliers": {"margin": 0.5, "zeroed_in_statistics": True},
            "normalize": {"source": "target"},
        },
        {"outliers": {"margin": 0.5, "kernels": [[3, 5]]}},
        {"outliers": {"margin": 0.5, "quantiles": [0.05, 0.95]}},
        {"outliers": {"margin": 0.5, "first_stage": 1}},
        {"stages": ["up0"]},
    ],
    ids=str,
)
def test_has_teeth(wrong):
    """The gradient under each single other option differs from that under the reference options."""
    z0, z0_hat, weights = inputs()
    broken = config_of(**{**TEETH, **wrong})
    term = LatentPerceptualLoss(broken, toy_decoder_features(broken.stages))(z0, z0_hat, weights)
    _, gradient = wanted(config_of(**TEETH), z0, z0_hat, weights)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(term.gradient, gradient, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("damage", ["no surrogate", "own chunk only"])
def test_has_teeth_in_batch_statistics(damage, monkeypatch):
    config = config_of(normalize={"over": "batch"}, chunk_size=1)
    z0, z0_hat, weights = inputs()
    module = "lpl_pretrain.losses.lpl.batch_statistics"
    if damage == "no surrogate":
        monkeypatch.setattr(f"{module}.BatchStatistics.surrogate", lambda *_: 0.0)
    else:
        monkeypatch.setattr(
            f"{module}._add", lambda totals, name, value: totals.update({name: value})
        )
    term = LatentPerceptualLoss(config, toy_decoder_features())(z0, z0_hat, weights)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(
            term.gradient, wanted(config, z0, z0_hat, weights)[1], rtol=1e-3, atol=1e-6
        )


@pytest.mark.parametrize("chunk_size", [1, 2, 5, 8])
@pytest.mark.parametrize(
    "options", [{}, {"normalize": {"over": "batch"}}, {"crop": {"side": 4, "halo": 1}}], ids=str
)
def test_chunks_change_nothing(chunk_size, options):
    z0, z0_hat, weights = inputs(5)
    places = torch.rand(5, 2, dtype=torch.float64)
    terms = [
        LatentPerceptualLoss(config_of(chunk_size=size, **options), toy_decoder_features())(
            z0, z0_hat, weights, places
        )
        for size in (chunk_size, 5)
    ]
    torch.testing.assert_close(terms[0].loss, terms[1].loss, rtol=1e-10, atol=1e-14)
    torch.testing.assert_close(terms[0].gradient, terms[1].gradient, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("kernels", [(1, 3), (3, 5), (1, 1), (5, 3)], ids=str)
@pytest.mark.parametrize("side", [1, 2, 3, 5, 7, 12])
def test_inlier_mask(kernels, side):
    """The mask also covers maps smaller than the kernels or than 50 positions, on which the public
    implementation raises.
    """
    torch.manual_seed(side)
    maps = torch.randn(2, 3, side, side, dtype=torch.float64) ** 3
    config = OutlierConfig(quantiles=(0.1, 0.9), margin=0.3, kernels=(kernels,))
    got = inlier_mask(maps, Statistics.of(maps).std, config, stage=4)
    assert torch.equal(got, reference_keep(maps, config, 4).bool())


def test_gaussian_maps_are_kept():
    torch.manual_seed(0)
    maps = torch.randn(4, 8, 32, 32)
    assert (
        inlier_mask(maps, Statistics.of(maps).std, OutlierConfig(), stage=0).double().mean() > 0.999
    )


def compare(options, predicted, target, stage=0):
    config = config_of(**options)
    return distance(config, difference(config, stage, predicted, target))


EVERY_NORMALIZATION = [
    {"normalize": normalize}
    for normalize in [*NORMALIZATIONS, None]
    if not normalize or normalize["over"] != "batch"
]


@pytest.mark.parametrize(
    "options",
    [o for o in EVERY_NORMALIZATION if (o["normalize"] or {}).get("over") == "space"],
    ids=str,
)
def test_constant_channels_contribute_nothing(options):
    """A channel that is constant in the branch that normalises; with kind l2_norm it is zero."""
    values = torch.randn(2, 2, 3, 6, 6)
    values[:, :, 1] = 0.0
    predicted, target = values[0].requires_grad_(), values[1]
    compare(options, predicted, target).sum().backward()
    assert (
        predicted.grad.isfinite().all()
        and not predicted.grad[:, 1].any()
        and predicted.grad[:, 0].any()
    )


@pytest.mark.parametrize("kind", ["std", "l2_norm"])
@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e-6, 1e-3])
def test_gradient_is_finite_around_the_floor(kind, scale):
    predicted = (torch.randn(1, 2, 4, 4) * scale).requires_grad_()
    loss = compare({"normalize": {"kind": kind}}, predicted, torch.zeros(1, 2, 4, 4))
    loss.sum().backward()
    assert loss.isfinite().all() and predicted.grad.isfinite().all()
    assert 1e-6**2 < FLOOR < 1e-3**2


@pytest.mark.parametrize("mean_over", ["all", "kept"])
def test_a_fully_masked_map_contributes_zero(mean_over, monkeypatch):
    monkeypatch.setattr(
        "lpl_pretrain.losses.lpl.distance.inlier_mask",
        lambda features, *_: torch.zeros_like(features, dtype=bool),
    )
    z0, z0_hat, weights = inputs()
    outliers = {"mean_over": mean_over, "zeroed_in_statistics": True}
    term = LatentPerceptualLoss(config_of(outliers=outliers), toy_decoder_features())(
        z0, z0_hat, weights
    )
    assert (
        not term.loss.any()
        and not term.gradient.any()
        and not term.stages["up1"].keep_fraction.any()
    )


@pytest.mark.parametrize(
    "options", [{}, {"preset": "diffusers_script"}, {"normalize": {"over": "batch"}}], ids=str
)
def test_constant_maps_give_zero_not_nan(options):
    z0 = torch.zeros(2, 3, 8, 8, dtype=torch.float64)
    term = LatentPerceptualLoss(config_of(**options), toy_decoder_features())(
        z0, z0.clone(), torch.ones(2, dtype=torch.float64)
    )
    assert not term.loss.any() and not term.gradient.any()


@pytest.mark.parametrize(
    "options", [{}, {"normalize": {"over": "batch"}}, {"preset": "diffusers_script"}], ids=str
)
@pytest.mark.parametrize("open_gates", [0, 1])
def test_a_closed_gate_ignores_nonfinite_estimates(options, open_gates):
    """Estimates of samples with weight 0 may hold any value, NaN included; all samples of the
    batch may have weight 0.
    """
    z0, z0_hat, _ = inputs()
    z0_hat[1] = math.nan
    weights = torch.tensor([float(open_gates), 0.0, 0.0], dtype=torch.float64)
    term = LatentPerceptualLoss(config_of(**options), toy_decoder_features())(z0, z0_hat, weights)
    assert (
        term.loss.isfinite().all()
        and term.gradient.isfinite().all()
        and (term.loss[0] > 0) == bool(open_gates)
    )
    assert not term.gradient[1:].any()


def test_nan_inside_the_gate_reaches_the_loss():
    """The loss of a diverged model is NaN, so that the strategy refuses the update."""
    z0, z0_hat, weights = inputs()
    z0_hat[0, 0, 0, 0] = math.nan
    assert (
        LatentPerceptualLoss(config_of(), toy_decoder_features())(z0, z0_hat, weights)
        .loss[0]
        .isnan()
    )


@pytest.mark.parametrize("options", EVERY_NORMALIZATION, ids=str)
def test_equal_latents_give_exactly_zero(options):
    z0, _, weights = inputs()
    assert not LatentPerceptualLoss(config_of(**options), toy_decoder_features())(
        z0, z0.clone(), weights
    ).loss.any()


@pytest.mark.parametrize("side", [1, 2, 3])
def test_latents_smaller_than_the_kernels(side):
    z0 = torch.randn(2, 3, side, side, dtype=torch.float64)
    term = LatentPerceptualLoss(config_of(), toy_decoder_features())(
        z0, z0 + 0.1 * torch.randn_like(z0), torch.ones(2, dtype=torch.float64)
    )
    assert term.loss.isfinite().all() and term.gradient.isfinite().all()


def test_gradient_goes_into_the_latent_only():
    features = features_of(tiny_autoencoder())
    z0 = torch.randn(2, 4, 8, 8)
    term = LatentPerceptualLoss(config_of(), features)(
        z0, z0 + 0.1 * torch.randn_like(z0), torch.ones(2)
    )
    assert term.gradient.abs().sum() > 0 and all(p.grad is None for p in features.parameters())
    assert list(term.stages) == ["mid", "up0", "up1", "up2"]
    torch.testing.assert_close(sum(stage.contribution for stage in term.stages.values()), term.loss)


def test_bf16_is_near():
    torch.manual_seed(0)
    z0 = torch.randn(2, 4, 8, 8)
    z0_hat, terms = z0 + 0.3 * torch.randn_like(z0), []
    for dtype in (torch.float64, torch.bfloat16):
        lpl = LatentPerceptualLoss(config_of(), features_of(tiny_autoencoder(), dtype=dtype))
        terms.append(lpl(z0, z0_hat, torch.ones(2)))
        assert terms[-1].gradient.dtype == z0.dtype
    torch.testing.assert_close(terms[1].loss.double(), terms[0].loss.double(), rtol=3e-2, atol=0)
    cosine = torch.nn.functional.cosine_similarity(
        terms[1].gradient.double().flatten(), terms[0].gradient.double().flatten(), dim=0
    )
    assert cosine > 0.99


def test_the_host_reads_no_tensor():
    """Tensors on the meta device have no values, and reading one raises.  LPL runs there, so it
    never waits for an accelerator.
    """
    for options in (
        {},
        {"crop": {"side": 4, "halo": 1}},
        {"preset": "diffusers_script"},
        {"normalize": {"over": "batch"}},
    ):
        features = features_of(tiny_autoencoder()).to("meta")
        z0, z0_hat = torch.empty(2, 3, 4, 8, 8, device="meta")
        places = torch.empty(3, 2, device="meta") if "crop" in options else None
        term = LatentPerceptualLoss(config_of(**options), features)(
            z0, z0_hat, torch.empty(3, device="meta"), places
        )
        assert term.gradient.shape == z0.shape
        with pytest.raises(RuntimeError):
            term.loss.sum().item()
