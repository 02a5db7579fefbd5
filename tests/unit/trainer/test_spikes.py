"""Detection of spikes: bounds by median and MAD, noise levels, windows that restart, and the state
in a checkpoint.
"""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from lpl_pretrain.config.check import check_same_run, run_identity
from lpl_pretrain.config.rundir import RunDir
from lpl_pretrain.config.schema import OptimizerConfig, ScheduleKind, SpikeConfig, TimestepConfig
from lpl_pretrain.diffusion.schedule import make_schedule
from lpl_pretrain.diffusion.timesteps import quantile
from lpl_pretrain.errors import ConfigError
from lpl_pretrain.parallel.strategy import StepReport
from lpl_pretrain.runtime.timer import Clock
from lpl_pretrain.runtime.world import World
from lpl_pretrain.trainer.assemble import assemble
from lpl_pretrain.trainer.batch_plan import BatchPlanner
from lpl_pretrain.trainer.metrics import Meter
from lpl_pretrain.trainer.rollback import reason_to_stop
from lpl_pretrain.trainer.spikes import (
    MAX_LISTED,
    NoiseLevels,
    SpikeGuard,
    bounds,
    logarithm,
    worst,
)
from tests.support.configs import train_config
from tests.support.host_reads import HostReads
from tests.support.latents import tiny_dataset
from tests.support.updates import batches_of

CPU = torch.device("cpu")
FLOW = make_schedule(ScheduleKind.RECTIFIED_FLOW)
SMALL = {"window_updates": 16, "min_updates": 8, "noise_levels": 4}


def rows(*columns):
    return [[logarithm(value) for value in row] for row in zip(*columns, strict=True)]


def largest(values, **settings):
    """The bound of one column, as a value."""
    (bound,) = bounds(rows(values), SpikeConfig(**{**SMALL, **settings}), columns=1)
    return None if bound is None else math.exp(bound.largest)


# The bound


def test_the_bound_is_that_of_the_definition():
    values = [1.0, 1.1, 1.3, 0.9, 1.2, 2.5, 0.6, 1.0, 1.4]
    logs = np.log(values)
    mad = np.median(np.abs(logs - np.median(logs)))
    wanted = np.exp(np.median(logs) + 5 * 1.4826 * mad)
    assert wanted > 2 * np.median(values)
    assert largest(values, threshold_mads=5.0) == pytest.approx(wanted, rel=1e-5)


def test_mad_estimates_the_standard_deviation_of_a_normal():
    values = np.exp(np.random.default_rng(0).normal(size=20_001))
    settings = {"window_updates": 20_001, "threshold_mads": 3.0}
    assert math.log(largest(values, **settings)) == pytest.approx(3.0, rel=0.05)


@pytest.mark.parametrize(("values", "wanted"), [([3.0] * 9, 6.0), ([3.0, 3.001] * 5, 6.001)])
def test_values_that_hardly_differ_may_still_double(values, wanted):
    """MAD may be 0."""
    assert largest(values) == pytest.approx(wanted, rel=1e-5)
    assert largest(values, min_factor=1.5) == pytest.approx(0.75 * wanted, rel=1e-5)


def test_no_bound_before_the_window_has_min_updates():
    assert largest([1.0] * 7) is None and largest([1.0] * 8) is not None
    known, unknown = [1.0] * 9, [math.nan] * 2 + [1.0] * 7
    found = bounds(rows(known, unknown), SpikeConfig(**SMALL), columns=2)
    assert found[0] is not None and found[1] is None, "a noise level that had too few samples"
    assert bounds([], SpikeConfig(**SMALL), columns=3) == [None] * 3


def test_single_outliers_hardly_move_the_bound():
    """A mean and a standard deviation would let the next one pass."""
    values = list(np.exp(0.1 * np.random.default_rng(1).normal(size=60)))
    settings = {"window_updates": 64}
    polluted = largest([*values, 1e4, 1e5, 1e3], **settings)
    assert polluted == pytest.approx(largest(values, **settings), rel=0.2) and polluted < 10
    logs = np.log([*values, 1e4, 1e5, 1e3])
    assert np.exp(logs.mean() + 8 * logs.std()) > 1e5


@pytest.mark.parametrize("factor", [1.02, 0.95], ids=["grows", "falls"])
def test_a_trend_is_no_spike(factor):
    values = [factor**i for i in range(200)]
    for i in range(32, 200):
        assert values[i] < largest(values[max(0, i - 128) : i], window_updates=128, min_updates=32)


