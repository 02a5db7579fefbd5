"""Components with GPU-specific code: strategies, precisions, copy streams, pinned memory, LPL."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch import nn

from lpl_pretrain.checkpoint.staging import HostCopies
from lpl_pretrain.config.lpl import LPLConfig
from lpl_pretrain.data.batch import LatentBatch, on_device
from lpl_pretrain.losses.lpl.features import DTYPES, DecoderFeatures
from lpl_pretrain.losses.lpl.loss import LatentPerceptualLoss
from lpl_pretrain.models.autoencoder import LatentScaling, decoder_stages, load_autoencoder
from lpl_pretrain.parallel.float8 import convert_linear_layers
from lpl_pretrain.parallel.strategy import ParamRange
from lpl_pretrain.preflight.node_report import probe_device
from lpl_pretrain.runtime.device import bf16_is_native
from lpl_pretrain.runtime.dist import init
from lpl_pretrain.runtime.timer import Clock
from lpl_pretrain.runtime.world import World
from lpl_pretrain.trainer.stragglers import Probe
from tests.support.training import Case, join_ranks, train, train_one_process

NATIVE = ["local", "ddp", "fsdp2"]
ZERO = ["zero0", "zero1", "zero2", "zero3", "zero2_offload", "zero3_offload"]


ADAMW = Case(optimizer="adamw", lr=1e-2, max_grad_norm=0.5)


@pytest.fixture(scope="module")
def wanted():
    """Map each case to its result in one CPU process."""
    return {case: train_one_process(case) for case in (Case(), Case(grad_accum_steps=2), ADAMW)}


@pytest.fixture(scope="module")
def gpu(wanted):  # `wanted` is computed first: CPU tensors cannot use an NCCL group
    """The GPU in a process group of one NCCL rank, without TF32."""
    torch.set_float32_matmul_precision("highest")
    with torch.backends.cudnn.flags(allow_tf32=False):
        device = init(World(), group=True)
        assert dist.get_backend() == "nccl"
        yield device
        dist.destroy_process_group()


def differences(got, wanted):
    """Largest relative difference of each kind, relative to the largest value of a tensor."""
    assert got.keys() == wanted.keys()
    largest = {}
    for kind in wanted:
        pairs = [
            (got[kind][name].double().cpu(), wanted[kind][name].double()) for name in wanted[kind]
        ]
        largest[kind] = max(
            float((a - b).abs().max() / b.abs().max().clamp_min(1e-3)) for a, b in pairs
        )
    return largest


@pytest.mark.parametrize("grad_accum_steps", [1, 2])
@pytest.mark.parametrize("strategy", [*NATIVE, *ZERO])
def test_a_strategy_equals_one_cpu_process(gpu, wanted, strategy, grad_accum_steps):
    native = strategy in NATIVE
    case = Case(strategy, "fp64" if native else "fp32", grad_accum_steps=grad_accum_steps)
    errors = differences(
        join_ranks([train(World(), gpu, case)]), wanted[Case(grad_accum_steps=grad_accum_steps)]
    )
    assert max(errors.values()) < (1e-10 if native else 2e-5), errors


def test_offloaded_parameters_of_fsdp2(gpu, wanted):
    case = Case("fsdp2", "fp64", more=(("cpu_offload", True),))
    assert (
        max(differences(join_ranks([train(World(), gpu, case)]), wanted[Case()]).values()) < 1e-10
    )


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("strategy", ["local", "ddp", "fsdp2", "zero2", "zero3"])
def test_half_precision_stays_near(gpu, wanted, strategy, precision):
    assert bf16_is_native(gpu)
    case = replace(ADAMW, strategy=strategy, precision=precision)
    errors = differences(join_ranks([train(World(), gpu, case)]), wanted[ADAMW])
    assert errors["losses"] < 1e-2, errors
    assert 1e-7 < errors["norms"] < 5e-2, f"{precision} cannot be exact: {errors}"


def test_float8_products_are_near(gpu):
    torch.manual_seed(0)
    block = nn.ModuleDict(
        {"block": nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 64))}
    ).to(gpu, torch.bfloat16)
    x = torch.randn(24, 64, device=gpu, dtype=torch.bfloat16)
    exact = block["block"](x)
    assert convert_linear_layers(block, ["block"], emulate=False) == 2
    block["block"].compile()
    error = (block["block"](x) - exact).float().norm() / exact.float().norm()
    assert 1e-4 < error < 0.1


def test_batches_are_complete_while_the_device_is_busy(gpu):
    shape = (64, 8, 64, 64)
    batches = [
        LatentBatch(
            torch.full(shape, i, dtype=torch.float16), *torch.full((3, 64), i), None
        ).pin_memory()
        for i in range(12)
    ]
    sums, work = [], torch.randn(4096, 4096, device=gpu)
    for batch in on_device((batch for batch in batches), gpu):
        for _ in range(10):
            work = torch.tanh(work @ work)
        sums.append(batch.moments.mean() + 0 * work.sum())
        del batch  # its memory may be reused before the sum is computed
    torch.testing.assert_close(torch.stack(sums).cpu(), torch.arange(12.0))


def test_pinned_copies_hold_the_values_of_their_time(gpu):
    copies, value = HostCopies(), torch.zeros(1 << 22, device=gpu)
    for moment in range(4):
        value += 1
        ((_, piece),) = copies.copy([("param", ParamRange("w", (1 << 22,), 0, value))], gpu)
        value += 100  # queued behind the copy
        assert piece.tensor.is_pinned() and bool((piece.tensor == 101 * moment + 1).all())


def test_a_clock_measures_device_time(gpu):
    clock, work = Clock(gpu), torch.randn(8192, 8192, device=gpu)
    work @ work
    torch.cuda.synchronize()
    with clock.host("host"), clock.device("product"):
        for _ in range(50):
            work @ work
    seconds = clock.flush()
    assert seconds["product"] > 3 * seconds["host"], "the host only launches kernels"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_straggler_probe_is_short_and_repeatable(gpu, dtype):
    """Short enough for a log step, long enough to show a lower clock rate."""
    probe = Probe(gpu, dtype)
    seconds = [probe.seconds() for _ in range(6)]
    print(f"{dtype}: {1000 * seconds[-1]:.2f} ms")
    assert 1e-4 < seconds[-1] < 0.05 and max(seconds) < 1.2 * min(seconds)


def test_preflight_reports_the_device(gpu):
    report = probe_device(0)
    assert (
        report["device"] == torch.cuda.get_device_name(0)
        and report["device_problem"] is None
        and report["memory_gib"] > 1
    )
    assert "1 for process 1" in probe_device(1)["no_device"]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"decoder_precision": "bf16"},
        {"compile": True},
        {"compile": True, "decoder_precision": "bf16"},
    ],
)
def test_lpl_equals_the_cpu(gpu, options):
    torch.manual_seed(0)
    z0 = torch.randn(4, 4, 16, 16)
    z0_hat, weights = z0 + 0.3 * torch.randn_like(z0), torch.tensor([1.0, 0.0, 0.5, 2.0])

    def term(device, **options):
        config, compiled = LPLConfig(weight=1.0, **options), options.get("compile")
        scaling = LatentScaling(torch.zeros(4), torch.ones(4))
        stages = decoder_stages(load_autoencoder("asset:autoencoder_emoji").network)
        features = DecoderFeatures(
            stages, scaling, config.stages, dtype=DTYPES[config.decoder_precision]
        )
        if compiled:
            features.compile_layers()
        return LatentPerceptualLoss(config, features.to(device))(
            z0.to(device), z0_hat.to(device), weights.to(device)
        )

    got, wanted = term(gpu, **options), term("cpu")
    tolerance = 3e-2 if options.get("decoder_precision") else 2e-5
    for name in ("loss", "gradient"):
        a, b = getattr(got, name).double().cpu(), getattr(wanted, name).double()
        assert (a - b).norm() / b.norm() < tolerance, name
