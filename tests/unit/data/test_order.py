"""Order of samples: a pure function of (seed, fingerprints, sample index), the same for every
layout of ranks.
"""

from __future__ import annotations

import itertools
from collections import Counter

import numpy as np
import pytest

from lpl_pretrain.config.data_mixture import DataFolders
from lpl_pretrain.config.dataset import MIX_CYCLE_SAMPLES
from lpl_pretrain.data.order import Locations, SampleOrder
from tests.support.indexes import simulated_folders, simulated_index
from tests.support.work import count_work

SQUARE, TALL, WIDE = (16, 16), (24, 12), (12, 24)


def one_folder(sizes: list[int] = [5, 9, 1, 8]) -> DataFolders:  # noqa: B006
    return simulated_folders({"a": 1.0}, {"a": simulated_index("a", {SQUARE: sizes})})


def bucketed() -> DataFolders:
    index = simulated_index("a", {TALL: [31, 40], SQUARE: [100, 1, 90, 55], WIDE: [7]})
    return simulated_folders({"a": 1.0}, {"a": index})


def mixed() -> DataFolders:
    indexes = {
        "a": simulated_index("a", {TALL: [31, 40], SQUARE: [100, 55]}),
        "b": simulated_index("b", {SQUARE: [20], WIDE: [33]}),
    }
    return simulated_folders({"a": 0.75, "b": 0.25}, indexes)


def order_of(
    data: DataFolders, seed: int = 7, batch: int = 48, lanes: int = 3, block: int = 4
) -> SampleOrder:
    return SampleOrder(data, seed, batch, lanes=lanes, shuffle_block_samples=block)


def table(locations: Locations) -> np.ndarray:
    return np.stack([locations.folder, locations.shard, locations.row], axis=1)


@pytest.mark.parametrize("data", [one_folder, bucketed, mixed], ids=lambda f: f.__name__)
def test_same_samples_for_any_layout(data) -> None:
    """Ranks, micro-batches and resume points split the sample indices differently; their union is
    the same in every batch.
    """
    folders, total = data(), 480
    layouts = [
        layout
        for layout in itertools.product([24, 48, 96], [1, 2, 3, 4, 6, 8], [1, 2, 4], [0, 96, 288])
        if layout[0] % (layout[1] * layout[2]) == 0
    ]  # batch, ranks, accumulation, resumed at
    assert len(layouts) > 100
    wanted = {
        batch: table(order_of(folders, batch=batch).locate(np.arange(total)))
        for batch in (24, 48, 96)
    }
    for batch, ranks, accumulation, resumed in layouts:
        size = batch // ranks // accumulation
        orders = [order_of(folders, batch=batch) for _ in range(ranks)]
        got = np.full((total, 3), -1)
        for start in range(resumed, total, batch):
            for rank, micro in itertools.product(reversed(range(ranks)), range(accumulation)):
                first = start + (rank * accumulation + micro) * size
                indices = np.arange(first, first + size)
                got[indices] = table(orders[rank].locate(indices))
        assert np.array_equal(got[resumed:], wanted[batch][resumed:]), (
            batch,
            ranks,
            accumulation,
            resumed,
        )


def test_has_teeth() -> None:
    """An order that depends on the rank, here by its seed, fails the test above."""
    folders = one_folder()
    whole = table(order_of(folders).locate(np.arange(48)))
    halves = [
        table(order_of(folders, seed=7 + rank).locate(np.arange(24 * rank, 24 * rank + 24)))
        for rank in (0, 1)
    ]
    assert not np.array_equal(np.concatenate(halves), whole)


@pytest.mark.parametrize("sizes", [[23], [1] * 23, [22, 1], [5, 9, 1, 8], [1, 1, 400]], ids=str)
def test_uneven_shards_and_one_giant_shard(sizes: list[int]) -> None:
    """No rank waits for the end of another rank's shard: sample indices go on into the next epoch
    in the middle of a batch.
    """
    order, total = order_of(one_folder(sizes)), sum(sizes)
    epochs = table(order.locate(np.arange(3 * total))).reshape(3, total, 3)
    assert all(len({tuple(location) for location in epoch.tolist()}) == total for epoch in epochs)


