"""One update: the surrogate carries LPL's gradient exactly, microbatches change nothing, and every
draw is keyed.
"""

import copy
import re

import pytest
import torch

from lpl_pretrain.config.rundir import RunDir
from lpl_pretrain.errors import NonFiniteError
from lpl_pretrain.losses.lpl.build import build_features
from lpl_pretrain.runtime.timer import Clock
from lpl_pretrain.runtime.world import World
from lpl_pretrain.trainer.assemble import assemble
from lpl_pretrain.trainer.metrics import Meter
from tests.support.autoencoders import tiny_dc, tiny_distilled
from tests.support.configs import train_config
from tests.support.host_reads import HostReads
from tests.support.latents import tiny_dataset
from tests.support.updates import batches_of, term, update
from tests.unit.losses.lpl.reference import reference_loss

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
        "lpl__gate": {"noise_level_below": 1.0},
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
    update(run, step, meter)
    return [p.detach().clone() for p in run.updater.denoiser.parameters()], meter.flush()


def test_one_backward_equals_differentiating_through_the_decoder(data, tmp_path):
    run = new_run(data, tmp_path)
    slow = copy.deepcopy(run.updater.denoiser)
    got, values = one_update(run)

    (batch,) = batches_of(run, 0)
    borrowed = type(run.updater)(
        **{**{name: getattr(run.updater, name) for name in run.updater.__slots__}, "denoiser": slow}
    )
    seen = borrowed.denoise(batch)
    diffusion = run.updater.terms[0](batch.draws, seen, Meter(CPU)).loss
    features = build_features(run.config, run.config.lpl, run.stream.index, run.updater.scaling)
    gate = seen.noise_level <= 1.0
    assert 0 < gate.sum() < len(gate)
    predicted, clean = (
        {name: x.double() for name, x in features(z).items()} for z in (seen.z0_hat, seen.z0)
    )
    total = (
        diffusion + 0.7 * reference_loss(run.config.lpl, clean, predicted, gate.double(), 8).mean()
    )
    total.backward()
    wanted = [p.detach() - 0.5 * p.grad for p in slow.parameters()]
    for a, b in zip(got, wanted):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    assert values["loss/total"] == pytest.approx(total.item(), rel=1e-5)
    assert values["loss/diffusion"] + 0.7 * values["loss/lpl"] == pytest.approx(
        total.item(), rel=1e-5
    )


@pytest.mark.parametrize("micro_batch_size", [1, 2, 4])
def test_microbatches_change_nothing(data, tmp_path, micro_batch_size):
    whole, values = one_update(new_run(data, tmp_path))
    split, split_values = one_update(
        new_run(data, tmp_path, batch__micro_batch_size=micro_batch_size)
    )
    for a, b in zip(split, whole):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    for name in values:
        assert split_values[name] == pytest.approx(values[name], rel=1e-4), name


