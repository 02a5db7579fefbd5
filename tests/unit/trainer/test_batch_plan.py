"""Batch plans: samples and timesteps of a step depend on (seed, step), not on the microbatches."""

import math
from dataclasses import replace

import pytest
import torch

from lpl_pretrain.config.schema import OptimizerConfig, ScheduleKind, TimestepConfig
from lpl_pretrain.diffusion.schedule import make_schedule
from lpl_pretrain.losses.lpl.gate import gate_fraction
from lpl_pretrain.losses.lpl.subset import LPLSubset
from lpl_pretrain.trainer.batch_plan import BatchPlanner
from lpl_pretrain.trainer.lr import learning_rate
from tools.bench_batch_plan import Estimator


def planner(size=48, kind=ScheduleKind.RECTIFIED_FLOW, distribution="logit_normal", seed=3):
    return BatchPlanner(seed, size, TimestepConfig(distribution=distribution), make_schedule(kind))


@pytest.mark.parametrize("num_microbatches", [1, 2, 3, 4, 6, 8, 12])
def test_the_global_batch_does_not_depend_on_the_number_of_microbatches(num_microbatches):
    one = planner().plan(7, num_microbatches=1)[0]
    plans = planner().plan(7, num_microbatches=num_microbatches)
    assert all(len(plan.sample_indices) == 48 // num_microbatches for plan in plans)
    planned = {i: t.item() for plan in plans for i, t in zip(plan.sample_indices, plan.t)}
    assert planned == {i: t.item() for i, t in zip(one.sample_indices, one.t)}
    assert sorted(planned) == list(range(7 * 48, 8 * 48))


@pytest.mark.parametrize("kind", list(ScheduleKind))
@pytest.mark.parametrize("distribution", ["uniform", "logit_normal"])
@pytest.mark.parametrize("threshold", [0.2, 3**-0.5, 1.0, 3.0])
def test_gated_samples_come_first_in_every_microbatch(kind, distribution, threshold):
    d = planner(kind=kind, distribution=distribution)
    fraction = gate_fraction(threshold, d.schedule, d.timesteps)
    for num_microbatches in (1, 2, 3, 8):
        prefix = LPLSubset.of(48, fraction, 1.0).per_microbatch(num_microbatches)
        assert prefix <= math.ceil(48 * fraction / num_microbatches) + 1
        counts = []
        for step in range(20):
            for plan in d.plan(step, num_microbatches):
                gated = d.schedule.noise_level(plan.t) <= threshold
                assert not gated[prefix:].any()
                counts.append(int(gated.sum()))
        # one for the stratum that straddles the gate, one for the round-robin assignment
        assert max(counts) - min(counts) <= 2


def test_has_teeth_without_sorting():
    """Gated samples that are assigned in the order of the draw do not come first."""
    d = planner()
    prefix = LPLSubset.of(48, gate_fraction(3**-0.5, d.schedule, d.timesteps), 1.0).per_microbatch(
        4
    )
    plan = d.plan(0, 1)[0]
    by_index = plan.t[torch.tensor(plan.sample_indices).argsort()]
    assert any(
        (d.schedule.noise_level(by_index[microbatch::4]) <= 3**-0.5)[prefix:].any()
        for microbatch in range(4)
    )


def test_steps_and_seeds_differ():
    assert not torch.equal(planner().plan(0, 1)[0].t, planner().plan(1, 1)[0].t)
    assert not torch.equal(planner().plan(0, 1)[0].t, planner(seed=4).plan(0, 1)[0].t)


def test_inverse_square_root():
    config = OptimizerConfig(lr=1.0, warmup_steps=2, lr_schedule="inverse_sqrt", decay_from_steps=4)
    assert [learning_rate(config, step, 100) for step in (0, 1, 3, 15, 63)] == [
        0.5,
        1.0,
        1.0,
        0.5,
        0.25,
    ]
    with pytest.raises(ValueError, match="decay_from_steps=None with lr_schedule=inverse_sqrt"):
        OptimizerConfig(lr_schedule="inverse_sqrt")


def test_learning_rate():
    config = OptimizerConfig(lr=1.0, warmup_steps=4, lr_schedule="cosine")
    assert [learning_rate(config, s, 8) for s in (0, 1, 3, 4)] == [0.25, 0.5, 1.0, 1.0]
    assert learning_rate(config, 6, 8) == pytest.approx(0.5)
    assert learning_rate(OptimizerConfig(lr=1.0, warmup_steps=4), 1000, 8) == 1.0


@pytest.mark.parametrize("sample_fraction", [1.0, 0.5, 0.3, 0.01])
@pytest.mark.parametrize("num_microbatches", [1, 2, 3, 8])
def test_lpl_samples_come_first_and_do_not_depend_on_the_number_of_microbatches(
    sample_fraction, num_microbatches
):
    subset = LPLSubset.of(48, 0.4, sample_fraction)
    d = replace(planner(), subset=subset)
    assert subset.num_gated == 20 and subset.num_lpl == math.ceil(20 * sample_fraction)
    for step in range(5):
        one = d.plan(step, 1)[0]
        plans = d.plan(step, num_microbatches)
        chosen = [i for plan in plans for i in plan.sample_indices[: plan.num_lpl]]
        assert (
            sorted(chosen) == sorted(one.sample_indices[: one.num_lpl])
            and len(chosen) == subset.num_lpl
        )
        assert all(
            len(plan.sample_indices) == 48 // num_microbatches
            and plan.num_lpl <= subset.per_microbatch(num_microbatches)
            for plan in plans
        )
        assert max(plan.num_lpl for plan in plans) - min(plan.num_lpl for plan in plans) <= 1
        assert sorted(i for plan in plans for i in plan.sample_indices) == list(
            range(48 * step, 48 * step + 48)
        )


def test_every_gated_sample_has_the_same_inclusion_probability():
    """Systematic sampling: 7 of 20, each with probability 7 / 20, whatever its noise level."""
    d = replace(planner(), subset=LPLSubset(20, 7))
    counts = torch.zeros(48)
    steps = 4000
    for step in range(steps):
        order = d._lpl_first(torch.arange(48), step)
        counts[order[:7]] += 1
    fraction = counts / steps
    assert not fraction[20:].any()
    assert (fraction[:20] - 0.35).abs().max() < 5 * math.sqrt(0.35 * 0.65 / steps)


@pytest.mark.parametrize("sample_fraction", [1.0, 0.5, 0.25])
def test_unbiased_against_the_plain_gate_over_1e5_draws_and_less_noisy(sample_fraction):
    estimator = Estimator()
    plain, planned = estimator.plain(1_600_000), estimator.planned(100_000, sample_fraction)
    error = math.sqrt(planned.var() / len(planned) + plain.var() / len(plain))
    assert abs(planned.mean() - plain.mean()) < 4 * error
    assert error < 0.02 * plain.mean()
    assert planned.var() < 0.5 * plain.var()


def test_has_teeth_half_of_the_samples_without_their_weight():
    estimator = Estimator()
    plain, wrong = estimator.plain(1_600_000), estimator.planned(20_000, 0.5, weighted=False)
    assert abs(wrong.mean() - plain.mean()) > 0.3 * plain.mean()


@pytest.mark.parametrize("distribution", ["uniform", "logit_normal"])
def test_marginal_of_t_is_exactly_the_configured_distribution(distribution):
    """Kolmogorov-Smirnov test of each position in the batch, over 4000 steps, against the inverse
    of the quantile function.
    """
    d = planner(size=4, distribution=distribution)
    steps = 4000
    t = torch.stack(
        [
            one.t[torch.tensor(one.sample_indices).argsort()]
            for one in (d.plan(step, 1)[0] for step in range(steps))
        ]
    )
    for column in t.double().T:
        u = column if distribution == "uniform" else torch.special.ndtr(torch.logit(column))
        distance = (u.sort().values - (torch.arange(steps) + 0.5) / steps).abs().max()
        assert distance < 1.95 / math.sqrt(steps)  # one in a thousand
