"""Which sample comes n-th: a pure function of (seed, fingerprints, n), the same for any ranks,
workers and restarts.

n counts samples over all ranks since the start of training.  Three questions, each with an answer
in closed form: which bucket is the global batch of (BucketSchedule), which folder gives the sample
(Mixture), where in it does it lie (LaneOrder). A pool is the samples of one bucket in one folder.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from numpy.typing import ArrayLike

from lpl_pretrain.config.data_mixture import DataFolders
from lpl_pretrain.data.lanes import LaneOrder
from lpl_pretrain.data.mixture import BucketSchedule, Mixture


@dataclass(frozen=True, slots=True)
class Places:
    """Where samples lie; arrays (n,) int64."""

    folder: np.ndarray
    shard: np.ndarray
    row: np.ndarray


@dataclass(frozen=True, slots=True)
class Pool:
    folder: int
    shards: np.ndarray  # (S,) numbers in the folder's index
    order: LaneOrder


class SampleOrder:
    def __init__(
        self,
        data: DataFolders,
        seed: int,
        global_batch_size: int,
        *,
        lanes: int,
        block_samples: int,
    ) -> None:
        name = data.merged.order_key
        self.shapes = [(bucket.height, bucket.width) for bucket in data.merged.buckets]
        self.pools: list[list[Pool]] = []  # by bucket
        self._mixtures: list[Mixture] = []
        shares: list[Fraction] = []  # of each bucket in all samples
        for shape in self.shapes:
            pools, weights = [], []
            for folder, (index, weight) in enumerate(zip(data.indexes, data.weights, strict=True)):
                numbers = {
                    i
                    for i, bucket in enumerate(index.buckets)
                    if (bucket.height, bucket.width) == shape
                }
                shards = np.array(
                    [i for i, entry in enumerate(index.shards) if entry.bucket in numbers],
                    dtype=np.int64,
                )
                if not shards.size:
                    continue
                sizes = [index.shards[i].samples for i in shards]
                label = f"{index.order_key}/{shape[0]}x{shape[1]}"
                pools.append(
                    Pool(
                        folder,
                        shards,
                        LaneOrder(sizes, seed, label, lanes=lanes, block_samples=block_samples),
                    )
                )
                weights.append(weight * sum(sizes) / index.samples)
            self.pools.append(pools)
            self._mixtures.append(Mixture(weights, seed, f"{name}/{shape[0]}x{shape[1]}"))
            shares.append(sum(weights, Fraction(0)))
        samples = [share * data.merged.samples for share in shares]
        self._buckets = BucketSchedule(samples, global_batch_size, seed, name)

    def locate(self, sample_indices: ArrayLike) -> Places:
        """Global sample counts (n,) -> where those samples lie."""
        counts = np.asarray(sample_indices, dtype=np.int64)
        assert counts.size == 0 or counts.min() >= 0, counts.min()
        places = Places(*(np.empty_like(counts) for _ in range(3)))
        buckets, counts = self._buckets.assign(counts)
        for bucket in np.unique(buckets):
            of_bucket = np.flatnonzero(buckets == bucket)
            streams, inside = self._mixtures[bucket].assign(counts[of_bucket])
            for stream in np.unique(streams):
                pool, mine = self.pools[bucket][stream], of_bucket[streams == stream]
                shards, places.row[mine] = pool.order.locate(inside[streams == stream])
                places.folder[mine], places.shard[mine] = pool.folder, pool.shards[shards]
        return places

    def shards_at_once(self, folder: int) -> int:
        """How many shards of a folder are read side by side: one for each lane of each bucket, all
        of a pool without lanes.
        """
        pools = [pool for pools in self.pools for pool in pools if pool.folder == folder]
        return sum(
            len(pool.shards) if pool.order.is_whole else min(pool.order.lanes, len(pool.shards))
            for pool in pools
        )

    def substitute_location(self, place: tuple[int, int, int], key: int) -> tuple[int, int, int]:
        """(folder, shard, row) of a sample of the same pool, picked by 64 random bits."""
        folder, shard, _ = place
        pool = next(
            pool
            for pools in self.pools
            for pool in pools
            if pool.folder == folder and (pool.shards == shard).any()
        )
        position, ends = key % pool.order.samples, np.cumsum(pool.order.sizes)
        turn = int(np.searchsorted(ends, position, side="right"))
        return folder, int(pool.shards[turn]), int(position - ends[turn] + pool.order.sizes[turn])
