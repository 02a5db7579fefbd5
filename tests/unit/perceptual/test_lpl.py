"""LPL against a slow, obvious float64 reference: value and gradient, for every option."""

import math

import pytest
import torch
from torch import nn

from lpl_pretrain.config.schema import LPLConfig
from lpl_pretrain.perceptual.features import DecoderFeatures
from lpl_pretrain.perceptual.lpl import LatentPerceptualLoss
from lpl_pretrain.perceptual.normalize import VARIANCE_FLOOR, Moments, normalized_difference
from lpl_pretrain.perceptual.outliers import keep_mask
from tests.support.autoencoders import scaling_of, tiny_autoencoder


class Pyramid(nn.Module):
    """Three smooth stages of one latent in float64, in place of a decoder: fast, and exact to differentiate."""

    stages = ["mid", "up0", "up1"]

    def forward(self, z0):
        z0 = z0.double()
        big = nn.functional.interpolate(z0, scale_factor=2, mode="bilinear")
        return {"mid": z0.tanh() + z0.roll(1, 1), "up0": (big * big.roll(1, 2)).sin() + big, "up1": big.exp().log1p()}


def reference_keep(maps, quantile, margin, stage):
    """Sorting, loops and plain comparisons."""
    keep = torch.zeros_like(maps)
    n = maps[0, 0].numel()
    for b in range(len(maps)):
        for c in range(maps.shape[1]):
            values = sorted(maps[b, c].flatten().tolist())
            q1, q2 = values[max(1, int(quantile * n)) - 1], values[max(1, int((1 - quantile) * n)) - 1]
            mean = sum(values) / n
            reach = margin * math.sqrt(sum((v - mean) ** 2 for v in values) / (n - 1))
            keep[b, c] = ((maps[b, c] > q1 - reach) & (maps[b, c] < q2 + reach)).to(keep.dtype)
    for size, pick in zip((3, 5) if stage > 2 else (1, 3), (max, min)):
        r, old = size // 2, keep.clone()
        for y in range(keep.shape[2]):
            for x in range(keep.shape[3]):
                window = old[:, :, max(0, y - r) : y + r + 1, max(0, x - r) : x + r + 1]
                keep[:, :, y, x] = window.amax(dim=(2, 3)) if pick is max else window.amin(dim=(2, 3))
    return keep


def reference(config, z0, z0_hat, gate):
    """The printed formula, sample by sample and channel by channel."""
    clean, predicted = Pyramid()(z0), Pyramid()(z0_hat)
    names = Pyramid.stages if config.stages is None else config.stages
    losses = []
    for b in range(len(z0)):
        loss = torch.zeros((), dtype=torch.float64)
        for name in names:
            stage = Pyramid.stages.index(name)
            omega = z0.shape[-1] / clean[name].shape[-1] if config.depth_weights == "inverse_resolution" else 1.0
            source = clean[name] if config.outliers.source == "target" else predicted[name].detach()
            masked = config.outliers.enabled and stage >= config.outliers.first_stage
            keep = (
                reference_keep(source, config.outliers.quantile, config.outliers.margin, stage)
                if masked
                else torch.ones_like(source)
            )
            channels = []
            for c in range(clean[name].shape[1]):
                f, f_hat = clean[name][b, c], predicted[name][b, c]
                g, g_hat = {
                    "prediction": (f_hat, f_hat),
                    "prediction_detached": (f_hat.detach(), f_hat.detach()),
                    "target": (f, f),
                    "own": (f, f_hat),
                    "none": (None, None),
                }[config.normalize]
                if g is not None:
                    f = (f - g.mean()) / g.std(correction=0)
                    f_hat = (f_hat - g_hat.mean()) / g_hat.std(correction=0)
                channels.append((keep[b, c] * (f - f_hat)).square().mean())
            loss = loss + omega * sum(channels) / len(channels) / len(names)
        losses.append(loss * gate[b])
    return torch.stack(losses)


def inputs(count=3):
    torch.manual_seed(0)
    z0 = torch.randn(count, 3, 8, 8, dtype=torch.float64)
    z0[0, 0, 3, 3] = 40.0  # an outlier
    return z0, z0 + 0.4 * torch.randn_like(z0), torch.tensor([True, True, False, True, True][:count])


OPTIONS = [
    {},
    {"normalize": "prediction_detached"},
    {"normalize": "target"},
    {"normalize": "own"},
    {"normalize": "none"},
    {"depth_weights": "uniform"},
    {"outliers": {"enabled": False}},
    {"outliers": {"source": "prediction"}},
    {"outliers": {"quantile": 0.1, "margin": 0.1}},
    {"outliers": {"first_stage": 2}},
    {"stages": ["up0"]},
    {"stages": ["mid", "up1"]},
]


class Subset(nn.Module):
    def __init__(self, stages):
        super().__init__()
        self.stages = stages or Pyramid.stages

    def forward(self, z0):
        return {name: x for name, x in Pyramid()(z0).items() if name in self.stages}


