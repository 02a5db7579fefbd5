"""Loss spikes on several ranks: all layouts take the same decisions and train on the same samples.

A position is the index of a global batch in the order of samples.  The poisoned shard is the batch
of positions FIRST and SECOND.  `skip` leaves out update 11.  `rollback` returns from update 11 to
step 8 and continues at position 11; then from update 14, which has position 16, to step 12 and
continues at position 17.
"""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from lpl_pretrain.checkpoint.store import load_full
from lpl_pretrain.config.data_mixture import read_data
from lpl_pretrain.config.rundir import RunDir
from lpl_pretrain.data.ledger import audit
from lpl_pretrain.data.order import SampleOrder
from lpl_pretrain.errors import LPLError
from lpl_pretrain.parallel.strategy import Strategy, UpdateCheck
from lpl_pretrain.runtime.dist import AgreedFlags
from lpl_pretrain.runtime.preempt import StopRequest
from lpl_pretrain.runtime.timer import Clock
from lpl_pretrain.runtime.world import World
from lpl_pretrain.trainer import loop
from lpl_pretrain.trainer.assemble import Run, assemble
from lpl_pretrain.trainer.metrics import Meter
from tests.support.ranks import run_ranks
from tests.support.spikes import BATCH, DATA, FIRST, SECOND, STEPS, poisoned_data, spike_config
from tests.support.training import (
    ZERO_CONFIGS,
    Case,
    Training,
    assert_identical,
    join_ranks,
    set_loss_scale,
)
from tests.support.updates import batches_of

CPU = torch.device("cpu")
SKIP = [(11, "skip", None, None)]
ROLLBACK = [(11, "rollback", 8, 3), (14, "rollback", 12, 5)]
POSITIONS = {"skip": list(range(STEPS)), "rollback": [*range(8), *range(11, 15), *range(17, 21)]}
"""Positions of the updates in the final run, a skipped one included."""
LAYOUTS = [(1, "local"), (2, "ddp"), (2, "fsdp2"), (2, "zero2"), (4, "ddp"), (4, "fsdp2")]


class Killed(Exception):
    pass


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return poisoned_data(tmp_path_factory.mktemp("data"))


class StopAtOnce(AgreedFlags):
    """All ranks are asked to stop at the same step, so they need not agree on it one step later."""

    def read(self, stop, writing):
        return [stop, super().read(stop, writing)[1]]


def train(world, device, run_dir, config, kill_at=None, stop_at=None, jumped=0):
    """Train to the end, or to an interruption once `jumped` updates were jumped over.

    `kill_at` ends after that update without a save, `stop_at` with one.
    """
    stop = StopRequest()
    assemble, log_calibrated = loop.assemble, loop.log_calibrated
    runs = []

    def assemble_and_keep(*arguments):
        runs.append(assemble(*arguments))
        return runs[-1]

    def interrupt(trackers, completed, result):
        log_calibrated(trackers, completed, result)
        if runs[-1].jump_updates >= jumped and completed == kill_at:
            raise Killed
        if runs[-1].jump_updates >= jumped and completed == stop_at:
            stop.signal_name = "SIGTERM"

    agreed_flags = loop.AgreedFlags
    loop.AgreedFlags = StopAtOnce
    loop.assemble, loop.log_calibrated = assemble_and_keep, interrupt
    try:
        ended = loop.train(config, run_dir, world, device, stop)
        assert ended == (kill_at is None and stop_at is None)
    except Killed:
        assert kill_at is not None
    finally:
        loop.AgreedFlags = agreed_flags
        loop.assemble, loop.log_calibrated = assemble, log_calibrated


def run_all(world, device, folder, data, cases):
    for name, on_spike, strategy, interruptions in cases:
        run_dir = RunDir(folder / name)
        if world.rank == 0:
            run_dir.path.mkdir()
        if dist.is_initialized():
            dist.barrier()
        changes = {"checkpoint": {"every_steps": 4, "keep_last": 1}}
        config = spike_config(data, on_spike, strategy, **changes)
        for interruption in interruptions:
            train(world, device, run_dir, config, **interruption)
        train(world, device, run_dir, config)


