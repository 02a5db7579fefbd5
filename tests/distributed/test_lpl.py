"""LPL under every strategy, world size and accumulation equals one process on the global batch."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lpl_pretrain.config.rundir import RunDir
from lpl_pretrain.runtime.timer import Clock
from lpl_pretrain.runtime.world import World
from lpl_pretrain.trainer.assemble import assemble
from lpl_pretrain.trainer.metrics import Meter
from tests.support.configs import train_config
from tests.support.latents import tiny_dataset
from tests.support.ranks import run_ranks
from tests.support.training import ROOT, ZERO_CONFIGS, join_ranks
from tests.support.updates import batches_of

STEPS = 2
LPL = {
    "weight": 3.0,
    "gate": {"noise_level_below": 0.7},
    "chunk_size": 2,
}
"""Three of eight samples are gated, which is uneven over two ranks."""
OPTIONS = {
    "the paper's": {},
    "crop, half of the samples": {
        "crop": {"side": 4, "halo": 1},
        "sample_fraction": 0.5,
        "noise_weighting": {"kind": "min_snr"},
    },
    "batch statistics": {"normalize": {"over": "batch"}},
    "diffusers_script": {"preset": "diffusers_script"},
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return tiny_dataset(tmp_path_factory.mktemp("data"))


def train(
    world, device, data, strategy, precision, micro_batch_size, lpl, decodes_padding=False, size=8
):
    """Train STEPS updates with unclipped SGD on global batches of `size`.

    Returns this rank's parameters and EMA, gradient norms and metrics.
    """
    parallel = {
        "precision": precision,
        "strategy": "zero" if strategy in ZERO_CONFIGS else strategy,
    }
    if strategy in ZERO_CONFIGS:
        parallel["zero_config"] = str(ROOT / ZERO_CONFIGS[strategy])
    if strategy == "hsdp":
        parallel |= {"strategy": "fsdp2", "shard_size": max(1, world.world_size // 2)}
    config = train_config(
        data__folder=data[0],
        autoencoder=data[1],
        optimizer={"kind": "sgd", "lr": 0.05, "max_grad_norm": 1e9},
        parallel=parallel,
        batch={"global_batch_size": size, "micro_batch_size": micro_batch_size},
        conditioning={"label_dropout": 0.3},
        ema={"decay": 0.9},
        lpl={**LPL, "decoder_precision": "fp64" if precision == "fp64" else "fp32", **lpl},
    )
    run = assemble(config, RunDir(Path("never_written")), world, device)
    meter, norms = Meter(device), []
    for step in range(STEPS):
        batches = batches_of(run, step)
        if decodes_padding:
            batches = [
                replace(batch, draws=replace(batch.draws, num_lpl=len(batch.draws.t)))
                for batch in batches
            ]
        result = run.updater.update(step, batches, meter, Clock(device))
        norms.append(result.grad_norm.item())
        run.ema.update(step + 1)
    kinds = {
        "param": run.strategy.local_params(),
        "ema": (piece for _, piece in run.ema.local_averages()),
    }
    pieces = {
        kind: [(p.name, list(p.shape), p.start, p.tensor.clone()) for p in some]
        for kind, some in kinds.items()
    }
    return {"pieces": pieces, "norms": norms, "metrics": meter.flush()}


@pytest.fixture(scope="module")
def reference(data):
    """Function that trains in one process on the global batch, once for each argument list."""
    results = {}

    def train_once(lpl, precision="fp64", size=8):
        key = (json.dumps(lpl, sort_keys=True), precision, size)
        if key not in results:
            world, cpu = World(), torch.device("cpu")
            results[key] = train(world, cpu, data, "local", precision, size, lpl, size=size)
        return results[key]

    return train_once


def assert_same(results, wanted, rtol, atol):
    got, expected = join_ranks(results), join_ranks([wanted])
    for kind in ("param", "ema"):
        for name, tensor in expected[kind].items():
            torch.testing.assert_close(
                got[kind][name].double(), tensor.double(), rtol=rtol, atol=atol
            )
    torch.testing.assert_close(
        got["norms"]["norms"], expected["norms"]["norms"], rtol=max(rtol, 1e-12), atol=0
    )
    for name in wanted["metrics"]:
        assert results[0]["metrics"][name] == pytest.approx(
            wanted["metrics"][name], rel=max(100 * rtol, 1e-6)
        ), name


ALL = ["ddp", "fsdp2", "hsdp", "zero0", "zero1", "zero2", "zero3"]
MATRIX = [
    (strategy, world_size)
    for strategy in ALL
    for world_size in (1, 2, 4)
    if (strategy, world_size) != ("hsdp", 1)
]


def train_with_each(world, device, data, strategy, precision, micro_batch_sizes, size):
    return [
        train(world, device, data, strategy, precision, micro, {}, size=size)
        for micro in micro_batch_sizes
    ]


@pytest.mark.parametrize(("strategy", "world_size"), MATRIX)
def test_all_strategies_and_world_sizes(data, reference, strategy, world_size):
    """Parameters and EMA with one, two and four micro-batches, dropped labels and uneven gates.

    Tolerance: 1e-6 where DeepSpeed keeps float32, else 1e-11.
    """
    precision = "fp32" if strategy.startswith("zero") else "fp64"
    micro = [16 // world_size // steps for steps in (1, 2, 4)]
    tolerance = (
        {"rtol": 2e-5, "atol": 1e-6} if precision == "fp32" else {"rtol": 1e-11, "atol": 1e-13}
    )
    by_rank = run_ranks(world_size, train_with_each, data, strategy, precision, micro, 16)
    for results in zip(*by_rank, strict=True):
        assert_same(results, reference({}, precision, size=16), **tolerance)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_equals_one_process_in_float64(data, reference, strategy, options):
    lpl = OPTIONS[options]
    # statistics over the batch do not allow accumulation
    micro = 4 if options == "batch statistics" else 2
    if lpl.get("preset") == "diffusers_script":
        lpl = {**lpl, "gate": LPL["gate"]}
    assert_same(
        run_ranks(2, train, data, strategy, "fp64", micro, lpl),
        reference(lpl),
        rtol=1e-11,
        atol=1e-13,
    )


@pytest.mark.parametrize("strategy", ["zero1", "zero2", "zero3"])
def test_equals_one_process_under_zero(data, reference, strategy):
    """DeepSpeed keeps float32 master weights, hence float32 and wider tolerances."""
    results = run_ranks(2, train, data, strategy, "fp32", 2, {})
    assert_same(results, reference({}, "fp32"), rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2", "zero2"])
def test_bf16_is_near(data, reference, strategy):
    results = run_ranks(2, train, data, strategy, "bf16", 2, {"decoder_precision": "bf16"})
    got, wanted = join_ranks(results), join_ranks([reference({})])
    torch.testing.assert_close(got["norms"]["norms"], wanted["norms"]["norms"], rtol=3e-2, atol=0)
    assert results[0]["metrics"]["loss/lpl"] == pytest.approx(
        reference({})["metrics"]["loss/lpl"], rel=5e-2
    )


def test_has_teeth_padding_that_counts(data, reference):
    """Two LPL samples in four microbatches: two of these decode a sample that must not count."""
    lpl = {"sample_fraction": 0.5}
    results = run_ranks(2, train, data, "ddp", "fp64", 2, lpl, True)
    with pytest.raises(AssertionError):
        assert_same(results, reference(lpl), rtol=1e-3, atol=1e-4)
