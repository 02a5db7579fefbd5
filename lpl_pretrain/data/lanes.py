"""Read order of one pool of shards: random enough to train on, sequential enough for disks and
object stores.

Each epoch shuffles the shards and concatenates them.  The concatenation is cut into `lanes` equal
ranges, which are read interleaved, one sample of each in turn (as tf.data's `interleave`); within a
lane, samples are shuffled in blocks of `shuffle_block_samples`.  A batch mixes all lanes, while
every lane moves through its shards sequentially.  A pool of at most lanes x shuffle_block_samples
samples is permuted as a whole.  Pool indices count samples of the pool since the start of training;
any of them is located at the same cost.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from lpl_pretrain.runtime.rng import numpy_generator


class LaneOrder:
    """Maps pool indices to (shard, row)."""

    def __init__(
        self,
        shard_samples: Sequence[int],
        seed: int,
        name: str,
        *,
        lanes: int,
        shuffle_block_samples: int,
    ) -> None:
        """`name` identifies the pool: pools of the same size are in different orders."""
        self.sizes = np.asarray(shard_samples, dtype=np.int64)
        self.samples = int(self.sizes.sum())
        assert self.samples > 0, (name, shard_samples)
        self.seed = seed
        self.name = name
        self.is_whole = self.samples <= lanes * shuffle_block_samples
        self.lanes = 1 if self.is_whole else lanes
        self.shuffle_block_samples = self.samples if self.is_whole else shuffle_block_samples
        self._shard_order = lru_cache(maxsize=2)(self._draw_shard_order)
        self._block = lru_cache(maxsize=4 * self.lanes)(self._draw_block)

    def locate(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Pool indices (n,) -> (shard, row), both (n,) int64.  Every epoch has every sample exactly
        once.
        """
        epochs, epoch_indices = np.divmod(indices, self.samples)
        lane_indices, lanes = np.divmod(epoch_indices, self.lanes)
        blocks, block_indices = np.divmod(lane_indices, self.shuffle_block_samples)
        shards = np.empty_like(indices)
        rows = np.empty_like(indices)
        for epoch in np.unique(epochs):
            in_epoch = np.flatnonzero(epochs == epoch)
            # position: index into the concatenation of the epoch's shards
            positions = np.empty(len(in_epoch), dtype=np.int64)
            lane_blocks, inverse = np.unique(
                blocks[in_epoch] * self.lanes + lanes[in_epoch], return_inverse=True
            )
            for i, lane_block in enumerate(lane_blocks):
                block, lane = divmod(int(lane_block), self.lanes)
                first, block_order = self._block(int(epoch), lane, block)
                in_block = inverse == i
                positions[in_block] = first + block_order[block_indices[in_epoch[in_block]]]
            shard_order, shard_ends = self._shard_order(int(epoch))
            nth_shard = np.searchsorted(shard_ends, positions, side="right")
            shards[in_epoch] = shard_order[nth_shard]
            shard_starts = shard_ends[nth_shard] - self.sizes[shard_order[nth_shard]]
            rows[in_epoch] = positions - shard_starts
        return shards, rows

    def _draw_shard_order(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """(order of the shards in the epoch, position at which each of them ends)."""
        order = permutation(len(self.sizes), self.seed, f"shard_order/{self.name}", epoch)
        return order, np.cumsum(self.sizes[order])

    def _draw_block(self, epoch: int, lane: int, block: int) -> tuple[int, np.ndarray]:
        """(position at which a block starts, order of the samples in it)."""
        # the first `remainder` lanes are one sample longer
        lane_samples, remainder = divmod(self.samples, self.lanes)
        first = lane * lane_samples + min(lane, remainder) + block * self.shuffle_block_samples
        lane_end = (lane + 1) * lane_samples + min(lane + 1, remainder)
        size = min(self.shuffle_block_samples, lane_end - first)
        return first, permutation(size, self.seed, f"block_order/{self.name}", epoch, lane, block)


def permutation(size: int, seed: int, purpose: str, *ids: int) -> np.ndarray:
    """Random permutation of range(size).

    Sorts raw Philox output, which numpy keeps stable across versions; `Generator.permutation` has
    no such guarantee.
    """
    keys = numpy_generator(seed, purpose, *ids).bit_generator.random_raw(size)
    return np.argsort(keys, kind="stable")