@pytest.fixture(autouse=True)
def float64_loss(monkeypatch):
    """The loss computes in float32; here it is told float64 instead, so that it can be held against the reference."""
    monkeypatch.setattr("lpl_pretrain.perceptual.lpl.COMPUTE", torch.float64)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_value_and_gradient(options):
    config = LPLConfig(weight=1.0, **options)
    z0, z0_hat, gate = inputs()
    term = LatentPerceptualLoss(config, Subset(config.stages))(z0, z0_hat, gate)
    leaf = z0_hat.clone().requires_grad_()
    wanted = reference(config, z0, leaf, gate)
    wanted.sum().backward()
    torch.testing.assert_close(term.loss, wanted.detach(), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(term.gradient, leaf.grad, rtol=1e-8, atol=1e-12)
    assert term.loss[2] == 0 and not term.gradient[2].any()


@pytest.mark.parametrize(
    "wrong",
    [
        {"normalize": "prediction_detached"},
        {"normalize": "target"},
        {"normalize": "own"},
        {"normalize": "none"},
        {"depth_weights": "uniform"},
        {"outliers": {"enabled": False}},
        {"stages": ["up0"]},
    ],
    ids=str,
)
def test_has_teeth(wrong):
    """Every option, computed when the default is asked for, is told apart."""
    config, broken = LPLConfig(weight=1.0, outliers={"margin": 0.5}), {"outliers": {"margin": 0.5}, **wrong}
    z0, z0_hat, gate = inputs()
    broken_config = LPLConfig(weight=1.0, **broken)
    term = LatentPerceptualLoss(broken_config, Subset(broken_config.stages))(z0, z0_hat, gate)
    leaf = z0_hat.clone().requires_grad_()
    reference(config, z0, leaf, gate).sum().backward()
    with pytest.raises(AssertionError):
        torch.testing.assert_close(term.gradient, leaf.grad, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("chunk_size", [1, 2, 5, 8])
def test_chunks_change_nothing(chunk_size):
    z0, z0_hat, gate = inputs(5)
    terms = [LatentPerceptualLoss(LPLConfig(weight=1.0, chunk_size=size), Pyramid())(z0, z0_hat, gate) for size in (chunk_size, 5)]
    torch.testing.assert_close(terms[0].loss, terms[1].loss, rtol=1e-12, atol=0)
    torch.testing.assert_close(terms[0].gradient, terms[1].gradient, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("stage", [0, 2, 3, 4])
@pytest.mark.parametrize("side", [3, 5, 7, 12])
def test_keep_mask(stage, side):
    """Also on maps smaller than the kernels and than 50 positions, where the public implementation raises."""
    torch.manual_seed(side)
    maps = torch.randn(2, 3, side, side, dtype=torch.float64) ** 3
    got = keep_mask(maps, Moments.of(maps).std, quantile=0.1, margin=0.3, stage=stage)
    assert torch.equal(got, reference_keep(maps, 0.1, 0.3, stage).bool())
    assert not got.all() or stage > 2  # later stages close small holes


def test_gaussian_maps_are_kept():
    torch.manual_seed(0)
    maps = torch.randn(4, 8, 32, 32)
    assert keep_mask(maps, Moments.of(maps).std, quantile=0.02, margin=2.0, stage=0).double().mean() > 0.999


@pytest.mark.parametrize("kind", ["prediction", "prediction_detached", "target", "own"])
def test_constant_channels_contribute_nothing(kind):
    predicted, target = torch.randn(2, 2, 3, 6, 6)
    predicted[:, 1], target[:, 1] = 3.0, 4.0
    predicted.requires_grad_()
    difference = normalized_difference(predicted, target, kind, Moments.of(predicted), Moments.of(target))
    assert not difference[:, 1].any() and difference[:, 0].any()
    difference.square().sum().backward()
    assert predicted.grad.isfinite().all() and VARIANCE_FLOOR > 0


def test_constant_maps_give_zero_not_nan():
    z0 = torch.zeros(2, 3, 8, 8, dtype=torch.float64)
    term = LatentPerceptualLoss(LPLConfig(weight=1.0), Pyramid())(z0, z0.clone(), torch.tensor([True, True]))
    assert not term.loss.any() and not term.gradient.any()


def test_a_shut_gate_hides_nonsense():
    """Where the gate is shut the estimate may be anything at all, NaN included."""
    z0, z0_hat, _ = inputs()
    z0_hat[1] = math.nan
    term = LatentPerceptualLoss(LPLConfig(weight=1.0), Pyramid())(z0, z0_hat, torch.tensor([True, False, False]))
    assert term.loss.isfinite().all() and term.gradient.isfinite().all() and term.loss[0] > 0


def test_equal_latents_give_exactly_zero():
    z0, _, gate = inputs()
    assert not LatentPerceptualLoss(LPLConfig(weight=1.0), Pyramid())(z0, z0.clone(), gate).loss.any()


def test_gradient_goes_into_the_latent_only():
    autoencoder = tiny_autoencoder()
    features = DecoderFeatures(autoencoder, scaling_of(autoencoder), None)
    z0 = torch.randn(2, 4, 8, 8)
    term = LatentPerceptualLoss(LPLConfig(weight=1.0), features)(z0, z0 + 0.1 * torch.randn_like(z0), torch.tensor([True, True]))
    assert term.gradient.abs().sum() > 0 and all(p.grad is None for p in features.parameters())
    assert list(term.stages) == ["mid", "up0", "up1", "up2"]
    torch.testing.assert_close(sum(stage.contribution for stage in term.stages.values()), term.loss)