@pytest.mark.parametrize(
    "changes",
    [
        {"lpl__weight": 1.4},
        {"lpl__gate": {"noise_level_below": 0.3}},
        {"seed": 1},
        {"conditioning": {"label_dropout": 1.0}},
        {"data__posterior": "mean"},
        {"lpl": None},
    ],
    ids=str,
)
def test_has_teeth(data, tmp_path, changes):
    """Each setting that matters to an update changes its weights."""
    whole, _ = one_update(new_run(data, tmp_path))
    settings = {} if changes == {"lpl": None} else changes
    run = new_run(data, tmp_path, **settings)
    if changes == {"lpl": None}:
        term(run).lpl_weight.calibrated = 1e-9
    other, _ = one_update(run)
    with pytest.raises(AssertionError):
        for a, b in zip(other, whole):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    "prediction, schedule, gate",
    [
        ("eps", "scaled_linear", {"timestep_below": 300}),
        ("v", "cosine", {"snr_above": 3.0}),
        ("eps", "linear", {"noise_level_below": 1.0}),
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


def test_learned_sigma_adds_its_bound(data, tmp_path):
    run = new_run(
        data,
        tmp_path,
        model__learned_sigma=True,
        diffusion={"prediction": "eps", "schedule": "linear"},
        lpl__gate={"noise_level_below": 1.0},
    )
    _, values = one_update(run)
    assert (
        values["loss/variational_bound"] > 0
        and values["loss/diffusion"] > values["loss/variational_bound"]
    )
    assert term(run).snapshot.z0_hat.shape[1] == 4


def test_a_class_conditional_unet_trains(data, tmp_path):
    small = {
        "block_out_channels": [16, 32],
        "layers_per_block": 1,
        "norm_num_groups": 8,
        "cross_attention_dim": 16,
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
    }
    run = new_run(data, tmp_path, model={"kind": "unet", "preset": "ldm", "settings": small})
    names = [name for name, _ in run.updater.denoiser.named_parameters()]
    before = [p.detach().clone() for p in run.updater.denoiser.parameters()]
    after, values = one_update(run)
    still = [name for name, a, b in zip(names, before, after) if torch.equal(a, b)]
    # one token to look at is looked at, whatever queries and keys say
    assert values["loss/lpl"] > 0 and all(
        re.search("attn2.to_[qk]|norm2", name) for name in still
    ), still


@pytest.mark.parametrize("calibrating", [False, True])
def test_an_update_reads_nothing_to_the_host(data, tmp_path, calibrating):
    counts = []
    weight = (
        {"lpl__weight": None, "lpl__target_fraction": 0.2, "lpl__calibration_steps": 9}
        if calibrating
        else {}
    )
    for changes in (
        {"lpl__start_step": 100},
        weight,
        {**weight, "lpl__crop": {"side": 4, "halo": 1}, "lpl__sample_fraction": 0.5},
    ):
        run, meter = new_run(data, tmp_path, batch__micro_batch_size=4, **changes), Meter(CPU)
        batches = batches_of(run, 0)
        with HostReads() as reads:
            run.updater.update(0, batches, meter, Clock(CPU))
        counts.append(reads.count)
        assert meter.flush()["loss/lpl" if "lpl__start_step" not in changes else "loss/total"] > 0
    assert counts == [0, 0, 0]


def test_has_teeth_a_read_is_counted():
    with HostReads() as reads:
        assert torch.ones(3).sum().item() == 3
        torch.ones(3).nonzero()
    assert reads.count == 2


@pytest.mark.parametrize("share", [1.0, 0.5])
def test_times_and_the_lpl_snapshot_are_available_for_the_log(data, tmp_path, share):
    run, clock, meter = new_run(data, tmp_path, lpl__sample_fraction=share), Clock(CPU), Meter(CPU)
    run.updater.update(0, batches_of(run, 0), meter, clock)
    values, seconds = meter.flush(), clock.flush()
    assert (
        set(seconds) == {"all", "forward", "diffusion", "lpl", "backward", "optimizer"}
        and min(seconds.values()) > 0
    )
    assert sum(seconds.values()) < 2 * seconds["all"] and set(clock.flush()) == {"all"}
    assert term(run).snapshot.z0.shape[1:] == (4, 8, 8)
    for stage in ("mid", "up0", "up1", "up2"):
        assert values[f"lpl/stage/{stage}/contribution"] > 0
        assert (
            0 < values[f"lpl/stage/{stage}/keep_fraction"] <= 1
            and values[f"lpl/stage/{stage}/std_ratio"] > 0
        )


@pytest.mark.parametrize("make", [tiny_distilled, tiny_dc], ids=["distilled", "dc"])
def test_features_from_another_decoder(data, tmp_path, make):
    """`lpl.decoder`: a smaller network for the same latents, which changes LPL and nothing else."""
    make().save_pretrained(tmp_path / "other")
    _, own = one_update(new_run(data, tmp_path))
    run = new_run(data, tmp_path, lpl__decoder=str(tmp_path / "other"))
    weights, other = one_update(run)
    assert list(term(run).loss.features.stages) == ["mid", "up0", "up1"]
    assert (
        other["loss/diffusion"] == own["loss/diffusion"]
        and 0 < other["loss/lpl"] != own["loss/lpl"]
    )
    assert all(w.isfinite().all() for w in weights)


def test_a_model_that_diverged_inside_the_gate_is_refused(data, tmp_path):
    """NaN in what LPL compares: the update is not applied, and the samples that passed the gate are
    named.
    """
    run = new_run(data, tmp_path)
    before = [p.detach().clone() for p in run.updater.denoiser.parameters()]
    term(run).loss.features.decoder.stages["up0"][0].module.conv1.bias.data[0] = torch.nan
    plan = run.microbatch_plans(0)[0]
    passed = sorted(
        index for index, t in zip(plan.sample_indices, plan.t.tolist()) if t / (1 - t) <= 1.0
    )
    with pytest.raises(
        NonFiniteError,
        match=f"step 1: the loss is not finite: rank 0: samples {', '.join(map(str, passed))}. Par",
    ):
        one_update(run)
    assert all(torch.equal(a, b) for a, b in zip(before, run.updater.denoiser.parameters()))
