"""Non-finite losses and gradients: all ranks stop or skip, and name rank, step and sample."""

import pytest
import torch

from lpl_pretrain.config.rundir import RunDir
from lpl_pretrain.errors import NonFiniteError
from lpl_pretrain.runtime.timer import Clock
from lpl_pretrain.trainer.assemble import assemble
from lpl_pretrain.trainer.metrics import Meter
from tests.support.configs import train_config
from tests.support.latents import tiny_dataset
from tests.support.ranks import run_ranks
from tests.support.training import ROOT, ZERO_CONFIGS, assert_identical, join_ranks
from tests.support.updates import batches_of, term, update

BAD_STEPS = (1, 3)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return tiny_dataset(tmp_path_factory.mktemp("data"))


def new_run(world, device, data, folder, strategy, **optimizer):
    parallel = (
        {"strategy": "zero", "zero_config": str(ROOT / ZERO_CONFIGS[strategy])}
        if strategy in ZERO_CONFIGS
        else {"strategy": strategy}
    )
    config = train_config(
        data__folder=data[0],
        autoencoder=data[1],
        optimizer={"kind": "sgd", "lr": 0.05, **optimizer},
        parallel=parallel,
        batch={"global_batch_size": 8, "micro_batch_size": 2},
        lpl={"target_fraction": 0.2, "calibration_steps": 2, "gate": {"noise_level_below": 0.7}},
    )
    return assemble(config, RunDir(folder), world, device)


def pieces(run):
    return {
        "pieces": {
            "param": [
                (p.name, list(p.shape), p.start, p.tensor.clone())
                for p in run.strategy.local_params()
            ]
        }
    }


def train(world, device, data, folder, strategy, steps, optimizer):
    """Train with NaN latents in rank 1's second micro-batch of BAD_STEPS.

    Returns (messages by step, bad samples, states by step, metrics, skipped updates, LPL weight).
    """
    run = new_run(world, device, data, folder, strategy, **optimizer)
    meter = Meter(device)
    clock = Clock(device)
    messages, bad, states = [], [], []
    for step in range(steps):
        batches = batches_of(run, step)
        if step in BAD_STEPS:
            bad.append(run.planner.plan(step, 4)[3].sample_indices[0])
            if world.rank == 1:
                batches[1].latents.moments[0] = torch.nan
        states.append({**pieces(run), "norms": []})
        try:
            run.updater.update(step, batches, meter, clock)
            skipped = run.updater.skipped_updates()
        except NonFiniteError as error:
            messages.append(str(error))
            states.append({**pieces(run), "norms": []})
            break
        messages.append(skipped[0].reason if skipped else "")
    means = meter.flush() if steps > 2 else {}
    return (
        messages,
        bad,
        states,
        means,
        run.state(steps)["skipped_updates"],
        term(run).lpl_weight.calibrated or 0.0,
    )


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2", "zero2"])
def test_stop(data, tmp_path, strategy):
    messages, bad, states, *_ = zip(
        *run_ranks(2, train, data, tmp_path, strategy, 3, {}), strict=True
    )
    assert messages[0] == messages[1] and messages[0][0] == ""
    assert messages[0][1].startswith(
        f"step 2: the loss is not finite: rank 1: sample {bad[0][0]}. Parameters and moments are "
        "as before"
    )
    before, after = (join_ranks([state[i] for state in states]) for i in (1, 2))
    assert_identical(after, before)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2", "zero2"])
def test_skip(data, tmp_path, strategy):
    """Two updates are skipped; metrics and LPL's calibration ignore them."""
    skip = {"on_nonfinite": "skip", "max_skipped_updates": 2}
    messages, bad, states, means, skipped, weight = zip(
        *run_ranks(2, train, data, tmp_path, strategy, 5, skip), strict=True
    )
    assert messages[0] == messages[1]
    assert [bool(message) for message in messages[0]] == [False, True, False, True, False]
    assert f"step 4: the loss is not finite: rank 1: sample {bad[0][1]}" in messages[0][
        3
    ] and skipped == (2, 2)
    assert 0 < means[0]["loss/total"] < 100 and weight[0] == weight[1] > 0
    states = [join_ranks([state[i] for state in states]) for i in range(5)]
    assert_identical(states[2], states[1])
    for earlier, later in ((0, 1), (2, 3)):
        with pytest.raises(AssertionError):
            assert_identical(states[later], states[earlier])


def test_more_skipped_updates_than_allowed(data, tmp_path):
    skip = {"on_nonfinite": "skip", "max_skipped_updates": 1}
    messages, *_ = zip(*run_ranks(2, train, data, tmp_path, "ddp", 5, skip), strict=True)
    assert (
        "This is skipped update number 2, optimizer.max_skipped_updates is 1"
        in messages[0][3]
        == messages[1][3]
    )


def explodes(world, device, data, folder):
    run = new_run(world, device, data, folder, "ddp")
    next(run.updater.denoiser.parameters()).register_hook(lambda gradient: gradient * torch.inf)
    with pytest.raises(NonFiniteError) as caught:
        update(run, 0)
    return str(caught.value)


def test_a_nonfinite_gradient_of_finite_losses(data, tmp_path):
    first, second = run_ranks(2, explodes, data, tmp_path)
    assert first == second and first.startswith(
        "step 1: all losses are finite, the gradient is not. Parameters"
    )
