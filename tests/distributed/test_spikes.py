"""A poisoned shard on real ranks: every layout decides the same, and what it then trains on is the
same training.

The shard is the whole batch of positions FIRST and SECOND.  skip leaves update 11 out.  rollback
goes back from update 11 to step 8 and on at position 11; and from update 14, which is then of
position 16, to step 12 and on at position 17.
"""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from lpl_pretrain.checkpoint.store import read_full
from lpl_pretrain.config.data_mixture import read_data
from lpl_pretrain.config.rundir import RunDir
from lpl_pretrain.data.ledger import audit
from lpl_pretrain.data.order import SampleOrder
from lpl_pretrain.errors import LPLError
from lpl_pretrain.parallel.strategy import Strategy, UpdateCheck
from lpl_pretrain.runtime.preempt import StopRequest
from lpl_pretrain.runtime.timer import Clock
from lpl_pretrain.runtime.world import World
from lpl_pretrain.trainer import loop
from lpl_pretrain.trainer.assemble import Run, assemble
from lpl_pretrain.trainer.metrics import Meter
from tests.support.ranks import run_ranks
from tests.support.spikes import BATCH, DATA, FIRST, SECOND, STEPS, poisoned_data, spike_config
from tests.support.training import ZERO_CONFIGS, Case, Training, assert_identical, join_ranks

CPU = torch.device("cpu")
SKIP = [(11, "skip", None, None)]
ROLLBACK = [(11, "rollback", 8, 3), (14, "rollback", 12, 5)]
POSITIONS = {"skip": list(range(STEPS)), "rollback": [*range(8), *range(11, 15), *range(17, 21)]}
"""Of the updates that count, the one that is left out among them."""
LAYOUTS = [(1, "local"), (2, "ddp"), (2, "fsdp2"), (2, "zero2"), (4, "ddp"), (4, "fsdp2")]


class Killed(Exception):
    pass


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return poisoned_data(tmp_path_factory.mktemp("data"))


def train(world, device, run_dir, config, kill_at=None, stop_at=None, jumped=0):
    """To the end; or until update `kill_at` is made (nothing is saved), or `stop_at`, once `jumped`
    updates were jumped over.
    """
    stop, tell = StopRequest(), loop.tell

    def interrupt(run, sinks, done, outcome):
        tell(run, sinks, done, outcome)
        if run.jump_updates >= jumped and done == kill_at:
            raise Killed
        if run.jump_updates >= jumped and done == stop_at:
            stop.signal_name = "SIGTERM"

    loop.tell = interrupt
    try:
        ended = loop.train(config, run_dir, world, device, stop)
        assert ended == (kill_at is None and stop_at is None)
    except Killed:
        assert kill_at is not None
    finally:
        loop.tell = tell


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
"""Each checkpoint of a stop is the only one that keep_last=1 would keep."""


@pytest.fixture(scope="module")
def runs(data, tmp_path_factory):
    """{(world size, strategy, name): run directory} of all cases, one launch for each number of
    ranks.
    """
    folder, found = tmp_path_factory.mktemp("runs"), {}
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
                found[size, strategy, name] = RunDir(folder / cases[-1][0])
        if ranks == 1:
            run_all(World(), CPU, folder, data, cases)
        else:
            run_ranks(ranks, run_all, folder, data, cases, timeout_s=400)
    return found


def order(data):
    return SampleOrder(read_data(data.folder), data.seed, BATCH, **DATA)


def spikes(run_dir):
    lines = [json.loads(line) for line in run_dir.metrics.read_text().splitlines()]
    events = [line for line in lines if line.get("event") == "spike"]
    return [(e["step"], e["action"], e.get("to_step"), e.get("jump_updates")) for e in events]


