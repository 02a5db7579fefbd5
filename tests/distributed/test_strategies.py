"""Whatever the strategy, the run is the same run: parameters, gradient norms and EMA equal one
process on the whole global batch.

Parity is tested under plain SGD without clipping: gradients twice too large move AdamW and clipped
runs by next to nothing. Tolerances: float64 engines 1e-12; DeepSpeed keeps float32 masters, so ZeRO
is compared with the float64 reference at 2e-6.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from lpl_pretrain.config.schema import ParallelConfig
from lpl_pretrain.errors import ConfigError
from lpl_pretrain.parallel.build import make_strategy
from lpl_pretrain.parallel.strategy import Strategy
from lpl_pretrain.runtime.world import World
from lpl_pretrain.trainer import optimizer
from tests.support.ranks import RankFailed, run_ranks
from tests.support.tiny_denoiser import BLOCKS, TinyDenoiser
from tests.support.training import (
    HISTORIES,
    NO_CLIPPING,
    ZERO_CONFIGS,
    Case,
    Training,
    assert_identical,
    join_ranks,
    train,
    train_one_process,
)

STRATEGIES = ["ddp", "fsdp2", "zero0", "zero1", "zero2", "zero3"]
OFFLOADED = ["zero2_offload", "zero3_offload"]


def precision(strategy: str) -> str:
    return "fp32" if strategy.startswith("zero") else "fp64"


def assert_same(got, wanted, strategy: str) -> None:
    tolerance = (
        {"rtol": 2e-6, "atol": 2e-6}
        if strategy.startswith("zero")
        else {"rtol": 1e-12, "atol": 1e-12}
    )
    assert got.keys() == wanted.keys()
    for kind in wanted:
        assert got[kind].keys() == wanted[kind].keys()
        for name in wanted[kind]:
            torch.testing.assert_close(
                got[kind][name].double(), wanted[kind][name].double(), **tolerance
            )


def train_all(world, device, cases):
    """Several runs in one launch."""
    return [train(world, device, case) for case in cases]


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize(
    "strategy", [*STRATEGIES, *OFFLOADED, "zero3_shipped", "zero3_offload_shipped"]
)
def test_equals_one_process(strategy, world_size):
    cases = [Case(strategy, precision(strategy), grad_accum_steps=steps) for steps in (1, 2, 4)]
    for results in zip(*run_ranks(world_size, train_all, cases), strict=True):
        assert_same(join_ranks(results), train_one_process(Case()), strategy)


@pytest.mark.parametrize(("world_size", "shard_size"), [(4, 2), (4, 1), (4, 4), (2, 1), (1, 1)])
def test_groups_of_ranks_that_replicate_each_other_equal_one_process(world_size, shard_size):
    """HSDP; shards of one are plain replicas, one group of all is plain FSDP2."""
    cases = [
        Case("fsdp2", "fp64", grad_accum_steps=steps, more=(("shard_size", shard_size),))
        for steps in (1, 2, 4)
    ]
    for results in zip(*run_ranks(world_size, train_all, cases), strict=True):
        assert_same(join_ranks(results), train_one_process(Case()), "fsdp2")


@pytest.mark.parametrize("more", [(("reshard_after_forward", False),), (("cpu_offload", True),)])
def test_policies_of_fsdp2_change_nothing(more):
    cases = [
        Case("fsdp2", "fp64", grad_accum_steps=2, more=more),
        Case("fsdp2", "fp64", more=(*more, ("shard_size", 1))),
    ]
    for results in zip(*run_ranks(2, train_all, cases), strict=True):
        assert_same(join_ranks(results), train_one_process(Case()), "fsdp2")


def test_groups_that_do_not_divide_the_world():
    with pytest.raises(
        RankFailed,
        match="parallel.shard_size=3 does not divide the 2 processes .*: use one of 1, 2",
    ):
        run_ranks(2, train, Case("fsdp2", more=(("shard_size", 3),)))


CHECKPOINTING = [
    (("activation_checkpointing", "blocks"),),
    (("activation_checkpointing", "selective"),),
    (("activation_checkpointing", "blocks"), ("checkpoint_every_blocks", 2)),
]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_activation_checkpointing_changes_nothing(strategy):
    cases = [
        Case(strategy, precision(strategy), grad_accum_steps=2, more=blocks)
        for blocks in CHECKPOINTING
    ]
    for results in zip(*run_ranks(2, train_all, cases), strict=True):
        assert_same(join_ranks(results), train_one_process(Case()), strategy)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2", "zero3"])
def test_compiled_blocks_change_nothing(strategy):
    """With activation checkpointing inside: checkpoint, compile, shard."""
    blocks = (("compile", True), ("activation_checkpointing", "blocks"))
    results = run_ranks(
        2,
        train,
        Case(strategy, precision(strategy), grad_accum_steps=2, more=blocks),
        timeout_s=240,
    )
    assert_same(join_ranks(results), train_one_process(Case()), strategy)


@pytest.mark.parametrize("strategy", [*STRATEGIES, *OFFLOADED])
def test_adamw_with_clipping_equals_one_process(strategy):
    """Also the moments: they are on the same ranges as the parameters."""
    options = {"optimizer": "adamw", "max_grad_norm": 0.3, "lr": 0.01}
    reference = train_one_process(Case(**options))
    assert (
        reference["norms"]["norms"].min() > 0.3
        and {"optimizer.exp_avg", "optimizer.exp_avg_sq"} < reference.keys()
    )
    got = join_ranks(
        run_ranks(2, train, Case(strategy, precision(strategy), grad_accum_steps=2, **options))
    )
    assert_same(got, reference, strategy)


MUON = Case(optimizer="muon", lr=0.01)
MUON_LAYOUTS = {
    "ddp": (2, "ddp", ()),
    "fsdp2": (2, "fsdp2", ()),
    "hsdp": (4, "fsdp2", (("shard_size", 2),)),
}


def furthest(got, wanted):
    """Largest difference of a parameter, beside the largest that training has made."""
    begun = join_ranks([train(World(), torch.device("cpu"), MUON, 0)])["param"]
    error = max(
        (got["param"][name] - tensor).abs().max() for name, tensor in wanted["param"].items()
    )
    return float(error), float(
        max((tensor - begun[name]).abs().max() for name, tensor in wanted["param"].items())
    )


@pytest.mark.parametrize("layout", MUON_LAYOUTS)
def test_muon_makes_whole_matrices_orthogonal(layout):
    """Newton-Schulz runs in bf16 whatever the precision: a gradient that differs in its last bit
    may be rounded to another bf16.
    """
    world_size, strategy, more = MUON_LAYOUTS[layout]
    got = join_ranks(run_ranks(world_size, train, replace(MUON, strategy=strategy, more=more)))
    assert (
        got.keys()
        == train_one_process(MUON).keys()
        >= {"optimizer.momentum_buffer", "optimizer.exp_avg"}
    )
    error, moved = furthest(got, train_one_process(MUON))
    assert error < 1e-3 * moved


def test_has_teeth_muon_on_shards():
    """The mistake: every rank makes its own rows orthogonal."""
    with pytest.MonkeyPatch.context() as patch:
        whole_matrix = optimizer.orthogonal
        patch.setattr(
            optimizer,
            "orthogonal",
            lambda matrix: torch.cat([whole_matrix(rows) for rows in matrix.chunk(2)]),
        )
        broken = train_one_process(MUON)
    error, moved = furthest(broken, train_one_process(MUON))
    assert error > 0.1 * moved


def breaks(world, device, strategy):
    """The commonest mistakes, each made on purpose, by name."""
    backward, step = Strategy.backward, Strategy.step
    case = Case(strategy, precision(strategy))
    accumulating, clipping = replace(case, grad_accum_steps=2), replace(case, max_grad_norm=0.3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            Strategy,
            "backward",
            lambda self, loss, **which: backward(self, loss * world.world_size, **which),
        )
        found = {"sums over ranks": train(world, device, case)}
        patch.setattr(
            Strategy,
            "backward",
            lambda self, loss, **which: backward(self, loss * which["of"], **which),
        )
        found["forgets accumulation"] = train(world, device, accumulating)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            Strategy, "step", lambda self, lr, max_grad_norm: step(self, lr=lr, max_grad_norm=1e9)
        )
        found["forgets to clip"] = train(world, device, clipping)
    return found


def sums_in_bf16(world, device, case):
    """Gradients are rounded to bf16 after each micro-batch, as an engine does that sums them in the
    weights' precision.
    """
    run = Training(world, device, case)
    inner = run.strategy._backward

    def backward(loss, *, last):
        inner(loss, last=last)
        for parameter in run.strategy._parameters.values():
            parameter.grad.copy_(parameter.grad.bfloat16())

    run.strategy._backward = backward
    return run.train(3).result()


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2", "zero0"])
def test_has_teeth_sums_in_bf16(strategy):
    results = run_ranks(2, sums_in_bf16, Case(strategy, precision(strategy), grad_accum_steps=4))
    with pytest.raises(AssertionError):
        assert_same(join_ranks(results), train_one_process(Case()), strategy)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2", "zero2", "zero3"])
def test_has_teeth(strategy):
    results = run_ranks(2, breaks, strategy)
    for broken in results[0]:
        reference = train_one_process(
            Case(max_grad_norm=0.3 if broken == "forgets to clip" else NO_CLIPPING)
        )
        with pytest.raises(AssertionError):
            assert_same(join_ranks(result[broken] for result in results), reference, strategy)


def trains_in_bf16(world, device, near, tiny_updates):
    """Two runs, and the dtypes of what reaches the model in the first: z_t, t, labels."""
    seen = []
    run = Training(world, device, near)
    model = next(module for module in run.module.modules() if isinstance(module, TinyDenoiser))
    model.register_forward_pre_hook(
        lambda module, inputs: seen.append([str(x.dtype) for x in (*inputs[:2], inputs[2].labels)])
    )
    return run.train(3).result(), train(world, device, tiny_updates, 8), seen[0]


@pytest.mark.parametrize("strategy", [*STRATEGIES, *OFFLOADED])
def test_bf16(strategy):
    near = Case(strategy, "bf16", optimizer="adamw", lr=1e-3, grad_accum_steps=2)
    tiny_updates = replace(near, lr=1e-6, grad_accum_steps=1)
    *results, seen = zip(*run_ranks(2, trains_in_bf16, near, tiny_updates), strict=True)
    assert seen[0] == ["torch.float32", "torch.float32", "torch.int64"], (
        "a timestep rounded to bf16 has 8 bits"
    )
    assert_near_and_wide(
        join_ranks(results[0]), train_one_process(replace(near, strategy="local", precision="fp64"))
    )
    assert_moved_by_tiny_updates(
        join_ranks(results[1]), train_one_process(Case(precision="fp32"), steps=0)["param"]
    )


FP16_STRATEGIES = ["ddp", "fsdp2", *(f"zero{stage}" for stage in range(4)), *OFFLOADED]


def in_fp16(world, device, case, scale, factor):
    """Three updates on losses `factor` times as large, from a loss scale of `scale` (None: the
    usual one).
    """
    with pytest.MonkeyPatch.context() as patch:
        pretend_that_deepspeed_has_fp16_here(patch)
        run = Training(world, device, case)
        run.strategy.loss_scale.value = scale or run.strategy.loss_scale.value
        reports = []
        while sum(report.applied for report in reports) < 3:
            reports.append(run.update(lambda loss, microbatch: loss * factor))
            run.step += reports[-1].applied
        run.norms = [report.grad_norm for report in reports if report.applied]
        tried = [report.scale_lowered for report in reports]
        return run.result(), tried, run.strategy.loss_scale.value


def pretend_that_deepspeed_has_fp16_here(patch):
    """It asks the processor for float16 arithmetic; torch emulates that where there is none."""
    from deepspeed.accelerator import get_accelerator

    patch.setattr(type(get_accelerator()), "is_fp16_supported", lambda self: True)


@pytest.mark.parametrize("strategy", FP16_STRATEGIES)
def test_fp16_scales_its_losses(strategy):
    """Gradients of about 1e-7 are below what float16 can hold: the scale carries them through; one
    too large is lowered first.
    """
    case, factor = Case(strategy, "fp16", lr=1e6, grad_accum_steps=2), 1e-6
    wanted = train_one_process(
        replace(case, strategy="local", precision="fp64", grad_accum_steps=1, lr=1.0)
    )  # 1e6 * 1e-6
    results, tried, scales = zip(*run_ranks(2, in_fp16, case, None, factor), strict=True)
    assert tried[0] == [False] * 3 and scales[0] == 2.0**16
    got = join_ranks(results)
    assert all(tensor.dtype == torch.float32 for tensor in got["param"].values())
    for name, tensor in wanted["param"].items():
        torch.testing.assert_close(got["param"][name].double(), tensor, rtol=2e-2, atol=1e-2)
    torch.testing.assert_close(
        got["norms"]["norms"] / factor, wanted["norms"]["norms"], rtol=2e-2, atol=0
    )

    results, tried, scales = zip(*run_ranks(2, in_fp16, case, 2.0**52, factor), strict=True)
    assert (
        tried[0] == tried[1]
        and 0 < (lowered := sum(tried[0])) == len(tried[0]) - 3
        and scales[0] == 2.0 ** (52 - lowered)
    )
    for name, tensor in got["param"].items():
        torch.testing.assert_close(join_ranks(results)["param"][name], tensor, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("strategy", ["fsdp2", "zero2"])
def test_has_teeth_fp16_without_a_scale(strategy):
    case = Case(strategy, "fp16", lr=1e6)
    results, _, _ = zip(*run_ranks(2, in_fp16, case, 1.0, 1e-6), strict=True)
    wanted = train_one_process(replace(case, strategy="local", precision="fp64", lr=1.0))
    with pytest.raises(AssertionError):
        torch.testing.assert_close(
            join_ranks(results)["norms"]["norms"] * 1e6, wanted["norms"]["norms"], rtol=2e-2, atol=0
        )


def assert_near_and_wide(got, wanted):
    """Masters start from the float32 weights, not from their bf16 rounding; pieces, moments and EMA
    are float32.
    """
    for kind in wanted.keys() - HISTORIES:
        assert all(tensor.dtype == torch.float32 for tensor in got[kind].values())
    for name, tensor in wanted["param"].items():
        torch.testing.assert_close(
            got["param"][name].double(), tensor, rtol=0, atol=3 * 2 * 1e-3
        )  # Adam moves lr a step at most
    torch.testing.assert_close(got["norms"]["norms"], wanted["norms"]["norms"], rtol=2e-2, atol=0)


def assert_moved_by_tiny_updates(got, start):
    """Updates far below a bf16 step of the weights: masters and EMA feel them, bf16 masters would
    stand still.
    """
    for name, before in start.items():
        for kind in ("param", "ema"):
            assert 0 < (got[kind][name] - before).abs().max() < 8 * 2e-6
        assert (got["param"][name].bfloat16() == before.bfloat16()).float().mean() > 0.8


BAD = {
    "NaN": lambda loss: loss * torch.nan,
    "infinite": lambda loss: loss * torch.inf,
    "finite gradient of an infinite loss": lambda loss: loss + torch.inf,
}


def meets_a_bad_loss(world, device, case, bad):
    run = Training(world, device, case).train(1)
    before = run.result()
    last = world.rank == world.world_size - 1
    report = run.update(
        lambda loss, microbatch: BAD[bad](loss) if last and microbatch == 0 else loss
    )
    after = run.result()
    return str(report), before, after, run.train(2).result(), train(world, device, case, 3)


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("strategy", [*STRATEGIES, *OFFLOADED])
def test_a_loss_that_is_not_finite_is_refused_by_all_ranks_before_the_update(strategy, bad):
    """One rank's bad micro-batch; then training goes on as if it had never been.  NaN in full
    precision, the others in bf16.
    """
    case = Case(
        strategy,
        precision(strategy) if bad == "NaN" else "bf16",
        optimizer="adamw",
        grad_accum_steps=2,
        lr=0.01,
    )
    reports, *results = zip(*run_ranks(2, meets_a_bad_loss, case, bad), strict=True)
    assert set(reports) == {"StepReport(applied=False, grad_norm=nan, scale_lowered=False)"}
    before, after, later, undisturbed = map(join_ranks, results)
    assert_identical(after, before)
    assert_identical(later, undisturbed)


def overlooks_an_infinite_loss(world, device):
    """The strategy's backward as it would be without the check of the loss."""
    run = Training(world, device, Case("ddp", "fp64"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            torch.Tensor, "isfinite", lambda self: torch.ones_like(self, dtype=torch.bool)
        )
        return run.update(
            lambda loss, microbatch: BAD["finite gradient of an infinite loss"](loss)
        ).applied


def test_has_teeth_an_infinite_loss_whose_gradient_is_finite():
    assert run_ranks(2, overlooks_an_infinite_loss) == [True, True]


def test_local_refuses_two_processes():
    with pytest.raises(RankFailed, match="ConfigError.*parallel.strategy='local' with 2 processes"):
        run_ranks(2, train, Case("local"))


@pytest.mark.parametrize(
    ("strategy", "file"), [("zero1", "zero1"), ("zero2", "zero2"), ("zero3", "zero3_shipped")]
)
def test_a_stage_without_a_file_equals_its_file(strategy, file):
    """Bit for bit, on two ranks."""
    options = {"precision": "bf16", "optimizer": "adamw", "lr": 0.01, "grad_accum_steps": 2}
    with_file = run_ranks(2, train, Case(file, **options))
    with pytest.MonkeyPatch.context() as patch:
        patch.delitem(ZERO_CONFIGS, strategy)
        short = Case(strategy, **options)
        assert short.config().strategy.value == strategy and short.config().zero_config is None
        without = run_ranks(2, train, short)
    assert_identical(join_ranks(without), join_ranks(with_file))


def test_a_misspelt_key_inside_zero_optimization(tmp_path):
    """Refused in our words, before DeepSpeed is asked."""
    json = tmp_path / "zero.json"
    json.write_text('{"zero_optimization": {"stage": 2, "reduce_bucket_sise": 5}}')
    with pytest.raises(
        ConfigError,
        match="zero.json: 1 key cannot be used:\n.*reduce_bucket_sise: .*'reduce_bucket_size'",
    ):
        make_strategy(
            ParallelConfig(strategy="zero", zero_config=str(json)), World(), torch.device("cpu")
        )


def test_what_deepspeed_refuses_itself_comes_out_as_ours():
    """It has no float16 on this processor."""

    def setup(world, device):
        from deepspeed.accelerator import get_accelerator

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(type(get_accelerator()), "is_fp16_supported", lambda self: False)
            strategy = make_strategy(
                ParallelConfig(strategy="zero2", precision="fp16"), world, device
            )
            with pytest.raises(
                ConfigError, match="parallel.strategy=zero2: DeepSpeed refuses it: .*fp16"
            ):
                strategy.setup(
                    TinyDenoiser(), BLOCKS, lambda p: torch.optim.SGD(p.values(), lr=1.0)
                )

    run_ranks(1, setup)


def linears(world, device, compiled):
    """Is `torch.nn.functional.linear` torch's own: before, inside and behind the model, and after
    an update.
    """
    own, seen = torch.nn.functional.linear, []
    run = Training(world, device, Case("zero3", "fp32", more=(("compile", compiled),)))
    inner = next(module for module in run.module.modules() if isinstance(module, TinyDenoiser))
    inner.register_forward_hook(lambda *_: seen.append(torch.nn.functional.linear is own))
    before = torch.nn.functional.linear is own
    run.train(1)
    return [before, *seen, torch.nn.functional.linear is own]


@pytest.mark.parametrize("compiled", [False, True])
def test_stage_3_changes_linear_layers_of_its_own_model_only(compiled):
    """And of no compiled one: on a GPU that gave wrong gradients."""
    assert run_ranks(1, linears, compiled) == [[True, compiled, True]]
