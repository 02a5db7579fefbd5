"""Parity of strategies: parameters, gradient norms and EMA equal one process on the global batch.

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
    reference,
    set_loss_scale,
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
    """Train several cases in one launch."""
    return [train(world, device, case) for case in cases]


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize(
    "strategy", [*STRATEGIES, *OFFLOADED, "zero3_shipped", "zero3_offload_shipped"]
)
def test_equals_one_process(strategy, world_size):
    cases = [Case(strategy, precision(strategy), grad_accum_steps=steps) for steps in (1, 2, 4)]
    for results in zip(*run_ranks(world_size, train_all, cases), strict=True):
        assert_same(join_ranks(results), reference(Case()), strategy)


@pytest.mark.parametrize(("world_size", "shard_size"), [(4, 2), (4, 1), (4, 4), (2, 1), (1, 1)])
def test_hsdp_equals_one_process(world_size, shard_size):
    """A shard size of 1 is plain replication, one of the world size plain FSDP2."""
    cases = [
        Case("fsdp2", "fp64", grad_accum_steps=steps, more=(("shard_size", shard_size),))
        for steps in (1, 2, 4)
    ]
    for results in zip(*run_ranks(world_size, train_all, cases), strict=True):
        assert_same(join_ranks(results), reference(Case()), "fsdp2")


@pytest.mark.parametrize("more", [(("reshard_after_forward", False),), (("cpu_offload", True),)])
def test_options_of_fsdp2_change_nothing(more):
    cases = [
        Case("fsdp2", "fp64", grad_accum_steps=2, more=more),
        Case("fsdp2", "fp64", more=(*more, ("shard_size", 1))),
    ]
    for results in zip(*run_ranks(2, train_all, cases), strict=True):
        assert_same(join_ranks(results), reference(Case()), "fsdp2")


def test_a_shard_size_that_does_not_divide_the_world_is_refused():
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
        assert_same(join_ranks(results), reference(Case()), strategy)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2", "zero3"])
def test_compiled_blocks_change_nothing(strategy):
    """Compiled blocks contain activation checkpointing and are then sharded."""
    blocks = (("compile", True), ("activation_checkpointing", "blocks"))
    results = run_ranks(
        2,
        train,
        Case(strategy, precision(strategy), grad_accum_steps=2, more=blocks),
        timeout_s=240,
    )
    assert_same(join_ranks(results), reference(Case()), strategy)


@pytest.mark.parametrize("strategy", [*STRATEGIES, *OFFLOADED])
def test_adamw_with_clipping_equals_one_process(strategy):
    """Parameters and moments, which are sharded in the same ranges."""
    options = {"optimizer": "adamw", "max_grad_norm": 0.3, "lr": 0.01}
    wanted = reference(Case(**options))
    assert (
        wanted["norms"]["norms"].min() > 0.3
        and {"optimizer.exp_avg", "optimizer.exp_avg_sq"} < wanted.keys()
    )
    got = join_ranks(
        run_ranks(2, train, Case(strategy, precision(strategy), grad_accum_steps=2, **options))
    )
    assert_same(got, wanted, strategy)


MUON = Case(optimizer="muon", lr=0.01)
MUON_LAYOUTS = {
    "ddp": (2, "ddp", ()),
    "fsdp2": (2, "fsdp2", ()),
    "hsdp": (4, "fsdp2", (("shard_size", 2),)),
}


def largest_error_and_update(got, wanted):
    """(largest error of a parameter, largest change that training made)."""
    initial = join_ranks([train(World(), torch.device("cpu"), MUON, 0)])["param"]
    error = max(
        (got["param"][name] - tensor).abs().max() for name, tensor in wanted["param"].items()
    )
    return float(error), float(
        max((tensor - initial[name]).abs().max() for name, tensor in wanted["param"].items())
    )


@pytest.mark.parametrize("layout", MUON_LAYOUTS)
def test_muon_orthogonalizes_full_matrices(layout):
    """The tolerance is wide because Newton-Schulz runs in bf16, which magnifies last-bit errors."""
    world_size, strategy, more = MUON_LAYOUTS[layout]
    got = join_ranks(run_ranks(world_size, train, replace(MUON, strategy=strategy, more=more)))
    assert (
        got.keys() == reference(MUON).keys() >= {"optimizer.momentum_buffer", "optimizer.exp_avg"}
    )
    error, moved = largest_error_and_update(got, reference(MUON))
    assert error < 1e-3 * moved


def test_has_teeth_muon_on_shards():
    """The mistake of orthogonalizing each rank's rows alone is detected."""
    with pytest.MonkeyPatch.context() as patch:
        whole_matrix = optimizer.newton_schulz
        patch.setattr(
            optimizer,
            "newton_schulz",
            lambda matrix: torch.cat([whole_matrix(rows) for rows in matrix.chunk(2)]),
        )
        broken = train_one_process(MUON)
    error, moved = largest_error_and_update(broken, reference(MUON))
    assert error > 0.1 * moved


