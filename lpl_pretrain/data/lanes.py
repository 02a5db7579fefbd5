"""In which order one pool of shards is read: random enough to train on, sequential enough for disks
and object stores.

Each epoch shuffles the shards and lays them end to end.  That line is cut into `lanes` equal
stretches, which are read side by side, one sample of each in turn; inside a stretch, samples are
shuffled within blocks of `block_samples`.  So a batch mixes all lanes, and every lane moves through
its shards in small steps.  A pool no larger than lanes x block_samples is permuted as a whole.  n
counts samples of the pool since the start of training: position n costs the same for every n.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from lpl_pretrain.runtime.rng import numpy_generator


class LaneOrder:
    def __init__(
        self, shard_samples: Sequence[int], seed: int, name: str, *, lanes: int, block_samples: int
    ) -> None:
        """`name` is the identity of the pool: pools of the same size are in different orders."""
        self.sizes = np.asarray(shard_samples, dtype=np.int64)
        self.samples = int(self.sizes.sum())
        assert self.samples > 0, (name, shard_samples)
        self.seed, self.name = seed, name
        self.is_whole = self.samples <= lanes * block_samples
        self.lanes, self.block_samples = (
            (1, self.samples) if self.is_whole else (lanes, block_samples)
        )
        self._line = lru_cache(maxsize=2)(self._draw_line)
        self._block = lru_cache(maxsize=4 * self.lanes)(self._draw_block)

    def locate(self, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Counts (n,) -> (shard, row in it), both (n,) int64.  Every epoch serves every sample
        exactly once.
        """
        epochs, places = np.divmod(counts, self.samples)
        steps, lanes = np.divmod(places, self.lanes)
        blocks, inside = np.divmod(steps, self.block_samples)
        shards, rows = np.empty_like(counts), np.empty_like(counts)
        for epoch in np.unique(epochs):
            order, ends = self._line(int(epoch))
            in_epoch = np.flatnonzero(epochs == epoch)
            positions = np.empty(len(in_epoch), dtype=np.int64)
            which, places_of = np.unique(
                blocks[in_epoch] * self.lanes + lanes[in_epoch], return_inverse=True
            )
            for i, number in enumerate(which):
                block, lane = divmod(int(number), self.lanes)
                first, permutation = self._block(int(epoch), lane, block)
                mine = places_of == i
                positions[mine] = first + permutation[inside[in_epoch[mine]]]
            turn = np.searchsorted(ends, positions, side="right")
            shards[in_epoch] = order[turn]
            rows[in_epoch] = positions - ends[turn] + self.sizes[order[turn]]
        return shards, rows

    def _draw_line(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The epoch's order of shards, and where on the line each of them ends."""
        order = permutation(len(self.sizes), self.seed, f"shard_order/{self.name}", epoch)
        return order, np.cumsum(self.sizes[order])

    def _draw_block(self, epoch: int, lane: int, block: int) -> tuple[int, np.ndarray]:
        """Where on the line a block starts, and the order inside it."""
        share, rest = divmod(
            self.samples, self.lanes
        )  # the first `rest` lanes are one sample longer
        first = lane * share + min(lane, rest) + block * self.block_samples
        end = (lane + 1) * share + min(lane + 1, rest)
        size = min(self.block_samples, end - first)
        return first, permutation(size, self.seed, f"block_order/{self.name}", epoch, lane, block)


def permutation(size: int, seed: int, purpose: str, *ids: int) -> np.ndarray:
    """Sorted raw Philox words: numpy promises those across versions, and `Generator.permutation`
    not.
    """
    words = numpy_generator(seed, purpose, *ids).bit_generator.random_raw(size)
    return np.argsort(words, kind="stable")