@pytest.mark.parametrize("samples", [1, 3])
def test_fewer_samples_than_ranks(samples: int) -> None:
    """Every rank has its part of every batch; samples repeat within a batch."""
    counts = Counter(table(order_of(one_folder([samples])).locate(np.arange(96)))[:, 2].tolist())
    assert set(counts.values()) == {96 // samples}


def test_one_bucket_per_batch_and_every_sample_read() -> None:
    data = bucketed()
    order, shards = order_of(data, batch=8), data.indexes[0].shards
    locations = order.locate(np.arange(8 * 324))  # 324 samples: eight epochs
    buckets = np.array([shards[shard].bucket for shard in locations.shard]).reshape(-1, 8)
    assert (buckets == buckets[:, :1]).all()
    counts = Counter(map(tuple, table(locations).tolist()))
    assert len(counts) == 324 and max(counts.values()) - min(counts.values()) <= 2


def test_folders_by_weight_within_every_cycle() -> None:
    indexes = {
        "a": simulated_index("a", {SQUARE: [300, 55]}),
        "b": simulated_index("b", {SQUARE: [20]}),
    }
    order = order_of(simulated_folders({"a": 3.0, "b": 1.0}, indexes))
    locations = order.locate(np.arange(2 * MIX_CYCLE_SAMPLES))
    assert (locations.folder == 1).reshape(2, -1).sum(axis=1).tolist() == [
        MIX_CYCLE_SAMPLES // 4
    ] * 2
    rows = Counter(locations.row[locations.folder == 1].tolist())
    assert max(rows.values()) - min(rows.values()) <= 1  # 20 samples, each as often as the others


def test_folders_with_buckets_keep_both_fractions() -> None:
    data = mixed()
    order = order_of(data, batch=8)
    locations = order.locate(np.arange(8 * 8192))
    assert abs((locations.folder == 0).mean() - 0.75) < 0.005
    wide = np.array(
        [
            data.indexes[1].shards[shard].bucket == 1
            for shard in locations.shard[locations.folder == 1]
        ]
    )
    assert abs(wide.mean() - 33 / 53) < 0.01


def test_fingerprint_and_seed_change_the_order() -> None:
    def first(name: str, seed: int) -> list:
        folders = simulated_folders({name: 1.0}, {name: simulated_index(name, {SQUARE: [23]})})
        return table(order_of(folders, seed=seed).locate(np.arange(23))).tolist()

    assert (
        first("a", 0) != first("b", 0)
        and first("a", 0) != first("a", 1)
        and first("a", 0) == first("a", 0)
    )


def test_substitutes_are_of_the_same_pool() -> None:
    data = bucketed()
    order = order_of(data)
    drawn = {order.substitute_location((0, 2, 5), key) for key in range(246)}
    assert len(drawn) == 246 and {
        data.indexes[0].shards[shard].bucket for _, shard, _ in drawn
    } == {1}


def test_ten_million_samples_open_at_once() -> None:
    index = simulated_index("a", {SQUARE: [8192] * 900, TALL: [8192] * 200, WIDE: [8192] * 121})
    folders = simulated_folders({"a": 1.0}, {"a": index})

    def open_and_locate() -> None:
        order = SampleOrder(folders, 0, 1024, lanes=16, shuffle_block_samples=1024)
        order.locate(np.arange(10_000_384, 10_000_384 + 1024))

    work = count_work(open_and_locate)
    assert work.calls < 10_000
    assert work.peak_bytes < 4 * 2**20, "less than a byte for each sample"


def test_negative_indices_are_a_bug() -> None:
    with pytest.raises(AssertionError):
        order_of(one_folder()).locate([-1])
