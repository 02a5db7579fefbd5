"""Order within a pool: every epoch is a permutation, every index costs the same, and each lane
reads sequentially.
"""

from __future__ import annotations

import numpy as np
import pytest

from lpl_pretrain.data.lanes import LaneOrder
from tests.support.work import Work, count_work

SIZES = [7, 1, 30, 12, 12, 50, 3, 2]
"""117 samples in uneven shards."""


def lanes(
    seed: int = 0, lanes: int = 4, block: int = 8, sizes: list[int] = SIZES, name: str = "pool"
) -> LaneOrder:
    return LaneOrder(sizes, seed, name, lanes=lanes, shuffle_block_samples=block)


def flat(order: LaneOrder, indices: np.ndarray) -> np.ndarray:
    """Positions in storage order."""
    shards, rows = order.locate(indices)
    assert (rows >= 0).all() and (rows < order.sizes[shards]).all()
    return (np.cumsum(order.sizes) - order.sizes)[shards] + rows


@pytest.mark.parametrize("sizes", [SIZES, [1], [1] * 40, [400], [5, 300], [3] * 67], ids=str)
@pytest.mark.parametrize(
    ("num_lanes", "block"), [(1, 1), (1, 8), (4, 8), (7, 3), (16, 1), (3, 1000)]
)
def test_every_epoch_has_every_sample_once(sizes: list[int], num_lanes: int, block: int) -> None:
    order = lanes(lanes=num_lanes, block=block, sizes=sizes)
    epochs = flat(order, np.arange(4 * order.samples)).reshape(4, -1)
    assert (np.sort(epochs, axis=1) == np.arange(order.samples)).all()
    if order.samples > 30 and block > 1:
        assert len({tuple(epoch) for epoch in epochs.tolist()}) == 4


def test_does_not_depend_on_earlier_calls() -> None:
    order, wanted = lanes(), flat(lanes(), np.arange(1000))
    indices = np.random.default_rng(0).permutation(1000)
    assert np.array_equal(flat(order, indices), wanted[indices])


def test_seed_name_and_epoch_change_it() -> None:
    orders = [
        flat(lanes(seed=seed, name=name), np.arange(117)).tolist()
        for seed in (0, 1)
        for name in ("pool", "other")
    ]
    assert len({tuple(order) for order in orders}) == 4


def test_a_pool_that_fits_the_blocks_is_permuted_as_a_whole() -> None:
    """Neighbours in storage may be at any index: they are not confined to a lane."""
    order = lanes(lanes=16, block=1024, sizes=[100] * 20)
    assert (order.lanes, order.shuffle_block_samples) == (1, 2000)
    distance = np.abs(np.diff(flat(order, np.arange(2000))))
    assert 550 < distance.mean() < 780  # a third of 2000 for a random permutation


def test_a_batch_mixes_all_lanes() -> None:
    order = lanes(lanes=16, block=64, sizes=[1000] * 100)
    shards, _ = order.locate(np.arange(48_000, 48_064))
    assert len(set(shards.tolist())) >= 15


def test_each_lane_reads_sequentially() -> None:
    """Consecutive reads of a lane are at most one block apart, except at the end of a shard."""
    order = lanes(lanes=8, block=64, sizes=[1000] * 64)
    shards, rows = order.locate(np.arange(order.samples))
    jumps, far = [], 0
    for lane in range(8):
        shard, row = shards[lane::8], rows[lane::8]
        same = shard[1:] == shard[:-1]
        jumps.append(np.abs(np.diff(row))[same])
        far += int((~same).sum())
    seek = np.concatenate(jumps)
    assert seek.max() < 2 * 64 and seek.mean() < 32
    assert far < 0.03 * order.samples
    shuffled = np.random.default_rng(0).permutation(order.samples)
    assert np.abs(np.diff(shuffled)).mean() > 500 * seek.mean()  # what a full permutation would do


def test_every_index_costs_the_same() -> None:
    """The first batch after ten thousand epochs takes no more work than the first of all."""
    sizes = [8192] * 1221  # ten million samples

    def first_batch(epoch: int) -> Work:
        first = epoch * sum(sizes)
        order = lanes(lanes=16, block=1024, sizes=sizes)
        return count_work(lambda: order.locate(np.arange(first, first + 256)))

    first_batch(0)  # fills the caches of the first call in a process
    early, late = first_batch(0), first_batch(10_000)
    assert late.calls < 2 * early.calls
    assert late.peak_bytes < 2 * early.peak_bytes < 2**20


def test_the_order_never_changes() -> None:
    """A run that a later version resumes must go on in the same order."""
    assert flat(lanes(lanes=2, block=3, sizes=[5, 4, 6]), np.arange(15)).tolist() == [
        5,
        0,
        7,
        14,
        6,
        13,
        10,
        2,
        8,
        1,
        9,
        3,
        11,
        4,
        12,
    ]
