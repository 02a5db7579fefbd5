"""Data on several ranks: they read the samples of one process and agree on bad samples."""

from pathlib import Path

import pytest
import torch

from lpl_pretrain.config.rundir import RunDir
from lpl_pretrain.runtime.dist import sum_over_ranks
from lpl_pretrain.runtime.world import World
from lpl_pretrain.trainer.assemble import assemble
from tests.distributed.test_lpl import assert_same, train
from tests.support.configs import train_config
from tests.support.latents import mixed_dataset, tiny_dataset
from tests.support.ranks import run_ranks

BATCH, STEPS = 24, 6
STREAM_OPTIONS = {"lanes": 2, "shuffle_block_samples": 3, "flips": True}


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    return mixed_dataset(tmp_path_factory.mktemp("mixed"))


@pytest.fixture(scope="module")
def mixed_rows(mixed):
    """Samples of each step that one process reads from `mixed`."""
    return rows_of_each_step(World(), torch.device("cpu"), mixed, STREAM_OPTIONS)


@pytest.fixture(scope="module")
def mixed_reference(mixed):
    return train(World(), torch.device("cpu"), mixed, "local", "fp64", 8, {})


def rows_of_each_step(world, device, data, options, first_step=0):
    """Samples of this rank: for each step {sample index: moments}."""
    config = train_config(
        data={"folder": data[0], **options},
        autoencoder=data[1],
        batch={"global_batch_size": BATCH},
        parallel={"strategy": "local" if world.world_size == 1 else "ddp"},
    )
    run = assemble(config, RunDir(Path("never_written")), world, device)
    steps = []
    for step in range(first_step, STEPS):
        rows = {}
        for plan in run.microbatch_plans(step):
            batch = run.stream.read(plan.sample_indices)
            rows |= dict(zip(batch.sample_indices.tolist(), batch.moments.clone(), strict=True))
        steps.append(rows)
    return steps


@pytest.mark.parametrize(("ranks", "workers"), [(2, 1), (3, 2), (4, 1), (6, 1), (8, 3)])
def test_ranks_together_read_what_one_process_reads(mixed, mixed_rows, ranks, workers):
    parts = run_ranks(ranks, rows_of_each_step, mixed, {**STREAM_OPTIONS, "workers": workers})
    for step, wanted in enumerate(mixed_rows):
        got = {index: row for part in parts for index, row in part[step].items()}
        assert sum(len(part[step]) for part in parts) == len(got) == BATCH
        # all ranks read the same bucket
        assert len({tuple(row.shape) for row in got.values()}) == 1
        assert all(torch.equal(got[index], row) for index, row in wanted.items())
    # which changes between steps
    assert len({tuple(row.shape) for step in mixed_rows for row in step.values()}) > 1


def test_resumed_on_another_number_of_ranks(mixed, mixed_rows):
    parts = run_ranks(3, rows_of_each_step, mixed, STREAM_OPTIONS, 4)
    for step, wanted in enumerate(mixed_rows[4:]):
        got = {index: row for part in parts for index, row in part[step].items()}
        assert all(torch.equal(got[index], row) for index, row in wanted.items())


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_training_on_buckets_flips_and_a_mixture_equals_one_process(
    mixed, mixed_reference, strategy
):
    results = run_ranks(2, train, mixed, strategy, "fp64", 2, {})
    assert_same(
        results,
        mixed_reference,
        rtol=1e-11,
        atol=1e-13,
    )


def rows_with_bad_sample(world, device, data, options):
    steps = rows_of_each_step(
        world, device, data, {**options, "on_error": "skip", "max_skipped_fraction": 0.2}
    )
    return steps, float(sum_over_ranks(torch.ones(1)))


def test_ranks_agree_on_a_bad_sample(tmp_path):
    """Only the rank that verifies the shard detects a bit flip; all use the same substitute."""
    folder, autoencoder = tiny_dataset(tmp_path, 24)
    shard = next(Path(folder).glob("*.tar"))
    raw = bytearray(shard.read_bytes())
    raw[raw.index(b"moments.npy") // 512 * 512 + 512 + 128 + 77] ^= 1
    shard.write_bytes(raw)
    wanted_steps, _ = rows_with_bad_sample(World(), torch.device("cpu"), (folder, autoencoder), {})
    unverified = rows_of_each_step(
        World(), torch.device("cpu"), (folder, autoencoder), {"verify": "sizes"}
    )
    replaced = [
        index
        for a, b in zip(wanted_steps, unverified, strict=True)
        for index in a
        if not torch.equal(a[index], b[index])
    ]
    assert 1 <= len(replaced) <= STEPS  # one of 24 samples, in each epoch of one batch
    for ranks in (2, 4):
        parts = [
            part for part, _ in run_ranks(ranks, rows_with_bad_sample, (folder, autoencoder), {})
        ]
        for step, wanted in enumerate(wanted_steps):
            got = {index: row for part in parts for index, row in part[step].items()}
            assert all(torch.equal(got[index], row) for index, row in wanted.items())