def positions(run_dir):
    """Of each update that counts, from the ledgers; all ranks' samples together must be the whole
    batch.
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
    return read_full(run_dir.checkpoint(STEPS), kind)


def assert_close(got, wanted, **tolerance):
    assert got.keys() == wanted.keys()
    for name, tensor in wanted.items():
        torch.testing.assert_close(got[name].double(), tensor.double(), **tolerance)


def replayed(data, tmp_path, at, moved=False):
    """Parameters of one process without any guard, whose updates are made of the positions `at`;
    None: of nothing.

    `moved`: a run that takes those samples and forgets the jump in what is drawn by position.
    """
    run = assemble(spike_config(data, "ignore"), RunDir(tmp_path), World(), CPU)
    for step, position in enumerate(at):
        if position is None:
            continue
        run.jump_updates = position - step
        hands = run.hands(step)
        if moved:
            drawn = run.dealer.deal(step, run.grad_accum_steps)
            hands = [replace(hand, t=other.t) for hand, other in zip(hands, drawn, strict=True)]
        batches = [run.stream.read(hand.sample_indices) for hand in hands]
        run.updater.update(step, hands, batches, Meter(CPU), Clock(CPU))
    return {piece.name: piece.tensor.view(piece.shape) for piece in run.strategy.local_params()}


@pytest.mark.parametrize(("ranks", "strategy"), LAYOUTS)
@pytest.mark.parametrize("on_spike", ["skip", "rollback"])
def test_every_layout_decides_the_same(runs, data, tmp_path, ranks, strategy, on_spike):
    run_dir = runs[ranks, strategy, on_spike]
    assert spikes(run_dir) == (SKIP if on_spike == "skip" else ROLLBACK)
    assert positions(run_dir) == POSITIONS[on_spike]
    found = audit(run_dir, order(data), BATCH)
    assert (found.problems, found.steps) == ([], STEPS)
    assert (found.rollbacks, found.jump_updates) == ((0, 0) if on_spike == "skip" else (2, 5))
    exact = (
        {"rtol": 1e-10, "atol": 1e-12}
        if strategy not in ZERO_CONFIGS
        else {"rtol": 1e-5, "atol": 1e-7}
    )
    for kind in ("param", "ema"):
        assert_close(final(run_dir, kind), final(runs[1, "local", on_spike], kind), **exact)


@pytest.mark.parametrize("on_spike", ["skip", "rollback"])
def test_is_the_training_on_the_other_samples(runs, data, tmp_path, on_spike):
    """Bit for bit what comes of a run that is handed those positions; the one that was left out
    gave nothing.
    """
    at = [None if p in (FIRST, SECOND) and on_spike == "skip" else p for p in POSITIONS[on_spike]]
    wanted, got = replayed(data, tmp_path, at), final(runs[1, "local", on_spike])
    assert all(torch.equal(got[name], tensor) for name, tensor in wanted.items())


def test_has_teeth_draws_that_forget_the_jump(runs, data, tmp_path):
    with pytest.raises(AssertionError):
        wanted = replayed(data, tmp_path, POSITIONS["rollback"], moved=True)
        assert_close(final(runs[1, "local", "rollback"]), wanted, rtol=1e-10, atol=1e-12)


def test_has_teeth_the_poison_reaches_parameters_unless_it_is_left_out(runs, data, tmp_path):
    with pytest.raises(AssertionError):
        wanted = replayed(data, tmp_path, POSITIONS["skip"])
        assert_close(final(runs[1, "local", "skip"]), wanted, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(("ranks", "strategy"), [(1, "local"), (2, "ddp"), (2, "zero2")])
@pytest.mark.parametrize("how", list(INTERRUPTED))
def test_a_resumed_run_is_the_uninterrupted_one(runs, data, ranks, strategy, how):
    """Killed after a rollback, before the next checkpoint; or stopped with a checkpoint between
    those that are due.
    """
    run_dir, wanted = runs[ranks, strategy, how], runs[ranks, strategy, "rollback"]
    assert set(spikes(run_dir)) == set(ROLLBACK) and positions(run_dir) == POSITIONS["rollback"]
    found = audit(run_dir, order(data), BATCH)
    assert found.problems == [] and found.starts >= 5
    for kind in ("param", "ema"):
        got = final(run_dir, kind)
        assert all(torch.equal(got[name], tensor) for name, tensor in final(wanted, kind).items())
    state = [
        json.loads((d.checkpoint(STEPS) / "state.json").read_text()) for d in (run_dir, wanted)
    ]
    assert (
        state[0] == state[1] and state[0]["jump_updates"] == 5 and state[0]["spikes"]["events"] == 2
    )


# What a strategy promises about a check


def steps_with(world, device, strategy, precision, rejected=(), data_of=None, checked=True):
    """Trains the tiny model; what `accept` was asked, by step, and everything that the rank owns."""
    more = (("shard_size", 1),) if strategy == "hsdp" else ()
    engine = "fsdp2" if strategy == "hsdp" else strategy
    case = Case(engine, precision, "adamw", grad_accum_steps=2, max_grad_norm=0.5, more=more)
    training, asked, reports = Training(world, device, case), [], []
    if precision == "fp16":
        training.strategy.loss_scale.value = 16.0  # the first one overflows
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
            training.norms.append(reports[-1].grad_norm)
            training.ema.update(len(training.norms))
    said = [[report.applied, report.rejected, report.grad_norm] for report in reports]
    scale = training.strategy.loss_scale.value
    return {**training.result(), "asked": asked, "said": said, "loss_scale": scale}


STRATEGIES = [
    *((strategy, "fp64") for strategy in ("ddp", "fsdp2", "hsdp")),
    *((strategy, "fp32") for strategy in ZERO_CONFIGS),
    *((strategy, "bf16") for strategy in ("zero2", "zero3")),
    ("ddp", "fp16"),
]


def each_strategy(world, device):
    found = {}
    for strategy, precision in STRATEGIES:
        args = (world, device, strategy, precision)
        found[f"{strategy} {precision}"] = {
            "checked": steps_with(*args),
            "unchecked": steps_with(*args, checked=False),
            "rejected": steps_with(*args, rejected=(1, 3)),
            "without": steps_with(*args, data_of=(0, 2)),
        }
    return found


@pytest.fixture(scope="module")
def strategies():
    return run_ranks(2, each_strategy, timeout_s=300)


@pytest.mark.parametrize("name", [f"{strategy} {precision}" for strategy, precision in STRATEGIES])
def test_a_rejected_update_leaves_nothing_behind(strategies, name):
    """Not in parameters, moments and step counts, nor in the gradient of the next; an accepted one
    is as if nobody had asked.
    """
    ranks = [found[name] for found in strategies]
    for got, wanted in (("checked", "unchecked"), ("rejected", "without")):
        assert_identical(
            join_ranks([rank[got] for rank in ranks]), join_ranks([rank[wanted] for rank in ranks])
        )
        for fact in ("optimizer_steps", "loss_scale"):
            assert len({rank[kind][fact] for rank in ranks for kind in (got, wanted)}) == 1
    first = ranks[0]
    assert [flags for *flags, _ in first["rejected"]["said"]] == [[True, False], [False, True]] * 2
    assert [norm for *_, norm in first["checked"]["said"]] == [
        norm for *_, norm in first["unchecked"]["said"]
    ]
    assert all(math.isfinite(norm) for *_, norm in first["rejected"]["said"])


@pytest.mark.parametrize("name", [f"{strategy} {precision}" for strategy, precision in STRATEGIES])
def test_all_ranks_are_asked_the_same(strategies, name):
    """The sums of what each rank has, and one norm, bit for bit."""
    first, second = (found[name]["rejected"]["asked"] for found in strategies)
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
    """Rank 1 computes a norm that differs in the last bit: it decides by the common one, clips by
    its own.
    """
    strategy = Training(world, device, Case("ddp")).strategy
    norm = torch.tensor([math.nextafter(4.0, 5.0) if world.rank else 4.0], dtype=torch.float64)
    values = torch.zeros(1, dtype=torch.float64)
    return list(strategy._reduce_norm(norm, UpdateCheck(values, lambda *_: True))[:2])


def test_a_norm_that_differs_in_its_last_bit_is_agreed_on():
    (own, mean), (other, same) = run_ranks(2, off_by_one_bit)
    assert own != other and mean == same


# What it costs


class Counted:
    """Reductions that are asked for, and copies to the host, while it is entered."""

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
    found = {}
    for strategy in strategies:
        for on_spike in ("ignore", "skip"):
            config = spike_config(data, on_spike, strategy)
            run: Run = assemble(config, RunDir(folder), world, device)
            for step in range(2):
                hands = run.hands(step)
                batches = [run.stream.read(hand.sample_indices) for hand in hands]
                with Counted() as counted:
                    run.updater.update(step, hands, batches, Meter(device), Clock(device))
            found[f"{strategy} {on_spike}"] = [counted.reductions, counted.reads]
            pieces = {p.name: p.tensor.clone() for p in run.strategy.local_params()}
            found.setdefault(strategy, pieces)
            assert all(
                torch.equal(pieces[name], tensor) for name, tensor in found[strategy].items()
            )
    return {name: counts for name, counts in found.items() if " " in name}


def test_one_reduction_and_no_read_more(data, tmp_path):
    """And without a spike the same parameters, bit for bit."""
    alone = cost(World(), CPU, tmp_path, data, ["local"])
    assert alone["local ignore"] == alone["local skip"] == [0, 1]
    names = ["ddp", "fsdp2", "zero0", "zero1", "zero2", "zero3"]
    first, second = run_ranks(2, cost, tmp_path, data, names, timeout_s=300)
    assert first == second
    for name in names:
        (reductions, reads), (more, as_many) = first[f"{name} ignore"], first[f"{name} skip"]
        assert (more, as_many) == (reductions + 1, reads) and reads >= 1, name


def disagree(world, device, folder, data):
    """One rank that reloads another checkpoint, or jumps elsewhere, is found by the audit of what
    was read.
    """
    if world.rank == 1:
        plain = Run.hands
        Run.hands = lambda self, step: plain(self, step - (self.jump_updates > 0))
    run_all(world, device, folder, data, [("astray", "rollback", "ddp", [])])


def test_has_teeth_the_audit_finds_a_rank_that_jumps_elsewhere(data, tmp_path):
    run_ranks(2, disagree, tmp_path, data)
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
    """The same message on all ranks; it names the samples, by shard and row; the last checkpoint is
    good to go on from.
    """
    first, second = run_ranks(2, stops, tmp_path, data)
    assert first == second
    kind, message = first
    assert kind == "SpikeError" and message.startswith("step 11: the loss at t ")
    assert f"sample {FIRST * BATCH} (latents-00000-0005-000-8x8.tar row " in message
    assert "Parameters and moments are as before this step" in message
    assert spikes(RunDir(tmp_path)) == [(11, "stop", None, None)]