def test_the_quantity_furthest_above_its_bound_is_reported():
    limits = bounds(rows([1.0] * 8, [5.0] * 8, [1.0] * 8), SpikeConfig(**SMALL), columns=3)
    assert worst([math.log(x) for x in (1.0, 9.9, 1.9)], limits) is None
    assert worst([math.log(x) for x in (3.0, 100.0, 1.0)], limits) == 1
    assert worst([math.log(3.0), None, None], [limits[0], None, limits[2]]) == 0
    assert worst([None, 1e9, None], [limits[0], None, limits[2]]) is None


@pytest.mark.parametrize("value", [0.0, math.nan, math.inf])
def test_zero_and_nonfinite_values_have_no_logarithm(value):
    assert logarithm(value) is None


# Noise levels


DISTRIBUTIONS = [
    {},
    {"distribution": "logit_normal", "mean": -0.5},
    {"distribution": "mode"},
    {"distribution": "cosmap"},
]


@pytest.mark.parametrize(
    ("schedule", "timesteps"),
    [
        *(
            (schedule, config)
            for schedule in ("rectified_flow", "linear", "cosine")
            for config in DISTRIBUTIONS
        ),
        ("rectified_flow", {"shift": 3.0}),
    ],
    ids=str,
)
def test_each_level_holds_an_equal_part_of_every_batch(schedule, timesteps):
    config, path = TimestepConfig(**timesteps), make_schedule(ScheduleKind(schedule))
    levels = NoiseLevels.of(8, config, path)
    for step in range(3):
        (plan,) = BatchPlanner(3, 64, config, path).plan(step, num_microbatches=1)
        counts = torch.bincount(levels.index(path.noise_level(plan.t)), minlength=8)
        few = 0 if schedule == "rectified_flow" else 2  # a timestep that lies across an edge
        assert (counts - 8).abs().max() <= few, counts
    u = torch.tensor([0.3], dtype=torch.float64)
    t = path.snap(quantile(config, u).float())
    low, high = levels.t[2:4]
    assert levels.index(path.noise_level(t)).tolist() == [2] and low <= t.item() <= high
    assert levels.name(2) == f"t {low:.3g} to {high:.3g}"


def test_sums_by_level():
    levels = NoiseLevels.of(4, TimestepConfig(), FLOW)
    t, losses = torch.tensor([0.1, 0.9, 0.3, 0.2, 1.0]), torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0])
    sums = levels.sums(FLOW.noise_level(t), losses)
    assert (
        sums.tolist() == [9.0, 4.0, 0.0, 18.0, 2.0, 1.0, 0.0, 2.0] and sums.dtype == torch.float64
    )


# The guard


def step_report(applied, norm):
    """A report of one process: rejected where the norm is finite and the update was not applied."""
    return StepReport(
        torch.tensor(applied),
        torch.tensor(norm, dtype=torch.float64),
        torch.tensor(False),
        rejected=not applied and math.isfinite(norm),
    )


class Driven:
    """A guard whose norms and losses (one sample at each of four levels) the test gives."""

    T = torch.tensor([0.1, 0.3, 0.6, 0.9])

    def __init__(self, **settings):
        config = SpikeConfig(**{**SMALL, **settings})
        levels = NoiseLevels.of(config.noise_levels, TimestepConfig(), FLOW)
        self.guard = SpikeGuard(config, levels, CPU, "folder {0[0]} shard {0[1]} row {0[2]}".format)
        self.step = 0

    def update(self, norm=1.0, losses=(1.0, 1.0, 1.0, 1.0), *, finite=True, with_lpl=False):
        """The spike, or None."""
        losses = torch.tensor(losses)
        for half in (slice(0, 2), slice(2, 4)):  # two microbatches
            self.guard.observe(FLOW.noise_level(self.T[half]), losses[half])
        check = self.guard.check(terms=["diffusion", "lpl"] if with_lpl else ["diffusion"])
        applied = finite and check.accept(norm, check.values.tolist())
        report = step_report(applied, norm if finite else math.nan)
        samples = [4 * self.step + i for i in range(4)]
        spike = self.guard.judge(self.step, report, samples, [(0, 7, i) for i in range(4)])
        self.step += 1
        return spike

    def updates(self, count, **given):
        assert [self.update(**given) for _ in range(count)] == [None] * count
        return self


def test_a_gradient_norm():
    spike = Driven().updates(9).update(norm=2.1, losses=(1.0, 1.5, 1.0, 1.0))
    assert (spike.step, spike.quantity) == (10, "the gradient norm")
    assert (spike.value, spike.median, spike.bound) == pytest.approx((2.1, 1.0, 2.0), rel=1e-5)
    assert spike.samples[0] == "sample 37 (folder 0 shard 7 row 1)" and len(spike.samples) == 4
    assert (
        "step 10: the gradient norm is 2.1, bound 2 (median 1); largest losses: sample 37 ("
        in str(spike)
    )


