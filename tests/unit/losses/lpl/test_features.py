"""Stage features are those of the decoder, and nothing else of the autoencoder is kept."""

from functools import partial

import pytest
import torch

from lpl_pretrain.config.lpl import LPLConfig
from lpl_pretrain.errors import ConfigError
from lpl_pretrain.losses.lpl.features import DecoderFeatures
from lpl_pretrain.losses.lpl.loss import LatentPerceptualLoss
from lpl_pretrain.losses.lpl.tape import Tape
from lpl_pretrain.models.autoencoder import LatentScaling, compose_scaling, decoder_stages
from tests.support.autoencoders import (
    features_of,
    scaling_of,
    tiny_autoencoder,
    tiny_dc,
    tiny_distilled,
    wrap,
)


@pytest.mark.parametrize(
    "make",
    [tiny_autoencoder, lambda: wrap(tiny_distilled()), lambda: wrap(tiny_dc())],
    ids=["kl", "tiny", "dc"],
)
def test_the_last_stage_leads_to_the_decoded_pixels(make):
    """The features undo the latent scaling before they decode."""
    autoencoder = make()
    raw = torch.randn(2, 4, 8, 8)
    features = features_of(autoencoder)
    last = features(scaling_of(autoencoder).normalize(raw))[features.stages[-1]]
    torch.testing.assert_close(
        decoder_stages(autoencoder.network).conv_out(last),
        autoencoder.decode(raw),
        rtol=1e-4,
        atol=1e-5,
    )


def test_sides_and_channels_of_the_stages():
    shapes = {
        name: tuple(x.shape[1:])
        for name, x in features_of(tiny_autoencoder(levels=4))(torch.randn(1, 4, 8, 8)).items()
    }
    assert [s[1] for s in shapes.values()] == [8, 16, 32, 64, 64]


def test_decoder_stops_at_the_deepest_stage_asked_for():
    whole, early = features_of(tiny_autoencoder()), features_of(tiny_autoencoder(), ["up0"])
    assert list(early.decoder.stages) == ["mid", "up0"] and not list(
        early.decoder.conv_out.parameters()
    )
    z0 = torch.randn(1, 4, 8, 8)
    assert list(early(z0)) == ["up0"]
    assert torch.equal(early(z0)["up0"], whole(z0)["up0"])


def test_encoder_and_tail_are_not_kept_and_nothing_trains():
    autoencoder = tiny_autoencoder()
    features = features_of(autoencoder)
    kept = {id(p) for p in features.parameters()}
    gone = [
        *autoencoder.network.encoder.parameters(),
        *autoencoder.network.decoder.conv_out.parameters(),
    ]
    assert kept and not kept & {id(p) for p in gone}
    assert not any(p.requires_grad for p in features.parameters())


def test_scaling_stays_in_float32():
    """A scale rounded to bf16 would be off by up to 0.4 %."""
    features = features_of(tiny_autoencoder(shift_factor=0.1159), dtype=torch.bfloat16)
    assert (
        features.shift.dtype == features.scale.dtype == torch.float32
        and features.dtype == torch.bfloat16
    )


@pytest.mark.parametrize("recompute", [True, False])
def test_tape_is_autograd(recompute):
    features = features_of(tiny_autoencoder(), dtype=torch.float64)
    z0 = torch.randn(2, 4, 8, 8, dtype=torch.float64, requires_grad=True)
    wanted = torch.autograd.grad(sum(x.square().mean() for x in features(z0).values()), z0)[0]
    tape, hidden = Tape(recompute=recompute), z0
    for name, layer in features.named_layers():
        hidden = tape.run(layer, hidden)
        if name is not None:
            tape.inject(2 * hidden / hidden.numel())
    torch.testing.assert_close(tape.backward(), wanted, rtol=1e-12, atol=1e-15)


def test_compiled_layers_change_nothing():
    """Runs in float32 with the local compiler; the last chunk is smaller than the others."""
    torch.manual_seed(0)
    z0 = torch.randn(3, 4, 8, 8)
    z0_hat, terms = z0 + 0.3 * torch.randn_like(z0), []
    for compiled in (False, True):
        features = features_of(tiny_autoencoder(levels=1))
        if compiled:
            features.compile_layers()
        terms.append(
            LatentPerceptualLoss(LPLConfig(weight=1.0, chunk_size=2), features)(
                z0, z0_hat, torch.ones(3)
            )
        )
    torch.testing.assert_close(terms[1].loss, terms[0].loss, rtol=1e-4, atol=0)
    torch.testing.assert_close(terms[1].gradient, terms[0].gradient, rtol=1e-3, atol=1e-7)


@torch._dynamo.config.patch(recompile_limit=1, accumulated_recompile_limit=1)
def test_layers_compile_once_for_each_shape(monkeypatch):
    """Three buckets, each decoded twice: graphs of static shapes, and none the second time."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    torch._dynamo.reset()
    features = features_of(tiny_autoencoder(levels=1))
    num_layers = sum(len(stage) for stage in features.decoder.stages.values())
    features.compile_layers(num_shapes=3)
    compilations = []
    with torch.no_grad():
        for height, width in 2 * [(8, 8), (4, 16), (16, 4)]:
            before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
            features(torch.randn(2, 4, height, width))
            after = torch._dynamo.utils.counters["stats"]["unique_graphs"]
            compilations.append(after - before)
    graphs = compilations[0]  # layers of the same kind and sizes share one
    assert 0 < graphs <= num_layers
    assert compilations == [graphs, graphs, graphs, 0, 0, 0]


def test_another_decoder_gets_the_latents_it_expects():
    """A distilled decoder for scaled latents, as TAESD: what it sees is what the pipeline of its
    own would give it.
    """
    own, other = tiny_autoencoder(shift_factor=0.1), wrap(tiny_distilled())
    raw = torch.randn(5, 4, 2, 2)
    per_channel = LatentScaling(
        torch.tensor([0.1, -0.2, 0.3, 0.0]), torch.tensor([0.5, 1.0, 2.0, 0.7])
    )
    seen = compose_scaling(per_channel, own, other).denormalize(per_channel.normalize(raw))
    torch.testing.assert_close(seen, (raw - own.shift) * own.scale / other.scale + other.shift)


def test_a_decoder_that_is_not_finite_is_refused():
    features = DecoderFeatures(
        decoder_stages(tiny_autoencoder().network), scaling_of(tiny_autoencoder())
    )
    features.check(4, 8, 8)
    features.decoder.stages["up1"][0].module.conv1.weight.data.fill_(torch.inf)
    with pytest.raises(ConfigError, match="stage up1 of the decoder is not finite"):
        features.check(4, 8, 8)