def breaks(world, device, strategy):
    """Results of the commonest mistakes, each made on purpose, by name."""
    backward, step = Strategy.backward, Strategy.step
    case = Case(strategy, precision(strategy))
    accumulating, clipping = replace(case, grad_accum_steps=2), replace(case, max_grad_norm=0.3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            Strategy,
            "backward",
            lambda self, loss, **which: backward(self, loss * world.world_size, **which),
        )
        broken_results = {"sums over ranks": train(world, device, case)}
        patch.setattr(
            Strategy,
            "backward",
            lambda self, loss, **which: backward(self, loss * which["of"], **which),
        )
        broken_results["forgets accumulation"] = train(world, device, accumulating)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            Strategy, "step", lambda self, lr, max_grad_norm: step(self, lr=lr, max_grad_norm=1e9)
        )
        broken_results["forgets to clip"] = train(world, device, clipping)
    return broken_results


def sums_in_bf16(world, device, case):
    """Train with gradients rounded to bf16 after each micro-batch.

    An engine that accumulates in the precision of the weights makes this mistake.
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
        assert_same(join_ranks(results), reference(Case()), strategy)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2", "zero2", "zero3"])
def test_has_teeth(strategy):
    results = run_ranks(2, breaks, strategy)
    for broken in results[0]:
        wanted = reference(Case(max_grad_norm=0.3 if broken == "forgets to clip" else NO_CLIPPING))
        with pytest.raises(AssertionError):
            assert_same(join_ranks(result[broken] for result in results), wanted, strategy)


def trains_in_bf16(world, device, base_case, tiny_updates):
    """Results of two runs, and the dtypes of the first model input: z_t, t, labels."""
    dtypes = []
    run = Training(world, device, base_case)
    model = next(module for module in run.module.modules() if isinstance(module, TinyDenoiser))
    model.register_forward_pre_hook(
        lambda module, inputs: dtypes.append(
            [str(x.dtype) for x in (*inputs[:2], inputs[2].labels)]
        )
    )
    return run.train(3).result(), train(world, device, tiny_updates, 8), dtypes[0]


@pytest.mark.parametrize("strategy", [*STRATEGIES, *OFFLOADED])
def test_bf16(strategy):
    base_case = Case(strategy, "bf16", optimizer="adamw", lr=1e-3, grad_accum_steps=2)
    tiny_updates = replace(base_case, lr=1e-6, grad_accum_steps=1)
    *results, dtypes = zip(*run_ranks(2, trains_in_bf16, base_case, tiny_updates), strict=True)
    assert dtypes[0] == ["torch.float32", "torch.float32", "torch.int64"], (
        "a timestep rounded to bf16 has 8 bits"
    )
    assert_near_and_float32(
        join_ranks(results[0]),
        reference(replace(base_case, strategy="local", precision="fp64")),
    )
    assert_moved_by_tiny_updates(
        join_ranks(results[1]), reference(Case(precision="fp32"), steps=0)["param"]
    )


FP16_STRATEGIES = ["ddp", "fsdp2", *(f"zero{stage}" for stage in range(4)), *OFFLOADED]


def in_fp16(world, device, case, scale, factor):
    """Make three updates on losses times `factor`, starting from a loss scale of `scale`.

    None is the default scale.  Returns (state, whether each try lowered the scale, final scale).
    """
    with pytest.MonkeyPatch.context() as patch:
        enable_fp16_in_deepspeed(patch)
        run = Training(world, device, case)
        if scale is not None:
            set_loss_scale(run.strategy, scale)
        reports = []
        while sum(bool(report.applied) for report in reports) < 3:
            reports.append(run.update(lambda loss, microbatch: loss * factor))
            run.step += int(reports[-1].applied)
        run.norms = [report.grad_norm.item() for report in reports if report.applied]
        tried = [bool(report.scale_lowered) for report in reports]
        return run.result(), tried, run.strategy.loss_scale.value


def enable_fp16_in_deepspeed(patch):
    """Make DeepSpeed accept float16 on this CPU; torch emulates its arithmetic."""
    from deepspeed.accelerator import get_accelerator

    patch.setattr(type(get_accelerator()), "is_fp16_supported", lambda self: True)


@pytest.mark.parametrize("strategy", FP16_STRATEGIES)
def test_fp16_scales_its_losses(strategy):
    """Loss scaling preserves gradients of 1e-7, too small for float16; large scales are lowered."""
    case, factor = Case(strategy, "fp16", lr=1e6, grad_accum_steps=2), 1e-6
    wanted = reference(
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
    lowered_scale = join_ranks(results)["param"]
    for name, tensor in got["param"].items():
        torch.testing.assert_close(lowered_scale[name], tensor, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("strategy", ["fsdp2", "zero2"])
def test_has_teeth_fp16_without_a_scale(strategy):
    case = Case(strategy, "fp16", lr=1e6)
    results, _, _ = zip(*run_ranks(2, in_fp16, case, 1.0, 1e-6), strict=True)
    wanted = reference(replace(case, strategy="local", precision="fp64", lr=1.0))
    with pytest.raises(AssertionError):
        torch.testing.assert_close(
            join_ranks(results)["norms"]["norms"] * 1e6, wanted["norms"]["norms"], rtol=2e-2, atol=0
        )


def assert_near_and_float32(got, wanted):
    """Check that all state is float32 and master weights start from unrounded float32 weights."""
    for kind in wanted.keys() - HISTORIES:
        assert all(tensor.dtype == torch.float32 for tensor in got[kind].values())
    for name, tensor in wanted["param"].items():
        torch.testing.assert_close(
            got["param"][name].double(), tensor, rtol=0, atol=3 * 2 * 1e-3
        )  # Adam moves lr a step at most
    torch.testing.assert_close(got["norms"]["norms"], wanted["norms"]["norms"], rtol=2e-2, atol=0)


def assert_moved_by_tiny_updates(got, start):
    """Check that updates far below a bf16 step change master weights and EMA."""
    for name, before in start.items():
        for kind in ("param", "ema"):
            assert 0 < (got[kind][name] - before).abs().max() < 8 * 2e-6
        assert (got["param"][name].bfloat16() == before.bfloat16()).float().mean() > 0.8


BAD = {
    "NaN": lambda loss: loss * torch.nan,
    "infinite": lambda loss: loss * torch.inf,
    "finite gradient of an infinite loss": lambda loss: loss + torch.inf,
}


def train_through_a_bad_loss(world, device, case, bad):
    run = Training(world, device, case).train(1)
    before = run.result()
    last = world.rank == world.world_size - 1
    report = run.update(
        lambda loss, microbatch: BAD[bad](loss) if last and microbatch == 0 else loss
    )
    after = run.result()
    said = [bool(report.applied), report.grad_norm.item(), bool(report.scale_lowered)]
    return str(said), before, after, run.train(2).result(), train(world, device, case, 3)


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("strategy", [*STRATEGIES, *OFFLOADED])
def test_all_ranks_refuse_a_nonfinite_loss_of_one_rank(strategy, bad):
    """After the refused update, training continues as without it.

    NaN is tested in full precision, the other losses in bf16.
    """
    case = Case(
        strategy,
        precision(strategy) if bad == "NaN" else "bf16",
        optimizer="adamw",
        grad_accum_steps=2,
        lr=0.01,
    )
    reports, *results = zip(*run_ranks(2, train_through_a_bad_loss, case, bad), strict=True)
    assert set(reports) == {"[False, nan, False]"}
    before, after, later, undisturbed = map(join_ranks, results)
    assert_identical(after, before)
    assert_identical(later, undisturbed)


def update_without_the_loss_check(world, device):
    """Whether an update applies when the check of the loss is disabled."""
    run = Training(world, device, Case("ddp", "fp64"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            torch.Tensor, "isfinite", lambda self: torch.ones_like(self, dtype=torch.bool)
        )
        report = run.update(
            lambda loss, microbatch: BAD["finite gradient of an infinite loss"](loss)
        )
        return bool(report.applied)


def test_has_teeth_an_infinite_loss_whose_gradient_is_finite():
    assert run_ranks(2, update_without_the_loss_check) == [True, True]


def test_local_refuses_two_processes():
    with pytest.raises(RankFailed, match="ConfigError.*parallel.strategy='local' with 2 processes"):
        run_ranks(2, train, Case("local"))


@pytest.mark.parametrize(
    ("strategy", "file"), [("zero1", "zero1"), ("zero2", "zero2"), ("zero3", "zero3_shipped")]
)
def test_a_zero_stage_without_a_json_equals_the_shipped_json(strategy, file):
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
    """ConfigError suggests the right key, before DeepSpeed runs."""
    json = tmp_path / "zero.json"
    json.write_text('{"zero_optimization": {"stage": 2, "reduce_bucket_sise": 5}}')
    with pytest.raises(
        ConfigError,
        match="zero.json: 1 key cannot be used:\n.*reduce_bucket_sise: .*'reduce_bucket_size'",
    ):
        make_strategy(
            ParallelConfig(strategy="zero", zero_config=str(json)), World(), torch.device("cpu")
        )


def test_an_error_of_deepspeed_becomes_a_config_error():
    """DeepSpeed refuses float16 on this CPU."""

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


def linear_is_original(world, device, compiled):
    """Whether functional.linear is torch's own before, inside and after an update of ZeRO-3."""
    own = torch.nn.functional.linear
    inside = []
    run = Training(world, device, Case("zero3", "fp32", more=(("compile", compiled),)))
    inner = next(module for module in run.module.modules() if isinstance(module, TinyDenoiser))
    inner.register_forward_hook(lambda *_: inside.append(torch.nn.functional.linear is own))
    before = torch.nn.functional.linear is own
    run.train(1)
    return [before, *inside, torch.nn.functional.linear is own]


@pytest.mark.parametrize("compiled", [False, True])
def test_zero3_patches_linear_inside_its_model_only(compiled):
    """A compiled model keeps torch's own: the patch gave wrong gradients there on a GPU."""
    assert run_ranks(1, linear_is_original, compiled) == [[True, compiled, True]]