def test_a_loss_that_the_mean_hides():
    """Each level is compared with itself: low noise has small losses in flow matching, say."""
    usual = (0.01, 1.0, 1.0, 10.0)
    driven = Driven().updates(9, losses=usual)
    assert driven.update(losses=(0.019, 1.9, 1.9, 19.0)) is None
    spike = driven.update(losses=(0.03, 1.0, 1.0, 10.0))
    assert spike.quantity == "the loss at t 0 to 0.25" and spike.value == pytest.approx(
        0.03, rel=1e-5
    )
    assert spike.samples[0].startswith("sample 40 ("), "the largest for its level, not the largest"
    assert sum(usual) * 1.01 > 0.03 + 12.0


def test_only_the_samples_with_the_largest_losses_are_listed():
    driven = Driven(noise_levels=1).updates(8)
    many, guard = torch.arange(1.0, 21.0), driven.guard
    guard.observe(torch.ones(20), many)
    check = guard.check(terms=["diffusion"])
    report = step_report(check.accept(50.0, check.values.tolist()), 50.0)
    spike = guard.judge(8, report, range(20), [(0, 0, i) for i in range(20)])
    assert len(spike.samples) == MAX_LISTED and spike.samples[0].startswith("sample 19 ")


def test_a_rejected_update_does_not_enter_the_window():
    driven = Driven().updates(16)
    for number in range(1, 20):
        assert driven.update(norm=3.0) is not None and driven.guard.events == number
    assert driven.update(norm=1.0) is None and len(driven.guard.rows) == 16


def test_a_nonfinite_update_does_not_enter_the_window():
    driven = Driven().updates(8)
    assert driven.update(finite=False) is None
    assert len(driven.guard.rows) == 8 and driven.guard.events == 0
    assert driven.update(norm=2.5) is not None


def test_old_updates_leave_the_window():
    driven = Driven().updates(16)
    for norm in [1.9**i for i in (0.5, 1, 1.5, 2, 2.5, 3)]:
        driven.updates(16, norm=norm)
    assert driven.update(norm=1.9**3.5) is None


def test_the_window_restarts_when_lpl_gets_its_weight():
    """The jump of the gradient norm when LPL gets its weight is no spike; later updates are
    compared with those since the jump.
    """
    driven = Driven().updates(16)
    assert Driven().updates(16).update(norm=5.0) is not None
    driven.updates(8, norm=5.0, with_lpl=True)
    assert driven.update(norm=11.0, with_lpl=True) is not None


def test_the_state_survives_json_exactly():
    """A resumed run decides as the one that went on: same bounds, same spikes, same state, over
    another 40 updates.
    """
    numbers = np.random.default_rng(2)
    given = [
        {
            "norm": math.exp(0.5 * numbers.normal()),
            "losses": np.exp(0.3 * numbers.normal(size=4)).tolist(),
            "with_lpl": i > 20,
        }
        for i in range(80)
    ]
    whole, found = Driven(threshold_mads=2.0, min_factor=1.1), []
    for number, update in enumerate(given):
        if number == 40:
            text = json.dumps(whole.guard.state(), allow_nan=False)
        found.append(whole.update(**update))
    resumed = Driven(threshold_mads=2.0, min_factor=1.1)
    resumed.guard.load_state(json.loads(text))
    resumed.step = 40
    again = [resumed.update(**update) for update in given[40:]]
    assert again == found[40:] and 0 < sum(spike is not None for spike in again) < 20
    assert resumed.guard.state() == whole.guard.state()


def test_has_teeth_a_window_that_is_lost():
    driven = Driven().updates(16)
    driven.guard.load_state(None)
    assert driven.update(norm=100.0) is None


def test_state_of_other_settings():
    state = Driven().updates(16).guard.state()
    fewer = Driven(window_updates=8)
    fewer.guard.load_state(state)
    assert list(fewer.guard.rows) == state["window"][-8:] and fewer.update(norm=3.0) is not None
    other = Driven(noise_levels=2)
    other.guard.load_state({**state, "events": 3})
    assert not other.guard.rows and other.guard.events == 3


# Configuration


def test_ignored_by_default():
    assert OptimizerConfig().on_spike.value == "ignore"


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"on_spike": "undo"}, "'ignore', 'stop', 'skip' or 'rollback'"),
        (
            {"spike": {"min_updates": 64, "window_updates": 32}},
            "the window would never hold enough",
        ),
        ({"spike": {"min_updates": 1}}, "greater than or equal to 8"),
        ({"spike": {"min_factor": 1.0}}, "greater than 1"),
        ({"spike": {"threshold_mads": 0}}, "greater than 0"),
        ({"spike": {"noise_levels": 0}}, "greater than or equal to 1"),
        ({"spike": {"skip_updates": 0}}, "greater than 0"),
        ({"spike": {"treshold": 3}}, "Extra inputs"),
    ],
    ids=str,
)
def test_wrong_settings(wrong, message):
    with pytest.raises(ValidationError, match=message):
        OptimizerConfig.model_validate(wrong)