INTERRUPTED = {
    "killed": [{"kill_at": 10, "jumped": 3}, {"kill_at": 14, "jumped": 5}],  # after each rollback
    "stopped": [{"stop_at": 10}, {"stop_at": 9, "jumped": 3}, {"stop_at": 13, "jumped": 5}],
}
"""Interruptions by name; with keep_last=1 a stop's checkpoint is the only one left."""


@pytest.fixture(scope="module")
def runs(data, tmp_path_factory):
    """Run directories of all cases, by (world size, strategy, name); one launch per world size."""
    folder = tmp_path_factory.mktemp("runs")
    run_dirs = {}
    for ranks in (1, 2, 4):
        cases = []
        for size, strategy in LAYOUTS:
            if size != ranks:
                continue
            wanted = {"skip": [], "rollback": []}
            if (size, strategy) in ((1, "local"), (2, "ddp"), (2, "zero2")):
                wanted |= INTERRUPTED
            for name, interruptions in wanted.items():
                on_spike = "skip" if name == "skip" else "rollback"
                cases.append((f"{size}_{strategy}_{name}", on_spike, strategy, interruptions))
                run_dirs[size, strategy, name] = RunDir(folder / cases[-1][0])
        if ranks == 1:
            run_all(World(), CPU, folder, data, cases)
        else:
            run_ranks(ranks, run_all, folder, data, cases, timeout_s=400)
    return run_dirs


def order(data):
    return SampleOrder(read_data(data.folder), data.seed, BATCH, **DATA)


def spikes(run_dir):
    lines = [json.loads(line) for line in run_dir.metrics.read_text().splitlines()]
    events = [line for line in lines if line.get("event") == "spike"]
    return [(e["step"], e["action"], e.get("to_step"), e.get("jump_updates")) for e in events]


