"""One update: the surrogate carries LPL's gradient exactly, microbatches change nothing, and every draw is keyed."""

import copy

import pytest
import torch

from lpl_pretrain.config.rundir import RunDir
from lpl_pretrain.runtime.world import World
from lpl_pretrain.trainer.assemble import assemble, build_features
from lpl_pretrain.trainer.metrics import Meter
from tests.support.configs import train_config
from tests.support.latents import tiny_dataset
from tests.unit.perceptual.reference import reference_loss

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return tiny_dataset(tmp_path_factory.mktemp("data"))


def new_run(data, tmp_path, **changes):
    latents, autoencoder = data
    settings = {
        "data__folder": latents,
        "autoencoder": autoencoder,
        "optimizer__kind": "sgd",
        "optimizer__lr": 0.5,
        "optimizer__max_grad_norm": 1e9,
        "lpl__weight": 0.7,
        "lpl__gate": {"max_noise_level": 1.0},
        "lpl__chunk_size": 3,
        **changes,
    }
    run = assemble(train_config(**settings), RunDir(tmp_path), World(), CPU)
    torch.manual_seed(0)
    for parameter in run.updater.denoiser.parameters():  # away from the zero output of adaLN-Zero
        torch.nn.init.normal_(parameter, std=0.1)
    return run


def one_update(run, step=0):
    meter = Meter(CPU)
    hands = run.hands(step)
    run.updater.update(step, hands, [run.stream.read(hand.sample_indices) for hand in hands], meter)
    return [p.detach().clone() for p in run.updater.denoiser.parameters()], meter.flush()


def test_one_backward_equals_differentiating_through_the_decoder(data, tmp_path):
    run = new_run(data, tmp_path)
    slow = copy.deepcopy(run.updater.denoiser)
    got, values = one_update(run)

    hand = run.hands(0)[0]
    borrowed = type(run.updater)(**{**{name: getattr(run.updater, name) for name in run.updater.__slots__}, "denoiser": slow})
    seen, diffusion = borrowed._diffusion(hand, run.stream.read(hand.sample_indices), Meter(CPU))
    features = build_features(run.config, run.config.lpl, run.updater.scaling)
    gate = seen.noise_level <= 1.0
    assert 0 < gate.sum() < len(gate)
    predicted, clean = ({name: x.double() for name, x in features(z).items()} for z in (seen.z0_hat, seen.z0))
    total = diffusion + 0.7 * reference_loss(run.config.lpl, clean, predicted, gate.double(), 8).mean()
    total.backward()
    wanted = [p.detach() - 0.5 * p.grad for p in slow.parameters()]
    for a, b in zip(got, wanted):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    assert values["loss/total"] == pytest.approx(total.item(), rel=1e-5)
    assert values["loss/diffusion"] + 0.7 * values["loss/lpl"] == pytest.approx(total.item(), rel=1e-5)


@pytest.mark.parametrize("micro_batch_size", [1, 2, 4])
def test_microbatches_change_nothing(data, tmp_path, micro_batch_size):
    whole, values = one_update(new_run(data, tmp_path))
    split, split_values = one_update(new_run(data, tmp_path, batch__micro_batch_size=micro_batch_size))
    for a, b in zip(split, whole):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    for name in values:
        assert split_values[name] == pytest.approx(values[name], rel=1e-4), name


@pytest.mark.parametrize(
    "changes",
    [
        {"lpl__weight": 1.4},
        {"lpl__gate": {"max_noise_level": 0.3}},
        {"seed": 1},
        {"conditioning": {"label_dropout": 1.0}},
        {"data__posterior": "mean"},
        {"lpl": None},
    ],
    ids=str,
)
def test_has_teeth(data, tmp_path, changes):
    """What matters to an update shows in it."""
    whole, _ = one_update(new_run(data, tmp_path))
    settings = {} if changes == {"lpl": None} else changes
    run = new_run(data, tmp_path, **settings)
    if changes == {"lpl": None}:
        run.updater.perceptual.weight.frozen = 1e-9
    other, _ = one_update(run)
    with pytest.raises(AssertionError):
        for a, b in zip(other, whole):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    "prediction, schedule, gate",
    [
        ("eps", "scaled_linear", {"max_timestep": 300}),
        ("v", "cosine", {"min_snr": 3.0}),
        ("eps", "linear", {"max_noise_level": 1.0}),
    ],
)
def test_other_objectives_run(data, tmp_path, prediction, schedule, gate):
    run = new_run(
        data,
        tmp_path,
        diffusion__prediction=prediction,
        diffusion__schedule=schedule,
        lpl__gate=gate,
        diffusion__weighting={"kind": "min_snr"},
    )
    _, values = one_update(run)
    assert values["loss/lpl"] > 0 and values["lpl/gated_share"] > 0
