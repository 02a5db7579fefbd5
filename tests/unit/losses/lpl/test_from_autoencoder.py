"""`lpl_from_autoencoder`: gradient and value against autograd through a float64 decoder."""

import pytest
import torch
from diffusers import AutoencoderKL

from lpl_pretrain import ConfigError, lpl_from_autoencoder
from lpl_pretrain.config.lpl import LPLConfig
from tests.support.autoencoders import tiny_dc, tiny_distilled, tiny_network
from tests.unit.losses.lpl.reference import reference_loss

STAGES = ["mid", "up0", "up1", "up2"]
SHIFT = 0.25
"""Exact in float32, in which factors are kept."""
LPL_WEIGHT = 3.0


def kl() -> AutoencoderKL:
    return tiny_network(shift_factor=SHIFT).double()


def inputs():
    """z0, the denoiser's parameter, and weights of which one is 0."""
    torch.manual_seed(0)
    z0 = torch.randn(3, 4, 6, 6, dtype=torch.float64)
    z0_hat = (z0 + 0.3 * torch.randn_like(z0)).requires_grad_()
    return z0, z0_hat, torch.tensor([1.0, 0.0, 0.5], dtype=torch.float64)


def decoder_features(autoencoder, z0):
    """{stage: features} of diffusers' own `decode`, read by hooks."""
    decoder = autoencoder.decoder
    blocks = dict(zip(STAGES, [decoder.mid_block, *decoder.up_blocks], strict=True))
    features = {}
    handles = [
        block.register_forward_hook(
            lambda module, args, output, name=name: features.update({name: output})
        )
        for name, block in blocks.items()
    ]
    autoencoder.decode(z0 / autoencoder.config.scaling_factor + autoencoder.config.shift_factor)
    for handle in handles:
        handle.remove()
    return features


def reference_gradient(autoencoder, config=None):
    """Gradient at z0_hat of  mse + LPL_WEIGHT * LPL, by autograd through the whole decoder."""
    z0, z0_hat, weights = inputs()
    config = config or LPLConfig(weight=1.0)
    lpl = reference_loss(
        config,
        decoder_features(autoencoder, z0),
        decoder_features(autoencoder, z0_hat),
        weights,
        z0.shape[-1],
    )
    ((z0_hat - z0).square().mean() + LPL_WEIGHT * lpl.mean()).backward()
    return z0_hat.grad, lpl.detach()


@pytest.fixture(scope="module")
def wanted():
    return reference_gradient(kl())


def public_gradient(autoencoder, carried=lambda output: output.loss, **options):
    """The same by the public loss, written as its docstring says."""
    z0, z0_hat, weights = inputs()
    lpl = lpl_from_autoencoder(autoencoder, decoder_dtype=torch.float64, **options)
    loss = carried(lpl(z0, z0_hat, weights))
    ((z0_hat - z0).square().mean() + LPL_WEIGHT * loss.mean()).backward()
    return z0_hat.grad, loss.detach()


@pytest.mark.parametrize("chunk_size", [1, 8])
def test_gradient_equals_autograd_through_the_decoder(wanted, chunk_size):
    gradient, loss = public_gradient(kl(), chunk_size=chunk_size)
    torch.testing.assert_close(gradient, wanted[0], rtol=1e-8, atol=1e-12)
    torch.testing.assert_close(loss, wanted[1], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    "mistake",
    [
        {"carried": lambda output: output.loss.detach()},
        {"carried": lambda output: output.loss / 2},
        {"shift_factor": 0.0},
        {"scaling_factor": 1.0},
        {"stages": STAGES[:-1]},
        {"outliers": None, "normalize": None},
    ],
    ids=lambda mistake: ",".join(mistake),
)
def test_a_wrong_gradient_is_noticed(wanted, mistake):
    gradient, _ = public_gradient(kl(), **mistake)
    assert not torch.allclose(gradient, wanted[0], rtol=1e-4, atol=1e-8)


def test_options_and_scaling_per_channel():
    autoencoder = kl()
    options = {"distance": "l1", "depth_weights": "uniform", "outliers": None}
    per_channel = {
        "scaling_factor": torch.full((4,), autoencoder.config.scaling_factor),
        "shift_factor": torch.full((4,), SHIFT),
    }
    gradient, loss = public_gradient(autoencoder, **per_channel, **options)
    wanted_gradient, wanted_loss = reference_gradient(autoencoder, LPLConfig(weight=1.0, **options))
    torch.testing.assert_close(loss, wanted_loss, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(gradient, wanted_gradient, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("network", [tiny_network, tiny_distilled, tiny_dc])
def test_the_autoencoder_stays_as_it_is(network):
    autoencoder = network().train().requires_grad_(True)
    before = {name: tensor.clone() for name, tensor in autoencoder.state_dict().items()}
    lpl = lpl_from_autoencoder(autoencoder, stages=["mid", "up0"], decoder_dtype=torch.bfloat16)
    z0 = torch.randn(2, 4, 8, 8)
    assert lpl(z0, z0 + 0.1, torch.ones(2)).loss.isfinite().all()
    assert autoencoder.training and all(p.requires_grad for p in autoencoder.parameters())
    assert not any(p.requires_grad for p in lpl.parameters())
    own = {id(parameter) for parameter in autoencoder.parameters()}
    assert not own & {id(parameter) for parameter in lpl.parameters()}
    after = autoencoder.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stages": ["mid", "up9"]}, r"stages=\['mid', 'up9'\].*it has \['mid', 'up0'"),
        ({"gate": {"snr_above": 3}}, "gate is an option of a run; here pass `weights`"),
        ({"decoder_dtype": torch.float16}, "decoder_dtype=torch.float16: wanted one of"),
        ({"scaling_factor": torch.ones(3)}, r"scaling_factor has the shape \(3,\)"),
        ({"distanse": "l1"}, "distanse: unknown key; did you mean"),
    ],
)
def test_errors_name_the_remedy(options, message):
    with pytest.raises(ConfigError, match=message):
        lpl_from_autoencoder(tiny_network(), **options)


def test_an_unknown_autoencoder_is_refused():
    with pytest.raises(ConfigError, match="the decoder of a Linear is not known; known are"):
        lpl_from_autoencoder(torch.nn.Linear(1, 1))