def positions(run_dir):
    """Positions of the updates in the final run, read from the ledgers.

    Fails unless all ranks' samples together are the global batch of each update.
    """
    read = {}
    for path in sorted(run_dir.path.glob("logs/samples_rank_*.jsonl")):
        mine, lines = {}, map(json.loads, path.read_text().splitlines())
        for line in lines:
            if "samples" not in line:
                mine = {step: samples for step, samples in mine.items() if step <= line["step"]}
            else:
                mine[line["step"]] = [sample for sample, *_ in line["samples"]]
        for step, samples in mine.items():
            read.setdefault(step, []).extend(samples)
    for samples in read.values():
        assert sorted(samples) == list(range(min(samples), min(samples) + BATCH))
    return [min(read[step]) // BATCH for step in sorted(read)]


def final(run_dir, kind="param"):
    return load_full(run_dir.checkpoint(STEPS), kind)


def assert_close(got, wanted, **tolerance):
    assert got.keys() == wanted.keys()
    for name, tensor in wanted.items():
        torch.testing.assert_close(got[name].double(), tensor.double(), **tolerance)


def replayed(data, tmp_path, at, moved=False):
    """Parameters of one process without spike handling that trains on the positions `at`.

    None makes no update.  `moved` draws t as if no update had been jumped over.
    """
    run = assemble(spike_config(data, "ignore"), RunDir(tmp_path), World(), CPU)
    for step, position in enumerate(at):
        if position is None:
            continue
        run.jump_updates = position - step
        plans = run.microbatch_plans(step)
        if moved:
            others = run.planner.plan(step, run.grad_accum_steps)
            plans = [replace(plan, t=other.t) for plan, other in zip(plans, others, strict=True)]
        batches = [run.reader.read(plan).to(CPU) for plan in plans]
        run.updater.update(step, batches, Meter(CPU), Clock(CPU))
    return {piece.name: piece.tensor.view(piece.shape) for piece in run.strategy.local_params()}


@pytest.mark.parametrize(("ranks", "strategy"), LAYOUTS)
@pytest.mark.parametrize("on_spike", ["skip", "rollback"])
def test_every_layout_takes_the_same_decisions(runs, data, tmp_path, ranks, strategy, on_spike):
    run_dir = runs[ranks, strategy, on_spike]
    assert spikes(run_dir) == (SKIP if on_spike == "skip" else ROLLBACK)
    assert positions(run_dir) == POSITIONS[on_spike]
    result = audit(run_dir, order(data), BATCH)
    assert (result.problems, result.steps) == ([], STEPS)
    assert (result.rollbacks, result.jump_updates) == ((0, 0) if on_spike == "skip" else (2, 5))
    exact = (
        {"rtol": 1e-10, "atol": 1e-12}
        if strategy not in ZERO_CONFIGS
        else {"rtol": 1e-5, "atol": 1e-7}
    )
    for kind in ("param", "ema"):
        assert_close(final(run_dir, kind), final(runs[1, "local", on_spike], kind), **exact)


@pytest.mark.parametrize("on_spike", ["skip", "rollback"])
def test_equals_training_on_the_remaining_samples(runs, data, tmp_path, on_spike):
    """Parameters equal, bit for bit, a run on those positions without the skipped update."""
    at = [None if p in (FIRST, SECOND) and on_spike == "skip" else p for p in POSITIONS[on_spike]]
    wanted, got = replayed(data, tmp_path, at), final(runs[1, "local", on_spike])
    assert all(torch.equal(got[name], tensor) for name, tensor in wanted.items())


def test_has_teeth_draws_that_forget_the_jump(runs, data, tmp_path):
    with pytest.raises(AssertionError):
        wanted = replayed(data, tmp_path, POSITIONS["rollback"], moved=True)
        assert_close(final(runs[1, "local", "rollback"]), wanted, rtol=1e-10, atol=1e-12)


def test_has_teeth_the_poisoned_update_changes_parameters(runs, data, tmp_path):
    with pytest.raises(AssertionError):
        wanted = replayed(data, tmp_path, POSITIONS["skip"])
        assert_close(final(runs[1, "local", "skip"]), wanted, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(("ranks", "strategy"), [(1, "local"), (2, "ddp"), (2, "zero2")])
@pytest.mark.parametrize("how", list(INTERRUPTED))
def test_a_resumed_run_equals_the_uninterrupted_one(runs, data, ranks, strategy, how):
    """Interrupted by a kill between a rollback and the next checkpoint, or by stops that save."""
    run_dir, wanted = runs[ranks, strategy, how], runs[ranks, strategy, "rollback"]
    assert set(spikes(run_dir)) == set(ROLLBACK) and positions(run_dir) == POSITIONS["rollback"]
    result = audit(run_dir, order(data), BATCH)
    assert result.problems == [] and result.starts >= 5
    for kind in ("param", "ema"):
        got = final(run_dir, kind)
        assert all(torch.equal(got[name], tensor) for name, tensor in final(wanted, kind).items())
    state = [
        json.loads((d.checkpoint(STEPS) / "state.json").read_text()) for d in (run_dir, wanted)
    ]
    assert (
        state[0] == state[1] and state[0]["jump_updates"] == 5 and state[0]["spikes"]["events"] == 2
    )


# UpdateCheck: the contract of strategies


def steps_with(world, device, strategy, precision, rejected=(), data_of=None, checked=True):
    """Train the tiny model with checked updates: state, arguments of `accept`, decisions."""
    more = (("shard_size", 1),) if strategy == "hsdp" else ()
    engine = "fsdp2" if strategy == "hsdp" else strategy
    case = Case(engine, precision, "adamw", grad_accum_steps=2, max_grad_norm=0.5, more=more)
    training, asked, reports = Training(world, device, case), [], []
    if precision == "fp16":
        set_loss_scale(training.strategy, 16.0)  # the first one overflows
    for step in data_of or range(4):
        training.step = step
        for microbatch in range(2):
            loss = training._loss(microbatch)
            training.strategy.backward(loss, microbatch=microbatch, of=2)

        def accept(norm, sums, step=step):
            asked.append([norm, *sums])
            return step not in rejected

        values = torch.tensor([1.0, 10.0**world.rank], dtype=torch.float64)
        check = UpdateCheck(values, accept) if checked else None
        reports.append(training.strategy.step(lr=case.lr, max_grad_norm=0.5, check=check))
        if reports[-1].applied:
            training.norms.append(reports[-1].grad_norm.item())
            training.ema.update(len(training.norms))
    decisions = [
        [bool(report.applied), report.rejected, report.grad_norm.item()] for report in reports
    ]
    scale = training.strategy.loss_scale.value
    return {**training.result(), "asked": asked, "decisions": decisions, "loss_scale": scale}


STRATEGIES = [
    *((strategy, "fp64") for strategy in ("ddp", "fsdp2", "hsdp")),
    *((strategy, "fp32") for strategy in ZERO_CONFIGS),
    *((strategy, "bf16") for strategy in ("zero2", "zero3")),
    ("ddp", "fp16"),
]


def each_strategy(world, device):
    results = {}
    for strategy, precision in STRATEGIES:
        args = (world, device, strategy, precision)
        results[f"{strategy} {precision}"] = {
            "checked": steps_with(*args),
            "unchecked": steps_with(*args, checked=False),
            "rejected": steps_with(*args, rejected=(1, 3)),
            "without": steps_with(*args, data_of=(0, 2)),
        }
    return results


@pytest.fixture(scope="module")
def strategies():
    return run_ranks(2, each_strategy, timeout_s=300)


@pytest.mark.parametrize("name", [f"{strategy} {precision}" for strategy, precision in STRATEGIES])
def test_a_rejected_update_changes_no_state(strategies, name):
    """Parameters, moments, step counts and the next gradient are those of a run without it.

    An accepted update equals an unchecked one.
    """
    ranks = [by_name[name] for by_name in strategies]
    for got, wanted in (("checked", "unchecked"), ("rejected", "without")):
        assert_identical(
            join_ranks([rank[got] for rank in ranks]), join_ranks([rank[wanted] for rank in ranks])
        )
        for key in ("optimizer_steps", "loss_scale"):
            assert len({rank[kind][key] for rank in ranks for kind in (got, wanted)}) == 1
    first = ranks[0]
    assert [flags for *flags, _ in first["rejected"]["decisions"]] == [
        [True, False],
        [False, True],
    ] * 2
    assert [norm for *_, norm in first["checked"]["decisions"]] == [
        norm for *_, norm in first["unchecked"]["decisions"]
    ]
    assert all(math.isfinite(norm) for *_, norm in first["rejected"]["decisions"])


@pytest.mark.parametrize("name", [f"{strategy} {precision}" for strategy, precision in STRATEGIES])
def test_accept_gets_the_same_arguments_on_all_ranks(strategies, name):
    """The sums over ranks and the gradient norm agree bit for bit."""
    first, second = (by_name[name]["rejected"]["asked"] for by_name in strategies)
    assert first == second and len(first) == 4
    assert [sums for _, *sums in first] == [[2.0, 11.0]] * 4


def local_verdicts(world, device):
    Strategy._reduce_norm = lambda self, norm, check: (
        norm.item(),
        norm.item(),
        check.values.tolist(),
    )
    return steps_with(world, device, "ddp", "fp64")["asked"]


def test_has_teeth_a_rank_that_decides_alone():
    first, second = run_ranks(2, local_verdicts)
    assert first != second


def off_by_one_bit(world, device):
    """Give rank 1 a norm that differs in the last bit: (norm to clip by, norm to decide by)."""
    strategy = Training(world, device, Case("ddp")).strategy
    norm = torch.tensor([math.nextafter(4.0, 5.0) if world.rank else 4.0], dtype=torch.float64)
    values = torch.zeros(1, dtype=torch.float64)
    return list(strategy._reduce_norm(norm, UpdateCheck(values, lambda *_: True))[:2])


def test_a_norm_that_differs_in_its_last_bit_is_agreed_on():
    (own, mean), (other, same) = run_ranks(2, off_by_one_bit)
    assert own != other and mean == same


# Costs of a check


class CountCalls:
    """Context that counts all-reduces and copies to the host."""

    READS = ("item", "tolist", "__float__", "__bool__", "__int__", "cpu", "numpy")

    def __enter__(self):
        self.reductions, self.reads, self._undo = 0, 0, []
        self._patch(dist, "all_reduce", "reductions")
        for name in self.READS:
            self._patch(torch.Tensor, name, "reads")
        return self

    def _patch(self, owner, name, counter):
        plain = getattr(owner, name)
        self._undo.append((owner, name, plain))

        def counting(*args, **kwargs):
            setattr(self, counter, getattr(self, counter) + 1)
            return plain(*args, **kwargs)

        setattr(owner, name, counting)

    def __exit__(self, *error):
        for owner, name, plain in self._undo:
            setattr(owner, name, plain)


def cost(world, device, folder, data, strategies):
    counts_by_case = {}
    for strategy in strategies:
        for on_spike in ("ignore", "skip"):
            config = spike_config(data, on_spike, strategy)
            run: Run = assemble(config, RunDir(folder), world, device)
            for step in range(2):
                batches = batches_of(run, step)
                with CountCalls() as counted:
                    run.updater.update(step, batches, Meter(device), Clock(device))
            counts_by_case[f"{strategy} {on_spike}"] = [counted.reductions, counted.reads]
            pieces = {p.name: p.tensor.clone() for p in run.strategy.local_params()}
            counts_by_case.setdefault(strategy, pieces)
            assert all(
                torch.equal(pieces[name], tensor)
                for name, tensor in counts_by_case[strategy].items()
            )
    return {name: counts for name, counts in counts_by_case.items() if " " in name}


def test_spike_handling_costs_one_reduction_and_one_host_copy(data, tmp_path):
    """Without a spike, parameters also stay bit-identical.  DeepSpeed reads the norm anyway."""
    alone = cost(World(), CPU, tmp_path, data, ["local"])
    assert alone["local ignore"] == [0, 0] and alone["local skip"] == [0, 1]
    names = ["ddp", "fsdp2", "zero0", "zero1", "zero2", "zero3"]
    first, second = run_ranks(2, cost, tmp_path, data, names, timeout_s=300)
    assert first == second
    for name in names:
        reductions, reads = first[f"{name} ignore"]
        assert first[f"{name} skip"] == [reductions + 1, reads + 1], name
        assert (reads > 0) == (name in ("zero1", "zero2", "zero3")), name


def train_with_a_diverging_rank(world, device, folder, data):
    """Train with a rank 1 that reads other samples after a jump."""
    if world.rank == 1:
        plain = Run._plans_at
        Run._plans_at = lambda self, position: plain(self, position - (self.jump_updates > 0))
    run_all(world, device, folder, data, [("astray", "rollback", "ddp", [])])


def test_has_teeth_the_audit_reports_a_diverging_rank(data, tmp_path):
    run_ranks(2, train_with_a_diverging_rank, tmp_path, data)
    problems = "\n".join(audit(RunDir(tmp_path / "astray"), order(data), BATCH).problems)
    assert "samples missed" in problems and "samples of another update" in problems


def stops(world, device, folder, data):
    run_dir = RunDir(folder)
    try:
        loop.train(spike_config(data, "stop", "ddp"), run_dir, world, device, StopRequest())
    except LPLError as error:
        return type(error).__name__, str(error)
    return "", ""


def test_stop(data, tmp_path):
    """All ranks raise the same error, which names samples by shard and row."""
    first, second = run_ranks(2, stops, tmp_path, data)
    assert first == second
    kind, message = first
    assert kind == "SpikeError" and message.startswith("step 11: the loss at t ")
    assert f"sample {FIRST * BATCH} (latents-00000-0005-000-8x8.tar row " in message
    assert "Parameters and moments are as before this step" in message
    assert spikes(RunDir(tmp_path)) == [(11, "stop", None, None)]
