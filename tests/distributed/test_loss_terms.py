"""A fourth loss term, defined here: the trainer sums it, and the denoiser gives it hidden states,
under every strategy.
"""

from pathlib import Path

import pytest
import torch

from lpl_pretrain.config.rundir import RunDir
from lpl_pretrain.losses import build
from lpl_pretrain.losses.term import LossTerm, TermValue
from lpl_pretrain.models.dit import DiT
from lpl_pretrain.runtime.world import World
from lpl_pretrain.trainer.assemble import assemble
from lpl_pretrain.trainer.metrics import Meter
from tests.support.configs import train_config
from tests.support.latents import tiny_dataset
from tests.support.ranks import run_ranks
from tests.support.training import ROOT, ZERO_CONFIGS, join_ranks
from tests.support.updates import update

CPU = torch.device("cpu")
STEPS = 3


class HiddenDistance(LossTerm):
    """Mean squared distance between the outputs of two blocks, 0.3 times."""

    name = "hidden_distance"
    needs_hidden = (0, 1)

    def __call__(self, draws, out, meter):
        distance = (out.hidden[1] - out.hidden[0]).double().square().flatten(1).mean(dim=1)
        return TermValue(distance.mean().to(out.mse), distance.detach())

    def weight(self, step):
        return 0.3


def away_from_zero_gates(model):
    """Zero gates would hide the blocks for the first updates."""
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return tiny_dataset(tmp_path_factory.mktemp("data"))


def train(world, device, data, strategy, term=HiddenDistance, lpl=True, **parallel):
    """Parameters, gradient norms and metrics after STEPS updates with plain SGD."""
    if strategy in ZERO_CONFIGS:
        parallel |= {"strategy": "zero", "zero_config": str(ROOT / ZERO_CONFIGS[strategy])}
    config = train_config(
        data__folder=data[0],
        autoencoder=data[1],
        optimizer={"kind": "sgd", "lr": 0.05, "max_grad_norm": 1e9},
        batch={"global_batch_size": 8, "micro_batch_size": 2},
        parallel={"strategy": strategy, "precision": "fp32", **parallel},
        **({"lpl": {"weight": 1.0, "gate": {"noise_level_below": 0.7}}} if lpl else {}),
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DiT, "_initialise", away_from_zero_gates)
        patch.setattr(build, "TERMS", [*build.TERMS, lambda context: term()])
        run = assemble(config, RunDir(Path("never_written")), world, device)
    meter = Meter(device)
    norms = [update(run, step, meter).grad_norm.item() for step in range(STEPS)]
    owned = [
        (p.name, list(p.shape), p.start, p.tensor.clone()) for p in run.strategy.local_params()
    ]
    return {"pieces": {"param": owned}, "norms": norms, "metrics": meter.flush()}


@pytest.fixture(scope="module")
def reference(data):
    return train(World(), CPU, data, "local")


def assert_same(results, wanted):
    got = join_ranks(results)
    expected = join_ranks([wanted])
    for name, tensor in expected["param"].items():
        torch.testing.assert_close(got["param"][name], tensor, rtol=2e-5, atol=1e-6)
    for name in ("loss/total", "loss/hidden_distance", "hidden_distance/weighted_share"):
        if name in wanted["metrics"]:
            assert results[0]["metrics"][name] == pytest.approx(wanted["metrics"][name], rel=1e-4)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2", "zero2", "zero3"])
def test_trains_alike_under_every_strategy(data, reference, strategy):
    assert reference["metrics"]["loss/hidden_distance"] > 0
    assert_same(run_ranks(2, train, data, strategy), reference)


@pytest.mark.parametrize("parallel", [{"activation_checkpointing": "blocks"}, {"compile": True}])
def test_checkpointed_and_compiled_blocks_give_the_same(data, reference, parallel):
    assert_same([train(World(), CPU, data, "local", **parallel)], reference)


class Forgotten(HiddenDistance):
    """The mistake: the hidden states are detached."""

    def __call__(self, draws, out, meter):
        value = super().__call__(draws, out, meter)
        return TermValue(value.loss.detach(), value.per_sample)


def test_has_teeth_a_term_without_gradient(data, reference):
    with pytest.raises(AssertionError):
        assert_same([train(World(), CPU, data, "local", term=Forgotten)], reference)