def test_a_run_may_change_them_when_it_goes_on(tmp_path):
    before = train_config()
    after = train_config(optimizer={"lr": 1e-3, "on_spike": "rollback", "spike": {"max_events": 2}})
    check_same_run(before, after, tmp_path)
    assert run_identity(before) == run_identity(after)
    with pytest.raises(ConfigError, match="optimizer.lr"):
        check_same_run(before, train_config(optimizer__lr=2e-3), tmp_path)


def test_when_a_run_stops():
    def why(on_spike, events):
        return reason_to_stop(OptimizerConfig(on_spike=on_spike, spike={"max_events": 2}), events)

    assert "Parameters and moments are as before" in why("stop", 1)
    for on_spike in ("skip", "rollback"):
        assert why(on_spike, 1) is why(on_spike, 2) is None
        assert "spike number 3, optimizer.spike.max_events is 2" in why(on_spike, 3)


# In an update


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return tiny_dataset(tmp_path_factory.mktemp("data"))


def updates(data, folder, on_spike, count, **changes):
    """Parameters, metrics and host reads of each update."""
    latents, autoencoder = data
    optimizer = {
        "kind": "adamw",
        "lr": 1e-2,
        "on_spike": on_spike,
        "spike": {**SMALL, "threshold_mads": 100.0},
    }
    settings = {
        "data__folder": latents,
        "autoencoder": autoencoder,
        "optimizer": optimizer,
        "batch__micro_batch_size": 4,
    }
    run = assemble(train_config(**{**settings, **changes}), RunDir(folder), World(), CPU)
    meter, reads, outcomes = Meter(CPU), [], []
    for step in range(count):
        batches = batches_of(run, step)
        with HostReads() as counted:
            outcomes.append(run.updater.update(step, batches, meter, Clock(CPU)))
        reads.append(counted.count)
    return (
        [p.detach().clone() for p in run.updater.denoiser.parameters()],
        meter.flush(),
        outcomes,
        reads,
        run,
    )


def test_without_spikes_nothing_changes(data, tmp_path):
    """Bit for bit; looking for spikes copies one vector to the host in each update."""
    lpl = {"lpl": {"weight": 1.0, "start_step": 3, "gate": {"noise_level_below": 1.0}}}
    plain, means, _, reads, run = updates(data, tmp_path, "ignore", 10, **lpl)
    assert run.updater.spikes is None and run.state(10)["spikes"] is None and set(reads) == {0}
    guarded, same, outcomes, fewer, run = updates(data, tmp_path, "skip", 10, **lpl)
    assert all(map(torch.equal, guarded, plain)) and same == means
    assert set(fewer) == {0}, "the norm and the sums come in one copy, which is no single value"
    assert [outcome.spike for outcome in outcomes] == [None] * 10
    assert len(run.updater.spikes.rows) == 7, "since LPL has a weight"


def test_a_state_without_spikes_is_read(data, tmp_path):
    """States of versions without spike detection have neither `jump_updates` nor `spikes`."""
    *_, run = updates(data, tmp_path, "skip", 9)
    state = run.state(9)
    assert json.loads(json.dumps(state, allow_nan=False)) == state
    old = {key: value for key, value in state.items() if key not in ("jump_updates", "spikes")}
    run.jump_updates = 5
    run.load_state(old)
    assert run.jump_updates == 0 and not run.updater.spikes.rows
    run.load_state({**state, "jump_updates": 4})
    passed = {**state["stream"], "epoch": (9 + 4) * 8 // 32}  # seen are as many as before
    assert run.state(9) == {**state, "jump_updates": 4, "stream": passed}


def test_the_jump_moves_samples_noise_levels_and_the_lpl_subset_alike(data, tmp_path):
    lpl = {"weight": 1.0, "sample_fraction": 0.5, "gate": {"noise_level_below": 1.0}}
    *_, run = updates(data, tmp_path, "ignore", 0, lpl=lpl)
    later = run.microbatch_plans(7)
    run.jump_updates = 3
    moved = run.microbatch_plans(4)
    assert [plan.sample_indices for plan in moved] == [plan.sample_indices for plan in later]
    assert all(torch.equal(a.t, b.t) for a, b in zip(moved, later, strict=True))
    batches = run.batches(4)
    assert next(batches).draws.sample_indices == later[0].sample_indices
    assert run.samples_seen(4) == 32
    batches.close()
